"""Steps that may overshoot are halved until the objective does not fall.

Where statistics are no sums of fixed functions of the data (`has_sufficient_statistics` is False)
they know Q only near the model they were taken about, and the M-step's maximum of it may lie too
far. Leaves are unconstrained, so that every point between two models is a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

_HALVINGS = 30


def is_local(model: Any) -> bool:
    """Whether some part of the model says that its statistics are not sufficient."""

    def says(node: Any) -> bool:
        return not getattr(node, "has_sufficient_statistics", True)

    return any(map(says, jax.tree.leaves(model, is_leaf=says)))


def no_worse(
    expect: Callable[[Any], Any], old: Any, new: Any, total: Float[Array, ""] | float
) -> Any:
    """`new`, or the state at the first of ½, ¼, … of the step whose objective does not fall.

    **Arguments:** `expect(model)`, the state that follows `old` with this model; `new`, that of
    the whole step; `total`, the weight of the data, by which rounding is judged.
    """
    frozen, target = lax.stop_gradient((old.model, new.model))
    before, after = lax.stop_gradient((old.objective, new.objective))
    slack = 30 * jnp.finfo(before.dtype).eps * (jnp.abs(before) + total)
    bound = lax.stop_gradient(before - slack)

    def falls(carry: tuple[Array, Array]) -> Array:
        share, objective = carry
        return ~(objective >= bound) & (share > 0.5**_HALVINGS)

    def halve(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        share = carry[0] / 2
        there = expect(_between(frozen, target, share)).objective
        return share, lax.stop_gradient(there)

    # no derivative passes through the search: at a fixed point the whole step is taken
    share, _ = lax.while_loop(falls, halve, (jnp.ones_like(before), after))
    whole = share == 1
    return lax.cond(
        eqxi.unvmap_all(whole),  # all lanes of a vmap take one branch
        lambda: new,
        lambda: expect(_between(old.model, new.model, share)),
    )


def _between(start: Any, end: Any, share: Array) -> Any:
    """The point `share` of the way from one model to another of the same structure."""
    return jax.tree.map(lambda a, b: jnp.where(share == 1, b, a + share * (b - a)), start, end)
