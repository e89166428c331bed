"""Models of hidden states along sequences: what hidden Markov and semi-Markov models share.

E-step. Each sequence is a latent filled with its log-potentials; its posterior's marginals are
counts for the factors of the states, and P(zₜ | x), along which the emission's log-density is
pulled back, as in a mixture. M-step: that of each factor.
"""

import abc
import functools
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.blocks import (
    as_arrays,
    map_over_observations,
    num_observations,
    sum_over_observations,
)
from jaxem._core.checks import check_sample_weight, check_shape
from jaxem._core.numerics import as_float, float_dtype
from jaxem._core.parameters import replace
from jaxem._core.sequences import Sequences, as_sequences
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, Emission, cheapest
from jaxem.factors._simplex import Simplex, Stationary
from jaxem.factors._transition import AbstractTransition
from jaxem.latents import AbstractPosterior, AbstractSequenceLatent, infer
from jaxem.models import _starts
from jaxem.models._composite import AbstractComposite, check_one_model
from jaxem.models._steps import emitted_sums, log_prob_of_steps, usable_steps


class AbstractSequenceModel(AbstractComposite, Generic[Emission]):
    """A model with a hidden state at each step of a sequence.

    Data: arrays (b, t, …), or `Sequences` of different lengths. The last factor is the emission.
    """

    _initial: eqx.AbstractVar[Simplex | Stationary]
    transition: eqx.AbstractVar[AbstractTransition]
    emission: eqx.AbstractVar[Emission]

    @abc.abstractmethod
    def latents(
        self, sequences: Sequences, log_prob: Float[Array, "b t k"], w: Float[Array, " b"] | None
    ) -> tuple[AbstractSequenceLatent, AbstractSequenceLatent]:
        """The latent of each sequence, and the axes of its leaves that run over sequences."""

    @abc.abstractmethod
    def expected_counts(
        self,
        sequences: Sequences,
        w: Float[Array, " b"] | None,
        scale: Float[Array, " b"],
        found: Any,
    ) -> tuple[tuple[Any, ...], Float[Array, "b t k"]]:
        """Sums of all factors but the emission, and P(zₜ = k | x), from the latents' marginals.

        The sums are those of all sequences, each times its `scale`; w is None or the scale.
        """

    @property
    def num_states(self) -> int:
        return self.emission.num_components

    # E-step

    def expected_sums(
        self, data: Any, sample_weight: Any, posterior: AbstractPosterior, key: Any
    ) -> tuple[Any, Float[Array, ""]]:
        """Sums about self and Σ w log p(x), by the cheaper form of the emission if it will do."""
        sequences, width = as_sequences(data), self.width(data)

        def total(emission: AbstractEmission) -> Any:
            block = functools.partial(_sums_of_block, replace(self, emission=emission), posterior)
            return sum_over_observations(block, sequences, sample_weight, width=width, key=key)

        return cheapest(self.emission, total, num_observations(sequences), width)

    def num_observed(self, data: PyTree[Array]) -> Int[Array, " b"]:
        """How many steps of each sequence were observed: what BIC counts."""
        return jnp.sum(as_sequences(as_arrays(data)).present, axis=1)

    def serial_steps(self, data: PyTree[Array]) -> int:
        return as_sequences(data).within.shape[1]

    # What the model says of data

    def check(self, data: PyTree[Array]) -> None:
        (leaf,) = jax.tree.leaves(self._initial)
        check_one_model(self, "an initial distribution", leaf)
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
        return self._infer(_best_path, data)

    def sample_paths(self, key: Array, data: PyTree[Array]) -> Int[Array, "b t"]:
        """One draw of the path of each sequence given the sequence.

        What it holds beyond the end of a sequence does not matter. States are −1 where no state
        is possible.
        """
        keys = jax.random.split(key, num_observations(as_arrays(data)))
        return self._infer(_sample_path, data, keys)

    def _infer(self, function: Any, data: PyTree[Array], *extra: Any) -> Any:
        data = as_arrays(data)
        self.check(data)
        return _map_sequences(self, function, as_sequences(data), extra)

    def _emit(self, key: Array, z: Int[Array, "n t"]) -> PyTree[Array]:
        """A draw of the emission at each of these states."""
        x = self.emission.sample(key, z.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(*z.shape, *leaf.shape[1:]), x)

    def degenerate(self, statistics: Framed) -> Bool[Array, " k"]:
        return self.emission.degenerate(statistics.at(self).sums[-1])


# What all constructors and starts do


def checked_emission(emission: Any) -> AbstractEmission:
    if not isinstance(emission, AbstractEmission):
        raise ValueError(f"the emission must be an emission, got {type(emission).__name__}.")
    return emission


def first_state(initial: Any, num_states: int) -> Simplex:
    """The factor of the first state, from its probabilities."""
    initial = as_float(initial)
    check_shape("initial", initial, (num_states,))
    return Simplex(initial, name="initial")


def check_num_states(transition: AbstractTransition, num_states: int) -> None:
    if transition.num_states != num_states:
        raise ValueError(
            f"the transition has {transition.num_states} states, the emission {num_states} "
            "components."
        )


def check_num_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"a sequence has 1 or more steps, got num_steps={num_steps}.")


def seed_of_steps(
    key: Array, data: PyTree[Array], num_states: int, family: Any, sample_weight: Any, method: str
) -> tuple[Any, Float[Array, " k"]]:
    """An emission with a state around each of some steps of the data, and uniform probabilities."""
    sequences = as_sequences(as_arrays(data))
    check_sample_weight(as_arrays(sample_weight), num_observations(sequences))
    present = sequences.present
    counted = present if sample_weight is None else present * jnp.asarray(sample_weight)[:, None]
    plain = sample_weight is None and sequences.lengths is None and sequences.observed is None
    mass = None if plain else counted.reshape(-1).astype(_starts.floating(sequences.values))
    emission = _starts.seed(key, sequences.steps(), num_states, family, mass, method)
    return emission, jnp.full(num_states, 1 / num_states, float_dtype(emission))


def _sums_of_block(
    model: AbstractSequenceModel,
    posterior: AbstractPosterior,
    sequences: Sequences,
    w: Any,
    key: Array | None,
) -> Any:
    keys = None if key is None else jax.random.split(key, num_observations(sequences))
    present, x = usable_steps(model.emission, sequences, w)
    log_b = log_prob_of_steps(model.emission, x, present)
    latents, axes = model.latents(sequences, log_b, w)
    run = jax.vmap(infer, in_axes=(axes, None, None if keys is None else 0))
    likelihood, found = run(latents, posterior, keys)
    scale = jnp.ones(len(log_b), log_b.dtype) if w is None else w.astype(log_b.dtype)
    likelihood = jnp.where((scale != 0) | jnp.isfinite(likelihood), likelihood, 0)
    counts, states = model.expected_counts(sequences, w, scale, found)
    r = states * jnp.where(present, scale[:, None], 0)[:, :, None]
    emitted = emitted_sums(model.emission, x, r.reshape(-1, model.num_states))
    return (*counts, emitted), jnp.sum(scale * likelihood)


@eqx.filter_jit  # an eager call compiles once
def _map_sequences(
    model: AbstractSequenceModel, function: Any, data: Sequences, extra: tuple[Any, ...]
) -> Any:
    """A function of the latent of each sequence, of its steps within and possible, and of more."""

    def block(part: Any) -> Any:
        sequences, rest = part
        present, x = usable_steps(model.emission, sequences, None)
        log_b = log_prob_of_steps(model.emission, x, present)
        latents, axes = model.latents(sequences, log_b, None)
        possible = ~present | model.emission.in_support(x).reshape(present.shape)
        if (inputs := sequences.driving()) is not None:
            possible &= jnp.all(jnp.isfinite(inputs), axis=2)
        run = jax.vmap(function, in_axes=(axes, 0, 0, *(0 for _ in rest)))
        return run(latents, sequences.within, possible, *rest)

    return map_over_observations(block, (data, extra), width=model.width(data))


def _log_likelihood(latent: Any, within: Any, possible: Any) -> Float[Array, ""]:
    return latent.log_likelihood()


def _log_increments(latent: Any, within: Any, possible: Any) -> Float[Array, " t"]:
    return jnp.where(within, latent.log_increments(), 0)


def _filtered(latent: Any, within: Any, possible: Any) -> Float[Array, "t k"]:
    return jnp.where(within[:, None], latent.filtered(), 0)


def _smoothed(latent: Any, within: Any, possible: Any) -> Float[Array, "t k"]:
    return jnp.where(within[:, None], latent.smoothed(), 0)


def _best_path(latent: Any, within: Any, possible: Any) -> tuple[Int[Array, " t"], Array]:
    return latent.best_path()


def _sample_path(latent: Any, within: Any, possible: Any, key: Array) -> Int[Array, " t"]:
    return latent.sample_path(key)


def _first_impossible(latent: Any, within: Any, possible: Any) -> Int[Array, ""]:
    bad = ~possible | (latent.log_increments() == -jnp.inf)
    bad = jnp.where(jnp.arange(len(bad)) == 0, bad | ~within, bad & within)
    return jnp.where(jnp.any(bad), jnp.argmax(bad), -1)
