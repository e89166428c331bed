"""Chains in logarithms, each state with a scale of its own: see `chain`.

From the filter fₜ, P(zₜ₋₁ | zₜ, x₁ … xₜ₋₁) ∝ fₜ₋₁ ⊗ A leads from P(zₜ | x) back to P(zₜ₋₁ | x). The
logarithm of zero is a finite number here, so that no value and no derivative meets ∞ − ∞.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float


def filter_logs(
    initial: Array, transition: Array, log_prob: Array
) -> tuple[Float[Array, " t"], Float[Array, "t k"]]:
    """Log-increments, and log P(zₜ | x₁ … xₜ₋₁)."""
    zero, log_transition = log_zero(log_prob), _log(transition)

    def step(predicted: Array, here: Any) -> tuple[Array, tuple[Array, Array]]:
        log_b, moves = here
        top = jnp.max(lax.stop_gradient(predicted + log_b))
        impossible = top < zero / 2  # a NaN stays one
        top = jnp.where(impossible, 0, top)
        joint = predicted + (jnp.maximum(log_b, zero) - top)  # first, since both may be large
        total = log_sum(joint)
        filtered = jnp.maximum(joint - jnp.where(impossible, 0, total), zero)
        following = log_sum(filtered[:, None] + (log_transition if moves is None else moves))
        return following, (jnp.where(impossible, -jnp.inf, top + total), predicted)

    steps = log_prob, log_transition if transition.ndim == 3 else None
    return lax.scan(step, _log(initial), steps)[1]


def filtered_logs(
    predicted: Float[Array, "t k"], log_prob: Float[Array, "t k"], increments: Float[Array, " t"]
) -> Float[Array, "t k"]:
    """log P(zₜ | x₁ … xₜ)."""
    zero, given = log_zero(predicted), increments[:, None]
    relative = jnp.maximum(log_prob, zero) - jnp.where(given > -jnp.inf, given, 0)
    joint = predicted + relative
    impossible = (given == -jnp.inf) | (joint < zero / 2)
    total = jax.vmap(log_sum)(joint)[:, None]  # log 1 to the rounding of large increments
    return jnp.where(impossible, -jnp.inf, joint - total)


def smooth_logs(
    transition: Array,
    predicted: Float[Array, "t k"],
    filtered: Float[Array, "t k"],
    within: Bool[Array, " t"],
) -> tuple[Float[Array, "t k"], Array]:
    """P(zₜ | x), and expected transitions within: the sum of all, or those of each step."""
    zero, moves = log_zero(predicted), _log(transition)

    def origin(filtered: Array, predicted: Array, moves: Array) -> Float[Array, "k k"]:
        """P(zₜ₋₁ | zₜ, x₁ … xₜ₋₁)."""
        return jnp.exp(jnp.minimum(filtered[:, None] + moves - predicted, 0))

    def step(later: Array, here: Any) -> tuple[Array, Array]:
        before, predicted, own = here
        return jnp.sum(origin(before, predicted, moves if own is None else own) * later, 1), later

    earlier = jnp.maximum(jnp.concatenate([filtered[:1], filtered[:-1]]), zero)
    each: Any = None if transition.ndim == 2 else jnp.roll(moves, 1, axis=0)
    steps = earlier, predicted, each
    smoothed = lax.scan(step, jnp.exp(filtered[-1]), steps, reverse=True)[1]
    counted = smoothed * within.at[0].set(False)[:, None]
    if each is None:
        pairs = jax.vmap(origin, (0, 0, None))(earlier, predicted, moves) * counted[:, None]
        return smoothed, jnp.sum(pairs, axis=0)
    return smoothed, jnp.roll(jax.vmap(origin)(*steps) * counted[:, None], -1, axis=0)


def log_zero(like: Array) -> float:
    """What stands for log 0: a few of them do not overflow, and nothing else is that small."""
    return -float(jnp.finfo(like.dtype).max) / 8


def _log(probability: Array) -> Array:
    least = jnp.finfo(probability.dtype).tiny
    logs = jnp.log(jnp.maximum(probability, least))
    return jnp.where(probability > 0, logs, log_zero(probability))


def log_sum(terms: Array) -> Array:
    """log Σ exp along the first axis."""
    top = jnp.max(lax.stop_gradient(terms), axis=0)
    return top + jnp.log(jnp.sum(jnp.exp(terms - top), axis=0))
