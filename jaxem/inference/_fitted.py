"""The model and the problem of a fit, from what a user hands over afterwards."""

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxem._core.checks import concrete, name_of
from jaxem._core.numerics import float_dtype
from jaxem._core.statistics import Framed
from jaxem.em._problem import Problem, as_problem
from jaxem.em._solution import Solution, impossible_data
from jaxem.emissions._base import AbstractEmission
from jaxem.models._alone import as_model
from jaxem.models._base import AbstractModel


def fitted_problem(
    fitted: Any, data: Any, sample_weight: Any = None, prior: Framed | None = None
) -> tuple[AbstractModel, Problem]:
    """The model of a solution, or a model or emission as it is, and its problem, checked.

    **Raises:** `ValueError` as `fit` does.
    """
    given = fitted.model if isinstance(fitted, Solution) else fitted
    if not isinstance(given, AbstractModel | AbstractEmission):
        raise ValueError(f"expected a Solution, a model or an emission, got {name_of(given)}.")
    model = as_model(given, "inference")
    return model, as_problem(data, model, sample_weight, prior)


def possible_problem(
    fitted: Any, data: Any, sample_weight: Any = None, prior: Framed | None = None
) -> tuple[AbstractModel, Problem]:
    """`fitted_problem`, of data that the model can have produced where that is known.

    **Raises:** `ValueError` for other data, too.
    """
    model, problem = fitted_problem(fitted, data, sample_weight, prior)
    possible = concrete(problem.possible(model))
    if possible is not None and not possible.all():
        raise ValueError(impossible_data(possible))
    return model, problem


def num_observed(model: AbstractModel, problem: Problem) -> Float[Array, ""]:
    """How many independent observations there are, each counted as often as its weight states."""
    counts, weight = model.num_observed(problem.data), problem.sample_weight
    return jnp.sum(counts if weight is None else counts * weight).astype(float_dtype(model))
