"""Natural exponential families: independent features whose one statistic is x itself.

    log p = Σ_d [η x − A] + h(x)

Statistics are (Σ r, Σ r x/σ), in a unit σ such as the standard deviation. Reframing is a change of
the unit. M-step: the mean is that of the data.

Morris (1982), Ann. Stat. 10.
"""

import abc
from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Float, Num

from jaxem._core import linalg as la
from jaxem._core.numerics import divide, float_dtype
from jaxem._core.quadratic import linear_tilt
from jaxem.emissions._family import AbstractExponentialFamily


class Totals(NamedTuple):
    count: Float[Array, "k d"]  # Σ r
    total: Float[Array, "k d"]  # Σ r x / σ


class AbstractNaturalFamily(AbstractExponentialFamily):
    """Families with log p = Σ_d [η x − A] + h(x), such as counts and durations."""

    @abc.abstractmethod
    def log_density(self, x: Float[Array, "d n"]) -> Float[Array, "k n"]:
        """log p(x | z = k), in a form that does not cancel; x has the dtype of the parameters."""

    @abc.abstractmethod
    def natural(self) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
        """η and A."""

    @property
    @abc.abstractmethod
    def log_mean(self) -> Float[Array, "k d"]:
        """The logarithm of the mean."""

    @property
    @abc.abstractmethod
    def log_unit(self) -> Float[Array, "k d"]:
        """log σ: of the standard deviation, or of what is proportional to it."""

    def log_average(self, sums: Totals) -> Float[Array, "k d"]:
        """The logarithm of the mean of the data, which is that of the maximum."""
        return la.floored_log(divide(sums.total, sums.count)) + self.log_unit

    def log_prob(self, x: Num[Array, "n d"], tilt: Totals) -> Float[Array, "n k"]:
        x = x.astype(float_dtype(self)).T
        count = linear_tilt(jnp.sum(tilt.count, axis=1, keepdims=True), jnp.ones_like(x[:1]))
        return (self.log_density(x) + count + linear_tilt(tilt.total / self._unit, x)).T

    @property
    def _unit(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_unit)

    def canonical(self) -> Totals:
        eta, log_partition = self.natural()
        return Totals(-log_partition, eta * self._unit)

    def expected(self) -> Totals:
        return Totals(jnp.ones_like(self.log_mean), jnp.exp(self.log_mean - self.log_unit))

    def reframe(self, sums: Totals, old: Self) -> Totals:
        return sums._replace(total=sums.total * jnp.exp(old.log_unit - self.log_unit))
