"""The accumulation slot: which observations a step sees, and how their statistics join the others.

Statistics hold the model that they were taken about (`Framed`), so that sums remembered from
earlier models combine with new ones exactly, and in float32 too.
"""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.checks import check_count, check_nonnegative, check_values
from jaxem._core.parameters import replace
from jaxem._core.schedules import AbstractSchedule, Power
from jaxem._core.statistics import Framed
from jaxem.em._problem import Problem
from jaxem.em._traits import AbstractSlot, Traits
from jaxem.models._base import AbstractModel


class Batch(NamedTuple):
    """The observations of one step.

    - `problem`: these observations and their weights.
    - `times`: how many times as much they stand for; None: once.
    - `rows`: which observations of all they are; None: all, in their order.
    """

    problem: Problem
    times: Any = None
    rows: Int[Array, " m"] | None = None

    def scaled(self, new: Framed, objective: Array) -> tuple[Framed, Array]:
        """Statistics and objective of the batch as those of what it stands for."""
        if self.times is None:
            return new, objective
        times = jnp.asarray(self.times, objective.dtype)
        return times * new, times * objective


Evaluate = Callable[[Batch, PyTree[Array], Any], tuple[Framed, Float[Array, ""], PyTree[Array]]]


class AbstractAccumulation(AbstractSlot):
    """Which observations a step sees, and how new statistics combine with remembered ones."""

    @abc.abstractmethod
    def init(
        self,
        model: AbstractModel,
        evaluate: Evaluate,
        problem: Problem,
        rows: PyTree[Array],
        key: Array | None,
    ) -> tuple[PyTree[Array], Framed, Float[Array, ""], PyTree[Array]]:
        """Memory, statistics, objective and the expectation's rows before the first step.

        `evaluate(batch, rows, key)` gives statistics and objective about the start, `model`, and
        the rows that the expectation remembers after it.
        """

    @abc.abstractmethod
    def select(
        self, memory: PyTree[Array], problem: Problem, step: Int[Array, ""], key: Array | None
    ) -> Batch:
        """The observations of this step."""

    @abc.abstractmethod
    def __call__(
        self, memory: PyTree[Array], new: Framed, objective: Float[Array, ""], step: Array
    ) -> tuple[PyTree[Array], Framed, Float[Array, ""]]:
        """Memory, statistics (framed at the newest model) and objective after this step."""

    @abc.abstractmethod
    def averaged(self, memory: PyTree[Array], step: Array) -> tuple[Framed, Bool[Array, ""]] | None:
        """Statistics for an M-step that ends the fit, and whether there are such by this step.

        None: the fit ends at the model of its last step.
        """


class Full(AbstractAccumulation):
    """All the data in every step; nothing is remembered."""

    @property
    def traits(self) -> Traits:
        return Traits()

    def init(self, model, evaluate, problem, rows, key):
        return None, *evaluate(Batch(problem), rows, key)

    def select(self, memory, problem, step, key):
        return Batch(problem)

    def __call__(self, memory, new, objective, step):
        return memory, new, objective

    def conclusive(self, memory, step):
        return True

    def averaged(self, memory, step):
        return None


class Online(AbstractAccumulation):
    """Online EM: s ← (1 − γₜ) s + γₜ ŝ, with ŝ the statistics of a batch.

    A batch is scaled to the whole population. Without `batch_size` the data of each step are the
    batch: those of a stream, or all; with a sampled expectation this is stochastic approximation
    EM. With `batch_size` each step draws a batch from data in memory: one observation of each of
    `batch_size` stretches of neighbours, so that data in any order, sorted too, are well
    represented. A fit takes `max_steps` steps and ends with a full E-step; its history holds
    running averages.

    **Arguments:**

    - `rate`: a schedule whose γₜ obey Robbins & Monro.
    - `batch_size`: observations drawn at each step, with the `key` of `fit`; default: all given.
    - `population`: the total weight that the given data stand for; default: their own, which is
      right for batches of one size.
    - `average_from`: a step: the fit ends with an M-step at the mean of s from there on (Polyak
      averaging), which is worth most where the rate falls slowly.

    **Raises:** `ValueError` for other rates, a population that is not positive, a size or a step
    below 1, or more observations in a batch than there are.

    Cappé & Moulines (2009), JRSS B 71; Delyon, Lavielle & Moulines (1999), Ann. Stat. 27;
    Polyak & Juditsky (1992), SIAM J. Control Optim. 30; on stratified draws, Cochran (1977),
    *Sampling Techniques*, 5.
    """

    rate: AbstractSchedule = Power(0.6)
    batch_size: int | None = eqx.field(static=True, default=None)
    population: float | None = eqx.field(static=True, default=None)
    average_from: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        rate = self.rate
        if not (isinstance(rate, Power) and 0.5 < rate.exponent <= 1):
            raise ValueError(
                "learning rates must obey Robbins and Monro, Σ γ = ∞ and Σ γ² < ∞, or the average "
                f"does not converge; take Power(exponent) with ½ < exponent ≤ 1, got {rate!r}."
            )
        if self.batch_size is not None:
            check_count("batch_size", self.batch_size)
        if self.population is not None:
            check_nonnegative("population", self.population)
            check_values(jnp.asarray(self.population) > 0, "population must be positive.")
        if self.average_from is not None:
            check_count("average_from, a step,", self.average_from)

    @property
    def traits(self) -> Traits:
        return Traits(monotone=False, full_data=False, stationary=False)

    def init(self, model, evaluate, problem, rows, key):
        select_key = None
        if self.batch_size is not None and key is not None:
            select_key, key = jax.random.split(key)
        batch = self.select(None, problem, jnp.zeros((), jnp.int32), select_key)
        new, objective, rows = evaluate(batch, rows, key)
        mean = None if self.average_from is None else new
        return (new, objective, mean), new, objective, rows

    def select(self, memory, problem, step, key):
        if self.batch_size is None:
            if self.population is None:
                return Batch(problem)
            return Batch(problem, self._times(problem))
        if key is None:
            raise ValueError(
                "Online(batch_size=…) draws observations at random: give fit (or init and step) a "
                "key."
            )
        n, size = problem.num_observations, self.batch_size
        if size > n:
            raise ValueError(f"batch_size={size} exceeds the number of observations, {n}.")
        rows = _stratified(key, n, size)

        def take(leaf: Array) -> Array:
            return leaf.at[rows].get(mode="promise_in_bounds")

        data, weight = jax.tree.map(take, (problem.data, problem.sample_weight))
        times = n / size * (1 if self.population is None else self._times(problem))
        return Batch(replace(problem, data=data, sample_weight=weight), times, rows)

    def _times(self, problem: Problem) -> Any:
        """How often the data given go into the population; 1 where they have no weight."""
        total, population = problem.total_weight, self.population
        assert population is not None
        return population / jnp.where(total > 0, total, population)

    def __call__(self, memory, new, objective, step):
        old, old_objective, mean = memory
        seen = jnp.stack([jnp.any(leaf != 0) for leaf in jax.tree.leaves(new.sums)]).any()
        # A batch without weight says nothing
        rate = jnp.where(seen, self.rate(step), 0).astype(objective.dtype)
        running = rate * new + (1 - rate) * old
        objective = rate * objective + (1 - rate) * old_objective
        if self.average_from is not None:
            share = 1 / jnp.maximum(step - self.average_from + 1, 1).astype(objective.dtype)
            mean = share * running + (1 - share) * mean
        return (running, objective, mean), running, objective

    def conclusive(self, memory, step):
        return False

    def averaged(self, memory, step):
        return None if self.average_from is None else (memory[2], step >= self.average_from)


class Incremental(AbstractAccumulation):
    """Each step renews the statistics of one block of observations and keeps those of the others.

    One step costs a share of 1 / `num_blocks` of a full E-step, and the M-step uses it at once.
    What is remembered of the other blocks is rewritten about each new model and summed afresh,
    so that no rounding accumulates. A fit converges where a whole pass hardly moves.

    **Arguments:** `num_blocks`, in the order of the data.

    **Raises:** `ValueError` for fewer than one block, or more blocks than observations.

    Neal & Hinton (1998), in *Learning in Graphical Models*.
    """

    num_blocks: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_blocks", self.num_blocks)

    @property
    def traits(self) -> Traits:
        # not monotone: the sum of remembered log-likelihoods can fall
        return Traits(monotone=False, full_data=False, period=self.num_blocks)

    def init(self, model, evaluate, problem, rows, key):
        def block(rows: PyTree[Array], index: Array) -> Any:
            own = None if key is None else jax.random.fold_in(key, index)
            new, objective, rows = evaluate(self._block(problem, index), rows, own)
            return rows, (new.sums, objective)

        # without the barrier jax 0.10 cannot transpose the scan inside an unrolled loop
        rows, (sums, objectives) = lax.optimization_barrier(
            lax.scan(block, rows, jnp.arange(self.num_blocks))
        )
        return *self._total(Framed(sums, model), objectives), rows

    def _block(self, problem: Problem, index: Any) -> Batch:
        n = problem.num_observations
        if self.num_blocks > n:
            raise ValueError(
                f"num_blocks={self.num_blocks} exceeds the number of observations, {n}."
            )
        begin, length = _stretch(index, n, self.num_blocks)
        size = -(-n // self.num_blocks)
        start = jnp.minimum(begin, n - size)

        def cut(leaf: Array) -> Array:
            return lax.dynamic_slice_in_dim(leaf, start, size)

        data, weight = jax.tree.map(cut, (problem.data, problem.sample_weight))
        rows = start + jnp.arange(size)
        if n % self.num_blocks:
            own = (rows >= begin) & (rows < begin + length)
            weight = jnp.where(own, jnp.ones(size) if weight is None else weight, 0)
        return Batch(replace(problem, data=data, sample_weight=weight), None, rows)

    def select(self, memory, problem, step, key):
        return self._block(problem, step % self.num_blocks)

    def __call__(self, memory, new, objective, step):
        old, objectives = memory
        at = step % self.num_blocks
        sums = jax.vmap(lambda sums: new.frame.reframe(sums, old.frame))(old.sums)
        sums = jax.tree.map(lambda all_, one: all_.at[at].set(one), sums, new.sums)
        return self._total(Framed(sums, new.frame), objectives.at[at].set(objective))

    def _total(self, blocks: Framed, objectives: Array) -> Any:
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), blocks.sums)
        return (blocks, objectives), Framed(total, blocks.frame), jnp.sum(objectives)

    def conclusive(self, memory, step):
        return True

    def averaged(self, memory, step):
        return None


def _stretch(index: Array, n: int, count: int) -> tuple[Array, Array]:
    """Where the index-th of `count` stretches of n observations begins, and how long it is.

    They are as equal as can be: the first ones have an observation more.
    """
    shortest, longer = divmod(n, count)
    return index * shortest + jnp.minimum(index, longer), shortest + (index < longer)


def _stratified(key: Array, n: int, size: int) -> Int[Array, " m"]:
    """One observation of each of `size` stretches of n.

    The stretches begin at a random observation, so that all observations are as probable, and
    follow one another, so that memory is read in its order.
    """
    begin_key, within_key = jax.random.split(key)
    begin, length = _stretch(jnp.arange(size), n, size)
    bits = jax.random.bits(within_key, (size,))
    chosen = begin + (bits % length.astype(bits.dtype)).astype(int)
    chosen += jax.random.randint(begin_key, (), 0, n)
    return jnp.where(chosen < n, chosen, chosen - n)
