"""Bernoulli components: binary features, independent given the component.

E-step: log p = Σ_d x log p + (1 − x) log(1 − p). Statistics are the expected numbers of ones and
of zeros. M-step: logit p ← log ones − log zeros. The two counts are kept apart, so that p near 0
*and* near 1 keeps its digits in float32.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Num
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, probability
from jaxem._core.parameters import Frozen
from jaxem._core.supports import bits
from jaxem.emissions._family import AbstractExponentialFamily


class BinaryCounts(NamedTuple):
    ones: Float[Array, "k d"]  # Σ r x
    zeros: Float[Array, "k d"]  # Σ r (1 − x)

    @property
    def count(self) -> Float[Array, "k d"]:
        return self.ones + self.zeros


class Bernoulli(AbstractExponentialFamily):
    """Independent binary features, P(x_d = 1 | z = k) = p_kd.

    **Arguments:** `probability` (k, d) in [0, 1]; 0 and 1 are floored at the smallest normal
    number. Data: 0 and 1 (n, d), integers, booleans or floating. A prior Beta(a, b) of the
    probability is `prior(a + b − 2, probability=(a − 1) / (a + b − 2))`.

    **Raises:** `ValueError` for another shape or values outside [0, 1].
    """

    parameters: ClassVar = {"probability": probability("logits", "k d")}
    support: ClassVar = bits("n d")
    logits: Float[Array, "k d"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        leaves = leaves_of(self.parameters, probability=probability)
        self.logits, self.frozen = leaves["logits"], ()

    @property
    def probability(self) -> Float[Array, "k d"]:
        return jax.nn.sigmoid(self.logits)

    def log_prob(self, x: Num[Array, "n d"], tilt: BinaryCounts) -> Float[Array, "n k"]:
        ones, own = x.astype(self.logits.dtype).T, self.canonical()
        return (
            la.matmul(own.ones + tilt.ones, ones) + la.matmul(own.zeros + tilt.zeros, 1 - ones)
        ).T

    def canonical(self):
        return BinaryCounts(jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits))

    def expected(self):
        return BinaryCounts(jax.nn.sigmoid(self.logits), jax.nn.sigmoid(-self.logits))

    def maximize(self, sums):
        return {"logits": la.floored_log(sums.ones) - la.floored_log(sums.zeros)}

    def reframe(self, sums, old):
        return sums

    def sample(self, key, z):
        return jax.random.bernoulli(key, self.probability[z]).astype(jnp.int32)
