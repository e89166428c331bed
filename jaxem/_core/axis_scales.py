"""Covariances along the axes of features: diagonal and spherical ones, own or shared.

Scales have shape (k or 1, d or 1): an axis of length 1 is shared. With c the centroid of the means
(held fixed), ξ = x − c, inverse scales w and b = w ∘ (μ − c), there are two forms of one density:

    residual    log p = a − ½ Σ y²,                       y = w ∘ ξ − b
    expanded    log p = a − ½ ‖b‖² + (w ∘ b)·ξ − ½ w²·ξ²

The expanded form is two matrix products; it cancels where components are many scales apart, and is
used where a bound on its rounding allows. The tilt weighs each y² of the residual form by −½ + T,
so that its backward pass needs no product with y.
"""

from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.blocks import weighted_second_moments
from jaxem._core.checks import check_shape, check_values
from jaxem._core.numerics import (
    ROUNDINGS,
    centroid,
    divide,
    expansion_is_safe,
    least_log_scale,
    resolves,
)
from jaxem._core.parameters import replace
from jaxem._core.scales import HALF_LOG_2PI, MIN_SPREAD, AbstractScale, Moments, check_min_spread


class AxisScale(AbstractScale):
    """Variances of each feature (`spherical` False) or of all of them, own or shared."""

    log_scale: Float[Array, "c e"]
    spherical: bool = eqx.field(static=True)
    shared: bool = eqx.field(static=True)
    min_spread: float = eqx.field(static=True)
    expanded: bool = eqx.field(static=True, default=False)

    @property
    def covariance(self) -> Array:
        """Variances, in the shape that the constructor takes."""
        variance = jnp.exp(2 * self.log_scale)
        variance = variance[..., 0] if self.spherical else variance
        return variance[0] if self.shared else variance

    def num_free_parameters(self, free: np.ndarray) -> int:
        return int(np.sum(free)) * self.log_scale.shape[-1]

    def cells(self, mean: Float[Array, "k d"]) -> Float[Array, "k d"]:
        """Log-scales, one for each component and feature."""
        return jnp.broadcast_to(self.log_scale, mean.shape)

    def total(self, cells: Float[Array, "k d"]) -> Float[Array, "c e"]:
        """Sums over the cells that share one scale."""
        axes = (0,) * self.shared + (1,) * self.spherical
        return jnp.sum(cells, axis=axes, keepdims=True)

    def log_norm(self) -> Float[Array, "c e"]:
        """−log of one scale, less ½ log 2π."""
        return -self.log_scale - HALF_LOG_2PI

    def log_prob(self, x: Array, mean: Array, tilt: Moments) -> Float[Array, "n k"]:
        inverse = jnp.exp(-self.cells(mean))
        offset = inverse * (mean - centroid(mean))
        cells = jnp.broadcast_to(self.log_norm() + tilt.scale_count, mean.shape)
        log_norm = jnp.sum(cells, axis=1) + tilt.mean_count
        turn = jnp.broadcast_to(tilt.second, mean.shape)
        centred = (x - centroid(mean)).T
        if self.expanded:
            offset, inverse = offset - turn * offset + tilt.first, inverse - turn * inverse
            constant = log_norm - 0.5 * jnp.sum(offset**2, axis=1)
            linear, quadratic = inverse * offset, -0.5 * inverse**2
            quadratic = quadratic[:1] if self.shared else quadratic
            square = centred**2
            if self.spherical:
                square = la.matmul(jnp.ones_like(mean[:1]), square)
                quadratic = jnp.mean(quadratic, axis=1, keepdims=True)
            square = la.matmul(quadratic, square)
        else:
            constant = log_norm - jnp.sum(tilt.first * offset, axis=1)
            linear = tilt.first * inverse
            y = inverse[:, :, None] * centred - offset[:, :, None]
            square = la.matmul((turn - 0.5)[:, None, :], y**2)[:, 0]
        return (la.repeat(constant, x.shape[0]) + la.matmul(linear, centred) + square).T

    def expansion_is_safe(self, mean: Float[Array, "k d"]) -> Bool[Array, ""]:
        """Whether the expanded form keeps its digits, and the squares of features fit."""
        offset = jnp.exp(-self.cells(mean)) * (mean - centroid(mean))
        fits = jnp.max(jnp.abs(self.log_scale)) < -0.5 * least_log_scale(mean)
        return fits & expansion_is_safe(offset)

    def canonical(self, mean: Array) -> Moments:
        zero = jnp.zeros_like(mean)
        half = jnp.full_like(self.log_scale, -0.5)
        return Moments(self.log_norm(), zero[:, 0], zero, half)

    def expected(self, mean: Array) -> Moments:
        one = jnp.ones_like(mean)
        return Moments(self.total(one), one[:, 0], jnp.zeros_like(mean), self.total(one))

    def reframe(self, sums: Moments, mean: Array, old: Self, old_mean: Array) -> Moments:
        turn = jnp.exp(old.log_scale - self.log_scale)
        shift = jnp.exp(-self.log_scale) * (old_mean - mean)
        turned = turn * sums.first
        count = sums.mean_count[:, None]
        rise = self.total((2 * turned + count * shift) * shift)
        return Moments(
            sums.scale_count,
            sums.mean_count,
            turned + count * shift,
            turn**2 * sums.second + rise,
        )

    def maximum(self, sums: Moments, moves: Any) -> tuple[Float[Array, "k d"], Self]:
        step, scatter = self._scatter(sums, moves)
        return step, self.best(scatter, sums.scale_count)

    def _scatter(
        self, sums: Moments, moves: Any
    ) -> tuple[Float[Array, "k d"], Float[Array, "c e"]]:
        """The step of the means, and S − s²/n, or S about means that do not move.

        What is below the rounding of the difference counts as scatter.
        """
        step = divide(sums.first, sums.mean_count[:, None]) * moves[:, None]
        exact = 1 - ROUNDINGS * jnp.finfo(step.dtype).eps
        return step, sums.second - exact * self.total(sums.first * step)

    def best(self, scatter: Float[Array, "c e"], count: Float[Array, "c e"]) -> Self:
        """The scale of largest Q where squares about the new means, whitened by self, sum so."""
        growth = jnp.where(count > 0, divide(scatter, count), 1)
        log_scale = self.log_scale + 0.5 * la.floored_log(growth)
        return self._with(jnp.maximum(log_scale, least_log_scale(scatter)))

    def _with(self, log_scale: Float[Array, "c e"]) -> Self:
        return replace(self, log_scale=log_scale)

    def apply(self, y: Float[Array, "k d"]) -> Float[Array, "k d"]:
        return jnp.exp(self.log_scale) * y

    def noise(self, key: Array, z: Array, num_features: int) -> Float[Array, "n d"]:
        scale = jnp.exp(self.log_scale)
        normal = jax.random.normal(key, (z.shape[0], num_features), scale.dtype)
        return (scale if self.shared else scale[z]) * normal

    def with_covariance(self, name: str, value: Array) -> Self:
        given = axis_scale(
            name, value, self.log_scale, spherical=self.spherical, shared=self.shared
        )
        return self._with(given.log_scale)

    def scaled(self, spread: Array, num_components: int) -> Self:
        spread = jnp.maximum(spread, jnp.finfo(self.log_scale.dtype).tiny)
        least = least_log_scale(self.log_scale)
        log_scale = jnp.maximum(self.log_scale[:1] + 0.5 * jnp.log(spread), least)
        c = 1 if self.shared else num_components
        return self._with(jnp.broadcast_to(log_scale, (c, log_scale.shape[1])))

    def degenerate(self, sums: Moments, mean: Array, moves: Any) -> Bool[Array, " c"]:
        d = mean.shape[1]
        log_scale = self.maximum(sums, moves)[1].log_scale
        ratio = jnp.exp(2 * (log_scale - jnp.max(log_scale, axis=0)))
        total = jnp.sum(sums.scale_count * ratio, axis=0)
        within = divide(total, jnp.sum(sums.scale_count, axis=0))
        thin = jnp.any(ratio < self.min_spread * within, axis=1)
        thin = thin | (jnp.min(log_scale, axis=1) <= least_log_scale(mean))
        wide = resolves(jnp.exp(log_scale), mean - centroid(mean))
        thin = thin | ~(jnp.all(wide, keepdims=True) if self.shared else wide)
        if self.shared:
            return thin
        observations = sums.scale_count[:, 0] / (d if self.spherical else 1)
        return thin | (observations < d + 1)


def axis_scale(
    name: str,
    value: ArrayLike,
    like: Float[Array, "k d"],
    *,
    spherical: bool,
    shared: bool | None = None,
    min_spread: float = MIN_SPREAD,
) -> AxisScale:
    """The scale of variances (k, d), or (k,) of spheres; without k they are those of all.

    It has the dtype and the sizes of `like`, such as the means.

    **Raises:** `ValueError` for another shape, or variances that are not positive.
    """
    variance, own = jnp.asarray(value, like.dtype), like.shape[: 2 - spherical]
    shared = variance.ndim == len(own) - 1 if shared is None else shared
    if shared:
        check_shape(f"{name} (shared by the components)", variance, own[1:])
        variance = variance[None]
    else:
        check_shape(name, variance, own)
    proper = (variance > 0) & jnp.isfinite(variance)
    check_values(proper, f"{name} must be positive and finite.")
    log_scale = 0.5 * jnp.log(variance.reshape(variance.shape[0], -1))
    spread = check_min_spread(min_spread)
    return AxisScale(log_scale=log_scale, spherical=spherical, shared=shared, min_spread=spread)


def pooled_axis_scale(
    x: Float[Array, "n d"],
    mean: Float[Array, " d"],
    sample_weight: Float[Array, " n"],
    *,
    spherical: bool,
    tied: bool = False,
    min_spread: float = MIN_SPREAD,
) -> AxisScale:
    """The variances of all data, for one component."""
    size, square = weighted_second_moments(x, mean, sample_weight, diagonal=True)
    log_scale = 0.5 * la.floored_log(square) + jnp.log(size)
    if spherical:
        top = jnp.max(log_scale)
        log_scale = top + 0.5 * jnp.log(jnp.mean(jnp.exp(2 * (log_scale - top)), keepdims=True))
    log_scale = jnp.maximum(log_scale, least_log_scale(x))
    spread = check_min_spread(min_spread)
    return AxisScale(log_scale=log_scale[None], spherical=spherical, shared=tied, min_spread=spread)
