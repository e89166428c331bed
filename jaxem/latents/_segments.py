"""A latent chain of segments, each with a duration of its own (a semi-Markov chain).

With d the steps that a segment has lasted, the present one included, the filter is

    f(1, j) ← lⱼ Σᵢ Σ_d f(d, i) pᵢ(d) Aᵢⱼ,    f(d + 1, j) ← lⱼ f(d, j),

and p(x) = Σ f(d, j) Sⱼ(d) at the last step, where Sⱼ(d) is the probability that a segment lasts d
steps or more. In O(K D + K²) a step, and in logarithms, less the largest of them at every step: a
path that is less probable than any number of the dtype may be the only one that explains what
follows. The logarithm of zero is a finite number here. Expected counts are the derivatives of
log p(x) by the log-potentials (Fisher's identity). A draw goes backwards from the filter: a segment
in its first step comes from the end of another, (d, i). The first segment starts at the first step;
the last one may last beyond the end.

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
from jaxem.latents._chain_logs import log_sum, log_zero
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
        found = _filter(self, keep=True)
        counts = _drawn(key, *jax.tree.map(lax.stop_gradient, (self, found)))[1]
        possible = jnp.all(found.scales > -jnp.inf)
        return found.value, jax.tree.map(lambda leaf: jnp.where(possible, leaf, 0), counts)

    def tempered(self, temperature):
        temperature = jnp.asarray(temperature, self.log_prob.dtype)
        a, b, c, d = (_scaled(leaf, 1 / temperature) for leaf in self.potentials())
        value, found = Segments(a, b, c, d, self.within).exact()
        return temperature * value, found

    def log_likelihood(self):
        return _filter(self).value

    def log_increments(self):
        found = _filter(self, keep=True)
        grown = jnp.diff(jax.vmap(log_sum)(found.log_masses), prepend=0)
        return jnp.where(self.within, found.scales + grown, 0)

    def filtered(self):
        found = _filter(self, keep=True)
        possible = self.within & (found.scales > -jnp.inf)
        return jnp.where(possible[:, None], jax.nn.softmax(found.log_masses, axis=1), 0)

    def smoothed(self):
        return self.exact()[1].smoothed

    def best_path(self):
        path = _viterbi(jax.tree.map(lax.stop_gradient, self))
        return path, _log_prob_of_path(self, path)

    def sample_path(self, key):
        """A draw given the sequence; −1 throughout where the sequence is impossible."""
        found = _filter(self, keep=True)
        return jnp.where(jnp.all(found.scales > -jnp.inf), _drawn(key, self, found)[0], -1)

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


class _Filtered(NamedTuple):
    """The filter in logarithms, each step less the `scales` up to it; the last three if kept.

    - `value`: log p(x).
    - `scales` (t,): −∞ where no state can have produced a step.
    - `steps` (t, D, k): log f(d, k). Sums over durations are faster where these come first.
    - `ended` (t − 1, k): log Σ_d f(d, k) pₖ(d), that a segment ends there.
    - `log_masses` (t, k): log p(zₜ = k, x₁ … xₜ).
    """

    value: Float[Array, ""]
    scales: Float[Array, " t"]
    steps: Any = None
    ended: Any = None
    log_masses: Any = None


def _filter(s: Segments, keep: bool = False) -> _Filtered:
    """With the scales held fixed, derivatives of any order are exact."""
    zero = log_zero(s.log_prob) / s.duration.shape[1]  # a segment of them does not overflow

    def finite(log: Array) -> Array:
        return jnp.where(log < zero, zero, log)  # a NaN stays one

    initial, transition, log_prob = map(finite, (s.initial, s.transition, s.log_prob))
    duration, survival = finite(s.duration.T), finite(_log_survival(s))

    def see(arrived: Array, log_b: Array) -> tuple[Array, Array]:
        top = jnp.max(jnp.max(lax.stop_gradient(arrived), axis=0) + lax.stop_gradient(log_b))
        impossible = top < zero / 2
        relative = log_b - jnp.where(impossible, 0, top)  # first, since both may be large
        return arrived + relative, jnp.where(impossible, -jnp.inf, top)

    def step(filtered: Array, here: Any) -> tuple[Array, tuple[Array, Any]]:
        log_b, counts = here
        ended = log_sum(filtered + duration)
        entered = finite(log_sum(ended[:, None] + transition))
        following, scale = see(jnp.concatenate([entered[None], filtered[:-1]]), log_b)
        following = jnp.where(counts, following, filtered)
        kept = (filtered, ended, log_sum(filtered + survival)) if keep else None
        return following, (jnp.where(counts, scale, 0), kept)

    start, first = see(jnp.full_like(duration, zero).at[0].set(initial), log_prob[0])
    last, (later, kept) = lax.scan(step, start, (log_prob[1:], s.within[1:]))
    scales = jnp.where(s.within, jnp.append(first, later), 0)
    value = accurate_sum(scales)
    rest = log_sum((last + survival).reshape(-1))
    value = value + jnp.where(jnp.any(scales == -jnp.inf), 0, rest)
    found = _Filtered(jnp.where(s.within[0], value, 0), scales)
    if kept is None:
        return found
    earlier, ended, masses = kept
    steps = jnp.concatenate([earlier, last[None]])
    masses = jnp.concatenate([masses, log_sum(last + survival)[None]])
    return found._replace(steps=steps, ended=ended, log_masses=masses)


def _drawn(key: Array, s: Segments, found: _Filtered) -> tuple[Int[Array, " t"], Segmented]:
    """The states of one draw, and its counts. Beyond the end the last state is repeated."""
    (steps, longest, k), duration, dtype = found.steps.shape, s.duration.T, found.value.dtype
    last_key, ahead_key, origin_key, time_key = jax.random.split(key, 4)
    gumbel = jax.random.gumbel(origin_key, (steps - 1, k), dtype)
    uniform = jax.random.uniform(time_key, (steps - 1,), dtype)
    last = jax.random.categorical(last_key, (found.steps[-1] + _log_survival(s)).reshape(-1))
    ends = (last % k).astype(jnp.int32), (last // k).astype(jnp.int32)  # time 0 is the first step

    def back(later: tuple[Array, Array], here: Any) -> tuple[tuple[Array, Array], Any]:
        z, time = later
        log_f, ended, gumbel, uniform, counts = here
        origin = jnp.argmax(ended + s.transition[:, z] + gumbel).astype(jnp.int32)
        chances = jnp.cumsum(jnp.exp(log_f[:, origin] + duration[:, origin] - ended[origin]))
        lasted = jnp.sum(chances <= uniform * chances[-1], dtype=jnp.int32)
        entered = counts & (time == 0)
        before = jnp.where(entered, origin, z), jnp.where(entered, lasted, time - counts)
        return before, (z, time, entered)

    earlier = found.steps[:-1], found.ended, gumbel, uniform, s.within[1:]
    first, (z, time, enters) = lax.scan(back, ends, earlier, reverse=True)
    states, times = jnp.append(first[0], z), jnp.append(first[1], time)
    ahead = jnp.where(jnp.arange(longest) >= ends[1], s.duration[ends[0]], -jnp.inf)
    times = times.at[-1].set(jax.random.categorical(ahead_key, ahead).astype(jnp.int32))
    return states, _counts(s, states, times, enters)


def _counts(s: Segments, states: Array, times: Array, enters: Array) -> Segmented:
    """What a draw counts: its first state, the transitions and durations of its segments."""
    begins, within = enters.astype(s.log_prob.dtype), s.within.astype(s.log_prob.dtype)
    moved = jnp.zeros_like(s.transition).at[states[:-1], states[1:]].add(begins)
    lasted = jnp.zeros_like(s.duration).at[states, times].add(jnp.append(begins, within[0]))
    one_hot = (states[:, None] == jnp.arange(s.log_prob.shape[1])).astype(begins.dtype)
    return Segmented(one_hot[0] * within[0], moved, lasted, one_hot * within[:, None])


def _viterbi(s: Segments) -> Int[Array, " t"]:
    """The most probable path, by scores of the best paths into each state and time spent there."""
    duration, longest = s.duration.T, s.duration.shape[1]

    def step(score: Array, here: Any) -> tuple[Array, tuple[Array, Array]]:  # (D, k), time spent
        log_b, counts = here
        ended = score + duration
        spent = lax.argmax(ended, 0, jnp.int32)
        ways = jnp.max(ended, axis=0)[:, None] + s.transition
        origin = lax.argmax(ways, 0, jnp.int32)
        following = jnp.concatenate([jnp.max(ways, axis=0)[None], score[:-1]])
        top = jnp.max(jnp.max(following, axis=0) + log_b)
        following = following + (log_b - jnp.where(jnp.isfinite(top), top, 0))
        return jnp.where(counts, following, score), (origin, spent)

    start = jnp.full_like(duration, -jnp.inf).at[0].set(s.initial + s.log_prob[0])
    score, (origin, spent) = lax.scan(step, start, (s.log_prob[1:], s.within[1:]))
    last = lax.argmax((score + _log_survival(s)).T.reshape(-1), 0, jnp.int32)

    def back(carry: tuple[Array, Array], here: Any) -> tuple[tuple[Array, Array], Array]:
        z, time = carry
        origin, spent, counts = here
        entered, before = counts & (time == 0), origin[z]
        time = jnp.where(entered, spent[before], time - counts)
        return (jnp.where(entered, before, z), time), z

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
        (s.within & ~following[0], _log_survival(s)[time, path]),
    )
    log_b = jnp.take_along_axis(s.log_prob, path[:, None], axis=1)[:, 0]
    logs = [jnp.where(counts, log, 0) for counts, log in ((s.within, log_b), *parts)]
    return accurate_sum(jnp.sum(jnp.stack(logs), axis=0))


def _log_survival(s: Segments) -> Float[Array, "D k"]:
    """log P(a segment lasts d steps or more)."""
    duration, zero, longest = s.duration.T, log_zero(s.duration), s.duration.shape[1]
    longer = jnp.arange(longest)[:, None] >= jnp.arange(longest)
    possible = longer[:, :, None] & (duration != -jnp.inf)[:, None]
    survival = log_sum(jnp.where(possible, duration[:, None], zero))
    return jnp.where(survival < zero / 2, -jnp.inf, survival)
