"""The most probable path of `Segments` s, and the probability of a path."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxem.latents._chain_blocks import accurate_sum


def viterbi(s: Any) -> Int[Array, " t"]:
    """The most probable path, by scores of the best paths into each state and time spent there."""

    def step(score: Array, here: Any) -> tuple[Array, tuple[Array, Array]]:  # (k, D), time spent
        log_b, counts = here
        ended = score + s.duration
        spent = lax.argmax(ended, 1, jnp.int32)
        ways = jnp.max(ended, axis=1)[:, None] + s.transition
        origin = lax.argmax(ways, 0, jnp.int32)
        following = jnp.concatenate([jnp.max(ways, axis=0)[:, None], score[:, :-1]], axis=1)
        following = following + log_b[:, None]
        top = jnp.max(following)
        following = following - jnp.where(jnp.isfinite(top), top, 0)
        return jnp.where(counts, following, score), (origin, spent)

    start = jnp.full_like(s.duration, -jnp.inf).at[:, 0].set(s.initial + s.log_prob[0])
    score, (origin, spent) = lax.scan(step, start, (s.log_prob[1:], s.within[1:]))
    last = lax.argmax((score + _log_survival(s.duration)).reshape(-1), 0, jnp.int32)

    def back(carry: tuple[Array, Array], here: Any) -> tuple[tuple[Array, Array], Array]:
        z, time = carry
        origin, spent, counts = here
        entered, before = counts & (time == 0), origin[z]
        time = jnp.where(entered, spent[before], time - counts)
        return (jnp.where(entered, before, z), time), z

    longest = s.duration.shape[1]
    steps = (origin, spent, s.within[1:])
    (first, _), path = lax.scan(back, (last // longest, last % longest), steps, reverse=True)
    return jnp.concatenate([first[None], path])


def log_prob(s: Any, path: Int[Array, " t"]) -> Float[Array, ""]:
    """log p(x, path): the last segment may last on, by the probability that it does."""
    before, t = jnp.roll(path, 1), jnp.arange(len(path))
    begins = s.within & ((t == 0) | (path != before))
    time = t - lax.cummax(jnp.where(begins, t, 0))
    following = jnp.pad(s.within[1:], (0, 1)), jnp.pad(begins[1:], (0, 1))
    parts = (
        (begins & (t == 0), s.initial[path]),
        (begins & (t > 0), s.transition[before, path]),
        (s.within & following[1], s.duration[path, time]),
        (s.within & ~following[0], _log_survival(s.duration)[path, time]),
    )
    log_b = jnp.take_along_axis(s.log_prob, path[:, None], axis=1)[:, 0]
    logs = [jnp.where(counts, log, 0) for counts, log in ((s.within, log_b), *parts)]
    return accurate_sum(jnp.sum(jnp.stack(logs), axis=0))


def _log_survival(duration: Float[Array, "k D"]) -> Float[Array, "k D"]:
    """log P(a segment lasts d steps or more)."""
    survival = lax.cumsum(jnp.exp(duration), axis=1, reverse=True)
    possible = survival > 0
    return jnp.where(possible, jnp.log(jnp.where(possible, survival, 1)), -jnp.inf)
