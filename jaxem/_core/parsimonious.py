"""Gaussian covariances whose volume, shape and orientation are shared or not: fourteen structures.

    Σₖ = λₖ Qₖ Bₖ Qₖᵀ,    |Bₖ| = 1 diagonal (shape), Qₖ orthogonal (orientation), λₖ the volume

A structure has three letters, for volume, shape and orientation: E where the components share it,
V where each has its own, I for the identity (EII, VEI, …, VVV).

Parametrisation. A factor is Lₖ = exp(vₖ) Gₖ with |Gₖ| = 1 and vₖ = ½ log λₖ. Which Gₖ:

- without orientation: Gₖ = diag(exp sₖ), with s centred;
- shape and orientation shared alike (EEE, VEE, EVV, VVV): a triangular Gₖ with diagonal exp sₖ.
  Eigenvectors of equal variances are no smooth function of a covariance, its triangular factor is;
- else (EEV, VEV, EVE, VVE): Gₖ = Qₖ diag(exp sₖ), with Q the Gram–Schmidt factor of a leaf.

M-step. For scatters Sₖ whitened by the present factors the maximiser of
Σₖ −nₖ log|Lₖ| − ½ tr Σₖ⁻¹ Lₖ⁰ Sₖ Lₖ⁰ᵀ is found relative to them (`covariance_steps`,
`orientations`).

Celeux & Govaert (1995), Pattern Recognition 28, table 1; Scrucca, Fop, Murphy & Raftery (2016),
The R Journal 8 (the names, as in mclust).
"""

from __future__ import annotations

import math
from typing import Any, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxem._core import covariance_steps as steps
from jaxem._core import linalg as la
from jaxem._core.checks import check_shape, check_values
from jaxem._core.dense_scales import AbstractDense
from jaxem._core.orientations import common_axes, own_axes
from jaxem._core.orthogonal import orthonormal
from jaxem._core.parameters import replace
from jaxem._core.scales import HALF_LOG_2PI, MIN_SPREAD, check_min_spread

STRUCTURES = tuple("EII VII EEI VEI EVI VVI EEE VEE EVE VVE EEV VEV EVV VVV".split())


class Parsimonious(AbstractDense):
    """K covariances of D features in one of fourteen structures.

    The leaves are unconstrained: any numbers are a model, but a singular `orientation`. One
    component shares everything with itself, and one feature has neither shape nor orientation:
    `pattern` is the structure that is left.

    **Fields:**

    - `log_volume` (k or 1): log|L|/d, half the log of the volume.
    - `log_shape` (k or 1, d): half the logs of relative variances; their mean does nothing.
    - `orientation` (k or 1, d, d): a matrix whose Gram–Schmidt factor has the axes as columns, or
      the part of a triangular factor below the diagonal.

    What a structure does not have is None.
    """

    log_volume: Float[Array, " c"]
    log_shape: Float[Array, "s d"] | None
    orientation: Float[Array, "o d d"] | None
    name: str = eqx.field(static=True)
    num_components: int = eqx.field(static=True)
    num_features: int = eqx.field(static=True)
    min_spread: float = eqx.field(static=True)
    shared: bool = eqx.field(static=True)  # False: moments are those of each component
    expanded: bool = eqx.field(static=True, default=False)

    @property
    def pattern(self) -> str:
        """The structure, without what one component or one feature cannot tell apart."""
        return _pattern(self.name, self.num_components, self.num_features)

    def num_free_parameters(self, free: np.ndarray) -> int:
        k, d = self.num_components, self.num_features
        sizes = (1, d - 1, d * (d - 1) // 2)
        number = {"I": 0, "E": 1, "V": k}
        moves = sum(number[own] * size for own, size in zip(self.pattern, sizes, strict=True))
        return moves if np.all(free) else 0

    @property
    def least_count(self) -> int:
        return self.num_features + 1 if self.name[1:] == "VV" else 0

    def factor(self) -> Float[Array, "k d d"]:
        scale = jnp.exp(self.log_volume)[:, None, None]
        if _is_triangular(self.pattern):
            return self._each(scale * self._lower())
        shape = jnp.exp(self._log_shape())
        if self.orientation is None:
            return self._each(scale * shape[..., None] * self._eye())
        return self._each(scale * orthonormal(self.orientation) * shape[:, None, :])

    def whitener(self) -> Float[Array, "k d d"]:
        scale = jnp.exp(-self.log_volume)[:, None, None]
        if _is_triangular(self.pattern):
            return self._each(scale * la.inverse_of_lower(self._lower()))
        shape = jnp.exp(-self._log_shape())[..., None]
        if self.orientation is None:
            return self._each(scale * shape * self._eye())
        return self._each(scale * shape * la.transpose(orthonormal(self.orientation)))

    def log_norm(self) -> Float[Array, " k"]:
        return self._each(-self.num_features * (self.log_volume + HALF_LOG_2PI))

    @property
    def covariance(self) -> Float[Array, "k d d"]:
        factor = self.factor()
        return la.matmul(factor, la.transpose(factor))

    def with_covariance(self, name: str, value: Array) -> Self:
        return self.from_covariance(self.name, value, self.min_spread)

    def scaled(self, spread: Array, num_components: int) -> Self:
        factor = self.factor()[:1]
        factor = jnp.broadcast_to(factor, (num_components, *factor.shape[1:]))
        new = self.from_factor(self.name, factor, self.min_spread)
        volume = new.log_volume + 0.5 * la.floored_log(jnp.asarray(spread, factor.dtype))
        return replace(new, log_volume=volume)

    def best_covariance(self, scatter: Array, count: Array) -> Float[Array, "k d d"]:
        relative = la.matmul(self.whitener(), self.best(scatter, count).factor())
        return la.matmul(relative, la.transpose(relative))

    def best(self, scatter: Float[Array, "k d d"], count: Float[Array, " k"]) -> Self:
        """The maximiser of the expected log-likelihood; what has no count of its own stays.

        Its derivatives in `scatter` and `count` are those of the maximiser, in both modes and to
        second order. Where it is not differentiable they are finite: axes of equal variances have
        derivative zero within their space where orientation is not shared as the shape is.

        **Arguments:** `scatter` (k, d, d), Σ r y yᵀ of the residuals y = L⁻¹(x − μ) whitened by
        self; positive semi-definite. `count` (k,), Σ r.
        """
        present = ~(count <= 0)
        total = jnp.sum(count)
        some = ~(total <= 0)
        share = jnp.where(some, count / jnp.where(some, total, 1), 1 / self.num_components)
        each = scatter / jnp.where(present, count, 1)[:, None, None]
        each = jnp.where(present[:, None, None], each, self._eye())
        volume, shape, orientation = self._maximum(each, share)
        volume = jnp.maximum(volume, math.log(jnp.finfo(volume.dtype).tiny))
        if len(volume) == len(present):
            volume = jnp.where(present, volume, self.log_volume)
        return replace(
            self,
            log_volume=volume,
            log_shape=_where(present, shape, self.log_shape),
            orientation=_where(present, orientation, self.orientation),
        )

    def _maximum(self, each: Array, share: Array) -> tuple[Array, Array | None, Array | None]:
        pattern, volume, shape = self.pattern, self.log_volume, self._log_shape()
        if _is_triangular(pattern):
            return steps.triangles(pattern, volume, self._lower(), each, share)
        orientation = self.orientation
        if orientation is None:
            logs = la.floored_log(jnp.diagonal(each, axis1=1, axis2=2))
        else:
            if pattern[2] == "V":
                turn, logs = own_axes(shape, each)
            else:
                turn, logs = common_axes(pattern[0] == "E", shape, each, share)
            orientation = la.matmul(orthonormal(orientation), turn)
        volume, shape = steps.axes(pattern, volume, shape, logs, share)
        return volume, None if self.log_shape is None else shape, orientation

    @classmethod
    def from_covariance(
        cls, name: str, covariance: Float[Array, "k d d"], min_spread: float = MIN_SPREAD
    ) -> Self:
        """The maximiser for components of equal counts that have these covariances.

        **Raises:** `ValueError` for a name that is no structure, for another shape, or for matrices
        that are not covariances.
        """
        covariance = jnp.asarray(covariance)
        check_shape("covariance", covariance, ("k", "d", "d"))
        check_shape("covariance", covariance, covariance.shape[:1] + covariance.shape[2:] * 2)
        variance = jnp.diagonal(covariance, axis1=1, axis2=2)
        proper = (variance > 0) & jnp.isfinite(variance)
        check_values(proper, "covariance: variances must be positive and finite.")
        unit = jnp.sqrt(variance)
        factor = la.cholesky(covariance / unit[:, :, None] / unit[:, None, :])
        check_values(jnp.isfinite(factor), "covariance must be positive definite.")
        return cls.from_factor(name, unit[:, :, None] * factor, min_spread)

    @classmethod
    def from_factor(
        cls, name: str, factor: Float[Array, "k d d"], min_spread: float = MIN_SPREAD
    ) -> Self:
        """As `from_covariance`, of Σ = L Lᵀ: for covariances too small or large to be formed.

        **Raises:** `ValueError` for a name that is no structure, or for another shape.
        """
        if name not in STRUCTURES:
            raise ValueError(
                f"unknown covariance structure {name!r}; expected one of {', '.join(STRUCTURES)}."
            )
        factor = jnp.asarray(factor)
        check_shape("factor", factor, ("k", "d", "d"))
        k, d, _ = factor.shape
        check_shape("factor", factor, (k, d, d))
        pattern = _pattern(name, k, d)
        size = {"E": 1, "V": k}
        # Relative to the largest deviation of each feature, or of all where there is no shape
        logs = jnp.log(jnp.max(jnp.abs(factor), axis=(0, 2)))
        logs = jnp.broadcast_to(jnp.max(logs), (d,)) if pattern[1] == "I" else logs
        eye = jnp.eye(d, dtype=logs.dtype)
        shape = orientation = None
        if pattern[1] != "I":
            shape = jnp.broadcast_to(steps.centred(logs[None]), (size[pattern[1]], d))
        if pattern[2] != "I":
            start = jnp.zeros_like(eye) if _is_triangular(pattern) else eye
            orientation = jnp.broadcast_to(start, (size[pattern[2]], d, d))
        volume = jnp.broadcast_to(jnp.mean(logs), (size[pattern[0]],))
        start = cls(
            log_volume=volume,
            log_shape=shape,
            orientation=orientation,
            name=name,
            num_components=k,
            num_features=d,
            min_spread=check_min_spread(min_spread),
            shared=False,
        )
        whitened = factor / jnp.exp(logs)[:, None]
        scatter = la.matmul(whitened, la.transpose(whitened))
        return start.best(scatter, jnp.ones(k, logs.dtype))

    def _each(self, leaf: Array) -> Any:
        """One of what is shared, for each component."""
        return jnp.broadcast_to(leaf, (self.num_components, *leaf.shape[1:]))

    def _eye(self) -> Float[Array, "d d"]:
        return jnp.eye(self.num_features, dtype=self.log_volume.dtype)

    def _log_shape(self) -> Float[Array, "s d"]:
        if self.log_shape is None:
            return jnp.zeros((1, self.num_features), self.log_volume.dtype)
        return steps.centred(self.log_shape)

    def _lower(self) -> Float[Array, "c d d"]:
        assert self.orientation is not None
        return la.lower(self._log_shape(), self.orientation)


def _pattern(name: str, num_components: int, num_features: int) -> str:
    pattern = name.replace("V", "E") if num_components == 1 else name
    return pattern[0] + "II" if num_features == 1 else pattern


def _is_triangular(pattern: str) -> bool:
    return pattern[1] == pattern[2] != "I"


def _where(present: Array, new: Array | None, old: Array | None) -> Array | None:
    """The new leaf, but the old one in components without a count that have their own."""
    if new is None or old is None or old.shape[0] != present.shape[0]:
        return new
    return jnp.where(present.reshape(-1, *(1,) * (old.ndim - 1)), new, old)
