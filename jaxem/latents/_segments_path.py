"""The most probable path of segments, and the probability of a path: see `Segments`.

A semi-Markov chain `s` is given by its probabilities `initial`, `transition`, `duration`, by the
`log_prob` of its steps and by `within`, which steps there are.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxem.latents._chain_blocks import accurate_sum


def viterbi(s: Any) -> Int[Array, " t"]:
    """The most probable path, by scores of the best paths into each state and time spent there."""
    log_matrix, log_duration = jnp.log(s.transition), jnp.log(s.duration)

    def step(score: Array, here: Any) -> tuple[Array, tuple[Array, Array]]:  # (k, D), time spent
        log_b, counts = here
        ended = score + log_duration
        spent = lax.argmax(ended, 1, jnp.int32)
        ways = jnp.max(ended, axis=1)[:, None] + log_matrix
        origin = lax.argmax(ways, 0, jnp.int32)
        following = jnp.concatenate([jnp.max(ways, axis=0)[:, None], score[:, :-1]], axis=1)
        following = following + log_b[:, None]
        top = jnp.max(following)
        following = following - jnp.where(jnp.isfinite(top), top, 0)
        return jnp.where(counts, following, score), (origin, spent)

    start = jnp.full_like(log_duration, -jnp.inf)
    start = start.at[:, 0].set(jnp.log(s.initial) + s.log_prob[0])
    score, (origin, spent) = lax.scan(step, start, (s.log_prob[1:], s.within[1:]))
    last = lax.argmax((score + jnp.log(_survival(s.duration))).reshape(-1), 0, jnp.int32)

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
        (s.within & ~following[0], _survival(s.duration)[path, time]),
    )
    log_b = jnp.take_along_axis(s.log_prob, path[:, None], axis=1)[:, 0]
    logs = [jnp.where(s.within, log_b, 0)]
    for counts, probability in parts:
        possible = probability > 0
        log = jnp.where(possible, jnp.log(jnp.where(possible, probability, 1)), -jnp.inf)
        logs.append(jnp.where(counts, log, 0))
    return accurate_sum(jnp.sum(jnp.stack(logs), axis=0))


def _survival(duration: Float[Array, "k D"]) -> Float[Array, "k D"]:
    """P(a segment lasts d steps or more)."""
    return lax.cumsum(duration, axis=1, reverse=True)
