"""Gaussian components with full covariance matrices: one for each, or one for all (tied).

E-step. With c the centroid of the component means (held), ξ = x − c, Wₖ = Lₖ⁻¹ for the Cholesky
factor Lₖ of Σₖ, and bₖ = Wₖ(μₖ − c):

    log N(x; μₖ, Σₖ) = aₖ − ½‖yₖ‖²,    yₖ = Wₖ ξ − bₖ,    aₖ = Σ log diag Wₖ − ½ d log 2π.

Coordinates are (a, b, W). Their cotangents Σr, Σr y and −Σr y ξᵀ finish into whitened moments
about each component's *own* mean: (nₐ, n_q, Σr y, Σr y yᵀ), which are dimensionless. Reframing
is an affine congruence, y′ = W′L y + W′(μ − μ′), that never visits the data frame.

M-step. With s = Σr y and S = Σr y yᵀ:  μ ← μ + L s/n_q,  Σ ← L (S − s sᵀ/n_q) Lᵀ / nₐ.

The two counts agree for data and differ for a prior: nₐ counts log|W|, n_q the mean. Moments in
the data frame would lose every digit in float32 once (mean/σ)² ≈ 1/eps; these do not.
"""

import math
from typing import Any, ClassVar, NamedTuple, Self

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
    TERMS_LIMIT,
    as_float,
    centroid,
    divide,
    expansion_is_safe,
    filled,
    pseudo_count,
    resolved,
    vanishing,
)


class Moments(NamedTuple):
    """Whitened moments about each component's mean; c is k, or 1 where a scale is shared."""

    scale_count: Array  # nₐ: how many log-scales count, (c,)
    mean_count: Float[Array, " k"]  # n_q: how many times the mean counts
    first: Float[Array, "k d"]  # Σ r y
    second: Array  # Σ r y yᵀ, (c, d, d)


class _FullGaussian(AbstractEmission):
    """What `Gaussian` and `TiedGaussian` share: c covariance factors for k means."""

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "mean": ("mean",),
        "covariance": ("log_scale", "below"),
    }
    tied: eqx.AbstractClassVar[bool]
    mean: Float[Array, "k d"]
    log_scale: Float[Array, "c d"]
    below: Float[Array, "c d d"]
    held: Held = eqx.field(static=True)
    expanded: bool = eqx.field(static=True)  # the cheaper form that `shortcut` offers

    def __init__(self, mean: ArrayLike, covariance: ArrayLike):
        self.mean = as_float(mean)
        covariance = jnp.asarray(covariance, self.mean.dtype)
        check_shape("mean", self.mean, ("k", "d"))
        k, d = self.mean.shape
        check_shape("covariance", covariance, (d, d) if self.tied else (k, d, d))
        check_values(jnp.isfinite(self.mean), "mean holds a NaN or an infinity.")
        self.log_scale, self.below = factored("covariance", covariance.reshape(-1, d, d))
        self.held, self.expanded = (), False

    @property
    def covariance(self) -> Array:
        """Covariance matrices, in the shape that the constructor takes."""
        covariance = la.matmul(self._factor(), la.transpose(self._factor()))
        return covariance[0] if self.tied else covariance

    @property
    def num_components(self) -> int:
        return self.mean.shape[0]

    @property
    def num_free_parameters(self) -> int:
        c, d = self.log_scale.shape
        means = int(np.sum(self.free("mean"))) * d
        return means + int(np.sum(self.free("covariance"))) * d * (d + 1) // 2

    def check(self, x: Array) -> None:
        check_continuous(x, self.mean.shape[1], self.mean.dtype, type(self).__name__)

    def in_support(self, x: Float[Array, "n d"]) -> Bool[Array, " n"]:
        return finite(x)

    def _factor(self) -> Float[Array, "c d d"]:
        return la.lower(self.log_scale, self.below)

    def _centroid(self) -> Float[Array, " d"]:
        return centroid(self.mean)

    def _log_norm(self) -> Float[Array, " c"]:
        d = self.mean.shape[1]
        return -jnp.sum(self.log_scale, axis=1) - 0.5 * d * math.log(2 * math.pi)

    def coordinates(self) -> tuple[Array, Array, Array]:
        whitener = la.inverse_of_lower(self._factor())
        offset = la.apply(whitener, self.mean - self._centroid())
        return jnp.broadcast_to(self._log_norm(), self.mean.shape[:1]), offset, whitener

    def _residual_log_prob(self, coordinates: Any, x: Array) -> Float[Array, "n k"]:
        log_norm, offset, whitener = coordinates
        n, (k, d) = x.shape[0], self.mean.shape
        # A whitener that is shared is repeated: summing cotangents over k and n is far slower
        whitener = jnp.broadcast_to(whitener, (k, d, d)).reshape(k * d, d)
        residual = la.matmul(whitener, (x - self._centroid()).T) - la.repeat(offset.reshape(-1), n)
        residual = residual.reshape(k, d, n)
        return (la.repeat(log_norm, n) - 0.5 * jnp.sum(residual * residual, axis=1)).T

    def _residual_statistics(self, cotangents: Any) -> Moments:
        count, first, second = cotangents
        _, offset, whitener = self.coordinates()
        second = -la.matmul(second, la.transpose(whitener)) - self._share(la.outer(first, offset))
        return Moments(self._share(count), count, first, _symmetric(second))

    def _share(self, per_component: Array) -> Array:
        """Sums over the components that share one covariance."""
        return jnp.sum(per_component, axis=0, keepdims=True) if self.tied else per_component

    def reframe(self, sums: Moments, old: Self) -> Moments:
        whitener = la.inverse_of_lower(self._factor())
        turn = la.matmul(whitener, old._factor())
        shift = la.apply(whitener, old.mean - self.mean)
        turned = la.apply(turn, sums.first)
        cross = la.outer(turned, shift)
        rise = cross + la.transpose(cross)
        rise = rise + sums.mean_count[:, None, None] * la.outer(shift, shift)
        return Moments(
            sums.scale_count,
            sums.mean_count,
            turned + sums.mean_count[:, None] * shift,
            la.matmul(la.matmul(turn, sums.second), la.transpose(turn)) + self._share(rise),
        )

    def maximize(self, sums: Moments) -> Self:
        factor = self._factor()
        step, scatter = self._whitened_maximum(sums)
        mean = self.mean + la.apply(factor, step)
        log_scale, below = la.parts_of_lower(la.matmul(factor, la.cholesky(scatter)))
        return self.update(mean=mean, log_scale=log_scale, below=below)

    def _whitened_maximum(self, sums: Moments) -> tuple[Array, Array]:
        """Mean and covariance of the maximum, whitened by self and about its mean."""
        step = divide(sums.first, sums.mean_count[:, None])
        step = step * self.free("mean")[:, None]
        # S − s sᵀ/n_q, or S itself about a mean that is held; what is below its rounding
        # while the mean still moves is not known to be less.
        moved = self._share(la.outer(sums.first, step))
        eye = jnp.eye(step.shape[1], dtype=step.dtype)
        unknown = ROUNDINGS * jnp.finfo(step.dtype).eps * jnp.trace(moved, axis1=1, axis2=2)
        scatter = sums.second - moved + unknown[:, None, None] * eye
        count = sums.scale_count[:, None, None]
        return step, jnp.where(count > 0, divide(scatter, count), eye)

    def expected_log_prob(self, sums: Moments) -> Float[Array, ""]:
        trace = jnp.trace(sums.second, axis1=-2, axis2=-1)
        return jnp.sum(sums.scale_count * self._log_norm() - 0.5 * trace)

    def prior(
        self,
        mean: ArrayLike | None = None,
        mean_count: ArrayLike = 0.0,
        covariance: ArrayLike | None = None,
        covariance_count: ArrayLike = 0.0,
    ) -> Framed:
        """The normal-inverse-Wishart prior, as pseudo-observations.

        As if `mean_count` units had been seen with the mean `mean`, and `covariance_count` units
        with the covariance `covariance` about the component's own mean. In the usual parameters
        NIW(μ, Σ; mean, κ₀, ν₀, Ψ): κ₀ = mean_count, ν₀ = covariance_count − d − 2 and
        Ψ = covariance_count · covariance. A tied covariance takes one inverse Wishart.

        **Arguments:** `mean` (d,) or (k, d), default the present one; `covariance` (d, d) or
        (k, d, d), default the present one; counts ≥ 0, scalar or one for each mean or covariance.

        **Raises:** `ValueError` for a negative count or a covariance that is not positive definite.
        """
        c, d = self.log_scale.shape
        mean_count = pseudo_count("mean_count", mean_count, self.mean[:, 0])
        scale_count = pseudo_count("covariance_count", covariance_count, self.log_scale[:, 0])
        frame = self
        if mean is not None:
            mean = filled("mean", mean, self.mean)
            check_values(jnp.isfinite(mean), "the prior's mean holds a NaN or an infinity.")
            frame = replace(frame, mean=mean)
        if covariance is not None:
            covariance = filled("covariance", covariance, self.below)
            log_scale, below = factored("the prior's covariance", covariance)
            frame = replace(frame, log_scale=log_scale, below=below)
        eye = jnp.broadcast_to(jnp.eye(d, dtype=self.mean.dtype), (c, d, d))
        second = scale_count[:, None, None] * eye
        return Framed(Moments(scale_count, mean_count, jnp.zeros_like(self.mean), second), frame)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        k, d = self.mean.shape
        factor = jnp.broadcast_to(self._factor(), (k, d, d))
        noise = jax.random.normal(key, (z.shape[0], d), self.mean.dtype)
        return self.mean[z] + la.apply(factor[z], noise)

    def degenerate(self, sums: Moments, min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        c, d = self.log_scale.shape
        factor = self._factor()
        _, scatter = self._whitened_maximum(sums)
        size = jnp.max(jnp.abs(factor), axis=(0, 2))
        scaled = factor / size[:, None]  # so that squares fit
        covariance = la.matmul(la.matmul(scaled, scatter), la.transpose(scaled))
        share = divide(sums.scale_count, jnp.sum(sums.scale_count))[:, None, None]
        whitener = la.inverse_of_lower(la.cholesky(jnp.sum(share * covariance, axis=0)))
        relative = la.matmul(la.matmul(whitener, covariance), la.transpose(whitener))
        # The smallest eigenvalue exceeds min_variance where what is left has a factor
        eye = jnp.eye(d, dtype=relative.dtype)
        left = la.cholesky(_symmetric(relative) - min_variance * eye)
        distinct = jnp.isfinite(left).all(axis=(1, 2))
        # Where every component is thin alike: variances no larger than their own rounding
        root = jnp.diagonal(la.cholesky(covariance), axis1=1, axis2=2)
        variance = jnp.diagonal(covariance, axis1=1, axis2=2)
        regular = (root**2 > ROUNDINGS * jnp.finfo(root.dtype).eps * variance).all(axis=1)
        wide = resolved((self.mean - self._centroid()) / size, jnp.sqrt(variance))
        known = jnp.isfinite(covariance).all() & jnp.isfinite(sums.scale_count).all()
        thin = known & ~(distinct & regular & wide)
        thin = thin | (jnp.min(self.log_scale, axis=1) <= vanishing(factor))
        thin = thin | (sums.scale_count < d + 1) if not self.tied else thin
        return (thin & self.free("covariance")) | (sums.mean_count < 1)

    @classmethod
    def pooled(cls, x, num_components, weights):
        check_continuous(x, num_features(x), x.dtype, cls.__name__)
        d = x.shape[1]
        c = 1 if cls.tied else num_components
        mean = weighted_mean(x, weights)
        unit, second = weighted_second_moments(x, mean, weights)
        factor = la.cholesky(second)
        # A constant or redundant column has no factor: start from the deviations alone.
        singular = jnp.any(jnp.isnan(factor))
        factor = jnp.where(singular, jnp.diag(jnp.sqrt(jnp.diagonal(second))), factor)
        log_scale, below = la.parts_of_lower(factor)
        log_scale = jnp.maximum(log_scale + jnp.log(unit), vanishing(unit))
        new = object.__new__(cls)
        return replace(
            new,
            mean=jnp.broadcast_to(mean, (num_components, d)),
            log_scale=jnp.broadcast_to(log_scale, (c, d)),
            below=jnp.broadcast_to(below * unit[:, None], (c, d, d)),
            held=(),
            expanded=False,
        )

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        c = 1 if self.tied else x.shape[0]
        d = x.shape[1]
        spread = jnp.maximum(spread, jnp.finfo(x.dtype).tiny)
        log_scale = jnp.maximum(self.log_scale[:1] + 0.5 * jnp.log(spread), vanishing(x))
        below = self.below[:1] * jnp.sqrt(spread)
        return replace(
            self,
            mean=x,
            log_scale=jnp.broadcast_to(log_scale, (c, d)),
            below=jnp.broadcast_to(below, (c, d, d)),
        )


class Gaussian(_FullGaussian):
    """Gaussians N(μₖ, Σₖ), each with a full covariance matrix of its own.

    **Arguments:** `mean` (k, d); `covariance` (k, d, d), positive definite.

    **Raises:** `ValueError` for other shapes, or values that are not a covariance.

    McLachlan & Peel (2000), *Finite Mixture Models*, section 3.2.
    """

    tied: ClassVar[bool] = False

    def __init__(self, mean: ArrayLike, covariance: ArrayLike):
        super().__init__(mean, covariance)

    def coordinates(self) -> tuple[Array, ...]:
        log_norm, offset, whitener = super().coordinates()
        if not self.expanded:
            return log_norm, offset, whitener
        factor = self._common_factor()
        whitener = la.matmul(whitener, factor)
        constant = log_norm - 0.5 * jnp.sum(offset**2, axis=1)
        linear = la.matmul(offset[:, None, :], whitener)[:, 0]
        quadratic = -0.5 * _packed(la.matmul(la.transpose(whitener), whitener))
        return constant, linear, quadratic, la.inverse_of_lower(factor)

    def _common_factor(self) -> Float[Array, "d d"]:
        """A Cholesky factor of the average covariance, held: z = U⁻¹ξ is alike for all."""
        factor = jax.lax.stop_gradient(self._factor())
        size = jnp.max(jnp.abs(factor), axis=(0, 2))
        scaled = factor / size[:, None]
        average = jnp.mean(la.matmul(scaled, la.transpose(scaled)), axis=0)
        return size[:, None] * la.cholesky(average)

    def log_prob_at(self, coordinates: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        if not self.expanded:
            return self._residual_log_prob(coordinates, x)
        # log p is linear in its coordinates: two products with all components at once. The last
        # coordinate, the common whitener, is held.
        constant, linear, quadratic, common = coordinates
        z = la.matmul(jax.lax.stop_gradient(common), (x - self._centroid()).T)
        square = la.matmul(quadratic, _products(z))
        return (la.repeat(constant, x.shape[0]) + la.matmul(linear, z) + square).T

    def statistics(self, cotangents: Any) -> Moments:
        if not self.expanded:
            return self._residual_statistics(cotangents)
        count, linear, quadratic, _ = cotangents  # Σr, Σr z, Σr zᵢ zⱼ
        _, offset, whitener = _FullGaussian.coordinates(self)
        whitener = la.matmul(whitener, self._common_factor())
        white = la.apply(whitener, linear)
        first = white - count[:, None] * offset
        square = _unpacked(quadratic, linear.shape[1])
        second = la.matmul(la.matmul(whitener, square), la.transpose(whitener))
        second = second - la.outer(white, offset) - la.outer(offset, first)
        return Moments(count, count, first, _symmetric(second))

    def shortcut(self) -> tuple[Bool[Array, ""], Self]:
        # The sum of the absolute terms of zᵀAz, for units around each mean
        common = la.inverse_of_lower(self._common_factor())
        relative = la.matmul(common, self._factor())
        whitener = la.inverse_of_lower(relative)
        square = jnp.abs(la.matmul(la.transpose(whitener), whitener))
        mean = jnp.abs(la.apply(common, self.mean - self._centroid()))
        deviation = jnp.sqrt(jnp.sum(relative**2, axis=2))
        terms = sum(jnp.sum(v * la.apply(square, v), axis=1) for v in (mean, deviation))
        return jnp.max(terms) < TERMS_LIMIT, replace(self, expanded=True)


class TiedGaussian(_FullGaussian):
    """Gaussians N(μₖ, Σ) that share one full covariance matrix.

    In its expanded form the quadratic is ‖Wξ‖² − 2 bₖ·Wξ + ‖bₖ‖²: its first term is the same
    for all components, so that an E-step costs two products with a (d, d) and a (k, d) matrix.
    It is used where rounding cannot hurt (`shortcut`).

    **Arguments:** `mean` (k, d); `covariance` (d, d), positive definite.

    **Raises:** `ValueError` for other shapes, or values that are not a covariance.
    """

    tied: ClassVar[bool] = True

    def __init__(self, mean: ArrayLike, covariance: ArrayLike):
        super().__init__(mean, covariance)

    def log_prob_at(self, coordinates: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        if not self.expanded:
            return self._residual_log_prob(coordinates, x)
        # Only log_norm, b in its product with Wξ, and W in ‖Wξ‖² are differentiated.
        log_norm, offset, whitener = coordinates
        _, own_offset, own_whitener = self.coordinates()
        centred = (x - self._centroid()).T
        cross = la.matmul(offset, la.matmul(own_whitener[0], centred))
        square = la.matmul(whitener[0], centred) ** 2
        square = la.matmul(jnp.ones_like(offset[:1]), square)
        constant = log_norm - 0.5 * jnp.sum(own_offset**2, axis=1)
        return (la.repeat(constant, x.shape[0]) + cross - 0.5 * square).T

    def statistics(self, cotangents: Any) -> Moments:
        if not self.expanded:
            return self._residual_statistics(cotangents)
        count, white, square = cotangents  # Σr, Σr Wξ, −Σ r Wξ ξᵀ
        _, offset, whitener = self.coordinates()
        first = white - count[:, None] * offset
        second = -la.matmul(square[0], whitener[0].T)
        second = second - la.matmul(offset.T, white) - la.matmul(first.T, offset)
        return Moments(self._share(count), count, first, _symmetric(second)[None])

    def shortcut(self) -> tuple[Bool[Array, ""], Self]:
        _, offset, _ = self.coordinates()
        return expansion_is_safe(offset), replace(self, expanded=True)


def factored(name: str, covariance: Float[Array, "c d d"]) -> tuple[Array, Array]:
    """The unconstrained leaves of a covariance. Raises `ValueError` if it is not one."""
    scale = jnp.sqrt(jnp.abs(jnp.diagonal(covariance, axis1=-2, axis2=-1)))
    gap = jnp.abs(covariance - la.transpose(covariance))
    slack = jnp.finfo(covariance.dtype).eps ** 0.5 * la.outer(scale, scale)
    check_values(~(gap > slack), f"{name} is not symmetric.")
    factor = la.cholesky(covariance)
    positive = jnp.diagonal(factor, axis1=-2, axis2=-1) > 0
    finite = jnp.isfinite(factor).all(axis=-1)
    check_values(positive & finite, f"{name} is not positive definite, or not finite.")
    return la.parts_of_lower(factor)


# Products zᵢzⱼ in eight strips of rows, each from its own diagonal block on: nearly the upper
# triangle, in few slices. (Index arrays would become scatters, which take a CPU minutes.)


def _strips(d: int) -> list[tuple[slice, slice]]:
    """Rows of each strip, and its columns: all from its first row on."""
    height = -(-d // 8)
    return [(slice(top, min(top + height, d)), slice(top, d)) for top in range(0, d, height)]


def _beyond(d: int) -> np.ndarray:
    """Whether an entry lies right of its strip's diagonal block, and so stands for two."""
    beyond = np.zeros((d, d), bool)
    for rows, _ in _strips(d):
        beyond[rows, rows.stop :] = True
    return beyond


def _products(z: Float[Array, "d n"]) -> Float[Array, "f n"]:
    d, n = z.shape
    strips = [(z[rows, None] * z[None, columns]).reshape(-1, n) for rows, columns in _strips(d)]
    return jnp.concatenate(strips)


def _packed(a: Float[Array, "k d d"]) -> Float[Array, "k f"]:
    """Coefficients of the products in zᵀ a z."""
    k, d, _ = a.shape
    a = a * (1 + _beyond(d)).astype(a.dtype)
    return jnp.concatenate([a[:, r, c].reshape(k, -1) for r, c in _strips(d)], axis=1)


def _unpacked(sums: Float[Array, "k f"], d: int) -> Float[Array, "k d d"]:
    """Sums of the products as symmetric matrices."""
    parts, start = [], 0
    for rows, columns in _strips(d):
        shape = (rows.stop - rows.start, columns.stop - columns.start)
        strip = sums[:, start : start + math.prod(shape)].reshape(-1, *shape)
        parts.append(jnp.pad(strip, ((0, 0), (0, 0), (columns.start, 0))))
        start += math.prod(shape)
    upper = jnp.concatenate(parts, axis=1)
    return upper + la.transpose(upper * _beyond(d))


def _symmetric(a: Array) -> Array:
    return 0.5 * (a + la.transpose(a))
