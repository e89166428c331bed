"""Exponential components: positive durations, independent given the component.

E-step: log p = Σ_d log λ − λ x, with x in units of its mean. M-step: λ ← Σr / Σr x.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, positive
from jaxem._core.parameters import Frozen
from jaxem._core.supports import positives
from jaxem.emissions._natural import AbstractNaturalFamily


class Exponential(AbstractNaturalFamily):
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

    def log_density(self, x):
        return la.repeat(jnp.sum(self.log_rate, axis=1), x.shape[1]) - la.matmul(self.rate, x)

    def natural(self):
        return -self.rate, -self.log_rate

    @property
    def log_mean(self) -> Float[Array, "k d"]:
        return -self.log_rate

    @property
    def log_unit(self) -> Float[Array, "k d"]:
        return -self.log_rate

    def maximize(self, sums):
        return {"log_rate": -self.log_average(sums)}

    def sample(self, key, z):
        rate = self.rate[z]
        return jax.random.exponential(key, rate.shape, rate.dtype) / rate
