"""Bernoulli components: binary features, independent given the component.

E-step: log p = Σ_d x log p + (1 − x) log(1 − p); coordinates (log p, log(1 − p)), whose
cotangents are the expected numbers of ones and of zeros. M-step: logit p ← log ones − log zeros.
The two counts are kept apart, so that p near 0 *and* near 1 keeps its digits in float32.
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
from jaxem._checks import check_counts, check_shape, check_values, num_features
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import as_float, pseudo_count


class BinaryCounts(NamedTuple):
    ones: Float[Array, "k d"]
    zeros: Float[Array, "k d"]


class Bernoulli(AbstractEmission):
    """Independent binary features, P(x_d = 1 | z = k) = p.

    **Arguments:** `probability` (k, d) in [0, 1]; 0 and 1 are floored at the smallest normal
    number. Data: 0 and 1, integers, booleans or floating.

    **Raises:** `ValueError` for another shape or values outside [0, 1].
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"probability": ("logits",)}
    logits: Float[Array, "k d"]
    held: Held = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        probability = as_float(probability)
        check_shape("probability", probability, ("k", "d"))
        check_values((probability >= 0) & (probability <= 1), "probability must be in [0, 1].")
        self.logits = la.floored_log(probability) - la.floored_log(1 - probability)
        self.held = ()

    @property
    def probability(self) -> Float[Array, "k d"]:
        return jax.nn.sigmoid(self.logits)

    @property
    def num_components(self) -> int:
        return self.logits.shape[0]

    @property
    def num_free_parameters(self) -> int:
        k, d = self.logits.shape
        return int(np.sum(self.free("probability"))) * d

    def check(self, x: Array) -> None:
        check_counts(x, self.logits.shape[1], self.logits.dtype, "Bernoulli")

    def in_support(self, x: Num[Array, "n d"]) -> Bool[Array, " n"]:
        return jnp.all((x == 0) | (x == 1), axis=1)

    def coordinates(self) -> BinaryCounts:
        return BinaryCounts(jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits))

    def log_prob_at(self, coordinates: BinaryCounts, x: Num[Array, "n d"]) -> Float[Array, "n k"]:
        ones = x.astype(self.logits.dtype).T
        zeros = 1 - ones
        return (la.matmul(coordinates.ones, ones) + la.matmul(coordinates.zeros, zeros)).T

    def statistics(self, cotangents: BinaryCounts) -> BinaryCounts:
        return cotangents

    def reframe(self, sums: BinaryCounts, old: Self) -> BinaryCounts:
        return sums

    def maximize(self, sums: BinaryCounts) -> Self:
        logits = la.floored_log(sums.ones) - la.floored_log(sums.zeros)
        logits = jnp.where(sums.ones + sums.zeros > 0, logits, self.logits)
        return self.update(logits=logits)

    def expected_log_prob(self, sums: BinaryCounts) -> Float[Array, ""]:
        log_p, log_q = self.coordinates()
        return jnp.sum(sums.ones * log_p + sums.zeros * log_q)

    def prior(self, alpha: ArrayLike = 1.0, beta: ArrayLike = 1.0) -> Framed:
        """The prior Beta(alpha, beta) of each probability: α − 1 ones and β − 1 zeros.

        **Raises:** `ValueError` for α < 1 or β < 1, whose pseudo-counts would be negative.
        """
        ones = pseudo_count("alpha − 1", jnp.asarray(alpha) - 1, self.logits)
        zeros = pseudo_count("beta − 1", jnp.asarray(beta) - 1, self.logits)
        return Framed(BinaryCounts(ones, zeros), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Int[Array, "n d"]:
        return jax.random.bernoulli(key, self.probability[z]).astype(jnp.int32)

    def degenerate(self, sums: BinaryCounts, min_variance: Any) -> Bool[Array, " k"]:
        return jnp.max(sums.ones + sums.zeros, axis=1) < 1

    @classmethod
    def pooled(cls, x, num_components, weights):
        check_counts(x, num_features(x), weights.dtype, cls.__name__)
        mean = weighted_mean(x.astype(weights.dtype), weights)
        n = jnp.sum(weights)
        probability = (n * mean + 0.5) / (n + 1)
        logits = jnp.log(probability) - jnp.log1p(-probability)
        shape = (num_components, x.shape[1])
        return replace(object.__new__(cls), logits=jnp.broadcast_to(logits, shape), held=())

    def located_at(self, x: Num[Array, "k d"], spread: Any) -> Self:
        ones = x.astype(self.logits.dtype) + self.probability[0]
        return replace(self, logits=jnp.log(ones) - jnp.log(2 - ones))

    def shortcut(self) -> None:
        return None
