"""How much each unit weighs in what was fitted: derivatives with respect to unit weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxem._adjoint import AbstractAdjoint, Implicit
from jaxem._em import EM, AbstractAlgorithm
from jaxem._emission import float_dtype
from jaxem._fit import fit
from jaxem._model import AbstractModel
from jaxem._solution import Solution, checked
from jaxem._statistics import Framed
from jaxem._units import num_units


def influence(
    functional: Callable[[AbstractModel], PyTree[Array]],
    fitted: Solution | AbstractModel,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    adjoint: AbstractAdjoint = Implicit(),
) -> PyTree[Array]:
    """The derivative of any functional of a fit with respect to each unit's weight.

    All n units at once, for one linear solve and a few E-steps per number that the functional
    returns (the infinitesimal jackknife). To first order the functional changes by minus weight
    times influence when a unit is left out, and by the influence when it is seen once more.

    **Arguments:**

    - `functional(model)`: a number, or any PyTree of arrays, of the fitted model.
    - a solution or a model that is at its maximum; the data, algorithm, weights and prior of
      the fit.
    - `adjoint`: `Implicit(…)`, to choose its linear solver.

    **Returns:** what the functional returns, each array with one more axis (n,) at its end. A
    unit that the model cannot have produced (a NaN of weight 0, say) has influence 0.

    Jaeckel (1972), Bell Labs memorandum; Giordano et al. (2019), AISTATS.
    """
    model, data, weights = checked(fitted, data, weights)
    if weights is None:
        weights = jnp.ones(num_units(data), float_dtype(model))
    return _influence(functional, model, data, algorithm, weights, prior, adjoint)


@eqx.filter_jit
def _influence(
    functional: Callable[[AbstractModel], PyTree[Array]],
    model: AbstractModel,
    data: Any,
    algorithm: AbstractAlgorithm,
    weights: Array,
    prior: Any,
    adjoint: AbstractAdjoint,
) -> PyTree[Array]:
    def outcome(weights: Array) -> PyTree[Array]:
        solution = fit(
            model,
            data,
            algorithm,
            weights=weights,
            prior=prior,
            max_steps=0,  # it is fitted already
            adjoint=adjoint,
            throw=False,
        )
        return functional(solution.model)

    possible = model.in_support(data)
    derivative = jax.jacrev(outcome)(weights)
    return jax.tree.map(lambda leaf: jnp.where(possible, leaf, 0), derivative)
