"""Categorical components: features with values 0 … m − 1, independent given the component.

E-step: log p = Σ_d log p_{d, x_d}; the coordinates are the log-probabilities and their
cotangents the expected counts. M-step: p ← counts / Σ counts. This is the latent class model.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_shape, check_units, check_values, concrete
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._statistics import Framed
from jaxem._units import sum_over_units
from jaxem.emissions._common import as_float, pseudo_count


class Categorical(AbstractEmission):
    """Independent categorical features, P(x_d = j | z = k) = p_kdj.

    **Arguments:** `probability` (k, d, m), each (…, m) in the simplex; a 0 is floored at the
    smallest normal number. Data: integers in 0 … m − 1, shape (n, d). As a `family`,
    `functools.partial(Categorical, num_categories=m)`; features with different numbers of
    categories are parts of `Independent`.

    **Raises:** `ValueError` for another shape or values that are not probabilities.

    Lazarsfeld & Henry (1968), *Latent Structure Analysis*; Goodman (1974), Biometrika 61.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"probability": ("logits",)}
    logits: Float[Array, "k d m"]
    held: Held = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        probability = as_float(probability)
        check_shape("probability", probability, ("k", "d", "m"))
        check_simplex("probability", probability)
        self.logits = la.floored_log(probability)
        self.held = ()

    @property
    def probability(self) -> Float[Array, "k d m"]:
        return jax.nn.softmax(self.logits, axis=-1)

    @property
    def num_components(self) -> int:
        return self.logits.shape[0]

    @property
    def num_free_parameters(self) -> int:
        k, d, m = self.logits.shape
        return int(np.sum(self.free("probability"))) * d * (m - 1)

    def check(self, x: Array) -> None:
        check_codes(x, self.logits.shape[1])

    def in_support(self, x: Int[Array, "n d"]) -> Bool[Array, " n"]:
        return jnp.all((x >= 0) & (x < self.logits.shape[2]), axis=1)

    def coordinates(self) -> Float[Array, "k d m"]:
        return jax.nn.log_softmax(self.logits, axis=-1)

    def log_prob_at(self, coordinates: Array, x: Int[Array, "n d"]) -> Float[Array, "n k"]:
        # Rows of a table: reading them, and adding to them, costs far less than one-hot products
        k, d, m = coordinates.shape
        table = coordinates.reshape(k, d * m).T
        return jnp.sum(jnp.take(table, x + m * jnp.arange(d), axis=0, mode="clip"), axis=1)

    def statistics(self, cotangents: Array) -> Array:
        return cotangents

    def reframe(self, sums: Array, old: Self) -> Array:
        return sums

    def maximize(self, sums: Float[Array, "k d m"]) -> Self:
        logits = log_shares(sums, self.logits)
        return self.update(logits=logits)

    def expected_log_prob(self, sums: Array) -> Float[Array, ""]:
        return jnp.sum(sums * self.coordinates())

    def prior(self, concentration: ArrayLike = 1.0) -> Framed:
        """The Dirichlet prior of each distribution: concentration − 1 pseudo-observations.

        **Raises:** `ValueError` for a concentration below 1, whose counts would be negative.
        """
        counts = jnp.asarray(concentration) - 1
        return Framed(pseudo_count("concentration − 1", counts, self.logits), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Int[Array, "n d"]:
        return jax.random.categorical(key, self.logits[z])

    def degenerate(self, sums: Array, min_variance: Any) -> Bool[Array, " k"]:
        return jnp.max(jnp.sum(sums, axis=2), axis=1) < 1

    @classmethod
    def pooled(cls, x, num_components, weights, num_categories: int | None = None):
        if num_categories is None:
            codes = concrete(x)
            if codes is None:
                raise ValueError(
                    "Categorical cannot count the categories of traced data: pass "
                    "functools.partial(Categorical, num_categories=m) as the family."
                )
            num_categories = int(codes.max()) + 1
        check_codes(x, x.shape[1] if x.ndim == 2 else 1)
        d, m = x.shape[1], num_categories

        def block(part, w, _):
            w = w.astype(weights.dtype)
            return la.matmul(w, one_hot(part, m, w.dtype))

        counts = sum_over_units(block, x, weights, width=d * m).reshape(d, m)
        logits = jnp.log((counts + 1 / m) / (jnp.sum(weights) + 1))
        shape = (num_components, d, m)
        return replace(object.__new__(cls), logits=jnp.broadcast_to(logits, shape), held=())

    def located_at(self, x: Int[Array, "k d"], spread: Any) -> Self:
        _, d, m = self.logits.shape
        shares = one_hot(x, m, self.logits.dtype).reshape(-1, d, m) + self.probability[0]
        return replace(self, logits=jnp.log(shares))

    def shortcut(self) -> None:
        return None


def check_codes(x: Any, num_features: int) -> None:
    check_units(x, num_features, "Categorical")
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(
            f"Categorical expects integer codes 0 … m − 1, got {x.dtype}; use .astype(int)."
        )


def check_simplex(name: str, value: Float[Array, "*b m"]) -> None:
    """Raises `ValueError` unless the last axis is known to hold probabilities that sum to 1."""
    slack = 100 * float(jnp.finfo(value.dtype).eps) * value.shape[-1]
    total = jnp.sum(value, axis=-1, keepdims=True)
    check_values(
        (value >= 0) & (jnp.abs(total - 1) <= slack),
        f"{name}: probabilities must be non-negative and sum to 1 along the last axis.",
    )


def one_hot(x: Int[Array, "n d"], num_categories: int, dtype: Any) -> Float[Array, "n d*m"]:
    hot = x[:, :, None] == jnp.arange(num_categories, dtype=x.dtype)
    return hot.reshape(x.shape[0], -1).astype(dtype)


def log_shares(counts: Float[Array, "*b m"], old: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
    """log(counts / Σ counts) along the last axis, floored; `old` where nothing was counted."""
    total = jnp.sum(counts, axis=-1, keepdims=True)
    shares = counts / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, la.floored_log(shares), old)


def free_log_shares(
    counts: Float[Array, " m"], old: Float[Array, " m"], held: bool | np.ndarray
) -> Float[Array, " m"]:
    """`log_shares` where some entries are held: the others share what those leave."""
    if held is False:
        return log_shares(counts, old)
    if held is True:
        return old
    now = jax.nn.log_softmax(old)
    left = la.floored_log(1 - jnp.sum(jnp.where(held, jnp.exp(now), 0)))
    return jnp.where(held, now, left + log_shares(jnp.where(held, 0, counts), now))
