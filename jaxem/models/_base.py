"""What a model must provide to be fitted."""

import abc
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.blocks import num_observations
from jaxem._core.checks import check_sample_weight
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import finite, float_dtype
from jaxem._core.printing import describe
from jaxem._core.quadratic import AbstractLocal
from jaxem._core.statistics import Framed
from jaxem.latents import AbstractPosterior, Exact


class AbstractModel(eqx.Module):
    """A latent-variable model: a PyTree of parameters with pure methods.

    The leading axis of every leaf of `data` is the observation: a point, a sequence, a document.
    `sample_weight` holds one non-negative number per observation.
    """

    def __repr__(self) -> str:
        return describe(self)

    def e_step(
        self,
        data: PyTree[Array],
        sample_weight: Float[Array, " n"] | None = None,
        *,
        posterior: AbstractPosterior = Exact(),
        key: Array | None = None,
    ) -> tuple[Framed, Float[Array, ""]]:
        """Expected statistics about self, and the log-likelihood Σ w log p(x) (or a bound).

        An observation of weight 0 equals an absent one, whatever it holds, NaN included.

        **Raises:** `ValueError` for data or weights of the wrong shape or dtype, or a posterior
        that the model does not have.
        """
        data, sample_weight = as_arrays(data), as_arrays(sample_weight)
        self.check(data)
        check_sample_weight(sample_weight, num_observations(data))
        if sample_weight is not None:
            sample_weight = sample_weight.astype(float_dtype(self))
        sums, value = expected_sums(self, data, sample_weight, posterior, key)
        return Framed(sums, self), value

    @abc.abstractmethod
    def expected_sums(
        self,
        data: PyTree[Array],
        sample_weight: Float[Array, " n"] | None,
        posterior: AbstractPosterior,
        key: Array | None,
    ) -> tuple[PyTree[Array], Float[Array, ""]]:
        """Sums about self and Σ w log p(x), of arrays that have been checked."""

    @abc.abstractmethod
    def m_step(self, statistics: Framed) -> Self:
        """The maximiser of `expected_log_prob` over what is not frozen."""

    @abc.abstractmethod
    def reframe(self, sums: PyTree[Array], old: Any) -> PyTree[Array]:
        """Sums taken about `old`, taken about self instead; exact, linear in the sums."""

    @abc.abstractmethod
    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), the statistics in any frame.

        **Raises:** `NotImplementedError` for a model that has no Q.
        """

    @abc.abstractmethod
    def prior(self, *args: Any, **kwargs: Any) -> Framed:
        """Pseudo-statistics, to be added to those of data; flat without arguments."""

    @property
    @abc.abstractmethod
    def num_free_parameters(self) -> int:
        """How many parameters the M-step moves, as AIC and BIC count them."""

    @abc.abstractmethod
    def log_prob(self, data: PyTree[Array]) -> Float[Array, " n"]:
        """log p(x) of each observation."""

    @abc.abstractmethod
    def sample(self, key: Array, *args: Any, **kwargs: Any) -> Any:
        """Draws of the data, and of the latent that they come from."""

    @abc.abstractmethod
    def check(self, data: PyTree[Array]) -> None:
        """Raises `ValueError` at trace time for data of the wrong shape or dtype."""

    @abc.abstractmethod
    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        """Whether each observation is possible under the model's families."""

    @abc.abstractmethod
    def width(self, data: PyTree[Array]) -> int:
        """How many numbers an E-step holds for each observation: it decides block sizes."""

    @abc.abstractmethod
    def degenerate(self, statistics: Framed) -> Int[Array, " k"]:
        """Why each component is degenerate, a member of `CAUSES`; 0 where it is not.

        In `statistics` an observation counts as one where weights are counts, else as much as
        others do.
        """

    @abc.abstractmethod
    def representable(self) -> Bool[Array, ""]:
        """Whether every parameter is finite in the dtype at hand."""

    @abc.abstractmethod
    def num_observed(self, data: PyTree[Array]) -> Array:
        """How many independent observations each row of the data holds, which BIC counts."""

    @abc.abstractmethod
    def serial_steps(self, data: PyTree[Array]) -> int:
        """How many steps an E-step takes one after another: those of time, in a chain."""


class AbstractNamelessModel(AbstractModel):
    """A model whose parameters are a user's own PyTree: they have no names."""

    params: eqx.AbstractVar[PyTree]

    def sample(self, key: Array, *args: Any, **kwargs: Any) -> Any:
        """Not available.

        **Raises:** `NotImplementedError`: functions do not say how data are drawn.
        """
        raise NotImplementedError(
            "a model from a log-joint or from functions cannot be sampled: draw from model.params "
            "by hand."
        )

    @property
    def num_free_parameters(self) -> int:
        """All numbers in `params`, as AIC and BIC count them."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        return finite(data)

    def degenerate(self, statistics: Framed) -> Int[Array, " 1"]:
        return jnp.zeros((1,), jnp.int32)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(self.params)


@eqx.filter_jit  # an eager call compiles once, and a program holds one E-step of a kind
def expected_sums(
    model: AbstractModel,
    data: PyTree[Array],
    sample_weight: Float[Array, " n"] | None,
    posterior: AbstractPosterior,
    key: Array | None,
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """`model.expected_sums`, compiled: the E-step of arrays that have been checked."""
    return model.expected_sums(data, sample_weight, posterior, key)


def local_part(model: AbstractModel) -> str:
    """The part of a model whose statistics are not sufficient, or ""."""
    return _first(model, lambda node: isinstance(node, AbstractLocal))


def slope_part(model: AbstractModel) -> str:
    """The part of a model whose statistics do not say how long a step should be, or ""."""
    return _first(model, lambda node: isinstance(node, AbstractLocal) and not node.has_curvature)


def _first(model: AbstractModel, found: Any) -> str:
    parts = [part for part in jax.tree.leaves(model, is_leaf=found) if found(part)]
    return type(parts[0]).__name__ if parts else ""


def as_float_array(value: Any) -> Array:
    """A leaf of `params` as a floating array. Raises `ValueError` for what is none."""
    if callable(value) or isinstance(value, str):
        raise ValueError(
            f"params must be arrays, got {value!r}: of a module pass the arrays alone "
            "(equinox.partition), and combine them inside the function."
        )
    value = jnp.asarray(value)
    return value if jnp.issubdtype(value.dtype, jnp.inexact) else value.astype(float)


def all_finite(tree: PyTree[Array]) -> Bool[Array, ""]:
    """Whether every number in every floating leaf is finite."""
    flags = [
        jnp.all(jnp.isfinite(leaf))
        for leaf in jax.tree.leaves(tree)
        if jnp.issubdtype(leaf.dtype, jnp.inexact)
    ]
    return jnp.all(jnp.stack(flags)) if flags else jnp.asarray(True)
