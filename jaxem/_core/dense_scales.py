"""Covariances with dense factors: full ones, and what those of other structures share.

With c the centroid of the means (held fixed), ξ = x − c, W = L⁻¹ and b = W (μ − c), there are two
forms of one density:

    residual    log p = a − ½ ‖y‖²,                          y = W ξ − b
    expanded    log p = a − ½ ‖b‖² + (Wᵀb)·ξ − ½ ξᵀ WᵀW ξ,   in features whitened by the average Σ

The expanded form is linear in products of features, which all components have in common. It
cancels where components are many scales apart, and is used where a bound on its rounding allows.
Both are functions of (a, b, W), of which the tilt changes each to first order:
a + t₀, b − T b + t₁ and W − T W add t₀ + t₁·y + yᵀ T y to log p.
"""

import abc
import math
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxem._core import linalg as la
from jaxem._core.causes import caused
from jaxem._core.numerics import (
    ROUNDINGS,
    TERMS_LIMIT,
    centroid,
    divide,
    expansion_is_safe,
    least_log_scale,
    resolves,
)
from jaxem._core.products import packed, products
from jaxem._core.scales import AbstractScale, Moments


class AbstractDense(AbstractScale):
    """Structures with a dense square root L of each covariance."""

    expanded: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def factor(self) -> Float[Array, "c d d"]:
        """L."""

    @abc.abstractmethod
    def whitener(self) -> Float[Array, "c d d"]:
        """L⁻¹."""

    @abc.abstractmethod
    def best(self, scatter: Float[Array, "c d d"], count: Float[Array, " c"]) -> Self:
        """The maximiser of Σ −n log|L| − ½ tr Σ⁻¹ L₀ S L₀ᵀ, with L₀ the factor of self.

        `scatter` S is about the new means; a covariance without observations stays where it is.
        """

    @abc.abstractmethod
    def best_covariance(
        self, scatter: Float[Array, "c d d"], count: Float[Array, " c"]
    ) -> Float[Array, "c d d"]:
        """The covariance of `best`, whitened by self."""

    @property
    @abc.abstractmethod
    def least_count(self) -> int:
        """How many observations a component needs for a covariance of its own."""

    def whitened(
        self, x: Float[Array, "n d"], mean: Float[Array, "k d"], tilt: Moments
    ) -> tuple[Float[Array, " k"], Float[Array, "k d n"]]:
        """a and y of log p = a − ½ ‖y‖², tilted."""
        log_norm, offset, whitener = self._tilted(mean, tilt)
        (k, d), n = mean.shape, x.shape[0]
        # A whitener that is shared is repeated: summing cotangents over k and n is far slower
        whitener = jnp.broadcast_to(whitener, (k, d, d)).reshape(k * d, d)
        y = la.matmul(whitener, (x - centroid(mean)).T) - la.repeat(offset.reshape(-1), n)
        return log_norm, y.reshape(k, d, n)

    def log_prob(self, x: Array, mean: Array, tilt: Moments) -> Float[Array, "n k"]:
        if self.expanded:
            return self._log_prob_expanded(x, mean, tilt)
        log_norm, y = self.whitened(x, mean, tilt)
        return (la.repeat(log_norm, x.shape[0]) - 0.5 * jnp.sum(y * y, axis=1)).T

    def _tilted(self, mean: Array, tilt: Moments) -> tuple[Array, Array, Array]:
        whitener = self.whitener()
        offset = la.apply(whitener, mean - centroid(mean))
        turn = 0.5 * (tilt.second + la.transpose(tilt.second))
        log_norm = self.log_norm() + tilt.scale_count + tilt.mean_count
        offset = offset - la.apply(turn, offset) + tilt.first
        return log_norm, offset, whitener - la.matmul(turn, whitener)

    def _log_prob_expanded(self, x: Array, mean: Array, tilt: Moments) -> Float[Array, "n k"]:
        log_norm, offset, whitener = self._tilted(mean, tilt)
        constant = log_norm - 0.5 * jnp.sum(offset**2, axis=1)
        centred = (x - centroid(mean)).T
        if self.shared:
            linear = la.matmul(offset, whitener[0])
            square = la.matmul(whitener[0], centred) ** 2
            square = la.matmul(jnp.full_like(offset[:1], -0.5), square)
        else:
            common = self._common_factor()
            centred = la.matmul(la.inverse_of_lower(common), centred)
            whitener = la.matmul(whitener, common)
            linear = la.matmul(offset[:, None, :], whitener)[:, 0]
            quadratic = packed(la.matmul(la.transpose(whitener), whitener))
            square = la.matmul(-0.5 * quadratic, products(centred))
        return (la.repeat(constant, x.shape[0]) + la.matmul(linear, centred) + square).T

    def _common_factor(self) -> Float[Array, "d d"]:
        """A Cholesky factor of the average covariance, held fixed."""
        factor = jax.lax.stop_gradient(self.factor())
        size = jnp.max(jnp.abs(factor), axis=(0, 2))
        scaled = factor / size[:, None]
        average = jnp.mean(la.matmul(scaled, la.transpose(scaled)), axis=0)
        return size[:, None] * la.cholesky(average)

    def expansion_is_safe(self, mean: Float[Array, "k d"]) -> Bool[Array, ""]:
        """Whether the expanded form keeps its digits."""
        if self.shared:
            return expansion_is_safe(la.apply(self.whitener(), mean - centroid(mean)))
        # The sum of the absolute terms of the quadratic, for observations around each mean
        common = la.inverse_of_lower(self._common_factor())
        relative = la.matmul(common, self.factor())
        whitener = la.matmul(self.whitener(), self._common_factor())
        square = jnp.abs(la.matmul(la.transpose(whitener), whitener))
        offset = jnp.abs(la.apply(common, mean - centroid(mean)))
        deviation = jnp.sqrt(jnp.sum(relative**2, axis=2))
        terms = sum(jnp.sum(v * la.apply(square, v), axis=1) for v in (offset, deviation))
        return jnp.max(terms) < TERMS_LIMIT

    def canonical(self, mean: Array) -> Moments:
        (k, d), c = mean.shape, self.log_norm().shape[0]
        eye = jnp.eye(d, dtype=mean.dtype)
        second = jnp.broadcast_to(-0.5 * eye, (c, d, d))
        return Moments(self.log_norm(), jnp.zeros(k, mean.dtype), jnp.zeros_like(mean), second)

    def expected(self, mean: Array) -> Moments:
        (k, d), c = mean.shape, self.log_norm().shape[0]
        eye, one = jnp.eye(d, dtype=mean.dtype), jnp.ones(k, mean.dtype)
        second = jnp.broadcast_to(k / c * eye, (c, d, d))
        return Moments(self._sum(one), one, jnp.zeros_like(mean), second)

    def _sum(self, per_component: Array) -> Array:
        """Sums over the components that share one covariance."""
        return jnp.sum(per_component, axis=0, keepdims=True) if self.shared else per_component

    def reframe(self, sums: Moments, mean: Array, old: Self, old_mean: Array) -> Moments:
        turn = la.matmul(self.whitener(), old.factor())
        shift = self.whitened_shift((old_mean - mean)[:, :, None])[:, :, 0]
        turned = la.apply(turn, sums.first)
        cross = la.outer(turned, shift)
        rise = cross + la.transpose(cross)
        rise = rise + sums.mean_count[:, None, None] * la.outer(shift, shift)
        return Moments(
            sums.scale_count,
            sums.mean_count,
            turned + sums.mean_count[:, None] * shift,
            la.matmul(la.matmul(turn, sums.second), la.transpose(turn)) + self._sum(rise),
        )

    def whitened_shift(self, shift: Float[Array, "k d q"]) -> Float[Array, "k d q"]:
        """W times a shift of means or coefficients; those of what has no variance do not move."""
        shift = jnp.where(self.without_variance()[:, :, None], 0, shift)
        return la.matmul(self.whitener(), shift)

    def without_variance(self) -> Bool[Array, "c d"]:
        """Which features have a variance of 0: the smallest normal number stands for it."""
        factor = self.factor()
        return jnp.sum(jnp.abs(factor), axis=2) <= 2 * math.exp(least_log_scale(factor))

    def maximum(self, sums: Moments, moves: Any) -> tuple[Float[Array, "k d"], Self]:
        step, scatter = self.scatter(sums, moves)
        return step, self.best(scatter, sums.scale_count)

    def scatter(self, sums: Moments, moves: Any) -> tuple[Array, Float[Array, "c d d"]]:
        """The whitened step of the means, and S − s sᵀ/n, or S about means that do not move.

        What is below the rounding of the difference counts as scatter.
        """
        step = divide(sums.first, sums.mean_count[:, None]) * moves[:, None]
        moved = self._sum(la.outer(sums.first, step))
        eye = jnp.eye(step.shape[1], dtype=step.dtype)
        unknown = ROUNDINGS * jnp.finfo(step.dtype).eps * jnp.trace(moved, axis1=1, axis2=2)
        return step, sums.second - moved + unknown[:, None, None] * eye

    def apply(self, y: Float[Array, "k d"]) -> Float[Array, "k d"]:
        return la.apply(self.factor(), y)

    def noise(self, key: Array, z: Array, num_features: int) -> Float[Array, "n d"]:
        factor = self.factor()
        normal = jax.random.normal(key, (z.shape[0], num_features), factor.dtype)
        return la.apply(factor[0] if self.shared else factor[z], normal)

    def degenerate(self, sums: Moments, mean: Array, moves: Any) -> Int[Array, " c"]:
        _, scatter = self.scatter(sums, moves)
        within = self.best_covariance(scatter, sums.scale_count)
        return self.has_collapsed(within, sums.scale_count, mean - centroid(mean))

    def has_collapsed(
        self, within: Float[Array, "c d d"], count: Float[Array, " c"], offset: Float[Array, "k d"]
    ) -> Int[Array, " c"]:
        """Why covariances, whitened by self, have collapsed; `offset` is where components lie."""
        factor = self.factor()
        d = factor.shape[1]
        size = jnp.max(jnp.abs(factor), axis=(0, 2))
        scaled = factor / size[:, None]  # so that squares fit
        covariance = la.matmul(la.matmul(scaled, within), la.transpose(scaled))
        share = divide(count, jnp.sum(count))[:, None, None]
        whitener = la.inverse_of_lower(la.cholesky(jnp.sum(share * covariance, axis=0)))
        relative = la.matmul(la.matmul(whitener, covariance), la.transpose(whitener))
        # The smallest eigenvalue exceeds min_spread where what is left has a factor
        eye = jnp.eye(d, dtype=relative.dtype)
        relative = 0.5 * (relative + la.transpose(relative))
        above, factors = la.cholesky(jnp.stack([relative - self.min_spread * eye, covariance]))
        distinct = jnp.isfinite(above).all(axis=(1, 2))
        # Where every component is thin alike: variances no larger than their own rounding
        root = jnp.diagonal(factors, axis1=1, axis2=2)
        variance = jnp.diagonal(covariance, axis1=1, axis2=2)
        regular = (root**2 > ROUNDINGS * jnp.finfo(root.dtype).eps * variance).all(axis=1)
        wide = resolves(jnp.sqrt(variance), offset / size)
        wide = jnp.all(wide, keepdims=True) if self.shared else wide
        known = jnp.isfinite(covariance).all() & jnp.isfinite(count).all()
        at_floor = jnp.any(self.without_variance(), axis=1)
        thin = known & ~(distinct & regular & wide)
        return caused(few_observations=count < self.least_count, no_variance=thin | at_floor)
