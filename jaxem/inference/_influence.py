"""How much each observation weighs in what was fitted: derivatives with respect to its weight."""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxem._core.checks import name_of
from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import replace
from jaxem._core.statistics import Framed
from jaxem.em._adjoint import AbstractAdjoint, Implicit
from jaxem.em._algorithm import AbstractAlgorithm
from jaxem.em._em import EM
from jaxem.em._fit import fit
from jaxem.em._problem import Problem
from jaxem.em._solution import Solution
from jaxem.inference._fitted import possible_problem
from jaxem.models._base import AbstractModel


def influence(
    functional: Callable[[Any], PyTree[Array]],
    fitted: Solution | Any,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    adjoint: AbstractAdjoint = Implicit(),
) -> PyTree[Array]:
    """The derivative of any functional of a fit with respect to each observation's weight.

    All n observations at once, for one linear solve and a few E-steps per number that the
    functional returns (the infinitesimal jackknife). To first order the functional changes by minus
    weight times influence when an observation is left out, and by the influence when it is seen
    once more.

    **Arguments:**

    - `functional(model)`: a number, or any PyTree of arrays, of the fitted model.
    - a solution or a model that is at its maximum; the data, algorithm, sample_weight and prior of
      the fit.
    - `adjoint`: `Implicit(…)`, to choose its linear solver.

    **Returns:** what the functional returns, each array with one more axis (n,) at its end. A
    observation that the model cannot have produced (a NaN of weight 0, say) has influence 0.

    Jaeckel (1972), Bell Labs memorandum; Giordano et al. (2019), AISTATS.
    """
    if not callable(functional):
        raise ValueError(
            "influence takes a function of the fitted model first, as in lambda model: "
            f"model.weights; got {name_of(functional)}."
        )
    model, problem = possible_problem(fitted, data, sample_weight, prior)
    weight = problem.sample_weight
    if weight is None:
        weight = jnp.ones(problem.num_observations, float_dtype(model))
    return _influence(functional, model, problem, algorithm, weight, adjoint)


@eqx.filter_jit
def _influence(
    functional: Callable[[Any], PyTree[Array]],
    model: AbstractModel,
    problem: Problem,
    algorithm: AbstractAlgorithm,
    sample_weight: Array,
    adjoint: AbstractAdjoint,
) -> PyTree[Array]:
    def outcome(sample_weight: Array) -> PyTree[Array]:
        weighted = replace(problem, sample_weight=sample_weight)
        # it is fitted already
        solution = fit(model, weighted, algorithm, max_steps=0, adjoint=adjoint, throw=False)
        return functional(solution.model)

    possible = model.in_support(problem.data)
    derivative = jax.jacrev(outcome)(sample_weight)
    return jax.tree.map(lambda leaf: jnp.where(possible, leaf, 0), derivative)
