"""Exponential components: positive durations, independent given the component.

E-step: log p = Σ_d log λ − λ x. Statistics are (Σr, λ Σr x), which has no unit. M-step:
λ ← λ Σr / (λ Σr x).
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, positive
from jaxem._core.parameters import Frozen
from jaxem._core.supports import positives
from jaxem.emissions._family import AbstractExponentialFamily


class DurationTotals(NamedTuple):
    count: Float[Array, "k d"]  # Σ r
    total: Float[Array, "k d"]  # λ Σ r x


class Exponential(AbstractExponentialFamily):
    """Independent durations, x_d ~ Exponential(λ_kd) with mean 1/λ.

    **Arguments:** `rate` (k, d), positive. Data: floating, not negative, shape (n, d). A prior
    Gamma(a, b) of the rate is `prior(a − 1, rate=(a − 1) / b)`.

    Estimated rates end at the largest whose inverse is a normal number: durations that are all 0
    have no finite estimate, and a component there is `degenerate`.

    **Raises:** `ValueError` for another shape or a rate that is not positive.
    """

    parameters: ClassVar = {"rate": positive("log_rate", "k d", collapsed="upper")}
    support: ClassVar = positives("n d", zero=True)
    log_rate: Float[Array, "k d"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, rate: ArrayLike):
        self.log_rate, self.frozen = leaves_of(self.parameters, rate=rate)["log_rate"], ()

    @property
    def rate(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_rate)

    def log_prob(self, x: Float[Array, "n d"], tilt: DurationTotals) -> Float[Array, "n k"]:
        log_norm = jnp.sum(self.log_rate + tilt.count, axis=1)
        return (la.repeat(log_norm, len(x)) + la.matmul((tilt.total - 1) * self.rate, x.T)).T

    def canonical(self):
        return DurationTotals(self.log_rate, -jnp.ones_like(self.log_rate))

    def expected(self):
        return DurationTotals(jnp.ones_like(self.log_rate), jnp.ones_like(self.log_rate))

    def maximize(self, sums):
        growth = la.floored_log(sums.count) - la.floored_log(sums.total)
        return {"log_rate": self.log_rate + growth}

    def reframe(self, sums, old):
        return sums._replace(total=sums.total * jnp.exp(self.log_rate - old.log_rate))

    def sample(self, key, z):
        rate = self.rate[z]
        return jax.random.exponential(key, rate.shape, rate.dtype) / rate
