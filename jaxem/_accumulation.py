"""The accumulation slot: which units a step looks at, and how their statistics join the others.

Statistics know the model that they were taken about (`Framed`), so that sums remembered from
earlier models combine with new ones exactly, and in float32 too.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._schedules import AbstractSchedule, Power
from jaxem._statistics import Framed
from jaxem._units import num_units, total_weight

Evaluate = Callable[[PyTree[Array], Any, Any], tuple[Framed, Float[Array, ""]]]


class AbstractAccumulation(eqx.Module):
    """How new statistics combine with remembered ones, and which units a step looks at.

    `ascends` says whether an exact step's objective never falls; `exact` whether statistics
    and objective after a step are those of all the data at the model after the step.
    """

    ascends: eqx.AbstractVar[bool]
    exact: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def init(
        self, evaluate: Evaluate, data: PyTree[Array], weights: Any, key: Any
    ) -> tuple[PyTree[Array], Framed, Float[Array, ""]]:
        """Memory, statistics and objective before the first step.

        `evaluate(data, weights, key)` gives statistics and objective about the start.
        """

    @abc.abstractmethod
    def select(
        self, memory: PyTree[Array], data: PyTree[Array], weights: Any, step: Array, key: Any
    ) -> tuple[PyTree[Array], Any]:
        """The units and unit weights of this step."""

    @abc.abstractmethod
    def __call__(
        self, memory: PyTree[Array], new: Framed, objective: Float[Array, ""], step: Array
    ) -> tuple[PyTree[Array], Framed, Float[Array, ""]]:
        """Memory, statistics (framed at the newest model) and objective after this step."""

    @abc.abstractmethod
    def settles(self, step: Int[Array, ""]) -> Bool[Array, ""] | bool:
        """Whether a step that hardly moves can mean that the fit has converged."""


class Full(AbstractAccumulation):
    """All the data in every step; nothing is remembered."""

    ascends: ClassVar[bool] = True
    exact: ClassVar[bool] = True

    def init(self, evaluate, data, weights, key):
        return None, *evaluate(data, weights, key)

    def select(self, memory, data, weights, step, key):
        return data, weights

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
    that each batch stands for, default: its own (right for batches of one size).

    **Raises:** `ValueError` for other rates.

    Cappé & Moulines (2009), JRSS B 71; Delyon, Lavielle & Moulines (1999), Ann. Stat. 27.
    """

    ascends: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    rate: AbstractSchedule = Power(0.6)
    population: float | None = eqx.field(static=True, default=None)

    def __check_init__(self):
        _check_rate(self.rate)

    def init(self, evaluate, data, weights, key):
        data, weights = self.select(None, data, weights, jnp.zeros((), jnp.int32), None)
        return _remembered(*evaluate(data, weights, key))

    def select(self, memory, data, weights, step, key):
        if self.population is None:
            return data, weights
        share = self.population / total_weight(data, weights)
        ones = jnp.ones(num_units(data)) if weights is None else weights
        return data, share * ones

    def __call__(self, memory, new, objective, step):
        return _averaged(memory, new, objective, self.rate(step))

    def settles(self, step):
        return False


class Minibatch(AbstractAccumulation):
    """Online EM on batches drawn at random, with replacement, from data in memory.

    As `Running`, each batch standing for all the data. Needs the `key` of `fit`.

    **Arguments:** `size`, units in a batch; `rate`, a schedule whose γₜ obey Robbins & Monro.

    **Raises:** `ValueError` for other rates, or a size below 1.

    Cappé & Moulines (2009), JRSS B 71.
    """

    ascends: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    size: int = eqx.field(static=True)
    rate: AbstractSchedule = Power(0.6)

    def __check_init__(self):
        _check_rate(self.rate)
        if isinstance(self.size, bool) or not isinstance(self.size, int) or self.size < 1:
            raise ValueError(f"a batch needs one unit or more, got size={self.size!r}.")

    def init(self, evaluate, data, weights, key):
        select_key, key = (None, None) if key is None else jax.random.split(key)
        start = jnp.zeros((), jnp.int32)
        return _remembered(*evaluate(*self.select(None, data, weights, start, select_key), key))

    def select(self, memory, data, weights, step, key):
        if key is None:
            raise ValueError("Minibatch draws units at random: give fit (or init and step) a key.")
        n = num_units(data)
        chosen = jax.random.randint(key, (self.size,), 0, n)
        take = lambda leaf: jnp.take(leaf, chosen, axis=0)  # noqa: E731
        ones = jnp.ones(self.size) if weights is None else take(weights)
        return jax.tree.map(take, data), (n / self.size) * ones

    def __call__(self, memory, new, objective, step):
        return _averaged(memory, new, objective, self.rate(step))

    def settles(self, step):
        return False


class Incremental(AbstractAccumulation):
    """Each step renews the statistics of one block of units and keeps those of the others.

    One step costs a share of 1 / `num_blocks` of a full E-step, and the M-step uses it at once.
    What is remembered of the other blocks is rewritten about each new model and summed afresh,
    so that nothing drifts.

    **Arguments:** `num_blocks`, in the order of the data.

    **Raises:** `ValueError` for fewer than one block, or more blocks than units.

    Neal & Hinton (1998), in *Learning in Graphical Models*.
    """

    ascends: ClassVar[bool] = False  # the sum of remembered log-likelihoods may fall
    exact: ClassVar[bool] = False
    num_blocks: int = eqx.field(static=True)

    def __check_init__(self):
        blocks = self.num_blocks
        if isinstance(blocks, bool) or not isinstance(blocks, int) or blocks < 1:
            raise ValueError(f"Incremental needs one block or more, got {blocks!r}.")

    def init(self, evaluate, data, weights, key):
        def block(index: Array) -> tuple[Framed, Array]:
            part, w = self._block(data, weights, index)
            return evaluate(part, w, None if key is None else jax.random.fold_in(key, index))

        blocks, objectives = lax.map(block, jnp.arange(self.num_blocks))
        frame = jax.tree.map(lambda leaf: leaf[0], blocks.frame)
        return self._total(Framed(blocks.sums, frame), objectives)

    def _block(self, data: PyTree[Array], weights: Any, index: Any) -> tuple[PyTree[Array], Any]:
        n = num_units(data)
        if self.num_blocks > n:
            raise ValueError(f"{n} units cannot make {self.num_blocks} blocks.")
        size = -(-n // self.num_blocks)
        start = jnp.minimum(index * size, n - size)
        cut = lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size)  # noqa: E731
        part = jax.tree.map(cut, data)
        if n % self.num_blocks == 0:
            return part, None if weights is None else cut(weights)
        w = jnp.ones(size) if weights is None else cut(weights)
        return part, jnp.where(start + jnp.arange(size) >= index * size, w, 0)

    def select(self, memory, data, weights, step, key):
        return self._block(data, weights, step % self.num_blocks)

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
        return step >= self.num_blocks


def _check_rate(rate: Any) -> None:
    if not (isinstance(rate, Power) and 0.5 < rate.exponent <= 1):
        raise ValueError(
            f"learning rates must obey Robbins and Monro, Σ γ = ∞ and Σ γ² < ∞, or the average "
            f"never comes to rest; take Power(exponent) with ½ < exponent ≤ 1, got {rate!r}."
        )


def _remembered(new: Framed, objective: Array) -> Any:
    return (new, objective), new, objective


def _averaged(memory: Any, new: Framed, objective: Array, rate: Array) -> Any:
    old, old_objective = memory
    rate = rate.astype(objective.dtype)
    average = rate * new + (1 - rate) * old
    return _remembered(average, rate * objective + (1 - rate) * old_objective)
