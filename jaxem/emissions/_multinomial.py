"""Multinomial components: an observation is a vector of counts over m categories.

E-step, with N = Σ x and the saturated proportions x/N:

    log p = Σ x log(p N/x) + [s(N) − Σ s(x)],    s(x) = log x! − x log x + x.

Of small counts the first sum is a matrix product, with log p less its mean over components. Its
rounding grows with N; of large counts it is a sum of deviances, where nothing large cancels.
Statistics are Σr and the expected counts. M-step: p ← counts / Σ counts. Two categories: the
binomial.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Num
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, simplex
from jaxem._core.numerics import factorial_remainder, half_deviance
from jaxem._core.parameters import Frozen
from jaxem._core.quadratic import linear_tilt
from jaxem._core.supports import counts
from jaxem.emissions._family import AbstractExponentialFamily
from jaxem.factors._simplex import log_shares

# Totals below which rounding of the matrix product is no more than that of the rest
_SMALL = 2**10


class TallyTotals(NamedTuple):
    observations: Float[Array, " k"]  # Σ r
    counts: Float[Array, "k m"]  # Σ r x

    @property
    def count(self) -> Float[Array, " k"]:
        """Observations, or draws where those are more."""
        return jnp.maximum(self.observations, jnp.sum(self.counts, axis=1))


class Multinomial(AbstractExponentialFamily):
    """Counts over m categories; each observation has its own total, which is not modelled.

    **Arguments:** `probability` (k, m), each row in the simplex. Data: counts (n, m), integers
    or whole floating numbers. A prior counts draws: Dirichlet(a, …, a) of each row is
    `prior(m * (a − 1), probability=1 / m)`.

    **Raises:** `ValueError` for another shape or values that are not probabilities.
    """

    parameters: ClassVar = {"probability": simplex("logits", "k m")}
    support: ClassVar = counts("n m")
    logits: Float[Array, "k m"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        leaves = leaves_of(self.parameters, probability=probability)
        self.logits, self.frozen = leaves["logits"], ()

    @property
    def probability(self) -> Float[Array, "k m"]:
        return jax.nn.softmax(self.logits, axis=-1)

    def log_prob(self, x: Num[Array, "n m"], tilt: TallyTotals) -> Float[Array, "n k"]:
        x = x.astype(self.logits.dtype).T
        total = jnp.sum(x, axis=0)
        small = eqxi.unvmap_all(jnp.max(total) < _SMALL)  # all lanes of a vmap take one branch
        own = lax.cond(
            small, lambda: self._by_products(x, total), lambda: self._by_deviances(x, total)
        )
        common = factorial_remainder(total) - jnp.sum(factorial_remainder(x), axis=0)
        count = linear_tilt(tilt.observations[:, None], jnp.ones_like(x[:1]))
        return (own + common + count + linear_tilt(tilt.counts, x)).T

    def _by_products(self, x: Float[Array, "m n"], total: Float[Array, " n"]) -> Array:
        """Σ x log(p N/x)."""
        log_probability = jax.nn.log_softmax(self.logits, axis=-1)
        anchor = jnp.mean(log_probability, axis=0)
        share = x / jnp.where(total > 0, total, 1)
        saturated = jnp.log(jnp.where(x > 0, share, 1))
        common = jnp.sum(jnp.where(x > 0, x * (anchor[:, None] - saturated), 0), axis=0)
        return la.matmul(log_probability - anchor, x) + common

    def _by_deviances(self, x: Float[Array, "m n"], total: Float[Array, " n"]) -> Array:
        """The same, since Σ (p N − x) = 0."""
        log_probability = jax.nn.log_softmax(self.logits, axis=-1)[:, :, None]
        log_rate = log_probability + jnp.log(jnp.where(total > 0, total, 1))
        deviance = half_deviance(x, log_rate, jnp.exp(log_probability) * total)
        return -jnp.sum(deviance, axis=1)

    def canonical(self):
        return TallyTotals(
            jnp.zeros_like(self.logits[:, 0]), jax.nn.log_softmax(self.logits, axis=-1)
        )

    def expected(self):
        """One draw: the total of an observation is not modelled."""
        return TallyTotals(jnp.ones_like(self.logits[:, 0]), self.probability)

    def maximize(self, sums):
        return {"logits": log_shares(sums.counts, self.logits)}

    def reframe(self, sums, old):
        return sums

    def sample(self, key: Array, z: Int[Array, " n"], total: int = 1) -> Int[Array, "n m"]:
        """Counts of `total` draws for each entry of `z`."""
        totals = jnp.full(z.shape, total, self.logits.dtype)
        return jax.random.multinomial(key, totals, self.probability[z]).astype(jnp.int32)
