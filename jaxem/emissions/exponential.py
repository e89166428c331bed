"""Exponential components: positive durations, independent given the component.

E-step: log p = Σ_d log λ − λ x; coordinates (Σ_d log λ, −λ), whose cotangents are Σr and Σr x.
Statistics are (Σr, λ Σr x), which has no unit. M-step: λ ← λ Σr / (λ Σr x).
"""

from __future__ import annotations

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
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import as_float, pseudo_count, vanishing


class DurationTotals(NamedTuple):
    units: Float[Array, "k d"]  # Σ r
    total: Float[Array, "k d"]  # λ Σ r x


class Exponential(AbstractEmission):
    """Independent durations, x_d ~ Exponential(λ_kd) with mean 1/λ.

    **Arguments:** `rate` (k, d), positive. Data: floating, not negative, shape (n, d).

    **Raises:** `ValueError` for another shape or a rate that is not positive.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"rate": ("log_rate",)}
    log_rate: Float[Array, "k d"]
    held: Held = eqx.field(static=True)

    def __init__(self, rate: ArrayLike):
        rate = as_float(rate)
        check_shape("rate", rate, ("k", "d"))
        check_values((rate > 0) & jnp.isfinite(rate), "rate must be finite and positive.")
        self.log_rate = jnp.log(rate)
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
        check_continuous(x, self.log_rate.shape[1], self.log_rate.dtype, "Exponential")

    def in_support(self, x: Float[Array, "n d"]) -> Bool[Array, " n"]:
        return jnp.all((x >= 0) & jnp.isfinite(x), axis=1)

    def coordinates(self) -> tuple[Array, Array]:
        return jnp.sum(self.log_rate, axis=1), -self.rate

    def log_prob_at(self, coordinates: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        log_norm, slope = coordinates
        return (la.repeat(log_norm, x.shape[0]) + la.matmul(slope, x.T)).T

    def statistics(self, cotangents: Any) -> DurationTotals:
        units, total = cotangents
        return DurationTotals(jnp.broadcast_to(units[:, None], total.shape), self.rate * total)

    def reframe(self, sums: DurationTotals, old: Self) -> DurationTotals:
        return DurationTotals(sums.units, sums.total * jnp.exp(self.log_rate - old.log_rate))

    def maximize(self, sums: DurationTotals) -> Self:
        growth = la.floored_log(sums.units) - la.floored_log(sums.total)
        log_rate = self.log_rate + jnp.where(sums.units > 0, growth, 0)
        # Durations that are all 0 have no finite rate: stop at the largest that fits.
        log_rate = jnp.minimum(log_rate, -2 * vanishing(log_rate))
        return self.update(log_rate=log_rate)

    def expected_log_prob(self, sums: DurationTotals) -> Float[Array, ""]:
        return jnp.sum(sums.units * self.log_rate - sums.total)

    def prior(self, shape: ArrayLike = 1.0, rate: ArrayLike = 0.0) -> Framed:
        """The prior Gamma(shape, rate) of each rate: shape − 1 durations of total `rate`.

        **Raises:** `ValueError` for shape < 1 or rate < 0, whose pseudo-counts would be negative.
        """
        units = pseudo_count("shape − 1", jnp.asarray(shape) - 1, self.log_rate)
        total = pseudo_count("rate", rate, self.log_rate)
        return Framed(DurationTotals(units, self.rate * total), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        d = self.log_rate.shape[1]
        return jax.random.exponential(key, (z.shape[0], d), self.log_rate.dtype) / self.rate[z]

    def degenerate(self, sums: DurationTotals, min_variance: Any) -> Bool[Array, " k"]:
        endless = jnp.max(self.log_rate, axis=1) >= -2 * vanishing(self.log_rate)
        return (jnp.max(sums.units, axis=1) < 1) | (endless & self.free("rate"))

    @classmethod
    def pooled(cls, x, num_components, weights):
        check_continuous(x, num_features(x), x.dtype, cls.__name__)
        mean = weighted_mean(x, weights)
        log_rate = jnp.minimum(-la.floored_log(mean), -2 * vanishing(mean))
        shape = (num_components, x.shape[1])
        return replace(object.__new__(cls), log_rate=jnp.broadcast_to(log_rate, shape), held=())

    def located_at(self, x: Float[Array, "k d"], spread: Any) -> Self:
        mean = 0.5 * x + 0.5 / self.rate[0]
        return replace(self, log_rate=jnp.minimum(-la.floored_log(mean), -2 * vanishing(mean)))

    def shortcut(self) -> None:
        return None
