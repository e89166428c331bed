"""Many starts: fitted in batches that fit in memory, short runs first if wanted."""

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from jaxem._core.blocks import lanes_at_once
from jaxem._core.checks import check_count, checked_key, name_of
from jaxem._core.compilation import filter_jit
from jaxem._core.conversion import as_arrays
from jaxem._core.statistics import Framed
from jaxem.em._algorithm import AbstractAlgorithm
from jaxem.em._em import EM
from jaxem.em._fit import fit
from jaxem.em._problem import Problem
from jaxem.em._solution import Solution, best, lane_order
from jaxem.models._alone import as_model


def fit_best(
    init: Callable[..., Any],
    key: Array,
    data: PyTree[Array],
    *args: Any,
    num_starts: int = 10,
    algorithm: AbstractAlgorithm = EM(),
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    short_steps: int | None = None,
    num_polished: int = 5,
    tol: float | None = None,
    max_steps: int = 1000,
    **options: Any,
) -> Solution:
    """The best of many fits, each from a random start of its own.

        best = jaxem.fit_best(jaxem.Mixture.init, key, x, 3, Gaussian, num_starts=100)

    **Arguments:**

    - `init(key, data, *args, **options)` makes one start, as `Mixture.init`, `HMM.init`,
      `HSMM.init`, `MixtureOfExperts.init` or a function of one's own does. It is vmapped over
      keys. Where `sample_weight` is given it receives that too.
    - `key`: of the starts, and of algorithms that draw random numbers.
    - `num_starts`: how many.
    - `algorithm`, `sample_weight`, `prior`, `tol` and `max_steps` as for `fit`.
    - `short_steps` and `num_polished` as for `fit_restarts`.

    **Returns:** the solution that `best` picks; its `runs` says how each fit ended.

    **Raises:** `ValueError` as `init` and `fit` do.
    """
    if isinstance(init, type) or not callable(init):
        raise ValueError(
            "fit_best takes a function that makes a start from a key and data, such as "
            f"jaxem.Mixture.init; got {name_of(init)}."
        )
    check_count("num_starts", num_starts)
    data, sample_weight = as_arrays(data), as_arrays(sample_weight)
    if sample_weight is not None:
        options["sample_weight"] = sample_weight
    start_key, fit_key = jax.random.split(checked_key(key))
    keys = jax.random.split(start_key, num_starts)
    solutions = fit_restarts(
        jax.vmap(lambda own: init(own, data, *args, **options))(keys),
        data,
        algorithm,
        short_steps=short_steps,
        num_polished=min(num_polished, num_starts),
        sample_weight=sample_weight,
        prior=prior,
        key=fit_key,
        tol=tol,
        max_steps=max_steps,
    )
    return best(solutions)


def fit_restarts(
    models: Any,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    short_steps: int | None = None,
    num_polished: int = 5,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    key: Array | None = None,
    tol: float | None = None,
    max_steps: int = 1000,
) -> Solution:
    """Fits from every one of many starts; `jaxem.best` picks one of the solutions.

    Lanes run in batches, as many at once as keep the platform busy within its memory; each stops
    by itself and never raises: its outcome is in `result`.

    **Arguments:** as for `fit`, but

    - `models`: a model with one leading axis on every leaf, as `jax.vmap` over `init` gives.
    - `key`: for algorithms that draw random numbers; each lane draws its own.
    - `short_steps`: if given, every start first takes only so many steps, and the
      `num_polished` best of those runs are then fitted to the end (emEM: Biernacki, Celeux &
      Govaert 2003, CSDA 41). The solutions are then those of the polished lanes.

    **Returns:** a batch of solutions.

    **Raises:** `ValueError` as `fit` does, or if the models have no leading axis in common.
    """
    num_lanes = _num_lanes(models)
    problem = data if isinstance(data, Problem) else Problem(data, sample_weight, prior)
    short_key, key = (None, None) if key is None else jax.random.split(checked_key(key))
    if short_steps is not None:
        check_count("short_steps", short_steps)
        check_count("num_polished", num_polished)
        if not 1 <= num_polished <= num_lanes:
            raise ValueError(f"num_polished must be between 1 and {num_lanes}, got {num_polished}.")
        runs = _Lanes(models, short_key, problem, algorithm, tol, short_steps).run(num_lanes)
        chosen = lane_order(runs)[:num_polished]
        models, num_lanes = jax.tree.map(lambda leaf: leaf[chosen], runs.model), num_polished
    return _Lanes(models, key, problem, algorithm, tol, max_steps).run(num_lanes)


class _Lanes(eqx.Module):
    """Fits that differ in their starts and random numbers alone."""

    models: Any
    key: Array | None
    problem: Problem
    algorithm: AbstractAlgorithm
    tol: Any
    max_steps: int = eqx.field(static=True)

    def run(self, num_lanes: int) -> Solution:
        """Every lane fitted: side by side in batches, or one after another."""
        first = jax.eval_shape(lambda m: jax.tree.map(lambda leaf: leaf[0], m), self.models)
        model = as_model(first, "fit_restarts")
        data = self.problem.data
        numbers = self.problem.num_observations * model.width(data)
        batch = _side_by_side(num_lanes, numbers, model.serial_steps(data))
        if batch > 1 or any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)):
            return _in_batches(self, num_lanes, batch)
        # on CPU a loop inside one program would be slower: XLA runs what is nested on other threads
        arrays, rest = eqx.partition(self, eqx.is_array)
        leaves, kind = jax.tree.flatten(rest)
        given = kind, tuple(leaves), arrays
        shapes = _one.eval_shape(*given, np.int64(0))
        found = jax.tree.map(lambda own: jnp.zeros((num_lanes, *own.shape), own.dtype), shapes)
        for index in np.arange(num_lanes):
            found = _put(found, _one(*given, index), index)
        return found

    def fit(self, index: Any) -> Solution:
        key = None if self.key is None else jax.random.fold_in(self.key, index)
        return fit(
            jax.tree.map(lambda leaf: leaf[index], self.models),
            self.problem,
            self.algorithm,
            key=key,
            tol=self.tol,
            max_steps=self.max_steps,
            throw=False,
        )


@filter_jit()
def _in_batches(lanes: _Lanes, num_lanes: int, batch: int) -> Solution:
    return lax.map(lanes.fit, jnp.arange(num_lanes), batch_size=batch)


@functools.partial(jax.jit, static_argnums=(0, 1))  # called often: `filter_jit` takes longer
def _one(kind: Any, leaves: tuple[Any, ...], arrays: Any, index: Any) -> Solution:
    return eqx.combine(arrays, jax.tree.unflatten(kind, leaves)).fit(index)


@functools.partial(jax.jit, donate_argnums=0)  # lanes that still run are not waited for
def _put(found: Solution, lane: Solution, index: Any) -> Solution:
    return jax.tree.map(lambda all_, own: all_.at[index].set(own), found, lane)


def _side_by_side(lanes: int, numbers: int, serial_steps: int) -> int:
    """How many lanes run at once, each of so many numbers.

    On CPU a batch saves the overhead of small operations, but its operations are slower: from
    2¹³ numbers at a time on, lanes are faster one after another. The others stay in cache.
    """
    if jax.default_backend() != "cpu":
        return lanes_at_once(lanes, numbers)
    return 1 if numbers // serial_steps >= 2**13 else lanes_at_once(lanes, 8 * numbers)


def _num_lanes(models: Any) -> int:
    if not isinstance(models, eqx.Module):
        raise ValueError(
            f"fit_restarts expects models stacked along a leading axis, as from jax.vmap over "
            f"init; got {type(models).__name__}."
        )
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(models)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "the leaves of the models share no leading axis: make them by jax.vmap over init, as "
            f"jax.vmap(lambda k: Mixture.init(k, …))(jax.random.split(key, 100)), or use "
            f"jaxem.fit_best; sizes {sizes}."
        )
    return next(iter(sizes))[0]
