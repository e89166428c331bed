"""Hidden semi-Markov models: a hidden chain of segments, each with a duration of its own.

The first segment's state is drawn from `initial`, each later one from the row of `transition`
that belongs to the one before it; it lasts d = 1 … D steps with probability p(d) of its state, and
its steps are drawn from the emission. The first segment starts at the first step; the last one may
last beyond the end, so that its duration is known to be at least what was seen of it.

E-step: the messages of `latents/_segments.py`, in O(K D + K²) a step. M-step: shares of counts, and
the maxima of the duration and of the emission.

Guédon (2003), J. Comput. Graph. Stat. 12; Yu (2010), Artif. Intell. 174.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_shape, check_values, checked_key, concrete
from jaxem._core.freezing import freeze
from jaxem._core.numerics import as_float
from jaxem._core.parameters import free
from jaxem._core.sequences import as_sequences
from jaxem.emissions._base import Emission
from jaxem.factors._duration import AbstractDuration
from jaxem.factors._simplex import Simplex
from jaxem.factors._transition import Transition
from jaxem.latents import Segmented, Segments
from jaxem.models._composite import AbstractSeparable
from jaxem.models._sequences import (
    AbstractSequenceModel,
    check_num_states,
    check_size,
    checked_emission,
    start_from_steps,
)


class HSMM(AbstractSequenceModel, AbstractSeparable, Generic[Emission]):
    """A hidden semi-Markov model. Data: arrays (b, t, …), or `Sequences` of different lengths.

    **Arguments:**

    - `initial` (k,), the probabilities of the first segment's state, in the simplex.
    - `transition`: a matrix (k, k) with a zero diagonal, or a `Transition` that forbids it: two
      segments of one state in a row would be one. A 1 there makes a state absorbing: it lasts for
      ever, and its duration means nothing and is frozen.
    - `duration`: an `AbstractDuration` with k states.
    - `emission`: any emission with k components, k ≥ 2.

    **Raises:** `ValueError` for probabilities that are none, a state that can follow itself, or
    numbers of states that differ.
    """

    factors: ClassVar[tuple[str, ...]] = ("_initial", "transition", "duration", "emission")
    _initial: Simplex
    transition: Transition
    duration: AbstractDuration
    emission: Emission

    def __init__(
        self,
        initial: ArrayLike,
        transition: ArrayLike | Transition,
        duration: AbstractDuration,
        emission: Emission,
    ):
        k = checked_emission(emission).num_components
        if not isinstance(duration, AbstractDuration):
            raise ValueError(
                f"the duration must be one such as PoissonDuration, got {type(duration).__name__}."
            )
        if k < 2:
            raise ValueError("an HSMM needs two states or more: each segment changes the state.")
        transition = _between_segments(transition, k)
        self._initial = Simplex(initial, size=k, name="initial")
        if duration.num_states != k:
            raise ValueError(
                f"the duration has {duration.num_states} states, the emission {k} components."
            )
        for name in duration.parameters if _absorbing(transition).any() else ():
            frozen = ~free(duration, name) | _absorbing(transition)
            duration = freeze(duration, name, mask=frozen)
        self.transition, self.duration, self.emission = transition, duration, emission

    @property
    def initial(self) -> Float[Array, " k"]:
        """Probabilities of the first segment's state."""
        return self._initial.probability

    # E-step

    def latents(self, sequences, log_prob, w):
        matrix, pull = jax.vjp(self.transition.log_matrix_at, self.transition.tilt())
        log_duration, forever = self.duration.log_prob(), _absorbing(self.transition)[:, None]
        if forever.any():  # one step after the other
            one = jnp.where(jnp.arange(self.duration.max_duration) == 0, 0, -jnp.inf)
            log_duration = jnp.where(forever, one, log_duration)
        own = self._initial.canonical(), matrix, log_duration
        axes: Any = Segments(None, None, None, 0, 0)  # pyright: ignore[reportArgumentType]

        def counts(found: Segmented, scale: Array) -> tuple[Array, Any, Array]:
            first, moved, lasted = (
                jnp.tensordot(scale, leaf, axes=1, precision=lax.Precision.HIGHEST)
                for leaf in (found.initial, found.transition, found.duration)
            )
            return first, pull(moved)[0], jnp.where(forever, 0, lasted)

        return Segments(*own, log_prob, sequences.within), axes, counts

    def width(self, data: PyTree[Array]) -> int:
        """Numbers an E-step holds for each sequence: a few for each step, state and duration."""
        steps = as_sequences(data).within.shape[1]
        return 3 * self.num_states * self.duration.max_duration * steps

    def sample(self, key: Array, n: int, num_steps: int) -> tuple[PyTree[Array], Int[Array, "n t"]]:
        """n sequences of `num_steps` steps, and the states that they come from."""
        check_size(n, num_steps)
        z_key, x_key = jax.random.split(checked_key(key))
        log_initial = self._initial.canonical()
        log_matrix = la.floored_log(self.transition.matrix)

        def path(key: Array) -> Int[Array, " t"]:
            def enter(key: Array, chances: Array) -> tuple[Array, Array]:
                state_key, duration_key = jax.random.split(key)
                z = jax.random.categorical(state_key, chances)
                return z, self.duration.sample(duration_key, z)

            def step(carry: tuple[Array, Array], key: Array) -> tuple[tuple[Array, Array], Array]:
                z, left = carry
                following, duration = enter(key, log_matrix[z])
                ends = left == 1
                z, left = jnp.where(ends, following, z), jnp.where(ends, duration, left - 1)
                return (z, left), z

            first_key, rest_key = jax.random.split(key)
            first = enter(first_key, log_initial)
            _, rest = lax.scan(step, first, jax.random.split(rest_key, num_steps - 1))
            return jnp.concatenate([first[0][None], rest])

        z = jax.vmap(path)(jax.random.split(z_key, n))
        return self._emit(x_key, z), z

    @classmethod
    def init(
        cls,
        key: Array,
        data: PyTree[Array],
        num_states: int,
        family: Any,
        *,
        duration: AbstractDuration,
        sample_weight: Float[Array, " b"] | None = None,
        method: str = "k-means++",
    ) -> Self:
        """A start for a fit: one state around each of `num_states` steps of the data.

        **Arguments:** as for `HMM.init`; `duration`, where the durations start. Each state goes to
        all others alike.

        Pure, so that restarts are a `jax.vmap` over keys.

        **Raises:** `ValueError` for more states than steps, fewer than two, an unknown method, or
        a duration of another number of states.
        """
        given = key, data, num_states, family, sample_weight, method
        return start_from_steps(cls._around, *given, duration)

    @classmethod
    def _around(cls, emission: Any, uniform: Array, _: Any, __: Any, duration: Any) -> Self:
        k = len(uniform)
        others = 1 - jnp.eye(k, dtype=uniform.dtype)
        return cls(uniform, others / max(k - 1, 1), duration, emission)


def _between_segments(transition: ArrayLike | Transition, k: int) -> Transition:
    """Transitions that are known to lead from a state to itself only where it is never left."""
    if not isinstance(transition, Transition):
        matrix = as_float(transition, "transition matrix")
        check_shape("transition matrix", matrix, (k, k))
        diagonal = jnp.diagonal(matrix)
        check_values((diagonal == 0) | (diagonal == 1), _NO_RETURN)
        values, others = concrete(matrix), ~np.eye(k, dtype=bool)
        return Transition(matrix, others if values is None else values > 0)
    check_num_states(transition, k)
    if (_absorbing(transition) & (transition.possible.sum(axis=1) > 1)).any():
        raise ValueError(_NO_RETURN)
    return transition


def _absorbing(transition: Transition) -> np.ndarray:
    return transition.possible.diagonal()


_NO_RETURN = (
    "a segment's state cannot follow itself: the diagonal of the transition matrix must be zero, "
    "and forbidden by the mask of a Transition. How long a state lasts is said by its duration. A "
    "state that is never left has 1 there, and zeros beside it."
)
