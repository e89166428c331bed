"""How far statistics and objective may be off, for no other reason than rounding.

An objective is computed as that of a model whose numbers are off by a few roundings each, another
model for each observation. Rounding therefore matters as much as statistics move when the model's
numbers do, each by the rounding of the largest beside it (the centroid of means, say, is such a
number to all of them), up and down in turn, so that the effects of two never cancel.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxem._core.inputs import InputFrame
from jaxem._core.numerics import ROUNDINGS
from jaxem._core.quadratic import LocalQuadratic
from jaxem._core.statistics import Framed

_SHARE = 1 / 30  # of what statistics move: objectives were off by 17 such shares, at most


def nudged(model: Any) -> Any:
    """The model with each number off by its own rounding."""
    return _changed(model, lambda leaf: leaf)


def jittered(model: Any) -> Any:
    """The model with each number off by the rounding of the largest along its leading axis."""

    def change(leaf: Array) -> Array:
        size = jnp.max(jnp.abs(leaf), axis=0, keepdims=True) if leaf.ndim else jnp.abs(leaf)
        return size * _signs(leaf.shape).astype(leaf.dtype)

    return _changed(model, change)


def _changed(model: Any, change: Callable[[Array], Array]) -> Any:
    """The model with roundings of `change` added, of a frame those that make sums coarse."""

    def share(node: Any) -> Any:
        return node.roundings() if isinstance(node, InputFrame) else jnp.ones_like(node)

    def one(leaf: Array, share: Array) -> Array:
        return leaf + jnp.finfo(leaf.dtype).eps * share * change(leaf)

    shares = jax.tree.map(share, model, is_leaf=lambda node: isinstance(node, InputFrame))
    return jax.tree.map(one, model, shares)


def rounding(
    objective: Float[Array, ""], total: Any, moved: Float[Array, ""] | float
) -> Float[Array, ""]:
    """A usual error of the objective, where jittering moves statistics by so much."""
    return jnp.finfo(objective.dtype).eps * (jnp.abs(objective) + total) + _SHARE * moved


def moved_by_rounding(statistics: Framed) -> Float[Array, ""]:
    """How far jittering moves statistics about their own frame."""
    return gap(statistics.at(jittered(statistics.frame)).sums, statistics.sums)


def gap(sums: Any, others: Any) -> Float[Array, ""]:
    """The largest difference between two sums of one structure."""
    gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), sums, others)
    return jnp.max(jnp.stack(jax.tree.leaves(gaps)))


def distance(sums: Any, others: Any, total: Any) -> Float[Array, ""]:
    """How far apart two sums of one structure are, of so many observations.

    Values of a quadratic differ by the square of a distance in the metric of its curvature, where
    either is near its maximum: where it is flat the way can be long.
    """

    def apart(a: Any, b: Any) -> Float[Array, ""]:
        if not isinstance(a, LocalQuadratic):
            return gap(a, b)
        noise = ROUNDINGS * jnp.finfo(a.value.dtype).eps * (jnp.abs(a.value) + jnp.abs(b.value))
        square = jnp.maximum(jnp.abs(a.value - b.value) - noise, 0)
        return jnp.maximum(jnp.sqrt(total * square), gap(a._replace(value=b.value), b))

    parts = jax.tree.map(apart, sums, others, is_leaf=lambda s: isinstance(s, LocalQuadratic))
    return jnp.max(jnp.stack(jax.tree.leaves(parts)))


def _signs(shape: tuple[int, ...]) -> np.ndarray:
    """A sequence of ±1 without a period, so that no pattern of parameters goes with it."""
    turns = np.arange(np.prod(shape, dtype=int)) * 0.5 * (1 + 5**0.5)
    return np.where(turns % 1 < 0.5, 1.0, -1.0).reshape(shape)
