"""What a fit is given: data, weights of the observations, a prior; converted and checked once."""

from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, PyTree

from jaxem._core.blocks import as_arrays, num_observations, total_weight
from jaxem._core.checks import check_sample_weight
from jaxem._core.numerics import float_dtype
from jaxem._core.statistics import Framed
from jaxem.models._alone import Alone, framed_alone
from jaxem.models._base import AbstractModel


class Problem(eqx.Module):
    """Data, weights of the observations, and a prior: what an algorithm works on.

    `fit` makes one from its arguments. In a loop of one's own:

        problem = Problem(data, sample_weight, prior)
        state = algorithm.init(model, problem)
        state = algorithm.step(state, problem)

    **Arguments:**

    - `data`: what the model takes; the leading axis of every leaf is the observation.
    - `sample_weight` (n,): how often each observation counts; default: once.
    - `prior`: pseudo-statistics from `model.prior(…)`; default: none.

    `checked` is True once data and weights were found to suit a model.

    **Raises:** `ValueError` for a prior of another kind.
    """

    data: PyTree[Array] = eqx.field(converter=as_arrays)
    sample_weight: Float[Array, " n"] | None = eqx.field(converter=as_arrays, default=None)
    prior: Framed | None = None
    checked: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if not (self.prior is None or isinstance(self.prior, Framed)):
            raise ValueError(
                f"prior must come from model.prior(…), got {type(self.prior).__name__}."
            )

    @property
    def num_observations(self) -> int:
        return num_observations(self.data)

    @property
    def total_weight(self) -> Any:
        """The number of observations, each counted as often as its weight states."""
        return total_weight(self.data, self.sample_weight)


def as_problem(
    given: Any, model: AbstractModel, sample_weight: Any = None, prior: Framed | None = None
) -> Problem:
    """Data or a `Problem` as a problem that suits a model, with weights of the model's dtype.

    **Raises:** `ValueError` for data or weights of the wrong shape or dtype, or for weights or a
    prior given beside a `Problem`.
    """
    if isinstance(given, Problem):
        if sample_weight is not None or prior is not None:
            raise ValueError(
                "a Problem holds its sample_weight and prior: give them to Problem(…) alone."
            )
        if given.checked:
            return given
        problem = given
    else:
        problem = Problem(given, sample_weight, prior)
    model.check(problem.data)
    check_sample_weight(problem.sample_weight, problem.num_observations)
    weight, prior = problem.sample_weight, problem.prior
    if weight is not None:
        weight = weight.astype(float_dtype(model))
    if isinstance(model, Alone):
        prior = framed_alone(prior)
    return Problem(problem.data, weight, prior, checked=True)
