"""Multinomial components: a unit is a vector of counts over m categories.

E-step, with N = Σ x and the saturated proportions x/N:

    log p = Σ x log(p N/x) + [s(N) − Σ s(x)],    s(x) = log x! − x log x + x.

Written so, nothing large cancels. The coordinates are log p less its mean over components; their
cotangents are the expected counts. M-step: p ← counts / Σ counts. Two categories: the binomial.
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
from jaxem._checks import check_counts, check_shape, num_features
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import as_float, factorial_remainder, is_count, pseudo_count
from jaxem.emissions.categorical import check_simplex, log_shares


class CategoryCounts(NamedTuple):
    units: Float[Array, " k"]
    counts: Float[Array, "k m"]


class Multinomial(AbstractEmission):
    """Counts over m categories; each unit has its own total, which is not modelled.

    **Arguments:** `probability` (k, m), each row in the simplex. Data: counts (n, m), integers
    or whole floating numbers.

    **Raises:** `ValueError` for another shape or values that are not probabilities.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"probability": ("logits",)}
    logits: Float[Array, "k m"]
    held: Held = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        probability = as_float(probability)
        check_shape("probability", probability, ("k", "m"))
        check_simplex("probability", probability)
        self.logits = la.floored_log(probability)
        self.held = ()

    @property
    def probability(self) -> Float[Array, "k m"]:
        return jax.nn.softmax(self.logits, axis=-1)

    @property
    def num_components(self) -> int:
        return self.logits.shape[0]

    @property
    def num_free_parameters(self) -> int:
        k, m = self.logits.shape
        return int(np.sum(self.free("probability"))) * (m - 1)

    def check(self, x: Array) -> None:
        check_counts(x, self.logits.shape[1], self.logits.dtype, "Multinomial")

    def in_support(self, x: Num[Array, "n m"]) -> Bool[Array, " n"]:
        return jnp.all(is_count(x), axis=1)

    def _log_probability(self) -> Float[Array, "k m"]:
        return jax.nn.log_softmax(self.logits, axis=-1)

    def coordinates(self) -> CategoryCounts:
        return CategoryCounts(jnp.zeros_like(self.logits[:, 0]), self._log_probability())

    def log_prob_at(self, coordinates: CategoryCounts, x: Num[Array, "n m"]) -> Float[Array, "n k"]:
        x = x.astype(self.logits.dtype)
        total = jnp.sum(x, axis=1, keepdims=True)
        anchor = jnp.mean(self._log_probability(), axis=0)
        saturated = jnp.log(jnp.where(x > 0, x / jnp.where(total > 0, total, 1), 1))
        common = jnp.sum(jnp.where(x > 0, x * (anchor - saturated), 0), axis=1)
        common = common + factorial_remainder(total[:, 0]) - jnp.sum(factorial_remainder(x), axis=1)
        own = la.matmul(coordinates.counts - anchor, x.T) + la.repeat(coordinates.units, len(x))
        return (own + common).T

    def statistics(self, cotangents: CategoryCounts) -> CategoryCounts:
        return cotangents

    def reframe(self, sums: CategoryCounts, old: Self) -> CategoryCounts:
        return sums

    def maximize(self, sums: CategoryCounts) -> Self:
        logits = log_shares(sums.counts, self.logits)
        return self.update(logits=logits)

    def expected_log_prob(self, sums: CategoryCounts) -> Float[Array, ""]:
        return jnp.sum(sums.counts * self._log_probability())

    def prior(self, concentration: ArrayLike = 1.0) -> Framed:
        """The Dirichlet prior of each distribution: concentration − 1 pseudo-counts.

        **Raises:** `ValueError` for a concentration below 1, whose counts would be negative.
        """
        counts = pseudo_count("concentration − 1", jnp.asarray(concentration) - 1, self.logits)
        return Framed(CategoryCounts(jnp.zeros_like(counts[:, 0]), counts), self)

    def sample(self, key: Array, z: Int[Array, " n"], total: int = 1) -> Int[Array, "n m"]:
        """Counts of `total` draws for each entry of `z`."""
        draws = jax.random.multinomial(
            key, jnp.full(z.shape, total, self.logits.dtype), self.probability[z]
        )
        return draws.astype(jnp.int32)

    def degenerate(self, sums: CategoryCounts, min_variance: Any) -> Bool[Array, " k"]:
        return jnp.maximum(sums.units, jnp.sum(sums.counts, axis=1)) < 1

    @classmethod
    def pooled(cls, x, num_components, weights):
        check_counts(x, num_features(x), weights.dtype, cls.__name__)
        mean = weighted_mean(x.astype(weights.dtype), weights)
        mean = jnp.where(jnp.any(mean > 0), mean, 1) + 1e-3 * jnp.mean(mean)
        shares = mean / jnp.sum(mean)
        shape = (num_components, x.shape[1])
        return replace(
            object.__new__(cls), logits=jnp.broadcast_to(la.floored_log(shares), shape), held=()
        )

    def located_at(self, x: Num[Array, "k m"], spread: Any) -> Self:
        x = x.astype(self.logits.dtype)
        total = jnp.sum(x, axis=1, keepdims=True)
        own = x / jnp.where(total > 0, total, 1)
        return replace(self, logits=jnp.log(own + self.probability[0]))

    def shortcut(self) -> None:
        return None
