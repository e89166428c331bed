"""Gaussian components with diagonal or spherical covariance, one for each or one for all.

E-step. With c the centroid of the component means, ξ = x − c, inverse scales wₖ and
bₖ = wₖ ∘ (μₖ − c), there are two forms of one density (D is the number of features):

    residual    log p = aₖ − ½ Σ_d y²,                    y = wₖ ∘ ξ − bₖ
    expanded    log p = aₖ − ½ ‖bₖ‖² + (wₖ∘bₖ)·ξ − ½ wₖ²·ξ²

The expanded form is two matrix products; it cancels when components are many scales apart, and
is used only where a bound on its rounding allows (`shortcut`). The residual form is
differentiated in three directions, the constant (0), a linear term t·ξ (at t = 0) and a weight
of each y² (at −½), so that the backward pass needs no product with y.

Both finish into (n_a, n_q, Σr y, Σr y²), whitened and about each component's own mean. M-step:
with s = Σr y, S = Σr y² and m = s/n_q,  μ ← μ + m/w  and  σ² ← σ² (S − s m)/n_a, summed over
whatever shares a scale.
"""

import math
from typing import Any, ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_continuous, check_shape, check_values, num_features
from jaxem._emission import AbstractEmission, finite
from jaxem._hold import Held, replace
from jaxem._statistics import Framed
from jaxem._units import weighted_mean, weighted_second_moments
from jaxem.emissions._common import (
    ROUNDINGS,
    as_float,
    centroid,
    divide,
    expansion_is_safe,
    filled,
    pseudo_count,
    resolved,
    vanishing,
)
from jaxem.emissions.gaussian import Moments


class _ScaledGaussian(AbstractEmission):
    """Scales of shape (k or 1, d or 1): an axis of length 1 is shared."""

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "mean": ("mean",),
        "variance": ("log_scale",),
    }
    spherical: eqx.AbstractClassVar[bool]
    mean: Float[Array, "k d"]
    log_scale: Float[Array, "c e"]
    held: Held = eqx.field(static=True)
    tied: bool = eqx.field(static=True)
    expanded: bool = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, variance: ArrayLike):
        self.mean = as_float(mean)
        variance = jnp.asarray(variance, self.mean.dtype)
        check_shape("mean", self.mean, ("k", "d"))
        k, d = self.mean.shape
        own = (k,) if self.spherical else (k, d)
        self.tied = variance.ndim == len(own) - 1
        if self.tied:
            check_shape("variance (shared by the components)", variance, own[1:])
            variance = variance[None]
        else:
            check_shape("variance", variance, own)
        check_values(jnp.isfinite(self.mean), "mean holds a NaN or an infinity.")
        proper = (variance > 0) & jnp.isfinite(variance)
        check_values(proper, "variance must be positive and finite.")
        self.log_scale = 0.5 * jnp.log(variance.reshape(variance.shape[0], -1))
        self.held, self.expanded = (), False

    @property
    def variance(self) -> Array:
        """Variances, in the shape that the constructor takes."""
        variance = jnp.exp(2 * self.log_scale)
        variance = variance[:, 0] if self.spherical else variance
        return variance[0] if self.tied else variance

    @property
    def num_components(self) -> int:
        return self.mean.shape[0]

    @property
    def num_free_parameters(self) -> int:
        k, d = self.mean.shape
        c, e = self.log_scale.shape
        means = int(np.sum(self.free("mean"))) * d
        return means + int(np.sum(self.free("variance"))) * e

    def check(self, x: Array) -> None:
        check_continuous(x, self.mean.shape[1], self.mean.dtype, type(self).__name__)

    def in_support(self, x: Float[Array, "n d"]) -> Bool[Array, " n"]:
        return finite(x)

    def _whitening(self) -> tuple[Array, Array, Array, Array]:
        """Centroid, inverse scales w (c, e), offsets b (k, d), log-normalisers (k,)."""
        origin = centroid(self.mean)
        inverse = jnp.exp(-self.log_scale)
        offset = inverse * (self.mean - origin)
        return origin, inverse, offset, self._log_norm()

    def _log_norm(self) -> Float[Array, " k"]:
        k, d = self.mean.shape
        logs = jnp.sum(jnp.broadcast_to(self.log_scale, (k, d)), axis=1)
        return -logs - 0.5 * d * math.log(2 * math.pi)

    def coordinates(self) -> tuple[Array, Array, Array]:
        _, inverse, offset, log_norm = self._whitening()
        if self.expanded:
            constant = log_norm - 0.5 * jnp.sum(offset**2, axis=1)
            return constant, inverse * offset, -0.5 * inverse**2
        return log_norm, jnp.zeros_like(offset), jnp.full_like(offset, -0.5)

    def log_prob_at(self, coordinates: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        constant, linear, quadratic = coordinates
        origin, inverse, offset, _ = self._whitening()
        centred = (x - origin).T
        if self.expanded:
            square = centred**2
            if self.spherical:
                square = la.matmul(jnp.ones_like(origin)[None], square)
            square = la.matmul(quadratic, square)
        else:
            k, d = offset.shape
            inverse = jnp.broadcast_to(inverse, (k, d))
            residual = inverse[:, :, None] * centred - offset[:, :, None]
            square = la.matmul(quadratic[:, None, :], residual**2)[:, 0]
        constant = la.repeat(constant, x.shape[0])
        return (constant + la.matmul(linear, centred) + square).T

    def statistics(self, cotangents: Any) -> Moments:
        count, first, second = cotangents  # Σr, Σr ξ, Σr y² or Σr ξ²
        k, d = self.mean.shape
        _, inverse, offset, _ = self._whitening()
        white = inverse * first
        first = white - count[:, None] * offset
        if self.expanded:
            second = inverse**2 * second - self._share(offset * (white + first))
        else:
            second = self._share(second)
        scale_count = self._share(jnp.broadcast_to(count[:, None], (k, d)))
        return Moments(scale_count, count, first, second)

    def _share(self, per_cell: Float[Array, "k d"]) -> Float[Array, "c e"]:
        """Sums over the cells that share one scale."""
        axes = (0,) * self.tied + (1,) * self.spherical
        return jnp.sum(per_cell, axis=axes, keepdims=True)

    def reframe(self, sums: Moments, old: Self) -> Moments:
        turn = jnp.exp(old.log_scale - self.log_scale)
        shift = jnp.exp(-self.log_scale) * (old.mean - self.mean)
        turned = turn * sums.first
        count = sums.mean_count[:, None]
        return Moments(
            sums.scale_count,
            sums.mean_count,
            turned + count * shift,
            turn**2 * sums.second + self._share((2 * turned + count * shift) * shift),
        )

    def maximize(self, sums: Moments) -> Self:
        step, growth = self._whitened_maximum(sums)
        mean = self.mean + jnp.exp(self.log_scale) * step
        log_scale = jnp.maximum(self.log_scale + growth, vanishing(mean))
        return self.update(mean=mean, log_scale=log_scale)

    def _whitened_maximum(self, sums: Moments) -> tuple[Array, Array]:
        """Mean and log-scale of the maximum, relative to self."""
        step = divide(sums.first, sums.mean_count[:, None])
        step = step * self.free("mean")[:, None]
        # S − s²/n_q, or S itself about a mean that is held; what is below its rounding while
        # the mean still moves is not known to be less.
        known = 1 - ROUNDINGS * jnp.finfo(step.dtype).eps
        scatter = sums.second - known * self._share(sums.first * step)
        scatter = jnp.where(sums.scale_count > 0, divide(scatter, sums.scale_count), 1)
        return step, 0.5 * la.floored_log(scatter)

    def expected_log_prob(self, sums: Moments) -> Float[Array, ""]:
        log_norm = -self.log_scale - 0.5 * math.log(2 * math.pi)
        return jnp.sum(sums.scale_count * log_norm - 0.5 * sums.second)

    def prior(
        self,
        mean: ArrayLike | None = None,
        mean_count: ArrayLike = 0.0,
        variance: ArrayLike | None = None,
        variance_count: ArrayLike = 0.0,
    ) -> Framed:
        """The normal-inverse-gamma prior, as pseudo-observations.

        As if `mean_count` units had been seen with the mean `mean`, and each variance estimated
        from `variance_count` numbers with mean square `variance`. In the usual parameters
        N(μ; mean, σ²/κ₀) IG(σ²; α, β), for a variance of its own: κ₀ = mean_count,
        α = (variance_count − 3)/2 and β = variance_count · variance / 2.

        **Arguments:** `mean` (d,) or (k, d) and `variance` in the constructor's shape or one that
        broadcasts to it, defaults the present ones; counts ≥ 0, scalar or one for each.

        **Raises:** `ValueError` for a negative count or a variance that is not positive.
        """
        frame = self
        if mean is not None:
            mean = filled("mean", mean, self.mean)
            check_values(jnp.isfinite(mean), "the prior's mean holds a NaN or an infinity.")
            frame = replace(frame, mean=mean)
        if variance is not None:
            variance = self._cells("variance", variance)
            proper = (variance > 0) & jnp.isfinite(variance)
            check_values(proper, "the prior's variance must be positive and finite.")
            frame = replace(frame, log_scale=0.5 * jnp.log(variance))
        mean_count = pseudo_count("mean_count", mean_count, self.mean[:, 0])
        scale_count = self._cells("variance_count", variance_count)
        check_values(scale_count >= 0, "variance_count must not be negative.")
        sums = Moments(scale_count, mean_count, jnp.zeros_like(self.mean), scale_count)
        return Framed(sums, frame)

    def _cells(self, name: str, value: ArrayLike) -> Float[Array, "c e"]:
        value = jnp.asarray(value, self.mean.dtype)
        if self.spherical and value.ndim == 1:
            value = value[:, None]
        return filled(name, value, self.log_scale)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        k, d = self.mean.shape
        scale = jnp.broadcast_to(jnp.exp(self.log_scale), (k, d))
        return self.mean[z] + scale[z] * jax.random.normal(key, (z.shape[0], d), self.mean.dtype)

    def degenerate(self, sums: Moments, min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        k, d = self.mean.shape
        c, _ = self.log_scale.shape
        log_scale = self.log_scale + self._whitened_maximum(sums)[1]
        top = jnp.max(log_scale, axis=0)
        ratio = jnp.exp(2 * (log_scale - top))
        within = divide(
            jnp.sum(sums.scale_count * ratio, axis=0), jnp.sum(sums.scale_count, axis=0)
        )
        thin = jnp.any(ratio < min_variance * within, axis=1)
        thin = thin | (jnp.min(log_scale, axis=1) <= vanishing(self.mean))
        thin = thin | ~resolved(self.mean - centroid(self.mean), jnp.exp(log_scale))
        if not self.tied:
            units = sums.scale_count[:, 0] / (d if self.spherical else 1)
            thin = thin | (units < d + 1)
        return (thin & self.free("variance")) | (sums.mean_count < 1)

    @classmethod
    def pooled(cls, x, num_components, weights, tied: bool = False):
        check_continuous(x, num_features(x), x.dtype, cls.__name__)
        d = x.shape[1]
        mean = weighted_mean(x, weights)
        unit, second = weighted_second_moments(x, mean, weights)
        log_scale = 0.5 * la.floored_log(jnp.diagonal(second)) + jnp.log(unit)
        if cls.spherical:
            top = jnp.max(log_scale)
            log_scale = top + 0.5 * jnp.log(jnp.mean(jnp.exp(2 * (log_scale - top)), keepdims=True))
        log_scale = jnp.maximum(log_scale, vanishing(x))
        return replace(
            object.__new__(cls),
            mean=jnp.broadcast_to(mean, (num_components, d)),
            log_scale=jnp.broadcast_to(
                log_scale, (1 if tied else num_components, log_scale.shape[0])
            ),
            held=(),
            tied=tied,
            expanded=False,
        )

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        spread = jnp.maximum(spread, jnp.finfo(x.dtype).tiny)
        log_scale = jnp.maximum(self.log_scale[:1] + 0.5 * jnp.log(spread), vanishing(x))
        shape = (1 if self.tied else x.shape[0], log_scale.shape[1])
        return replace(self, mean=x, log_scale=jnp.broadcast_to(log_scale, shape))

    def shortcut(self) -> tuple[Bool[Array, ""], Self]:
        _, _, offset, _ = self._whitening()
        # ξ² itself must fit: no scale beyond the fourth root of what the dtype holds
        fits = jnp.max(jnp.abs(self.log_scale)) < -0.5 * vanishing(self.mean)
        return fits & expansion_is_safe(offset), replace(self, expanded=True)


class DiagonalGaussian(_ScaledGaussian):
    """Gaussians with independent features, N(μₖ, diag σ²ₖ).

    **Arguments:** `mean` (k, d); `variance` (k, d), or (d,) shared by all components. As a
    `family`, `functools.partial(DiagonalGaussian, tied=True)` shares it.

    **Raises:** `ValueError` for other shapes or variances that are not positive.
    """

    spherical: ClassVar[bool] = False

    def __init__(self, mean: ArrayLike, variance: ArrayLike):
        super().__init__(mean, variance)


class SphericalGaussian(_ScaledGaussian):
    """Gaussians with one variance for all features, N(μₖ, σ²ₖ I).

    **Arguments:** `mean` (k, d); `variance` (k,), or () shared by all components. As a
    `family`, `functools.partial(SphericalGaussian, tied=True)` shares it.

    **Raises:** `ValueError` for other shapes or variances that are not positive.
    """

    spherical: ClassVar[bool] = True

    def __init__(self, mean: ArrayLike, variance: ArrayLike):
        super().__init__(mean, variance)
