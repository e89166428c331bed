"""Probabilities that sum to one: mixing weights, first states, rows of transitions, categories."""

from __future__ import annotations

from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_shape, check_values
from jaxem._core.constraints import is_simplex, simplex
from jaxem._core.numerics import as_float, pseudo_count
from jaxem._core.parameters import Frozen, free, replace
from jaxem._core.statistics import Framed
from jaxem.factors._base import AbstractFactor


class Simplex(AbstractFactor):
    """A distribution over k values: P(z = j) ∝ exp(logitsⱼ).

    Its sums are expected counts n (k,), Q = Σ n log p, and the maximum is p = n / Σ n. Where some
    entries are frozen, the free ones share what those leave.

    **Arguments:** `probability` (k,), in the simplex; a 0 is floored at the smallest normal number.
    `size`, how many values there must be; `name`, what messages call it.

    **Raises:** `ValueError` for another shape, or values that are not probabilities.

    ```python
    Simplex([0.2, 0.8]).m_step(jnp.array([3.0, 1.0])).probability  # [0.75 0.25]
    ```
    """

    parameters: ClassVar = {"probability": simplex("logits", "k")}
    logits: Float[Array, " k"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self, probability: ArrayLike, *, size: int | None = None, name: str = "probability"
    ):
        sizes = {} if size is None else {"k": size}
        self.logits = self.parameters["probability"].checked(
            name, as_float(probability, name), sizes
        )
        self.frozen = ()

    @property
    def probability(self) -> Float[Array, " k"]:
        return jax.nn.softmax(self.logits)

    @property
    def num_components(self) -> int:
        return self.logits.shape[0]

    @property
    def num_free_parameters(self) -> int:
        return max(int(np.sum(free(self, "probability"))) - 1, 0)

    def tilt(self) -> Float[Array, " k"]:
        return jnp.zeros_like(self.logits)

    def canonical(self) -> Float[Array, " k"]:
        """log p."""
        return jax.nn.log_softmax(self.logits)

    def m_step(self, sums: Float[Array, " k"]) -> Self:
        frozen = ~free(self, "probability")
        if frozen.all():
            return self
        if not frozen.any():
            return replace(self, logits=log_shares(sums, self.logits))
        now = self.canonical()
        left = la.floored_log(1 - jnp.sum(jnp.where(frozen, jnp.exp(now), 0)))
        shares = left + log_shares(jnp.where(frozen, 0, sums), now)
        return replace(self, logits=jnp.where(frozen, now, shares))

    def reframe(self, sums: Float[Array, " k"], old: Self) -> Float[Array, " k"]:
        return sums

    def expected_log_prob(self, sums: Float[Array, " k"]) -> Float[Array, ""]:
        """Q(self; sums) = Σ n log p."""
        return jnp.sum(sums * self.canonical())

    def prior(
        self,
        count: ArrayLike = 0.0,
        probability: ArrayLike | None = None,
        *,
        name: str = "count",
    ) -> Framed:
        """A Dirichlet prior as pseudo-counts.

        **Arguments:** `count` ≥ 0: one number, of observations in all, that are spread as
        `probability` (default: evenly); or (k,), pseudo-counts of each value. In terms of
        concentrations α it is α − 1 for each value, or k (α − 1) in all where they are equal.

        **Raises:** `ValueError` for a negative count, another shape, or counts of each value
        beside a `probability`.
        """
        if np.ndim(count) == 0:
            even = jnp.full_like(self.logits, 1 / self.num_components)
            law = even if probability is None else Simplex(probability).probability
            check_shape("probability", law, self.logits.shape)
            return Framed(pseudo_count(name, count, law) * law.astype(even.dtype), self)
        if probability is not None:
            raise ValueError(
                f"{name} has shape {np.shape(count)}: beside a probability it is one number, of "
                "observations in all."
            )
        return Framed(pseudo_count(name, count, self.logits), self)


class Stationary(AbstractFactor):
    """The first state of a chain in equilibrium: its distribution follows from the transitions.

    It has no parameters. First states are still counted, for the transitions' M-step. The leaf
    `like` only holds the shape and the dtype of the counts.
    """

    parameters: ClassVar = {}
    frozen: ClassVar[Frozen] = ()
    like: Float[Array, " k"]

    @property
    def num_free_parameters(self) -> int:
        return 0

    def tilt(self) -> Float[Array, " k"]:
        return jnp.zeros_like(self.like)

    def expected_log_prob(self, sums: Float[Array, " k"]) -> Float[Array, ""]:
        """0: what first states say of the transitions is in the model's own Q."""
        return jnp.zeros((), self.like.dtype)

    def m_step(self, sums: Float[Array, " k"]) -> Self:
        return self

    def reframe(self, sums: Float[Array, " k"], old: Self) -> Float[Array, " k"]:
        return sums

    def prior(self, count: ArrayLike = 0.0, *, name: str = "count") -> Framed:
        """Pseudo-counts of first states, as those of `Simplex.prior`."""
        return Framed(Simplex(jax.nn.softmax(self.like)).prior(count, name=name).sums, self)


def check_simplex(name: str, value: Float[Array, "*b m"]) -> None:
    """Raises `ValueError` unless the last axis is known to hold probabilities that sum to 1."""
    check_values(
        is_simplex(value),
        f"{name}: probabilities must be non-negative and sum to 1 along the last axis.",
    )


def log_shares(counts: Float[Array, "*b m"], old: Float[Array, "*b m"]) -> Float[Array, "*b m"]:
    """log(counts / Σ counts) along the last axis, floored; `old` where nothing was counted."""
    total = jnp.sum(counts, axis=-1, keepdims=True)
    shares = counts / jnp.where(total > 0, total, 1)
    return jnp.where(total > 0, la.floored_log(shares), old)
