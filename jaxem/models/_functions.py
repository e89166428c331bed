"""Models made of two plain functions."""

import inspect
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxem._core.blocks import num_observations, substitute
from jaxem._core.parameters import replace
from jaxem._core.statistics import Framed
from jaxem.latents import Exact
from jaxem.models._base import AbstractNamelessModel, as_float_array


class FunctionModel(AbstractNamelessModel):
    """A model made of two functions and their parameters; see `from_functions`."""

    params: PyTree
    e_function: Callable[..., Any] = eqx.field(static=True)
    m_function: Callable[..., Any] = eqx.field(static=True)

    @property
    def takes_sample_weight(self) -> bool:
        """Whether the E-step is a function of the observations' weights too."""
        parameters = inspect.signature(self.e_function).parameters.values()
        variadic = any(p.kind is p.VAR_POSITIONAL for p in parameters)
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        return variadic or sum(p.kind in positional for p in parameters) > 2

    def expected_sums(self, data, sample_weight, posterior, key):
        if not isinstance(posterior, Exact):
            raise ValueError(
                "a model from functions has the E-step that it was given, which no other "
                "expectation than Exact() can change."
            )
        args: tuple[Any, ...] = (data,)
        if sample_weight is not None:
            if not self.takes_sample_weight:
                raise ValueError(
                    "sample_weight needs an E-step that takes it: write "
                    "e_step(params, data, sample_weight)."
                )
            args = (substitute(data, sample_weight != 0), sample_weight)
        returned = self.e_function(self.params, *args)
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise ValueError(
                "e_step must return a pair, statistics and the log-likelihood; got "
                f"{type(returned).__name__}."
            )
        sums, log_likelihood = returned
        if jnp.shape(log_likelihood) != ():
            raise ValueError(
                "e_step must return the log-likelihood as a scalar, summed over the observations; "
                f"got shape {jnp.shape(log_likelihood)}."
            )
        return sums, jnp.asarray(log_likelihood)

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

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        raise NotImplementedError(
            "a model from functions does not have its Q; Gradient(…, objective=True) climbs the "
            "log-likelihood that its e_step returns."
        )

    def prior(self, *args: Any, **kwargs: Any) -> Framed:
        """Not available.

        **Raises:** `NotImplementedError`: what its statistics are is known to its functions.
        """
        raise NotImplementedError(
            "a model from functions has no prior of its own: add pseudo-statistics in m_step, and "
            "the log-prior to what e_step returns."
        )

    def log_prob(self, data: PyTree[Array]) -> Float[Array, " n"]:
        """Not available.

        **Raises:** `NotImplementedError`: the E-step gives the sum over observations alone.
        """
        raise NotImplementedError(
            "a model from functions has the log-likelihood of all data, model.e_step(data)[1], not "
            "of each observation."
        )

    def num_observed(self, data: PyTree[Array]) -> Array:
        return jnp.ones(num_observations(data), int)

    def serial_steps(self, data: PyTree[Array]) -> int:
        return 1

    def check(self, data: PyTree[Array]) -> None:
        num_observations(data)

    def width(self, data: PyTree[Array]) -> int:
        numbers = sum(leaf.size for leaf in jax.tree.leaves((self.params, data)))
        return numbers // num_observations(data)


def from_functions(
    e_step: Callable[..., Any], m_step: Callable[[PyTree], PyTree], params: PyTree
) -> FunctionModel:
    """A model from an E-step and an M-step written as plain functions.

        model = jaxem.from_functions(e_step, m_step, start)
        solution = jaxem.fit(model, data)

    **Arguments:**

    - `e_step(params, data)` returns expected statistics (any PyTree of sums over the observations)
      and the log-likelihood of `data` at `params`. If fits are to take weights of observations, it
      is `e_step(params, data, sample_weight)`.
    - `m_step(statistics)` returns new parameters of the same structure.
    - `params`: the start, any PyTree of arrays.

    The functions must be module-level, or kept, for a second fit to reuse the compiled one:
    they are compared by identity.

    **Raises:** `ValueError` for what is no function, or parameters without an array.
    """
    for name, function in (("e_step", e_step), ("m_step", m_step)):
        if not callable(function):
            raise ValueError(f"{name} must be a function, got {function!r}.")
    if not jax.tree.leaves(params):
        raise ValueError(f"params must hold one array or more, got {params!r}.")
    return FunctionModel(jax.tree.map(as_float_array, params), e_step, m_step)
