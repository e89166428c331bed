"""Faster ways to the same fixed points: extrapolations of EM's steps in parameter space.

Leaves are unconstrained, so that any extrapolation is a model. It is judged by the objective,
which an E-step there gives anyway: the objective never falls, or EM's own step is taken instead.
Under `vmap` that step is computed for all lanes where one needs it.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from jaxem._core.checks import check_number
from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import estimates, free_numbers, replace, within_bounds
from jaxem.em._algorithm import AbstractAlgorithm, State
from jaxem.em._em import EM
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
        return self.em.conclusive(replace(state, maximization=state.maximization[0]))

    def plain(self):
        return self.em.plain()

    def init(self, model, problem, *, key=None):
        state = self.em.init(model, problem, key=key)
        return replace(state, maximization=(state.maximization, self._start(model)))

    def unstarted(self, model, problem, *, key=None):
        return None

    def step(self, state, problem, *, key=None):
        problem = as_problem(problem, state.model)
        inner, own = state.maximization
        new, own = self._step(replace(state, maximization=inner), own, problem, key)
        return replace(new, step=state.step + 1, maximization=(new.maximization, own))

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


class SQUAREM(AbstractAccelerated):
    """Squared extrapolation: θ − 2 α r + α² v, from two EM steps r and r + v.

    α = −‖r‖ / ‖v‖, at most −1, where −1 is EM. The points are extrapolated as unconstrained leaves,
    the lengths taken of parameters, each relative to its root mean square. An EM step from
    there ends it, so that a step costs three E-steps, and a fourth where the objective would
    fall: then r and r + v are taken as they are.

    **Arguments:** `em`, the algorithm to accelerate.

    **Raises:** `ValueError` if that is stochastic, annealed, or not over all the data.

    Varadhan & Roland (2008), Scand. J. Stat. 35, scheme S3 and its step bounds.
    """

    em: EM = EM()

    def __check_init__(self):
        check_em(self.em, "SQUAREM")

    def _start(self, model):
        return jnp.ones((), float_dtype(model))  # the longest step that is tried now

    def _step(self, state, own, problem, key):
        em, longest = self.em, own
        start = ravel_pytree(state.model)[0]
        first = em.step(state, problem, key=key)
        second_model, _ = self._em_point(first, problem, key)
        # A probability that vanishes converges, while its logarithm does not.
        unit = jax.tree.map(magnitude, estimates(state.model))
        points = [
            ravel_pytree(jax.tree.map(jnp.divide, estimates(m), unit))[0]
            for m in (state.model, first.model, second_model)
        ]
        bend = length_of(points[2] - 2 * points[1] + points[0])
        size = length_of(points[1] - points[0])
        length = jnp.clip(jnp.where(bend > 0, size / jnp.where(bend > 0, bend, 1), 1), 1, longest)
        one, (two, rebuild) = ravel_pytree(first.model)[0], free_numbers(second_model)
        r, v = one - start, two - 2 * one + start
        proposed = within_bounds(rebuild(start + 2 * length * r + length**2 * v))

        bold = em.step(em.expect(proposed, first, problem, key), problem, key=key)
        good = is_as_good(bold, state)
        new = or_else(good, bold, lambda: em.step(first, problem, key=key))
        at_bound = length == longest
        longest = jnp.where(at_bound & good, 4 * longest, longest)
        longest = jnp.where(at_bound & ~good, jnp.maximum(1, longest / 4), longest)
        return new, longest


class Overrelaxed(AbstractAccelerated):
    """EM's step, made longer by a factor that grows as long as the objective does not fall.

    Each step costs one E-step, or two where it would fall: EM's own step is taken then, and the
    factor starts again from 1.

    **Arguments:** `em`, the algorithm to accelerate; `growth`, of the factor in each step.

    **Raises:** `ValueError` if EM is stochastic, annealed, or not over all the data; for a growth
    that is not above 1.

    Salakhutdinov & Roweis (2003), ICML 20.
    """

    em: EM = EM()
    growth: float = eqx.field(static=True, default=1.1)

    def __check_init__(self):
        check_em(self.em, "Overrelaxed")
        check_number("growth", self.growth)
        if not self.growth > 1:
            raise ValueError(f"the factor of Overrelaxed must grow: growth > 1, got {self.growth}.")

    def _start(self, model):
        return jnp.ones((), float_dtype(model))

    def _step(self, state, own, problem, key):
        model, memory = self._em_point(state, problem, key)
        start, (end, rebuild) = ravel_pytree(state.model)[0], free_numbers(model)
        longer = within_bounds(rebuild(start + own * (end - start)))
        bold = self.em.expect(longer, replace(state, maximization=memory), problem, key)
        good = is_as_good(bold, state)
        new = or_else(good, bold, lambda: self.em.step(state, problem, key=key))
        return new, jnp.where(good, self.growth * own, 1)
