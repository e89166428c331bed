"""Models of hidden states along sequences: what hidden Markov and semi-Markov models share.

E-step. Each sequence is a latent filled with its log-potentials; its posterior's marginals are
counts for the factors of the states, and P(zₜ | x), along which the emission's log-density is
pulled back, as in a mixture. M-step: that of each factor.
"""

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, Generic

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.blocks import (
    fits_one_block,
    map_over_observations,
    num_observations,
    substitute,
    sum_over_observations,
)
from jaxem._core.checks import check_count, check_sample_weight, checked_key
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import float_dtype, outside_support
from jaxem._core.sequences import Sequences, as_sequences
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, Emission, cheapest, sums_of, width
from jaxem.emissions._pooled import compiled, floating
from jaxem.factors._simplex import Simplex, Stationary
from jaxem.factors._transition import AbstractTransition
from jaxem.latents import AbstractPosterior, AbstractSequenceLatent, infer
from jaxem.models import _starts
from jaxem.models._composite import AbstractComposite, check_one_model


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
    ) -> tuple[AbstractSequenceLatent, AbstractSequenceLatent, Callable[[Any, Array], tuple]]:
        """The latent of each sequence, which axes of its leaves run over sequences, and `counts`.

        `counts(found, scale)` are the sums of all factors but the emission, from the marginals of
        the latents, each times its scale (b,).
        """

    @property
    def num_states(self) -> int:
        return self.emission.num_components

    # E-step

    def expected_sums(self, data, sample_weight, posterior, key):
        sequences = as_sequences(data)
        block = functools.partial(_sums_of_block, self, posterior, sequences.within.size)
        width = self.width(data)
        return sum_over_observations(block, sequences, sample_weight, width=width, key=key)

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
        # by shapes alone: an eager call of `steps` would compile a program
        jax.eval_shape(lambda given: self.emission.check(given.steps()), sequences)
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
        sequences = as_sequences(as_arrays(data))
        self.check(sequences)
        possible = self.emission.in_support(sequences.steps()).reshape(sequences.within.shape)
        # as in an E-step, which shares the work
        increments = _answers(self, "log_increments", sequences, None, {}, False)
        bad = (sequences.present & ~possible) | (increments == -jnp.inf)
        if (inputs := sequences.driving()) is not None:
            bad |= ~jnp.all(jnp.isfinite(inputs), axis=2)
        bad = jnp.where(sequences.within, bad, jnp.arange(bad.shape[1]) == 0)
        found = jnp.where(jnp.any(bad, axis=1), jnp.argmax(bad, axis=1), -1)
        if sequences.lengths is None:
            return found
        steps = sequences.within.shape[1]
        return jnp.where((found < 0) & (sequences.lengths > steps), steps, found)

    def log_prob(self, data: PyTree[Array]) -> Float[Array, " b"]:
        """log p(x) of each sequence: −∞ if it is impossible, NaN where data hold NaN."""
        return self._infer("log_likelihood", data)

    def one_step_log_prob(self, data: PyTree[Array]) -> Float[Array, "b t"]:
        """log p(xₜ | x₁ … xₜ₋₁) of each step; 0 where none was observed."""
        return self._infer("log_increments", data)

    def filtered(self, data: PyTree[Array]) -> Float[Array, "b t k"]:
        """P(zₜ = k | x₁ … xₜ); zeros beyond the end of a sequence."""
        return self._infer("filtered", data)

    def responsibilities(self, data: PyTree[Array]) -> Float[Array, "b t k"]:
        """P(zₜ = k | x), the smoothed probabilities; zeros beyond the end of a sequence."""
        return self._infer("smoothed", data)

    def predict(self, data: PyTree[Array]) -> Int[Array, "b t"]:
        """The most probable state of each step by itself (posterior decoding).

        States are −1 beyond the end of a sequence, and in one that is impossible.
        """
        r = self.responsibilities(data)
        return jnp.where(jnp.any(r > 0, axis=2), jnp.argmax(r, axis=2), -1)

    def viterbi(self, data: PyTree[Array]) -> tuple[Int[Array, "b t"], Float[Array, " b"]]:
        """The most probable path of each sequence, and log p(x, path).

        Beyond the end of a sequence its last state is repeated. States are −1 in a sequence that
        is impossible.
        """
        path, log_prob = self._infer("best_path", data)
        return jnp.where((log_prob > -jnp.inf)[:, None], path, -1), log_prob

    def sample_paths(self, key: Array, data: PyTree[Array]) -> Int[Array, "b t"]:
        """One draw of the path of each sequence given the sequence.

        What it holds beyond the end of a sequence does not matter. States are −1 where no state
        is possible.
        """
        keys = jax.random.split(checked_key(key), num_observations(as_arrays(data)))
        return self._infer("sample_path", data, keys)

    def _infer(
        self, question: str, data: PyTree[Array], keys: Array | None = None, **settings: int
    ) -> Any:
        """What the latent of each sequence answers: its method `question`, given a key or none."""
        data = as_arrays(data)
        self.check(data)
        return _answers(self, question, as_sequences(data), keys, settings, True)

    def _emit(self, key: Array, z: Int[Array, "n t"]) -> PyTree[Array]:
        """A draw of the emission at each of these states."""
        x = self.emission.sample(key, z.reshape(-1))
        return jax.tree.map(lambda leaf: leaf.reshape(*z.shape, *leaf.shape[1:]), x)

    def degenerate(self, statistics: Framed) -> Int[Array, " k"]:
        return self.emission.degenerate(statistics.at(self).sums[-1])


# What all constructors and starts do


def checked_emission(emission: Any) -> AbstractEmission:
    if not isinstance(emission, AbstractEmission):
        raise ValueError(f"the emission must be an emission, got {type(emission).__name__}.")
    return emission


def check_num_states(transition: AbstractTransition, num_states: int) -> None:
    if transition.num_states != num_states:
        raise ValueError(
            f"the transition has {transition.num_states} states, the emission {num_states} "
            "components."
        )


def check_size(n: int, num_steps: int) -> None:
    """Raises unless that many sequences of that many steps can be drawn."""
    check_count("n", n, 0)
    check_count("num_steps", num_steps)


def start_from_steps(
    make: Callable[..., Any],
    key: Array,
    data: PyTree[Array],
    num_states: Any,
    family: Any,
    sample_weight: Any,
    method: str,
    *args: Any,
) -> Any:
    """`make(emission, uniform, sequences, sample_weight, *args)`, by one compiled program.

    The emission has a state around each of some steps of the data; `uniform` (k,) are equal
    probabilities.
    """
    sequences, sample_weight = as_sequences(as_arrays(data)), as_arrays(sample_weight)
    check_sample_weight(sample_weight, num_observations(sequences))
    num_steps = math.prod(jax.tree.leaves(sequences.values)[0].shape[:2])
    seeds = _starts.seeds(key, sequences.values, num_steps, num_states, family, method)
    given = seeds, make, key, sequences, sample_weight, args
    return compiled(_around_steps, family, *given)


def _around_steps(
    seeds: _starts.Seeds,
    make: Callable[..., Any],
    key: Array,
    sequences: Sequences,
    sample_weight: Any,
    args: tuple[Any, ...],
) -> tuple[Any, Array]:
    present = sequences.present
    counted = present if sample_weight is None else present * sample_weight[:, None]
    plain = sample_weight is None and sequences.lengths is None and sequences.observed is None
    mass = None if plain else counted.reshape(-1).astype(floating(sequences.values))
    emission, possible = seeds(key, sequences.steps(), mass)
    k = emission.num_components
    uniform = jnp.full(k, 1 / k, float_dtype(emission))
    return make(emission, uniform, sequences, sample_weight, *args), possible


def _sums_of_block(
    model: AbstractSequenceModel,
    posterior: AbstractPosterior,
    num_steps: int,
    sequences: Sequences,
    w: Any,
    key: Array | None,
) -> Any:
    keys = None if key is None else jax.random.split(key, num_observations(sequences))
    present, x = usable_steps(model.emission, sequences, w)
    log_b, emitted = _emitted(model.emission, x, num_steps)
    latents, axes, counts = model.latents(sequences, _of_steps(log_b, present), w)
    run = jax.vmap(infer, in_axes=(axes, None, None if keys is None else 0))
    likelihood, found = run(latents, posterior, keys)
    scale = jnp.ones(len(present), log_b.dtype) if w is None else w.astype(log_b.dtype)
    likelihood = jnp.where((scale != 0) | jnp.isfinite(likelihood), likelihood, 0)
    r = found.smoothed * jnp.where(present, scale[:, None], 0)[:, :, None]
    sums = *counts(found, scale), emitted(r.reshape(log_b.shape))
    return sums, jnp.sum(scale * likelihood)


@eqx.filter_jit  # an eager call compiles once
def _answers(
    model: AbstractSequenceModel,
    question: str,
    data: Sequences,
    keys: Array | None,
    settings: dict[str, int],
    judged: bool,
) -> Any:
    def answer(latent: Any, key: Array | None) -> Any:
        method = getattr(latent, question)
        return method(**settings) if key is None else method(key, **settings)

    def block(part: Any) -> Any:
        sequences, keys = part
        log_b = log_prob_of_steps(model.emission, sequences, data.within.size, judged)
        latents, axes, _ = model.latents(sequences, log_b, None)
        return jax.vmap(answer, in_axes=(axes, None if keys is None else 0))(latents, keys)

    return map_over_observations(block, (data, keys), width=model.width(data))


def usable_steps(
    emission: AbstractEmission, sequences: Sequences, w: Any
) -> tuple[Bool[Array, "b t"], PyTree[Array]]:
    """Which steps count, and the steps in one row, with others in place of those that do not.

    A sequence of weight 0 still counts where it is possible: its weight has a derivative.
    """
    present, x = sequences.present, sequences.steps()
    if w is not None:
        possible = emission.in_support(x).reshape(present.shape)
        present = present & ((w != 0)[:, None] | possible)
    return present, substitute(x, present.reshape(-1))


def log_prob_of_steps(
    emission: AbstractEmission, sequences: Sequences, num_steps: int, judged: bool = True
) -> Float[Array, "b t k"]:
    """log p(xₜ | zₜ = k), 0 where none was observed; of `num_steps` in all blocks of sequences.

    Where it is `judged`, −∞ outside the support.
    """
    if not judged:
        present, x = usable_steps(emission, sequences, None)
        return _of_steps(_log_prob(emission, x, num_steps), present)
    present, x = sequences.present, sequences.steps()
    possible = emission.in_support(x)
    log_prob = _log_prob(emission, substitute(x, present.reshape(-1) & possible), num_steps)
    outside = outside_support(x, log_prob)
    return _of_steps(jnp.where(possible[:, None], log_prob, outside[:, None]), present)


def _of_steps(log_prob: Float[Array, "n k"], present: Bool[Array, "b t"]) -> Float[Array, "b t k"]:
    return jnp.where(present[:, :, None], log_prob.reshape(*present.shape, -1), 0)


def _log_prob(emission: AbstractEmission, x: PyTree[Array], num_steps: int) -> Float[Array, "n k"]:
    """log p(x | z = k), by the cheaper form of the emission where `num_steps` are worth it."""
    size = width(emission, x)

    def total(emission: AbstractEmission) -> Float[Array, "n k"]:
        at = emission.tilt()
        return map_over_observations(lambda part: emission.log_prob(part, at), x, width=size)

    return cheapest(emission, total, num_steps, size)


def _emitted(
    emission: AbstractEmission, x: PyTree[Array], num_steps: int
) -> tuple[Float[Array, "n k"], Callable[[Float[Array, "n k"]], PyTree[Array]]]:
    """log p(x | z = k), and the emission's sums as a function of responsibilities."""
    size = width(emission, x)
    if fits_one_block(num_steps, size):  # what one evaluation keeps for its derivative is small
        log_prob, pullback = jax.vjp(lambda tilt: emission.log_prob(x, tilt), emission.tilt())
        return log_prob, lambda r: pullback(r)[0]

    def sums(r: Float[Array, "n k"]) -> PyTree[Array]:
        return cheapest(emission, lambda form: sums_of(form, x, r), num_steps, size)

    return _log_prob(emission, x, num_steps), sums
