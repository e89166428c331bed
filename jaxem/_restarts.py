"""Many starts: fitted in batches that fit in memory, short runs first if wanted."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxem._em import EM, AbstractAlgorithm
from jaxem._fit import fit
from jaxem._model import AbstractModel
from jaxem._solution import Solution, lane_order
from jaxem._statistics import Framed
from jaxem._units import as_arrays, lanes_at_once, num_units


def fit_restarts(
    models: AbstractModel,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    short_steps: int | None = None,
    num_polished: int = 5,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    key: Array | None = None,
    tol: float | None = None,
    max_steps: int = 1000,
    min_variance: float = 1e-3,
) -> Solution:
    """Fits from every one of many starts; `jaxem.best` picks one of the solutions.

    Lanes run side by side in batches, as many at once as keep the platform busy within its
    memory; each stops by itself and never raises: its outcome is in `result`.

    **Arguments:** as for `fit`, but

    - `models`: a model with one leading axis on every leaf, as `jax.vmap` over `init` gives.
    - `key`: for algorithms that draw random numbers; each lane draws its own.
    - `short_steps`: if given, every start first takes only so many steps, and the
      `num_polished` best of those runs are then fitted to the end (emEM: Biernacki, Celeux &
      Govaert 2003, CSDA 41). The solutions are then those of the polished lanes.

    **Returns:** a batch of solutions.

    **Raises:** `ValueError` as `fit` does, or if the models have no leading axis in common.
    """
    data, weights = as_arrays(data), as_arrays(weights)
    num_lanes = _num_lanes(models)
    options: Any = (weights, prior, tol, min_variance)
    short_key, key = (None, None) if key is None else jax.random.split(key)
    if short_steps is None:
        return _fit_lanes(models, data, algorithm, options, key, max_steps)
    if not 1 <= num_polished <= num_lanes:
        raise ValueError(f"num_polished must be between 1 and {num_lanes}, got {num_polished}.")
    runs = _fit_lanes(models, data, algorithm, options, short_key, short_steps)
    chosen = lane_order(runs)[:num_polished]
    models = jax.tree.map(lambda leaf: leaf[chosen], runs.model)
    return _fit_lanes(models, data, algorithm, options, key, max_steps)


@eqx.filter_jit
def _fit_lanes(
    models: AbstractModel,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm,
    options: Any,
    key: Array | None,
    max_steps: int,
) -> Solution:
    weights, prior, tol, min_variance = options
    lanes = _num_lanes(models)
    keys = None if key is None else jax.random.split(key, lanes)

    def one(start: tuple[AbstractModel, Array | None]) -> Solution:
        model, key = start
        return fit(
            model,
            data,
            algorithm,
            weights=weights,
            prior=prior,
            key=key,
            tol=tol,
            max_steps=max_steps,
            min_variance=min_variance,
            throw=False,
        )

    lane = jax.eval_shape(lambda m: jax.tree.map(lambda leaf: leaf[0], m), models)
    batch = lanes_at_once(lanes, num_units(data) * lane.width(data))
    return lax.map(one, (models, keys), batch_size=batch)


def _num_lanes(models: AbstractModel) -> int:
    if not isinstance(models, AbstractModel):
        raise ValueError(
            f"fit_restarts expects models stacked along a leading axis, as from jax.vmap over "
            f"init; got {type(models).__name__}."
        )
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves(models)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "the leaves of the models share no leading axis: make them by jax.vmap over init, as "
            f"jax.vmap(lambda k: Mixture.init(k, …))(jax.random.split(key, 100)); sizes {sizes}."
        )
    return next(iter(sizes))[0]
