"""Faster ways to the same fixed points: extrapolations of EM's steps in parameter space.

Leaves are unconstrained, so that any extrapolation is a model. It is judged by the objective,
which an E-step there gives anyway: the objective never falls, or EM's own step is taken instead.
Under `vmap` that step is computed for all lanes where one needs it.
"""

import abc
import dataclasses
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from jaxem._core.parameters import estimates
from jaxem.em._algorithm import AbstractAlgorithm, State
from jaxem.em._em import EM, with_memory
from jaxem.em._expectation import Annealed
from jaxem.em._problem import Problem, as_problem
from jaxem.em._traits import Traits
from jaxem.models._base import AbstractModel, slope_part


class AbstractAccelerated(AbstractAlgorithm):
    """An algorithm around EM; its own memory stands beside that of EM's maximization."""

    em: eqx.AbstractVar[EM]

    @property
    def traits(self) -> Traits:
        # not stationary: an extrapolation goes where EM would go much later
        return self.em.traits * Traits(stationary=False)

    def conclusive(self, state):
        return self.em.conclusive(with_memory(state, state.maximization[0]))

    def plain(self):
        return self.em.plain()

    def with_expectation(self, change):
        return dataclasses.replace(self, em=self.em.with_expectation(change))

    def init(self, model, problem, *, key=None):
        state = self.em.init(model, problem, key=key)
        return with_memory(state, (state.maximization, self._start(model)))

    def step(self, state, problem, *, key=None):
        problem = as_problem(problem, state.model)
        inner, own = state.maximization
        new, own = self._step(with_memory(state, inner), own, problem, key)
        new = eqx.tree_at(lambda s: s.step, new, state.step + 1)
        return with_memory(new, (new.maximization, own))

    def finish(self, state, problem, *, key=None):
        return state

    def _em_point(self, state: State, problem: Problem, key: Array | None) -> tuple[Any, Any]:
        """Where EM would go, and what its maximization remembers.

        A step that only the objective can judge is halved until it is no worse; else an M-step.
        """
        if slope_part(state.model):
            new = self.em.step(state, problem, key=key)
            return new.model, new.maximization
        return self.em.maximize(state, problem, key)

    @abc.abstractmethod
    def _start(self, model: AbstractModel) -> PyTree[Array]:
        """What is remembered before the first step."""

    @abc.abstractmethod
    def _step(
        self, state: State, own: PyTree[Array], problem: Problem, key: Array | None
    ) -> tuple[State, PyTree[Array]]:
        """A state that is no worse, and what is remembered."""


def check_em(em: Any, name: str) -> None:
    """Raises `ValueError` for something that `name` cannot accelerate."""
    if not isinstance(em, EM):
        raise ValueError(f"{name} accelerates an EM(…), got {em!r}.")
    if not (em.traits.monotone and em.traits.exact):
        reason = (
            "its objective changes with the temperature: anneal first, then accelerate from there"
            if isinstance(em.expectation, Annealed)
            else "extrapolating random steps multiplies their noise: use Full() and Exact()"
        )
        raise ValueError(f"{name} needs a deterministic, monotone EM over all the data; {reason}.")


def is_as_good(new: State, old: State) -> Array:
    """Whether the objective is finite and did not fall by more than rounding."""
    slack = 10 * jnp.finfo(old.objective.dtype).eps * jnp.abs(old.objective)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new.model)])
    return (new.objective >= old.objective - slack) & jnp.all(finite)


def or_else(good: Array, bold: State, careful: Callable[[], State]) -> State:
    """`bold` where it is good, else `careful()`, which is computed if some lane needs it."""

    def chosen() -> State:
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), bold, careful())

    return lax.cond(eqxi.unvmap_all(good), lambda: bold, chosen)


def magnitude(parameter: Array) -> Array:
    """The root mean square of a parameter, or 1 where that is 0."""
    size = _square_root(jnp.mean(parameter**2))
    return jnp.where(size > 0, size, 1)


def length_of(vector: Array) -> Array:
    """The Euclidean norm, with derivative 0 at 0."""
    return _square_root(jnp.sum(vector**2))


def _square_root(square: Array) -> Array:
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def measured(model: AbstractModel) -> Array:
    """What the M-step estimates, on scales on which lengths mean something.

    Parameters, not leaves: the logarithm of a probability that vanishes grows without end. Those
    far from 0 by their logarithm: degrees of freedom grow without end too.
    """
    return jnp.arcsinh(ravel_pytree(estimates(model))[0])
