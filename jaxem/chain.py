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
logarithm of a probability is taken. What such scaling cannot hold is a state whose probability
falls below the smallest number of the dtype (e⁻⁸⁷, in float64 e⁻⁷⁰⁸) and that yet turns out to
be the true one, since zeros let no other state take its place. Where a probability vanished and
transitions are that small the filter is run again in logarithms; steps at which the two differ
are NaN, and so is log p(x). With gains gₜ = lₜ / cₜ the smoother is

    βₜ₋₁ = A (gₜ ∘ βₜ),    P(zₜ | x) = fₜ ∘ βₜ,    P(zₜ₋₁, zₜ | x) = A ∘ (fₜ₋₁ ⊗ (gₜ ∘ βₜ)),

so that expected transitions sum up to A ∘ a product of two (T, K) matrices.

In parallel. A block of steps is a linear map, whose rows are filters that start in each state:
maps of all blocks are found at once, chained, and the blocks then filtered at once. That is a
path of about 3 √T steps instead of T, for K times the arithmetic.

Rabiner (1989), Proc. IEEE 77; Särkkä & García-Fernández (2021), IEEE Trans. Autom. Control 66.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxem import _linalg as la


class Filtered(NamedTuple):
    """What is known of each step from the steps up to it.

    - `log_likelihood`: log p(x), −inf if no state can have produced some step, NaN if the dtype
      cannot tell.
    - `filtered` (t, k): P(zₜ | x₁ … xₜ); zeros from an impossible step on.
    - `gain` (t, k): p(xₜ | zₜ) / p(xₜ | x₁ … xₜ₋₁).
    - `log_increments` (t,): log p(xₜ | x₁ … xₜ₋₁), the one-step predictive densities.
    """

    log_likelihood: Float[Array, ""]
    filtered: Float[Array, "t k"]
    gain: Float[Array, "t k"]
    log_increments: Float[Array, " t"]


class Smoothed(NamedTuple):
    """What is known of each step from all of them.

    - `log_likelihood`: log p(x).
    - `smoothed` (t, k): P(zₜ | x).
    - `before`, `after` (t, k): P(zₜ₋₁ = i, zₜ = j | x) = before[t−1, i] · Aᵢⱼ · after[t, j].
    - `ratio`: what Aᵢⱼ is multiplied by there, if the chain that was smoothed has transitions of
      its own; None for 1.
    """

    log_likelihood: Float[Array, ""]
    smoothed: Float[Array, "t k"]
    before: Float[Array, "t k"]
    after: Float[Array, "t k"]
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
    steps = (log_prob, transition) if transition.ndim == 3 else (log_prob, None)
    run = _filter_blocks if _in_parallel(log_prob, parallel) else _filter_steps
    dense = jnp.min(transition) >= _negligible(transition)
    filtered, gain, increments, faded = run(initial, transition, steps, dense)
    lossy = jnp.any(faded) & ~dense
    wrong = _differs_in_logarithms(initial, transition, log_prob, increments, lossy)
    increments = jnp.where(wrong, jnp.nan, increments)
    filtered = jnp.where(wrong[:, None], jnp.nan, filtered)
    return Filtered(accurate_sum(increments), filtered, gain, increments)


def smoothing(
    initial: Float[Array, " k"],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
    log_prob: Float[Array, "t k"],
    *,
    parallel: bool | None = None,
) -> Smoothed:
    """The forward–backward algorithm: P(zₜ | x), and the factors of P(zₜ₋₁, zₜ | x)."""
    forward = filtering(initial, transition, log_prob, parallel=parallel)
    steps = (forward.filtered, forward.gain, transition if transition.ndim == 3 else None)
    run = _smooth_blocks if _in_parallel(log_prob, parallel) else _smooth_steps
    smoothed, after = run(transition, steps)
    return Smoothed(forward.log_likelihood, smoothed, forward.filtered, after)


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
    filtered: Float[Array, "t k"],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
) -> Int[Array, " t"]:
    """One draw of z given x, backwards from the filter; −1 at and before steps it cannot explain.

    Carter & Kohn (1994), Biometrika 81; Scott (2002), JASA 97.
    """
    noise = jax.random.gumbel(key, filtered.shape, filtered.dtype)
    log_filtered = jnp.log(filtered)
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


def along(
    path: Int[Array, " t"],
    log_likelihood: Float[Array, ""],
    transition: Float[Array, "k k"] | Float[Array, "t k k"],
) -> Smoothed:
    """A posterior that is certain of one path, in the form of the smoother's."""
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


def stationary(transition: Float[Array, "k k"]) -> Float[Array, " k"]:
    """The stationary distribution δ = δ A of an irreducible chain: δ (I − A + 1) = 1."""
    k = transition.shape[0]
    eye = jnp.eye(k, dtype=transition.dtype)
    return jnp.sum(la.inverse(eye - transition + 1), axis=0)


# One step


def push(state: Float[Array, " k"], transition: Float[Array, "k k"]) -> Float[Array, " k"]:
    """State probabilities one step on. Small sums join the loop's other work, unlike products."""
    if transition.shape[0] > 16:
        return la.matmul(state, transition)
    return jnp.sum(state[:, None] * transition, axis=0)


def _filter_step(predicted: Array, log_b: Array) -> tuple[Array, Array, Array]:
    """Filtered probabilities, and scale and sum of the joint probabilities of one step.

    The scale is the largest likelihood among states that can be reached: one that cannot must
    not make the others vanish. (Few operations: on CPU their number is the time that this takes.)
    """
    top = lax.stop_gradient(jnp.max(jnp.where(predicted > 0, log_b, -jnp.inf)))
    top = jnp.where(top > -jnp.inf, top, 0)
    joint = predicted * relative_likelihood(log_b, top)
    total = jnp.sum(joint)
    return _over(joint, positive(total)), top, total


@jax.custom_jvp
def _over(a: Array, b: Array) -> Array:
    """a / b, whose derivative divides by b twice instead of by b², which may underflow."""
    return a / b


@_over.defjvp
def _over_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    (a, b), (a_dot, b_dot) = primals, tangents
    ratio = _over(a, b)
    return ratio, _over(a_dot - ratio * b_dot, b)


def relative_likelihood(log_b: Array, top: Array) -> Array:
    # At most 0 where a state can be reached. The bound is 1 because 0 would be a tie for the
    # likeliest state, at which half of its derivative is lost.
    return jnp.exp(jnp.minimum(log_b - top, 1))


def positive(total: Array) -> Array:
    """The total, or where it is zero a number that divides the zeros it sums.

    Not a small one: derivatives are multiplied by its inverse.
    """
    return jnp.where(total > 0, total, 1)


def log_increment(top: Array, total: Array) -> Array:
    impossible = total <= 0  # a NaN stays one
    return top + jnp.where(impossible, -jnp.inf, jnp.log(jnp.where(impossible, 1, total)))


def _filter_steps(initial: Array, transition: Array, steps: Any, dense: Array) -> tuple[Array, ...]:
    """Filtered probabilities, gains and log-increments of all steps, and where one faded.

    The loop keeps predictions alone; the rest is found from them for all steps at once.
    """
    log_prob, _ = steps
    predicted = lax.cond(
        eqxi.unvmap_all(dense),  # all lanes of a vmap take one branch
        _predictions_of_dense,
        _predictions,
        *(initial, transition, steps),
    )
    filtered, top, total = jax.vmap(_filter_step)(predicted, log_prob)
    # A state that cannot be reached has no gain: along it β would grow without bound.
    likelihood = jnp.where(filtered > 0, relative_likelihood(log_prob, top[:, None]), 0)
    gain = _over(likelihood, positive(total)[:, None])
    small = (filtered < _negligible(filtered)) & (log_prob > -jnp.inf)
    faded = jnp.any((predicted > 0) & small, axis=1)
    return filtered, gain, log_increment(top, total), faded


def _predictions(initial: Array, transition: Array, steps: Any) -> Float[Array, "t k"]:
    def step(predicted: Array, here: Any) -> tuple[Array, Array]:
        log_b, out_of = here
        filtered, *_ = _filter_step(predicted, log_b)
        return push(filtered, transition if out_of is None else out_of), predicted

    return lax.scan(step, initial, steps)[1]


def _predictions_of_dense(initial: Array, transition: Array, steps: Any) -> Float[Array, "t k"]:
    """The same where every state can be reached from every other: half the work in the loop.

    The likeliest state of all then never has a prediction so small that others would vanish
    beside it, and likelihoods are taken relative to it before the loop.
    """
    log_prob, out_of = steps
    log_prob = log_prob.at[0].set(jnp.where(initial > 0, log_prob[0], -jnp.inf))
    top = lax.stop_gradient(jnp.max(log_prob, axis=1, keepdims=True))
    likelihood = relative_likelihood(log_prob, jnp.where(top > -jnp.inf, top, 0))

    def step(predicted: Array, here: Any) -> tuple[Array, Array]:
        likelihood, out_of = here
        joint = predicted * likelihood
        filtered = _over(joint, positive(jnp.sum(joint)))
        return push(filtered, transition if out_of is None else out_of), predicted

    return lax.scan(step, initial, (likelihood, out_of))[1]


def _negligible(probability: Array) -> float:
    """Twice this small would be too small for the dtype."""
    return float(jnp.finfo(probability.dtype).tiny) ** 0.5


def _differs_in_logarithms(
    initial: Array, transition: Array, log_prob: Array, increments: Array, possible: Array
) -> Array:
    """Steps whose log-increments lack paths through a state whose probability vanished.

    Nothing is run where none are `possible`: if no state vanished, or each can be reached from all
    the others with no tiny probability. All lanes of a vmap take one branch.
    """
    operands = jax.tree.map(lax.stop_gradient, (initial, transition, log_prob, increments))
    exact = lax.cond(
        eqxi.unvmap_any(possible),
        lambda initial, transition, log_prob, _: _filter_logs(initial, transition, log_prob),
        lambda *operands: operands[-1],
        *operands,
    )
    scaled = operands[-1]
    close = jnp.abs(exact - scaled) <= jnp.finfo(scaled.dtype).eps ** 0.5 * (1 + jnp.abs(exact))
    return possible & ~(close | (exact == scaled) | jnp.isnan(exact))


def _filter_logs(initial: Array, transition: Array, log_prob: Array) -> Array:
    """Log-increments by logarithms of probabilities, each state with a scale of its own."""

    def step(log_predicted: Array, here: Any) -> tuple[Array, Array]:
        log_b, out_of = here
        joint = log_predicted + log_b
        increment = jax.nn.logsumexp(joint)
        possible = increment > -jnp.inf
        log_filtered = jnp.where(possible, joint - jnp.where(possible, increment, 0), -jnp.inf)
        into = log_transition if out_of is None else jnp.log(out_of)
        return jax.nn.logsumexp(log_filtered[:, None] + into, axis=0), increment

    log_transition = jnp.log(transition)
    steps = (log_prob, transition) if transition.ndim == 3 else (log_prob, None)
    return lax.scan(step, jnp.log(initial), steps)[1]


def _smooth_step(backward: Array, filtered: Array, gain: Array) -> tuple[Array, Array]:
    """P(zₜ | x) and gₜ ∘ βₜ, scaled so that the former sums to one."""
    joint = filtered * backward
    total = positive(lax.stop_gradient(jnp.sum(joint)))  # one, to rounding
    return joint / total, gain * (backward / total)


def _smooth_steps(transition: Array, steps: Any) -> tuple[Array, Array]:
    def step(backward: Array, here: Any) -> tuple[Array, tuple[Array, Array]]:
        filtered, gain, into = here
        smoothed, after = _smooth_step(backward, filtered, gain)
        earlier = push(after, (transition if into is None else into).T)
        return earlier, (smoothed, after)

    filtered, gain, out_of = steps
    into = None if out_of is None else jnp.roll(out_of, 1, axis=0)
    ones = jnp.ones_like(filtered[0])
    return lax.scan(step, ones, (filtered, gain, into), reverse=True)[1]


# Many steps at once: blocks of steps as linear maps


def _in_parallel(log_prob: Array, parallel: bool | None) -> bool:
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


def _filter_blocks(
    initial: Array, transition: Array, steps: Any, dense: Array
) -> tuple[Array, ...]:
    log_prob, out_of = steps
    t, eye = log_prob.shape[0], jnp.eye(len(initial), dtype=initial.dtype)
    blocks = _in_blocks(log_prob), None if out_of is None else _in_blocks(out_of, eye)

    def follow(start: Array, block: Any) -> tuple[Array, Array]:
        """Prediction after a block, and log-probability of the block, from one prediction."""

        def step(carry: tuple[Array, Array], here: Any) -> tuple[tuple[Array, Array], None]:
            predicted, total = carry
            log_b, out = here
            filtered, top, sum_here = _filter_step(predicted, log_b)
            following = push(filtered, transition if out is None else out)
            return (following, total + log_increment(top, sum_here)), None

        zero = jnp.zeros((), log_prob.dtype)
        return lax.scan(step, (start, zero), block)[0]

    maps = jax.vmap(lambda block: jax.vmap(lambda start: follow(start, block))(eye))(blocks)

    def skip(predicted: Array, block_map: tuple[Array, Array]) -> tuple[Array, Array]:
        rows, log_totals = block_map
        joint, *_ = _filter_step(predicted, log_totals)
        return push(joint, rows), predicted

    _, starts = lax.scan(skip, initial, maps)
    run = jax.vmap(lambda start, block: _filter_steps(start, transition, block, dense))
    return jax.tree.map(lambda leaf: _flat(leaf, t), run(starts, blocks))


def _smooth_blocks(transition: Array, steps: Any) -> tuple[Array, Array]:
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
            smoothed, after = _smooth_step(backward, filtered, gain)
            following = jnp.where(filled, backward, before(after, into, filled))
            return following, (smoothed, after)

        return lax.scan(step, end, block, reverse=True)[1]

    return jax.tree.map(lambda leaf: _flat(leaf, t), jax.vmap(run)(ends, blocks))


def _largest(rows: Float[Array, "r c"], count: int) -> tuple[Array, Array]:
    """The largest entries of each row and where they stand, the first among equals."""
    if count == 1:
        first = lax.argmax(rows, 1, jnp.int32)
        return jnp.max(rows, axis=1, keepdims=True), first[:, None]
    largest, places = lax.top_k(rows, count)
    return largest, places


def accurate_sum(values: Float[Array, " t"]) -> Float[Array, ""]:
    """A sum whose rounding grows with √T/T of a plain one: sums of sums."""
    return jnp.sum(jnp.sum(_in_blocks(values), axis=1))
