"""Many steps at once: blocks of steps as linear maps, and sums over long chains: see `chain`."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxem.latents._chain_steps import filter_step, filter_steps, log_increment, push, smooth_step


def in_parallel(log_prob: Array, parallel: bool | None) -> bool:
    return jax.default_backend() != "cpu" and len(log_prob) > 64 if parallel is None else parallel


def _block_size(num_steps: int) -> int:
    """A power of 2 near √(T/2): two passes over a block and one over all blocks are shortest."""
    return 2 ** max(0, round(math.log2(max(num_steps / 2, 1)) / 2))


def _in_blocks(leaf: Array, fill: Array | float = 0.0) -> Array:
    """Steps (t, …) as blocks (c, s, …), the last one filled up."""
    t = leaf.shape[0]
    size = _block_size(t)
    missing = -t % size
    tail = jnp.broadcast_to(jnp.asarray(fill, leaf.dtype), (missing, *leaf.shape[1:]))
    return jnp.concatenate([leaf, tail]).reshape(-1, size, *leaf.shape[1:])


def _flat(leaf: Array, t: int) -> Array:
    return leaf.reshape(-1, *leaf.shape[2:])[:t]


def filter_blocks(initial: Array, transition: Array, steps: Any, dense: Array) -> tuple[Array, ...]:
    log_prob, out_of = steps
    t, eye = log_prob.shape[0], jnp.eye(len(initial), dtype=initial.dtype)
    blocks = _in_blocks(log_prob), None if out_of is None else _in_blocks(out_of, eye)

    def follow(start: Array, block: Any) -> tuple[Array, Array]:
        """Prediction after a block, and log-probability of the block, from one prediction."""

        def step(carry: tuple[Array, Array], here: Any) -> tuple[tuple[Array, Array], None]:
            predicted, total = carry
            log_b, out = here
            filtered, top, sum_here = filter_step(predicted, log_b)
            following = push(filtered, transition if out is None else out)
            return (following, total + log_increment(top, sum_here)), None

        zero = jnp.zeros((), log_prob.dtype)
        return lax.scan(step, (start, zero), block)[0]

    maps = jax.vmap(lambda block: jax.vmap(lambda start: follow(start, block))(eye))(blocks)

    def skip(predicted: Array, block_map: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, log_totals = block_map
        joint, *_ = filter_step(predicted, log_totals)
        return push(joint, rows), predicted

    _, starts = lax.scan(skip, initial, maps)
    run = jax.vmap(lambda start, block: filter_steps(start, transition, block, dense))
    return jax.tree.map(lambda leaf: _flat(leaf, t), run(starts, blocks))


def smooth_blocks(transition: Array, steps: Any) -> tuple[Array, Array]:
    filtered, gain, out_of = steps
    t, k = filtered.shape
    eye = jnp.eye(k, dtype=filtered.dtype)
    # A filled step must leave β as it is. Its gain is one and the transition into it is 1.
    into = (
        jnp.roll(jnp.broadcast_to(transition, (t, k, k)), 1, axis=0) if out_of is not None else None
    )
    filled = jnp.arange(-(-t // _block_size(t)) * _block_size(t)) >= t
    blocks = (
        _in_blocks(filtered, 1 / k),
        _in_blocks(gain, 1.0),
        None if into is None else _in_blocks(into, eye),
        filled.reshape(-1, _block_size(t)),
    )

    def before(after: Array, into: Array | None, filled: Array) -> Array:
        earlier = push(after, (transition if into is None else into).T)
        return jnp.where(filled, after, earlier)

    def follow(block: Any) -> Array:
        """The columns of the map from β after a block to β before it."""

        def step(backward: Array, here: Any) -> tuple[Array, None]:
            _, gain, into, filled = here
            return jax.vmap(lambda b: before(gain * b, into, filled))(backward), None

        return lax.scan(step, eye, block, reverse=True)[0]

    maps = jax.vmap(follow)(blocks)

    def skip(backward: Array, block_map: Array) -> tuple[Array, Array]:
        return push(backward, block_map), backward

    _, ends = lax.scan(skip, jnp.ones(k, filtered.dtype), maps, reverse=True)

    def run(end: Array, block: Any) -> tuple[Array, Array]:
        def step(backward: Array, here: Any) -> tuple[Array, tuple[Array, Array]]:
            filtered, gain, into, filled = here
            smoothed, after = smooth_step(backward, filtered, gain)
            following = jnp.where(filled, backward, before(after, into, filled))
            return following, (smoothed, after)

        return lax.scan(step, end, block, reverse=True)[1]

    return jax.tree.map(lambda leaf: _flat(leaf, t), jax.vmap(run)(ends, blocks))


def accurate_sum(values: Float[Array, " t"]) -> Float[Array, ""]:
    """A sum whose rounding grows with √T/T of a plain one: sums of sums."""
    return jnp.sum(jnp.sum(_in_blocks(values), axis=1))
