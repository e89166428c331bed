"""Messages along one sequence of segments, each with a duration of its own: see `HSMM`."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxem import chain


class Segments(NamedTuple):
    """A sequence as it is seen through the likelihoods of its steps."""

    initial: Any  # (k,)
    transition: Any  # (k, k)
    duration: Any  # (k, D)
    log_prob: Any  # (t, k)
    within: Any  # (t,), which steps there are


SHARED = Segments(None, None, None, 0, 0)


def log_likelihood(s: Segments) -> Float[Array, ""]:
    """log p(x) = Σ log cₜ + log Σ α: with the scales cₜ held, derivatives of any order are exact.

    Those of a scale would be divided by its square, which vanishes where the data surprise.
    """
    least = jnp.finfo(s.log_prob.dtype).tiny / jnp.finfo(s.log_prob.dtype).eps

    def see(predicted: Array, log_b: Array) -> tuple[Array, Array]:  # (k, D), steps left
        # What can hardly be reached has no derivative: it would be the inverse of that chance.
        reached = predicted > least
        top = jnp.max(jnp.where(jnp.any(reached, axis=1), log_b, -jnp.inf))
        top = lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0))
        joint = jnp.where(reached, predicted * chain.relative_likelihood(log_b, top)[:, None], 0)
        total = lax.stop_gradient(jnp.sum(joint))
        return joint / chain.positive(total), chain.log_increment(top, total)

    def step(filtered: Array, here: Any) -> tuple[Array, Array]:
        log_b, counts = here
        entered = chain.push(filtered[:, 0], s.transition)[:, None] * s.duration
        following, increment = see(entered + jnp.pad(filtered[:, 1:], ((0, 0), (0, 1))), log_b)
        return jnp.where(counts, following, filtered), jnp.where(counts, increment, 0)

    # Derivatives keep what was filtered alone and repeat the rest: to write costs more time.
    step = jax.checkpoint(step)  # pyright: ignore[reportPrivateImportUsage]
    start, first = see(s.initial[:, None] * s.duration, s.log_prob[0])
    last, increments = lax.scan(step, start, (s.log_prob[1:], s.within[1:]))
    total = jnp.sum(last)
    value = first + chain.accurate_sum(increments) + jnp.log(jnp.where(total > 0, total, 1))
    return jnp.where(s.within[0], value, 0)


def smoothed(s: Segments) -> Float[Array, "t k"]:
    states = jax.grad(lambda log_b: log_likelihood(s._replace(log_prob=log_b)))(s.log_prob)
    return jnp.where(s.within[:, None], states, 0)


def best_path(s: Segments) -> tuple[Int[Array, " t"], Float[Array, ""]]:
    path = _viterbi(jax.tree.map(lax.stop_gradient, s))
    return path, _log_prob_of_path(s, path)


def _viterbi(s: Segments) -> Int[Array, " t"]:
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


def _log_prob_of_path(s: Segments, path: Int[Array, " t"]) -> Float[Array, ""]:
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
    return chain.accurate_sum(jnp.sum(jnp.stack(logs), axis=0))


def _survival(duration: Float[Array, "k D"]) -> Float[Array, "k D"]:
    """P(a segment lasts d steps or more)."""
    return lax.cumsum(duration, axis=1, reverse=True)
