"""Hidden semi-Markov models: a hidden chain of segments, each with a duration of its own.

The first segment's state is drawn from `initial`, each later one from the row of `transition`
that the one before it has; it lasts d = 1 … D steps with probability p(d) of its state, and its
steps are drawn from the emission. The first segment starts at the first step; the last one may
last on beyond the end, so that its duration is known to be at least what was seen of it.

E-step. With r the steps that are left of a segment, the present one included, the filter is

    α(j, r) ← lⱼ · [α(j, r + 1) + (Σᵢ α(i, 1) Aᵢⱼ) pⱼ(r)],    log p(x) = Σ log Σ α,

scaled at every step as in `jaxem.chain`, in O(K D + K²). Expected states, first states,
transitions and durations are the derivatives of log p(x) by log-likelihoods and log-probabilities
(Fisher's identity). M-step: shares of counts, the duration's and the emission's `maximize`.

Guédon (2003), J. Comput. Graph. Stat. 12; Yu & Kobayashi (2006), IEEE Trans. Signal Process. 54;
Yu (2010), Artif. Intell. 174.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem import _init
from jaxem import _linalg as la
from jaxem._checks import check_shape, check_values, check_weights, concrete
from jaxem._emission import AbstractEmission, Emission, float_dtype
from jaxem._hold import Held, free, held_mask, natural_parameters, replace
from jaxem._model import AbstractModel, all_finite
from jaxem._posterior import AbstractPosterior, Exact, Hard
from jaxem._sequences import Sequences, as_sequences
from jaxem._statistics import Framed
from jaxem._units import (
    as_arrays,
    map_over_units,
    num_units,
    sum_over_units,
)
from jaxem.emissions._common import as_float, pseudo_count
from jaxem.emissions.categorical import check_simplex, free_log_shares
from jaxem.models._segments import SHARED, Segments, best_path, log_likelihood, smoothed
from jaxem.models._steps import emitted_sums, log_prob_of_steps, usable_steps
from jaxem.models.durations import AbstractDuration
from jaxem.models.transitions import Transition


class HSMM(AbstractModel, Generic[Emission]):
    """A hidden semi-Markov model. Data: arrays (b, t, …), or `Sequences` of different lengths.

    **Arguments:**

    - `initial` (k,), the probabilities of the first segment's state, in the simplex.
    - `transition`: a matrix (k, k) with a zero diagonal, or a `Transition` that forbids it: two
      segments of one state in a row would be one.
    - `duration`: an `AbstractDuration` with k states.
    - `emission`: any emission with k components, k ≥ 2.

    **Raises:** `ValueError` for probabilities that are none, a state that can follow itself, or
    numbers of states that differ.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"initial": ("initial_logits",)}
    initial_logits: Float[Array, " k"]
    transition: Transition
    duration: AbstractDuration
    emission: Emission
    held: Held = eqx.field(static=True)

    def __init__(
        self,
        initial: ArrayLike,
        transition: ArrayLike | Transition,
        duration: AbstractDuration,
        emission: Emission,
    ):
        if not isinstance(emission, AbstractEmission):
            raise ValueError(f"the emission must be an emission, got {type(emission).__name__}.")
        if not isinstance(duration, AbstractDuration):
            raise ValueError(
                f"the duration must be one such as PoissonDuration, got {type(duration).__name__}."
            )
        k = emission.num_components
        if k < 2:
            raise ValueError("an HSMM needs two states or more: each segment changes the state.")
        transition = _between_segments(transition, k)
        initial = as_float(initial)
        check_shape("initial", initial, (k,))
        check_simplex("initial", initial)
        if duration.num_states != k:
            raise ValueError(
                f"the duration has {duration.num_states} states, the emission {k} components."
            )
        self.initial_logits, self.held = la.floored_log(initial), ()
        self.transition, self.duration, self.emission = transition, duration, emission

    @property
    def initial(self) -> Float[Array, " k"]:
        """Probabilities of the first segment's state."""
        return jax.nn.softmax(self.initial_logits)

    @property
    def num_states(self) -> int:
        return self.emission.num_components

    @property
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves, as AIC and BIC count them."""
        initial = max(int(np.sum(free(self, "initial"))) - 1, 0)
        parts = (self.transition, self.duration, self.emission)
        return initial + sum(part.num_free_parameters for part in parts)

    # E-step

    def e_step(
        self,
        data: PyTree[Array],
        weights: Float[Array, " b"] | None = None,
        *,
        posterior: AbstractPosterior = Exact(),
        key: Array | None = None,
    ) -> tuple[Framed, Float[Array, ""]]:
        """Expected statistics about self, and the log-likelihood Σ w log p(x).

        A sequence of weight 0 equals an absent one, whatever it holds, NaN included. With
        `Hard()` the states are the most probable path; what is left of its last segment's
        duration keeps its distribution.

        **Raises:** `ValueError` for data or weights of the wrong shape or dtype, or a posterior
        other than `Exact()` and `Hard()`.
        """
        data, weights = as_arrays(data), as_arrays(weights)
        self.check(data)
        check_weights(weights, num_units(data))
        sums, log_likelihood = self._sums(as_sequences(data), weights, posterior)
        return Framed(sums, self), log_likelihood

    @eqx.filter_jit  # so that an eager call compiles once
    def _sums(self, data: Sequences, weights: Any, posterior: AbstractPosterior) -> Any:
        """Sums about self and Σ w log p(x)."""
        log_prob_of = _marginal(posterior)

        def block(sequences: Sequences, w: Any, _: Any) -> Any:
            present, x = usable_steps(self.emission, sequences, w)
            log_b = log_prob_of_steps(self.emission, x, present)

            def of_sequences(log_probs: Any, log_b: Array) -> Float[Array, " b"]:
                segments = self._segments(log_probs, log_b, sequences.within)
                return jax.vmap(log_prob_of, in_axes=(SHARED,))(segments)

            likelihood, pull = jax.vjp(of_sequences, self._log_probs(), log_b)
            scale = jnp.ones_like(likelihood) if w is None else w.astype(likelihood.dtype)
            counts, states = pull(scale)
            likelihood = jnp.where((scale != 0) | jnp.isfinite(likelihood), likelihood, 0)
            r = jnp.where(present[:, :, None], states, 0).reshape(-1, self.num_states)
            return (*counts, emitted_sums(self.emission, x, r)), jnp.sum(scale * likelihood)

        return sum_over_units(block, data, weights, width=self.width(data))

    def _log_probs(self) -> tuple[Array, Array, Array]:
        """The coordinates whose cotangents are counts of first states, transitions, durations."""
        initial = jax.nn.log_softmax(self.initial_logits)
        return initial, self.transition.coordinates(), self.duration.log_prob()

    def _segments(self, log_probs: Any, log_b: Array, within: Array) -> Segments:
        initial, moves, duration = log_probs
        matrix = self.transition.matrix_at(moves, None)
        return Segments(jnp.exp(initial), matrix, jnp.exp(duration), log_b, within)

    def sizes(self, data: PyTree[Array]) -> Int[Array, " b"]:
        """How many steps of each sequence were observed: what BIC counts."""
        return jnp.sum(as_sequences(as_arrays(data)).present, axis=1)

    def width(self, data: PyTree[Array]) -> int:
        """Numbers an E-step holds for each sequence: a few for each step, state and duration."""
        steps = as_sequences(data).within.shape[1]
        return 2 * self.num_states * self.duration.max_duration * steps

    def reframe(self, sums: Any, old: Self) -> Any:
        first, moved, lasted, emitted = sums
        return first, moved, lasted, self.emission.reframe(emitted, old.emission)

    # M-step

    def m_step(self, statistics: Framed) -> Self:
        """The constrained maximum of each part."""
        first, moved, lasted, emitted = statistics.at(self).sums
        return replace(
            self,
            initial_logits=free_log_shares(first, self.initial_logits, held_mask(self, "initial")),
            transition=self.transition.maximize(moved),
            duration=self.duration.maximize(lasted),
            emission=self.emission.maximize(emitted),
        )

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), up to a term in the data alone."""
        first, moved, lasted, emitted = statistics.at(self).sums
        own = jnp.sum(first * jax.nn.log_softmax(self.initial_logits))
        own = own + self.transition.expected_log_prob(moved)
        own = own + self.duration.expected_log_prob(lasted)
        return own + self.emission.expected_log_prob(emitted)

    def prior(
        self,
        initial: ArrayLike | None = None,
        transition: Framed | None = None,
        duration: Framed | None = None,
        emission: Framed | None = None,
    ) -> Framed:
        """The prior as pseudo-statistics; `None` leaves a part flat.

        **Arguments:** `initial`, concentrations (≥ 1, scalar or (k,)) of a Dirichlet; the
        others, from `self.transition.prior(…)`, `self.duration.prior(…)` and
        `self.emission.prior(…)`.

        **Raises:** `ValueError` for a concentration below 1.
        """
        concentration = jnp.asarray(1.0 if initial is None else initial)
        first = pseudo_count("initial − 1", concentration - 1, self.initial_logits)
        moved = self.transition.prior() if transition is None else transition
        lasted = self.duration.prior() if duration is None else duration
        emitted = self.emission.prior() if emission is None else emission
        return Framed(
            (first, moved.sums, lasted.sums, emitted.sums),
            replace(self, transition=moved.frame, duration=lasted.frame, emission=emitted.frame),
        )

    # What the model says of data

    def check(self, data: PyTree[Array]) -> None:
        if self.initial_logits.ndim != 1:
            raise ValueError(
                f"an HSMM has an initial distribution of shape (k,), this one has "
                f"{self.initial_logits.shape}: fit takes one model; fit_restarts and jax.vmap take "
                "models stacked along a leading axis, as jax.vmap over init gives."
            )
        sequences = as_sequences(data)
        self.emission.check(sequences.steps())
        self.transition.check(sequences.inputs)

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " b"]:
        """Whether each sequence is one that the model can have produced."""
        sequences = as_sequences(as_arrays(data))
        within, present = sequences.within, sequences.present
        fits = self.emission.in_support(sequences.steps()).reshape(present.shape) | ~present
        known = jnp.all(fits, axis=1) & jnp.any(within, axis=1)
        return known & (self.log_prob(data) > -jnp.inf)

    def log_prob(self, data: PyTree[Array]) -> Float[Array, " b"]:
        """log p(x) of each sequence."""
        return self._infer(log_likelihood, data)

    def responsibilities(self, data: PyTree[Array]) -> Float[Array, "b t k"]:
        """P(zₜ = k | x), the smoothed probabilities; zeros beyond the end of a sequence."""
        return self._infer(smoothed, data)

    def predict(self, data: PyTree[Array]) -> Int[Array, "b t"]:
        """The most probable state of each step by itself (posterior decoding)."""
        return jnp.argmax(self.responsibilities(data), axis=2)

    def viterbi(self, data: PyTree[Array]) -> tuple[Int[Array, "b t"], Float[Array, " b"]]:
        """The most probable path of each sequence, and log p(x, path).

        Beyond the end of a sequence its last state is repeated.
        """
        return self._infer(best_path, data)

    def _infer(self, function: Any, data: PyTree[Array]) -> Any:
        data = as_arrays(data)
        self.check(data)
        return _map_sequences(self, function, as_sequences(data))

    def sample(self, key: Array, n: int, num_steps: int) -> tuple[PyTree[Array], Int[Array, "n t"]]:
        """n sequences of `num_steps` steps, and the states that they come from."""
        if num_steps < 1:
            raise ValueError(f"a sequence has 1 or more steps, got num_steps={num_steps}.")
        z_key, x_key = jax.random.split(key)
        log_initial, *_ = self._log_probs()
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
        x = self.emission.sample(x_key, z.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(n, num_steps, *leaf.shape[1:]), x), z

    def degenerate(self, statistics: Framed, min_variance: Any) -> Bool[Array, " k"]:
        *_, emitted = statistics.at(self).sums
        return self.emission.degenerate(emitted, min_variance)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(natural_parameters(self))

    # Starts

    @classmethod
    def init(
        cls,
        key: Array,
        data: PyTree[Array],
        family: Any,
        duration: AbstractDuration,
        *,
        weights: Float[Array, " b"] | None = None,
        method: str = "k-means++",
    ) -> Self:
        """A start for a fit: a state around each of some steps of the data.

        **Arguments:** as for `HMM.init`; `duration`, where the durations start. It has as many
        states as there are to be; each goes to all others alike.

        Pure, so that restarts are a `jax.vmap` over keys.

        **Raises:** `ValueError` for more states than steps, fewer than two, or an unknown method.
        """
        sequences = as_sequences(as_arrays(data))
        check_weights(as_arrays(weights), num_units(sequences))
        k, present = duration.num_states, sequences.present
        counted = present if weights is None else present * jnp.asarray(weights)[:, None]
        plain = weights is None and sequences.lengths is None and sequences.observed is None
        mass = None if plain else counted.reshape(-1).astype(_init.floating(sequences.values))
        emission = _init.seed(key, sequences.steps(), k, family, mass, method)
        uniform = jnp.full(k, 1 / k, float_dtype(emission))
        others = 1 - jnp.eye(k, dtype=uniform.dtype)
        return cls(uniform, others / max(k - 1, 1), duration, emission)


def _between_segments(transition: ArrayLike | Transition, k: int) -> Transition:
    """Transitions that are known never to lead from a state to itself."""
    if not isinstance(transition, Transition):
        matrix = as_float(transition)
        check_shape("transition matrix", matrix, (k, k))
        check_values(jnp.diagonal(matrix) == 0, _NO_RETURN)
        values, others = concrete(matrix), ~np.eye(k, dtype=bool)
        return Transition(matrix, others if values is None else others & (values > 0))
    if transition.num_states != k:
        raise ValueError(
            f"the transition has {transition.num_states} states, the emission {k} components."
        )
    if (
        transition.mask is None
        or np.asarray(transition.mask)[list(transition.row)].diagonal().any()
    ):
        raise ValueError(_NO_RETURN)
    return transition


_NO_RETURN = (
    "a segment's state cannot follow itself: the diagonal of the transition matrix must be zero, "
    "and forbidden by the mask of a Transition. How long a state lasts is said by its duration."
)


@eqx.filter_jit  # so that an eager call compiles once
def _map_sequences(model: HSMM, function: Any, data: Sequences) -> Any:
    def block(sequences: Sequences) -> Any:
        present, x = usable_steps(model.emission, sequences, None)
        log_b = log_prob_of_steps(model.emission, x, present)
        segments = model._segments(model._log_probs(), log_b, sequences.within)
        return jax.vmap(function, in_axes=(SHARED,))(segments)

    return map_over_units(block, data, width=model.width(data))


def _marginal(posterior: AbstractPosterior) -> Any:
    """The function of a sequence whose derivatives are the posterior's expectations."""
    if isinstance(posterior, Exact):
        return log_likelihood
    if isinstance(posterior, Hard):
        return lambda s: best_path(s)[1]
    raise ValueError(
        "an HSMM takes the posteriors Exact() and Hard(), not those of Sampled, Annealed or "
        "Tempered."
    )
