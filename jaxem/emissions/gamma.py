"""Gamma components: positive numbers, independent given the component.

E-step. With shape α, rate β, mean m = α/β and e = x/m − 1,

    log p = Σ_d [α log α − α − log Γ(α) + α ℓ − log x],    ℓ = log(x/m) − e,

in which nothing cancels: ℓ is about −e²/2. It is linear in ℓ, and differentiated in a constant and
in a term linear in e at 0; the cotangents are Σr, Σr e and Σr ℓ, which have no unit. Reframing to
the mean m/c: e′ = c e + (c − 1), ℓ′ = ℓ + (1 − c) e + log c − (c − 1).

M-step. Mean and shape are orthogonal: the mean is that of the data, c = 1/(1 + Σr e/Σr), and the
shape maximises α log α − α − log Γ(α) + α Σr ℓ′/Σr, by Newton's method in log α.

Minka (2002), *Estimating a Gamma distribution*.
"""

from __future__ import annotations

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
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._newton import maximize_by_newton
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import ROUNDINGS, as_float, divide, filled, pseudo_count
from jaxem.emissions._special import binet_slope, gamma_log_norm, log1p_minus

LEAST_SHAPE = 1e-3  # the logarithms of all floating numbers are spread less


class RelativeTotals(NamedTuple):
    units: Float[Array, "k d"]  # Σ r
    excess: Float[Array, "k d"]  # Σ r (x/m − 1)
    log_excess: Float[Array, "k d"]  # Σ r (log(x/m) − x/m + 1)


class Gamma(AbstractEmission):
    """Independent positive numbers, x_d ~ Gamma(α_kd, β_kd) with mean α/β and variance α/β².

    **Arguments:** `shape` α (k, d) and `rate` β (k, d), positive. Data: floating, positive, (n, d).

    Estimated shapes end at 10⁻³ and where the standard deviation is 8 roundings of the mean; there
    a component is `degenerate`. It is so, too, if its squared coefficient of variation 1/α is
    below `min_variance` of the average one.

    **Raises:** `ValueError` for another shape or values that are not positive.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "shape": ("log_shape",),
        "rate": ("log_rate",),
    }
    log_shape: Float[Array, "k d"]
    log_rate: Float[Array, "k d"]
    held: Held = eqx.field(static=True)

    def __init__(self, shape: ArrayLike, rate: ArrayLike):
        shape = as_float(shape)
        check_shape("shape", shape, ("k", "d"))
        rate = jnp.asarray(rate, shape.dtype)
        check_shape("rate", rate, shape.shape)
        self.log_shape = _log_of_positive("shape", shape)
        self.log_rate = _log_of_positive("rate", rate)
        self.held = ()

    @property
    def shape(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_shape)

    @property
    def rate(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_rate)

    @property
    def num_components(self) -> int:
        return self.log_shape.shape[0]

    @property
    def num_free_parameters(self) -> int:
        free = sum(int(np.sum(self.free(name))) for name in self.natural)
        return free * self.log_shape.shape[1]

    def check(self, x: Array) -> None:
        check_continuous(x, self.log_shape.shape[1], self.log_shape.dtype, "Gamma")

    def in_support(self, x: Float[Array, "n d"]) -> Bool[Array, " n"]:
        return jnp.all((x > 0) & jnp.isfinite(x), axis=1)

    def coordinates(self) -> tuple[Array, Array, Array]:
        log_norm = jnp.sum(gamma_log_norm(self.shape), axis=1)
        return log_norm, jnp.zeros_like(self.log_shape), self.shape

    def log_prob_at(self, coordinates: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        log_norm, linear, shape = coordinates
        x = x.T
        log_mean = (self.log_shape - self.log_rate)[:, :, None]
        mean = jnp.exp(log_mean)
        excess = (x - mean) / mean
        log_excess = log1p_minus(excess, jnp.log(x) - log_mean)
        own = la.matmul(linear[:, None, :], excess) + la.matmul(shape[:, None, :], log_excess)
        return (la.repeat(log_norm, x.shape[1]) + own[:, 0] - jnp.sum(jnp.log(x), axis=0)).T

    def statistics(self, cotangents: Any) -> RelativeTotals:
        units, excess, log_excess = cotangents
        return RelativeTotals(jnp.broadcast_to(units[:, None], excess.shape), excess, log_excess)

    def reframe(self, sums: RelativeTotals, old: Self) -> RelativeTotals:
        log_ratio = old.log_shape - old.log_rate - (self.log_shape - self.log_rate)
        return _rescaled(sums, log_ratio)

    def maximize(self, sums: RelativeTotals) -> Self:
        some = sums.units > 0
        excess = divide(sums.excess, sums.units)
        log_excess = divide(sums.log_excess, sums.units)
        growth = la.floored_log(jnp.maximum(1 + excess, 0))
        log_shape = self.log_shape
        if np.any(self.free("shape")):
            free = some & self.free("shape")[:, None]
            rate_free = jnp.broadcast_to(self.free("rate")[:, None], free.shape)
            args = (excess, log_excess, growth, log_shape, rate_free)
            log_shape = jnp.vectorize(_best_log_shape)(free, *args)
        log_rate = log_shape - (self.log_shape - self.log_rate) - growth
        return self.update(log_shape=log_shape, log_rate=jnp.where(some, log_rate, self.log_rate))

    def bounded(self) -> Self:
        """Self with shapes where estimates lie."""
        return self.update(log_shape=jnp.clip(self.log_shape, *_bounds(self.log_shape.dtype)))

    def expected_log_prob(self, sums: RelativeTotals) -> Float[Array, ""]:
        return jnp.sum(sums.units * gamma_log_norm(self.shape) + self.shape * sums.log_excess)

    def prior(
        self,
        shape: ArrayLike | None = None,
        rate: ArrayLike | None = None,
        count: ArrayLike = 0.0,
    ) -> Framed:
        """The conjugate prior, as if `count` units with the law Gamma(shape, rate) had been seen.

        Its mode is (shape, rate).

        **Arguments:** `shape`, `rate` that broadcast to (k, d), default the present ones;
        `count` ≥ 0, likewise.

        **Raises:** `ValueError` for a negative count, or values that are not positive.
        """
        count = pseudo_count("count", count, self.log_shape)
        frame = self
        if shape is not None:
            shape = filled("shape", shape, self.log_shape)
            frame = replace(frame, log_shape=_log_of_positive("the prior's shape", shape))
        if rate is not None:
            rate = filled("rate", rate, self.log_rate)
            frame = replace(frame, log_rate=_log_of_positive("the prior's rate", rate))
        # E log(x/m) = ψ(α) − log α
        log_excess = count * (binet_slope(frame.shape) - 0.5 / frame.shape)
        return Framed(RelativeTotals(count, jnp.zeros_like(count), log_excess), frame)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        return jnp.exp(jax.random.loggamma(key, self.shape[z]) - self.log_rate[z])

    def degenerate(self, sums: RelativeTotals, min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        log_shape = self.maximize(sums).log_shape
        relative = jnp.exp(-log_shape)
        average = divide(jnp.sum(sums.units * relative, axis=0), jnp.sum(sums.units, axis=0))
        thin = (relative < min_variance * average) | (log_shape >= _most(log_shape.dtype))
        thin = jnp.any(thin | (log_shape <= math.log(LEAST_SHAPE)), axis=1)
        thin = thin | (sums.units[:, 0] < 2)
        return (thin & self.free("shape")) | (jnp.max(sums.units, axis=1) < 1)

    @classmethod
    def pooled(cls, x, num_components, weights):
        check_continuous(x, num_features(x), x.dtype, cls.__name__)
        mean = la.floored_log(weighted_mean(x, weights))
        one = jnp.zeros((1, x.shape[1]), x.dtype)
        like_mean = replace(object.__new__(cls), log_shape=one, log_rate=-mean[None], held=())
        log_excess = weighted_mean(la.floored_log(x) - mean, weights)[None]
        fitted = like_mean.maximize(RelativeTotals(one + 1, one, log_excess))
        shape = (num_components, x.shape[1])
        return jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, shape), fitted)

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        """Means at the units; variances relative to the squared mean are those of self × spread."""
        spread = jnp.maximum(spread, jnp.finfo(x.dtype).tiny)
        log_shape = jnp.minimum(self.log_shape[:1] - jnp.log(spread), _most(x.dtype))
        log_shape = jnp.broadcast_to(log_shape, x.shape)
        return replace(self, log_shape=log_shape, log_rate=log_shape - la.floored_log(x))

    def shortcut(self) -> None:
        return None


def _rescaled(sums: RelativeTotals, log_ratio: Array) -> RelativeTotals:
    """Sums about the mean m, about m exp(−log_ratio) instead."""
    rise = jnp.expm1(log_ratio)
    log_rise = log1p_minus(rise, log_ratio)
    return RelativeTotals(
        sums.units,
        sums.excess + rise * (sums.excess + sums.units),
        sums.log_excess - rise * sums.excess + sums.units * log_rise,
    )


def _best_log_shape(
    free: Array,
    excess: Array,
    log_excess: Array,
    growth: Array,
    log_shape: Array,
    rate_free: Array,
) -> Float[Array, ""]:
    """log α that is best with the mean of the data, or with the rate where that is held."""

    def log_prob(theta: Array, args: Any) -> Array:
        excess, log_excess, growth, log_shape = args
        log_ratio = jnp.where(rate_free, -growth, log_shape - theta[0])
        about = _rescaled(RelativeTotals(jnp.ones_like(excess), excess, log_excess), log_ratio)
        shape = jnp.exp(theta[0])
        return gamma_log_norm(shape) + shape * about.log_excess

    least, most = _bounds(log_shape.dtype)
    start = jnp.clip(log_shape, least, most)[None]
    args = (excess, log_excess, growth, log_shape)
    found = maximize_by_newton(log_prob, start, args, free=free, lower=least, upper=most)
    return jnp.where(free, found[0], log_shape)


def _bounds(dtype: Any) -> tuple[float, float]:
    return math.log(LEAST_SHAPE), _most(dtype)


def _most(dtype: Any) -> float:
    """The log-shape whose standard deviation is the rounding of its mean."""
    return -2 * math.log(ROUNDINGS * jnp.finfo(dtype).eps)


def _log_of_positive(name: str, value: Array) -> Array:
    check_values((value > 0) & jnp.isfinite(value), f"{name} must be positive and finite.")
    return jnp.log(value)
