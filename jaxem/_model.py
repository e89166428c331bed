"""What a model must provide to be fitted, and models made of two plain functions."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._emission import finite
from jaxem._hold import Held, replace
from jaxem._posterior import AbstractPosterior, Exact
from jaxem._repr import describe
from jaxem._statistics import Framed
from jaxem._units import num_units, substitute


class AbstractModel(eqx.Module):
    """A latent-variable model: a PyTree of parameters with pure methods.

    The leading axis of every leaf of `data` is the unit: a point, a sequence, a document.
    `weights` holds one non-negative number per unit.
    """

    def __repr__(self) -> str:
        return describe(self) if hasattr(self, "natural") else eqx.tree_pformat(self)

    @abc.abstractmethod
    def e_step(
        self,
        data: PyTree[Array],
        weights: Float[Array, " n"] | None = None,
        *,
        posterior: AbstractPosterior,
        key: Array | None = None,
    ) -> tuple[Framed, Float[Array, ""]]:
        """Expected statistics of the data about self, and the log-likelihood (or a bound)."""

    @abc.abstractmethod
    def m_step(self, statistics: Framed) -> Self:
        """The maximiser of `expected_log_prob` over what is not held."""

    @abc.abstractmethod
    def reframe(self, sums: PyTree[Array], old: Any) -> PyTree[Array]:
        """Sums taken about `old`, taken about self instead; exact, linear in the sums."""

    @abc.abstractmethod
    def check(self, data: PyTree[Array]) -> None:
        """Raises `ValueError` at trace time for data of the wrong shape or dtype."""

    @abc.abstractmethod
    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        """Whether each unit is a possible observation."""

    @abc.abstractmethod
    def width(self, data: PyTree[Array]) -> int:
        """How many numbers an E-step holds for each unit; it decides block and batch sizes."""

    @abc.abstractmethod
    def degenerate(self, statistics: Framed, min_variance: Any) -> Bool[Array, " k"]:
        """Components that rest on too few units, or on hardly any variance."""

    @abc.abstractmethod
    def representable(self) -> Bool[Array, ""]:
        """Whether every natural parameter is finite in the dtype at hand."""

    @abc.abstractmethod
    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), the statistics in any frame."""


class FunctionModel(AbstractModel):
    """A model made of two functions and their parameters; see `from_functions`."""

    params: PyTree
    e_function: Callable[..., Any] = eqx.field(static=True)
    m_function: Callable[..., Any] = eqx.field(static=True)
    held: Held = eqx.field(static=True, default=())

    def e_step(self, data, weights=None, *, posterior=Exact(), key=None):
        if not isinstance(posterior, Exact):
            raise ValueError(
                "a model from functions has the E-step that it was given, which no other "
                "expectation than Exact() can change."
            )
        args = (data,) if weights is None else (substitute(data, weights != 0), weights)
        returned = self.e_function(self.params, *args)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise ValueError(
                "e_step must return a pair, statistics and the log-likelihood; got "
                f"{type(returned).__name__}."
            )
        sums, log_likelihood = returned
        if jnp.shape(log_likelihood) != ():
            raise ValueError(
                "e_step must return the log-likelihood as a scalar, summed over the units; got "
                f"shape {jnp.shape(log_likelihood)}."
            )
        return Framed(sums, self), jnp.asarray(log_likelihood)

    def m_step(self, statistics: Framed) -> Self:
        params = self.m_function(statistics.sums)
        if jax.tree.structure(params) != jax.tree.structure(self.params):
            raise ValueError(
                "m_step must return parameters of the structure it started from: got "
                f"{jax.tree.structure(params)}, expected {jax.tree.structure(self.params)}."
            )
        shapes, expected = (jax.tree.map(jnp.shape, tree) for tree in (params, self.params))
        if shapes != expected:
            raise ValueError(
                f"m_step must return parameters of the shapes it started from: got {shapes}, "
                f"expected {expected}."
            )
        cast = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), params, self.params)
        return replace(self, params=cast)

    def reframe(self, sums: PyTree[Array], old: Any) -> PyTree[Array]:
        return sums

    def check(self, data: PyTree[Array]) -> None:
        num_units(data)

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        return finite(data)

    def width(self, data: PyTree[Array]) -> int:
        return sum(leaf.size for leaf in jax.tree.leaves((self.params, data))) // num_units(data)

    def degenerate(self, statistics: Framed, min_variance: Any) -> Bool[Array, " 1"]:
        return jnp.zeros((1,), bool)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(self.params)

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        raise NotImplementedError(
            "a model from functions does not know its Q; Gradient(…, objective=True) climbs the "
            "log-likelihood that its e_step returns."
        )


def from_functions(
    e_step: Callable[..., Any], m_step: Callable[[PyTree], PyTree], params: PyTree
) -> FunctionModel:
    """A model from an E-step and an M-step written as plain functions.

    **Arguments:**

    - `e_step(params, data)` returns expected statistics (any PyTree of sums over the units)
      and the log-likelihood of `data` at `params`. If fits are to take unit weights, it is
      `e_step(params, data, weights)`.
    - `m_step(statistics)` returns new parameters of the same structure.
    - `params`: the start, any PyTree of arrays.

    The functions must be module-level, or kept, for a second fit to reuse the compiled one:
    they are compared by identity.
    """
    return FunctionModel(jax.tree.map(as_float_array, params), e_step, m_step)


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
