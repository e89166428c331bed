"""Categorical components: features with values 0 … m − 1, independent given the component.

E-step: log p = Σ_d log p_{d, x_d}. Statistics are the expected counts of the categories. M-step:
p ← counts / Σ counts. This is the latent class model.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem._core.constraints import leaves_of, simplex
from jaxem._core.parameters import Frozen
from jaxem._core.supports import codes
from jaxem.emissions._family import AbstractExponentialFamily
from jaxem.factors._simplex import log_shares


class CategoryCounts(NamedTuple):
    counts: Float[Array, "k d m"]  # Σ r [x = j]

    @property
    def count(self) -> Float[Array, "k d"]:
        return jnp.sum(self.counts, axis=2)


class Categorical(AbstractExponentialFamily):
    """Independent categorical features, P(x_d = j | z = k) = p_kdj.

    **Arguments:** `probability` (k, d, m), each (…, m) in the simplex; a 0 is floored at the
    smallest normal number. Data: integers in 0 … m − 1, shape (n, d). As a `family`,
    `functools.partial(Categorical, num_categories=m)`; features with different numbers of
    categories are parts of `Independent`. A prior Dirichlet(a, …, a) of each distribution is
    `prior(m * (a − 1), probability=1 / m)`.

    **Raises:** `ValueError` for another shape or values that are not probabilities.

    Lazarsfeld & Henry (1968), *Latent Structure Analysis*; Goodman (1974), Biometrika 61.
    """

    parameters: ClassVar = {"probability": simplex("logits", "k d m")}
    support: ClassVar = codes("n d", categories="m")
    logits: Float[Array, "k d m"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        leaves = leaves_of(self.parameters, probability=probability)
        self.logits, self.frozen = leaves["logits"], ()

    @property
    def probability(self) -> Float[Array, "k d m"]:
        return jax.nn.softmax(self.logits, axis=-1)

    def log_prob(self, x: Int[Array, "n d"], tilt: CategoryCounts) -> Float[Array, "n k"]:
        # Rows of a table: reading them, and adding to them, costs far less than one-hot products
        k, d, m = self.logits.shape
        table = (self.canonical().counts + tilt.counts).reshape(k, d * m).T
        return jnp.sum(jnp.take(table, x + m * jnp.arange(d), axis=0, mode="clip"), axis=1)

    def canonical(self):
        return CategoryCounts(jax.nn.log_softmax(self.logits, axis=-1))

    def expected(self):
        return CategoryCounts(self.probability)

    def maximize(self, sums):
        return {"logits": log_shares(sums.counts, self.logits)}

    def reframe(self, sums, old):
        return sums

    def sample(self, key, z):
        return jax.random.categorical(key, self.logits[z])
