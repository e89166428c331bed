"""A latent chain of segments, each with a duration of its own (a semi-Markov chain).

With r the steps that are left of a segment, the present one included, the filter is

    α(j, r) ← lⱼ · [α(j, r + 1) + (Σᵢ α(i, 1) Aᵢⱼ) pⱼ(r)],    log p(x) = Σ log Σ α,

scaled at every step, in O(K D + K²). Expected counts are the derivatives of log p(x) by the
log-potentials (Fisher's identity). A draw goes backwards from the filter: the pair (j, r) comes
from (j, r + 1), or from the last step (i, 1) of another segment. The first segment starts at the
first step; the last one may last beyond the end.

Guédon (2003), J. Comput. Graph. Stat. 12; Yu & Kobayashi (2006), IEEE Trans. Signal Process. 54;
Yu (2010), Artif. Intell. 174.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxem.latents._chain_blocks import accurate_sum
from jaxem.latents._chain_steps import log_increment, positive, push, relative_likelihood
from jaxem.latents._infer import AbstractSequenceLatent


class Segmented(NamedTuple):
    """Expected counts of one sequence: the derivatives of log p(x) by the log-potentials.

    - `initial` (k,): of the first segment's state.
    - `transition` (k, k), `duration` (k, D): of segments that follow each other, and that last
      1 … D steps.
    - `smoothed` (t, k): P(zₜ = k | x), zeros beyond the end.
    """

    initial: Float[Array, " k"]
    transition: Float[Array, "k k"]
    duration: Float[Array, "k D"]
    smoothed: Float[Array, "t k"]


class Segments(AbstractSequenceLatent):
    """The segments of one sequence. Its marginals are a `Segmented`.

    **Arguments:** the log-potentials `initial` (k,), `transition` (k, k), −∞ where a state cannot
    follow, `duration` (k, D) and `log_prob` (t, k); `within` (t,), which steps there are. A state
    that can follow itself has segments of one step.
    """

    initial: Float[Array, " k"]
    transition: Float[Array, "k k"]
    duration: Float[Array, "k D"]
    log_prob: Float[Array, "t k"]
    within: Bool[Array, " t"]

    def exact(self):
        return self._differentiated(Segments.log_likelihood)

    def mode(self):
        """The best path; the last segment's duration beyond the end keeps its distribution."""
        path, _ = self.best_path()
        return self._differentiated(lambda s: _log_prob_of_path(s, path))

    def draw(self, key):
        value, increments, filtered = _filtered(self)
        states, left, enters = _drawn(key, *jax.tree.map(lax.stop_gradient, (self, filtered)))
        counts = _counts(self, states, left, enters)
        possible = jnp.all(increments > -jnp.inf)
        return value, jax.tree.map(lambda leaf: jnp.where(possible, leaf, 0), counts)

    def tempered(self, temperature):
        temperature = jnp.asarray(temperature, self.log_prob.dtype)
        a, b, c, d = (_scaled(leaf, 1 / temperature) for leaf in self.potentials())
        value, found = Segments(a, b, c, d, self.within).exact()
        return temperature * value, found

    def log_likelihood(self):
        return _filter(self)[0]

    def log_increments(self):
        return _filter(self)[1]

    def filtered(self):
        return jnp.where(self.within[:, None], jnp.sum(_filtered(self)[2], axis=2), 0)

    def smoothed(self):
        return self.exact()[1].smoothed

    def best_path(self):
        path = _viterbi(jax.tree.map(lax.stop_gradient, self))
        return path, _log_prob_of_path(self, path)

    def sample_path(self, key):
        """A draw given the sequence; −1 throughout where the sequence is impossible."""
        _, increments, filtered = _filtered(self)
        return jnp.where(jnp.all(increments > -jnp.inf), _drawn(key, self, filtered)[0], -1)

    def potentials(self) -> tuple[Array, Array, Array, Array]:
        return self.initial, self.transition, self.duration, self.log_prob

    def _differentiated(self, function: Any) -> tuple[Float[Array, ""], Segmented]:
        """A function of the segments, and its derivatives by their log-potentials."""
        value, pull = jax.vjp(
            lambda a, b, c, d: function(Segments(a, b, c, d, self.within)), *self.potentials()
        )
        return value, Segmented(*pull(jnp.ones_like(value)))


def _scaled(log_potential: Array, by: Array) -> Array:
    """A multiple; −∞ stays, with a derivative that is finite."""
    possible = log_potential > -jnp.inf
    return jnp.where(possible, by * jnp.where(possible, log_potential, 0), -jnp.inf)


def _filter(
    s: Segments, keep: bool = False
) -> tuple[Float[Array, ""], Float[Array, " t"], Float[Array, "t k D"] | None]:
    """log p(x), log p(xₜ | x₁ … xₜ₋₁), and the filter over states and steps left if it is kept.

    log p(x) = Σ log cₜ + log Σ α: with the scales cₜ held fixed, derivatives of any order are
    exact. Those of a scale would be divided by its square, which vanishes where the data surprise.
    """
    initial, transition, duration = map(jnp.exp, (s.initial, s.transition, s.duration))
    log_prob, within = s.log_prob, s.within
    least = jnp.finfo(log_prob.dtype).tiny / jnp.finfo(log_prob.dtype).eps

    def see(predicted: Array, log_b: Array) -> tuple[Array, Array]:  # (k, D), steps left
        # A probability that small has no derivative: it would be multiplied by its inverse.
        reached = predicted > least
        top = jnp.max(jnp.where(jnp.any(reached, axis=1), log_b, -jnp.inf))
        top = lax.stop_gradient(jnp.where(top > -jnp.inf, top, 0))
        joint = jnp.where(reached, predicted * relative_likelihood(log_b, top)[:, None], 0)
        total = lax.stop_gradient(jnp.sum(joint))
        return joint / positive(total), log_increment(top, total)

    def step(filtered: Array, here: Any) -> tuple[Array, tuple[Array, Array | None]]:
        log_b, counts = here
        entered = push(filtered[:, 0], transition)[:, None] * duration
        following, increment = see(entered + jnp.pad(filtered[:, 1:], ((0, 0), (0, 1))), log_b)
        following = jnp.where(counts, following, filtered)
        return following, (jnp.where(counts, increment, 0), following if keep else None)

    # Derivatives keep what was filtered alone and repeat the rest: to write costs more time.
    step = jax.checkpoint(step)  # pyright: ignore[reportPrivateImportUsage]
    start, first = see(initial[:, None] * duration, log_prob[0])
    last, (later, filtered) = lax.scan(step, start, (log_prob[1:], within[1:]))
    total = jnp.sum(last)
    value = first + accurate_sum(later) + jnp.log(jnp.where(total > 0, total, 1))
    increments = jnp.concatenate([jnp.where(within[0], first, 0)[None], later])
    all_steps = None if filtered is None else jnp.concatenate([start[None], filtered])
    return jnp.where(within[0], value, 0), increments, all_steps


def _filtered(s: Segments) -> tuple[Float[Array, ""], Float[Array, " t"], Float[Array, "t k D"]]:
    """What `_filter` returns when it keeps the filter."""
    value, increments, filtered = _filter(s, keep=True)
    assert filtered is not None
    return value, increments, filtered


def _drawn(
    key: Array, s: Segments, filtered: Float[Array, "t k D"]
) -> tuple[Int[Array, " t"], Int[Array, " t"], Bool[Array, " t"]]:
    """States and steps left of one draw, and the steps at which a segment begins.

    Beyond the end the last state is repeated, as its filter is.
    """
    (steps, k, longest), log_filtered = filtered.shape, jnp.log(filtered)
    last_key, key = jax.random.split(key)
    noise = jax.random.gumbel(key, (steps, k + 1), filtered.dtype)
    last = jax.random.categorical(last_key, log_filtered[-1].reshape(-1)).astype(jnp.int32)

    def back(later: tuple[Array, Array], here: Any) -> tuple[tuple[Array, Array], Any]:
        z, r = later  # r = 0 is one step left
        log_f, gumbel, counts = here
        goes_on = jnp.where(r + 1 < longest, log_f[z, jnp.minimum(r + 1, longest - 1)], -jnp.inf)
        enters = log_f[:, 0] + s.transition[:, z] + s.duration[z, r]
        chosen = jnp.argmax(jnp.append(enters, goes_on) + gumbel).astype(jnp.int32)
        entered = counts & (chosen < k)
        before = jnp.where(entered, chosen, z), jnp.where(entered, 0, jnp.where(counts, r + 1, r))
        return before, (z, r, entered)

    ends, earlier = (last // longest, last % longest), (log_filtered[:-1], noise[1:], s.within[1:])
    first, (z, r, enters) = lax.scan(back, ends, earlier, reverse=True)
    states, left = jnp.append(first[0], z), jnp.append(first[1], r)
    return states, left, jnp.append(s.within[0], enters)


def _counts(s: Segments, states: Array, left: Array, enters: Array) -> Segmented:
    """What a draw counts: its first state, the transitions and durations of its segments."""
    dtype, k = s.log_prob.dtype, s.log_prob.shape[1]
    begins = enters.astype(dtype)
    moved = jnp.zeros_like(s.transition).at[states[:-1], states[1:]].add(begins[1:])
    lasted = jnp.zeros_like(s.duration).at[states, left].add(begins)
    one_hot = (states[:, None] == jnp.arange(k)).astype(dtype)
    return Segmented(one_hot[0] * begins[0], moved, lasted, one_hot * s.within[:, None])


def _viterbi(s: Segments) -> Int[Array, " t"]:
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


def _log_prob_of_path(s: Segments, path: Int[Array, " t"]) -> Float[Array, ""]:
    """log p(x, path): the last segment may last on, by the probability that it does."""
    before, t = jnp.roll(path, 1), jnp.arange(len(path))
    again = jnp.diagonal(s.transition)[path] > -jnp.inf
    begins = s.within & ((t == 0) | (path != before) | again)
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
