"""Hidden Markov models with any emission: p(x, z) = P(z₁) Π P(zₜ | zₜ₋₁) Π p(xₜ | zₜ).

E-step. Forward–backward gives P(zₜ | x) and expected transitions (`jaxem.latents.chain`). M-step:
shares of the expected first states and transitions, and the emission's own maximum.

Baum, Petrie, Soules & Weiss (1970), Ann. Math. Stat. 41; Rabiner (1989), Proc. IEEE 77.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.blocks import sum_over_observations
from jaxem._core.checks import check_count, check_values, checked_key, concrete
from jaxem._core.numerics import divide, float_dtype
from jaxem._core.parameters import replace
from jaxem._core.sequences import Sequences, as_sequences
from jaxem._core.statistics import Framed
from jaxem.emissions._base import Emission
from jaxem.factors._simplex import Simplex, Stationary
from jaxem.factors._transition import AbstractTransition, Transition
from jaxem.latents import Chain, chain
from jaxem.models._composite import maxima
from jaxem.models._mixture import Mixture, check_start
from jaxem.models._order import reordered
from jaxem.models._sequences import (
    AbstractSequenceModel,
    check_num_states,
    check_size,
    checked_emission,
    log_prob_of_steps,
    start_from_steps,
)


class HMM(AbstractSequenceModel, Generic[Emission]):
    """A hidden Markov model. Data: arrays (b, t, …), or `Sequences` of different lengths.

    **Arguments:**

    - `initial` (k,), the probabilities of the first state, in the simplex; or `"stationary"`:
      those of the stationary distribution of the transition matrix, which the M-step then
      takes into account.
    - `transition`: a matrix (k, k), or an `AbstractTransition`.
    - `emission`: any emission with k components.
    - `parallel`: whether chains are filtered and smoothed in parallel in time
      (`jaxem.latents.chain`). Default: on accelerators, for sequences of more than 64 steps.

    A free initial distribution is estimated from first states alone: with one sequence it becomes
    a unit vector, whose standard error is 0.

    **Raises:** `ValueError` for probabilities that are none, or numbers of states that differ.
    """

    factors: ClassVar[tuple[str, ...]] = ("_initial", "transition", "emission")
    _initial: Simplex | Stationary
    transition: AbstractTransition
    emission: Emission
    parallel: bool | None = eqx.field(static=True)

    def __init__(
        self,
        initial: ArrayLike | str,
        transition: ArrayLike | AbstractTransition,
        emission: Emission,
        *,
        parallel: bool | None = None,
    ):
        if not (parallel is None or isinstance(parallel, bool)):
            raise ValueError(f"parallel must be True, False or None, got {parallel!r}.")
        k = checked_emission(emission).num_components
        if not isinstance(transition, AbstractTransition):
            transition = Transition(transition)
        check_num_states(transition, k)
        if isinstance(initial, str):
            _check_stationary(initial, transition)
            self._initial = Stationary(jnp.zeros(k, float_dtype(emission)))  # pyright: ignore[reportCallIssue]
        else:
            self._initial = Simplex(initial, size=k, name="initial")
        self.transition, self.emission, self.parallel = transition, emission, parallel

    @property
    def stationary(self) -> bool:
        """Whether the first state has the stationary distribution of the transitions."""
        return isinstance(self._initial, Stationary)

    @property
    def initial(self) -> Float[Array, " k"]:
        """Probabilities of the first state."""
        if isinstance(self._initial, Simplex):
            return self._initial.probability
        return chain.stationary(self._matrix().matrix)

    def _matrix(self) -> Transition:
        assert isinstance(self.transition, Transition)
        return self.transition

    # E-step

    def latents(self, sequences, log_prob, w):
        inputs = sequences.driving(w)
        matrix, pull = jax.vjp(lambda tilt: self._matrix_at(tilt, inputs), self.transition.tilt())
        each = None if inputs is None else 0
        axes: Any = Chain(None, each, 0, None if sequences.lengths is None else 0, self.parallel)  # pyright: ignore[reportArgumentType]

        def counts(found: chain.Smoothed, scale: Array) -> tuple[Array, Any]:
            later = jnp.where(sequences.within, scale[:, None], 0)[:, 1:]
            moved = _transitions(found.before[:, :-1], found.after[:, 1:], later, matrix.shape)
            if found.ratio is not None:
                moved = moved * (found.ratio[0] if inputs is None else found.ratio)
            if found.moved is not None:
                counted = "b,bij->ij" if inputs is None else "b,btij->btij"
                more = jnp.einsum(counted, scale, found.moved, precision=jax.lax.Precision.HIGHEST)
                moved = moved + divide(more, matrix)
            return la.matmul(scale, found.smoothed[:, 0]), pull(moved)[0]

        return Chain(self.initial, matrix, log_prob, sequences.lengths, self.parallel), axes, counts

    def _matrix_at(self, tilt: Any, inputs: Any) -> Array:
        """The transition matrix (k, k), or one for each step of each sequence (b, t, k, k)."""
        if inputs is None:
            return self.transition.matrix_at(tilt, None)
        return jax.vmap(self.transition.matrix_at, in_axes=(None, 0))(tilt, inputs)

    def width(self, data: PyTree[Array]) -> int:
        """Numbers an E-step holds for each sequence: a few for each step and state."""
        return 4 * self.num_states * as_sequences(data).within.shape[1]

    # M-step

    def m_step(self, statistics: Framed) -> Self:
        """The constrained maximum; with a stationary start, as much of it as is found."""
        found = maxima(self, statistics)
        if self.stationary:
            first, moved, _ = statistics.at(self).sums
            found["transition"] = self._matrix().maximize_from_stationary(moved, first)
        return replace(self, **found)

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), up to a term in the data alone."""
        first, moved, emitted = statistics.at(self).sums
        own = jnp.sum(first * la.floored_log(self.initial))
        own = own + self.transition.expected_log_prob(moved)
        return own + self.emission.expected_log_prob(emitted)

    # What the model says of data

    def best_paths(
        self, data: PyTree[Array], num_paths: int
    ) -> tuple[Int[Array, "b paths t"], Float[Array, "b paths"]]:
        """The most probable paths of each sequence, best first, and log p(x, path) of each."""
        check_count("num_paths", num_paths)
        return self._infer("best_paths", data, num_paths=num_paths)

    def forecast(self, data: PyTree[Array], num_steps: int) -> Float[Array, "b h k"]:
        """P(z = k | x) in the 1 … `num_steps` steps after each sequence.

        `Mixture(probabilities, model.emission)` is the predictive distribution of such a step.

        **Raises:** `ValueError` for transitions that inputs drive: theirs are not known.
        """
        check_count("num_steps", num_steps)
        if not isinstance(self.transition, Transition):
            raise ValueError("forecast needs a Transition: inputs of the future are not known.")
        return self._infer("forecast", data, num_steps=num_steps)

    def sample(
        self, key: Array, n: int, num_steps: int, inputs: Float[Array, "n t p"] | None = None
    ) -> tuple[PyTree[Array], Int[Array, "n t"]]:
        """n sequences of `num_steps` steps, and the states that they come from."""
        check_size(n, num_steps)
        self.transition.check(inputs)
        if inputs is not None and inputs.shape[:2] != (n, num_steps):
            raise ValueError(f"inputs have shape {inputs.shape}; expected ({n}, {num_steps}, p).")
        matrix = self._matrix_at(self.transition.tilt(), inputs)
        steps = jnp.broadcast_to(la.floored_log(matrix), (n, num_steps, *matrix.shape[-2:]))
        z_key, x_key = jax.random.split(checked_key(key))

        def path(key: Array, log_matrix: Array) -> Int[Array, " t"]:
            keys = jax.random.split(key, num_steps)
            first = jax.random.categorical(keys[0], la.floored_log(self.initial))

            def step(now: Array, here: Any) -> tuple[Array, Array]:
                key, out_of = here
                following = jax.random.categorical(key, out_of[now])
                return following, following

            following = jax.lax.scan(step, first, (keys[1:], log_matrix[:-1]))[1]
            return jnp.concatenate([first[None], following])

        z = jax.vmap(path)(jax.random.split(z_key, n), steps)
        return self._emit(x_key, z), z

    # Starts

    @classmethod
    def init(
        cls,
        key: Array,
        data: PyTree[Array],
        num_states: int,
        family: Any,
        *,
        sample_weight: Float[Array, " b"] | None = None,
        method: str = "k-means++",
        stay: float = 0.9,
        transition: Transition | None = None,
    ) -> Self:
        """A start for a fit: one state around each of `num_states` steps of the data.

        **Arguments:** as for `Mixture.init`, with steps for observations; `stay`, the probability
        of staying in a state; or `transition`, where the transitions start. If that never leads
        from a state to an earlier one, as `Transition.left_to_right`, states are ordered by the
        mean time of the steps that are most probable in them.

        Pure, so that restarts are a `jax.vmap` over keys.

        **Raises:** `ValueError` for more states than steps, an unknown method, or a transition
        of another number of states.
        """
        known = concrete(stay)
        if known is not None:
            check_values((known >= 0) & (known <= 1), f"stay must be a probability, got {stay!r}.")
        share = stay if known is None else known.astype(float)  # as an array it is not static
        if transition is not None:
            check_num_states(transition, num_states)
        given = key, data, num_states, family, sample_weight, method
        return start_from_steps(cls._around, *given, share, transition)

    @classmethod
    def _around(
        cls,
        emission: Any,
        uniform: Array,
        sequences: Sequences,
        sample_weight: Any,
        stay: Any,
        transition: Transition | None,
    ) -> Self:
        if transition is None:
            moves = Transition.sticky(len(uniform), jnp.asarray(stay, uniform.dtype))
            return cls(uniform, moves, emission)
        if transition.never_goes_back():
            emission = _in_order_of_time(emission, sequences, sample_weight)
        return cls(uniform, transition, emission)

    @classmethod
    def from_mixture(cls, mixture: Mixture, *, stay: float = 0.9) -> Self:
        """A start from a fitted mixture: its components are the states.

        With probability `stay` a state stays; else the next one is drawn from the mixture's
        weights, as the first one is.
        """
        check_start(mixture)
        weights = mixture.weights
        eye = jnp.eye(len(weights), dtype=weights.dtype)
        matrix = stay * eye + (1 - stay) * weights
        return cls(weights, Transition(matrix, np.ones(matrix.shape, bool)), mixture.components)


def _transitions(before: Array, after: Array, counted: Array, shape: tuple[int, ...]) -> Array:
    """Σ before ⊗ after over all steps for one matrix; or each step's, for a matrix of its own."""
    weighted = before * counted[:, :, None]
    if len(shape) == 4:
        return jnp.pad(la.outer(weighted, after), ((0, 0), (0, 1), (0, 0), (0, 0)))

    def block(pair: Any, *_: Any) -> Float[Array, "k k"]:
        return la.matmul(pair[0].T, pair[1])

    k = shape[-1]
    if weighted.shape[1] == 0:
        return jnp.zeros(shape, before.dtype)
    return sum_over_observations(
        block, (weighted.reshape(-1, k), after.reshape(-1, k)), width=2 * k
    )


def _check_stationary(initial: str, transition: AbstractTransition) -> None:
    if initial != "stationary":
        raise ValueError(f'initial must be probabilities or "stationary", got {initial!r}.')
    if not isinstance(transition, Transition):
        raise ValueError(
            "a stationary start needs a Transition: transitions driven by inputs have no "
            "stationary distribution."
        )
    if not transition.has_one_class():
        raise ValueError(
            "a stationary start needs a chain with one stationary distribution, and this "
            "one has several sets of states that it never leaves: give initial as "
            "probabilities."
        )


def _in_order_of_time(emission: Any, sequences: Sequences, sample_weight: Any) -> Any:
    """An emission whose states are ordered by the mean time of the steps closest to each."""
    counted = sequences.present
    if sample_weight is not None:
        counted = counted * sample_weight[:, None]
    log_b = log_prob_of_steps(emission, sequences, sequences.within.size)
    closest = jax.nn.one_hot(jnp.argmax(log_b, axis=2), log_b.shape[2]) * counted[:, :, None]
    times = jnp.arange(log_b.shape[1], dtype=closest.dtype)
    order = jnp.argsort(divide(jnp.einsum("btk,t->k", closest, times), jnp.sum(closest, (0, 1))))
    return reordered(emission, order)
