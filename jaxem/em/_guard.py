"""Steps that overshoot are halved until they do not.

Where statistics are no sums of fixed functions of the data (`has_sufficient_statistics` is False)
they give Q only near the model they were taken about, and the M-step's maximum of it can lie too
far. A step is too long if the objective falls, or if at its end it falls along the step half as
fast as it rose at the beginning: near a maximum differences of values are rounding, and slopes
are not. Leaves are unconstrained, so that every point between two models is a model.
"""

from collections.abc import Callable
from typing import Any

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxem.em._problem import Problem
from jaxem.em._rounding import moved_by_rounding, rounding

_HALVINGS = 30


def no_worse(
    expect: Callable[[Any], Any],
    old: Any,
    new: Any,
    problem: Problem,
) -> Any:
    """`new`, or the state at the first of ½, ¼, … of the step that is not too long.

    **Arguments:** `expect(model)`, the state that follows `old` with this model; `new`, that of
    the whole step; `problem`, by whose total weight rounding is judged.
    """
    total = problem.total_weight
    frozen, target = lax.stop_gradient((old.model, new.model))
    direction = jax.tree.map(jnp.subtract, target, frozen)
    eps = jnp.finfo(old.objective.dtype).eps
    height = jax.jit(lambda state: _height(state, direction, problem))  # so that it is traced once
    before, rise = height(old)
    bound = before - 30 * rounding(before, total, moved_by_rounding(old.statistics))
    steepest = -0.5 * jnp.maximum(rise, 0) - eps**2 * total

    def too_long(carry: tuple[Array, tuple[Array, Array]]) -> Array:
        share, (objective, slope) = carry
        return ~((objective >= bound) & (slope >= steepest)) & (share > 0.5**_HALVINGS)

    def halve(carry: tuple[Array, Any]) -> tuple[Array, tuple[Array, Array]]:
        share = carry[0] / 2
        return share, height(expect(_between(frozen, target, share)))

    # no derivative passes through the search: the share is constant almost everywhere
    start = jnp.ones_like(before), height(new)
    share, _ = lax.while_loop(too_long, halve, start)
    whole = share == 1
    return lax.cond(
        eqxi.unvmap_all(whole),  # all lanes of a vmap take one branch
        lambda: new,
        lambda: expect(_between(old.model, new.model, share)),
    )


def _height(state: Any, direction: Any, problem: Problem) -> tuple[Array, Array]:
    """The objective at a state and its slope along a direction, that of Q (Fisher's identity)."""
    combined = lax.stop_gradient(problem.with_prior(state.statistics))
    _, slope = jax.jvp(lambda m: m.expected_log_prob(combined), (combined.frame,), (direction,))
    return lax.stop_gradient(state.objective), slope


def _between(start: Any, end: Any, share: Array) -> Any:
    """The point `share` of the way from one model to another of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(share == 1, b, a + share * (b - a)), start, end)
