"""Poisson components: counts, independent given the component.

E-step. With the deviance form of the density,

    log p = Σ_d [x log(λ/x) − (λ − x)] − s(x),    s(x) = log x! − x log x + x,

nothing large cancels: rates from 1e-6 to 1e6 keep their digits in float32. It is differentiated
in two directions, a constant and a linear term in x, both at 0: their cotangents are Σr and Σr x.
Statistics are (Σr, Σr x/√λ), in units of a count's standard deviation. M-step: λ ← Σr x / Σr.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Num
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_counts, check_shape, check_values, num_features
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import (
    as_float,
    divide,
    factorial_remainder,
    is_count,
    pseudo_count,
    vanishing,
)


class CountTotals(NamedTuple):
    units: Float[Array, "k d"]  # Σ r
    total: Float[Array, "k d"]  # Σ r x / √λ


class Poisson(AbstractEmission):
    """Independent counts, x_d ~ Poisson(λ_kd).

    **Arguments:** `rate` (k, d), not negative; 0 is floored at the smallest normal number.
    Data: counts (n, d), integers or whole floating numbers.

    **Raises:** `ValueError` for another shape or a negative rate.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"rate": ("log_rate",)}
    log_rate: Float[Array, "k d"]
    held: Held = eqx.field(static=True)

    def __init__(self, rate: ArrayLike):
        rate = as_float(rate)
        check_shape("rate", rate, ("k", "d"))
        check_values((rate >= 0) & jnp.isfinite(rate), "rate must be finite and not negative.")
        self.log_rate = la.floored_log(rate)
        self.held = ()

    @property
    def rate(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_rate)

    @property
    def num_components(self) -> int:
        return self.log_rate.shape[0]

    @property
    def num_free_parameters(self) -> int:
        k, d = self.log_rate.shape
        return int(np.sum(self.free("rate"))) * d

    def check(self, x: Array) -> None:
        check_counts(x, self.log_rate.shape[1], self.log_rate.dtype, "Poisson")

    def in_support(self, x: Num[Array, "n d"]) -> Bool[Array, " n"]:
        return jnp.all(is_count(x), axis=1)

    def coordinates(self) -> tuple[Array, Array]:
        return jnp.zeros_like(self.log_rate[:, 0]), jnp.zeros_like(self.log_rate)

    def log_prob_at(self, coordinates: Any, x: Num[Array, "n d"]) -> Float[Array, "n k"]:
        constant, linear = coordinates
        x = x.astype(self.log_rate.dtype).T
        own = -jnp.sum(half_deviance(x, self.log_rate[:, :, None]), axis=1)
        own = own + la.repeat(constant, x.shape[1]) + la.matmul(linear, x)
        return (own - jnp.sum(factorial_remainder(x), axis=0)).T

    def statistics(self, cotangents: Any) -> CountTotals:
        units, total = cotangents
        units = jnp.broadcast_to(units[:, None], total.shape)
        return CountTotals(units, total * jnp.exp(-0.5 * self.log_rate))

    def reframe(self, sums: CountTotals, old: Self) -> CountTotals:
        return CountTotals(sums.units, sums.total * jnp.exp(0.5 * (old.log_rate - self.log_rate)))

    def maximize(self, sums: CountTotals) -> Self:
        growth = la.floored_log(divide(sums.total, sums.units)) - 0.5 * self.log_rate
        log_rate = self.log_rate + jnp.where(sums.units > 0, growth, 0)
        log_rate = jnp.maximum(log_rate, 2 * vanishing(log_rate))
        return self.update(log_rate=log_rate)

    def expected_log_prob(self, sums: CountTotals) -> Float[Array, ""]:
        total = sums.total * jnp.exp(0.5 * self.log_rate)
        return jnp.sum(total * self.log_rate - sums.units * self.rate)

    def prior(self, shape: ArrayLike = 1.0, rate: ArrayLike = 0.0) -> Framed:
        """The prior Gamma(shape, rate) of each rate: `rate` units with shape − 1 counts in all.

        **Raises:** `ValueError` for shape < 1 or rate < 0, whose pseudo-counts would be negative.
        """
        total = pseudo_count("shape − 1", jnp.asarray(shape) - 1, self.log_rate)
        units = pseudo_count("rate", rate, self.log_rate)
        return Framed(CountTotals(units, total * jnp.exp(-0.5 * self.log_rate)), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Int[Array, "n d"]:
        return jax.random.poisson(key, self.rate[z])

    def degenerate(self, sums: CountTotals, min_variance: Any) -> Bool[Array, " k"]:
        return jnp.max(sums.units, axis=1) < 1

    @classmethod
    def pooled(cls, x, num_components, weights):
        check_counts(x, num_features(x), weights.dtype, cls.__name__)
        mean = weighted_mean(x.astype(weights.dtype), weights)
        n = jnp.sum(weights)
        log_rate = jnp.log((n * mean + 0.5) / (n + 0.5))
        shape = (num_components, x.shape[1])
        return replace(object.__new__(cls), log_rate=jnp.broadcast_to(log_rate, shape), held=())

    def located_at(self, x: Num[Array, "k d"], spread: Any) -> Self:
        rate = 0.5 * (x.astype(self.log_rate.dtype) + self.rate[0])
        return replace(self, log_rate=jnp.log(rate))

    def shortcut(self) -> None:
        return None


def half_deviance(x: Array, log_rate: Array) -> Array:
    """x log(x/λ) − (x − λ), to full relative precision where x is near λ."""
    rate = jnp.exp(log_rate)
    positive = x > 0
    safe = jnp.where(positive, x, 1)
    excess = (rate - safe) / safe
    near = jnp.abs(excess) < 0.5
    log_ratio = jnp.where(near, jnp.log1p(jnp.where(near, excess, 0)), log_rate - jnp.log(safe))
    return jnp.where(positive, (rate - x) - x * log_ratio, rate)
