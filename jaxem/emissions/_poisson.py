"""Poisson components: counts, independent given the component.

E-step. With the deviance form of the density,

    log p = Σ_d [x log(λ/x) − (λ − x)] − s(x),    s(x) = log x! − x log x + x,

nothing large cancels: rates from 1e-6 to 1e8 keep their digits in float32. M-step:
λ ← Σr x / Σr.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core.constraints import leaves_of, positive
from jaxem._core.numerics import factorial_remainder, half_deviance
from jaxem._core.parameters import Frozen
from jaxem._core.supports import counts
from jaxem.emissions._natural import AbstractNaturalFamily


class Poisson(AbstractNaturalFamily):
    """Independent counts, x_d ~ Poisson(λ_kd).

    **Arguments:** `rate` (k, d), not negative; 0 is floored at the smallest normal number.
    Data: counts (n, d), integers or whole floating numbers. A prior Gamma(a, b) of the rate is
    `prior(b, rate=(a − 1) / b)`.

    **Raises:** `ValueError` for another shape or a negative rate.
    """

    parameters: ClassVar = {"rate": positive("log_rate", "k d", zero=True)}
    support: ClassVar = counts("n d")
    log_rate: Float[Array, "k d"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, rate: ArrayLike):
        self.log_rate, self.frozen = leaves_of(self.parameters, rate=rate)["log_rate"], ()

    @property
    def rate(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_rate)

    def log_density(self, x):
        deviance = jnp.sum(half_deviance(x, self.log_rate[:, :, None]), axis=1)
        return -deviance - jnp.sum(factorial_remainder(x), axis=0)

    def natural(self):
        return self.log_rate, self.rate

    @property
    def log_mean(self) -> Float[Array, "k d"]:
        return self.log_rate

    @property
    def log_unit(self) -> Float[Array, "k d"]:
        return 0.5 * self.log_rate

    def maximize(self, sums):
        return {"log_rate": self.log_average(sums)}

    def sample(self, key, z):
        return jax.random.poisson(key, self.rate[z])
