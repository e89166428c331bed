"""How the state of a Markov chain moves on, and matrices of transitions.

The sums of a matrix are expected transitions n (g, k), a row for each distribution. Q = Σ n log A,
which the shares of each row maximise.
"""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core.checks import check_shape, check_values, concrete
from jaxem._core.constraints import simplex
from jaxem._core.numerics import as_float, pseudo_count
from jaxem._core.parameters import Frozen, free, reordered_masks, replace, update, with_rows
from jaxem._core.statistics import Framed
from jaxem.factors._base import AbstractFactor
from jaxem.factors._climb import climbed
from jaxem.factors._simplex import log_shares
from jaxem.latents._stationary import stationary_log_prob


class AbstractTransition(AbstractFactor):
    """P(zₜ | zₜ₋₁) of a chain with K states.

    Expected statistics are the derivative of the log-likelihood by a tilt, taken at tilt 0 through
    `matrix_at`, whose cotangents are expected transitions over their probabilities.
    """

    @property
    @abc.abstractmethod
    def num_states(self) -> int: ...

    @abc.abstractmethod
    def check(self, inputs: Array | None) -> None:
        """Raises `ValueError` at trace time unless `inputs` (b, t, p) are what it needs."""

    @abc.abstractmethod
    def matrix_at(self, tilt: PyTree[Array], inputs: Float[Array, "t p"] | None) -> Array:
        """Probabilities (k, k), or (t, k, k) where entry t leads from step t to step t + 1.

        Their logarithms are those of self and ⟨tilt, statistics of a transition⟩, to first order
        at tilt = 0.
        """

    @abc.abstractmethod
    def reordered(self, order: Int[Array, " k"]) -> Self:
        """The same transitions between states in another order."""


class Transition(AbstractTransition):
    """A transition matrix A, Aᵢⱼ = P(zₜ = j | zₜ₋₁ = i).

    **Arguments:**

    - `matrix` (k, k), rows in the simplex. Its exact zeros are structural: they stay zero. Under
      `jax.jit`, where values are unknown, a `mask` says where they are.
    - `mask` (k, k): True where a transition is possible; overrides the zeros of `matrix`.
    - `tied`: one label for each row; rows of equal label share one distribution.

    **Raises:** `ValueError` for a matrix that is not stochastic, a row without any possible
    transition, or tied rows that differ.

    ```python
    Transition([[0.9, 0.1], [0.0, 1.0]])  # never back from state 1
    ```
    """

    parameters: ClassVar = {"matrix": simplex("logits", "k k")}
    logits: Float[Array, "g k"]
    mask: tuple[tuple[bool, ...], ...] | None = eqx.field(static=True)
    row: tuple[int, ...] = eqx.field(static=True)  # the distribution of each state
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self,
        matrix: ArrayLike,
        mask: ArrayLike | None = None,
        tied: Sequence[int] | None = None,
    ):
        matrix = as_float(matrix, "transition matrix")
        k = len(matrix) if matrix.ndim else 1
        logits = self.parameters["matrix"].checked("transition matrix", matrix, {"k": max(k, 1)})
        labels = list(range(k)) if tied is None else np.atleast_1d(tied).tolist()
        if len(labels) != k:
            raise ValueError(f"tied needs one label for each of {k} rows, got {len(labels)}.")
        first = [labels.index(label) for label in dict.fromkeys(labels)]
        self.row = tuple(list(dict.fromkeys(labels)).index(label) for label in labels)
        shared = np.asarray(first)[list(self.row)]
        check_values(
            jnp.abs(matrix - matrix[shared]) < 1e-6,
            "rows of the transition matrix that are tied must be equal.",
        )
        values = concrete(matrix)
        if mask is None:
            possible = np.ones((k, k), bool) if values is None else values > 0
        else:
            possible = np.asarray(mask, bool)
            check_shape("mask", jnp.asarray(possible), (k, k))
            inside = possible | (matrix <= 1e-6)
            check_values(inside, "the transition matrix is positive where mask forbids it.")
        if not np.array_equal(possible, possible[shared]):
            raise ValueError("rows that are tied must allow the same transitions.")
        if not possible.any(axis=1).all():
            raise ValueError("a row of the transition matrix allows no transition.")
        self.mask = None if possible.all() else tuple(map(tuple, possible[first].tolist()))
        self.logits, self.frozen = logits[np.asarray(first)], ()

    @classmethod
    def sticky(cls, num_states: int, stay: ArrayLike = 0.9) -> Self:
        """Each state stays with probability `stay`, and goes to all others alike."""
        k = num_states
        stay = as_float(stay, "stay") if k > 1 else jnp.ones_like(as_float(stay, "stay"))
        eye = jnp.eye(k, dtype=stay.dtype)
        return cls(stay * eye + (1 - stay) * (1 - eye) / max(k - 1, 1), np.ones((k, k), bool))

    @classmethod
    def left_to_right(cls, num_states: int, stay: ArrayLike = 0.5, max_jump: int = 1) -> Self:
        """States in order, never back, at most `max_jump` ahead (Bakis); the last is absorbing."""
        k = num_states
        ahead = np.arange(k) - np.arange(k)[:, None]
        jumps = (ahead > 0) & (ahead <= max_jump)
        stay = jnp.where(jumps.any(axis=1), as_float(stay, "stay"), 1.0)[:, None]
        eye = jnp.eye(k, dtype=stay.dtype)
        shares = jnp.asarray(jumps / np.maximum(jumps.sum(axis=1, keepdims=True), 1), stay.dtype)
        return cls(stay * eye + (1 - stay) * shares, jumps | np.eye(k, dtype=bool))

    @property
    def matrix(self) -> Float[Array, "k k"]:
        return self.matrix_at(self.tilt(), None)

    @property
    def num_states(self) -> int:
        return self.logits.shape[1]

    @property
    def num_free_parameters(self) -> int:
        others = self._possible().sum(axis=1) - 1
        return int(np.sum(others * free(self, "matrix")))

    def _possible(self) -> np.ndarray:
        return np.ones(self.logits.shape, bool) if self.mask is None else np.asarray(self.mask)

    @property
    def possible(self) -> np.ndarray:
        """Which transitions are possible, (k, k)."""
        return self._possible()[list(self.row)]

    def has_one_class(self) -> bool:
        """Whether one set of states is never left, so that one distribution is stationary."""
        reach = self.possible | np.eye(self.num_states, dtype=bool)
        for _ in range(self.num_states.bit_length()):
            reach = (reach.astype(float) @ reach) > 0
        returns = np.all(~reach | reach.T, axis=1)  # from wherever it may lead
        return len(np.unique(reach[returns], axis=0)) == 1

    def never_goes_back(self) -> bool:
        """Whether no state leads to one of a lower number, and there are two or more."""
        return self.num_states > 1 and not np.tril(self.possible, -1).any()

    def reordered(self, order: Int[Array, " k"]) -> Self:
        if self.mask is None and self.row == tuple(range(self.num_states)):
            return replace(with_rows(self, order), logits=self.logits[order][:, order])
        places = concrete(order)
        if places is None:
            raise ValueError("a traced order cannot reorder structural zeros or ties: leave jit.")
        labels = [self.row[place] for place in places]
        rows = list(dict.fromkeys(labels))  # in the order in which states first use them
        return replace(
            self,
            logits=self.logits[np.asarray(rows)][:, order],
            mask=self.mask and tuple(tuple(self.mask[i][j] for j in places) for i in rows),
            row=tuple(rows.index(label) for label in labels),
            frozen=reordered_masks(self, rows),
        )

    def check(self, inputs: Array | None) -> None:
        if inputs is not None:
            raise ValueError("the sequences have inputs, but a Transition takes none.")

    def tilt(self) -> Float[Array, "g k"]:
        return jnp.zeros_like(self.logits)

    def _log_prob(self) -> Float[Array, "g k"]:
        """log A, and 0 where no transition is possible."""
        possible = self._possible()
        logits = jnp.where(possible, self.logits, -jnp.inf)
        top = lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
        total = jnp.sum(jnp.where(possible, jnp.exp(logits - top), 0), axis=1, keepdims=True)
        return jnp.where(possible, self.logits - top - jnp.log(total), 0)

    def matrix_at(self, tilt: Float[Array, "g k"], inputs: Any) -> Float[Array, "k k"]:
        return jnp.exp(self.log_matrix_at(tilt))

    def log_matrix_at(self, tilt: Float[Array, "g k"]) -> Float[Array, "k k"]:
        """Log-probabilities, −∞ where no transition is possible."""
        matrix = jnp.where(self._possible(), self._log_prob() + tilt, -jnp.inf)
        return matrix[np.asarray(self.row)]

    def reframe(self, sums: Array, old: Self) -> Array:
        return sums

    def m_step(self, sums: Float[Array, "g k"]) -> Self:
        return update(self, logits=log_shares(sums, self.logits))

    def expected_log_prob(self, sums: Array) -> Float[Array, ""]:
        return jnp.sum(sums * self._log_prob())

    def prior(
        self, count: ArrayLike = 0.0, matrix: ArrayLike | None = None, stay: ArrayLike = 0.0
    ) -> Framed:
        """A Dirichlet prior of each row as pseudo-transitions.

        As if `count` transitions had been seen from each state, spread as `matrix` says, and
        `stay` more from each state to itself. In terms of concentrations α, `count` is the sum of
        α − 1 over what is possible from a state. States that share a row share its counts.

        **Arguments:** `count` ≥ 0, one number or (k,); `matrix` (k, k), rows in the simplex,
        default: evenly over what is possible; `stay` ≥ 0, one number or (k,).

        **Raises:** `ValueError` for negative counts, another shape, or a matrix that is positive
        where no transition is possible.
        """
        like, rows, possible = self.logits[0], np.asarray(self.row), self.possible
        if matrix is None:
            law = jnp.asarray(possible / possible.sum(axis=1, keepdims=True), like.dtype)
        else:
            law = jnp.asarray(matrix, like.dtype)
            self.parameters["matrix"].checked("the prior's matrix", law, {"k": self.num_states})
            allowed = "the prior's matrix is positive where the transition is impossible."
            check_values(possible | (law == 0), allowed)
        seen = pseudo_count("count", count, like)[:, None] * law
        stays = jnp.diag(pseudo_count("stay", stay, like))
        counts = jnp.zeros_like(self.logits).at[rows].add((seen + stays) * possible)
        return Framed(counts, self)

    def maximize_from_stationary(
        self, sums: Float[Array, "g k"], initial: Float[Array, " k"]
    ) -> Self:
        """The maximiser where first states, counted in `initial`, are drawn from δ(A)."""

        def objective(logits: Array, given: tuple[Self, Array, Array]) -> Array:
            factor, sums, initial = given
            new = update(factor, logits=logits)
            return new.expected_log_prob(sums) + stationary_log_prob(new.matrix, initial)

        def scale(logits: Array, given: tuple[Self, Array, Array]) -> tuple[Array, Array]:
            factor, sums, initial = given
            own = jnp.exp(update(factor, logits=logits)._log_prob())
            counts = jnp.sum(sums, axis=1, keepdims=True) + jnp.sum(initial)
            return jnp.where(factor._possible(), own, 0), counts

        logits = climbed(objective, scale, self.logits, (self, sums, initial))
        return update(self, logits=logits)
