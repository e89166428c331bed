"""Steps that overshoot are halved until they do not.

Where statistics are no sums of fixed functions of the data (`has_sufficient_statistics` is False)
they give Q only near the model they were taken about, and the M-step's maximum of it can lie too
far. A step is too long if the objective falls, or if at its end it falls along the step half as
fast as it rose at the beginning: near a maximum differences of values are rounding, and slopes
are not. Leaves are unconstrained, so that every point between two models is a model.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxem.em._problem import Problem
from jaxem.em._rounding import moved_by_rounding, rounding

_HALVINGS = 30


def no_worse(
    expect: Callable[..., Any], old: Any, target: Any, before: Any, problem: Problem, key: Any
) -> Any:
    """The state at a model, or at the first of ½, ¼, … of the way there that is not too long.

    **Arguments:** `expect(model, before, problem, key)`, the state that follows `before` with a
    model; `old`, the state where the step begins; `target`, the model where it ends. The problem
    is what rounding is judged by, too.
    """
    stopped = lax.stop_gradient(problem)
    direction = lax.stop_gradient(jax.tree.map(jnp.subtract, target, old.model))
    # so that it is traced once
    height = jax.jit(lambda state, *along: _height(lax.stop_gradient(state), *along))
    value, rise = height(old, direction, stopped)
    total, eps = stopped.total_weight, jnp.finfo(value.dtype).eps
    off = rounding(value, total, moved_by_rounding(lax.stop_gradient(old.statistics)))
    limits = value - 30 * off, -0.5 * jnp.maximum(rise, 0) - eps**2 * total, old.step >= 0

    @eqx.filter_custom_jvp
    def search(start: Any, end: Any, given: Any, old: Any, along: Any, limits: Any) -> Any:
        """The share of the step that is taken, and the state at its end."""
        bound, steepest, started = limits

        def too_long(carry: tuple[Array, Any, tuple[Array, Array]]) -> Array:
            share, _, (objective, slope) = carry
            fine = (objective >= bound) & (slope >= steepest) | ~started & (share == 1)
            return ~fine & (share > 0.5**_HALVINGS)

        def halve(carry: tuple[Array, Any, Any]) -> tuple[Array, Any, tuple[Array, Array]]:
            share = carry[0] / 2
            state = expect(_between(start, end, share), *given)
            return share, state, height(state, *along)

        twice = 2 * jnp.ones_like(bound), old, (jnp.full_like(bound, -jnp.inf), bound)
        share, state, _ = lax.while_loop(too_long, halve, twice)
        return share, state

    @search.def_jvp
    def _(primals: Any, tangents: Any) -> Any:
        # no derivative passes through the search: the share is constant almost everywhere
        share, _ = search(*primals)

        def taken(start: Any, end: Any, given: Any) -> Any:
            return share, expect(_between(start, end, share), *given)

        return eqx.filter_jvp(taken, primals[:3], tangents[:3])

    ends = old.model, target
    given = before, problem, key
    return search(*ends, given, lax.stop_gradient(old), (direction, stopped), limits)[1]


def _height(state: Any, direction: Any, problem: Problem) -> tuple[Array, Array]:
    """The objective at a state and its slope along a direction, that of Q (Fisher's identity)."""
    combined = problem.with_prior(state.statistics)
    _, slope = jax.jvp(lambda m: m.expected_log_prob(combined), (combined.frame,), (direction,))
    return state.objective, slope


def _between(start: Any, end: Any, share: Array) -> Any:
    """The point `share` of the way from one model to another of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(share == 1, b, a + share * (b - a)), start, end)
