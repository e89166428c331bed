"""Hidden Markov models with any emission: p(x, z) = P(z₁) Π P(zₜ | zₜ₋₁) Π p(xₜ | zₜ).

E-step. Forward–backward gives P(zₜ | x) and expected transitions (`jaxem.chain`); the emission's
sums are the pullback of its log-density along P(zₜ | x), as in a mixture. M-step: shares of the
expected first states and transitions, and the emission's `maximize`.

Baum, Petrie, Soules & Weiss (1970), Ann. Math. Stat. 41; Rabiner (1989), Proc. IEEE 77.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem import _init, chain
from jaxem import _linalg as la
from jaxem._checks import check_shape, check_weights
from jaxem._emission import AbstractEmission, Emission, float_dtype, with_shortcut
from jaxem._hold import Held, free, held_mask, natural_parameters, replace
from jaxem._model import AbstractModel, all_finite
from jaxem._posterior import AbstractPosterior, Exact
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
from jaxem.models._steps import emitted_sums, log_prob_of_steps, usable_steps
from jaxem.models.mixture import Mixture, check_start
from jaxem.models.transitions import AbstractTransition, Transition


class HMM(AbstractModel, Generic[Emission]):
    """A hidden Markov model. Data: arrays (b, t, …), or `Sequences` of different lengths.

    **Arguments:**

    - `initial` (k,), the probabilities of the first state, in the simplex; or `"stationary"`:
      those of the stationary distribution of the transition matrix, which the M-step then
      takes into account.
    - `transition`: a matrix (k, k), or an `AbstractTransition`.
    - `emission`: any emission with k components.
    - `parallel`: whether chains are filtered and smoothed in parallel in time (`jaxem.chain`).
      Default: on accelerators, for sequences of more than 64 steps.

    A free initial distribution is estimated from first states alone: with one sequence it runs
    to a unit vector. That costs nothing but its standard error, which is marked as held.

    **Raises:** `ValueError` for probabilities that are none, or numbers of states that differ.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"initial": ("initial_logits",)}
    initial_logits: Float[Array, " k"]
    transition: AbstractTransition
    emission: Emission
    stationary: bool = eqx.field(static=True)
    parallel: bool | None = eqx.field(static=True)
    held: Held = eqx.field(static=True)

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
        if not isinstance(emission, AbstractEmission):
            raise ValueError(f"the emission must be an emission, got {type(emission).__name__}.")
        if not isinstance(transition, AbstractTransition):
            transition = Transition(transition)
        k = emission.num_components
        if transition.num_states != k:
            raise ValueError(
                f"the transition has {transition.num_states} states, the emission {k} components."
            )
        self.stationary = isinstance(initial, str)
        if isinstance(initial, str):
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
            self.initial_logits = jnp.zeros(k, float_dtype(emission))
        else:
            initial = as_float(initial)
            check_shape("initial", initial, (k,))
            check_simplex("initial", initial)
            self.initial_logits = la.floored_log(initial)
        self.transition, self.emission, self.parallel = transition, emission, parallel
        self.held = (("initial", None),) if self.stationary else ()

    def __repr__(self) -> str:
        text = super().__repr__()
        return text.replace("# held", "# stationary", 1) if self.stationary else text

    @property
    def initial(self) -> Float[Array, " k"]:
        """Probabilities of the first state."""
        if self.stationary:
            return chain.stationary(self._transition().matrix)
        return jax.nn.softmax(self.initial_logits)

    @property
    def num_states(self) -> int:
        return self.emission.num_components

    @property
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves, as AIC and BIC count them."""
        initial = 0 if self.stationary else max(int(np.sum(free(self, "initial"))) - 1, 0)
        return initial + self.transition.num_free_parameters + self.emission.num_free_parameters

    def _transition(self) -> Transition:
        assert isinstance(self.transition, Transition)
        return self.transition

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

        A sequence of weight 0 equals an absent one, whatever it holds, NaN included.

        **Raises:** `ValueError` for data or weights of the wrong shape or dtype.
        """
        data, weights = as_arrays(data), as_arrays(weights)
        self.check(data)
        check_weights(weights, num_units(data))
        sums, log_likelihood = self._cheapest_sums(as_sequences(data), weights, posterior, key)
        return Framed(sums, self), log_likelihood

    @eqx.filter_jit  # so that an eager call compiles once
    def _cheapest_sums(
        self, data: Sequences, weights: Any, posterior: AbstractPosterior, key: Any
    ) -> Any:
        def total(emission: AbstractEmission) -> Any:
            return replace(self, emission=emission)._sums(data, weights, posterior, key)

        return with_shortcut(self.emission, total, num_units(data), self.width(data))

    def _sums(self, data: Sequences, weights: Any, posterior: AbstractPosterior, key: Any) -> Any:
        """Sums about self and Σ w log p(x)."""
        coordinates = self.transition.coordinates()

        def block(sequences: Sequences, w: Any, block_key: Any) -> Any:
            keys = None if block_key is None else jax.random.split(block_key, num_units(sequences))
            present, x = usable_steps(self.emission, sequences, w)
            log_b = log_prob_of_steps(self.emission, x, present)
            inputs = sequences.driving(w)
            matrix, pull = jax.vjp(lambda c: self._matrix_at(c, inputs), coordinates)
            ends = sequences.lengths, keys
            axes = (
                None,
                None if matrix.ndim == 2 else 0,
                0,
                *(a if a is None else 0 for a in ends),
            )
            run = Partial(posterior.marginalize_chain, parallel=self.parallel)
            run = jax.vmap(run, in_axes=axes)
            likelihood, smoothed, before, after, ratio = run(self.initial, matrix, log_b, *ends)
            scale = jnp.ones(len(log_b), log_b.dtype) if w is None else w.astype(log_b.dtype)
            likelihood = jnp.where((scale != 0) | jnp.isfinite(likelihood), likelihood, 0)
            first = la.matmul(scale, smoothed[:, 0])
            later = jnp.where(sequences.within, scale[:, None], 0)[:, 1:]
            moved = _transitions(before[:, :-1], after[:, 1:], later, shape=matrix.shape)
            if ratio is not None:
                moved = moved * (ratio if matrix.ndim == 4 else ratio[0])
            r = smoothed * jnp.where(present, scale[:, None], 0)[:, :, None]
            emitted = emitted_sums(self.emission, x, r.reshape(-1, self.num_states))
            return (first, pull(moved)[0], emitted), jnp.sum(scale * likelihood)

        (first, moved, emitted), value = sum_over_units(
            block, data, weights, width=self.width(data), key=key
        )
        return (first, self.transition.statistics(moved), emitted), value

    def _matrix_at(self, coordinates: Any, inputs: Any) -> Array:
        """The transition matrix (k, k), or one for each step of each sequence (b, t, k, k)."""
        if inputs is None:
            return self.transition.matrix_at(coordinates, None)
        return jax.vmap(self.transition.matrix_at, in_axes=(None, 0))(coordinates, inputs)

    def sizes(self, data: PyTree[Array]) -> Int[Array, " b"]:
        """How many steps of each sequence were observed: what BIC counts."""
        return jnp.sum(as_sequences(as_arrays(data)).present, axis=1)

    def width(self, data: PyTree[Array]) -> int:
        """Numbers an E-step holds for each sequence: a few for each step and state."""
        return 4 * self.num_states * as_sequences(data).within.shape[1]

    def reframe(self, sums: Any, old: Self) -> Any:
        first, moved, emitted = sums
        return (
            first,
            self.transition.reframe(moved, old.transition),
            self.emission.reframe(emitted, old.emission),
        )

    # M-step

    def m_step(self, statistics: Framed) -> Self:
        """The constrained maximum; with a stationary start, as much of it as is found."""
        first, moved, emitted = statistics.at(self).sums
        if self.stationary:
            transition = self._transition().maximize_from_stationary(moved, first)
        else:
            transition = self.transition.maximize(moved)
        logits = free_log_shares(first, self.initial_logits, held_mask(self, "initial"))
        emission = self.emission.maximize(emitted)
        return replace(self, initial_logits=logits, transition=transition, emission=emission)

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), up to a term in the data alone."""
        first, moved, emitted = statistics.at(self).sums
        own = jnp.sum(first * la.floored_log(self.initial))
        moved = self.transition.expected_log_prob(moved)
        return own + moved + self.emission.expected_log_prob(emitted)

    def prior(
        self,
        initial: ArrayLike | None = None,
        transition: Framed | None = None,
        emission: Framed | None = None,
    ) -> Framed:
        """The conjugate prior as pseudo-statistics; `None` leaves a part flat.

        **Arguments:** `initial`, concentrations (≥ 1, scalar or (k,)) of a Dirichlet; `transition`
        and `emission`, from `self.transition.prior(…)` and `self.emission.prior(…)`.

        **Raises:** `ValueError` for a concentration below 1.
        """
        concentration = jnp.asarray(1.0 if initial is None else initial)
        first = pseudo_count("initial − 1", concentration - 1, self.initial_logits)
        moved = self.transition.prior() if transition is None else transition
        emitted = self.emission.prior() if emission is None else emission
        frame = replace(self, transition=moved.frame, emission=emitted.frame)
        return Framed((first, moved.sums, emitted.sums), frame)

    # What the model says of data

    def check(self, data: PyTree[Array]) -> None:
        if self.initial_logits.ndim != 1:
            raise ValueError(
                f"an HMM has an initial distribution of shape (k,), this one has "
                f"{self.initial_logits.shape}: fit takes one model; fit_restarts and jax.vmap take "
                "models stacked along a leading axis, as jax.vmap over init gives."
            )
        sequences = as_sequences(data)
        self.emission.check(sequences.steps())
        self.transition.check(sequences.inputs)

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " b"]:
        """Whether each sequence is one that the model can have produced."""
        return self.first_impossible(data) < 0

    def first_impossible(self, data: PyTree[Array]) -> Int[Array, " b"]:
        """The first step of each sequence that no state can have produced; −1 where there is none.

        It is one outside the emission's support, or of likelihood zero under every state that
        can be reached. A sequence without any step is impossible at step 0, and one whose length
        exceeds the steps that there are at the first that is missing.
        """
        found = self._infer(_first_impossible, data)
        sequences = as_sequences(as_arrays(data))
        if sequences.lengths is None:
            return found
        steps = sequences.within.shape[1]
        return jnp.where((found < 0) & (sequences.lengths > steps), steps, found)

    def log_prob(self, data: PyTree[Array]) -> Float[Array, " b"]:
        """log p(x) of each sequence."""
        return self._infer(_log_likelihood, data)

    def one_step_log_prob(self, data: PyTree[Array]) -> Float[Array, "b t"]:
        """log p(xₜ | x₁ … xₜ₋₁) of each step; 0 where none was observed."""
        return self._infer(_log_increments, data)

    def filtered(self, data: PyTree[Array]) -> Float[Array, "b t k"]:
        """P(zₜ = k | x₁ … xₜ); zeros beyond the end of a sequence."""
        return self._infer(_filtered, data)

    def responsibilities(self, data: PyTree[Array]) -> Float[Array, "b t k"]:
        """P(zₜ = k | x), the smoothed probabilities; zeros beyond the end of a sequence."""
        return self._infer(_smoothed, data)

    def predict(self, data: PyTree[Array]) -> Int[Array, "b t"]:
        """The most probable state of each step by itself (posterior decoding)."""
        return jnp.argmax(self.responsibilities(data), axis=2)

    def viterbi(self, data: PyTree[Array]) -> tuple[Int[Array, "b t"], Float[Array, " b"]]:
        """The most probable path of each sequence, and log p(x, path).

        Beyond the end of a sequence its last state is repeated.
        """
        paths, log_prob = self.best_paths(data, 1)
        return paths[:, 0], log_prob[:, 0]

    def best_paths(
        self, data: PyTree[Array], num_paths: int
    ) -> tuple[Int[Array, "b paths t"], Float[Array, "b paths"]]:
        """The most probable paths of each sequence, best first, and log p(x, path) of each."""
        if num_paths < 1:
            raise ValueError(f"num_paths must be 1 or more, got {num_paths}.")
        return self._infer(Partial(_best_paths, num_paths=num_paths), data)

    def sample_paths(self, key: Array, data: PyTree[Array]) -> Int[Array, "b t"]:
        """One draw of the path of each sequence given the sequence.

        Steps beyond the end of a sequence are draws of its future.
        """
        keys = jax.random.split(key, num_units(as_arrays(data)))
        return self._infer(_sample_path, data, keys)

    def forecast(self, data: PyTree[Array], num_steps: int) -> Float[Array, "b h k"]:
        """P(z = k | x) in the 1 … `num_steps` steps after each sequence.

        `Mixture(probabilities, model.emission)` is the predictive distribution of such a step.

        **Raises:** `ValueError` for transitions that inputs drive: theirs are not known.
        """
        if not isinstance(self.transition, Transition):
            raise ValueError("forecast needs a Transition: inputs of the future are not known.")
        return self._infer(Partial(_forecast, num_steps=num_steps), data)

    def _infer(self, function: Any, data: PyTree[Array], *extra: Any) -> Any:
        data = as_arrays(data)
        self.check(data)
        return _map_chains(self, function, as_sequences(data), extra)

    def sample(
        self, key: Array, n: int, num_steps: int, inputs: Float[Array, "n t p"] | None = None
    ) -> tuple[PyTree[Array], Int[Array, "n t"]]:
        """n sequences of `num_steps` steps, and the states that they come from."""
        if num_steps < 1:
            raise ValueError(f"a sequence has 1 or more steps, got num_steps={num_steps}.")
        self.transition.check(inputs)
        if inputs is not None and inputs.shape[:2] != (n, num_steps):
            raise ValueError(f"inputs have shape {inputs.shape}; expected ({n}, {num_steps}, p).")
        matrix = self._matrix_at(self.transition.coordinates(), inputs)
        steps = jnp.broadcast_to(la.floored_log(matrix), (n, num_steps, *matrix.shape[-2:]))
        z_key, x_key = jax.random.split(key)

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
        x = self.emission.sample(x_key, z.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(n, num_steps, *leaf.shape[1:]), x), z

    def degenerate(self, statistics: Framed, min_variance: Any) -> Bool[Array, " k"]:
        _, _, emitted = statistics.at(self).sums
        return self.emission.degenerate(emitted, min_variance)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(natural_parameters(self))

    # Starts

    @classmethod
    def init(
        cls,
        key: Array,
        data: PyTree[Array],
        num_states: int,
        family: Any,
        *,
        weights: Float[Array, " b"] | None = None,
        method: str = "k-means++",
        stay: float = 0.9,
    ) -> Self:
        """A start for a fit: one state around each of `num_states` steps of the data.

        **Arguments:** as for `Mixture.init`, with steps for units; `stay`, the probability of
        staying in a state.

        Pure, so that restarts are a `jax.vmap` over keys.

        **Raises:** `ValueError` for more states than steps, or an unknown method.
        """
        sequences = as_sequences(as_arrays(data))
        check_weights(as_arrays(weights), num_units(sequences))
        present = sequences.present
        counted = present if weights is None else present * jnp.asarray(weights)[:, None]
        plain = weights is None and sequences.lengths is None and sequences.observed is None
        mass = None if plain else counted.reshape(-1).astype(_init.floating(sequences.values))
        emission = _init.seed(key, sequences.steps(), num_states, family, mass, method)
        dtype = float_dtype(emission)
        uniform = jnp.full(num_states, 1 / num_states, dtype)
        return cls(uniform, Transition.sticky(num_states, jnp.asarray(stay, dtype)), emission)

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
    return sum_over_units(block, (weighted.reshape(-1, k), after.reshape(-1, k)), width=2 * k)


class _Chain(eqx.Module):
    """A sequence as the functions of `jaxem.chain` see it."""

    initial: Float[Array, " k"]
    transition: Array
    log_prob: Float[Array, "t k"]
    within: Bool[Array, " t"]
    possible: Bool[Array, " t"]
    parallel: bool | None = eqx.field(static=True)


@eqx.filter_jit  # so that an eager call compiles once
def _map_chains(model: HMM, function: Any, data: Sequences, extra: tuple[Any, ...]) -> Any:
    def block(part: Any) -> Any:
        sequences, rest = part
        present, x = usable_steps(model.emission, sequences, None)
        log_b = log_prob_of_steps(model.emission, x, present)
        inputs = sequences.driving()
        matrix = model._matrix_at(model.transition.coordinates(), inputs)
        possible = ~present | model.emission.in_support(x).reshape(present.shape)
        if inputs is not None:
            possible &= jnp.all(jnp.isfinite(inputs), axis=2)
        view = _Chain(model.initial, matrix, log_b, sequences.within, possible, model.parallel)
        axes = _Chain(None, None if matrix.ndim == 2 else 0, 0, 0, 0, model.parallel)  # pyright: ignore[reportArgumentType]
        return jax.vmap(function, in_axes=(axes, *(0 for _ in rest)))(view, *rest)

    return map_over_units(block, (data, extra), width=model.width(data))


def _forward(view: _Chain) -> chain.Filtered:
    given = view.initial, view.transition, view.log_prob
    return chain.filtering(*given, parallel=view.parallel)


def _log_likelihood(view: _Chain) -> Float[Array, ""]:
    return _forward(view).log_likelihood


def _log_increments(view: _Chain) -> Float[Array, " t"]:
    return jnp.where(view.within, _forward(view).log_increments, 0)


def _filtered(view: _Chain) -> Float[Array, "t k"]:
    return jnp.where(view.within[:, None], _forward(view).filtered, 0)


def _smoothed(view: _Chain) -> Float[Array, "t k"]:
    given = view.initial, view.transition, view.log_prob
    found = chain.smoothing(*given, parallel=view.parallel)
    return jnp.where(view.within[:, None], found.smoothed, 0)


def _best_paths(view: _Chain, num_paths: int) -> tuple[Array, Array]:
    length = jnp.sum(view.within)
    return chain.viterbi(
        view.initial, view.transition, view.log_prob, length=length, num_paths=num_paths
    )


def _sample_path(view: _Chain, key: Array) -> Int[Array, " t"]:
    return chain.sample_path(key, _forward(view).filtered, view.transition)


def _forecast(view: _Chain, num_steps: int) -> Float[Array, "h k"]:
    last = jnp.maximum(jnp.sum(view.within) - 1, 0)
    return chain.forecast(_forward(view).filtered[last], view.transition, num_steps)


def _first_impossible(view: _Chain) -> Int[Array, ""]:
    bad = ~view.possible | (_forward(view).log_increments == -jnp.inf)
    bad = jnp.where(jnp.arange(len(bad)) == 0, bad | ~view.within, bad & view.within)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)
