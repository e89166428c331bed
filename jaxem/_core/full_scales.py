"""Covariances by Cholesky factors, own or shared, full or diagonal."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.blocks import weighted_second_moments
from jaxem._core.checks import check_shape, check_values
from jaxem._core.dense_scales import AbstractDense
from jaxem._core.numerics import as_float, divide, least_log_scale
from jaxem._core.parameters import replace
from jaxem._core.scales import HALF_LOG_2PI, MIN_SPREAD, check_min_spread


class FullScale(AbstractDense):
    """Covariances by Cholesky factors, own or shared; diagonal without a part `below`."""

    log_scale: Float[Array, "c d"]
    below: Float[Array, "c d d"] | None
    shared: bool = eqx.field(static=True)
    min_spread: float = eqx.field(static=True)
    expanded: bool = eqx.field(static=True, default=False)

    @property
    def covariance(self) -> Array:
        covariance = la.matmul(self.factor(), la.transpose(self.factor()))
        return covariance[0] if self.shared else covariance

    def num_free_parameters(self, free: np.ndarray) -> int:
        d = self.log_scale.shape[-1]
        each = 1 if free.ndim > 1 else d if self.below is None else d * (d + 1) // 2
        return int(np.sum(free)) * each

    @property
    def least_count(self) -> int:
        return 0 if self.shared else self.log_scale.shape[-1] + 1

    def log_norm(self) -> Float[Array, " c"]:
        return -jnp.sum(self.log_scale, axis=1) - self.log_scale.shape[1] * HALF_LOG_2PI

    def factor(self) -> Float[Array, "c d d"]:
        if self.below is None:
            return jnp.exp(self.log_scale)[:, :, None] * self._eye()
        return la.lower(self.log_scale, self.below)

    def _eye(self) -> Float[Array, "d d"]:
        return jnp.eye(self.log_scale.shape[-1], dtype=self.log_scale.dtype)

    def whitener(self) -> Float[Array, "c d d"]:
        if self.below is None:
            return jnp.exp(-self.log_scale)[:, :, None] * self._eye()
        return la.inverse_of_lower(self.factor())

    def best(self, scatter: Array, count: Array) -> Self:
        root = la.cholesky(self.best_covariance(scatter, count))
        return self._with(la.matmul(self.factor(), root))

    def best_covariance(self, scatter: Array, count: Array) -> Float[Array, "c d d"]:
        count = count[:, None, None]
        best = jnp.where(count > 0, divide(scatter, count), self._eye())
        return self._eye() * best if self.below is None else best

    def _with(self, factor: Float[Array, "c d d"]) -> Self:
        log_scale, below = la.parts_of_lower(factor)
        return replace(self, log_scale=log_scale, below=None if self.below is None else below)

    def with_covariance(self, name: str, value: Array) -> Self:
        diagonal = self.below is None
        full = full_scale(name, value, self.log_scale, shared=self.shared, diagonal=diagonal)
        return replace(self, log_scale=full.log_scale, below=full.below)

    def scaled(self, spread: Array, num_components: int) -> Self:
        c, d = 1 if self.shared else num_components, self.log_scale.shape[1]
        spread = jnp.maximum(spread, jnp.finfo(self.log_scale.dtype).tiny)
        least = least_log_scale(self.log_scale)
        log_scale = jnp.maximum(self.log_scale[:1] + 0.5 * jnp.log(spread), least)
        below = self.below
        if below is not None:
            below = jnp.broadcast_to(below[:1] * jnp.sqrt(spread), (c, d, d))
        return replace(self, log_scale=jnp.broadcast_to(log_scale, (c, d)), below=below)


def full_scale(
    name: str,
    value: ArrayLike,
    like: Float[Array, "k d"],
    *,
    shared: bool | None = False,
    diagonal: bool = False,
    singular: bool = False,
    min_spread: float = MIN_SPREAD,
) -> FullScale:
    """The scale of covariances (k, d, d), or (d, d) for all; `shared` None takes either.

    With `diagonal` they stay diagonal; `singular` takes rows of zeros as well. It has the dtype and
    the sizes of `like`, such as the means.

    **Raises:** `ValueError` for another shape, or what is no covariance.
    """
    covariance, (k, d) = as_float(value, name, like.dtype), like.shape
    shared = covariance.ndim == 2 if shared is None else shared
    check_shape(name, covariance, (d, d) if shared else (k, d, d))
    covariance = covariance.reshape(-1, d, d)
    deviation = jnp.sqrt(jnp.abs(jnp.diagonal(covariance, axis1=-2, axis2=-1)))
    gap = jnp.abs(covariance - la.transpose(covariance))
    slack = jnp.finfo(covariance.dtype).eps ** 0.5 * la.outer(deviation, deviation)
    check_values(~(gap > slack), f"{name} is not symmetric.")
    if diagonal:
        check_values((covariance == 0) | np.eye(d, dtype=bool), f"{name} is not diagonal.")
    eye = jnp.eye(d, dtype=covariance.dtype)
    none = singular & jnp.all(covariance == 0, axis=-1)
    factor = la.cholesky(covariance + none[..., None] * eye)
    proper = (jnp.diagonal(factor, axis1=-2, axis2=-1) > 0) & jnp.isfinite(factor).all(axis=-1)
    check_values(proper, f"{name} is not positive definite, or not finite.")
    log_scale, below = la.parts_of_lower(factor)
    log_scale = jnp.where(none, least_log_scale(log_scale), log_scale)
    spread, below = check_min_spread(min_spread), None if diagonal else below
    return FullScale(log_scale=log_scale, below=below, shared=shared, min_spread=spread)


def pooled_full_scale(
    x: Float[Array, "n d"],
    mean: Float[Array, " d"],
    sample_weight: Float[Array, " n"],
    *,
    tied: bool = False,
    diagonal: bool = False,
    min_spread: float = MIN_SPREAD,
) -> FullScale:
    """The covariance of all data, or its diagonal, for one component.

    A constant or redundant column has no factor: deviations alone then stand for it.
    """
    size, second = weighted_second_moments(x, mean, sample_weight)
    factor = la.cholesky(second)
    singular = diagonal | jnp.any(jnp.isnan(factor))
    factor = jnp.where(singular, jnp.diag(jnp.sqrt(jnp.diagonal(second))), factor)
    log_scale, below = la.parts_of_lower(factor)
    log_scale = jnp.maximum(log_scale + jnp.log(size), least_log_scale(size))
    below = None if diagonal else (below * size[:, None])[None]
    spread = check_min_spread(min_spread)
    return FullScale(log_scale=log_scale[None], below=below, shared=tied, min_spread=spread)
