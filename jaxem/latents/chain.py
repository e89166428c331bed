"""Inference in a finite Markov chain that is seen through likelihoods.

Pure functions of one chain of T steps and K states; `jax.vmap` makes them functions of many:

- `initial` (K,), the probabilities of the first state;
- `transition` (K, K), rows summing to one, or (T, K, K), where `transition[t]` leads from step t
  to step t + 1 and the last one is not used;
- `log_prob` (T, K), log p(xₜ | zₜ = k); a row of zeros is a step that was not observed.

Filter. Probabilities are scaled at every step, by the largest likelihood among the states that
can be reached and then to a sum of one:

    pₜ = Aᵀ fₜ₋₁,    fₜ = pₜ ∘ lₜ / cₜ,    cₜ = Σ pₜ ∘ lₜ,    log p(x) = Σ log cₜ.

Zeros of the transition matrix stay exact, and values and derivatives are finite beside them: no
logarithm of a probability is taken. Such scaling fails for a state whose probability falls below
the smallest number of the dtype (e⁻⁸⁷, in float64 e⁻⁷⁰⁸) and that later proves to be the true one,
since zeros let no other state take its place. Where a probability underflows and transitions are
that small, the filter is run again in logarithms, and where the two differ, logarithms are smoothed
too, one step after the other. With gains gₜ = lₜ / cₜ the smoother is

    βₜ₋₁ = A (gₜ ∘ βₜ),    P(zₜ | x) = fₜ ∘ βₜ,    P(zₜ₋₁, zₜ | x) = A ∘ (fₜ₋₁ ⊗ (gₜ ∘ βₜ)),

so that expected transitions sum up to A ∘ a product of two (T, K) matrices.

In parallel. A block of steps is a linear map, whose rows are filters that start in each state:
maps of all blocks are found at once, chained, and the blocks then filtered at once. That is a
path of about 3 √T steps instead of T, for K times the arithmetic.

Rabiner (1989), Proc. IEEE 77; Särkkä & García-Fernández (2021), IEEE Trans. Autom. Control 66.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxem.latents._chain_blocks import accurate_sum, filter_blocks, in_parallel, smooth_blocks
from jaxem.latents._chain_logs import filter_logs, filtered_logs, smooth_logs
from jaxem.latents._chain_steps import filter_steps, negligible, push, smooth_steps
from jaxem.latents._stationary import stationary as stationary


class Filtered(NamedTuple):
    """The filter: each step given the steps up to it.

    - `log_likelihood`: log p(x), −inf if no state can have produced some step.
    - `filtered` (t, k): P(zₜ | x₁ … xₜ); zeros from an impossible step on.
    - `gain` (t, k): p(xₜ | zₜ) / p(xₜ | x₁ … xₜ₋₁).
    - `log_increments` (t,): log p(xₜ | x₁ … xₜ₋₁), the one-step predictive densities.
    - `log_filtered` (t, k): log P(zₜ | x₁ … xₜ), finite where the probability underflows and that
      matters later.
    """

    log_likelihood: Float[Array, ""]
    filtered: Float[Array, "t k"]
    gain: Float[Array, "t k"]
    log_increments: Float[Array, " t"]
    log_filtered: Float[Array, "t k"]


class Smoothed(NamedTuple):
    """The smoother: each step given all of them.

    - `log_likelihood`: log p(x).
    - `smoothed` (t, k): P(zₜ | x).
    - `before`, `after` (t, k): P(zₜ₋₁ = i, zₜ = j | x) = before[t−1, i] · Aᵢⱼ · after[t, j].
    - `moved`: expected transitions to be added to those, the sum (k, k) or each step's (t, k, k):
      all of them where scaled probabilities lose a path; None for 0.
    - `ratio`: a factor of Aᵢⱼ above, if other transitions than A were smoothed; None for 1.
    """

    log_likelihood: Float[Array, ""]
    smoothed: Float[Array, "t k"]
    before: Float[Array, "t k"]
    after: Float[Array, "t k"]
    moved: Array | None = None
    ratio: Array | None = None


def filtering(
    initial: Float[Array, " k"],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
    log_prob: Float[Array, "t k"],
    *,
    parallel: bool | None = None,
) -> Filtered:
    """The filter: P(zₜ | x₁ … xₜ) and log p(x).

    **Arguments:** as above; `parallel` in time or not, default: on accelerators, for long chains.
    """
    found, doubtful = _filter(initial, transition, log_prob, parallel)
    increments, predicted = lax.cond(
        doubtful,
        jax.checkpoint(filter_logs),  # pyright: ignore[reportPrivateImportUsage]
        lambda *given: (found.log_increments, jnp.zeros_like(given[-1])),
        *(initial, transition, log_prob),
    )
    logs = filtered_logs(predicted, log_prob, increments)
    gain = jnp.where(logs > -jnp.inf, jnp.exp(logs - predicted), 0)
    return Filtered(
        accurate_sum(increments),
        jnp.where(doubtful, jnp.exp(logs), found.filtered),
        jnp.where(doubtful, gain, found.gain),
        increments,
        jnp.where(doubtful, logs, found.log_filtered),
    )


def _filter(
    initial: Array, transition: Array, log_prob: Array, parallel: bool | None
) -> tuple[Filtered, Bool[Array, ""]]:
    """The filter in scaled probabilities, and whether it may have lost a path in any lane."""
    steps = (log_prob, transition) if transition.ndim == 3 else (log_prob, None)
    run = filter_blocks if in_parallel(log_prob, parallel) else filter_steps
    dense = jnp.min(transition) >= negligible(transition) / jnp.finfo(transition.dtype).eps
    filtered, gain, increments, underflowed = run(initial, transition, steps, dense)
    value = accurate_sum(increments)
    found = Filtered(value, filtered, gain, increments, jnp.log(filtered))
    return found, eqxi.unvmap_any(jnp.any(underflowed) & ~dense)


def smoothing(
    initial: Float[Array, " k"],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
    log_prob: Float[Array, "t k"],
    *,
    length: Int[Array, ""] | int | None = None,
    parallel: bool | None = None,
) -> Smoothed:
    """The forward–backward algorithm: P(zₜ | x), and what P(zₜ₋₁, zₜ | x) is made of.

    **Arguments:** as above; `length`, the number of steps that count: what is returned of others
    has no meaning.
    """
    forward, doubtful = _filter(initial, transition, log_prob, parallel)

    def in_logarithms(initial: Array, transition: Array, log_prob: Array, _: Any) -> Any:
        within = jnp.arange(len(log_prob)) < (len(log_prob) if length is None else length)
        increments, predicted = filter_logs(initial, transition, log_prob)
        logs = filtered_logs(predicted, log_prob, increments)
        smoothed, moved = smooth_logs(transition, predicted, logs, within)
        return accurate_sum(increments), smoothed, jnp.zeros_like(smoothed), moved

    def in_probabilities(initial: Array, transition: Array, log_prob: Array, found: Any) -> Any:
        steps = (found.filtered, found.gain, transition if transition.ndim == 3 else None)
        run = smooth_blocks if in_parallel(log_prob, parallel) else smooth_steps
        return found.log_likelihood, *run(transition, steps), jnp.zeros_like(transition)

    value, smoothed, after, moved = lax.cond(
        doubtful,
        jax.checkpoint(in_logarithms),  # pyright: ignore[reportPrivateImportUsage]
        in_probabilities,
        *(initial, transition, log_prob, forward),
    )
    return Smoothed(value, smoothed, forward.filtered, after, moved)


def log_likelihood(
    initial: Float[Array, " k"],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
    log_prob: Float[Array, "t k"],
    *,
    parallel: bool | None = None,
) -> Float[Array, ""]:
    """log p(x)."""
    return filtering(initial, transition, log_prob, parallel=parallel).log_likelihood


def viterbi(
    initial: Float[Array, " k"],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
    log_prob: Float[Array, "t k"],
    *,
    length: Int[Array, ""] | int | None = None,
    num_paths: int = 1,
) -> tuple[Int[Array, "paths t"], Float[Array, " paths"]]:
    """The most probable paths z, best first, and log p(x, z) of each.

    **Arguments:** `length`, the number of steps that count: the last of them is repeated beyond;
    `num_paths`, how many paths. Where fewer are possible the log-probability is −inf.

    Viterbi (1967), IEEE Trans. Inf. Theory 13; Forney (1973), Proc. IEEE 61; Seshadri & Sundberg
    (1994), IEEE Trans. Commun. 42 (lists).
    """
    steps, k = log_prob.shape
    length = steps if length is None else length
    log_initial, log_transition = jnp.log(initial), jnp.log(transition)
    blank = jnp.full((k, num_paths - 1), -jnp.inf, log_prob.dtype)
    start = jnp.concatenate([(log_initial + log_prob[0])[:, None], blank], axis=1)

    def forward(carry: tuple[Array, Array], step: Any) -> tuple[tuple[Array, Array], Array]:
        score, total = carry  # best scores of paths into each state, less their maximum
        t, log_b, into = step
        into = log_transition if into is None else into
        candidates = score[:, :, None] + into[:, None, :]
        best, origin = _largest(candidates.reshape(k * num_paths, k).T, num_paths)
        best = best + log_b[:, None]
        top = jnp.max(best)
        top = jnp.where(jnp.isfinite(top), top, 0)
        here = jnp.arange(k * num_paths, dtype=jnp.int32).reshape(k, num_paths)
        going = t < length
        carry = jnp.where(going, best - top, score), total + jnp.where(going, top, 0)
        return carry, jnp.where(going, origin, here)

    into = log_transition[:-1] if transition.ndim == 3 else None
    following = (jnp.arange(1, steps), log_prob[1:], into)
    (score, total), origins = lax.scan(forward, (start, jnp.zeros((), start.dtype)), following)
    best, last = _largest(score.reshape(1, -1), num_paths)

    def trace(place: Array, origin: Array) -> tuple[Array, Array]:
        return origin.reshape(-1)[place], place

    first, places = lax.scan(trace, last[0], origins, reverse=True)
    paths = jnp.concatenate([first[None], places]).T // num_paths
    return paths, best[0] + total


def sample_path(
    key: Array,
    log_filtered: Float[Array, "t k"],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
) -> Int[Array, " t"]:
    """One draw of z given x, backwards from the filter; −1 at and before steps it cannot explain.

    Carter & Kohn (1994), Biometrika 81; Scott (2002), JASA 97.
    """
    noise = jax.random.gumbel(key, log_filtered.shape, log_filtered.dtype)
    last = _drawn(log_filtered[-1], noise[-1])

    def back(later: Array, step: Any) -> tuple[Array, Array]:
        log_f, gumbel, out_of = step
        out_of = transition if out_of is None else out_of
        z = jnp.where(later < 0, -1, _drawn(log_f + jnp.log(out_of[:, later]), gumbel))
        return z, z

    out_of = transition[:-1] if transition.ndim == 3 else None
    _, path = lax.scan(back, last, (log_filtered[:-1], noise[:-1], out_of), reverse=True)
    return jnp.concatenate([path, last[None]])


def _drawn(log_probabilities: Float[Array, " k"], gumbel: Float[Array, " k"]) -> Array:
    score = log_probabilities + gumbel
    return jnp.where(jnp.max(score) > -jnp.inf, jnp.argmax(score), -1)


def of_path(
    path: Int[Array, " t"],
    log_likelihood: Float[Array, ""],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
) -> Smoothed:
    """The smoother of a posterior that has all its mass on one path."""
    k = transition.shape[-1]
    states = (path[:, None] == jnp.arange(k)).astype(transition.dtype)
    steps = jnp.broadcast_to(transition, (len(path), k, k)) if transition.ndim == 2 else transition
    taken = jnp.roll(steps, 1, axis=0)[jnp.arange(len(path)), jnp.roll(path, 1), path]
    inverse = jnp.where(taken > 0, 1 / jnp.where(taken > 0, taken, 1), 0)
    return Smoothed(log_likelihood, states, states, states * inverse[:, None])


def forecast(
    state: Float[Array, " k"], transition: Float[Array, "k k"], num_steps: int
) -> Float[Array, "h k"]:
    """State probabilities 1 … `num_steps` steps after a step whose state has those of `state`."""

    def step(now: Array, _: None) -> tuple[Array, Array]:
        following = push(now, transition)
        return following, following

    return lax.scan(step, state, length=num_steps)[1]


def _largest(rows: Float[Array, "r c"], count: int) -> tuple[Array, Array]:
    """The largest entries of each row and where they stand, the first among equals."""
    if count == 1:
        first = lax.argmax(rows, 1, jnp.int32)
        return jnp.max(rows, axis=1, keepdims=True), first[:, None]
    largest, places = lax.top_k(rows, count)
    return largest, places
