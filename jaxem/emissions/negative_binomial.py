"""Negative binomial components: overdispersed counts, independent given the component.

With mean μ and shape s (variance μ + μ²/s) a count is a sum of N logarithmic variables, where
N ~ Poisson(s log(1 + μ/s)): groups of sizes x₁ + … + x_N = x. With q = (x − μ)/(s + μ) and
p = s (x − μ)/(μ (x + s)),

    log p = Σ_d s log(1 + q) − x log(1 + p) + what x and s add,

where the linear terms of the logarithms are taken together when x is near μ. The complete-data
log-density, up to terms in the data and N alone, is

    N log s − s log(1 + μ/s) − x log(1 + s/μ).

E-step. E N = s (ψ(x + s) − ψ(s)). Coordinates are directions at 0: a constant, x − μ and
g = E N − s log(1 + μ/s) − (x − μ) s/(s + μ), which is small both for s ≫ μ (N is near x) and for
s ≪ μ (N is near its mean). Σr, Σr (x − μ)/σ with σ² = μ + μ²/s, and Σr g are the statistics.

M-step. μ ← Σr x / Σr, whatever s is: the rate at which μ converges is that of the mixture alone,
unlike with the Poisson–gamma augmentation. Then s maximises the above by Newton's method in log s.

Adamidis (1999), Aust. N. Z. J. Stat. 41; Quenouille (1949), Biometrics 5.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import softplus
from jaxtyping import Array, Bool, Float, Int, Num
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_counts, check_shape, check_values, num_features
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._newton import maximize_by_newton
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import (
    as_float,
    divide,
    factorial_remainder,
    filled,
    is_count,
    pseudo_count,
    vanishing,
)
from jaxem.emissions._special import binet, binet_slope, log1p_minus

LEAST_SHAPE, MOST_SHAPE = 1e-4, 1e6
_BOUNDS = math.log(LEAST_SHAPE), math.log(MOST_SHAPE)


class GroupTotals(NamedTuple):
    units: Float[Array, "k d"]  # Σ r
    excess: Float[Array, "k d"]  # Σ r (x − μ) / σ
    groups: Float[Array, "k d"]  # Σ r g, the groups beyond what μ and x − μ foretell


class NegativeBinomial(AbstractEmission):
    """Independent counts with variance mean + mean²/shape.

    **Arguments:** `mean` (k, d), not negative (0 is floored at the smallest normal number);
    `shape` (k, d), positive. Data: counts (n, d), integers or whole floating numbers.

    Estimated shapes lie in [10⁻⁴, 10⁶]. 10⁶ says that a Poisson law does: counts that are not
    overdispersed have no finite estimate, and in float32 a fit may stop on the way there, where
    the likelihood is flat. A component at 10⁻⁴ is `degenerate`.

    **Raises:** `ValueError` for another shape, a negative mean or a shape that is not positive.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "mean": ("log_mean",),
        "shape": ("log_shape",),
    }
    log_mean: Float[Array, "k d"]
    log_shape: Float[Array, "k d"]
    held: Held = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, shape: ArrayLike):
        mean = as_float(mean)
        check_shape("mean", mean, ("k", "d"))
        check_values((mean >= 0) & jnp.isfinite(mean), "mean must be finite and not negative.")
        shape = jnp.asarray(shape, mean.dtype)
        check_shape("shape", shape, mean.shape)
        check_values((shape > 0) & jnp.isfinite(shape), "shape must be positive and finite.")
        self.log_mean = la.floored_log(mean)
        self.log_shape = jnp.log(shape)
        self.held = ()

    @property
    def mean(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_mean)

    @property
    def shape(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_shape)

    @property
    def num_components(self) -> int:
        return self.log_mean.shape[0]

    @property
    def num_free_parameters(self) -> int:
        free = sum(int(np.sum(self.free(name))) for name in self.natural)
        return free * self.log_mean.shape[1]

    def check(self, x: Array) -> None:
        check_counts(x, self.log_mean.shape[1], self.log_mean.dtype, "NegativeBinomial")

    def in_support(self, x: Num[Array, "n d"]) -> Bool[Array, " n"]:
        return jnp.all(is_count(x), axis=1)

    def coordinates(self) -> tuple[Array, Array, Array]:
        zero = jnp.zeros_like(self.log_mean)
        return zero[:, 0], zero, zero

    def log_prob_at(self, coordinates: Any, x: Num[Array, "n d"]) -> Float[Array, "n k"]:
        constant, linear, groups = coordinates
        x = x.astype(self.log_mean.dtype).T
        mean, shape = self.mean[:, :, None], self.shape[:, :, None]
        log_mean, log_shape = self.log_mean[:, :, None], self.log_shape[:, :, None]
        after, total = x + shape, mean + shape
        q = (x - mean) / total
        log_q = _log1p(q, jnp.log(after / total))
        p = (x - mean) / after * jnp.exp(jnp.minimum(log_shape - log_mean, 60))
        log_p = _log1p(p, jnp.log(jnp.where(x > 0, x, 1)) - log_mean - log_q)
        near = (jnp.abs(q) < 0.04) & (jnp.abs(p) < 0.04)
        close_p = jnp.where(near, p, 0)
        q_minus = log1p_minus(q, log_q)
        close = shape * (q_minus - close_p * q) - x * log1p_minus(close_p, close_p)
        own = jnp.where(near, close, shape * log_q - x * log_p)
        own = own - 0.5 * jnp.log1p(x / shape) + binet(after) - binet(shape)
        g = shape * (q_minus + binet_slope(after) - binet_slope(shape)) + 0.5 * x / after
        own = own + linear[:, :, None] * (x - mean) + groups[:, :, None] * g
        own = jnp.sum(own, axis=1) + la.repeat(constant, x.shape[1])
        return (own - jnp.sum(factorial_remainder(x), axis=0)).T

    def statistics(self, cotangents: Any) -> GroupTotals:
        units, excess, groups = cotangents
        units = jnp.broadcast_to(units[:, None], excess.shape)
        return GroupTotals(units, excess / self._deviation(), groups)

    def _deviation(self) -> Float[Array, "k d"]:
        """√(μ + μ²/s)."""
        return jnp.exp(0.5 * (self.log_mean + softplus(self.log_mean - self.log_shape)))

    def _totals(self, sums: GroupTotals) -> tuple[Array, Array]:
        """Σ r (x − μ) and Σ r E N."""
        excess = sums.excess * self._deviation()
        return excess, sums.units * self._log_norm() + excess * self._share() + sums.groups

    def _log_norm(self) -> Float[Array, "k d"]:
        """s log(1 + μ/s), the mean of N."""
        return self.shape * softplus(self.log_mean - self.log_shape)

    def _share(self) -> Float[Array, "k d"]:
        """s/(s + μ)."""
        return jax.nn.sigmoid(self.log_shape - self.log_mean)

    def reframe(self, sums: GroupTotals, old: Self) -> GroupTotals:
        excess, groups = old._totals(sums)
        excess = excess + sums.units * (old.mean - self.mean)
        groups = groups - sums.units * self._log_norm() - excess * self._share()
        return GroupTotals(sums.units, excess / self._deviation(), groups)

    def maximize(self, sums: GroupTotals) -> Self:
        some = sums.units > 0
        excess, groups = self._totals(sums)
        mean = jnp.maximum(self.mean + divide(excess, sums.units), 0)
        log_mean = jnp.where(some, la.floored_log(mean), self.log_mean)
        moved = self.update(log_mean=jnp.maximum(log_mean, 2 * vanishing(mean)))
        if not np.any(self.free("shape")):
            return moved
        average = divide(groups, sums.units)
        free = some & self.free("shape")[:, None]
        log_shape = jnp.vectorize(_best_log_shape)(
            free, self.log_shape, average, mean, moved.log_mean
        )
        return moved.update(log_shape=log_shape)

    def bounded(self) -> Self:
        """Self with shapes where estimates lie."""
        return self.update(log_shape=jnp.clip(self.log_shape, *_BOUNDS))

    def expected_log_prob(self, sums: GroupTotals) -> Float[Array, ""]:
        excess, groups = self._totals(sums)
        total = excess + sums.units * self.mean
        own = groups * self.log_shape - sums.units * self._log_norm()
        return jnp.sum(own - total * softplus(self.log_shape - self.log_mean))

    def prior(
        self,
        mean: ArrayLike | None = None,
        shape: ArrayLike | None = None,
        count: ArrayLike = 0.0,
    ) -> Framed:
        """As if `count` units with the law (mean, shape), and their groups, had been seen.

        Its mode is (mean, shape).

        **Arguments:** `mean`, `shape` that broadcast to (k, d), default the present ones;
        `count` ≥ 0, likewise.

        **Raises:** `ValueError` for a negative count, or values that are not positive.
        """
        count = pseudo_count("count", count, self.log_mean)
        frame = self
        for name, leaf, value in (("mean", "log_mean", mean), ("shape", "log_shape", shape)):
            if value is not None:
                value = filled(name, value, self.log_mean)
                proper = (value > 0) & jnp.isfinite(value)
                check_values(proper, f"the prior's {name} must be positive and finite.")
                frame = replace(frame, **{leaf: jnp.log(value)})
        zero = jnp.zeros_like(count)
        return Framed(GroupTotals(count, zero, zero), frame)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Int[Array, "n d"]:
        rate_key, key = jax.random.split(key)
        log_rate = (
            jax.random.loggamma(rate_key, self.shape[z]) + (self.log_mean - self.log_shape)[z]
        )
        return jax.random.poisson(key, jnp.exp(log_rate))

    def degenerate(self, sums: GroupTotals, min_variance: Any) -> Bool[Array, " k"]:
        wide = jnp.any(self.maximize(sums).log_shape <= _BOUNDS[0], axis=1)
        return (wide & self.free("shape")) | (jnp.max(sums.units, axis=1) < 1)

    @classmethod
    def pooled(cls, x, num_components, weights):
        """The mean of the data, and the shape that gives their variance."""
        check_counts(x, num_features(x), weights.dtype, cls.__name__)
        x = x.astype(weights.dtype)
        mean, n = weighted_mean(x, weights), jnp.sum(weights)
        mean = (n * mean + 0.5) / (n + 0.5)
        beyond = weighted_mean((x - mean) ** 2, weights) - mean
        shape = jnp.clip(mean**2 / jnp.maximum(beyond, 0.01 * mean), 0.1, 100.0)
        full = (num_components, x.shape[1])
        return replace(
            object.__new__(cls),
            log_mean=jnp.broadcast_to(jnp.log(mean), full),
            log_shape=jnp.broadcast_to(jnp.log(shape), full),
            held=(),
        )

    def located_at(self, x: Num[Array, "k d"], spread: Any) -> Self:
        mean = 0.5 * (x.astype(self.log_mean.dtype) + self.mean[0])
        log_shape = jnp.broadcast_to(self.log_shape[:1], x.shape)
        return replace(self, log_mean=jnp.log(mean), log_shape=log_shape)

    def shortcut(self) -> None:
        return None


def _log1p(x: Array, log1p: Array) -> Array:
    """log(1 + x), by the `log1p` that is given where x is large or near −1."""
    small = jnp.abs(x) < 0.5
    return jnp.where(small, jnp.log1p(jnp.where(small, x, 0)), log1p)


def _best_log_shape(
    free: Array, log_shape: Array, groups: Array, average: Array, log_mean: Array
) -> Float[Array, ""]:
    """log s that is best at a mean, for E N and x on average."""

    def log_prob(theta: Array, args: Any) -> Array:
        groups, average, log_mean = args
        gap = theta[0] - log_mean
        own = groups * theta[0] - jnp.exp(theta[0]) * softplus(-gap)
        return own - average * softplus(gap)

    least, most = _BOUNDS
    start = jnp.clip(log_shape, least, most)[None]
    args = (groups, average, log_mean)
    found = maximize_by_newton(log_prob, start, args, free=free, lower=least, upper=most)
    return jnp.where(free, found[0], log_shape)
