"""What a fit is given: data, weights of the observations, a prior; converted and checked once."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core.blocks import num_observations, total_weight
from jaxem._core.checks import check_sample_weight, name_of, or_absent
from jaxem._core.conversion import HALF_PRECISION, as_arrays
from jaxem._core.numerics import divide, float_dtype
from jaxem._core.parameters import replace
from jaxem._core.statistics import Framed
from jaxem.em._sharding import Shards
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

    - `shards`: where data are spread over devices along their observations, the mesh and the name
      or names of its axes. Each device then sums its own observations. `fit` finds this itself,
      except inside your own `jit`, where it cannot be seen.

    `checked` is True once data, weights and prior were found to suit a model.

    **Raises:** `ValueError` for a prior of another kind.
    """

    data: PyTree[Array] = eqx.field(converter=as_arrays)
    sample_weight: Float[Array, " n"] | None = eqx.field(converter=as_arrays, default=None)
    prior: Framed | None = None
    shards: Shards | None = eqx.field(static=True, default=None)
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

    @property
    def unit_weight(self) -> Any:
        """What an observation weighs: 1, or less where weights are no counts and mostly below 1."""
        if self.sample_weight is None:
            return 1.0
        largest = jnp.max(self.sample_weight)
        relative = divide(self.sample_weight, largest)
        return jnp.minimum(1, largest * divide(jnp.sum(relative**2), jnp.sum(relative)))

    def possible(self, model: AbstractModel) -> Bool[Array, " n"]:
        """Whether each observation that counts is one that the model can have produced."""
        return or_absent(model.in_support(self.data), self.sample_weight)

    def with_prior(self, statistics: Framed) -> Framed:
        """Statistics and the pseudo-statistics of the prior."""
        return statistics if self.prior is None else statistics + self.prior

    def log_prior(self, model: AbstractModel) -> Float[Array, ""] | float:
        """The log-density of the prior at a model, up to a constant."""
        return 0.0 if self.prior is None else model.expected_log_prob(self.prior)


def as_problem(
    given: Any, model: AbstractModel, sample_weight: Any = None, prior: Framed | None = None
) -> Problem:
    """Data or a `Problem` as a problem that suits a model, with weights of the model's dtype.

    **Raises:** `ValueError` for data or weights of the wrong shape or dtype, for a prior of another
    model, or for weights or a prior given beside a `Problem`.
    """
    if not isinstance(given, Problem):
        given = Problem(given, sample_weight, prior)
    elif sample_weight is not None or prior is not None:
        raise ValueError(
            "a Problem holds its sample_weight and prior: give them to Problem(…) alone."
        )
    if given.checked:
        return given
    if not isinstance(model, AbstractModel):
        raise ValueError(f"expected a model, then the data; got {name_of(model)} first.")
    if (dtype := float_dtype(model)) in HALF_PRECISION:
        raise ValueError(
            f"the model has parameters of dtype {dtype}, in which sums lose their digits: write "
            "jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)."
        )
    model.check(given.data)
    weight, prior = given.sample_weight, given.prior
    check_sample_weight(weight, given.num_observations)
    if weight is not None:
        weight = weight.astype(dtype)
    if isinstance(model, Alone):
        prior = framed_alone(prior)
    if prior is not None and _kind(prior.frame) != _kind(model):
        raise ValueError(
            "prior does not belong to this model: it was made by another family, or for other "
            "numbers of components or features. It comes from this model's model.prior(…); a "
            "prior of the components goes in as model.prior(components=…)."
        )
    return replace(given, sample_weight=weight, prior=prior, checked=True)


def _kind(tree: Any) -> Any:
    """The types in a tree and the shapes of its arrays; frozen or not makes no difference."""
    if isinstance(tree, jax.Array | jax.ShapeDtypeStruct):
        return tree.shape
    if tree is None or jax.tree_util.all_leaves([tree]):
        return None
    parts = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)
    return type(tree), tuple(_kind(part) for part in parts)
