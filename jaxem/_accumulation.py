"""The accumulation slot: which units a step looks at, and how their statistics join the others.

Statistics know the model that they were taken about (`Framed`), so that sums remembered from
earlier models combine with new ones exactly, and in float32 too.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._checks import check_count
from jaxem._schedules import AbstractSchedule, Power
from jaxem._statistics import Framed
from jaxem._units import num_units, total_weight

Evaluate = Callable[[PyTree[Array], Any, Any], tuple[Framed, Float[Array, ""]]]


class AbstractAccumulation(eqx.Module):
    """How new statistics combine with remembered ones, and which units a step looks at.

    `ascends` says whether an exact step's objective never falls; `exact` whether statistics
    and objective after a step are those of all the data at the model after the step; `period`
    how many steps look at all the data.
    """

    ascends: eqx.AbstractVar[bool]
    exact: eqx.AbstractVar[bool]
    period: eqx.AbstractVar[int]

    @abc.abstractmethod
    def init(
        self, model: Any, evaluate: Evaluate, data: PyTree[Array], weights: Any, key: Any
    ) -> tuple[PyTree[Array], Framed, Float[Array, ""]]:
        """Memory, statistics and objective before the first step.

        `evaluate(data, weights, key)` gives statistics and objective about the start, `model`.
        """

    @abc.abstractmethod
    def select(
        self, memory: PyTree[Array], data: PyTree[Array], weights: Any, step: Array, key: Any
    ) -> tuple[PyTree[Array], Any, Any]:
        """The units of this step, their weights, and how many times as much they stand for."""

    @abc.abstractmethod
    def __call__(
        self, memory: PyTree[Array], new: Framed, objective: Float[Array, ""], step: Array
    ) -> tuple[PyTree[Array], Framed, Float[Array, ""]]:
        """Memory, statistics (framed at the newest model) and objective after this step."""

    @abc.abstractmethod
    def settles(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether `period` steps that hardly move can mean that the fit has converged."""

    def last(self, memory: PyTree[Array], step: Array) -> tuple[Framed, Bool[Array, ""]] | None:
        """Statistics for an M-step that ends the fit, and whether there are such by this step.

        None: it ends where its last step led.
        """
        return None


class Full(AbstractAccumulation):
    """All the data in every step; nothing is remembered."""

    ascends: ClassVar[bool] = True
    exact: ClassVar[bool] = True
    period: ClassVar[int] = 1

    def init(self, model, evaluate, data, weights, key):
        return None, *evaluate(data, weights, key)

    def select(self, memory, data, weights, step, key):
        return data, weights, 1

    def __call__(self, memory, new, objective, step):
        return memory, new, objective

    def settles(self, step):
        return True


class Running(AbstractAccumulation):
    """Online EM: s ← (1 − γₜ) s + γₜ ŝ, over the batches of a stream, or over all the data.

    ŝ are the statistics of a batch, weighted as if it were the whole population; with a sampled
    expectation this is stochastic approximation EM. A fit ends after `max_steps` steps, with one
    exact pass for its objective; its history holds running averages.

    **Arguments:** `rate`, a schedule whose γₜ obey Robbins & Monro; `population`, the total weight
    that each batch stands for, default: its own (right for batches of one size); `average_from`,
    a step: the fit ends with an M-step at the mean of s from there on (Polyak averaging), which
    is worth most where the rate falls slowly.

    **Raises:** `ValueError` for other rates, a population that is not positive, or a step below 1.

    Cappé & Moulines (2009), JRSS B 71; Delyon, Lavielle & Moulines (1999), Ann. Stat. 27;
    Polyak & Juditsky (1992), SIAM J. Control Optim. 30.
    """

    ascends: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    period: ClassVar[int] = 1
    rate: AbstractSchedule = Power(0.6)
    population: float | None = eqx.field(static=True, default=None)
    average_from: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _check_online(self.rate, self.average_from)
        if self.population is not None and not self.population > 0:
            raise ValueError(f"the population has a positive weight, got {self.population!r}.")

    def init(self, model, evaluate, data, weights, key):
        _, _, times = self.select(None, data, weights, jnp.zeros((), jnp.int32), None)
        return _remembered(*scaled(times, *evaluate(data, weights, key)), self.average_from)

    def select(self, memory, data, weights, step, key):
        if self.population is None:
            return data, weights, 1
        return data, weights, self.population / total_weight(data, weights)

    def __call__(self, memory, new, objective, step):
        return _averaged(memory, new, objective, step, self.rate(step), self.average_from)

    def settles(self, step):
        return False

    def last(self, memory, step):
        return None if self.average_from is None else (memory[2], step >= self.average_from)


class Minibatch(AbstractAccumulation):
    """Online EM on batches drawn at random from data in memory.

    As `Running`, each batch standing for all the data. It holds one unit of each of `size`
    stretches of neighbours, so that data in any order, sorted too, are well represented. Needs
    the `key` of `fit`.

    **Arguments:** `size`, units in a batch; `rate`, a schedule whose γₜ obey Robbins & Monro;
    `average_from`, as in `Running`.

    **Raises:** `ValueError` for other rates, or a size below 1 or above the number of units.

    Cappé & Moulines (2009), JRSS B 71; on stratified draws, Cochran (1977), *Sampling
    Techniques*, 5.
    """

    ascends: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    period: ClassVar[int] = 1
    size: int = eqx.field(static=True)
    rate: AbstractSchedule = Power(0.6)
    average_from: int | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _check_online(self.rate, self.average_from)
        check_count("size", self.size)

    def init(self, model, evaluate, data, weights, key):
        select_key, key = (None, None) if key is None else jax.random.split(key)
        start = jnp.zeros((), jnp.int32)
        data, weights, times = self.select(None, data, weights, start, select_key)
        return _remembered(*scaled(times, *evaluate(data, weights, key)), self.average_from)

    def select(self, memory, data, weights, step, key):
        if key is None:
            raise ValueError("Minibatch draws units at random: give fit (or init and step) a key.")
        n, size = num_units(data), self.size
        if size > n:
            raise ValueError(f"a batch of {size} units cannot be drawn from {n}.")
        # A unit of each stretch. They begin at a random unit, so that all units are as probable,
        # and follow one another, so that memory is read in its order.
        begin_key, within_key = jax.random.split(key)
        begin, length = _stretch(jnp.arange(size), n, size)
        bits = jax.random.bits(within_key, (size,))
        chosen = begin + (bits % length.astype(bits.dtype)).astype(int)
        chosen += jax.random.randint(begin_key, (), 0, n)
        chosen = jnp.where(chosen < n, chosen, chosen - n)
        take = lambda leaf: leaf.at[chosen].get(mode="promise_in_bounds")  # noqa: E731
        return jax.tree.map(take, data), None if weights is None else take(weights), n / size

    def __call__(self, memory, new, objective, step):
        return _averaged(memory, new, objective, step, self.rate(step), self.average_from)

    def settles(self, step):
        return False

    def last(self, memory, step):
        return None if self.average_from is None else (memory[2], step >= self.average_from)


class Incremental(AbstractAccumulation):
    """Each step renews the statistics of one block of units and keeps those of the others.

    One step costs a share of 1 / `num_blocks` of a full E-step, and the M-step uses it at once.
    What is remembered of the other blocks is rewritten about each new model and summed afresh,
    so that nothing drifts. A fit converges where a whole pass hardly moves.

    **Arguments:** `num_blocks`, in the order of the data.

    **Raises:** `ValueError` for fewer than one block, or more blocks than units.

    Neal & Hinton (1998), in *Learning in Graphical Models*.
    """

    ascends: ClassVar[bool] = False  # the sum of remembered log-likelihoods may fall
    exact: ClassVar[bool] = False
    num_blocks: int = eqx.field(static=True)

    def __check_init__(self):
        check_count("num_blocks", self.num_blocks)

    @property
    def period(self) -> int:
        return self.num_blocks

    def init(self, model, evaluate, data, weights, key):
        def block(index: Array) -> tuple[PyTree[Array], Array]:
            part, w = self._block(data, weights, index)
            own = None if key is None else jax.random.fold_in(key, index)
            new, objective = evaluate(part, w, own)
            return new.sums, objective

        # without the barrier jax 0.10 cannot transpose the map inside an unrolled loop
        sums, objectives = lax.optimization_barrier(lax.map(block, jnp.arange(self.num_blocks)))
        return self._total(Framed(sums, model), objectives)

    def _block(self, data: PyTree[Array], weights: Any, index: Any) -> tuple[PyTree[Array], Any]:
        n = num_units(data)
        if self.num_blocks > n:
            raise ValueError(f"{n} units cannot make {self.num_blocks} blocks.")
        begin, length = _stretch(index, n, self.num_blocks)
        size = -(-n // self.num_blocks)
        start = jnp.minimum(begin, n - size)
        cut = lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size)  # noqa: E731
        part = jax.tree.map(cut, data)
        if n % self.num_blocks == 0:
            return part, None if weights is None else cut(weights)
        w = jnp.ones(size) if weights is None else cut(weights)
        at = start + jnp.arange(size)
        return part, jnp.where((at >= begin) & (at < begin + length), w, 0)

    def select(self, memory, data, weights, step, key):
        return *self._block(data, weights, step % self.num_blocks), 1

    def __call__(self, memory, new, objective, step):
        old, objectives = memory
        at = step % self.num_blocks
        sums = jax.vmap(lambda sums: new.frame.reframe(sums, old.frame))(old.sums)
        sums = jax.tree.map(lambda all_, one: all_.at[at].set(one), sums, new.sums)
        return self._total(Framed(sums, new.frame), objectives.at[at].set(objective))

    def _total(self, blocks: Framed, objectives: Array) -> Any:
        total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), blocks.sums)
        return (blocks, objectives), Framed(total, blocks.frame), jnp.sum(objectives)

    def settles(self, step):
        return True


def _stretch(index: Array, n: int, count: int) -> tuple[Array, Array]:
    """Where the index-th of `count` stretches of n units begins, and how long it is.

    They are as equal as can be: the first ones have a unit more.
    """
    shortest, longer = divmod(n, count)
    return index * shortest + jnp.minimum(index, longer), shortest + (index < longer)


def _check_online(rate: Any, average_from: Any) -> None:
    if not (isinstance(rate, Power) and 0.5 < rate.exponent <= 1):
        raise ValueError(
            f"learning rates must obey Robbins and Monro, Σ γ = ∞ and Σ γ² < ∞, or the average "
            f"never comes to rest; take Power(exponent) with ½ < exponent ≤ 1, got {rate!r}."
        )
    if average_from is not None:
        check_count("average_from, a step,", average_from)


def scaled(times: Any, new: Framed, objective: Array) -> tuple[Framed, Array]:
    """Statistics and objective of units that stand for so many times as much."""
    times = jnp.asarray(times, objective.dtype)
    return times * new, times * objective


def _remembered(new: Framed, objective: Array, average_from: int | None) -> Any:
    return (new, objective, None if average_from is None else new), new, objective


def _averaged(
    memory: Any, new: Framed, objective: Array, step: Array, rate: Array, average_from: int | None
) -> Any:
    old, old_objective, mean = memory
    rate = rate.astype(objective.dtype)
    running = rate * new + (1 - rate) * old
    objective = rate * objective + (1 - rate) * old_objective
    if average_from is not None:
        share = 1 / jnp.maximum(step - average_from + 1, 1).astype(objective.dtype)
        mean = share * running + (1 - share) * mean
    return (running, objective, mean), running, objective
