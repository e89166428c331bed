"""Poisson components: counts, independent given the component.

E-step. With the deviance form of the density,

    log p = Σ_d [x log(λ/x) − (λ − x)] − s(x),    s(x) = log x! − x log x + x,

nothing large cancels: rates from 1e-6 to 1e6 keep their digits in float32. Statistics are
(Σr, Σr x/√λ), in standard deviations of a count. M-step: λ ← Σr x / Σr.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, positive
from jaxem._core.numerics import divide, factorial_remainder, half_deviance
from jaxem._core.parameters import Frozen
from jaxem._core.supports import counts
from jaxem.emissions._family import AbstractExponentialFamily


class Totals(NamedTuple):
    count: Float[Array, "k d"]  # Σ r
    total: Float[Array, "k d"]  # Σ r x / √λ


class Poisson(AbstractExponentialFamily):
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

    def log_prob(self, x: Num[Array, "n d"], tilt: Totals) -> Float[Array, "n k"]:
        x = x.astype(self.log_rate.dtype).T
        own = jnp.sum(half_deviance(x, self.log_rate[:, :, None]), axis=1)
        own = own + jnp.sum(factorial_remainder(x), axis=0)
        linear = la.matmul(tilt.total * jnp.exp(-0.5 * self.log_rate), x)
        return (la.repeat(jnp.sum(tilt.count, axis=1), x.shape[1]) + linear - own).T

    def canonical(self):
        return Totals(-self.rate, self.log_rate * jnp.sqrt(self.rate))

    def expected(self):
        return Totals(jnp.ones_like(self.rate), jnp.sqrt(self.rate))

    def maximize(self, sums):
        growth = la.floored_log(divide(sums.total, sums.count))
        return {"log_rate": 0.5 * self.log_rate + growth}

    def reframe(self, sums, old):
        return sums._replace(total=sums.total * jnp.exp(0.5 * (old.log_rate - self.log_rate)))

    def sample(self, key, z):
        return jax.random.poisson(key, self.rate[z])
