"""How the state of a Markov chain moves on: matrices, and matrices driven by inputs."""

import abc
from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem import chain
from jaxem._checks import check_shape, check_values, concrete
from jaxem._hold import Held, free, update
from jaxem._repr import describe
from jaxem._statistics import Framed
from jaxem.emissions._common import as_float, pseudo_count
from jaxem.emissions.categorical import check_simplex, log_shares


class AbstractTransition(eqx.Module):
    """P(zₜ | zₜ₋₁) of a chain with K states, as an emission is p(xₜ | zₜ).

    The expected statistics are the derivative of the log-likelihood with respect to
    `coordinates`, through `matrix_at`: its cotangents are expected transitions over their
    probabilities. Leaves are unconstrained, as in emissions.
    """

    natural: eqx.AbstractClassVar[dict[str, tuple[str, ...]]]
    held: eqx.AbstractVar[Held]

    def __repr__(self) -> str:
        return describe(self)

    @property
    @abc.abstractmethod
    def num_states(self) -> int: ...

    @property
    @abc.abstractmethod
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves."""

    @abc.abstractmethod
    def check(self, inputs: Array | None) -> None:
        """Raises `ValueError` at trace time unless `inputs` (b, t, p) are what it needs."""

    @abc.abstractmethod
    def coordinates(self) -> PyTree[Array]:
        """The point at which the log-likelihood is differentiated."""

    @abc.abstractmethod
    def matrix_at(self, coordinates: PyTree[Array], inputs: Float[Array, "t p"] | None) -> Array:
        """Probabilities (k, k), or (t, k, k) where entry t leads from step t to step t + 1."""

    @abc.abstractmethod
    def statistics(self, cotangents: PyTree[Array]) -> PyTree[Array]:
        """Sums about self from the cotangents of the coordinates; linear."""

    @abc.abstractmethod
    def reframe(self, sums: PyTree[Array], old: Any) -> PyTree[Array]:
        """Sums taken about `old`, taken about self instead; linear in the sums."""

    @abc.abstractmethod
    def maximize(self, sums: PyTree[Array]) -> Self:
        """The maximiser of `expected_log_prob`, or one that does not lower it."""

    @abc.abstractmethod
    def expected_log_prob(self, sums: PyTree[Array]) -> Float[Array, ""]:
        """Q(self; sums), up to a term in the data alone."""

    @abc.abstractmethod
    def prior(self) -> Framed:
        """A prior as pseudo-statistics; without arguments it is flat."""


class Transition(AbstractTransition):
    """A transition matrix A, Aᵢⱼ = P(zₜ = j | zₜ₋₁ = i).

    **Arguments:**

    - `matrix` (k, k), rows in the simplex. Its exact zeros are structural: they stay zero, and
      cost nothing where they forbid a step. (Under `jax.jit` values are not known: use `mask`.)
    - `mask` (k, k): True where a transition is possible; overrides the zeros of `matrix`.
    - `tied`: one label for each row; rows of equal label share one distribution.

    **Raises:** `ValueError` for a matrix that is not stochastic, a row without any possible
    transition, or tied rows that differ.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"matrix": ("logits",)}
    logits: Float[Array, "g k"]
    mask: tuple[tuple[bool, ...], ...] | None = eqx.field(static=True)
    row: tuple[int, ...] = eqx.field(static=True)  # which of the g distributions each state has
    held: Held = eqx.field(static=True)

    def __init__(
        self,
        matrix: ArrayLike,
        mask: ArrayLike | None = None,
        tied: Sequence[int] | None = None,
    ):
        matrix = as_float(matrix)
        k = matrix.shape[0] if matrix.ndim else 0
        check_shape("transition matrix", matrix, (max(k, 1), max(k, 1)))
        check_simplex("transition matrix", matrix)
        labels = list(range(k)) if tied is None else np.atleast_1d(tied).tolist()
        if len(labels) != k:
            raise ValueError(f"tied needs one label for each of {k} rows, got {len(labels)}.")
        first = [labels.index(label) for label in dict.fromkeys(labels)]
        self.row = tuple(list(dict.fromkeys(labels)).index(label) for label in labels)
        check_values(
            jnp.abs(matrix - matrix[np.asarray(first)][np.asarray(self.row)]) < 1e-6,
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
        if not np.array_equal(possible, possible[np.asarray(first)][np.asarray(self.row)]):
            raise ValueError("rows that are tied must allow the same transitions.")
        possible = possible[np.asarray(first)]
        if not possible.any(axis=1).all():
            raise ValueError("a row of the transition matrix allows no transition.")
        self.mask = None if possible.all() else tuple(map(tuple, possible.tolist()))
        self.logits = la.floored_log(matrix[np.asarray(first)])
        self.held = ()

    @classmethod
    def sticky(cls, num_states: int, stay: ArrayLike = 0.9) -> Self:
        """Each state stays with probability `stay`, and goes to all others alike."""
        k = num_states
        stay = as_float(stay) if k > 1 else jnp.ones_like(as_float(stay))
        eye = jnp.eye(k, dtype=stay.dtype)
        return cls(stay * eye + (1 - stay) * (1 - eye) / max(k - 1, 1), np.ones((k, k), bool))

    @classmethod
    def left_to_right(cls, num_states: int, stay: ArrayLike = 0.5, max_jump: int = 1) -> Self:
        """States in order, never back, at most `max_jump` ahead (Bakis); the last is absorbing."""
        k = num_states
        ahead = np.arange(k) - np.arange(k)[:, None]
        jumps = (ahead > 0) & (ahead <= max_jump)
        stay = jnp.where(jumps.any(axis=1), as_float(stay), 1.0)[:, None]
        eye = jnp.eye(k, dtype=stay.dtype)
        shares = jnp.asarray(jumps / np.maximum(jumps.sum(axis=1, keepdims=True), 1), stay.dtype)
        return cls(stay * eye + (1 - stay) * shares, jumps | np.eye(k, dtype=bool))

    @property
    def matrix(self) -> Float[Array, "k k"]:
        return self.matrix_at(self.coordinates(), None)

    @property
    def num_states(self) -> int:
        return self.logits.shape[1]

    @property
    def num_free_parameters(self) -> int:
        possible = self._possible().sum(axis=1) - 1
        return int(np.sum(possible * free(self, "matrix")))

    def _possible(self) -> np.ndarray:
        return np.ones(self.logits.shape, bool) if self.mask is None else np.asarray(self.mask)

    def has_one_class(self) -> bool:
        """Whether one set of states is never left, so that one distribution is stationary."""
        possible = self._possible()[np.asarray(self.row)]
        reach = possible | np.eye(self.num_states, dtype=bool)
        for _ in range(self.num_states.bit_length()):
            reach = (reach.astype(float) @ reach) > 0
        returns = np.all(~reach | reach.T, axis=1)  # from wherever it may lead
        return len(np.unique(reach[returns], axis=0)) == 1

    def check(self, inputs: Array | None) -> None:
        if inputs is not None:
            raise ValueError("the sequences have inputs, but a Transition takes none.")

    def coordinates(self) -> Float[Array, "g k"]:
        possible = self._possible()
        logits = jnp.where(possible, self.logits, -jnp.inf)
        top = lax.stop_gradient(jnp.max(logits, axis=1, keepdims=True))
        total = jnp.sum(jnp.where(possible, jnp.exp(logits - top), 0), axis=1, keepdims=True)
        return jnp.where(possible, self.logits - top - jnp.log(total), 0)

    def matrix_at(self, coordinates: Array, inputs: Any) -> Float[Array, "k k"]:
        return jnp.where(self._possible(), jnp.exp(coordinates), 0)[np.asarray(self.row)]

    def statistics(self, cotangents: Array) -> Float[Array, "g k"]:
        return cotangents

    def reframe(self, sums: Array, old: Self) -> Array:
        return sums

    def maximize(self, sums: Float[Array, "g k"]) -> Self:
        return update(self, logits=log_shares(sums, self.logits))

    def expected_log_prob(self, sums: Array) -> Float[Array, ""]:
        return jnp.sum(sums * self.coordinates())

    def prior(self, concentration: ArrayLike = 1.0, sticky: ArrayLike = 0.0) -> Framed:
        """The Dirichlet prior of each row, and more weight on staying.

        As if concentration − 1 transitions had been seen, and `sticky` more from each state to
        itself.

        **Arguments:** `concentration` ≥ 1, scalar, (k,) or one for each row and state;
        `sticky` ≥ 0.
        """
        like = self.logits
        counts = pseudo_count("concentration − 1", jnp.asarray(concentration) - 1, like)
        own = pseudo_count("sticky", sticky, jnp.zeros((), like.dtype))
        stays = np.zeros(like.shape, like.dtype)
        stays[np.asarray(self.row), np.arange(self.num_states)] = 1
        return Framed((counts + own * stays) * self._possible(), self)

    def maximize_from_stationary(
        self, sums: Float[Array, "g k"], initial: Float[Array, " k"]
    ) -> Self:
        """The maximiser where first states, counted in `initial`, are drawn from δ(A).

        The derivative of Σ n log δ(A) by the logits counts as transitions, until row shares
        reproduce themselves; then as much of the step as does not lower the objective.
        """

        def from_delta(logits: Array) -> Array:
            delta = chain.stationary(update(self, logits=logits).matrix)
            return jnp.sum(initial * jnp.log(jnp.maximum(delta, jnp.finfo(delta.dtype).tiny)))

        def objective(logits: Array) -> Array:
            return update(self, logits=logits).expected_log_prob(sums) + from_delta(logits)

        def again(_: Any, logits: Array) -> Array:
            counts = jnp.maximum(sums + jax.grad(from_delta)(logits), 0)
            return log_shares(counts * self._possible(), self.logits)

        target = lax.fori_loop(0, 30, again, self.logits)
        shares = 0.5 ** jnp.arange(12, dtype=target.dtype)
        steps = jax.vmap(lambda share: self.logits + share * (target - self.logits))(shares)
        before = objective(self.logits)
        slack = 30 * jnp.finfo(target.dtype).eps * jnp.abs(before)
        rises = jax.vmap(objective)(steps) >= before - slack
        chosen = jnp.where(jnp.any(rises), steps[jnp.argmax(rises)], self.logits)
        return update(self, logits=chosen)


class Quadratic(NamedTuple):
    """A concave quadratic in the parameters θ about a model: v + g·(θ−θ₀) − ¼(θ−θ₀) S (θ−θ₀)."""

    value: Float[Array, ""]
    gradient: Float[Array, "k k q"]
    moments: Float[Array, "k q q"]


class LogisticTransition(AbstractTransition):
    """Transitions driven by inputs: P(zₜ = j | zₜ₋₁ = i, u) ∝ exp(bᵢⱼ + Wᵢⱼ·uₜ).

    Its M-step maximises Böhning's quadratic lower bound of Q, so that the objective rises at
    every step; there is no closed form.

    **Arguments:** `baseline` (k, k), the transition matrix at u = 0; `weights` (k, k, p), or an
    integer p for weights of zero. The inputs are those of `Sequences(…, inputs=…)`. What weights
    have in common over all targets j does nothing, and is taken off them.

    **Raises:** `ValueError` for another shape, or a baseline that is not stochastic.

    Böhning (1992), Ann. Inst. Stat. Math. 44; Bengio & Frasconi (1995), NIPS 7.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "baseline": ("logits",),
        "weights": ("slopes",),
    }
    logits: Float[Array, "k k"]
    slopes: Float[Array, "k k p"]
    held: Held = eqx.field(static=True)

    def __init__(self, baseline: ArrayLike, weights: ArrayLike | int):
        baseline = as_float(baseline)
        size = max(baseline.shape[0], 1) if baseline.ndim else 1
        check_shape("baseline", baseline, (size, size))
        check_simplex("baseline", baseline)
        k = baseline.shape[0]
        if isinstance(weights, int) and weights > 0:
            weights = jnp.zeros((k, k, weights), baseline.dtype)
        self.slopes = jnp.asarray(weights, baseline.dtype)
        check_shape("weights", self.slopes, (k, k, "p"))
        self.logits, self.held = la.floored_log(baseline), ()

    @property
    def baseline(self) -> Float[Array, "k k"]:
        return jax.nn.softmax(self.logits, axis=1)

    @property
    def weights(self) -> Float[Array, "k k p"]:
        return self.slopes - jnp.mean(self.slopes, axis=1, keepdims=True)

    @property
    def num_states(self) -> int:
        return self.logits.shape[0]

    @property
    def num_free_parameters(self) -> int:
        k, _, p = self.slopes.shape
        rows = np.sum(free(self, "baseline")) + p * np.sum(free(self, "weights"))
        return int(rows) * (k - 1)

    def check(self, inputs: Array | None) -> None:
        p = self.slopes.shape[2]
        if inputs is None or inputs.shape[-1] != p:
            got = "none" if inputs is None else f"shape {inputs.shape}"
            raise ValueError(
                f"a LogisticTransition needs inputs of shape (b, t, {p}), got {got}; they go in "
                "as Sequences(values, inputs=…)."
            )

    def _parameters(self) -> Float[Array, "k k q"]:
        return jnp.concatenate([self.logits[:, :, None], self.slopes], axis=2)

    def coordinates(self) -> tuple[Array, Array]:
        k, _, q = self._parameters().shape
        return self._parameters(), jnp.zeros((k, q, q), self.logits.dtype)

    def matrix_at(self, coordinates: tuple[Array, Array], inputs: Any) -> Float[Array, "t k k"]:
        parameters, moments = coordinates
        ones = jnp.ones((inputs.shape[0], 1), parameters.dtype)
        u = jnp.concatenate([ones, inputs.astype(parameters.dtype)], axis=1)
        u = jnp.roll(u, -1, axis=0)  # what drives the transition into the next step
        k, _, q = parameters.shape
        logits = la.matmul(u, parameters.reshape(k * k, q).T).reshape(-1, k, k)
        # moments are zero; their cotangents are Σ P(zₜ₋₁ = i) u uᵀ
        squares = la.matmul(la.outer(u, u).reshape(-1, q * q), moments.reshape(k, q * q).T)
        return jax.nn.softmax(logits, axis=2) * jnp.exp(squares)[:, :, None]

    def statistics(self, cotangents: tuple[Array, Array]) -> Quadratic:
        gradient, moments = cotangents
        return Quadratic(jnp.zeros((), gradient.dtype), gradient, moments)

    def reframe(self, sums: Quadratic, old: Self) -> Quadratic:
        step = self._parameters() - old._parameters()
        pull = _bent(step, sums.moments)
        value = sums.value + jnp.sum(step * (sums.gradient - 0.5 * pull))
        return Quadratic(value, sums.gradient - pull, sums.moments)

    def maximize(self, sums: Quadratic) -> Self:
        is_free = np.concatenate(
            [
                np.broadcast_to(free(self, "baseline")[:, None], (self.num_states, 1)),
                np.broadcast_to(free(self, "weights")[:, None], self.slopes.shape[::2]),
            ],
            axis=1,
        )
        step = 2 * _solve_free(sums.moments, sums.gradient, is_free)
        moved = self._parameters() + step
        return update(self, logits=moved[:, :, 0], slopes=moved[:, :, 1:])

    def expected_log_prob(self, sums: Quadratic) -> Float[Array, ""]:
        return sums.value

    def prior(self, precision: ArrayLike = 0.0) -> Framed:
        """A normal prior of the weights about zero; `precision` a number, or one for each input."""
        k, _, p = self.slopes.shape
        precision = pseudo_count("precision", precision, self.slopes[0, 0])
        moments = 2 * jnp.diag(jnp.concatenate([jnp.zeros(1, precision.dtype), precision]))
        at_zero = eqx.tree_at(lambda t: t.slopes, self, jnp.zeros_like(self.slopes))
        zero = jnp.zeros((k, k, p + 1), precision.dtype)
        sums = Quadratic(
            jnp.zeros((), zero.dtype), zero, jnp.broadcast_to(moments, (k, p + 1, p + 1))
        )
        return Framed(sums, at_zero)


def _bent(step: Float[Array, "k k q"], moments: Float[Array, "k q q"]) -> Float[Array, "k k q"]:
    """Curvature times a step, ½ (I − 11ᵀ/K) step S: what is common to all targets moves nothing."""
    return 0.5 * la.matmul(step - jnp.mean(step, axis=1, keepdims=True), moments)


def _solve_free(moments: Array, gradient: Array, is_free: np.ndarray) -> Array:
    """gradient · moments⁻¹ over what is free; nothing moves where nothing was seen.

    The ridge bounds the steps along which inputs do not differ, whose gradient is rounding.
    """
    eye = jnp.eye(moments.shape[1], dtype=moments.dtype)
    both = is_free[:, :, None] & is_free[:, None, :]
    scale = jnp.sqrt(jnp.maximum(jnp.diagonal(moments, axis1=1, axis2=2), 0))
    scale = jnp.where((scale > 0) & is_free, scale, 1)
    matrix = jnp.where(both, moments, 0) / la.outer(scale, scale)
    ridge = float(jnp.finfo(moments.dtype).eps) ** 0.5
    matrix = matrix + ridge * eye + jnp.where(is_free[:, :, None], 0, eye)
    empty = jnp.diagonal(matrix, axis1=1, axis2=2) <= 2 * ridge
    matrix = jnp.where(empty[:, :, None] * eye, 1, matrix)
    inverse = la.inverse_of_lower(la.cholesky(matrix))
    whitened = la.matmul(
        jnp.where(is_free[:, None, :], gradient, 0) / scale[:, None, :], la.transpose(inverse)
    )
    return la.matmul(whitened, inverse) / scale[:, None, :] * is_free[:, None, :]
