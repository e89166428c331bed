"""One step of a chain, and the recursions over steps, one by one: see `chain`."""

from __future__ import annotations

from typing import Any

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxem._core import linalg as la


def push(state: Float[Array, " k"], transition: Float[Array, "k k"]) -> Float[Array, " k"]:
    """State probabilities one step on. Small sums join the loop's other work, unlike products."""
    if transition.shape[0] > 16:
        return la.matmul(state, transition)
    return jnp.sum(state[:, None] * transition, axis=0)


def filter_step(predicted: Array, log_b: Array) -> tuple[Array, Array, Array]:
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


def filter_steps(initial: Array, transition: Array, steps: Any, dense: Array) -> tuple[Array, ...]:
    """Filtered probabilities, gains and log-increments of all steps, and where one underflowed.

    The loop keeps predictions alone; the rest is found from them for all steps at once.
    """
    log_prob, _ = steps
    predicted = lax.cond(
        eqxi.unvmap_all(dense),  # all lanes of a vmap take one branch
        _predictions_of_dense,
        _predictions,
        *(initial, transition, steps),
    )
    filtered, top, total = jax.vmap(filter_step)(predicted, log_prob)
    # A state that cannot be reached has gain 0: with another β would grow without bound.
    likelihood = jnp.where(filtered > 0, relative_likelihood(log_prob, top[:, None]), 0)
    gain = _over(likelihood, positive(total)[:, None])
    least = negligible(filtered)
    vanished = (predicted > 0) & (filtered < least)
    tiny = jnp.any((transition > 0) & (transition < least))
    underflowed = (vanished | (tiny & (predicted == 0))) & (log_prob > -jnp.inf)
    return filtered, gain, log_increment(top, total), jnp.any(underflowed, axis=1)


def _predictions(initial: Array, transition: Array, steps: Any) -> Float[Array, "t k"]:
    def step(predicted: Array, here: Any) -> tuple[Array, Array]:
        log_b, out_of = here
        filtered, *_ = filter_step(predicted, log_b)
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


def negligible(probability: Array) -> float:
    """Twice this small would be too small for the dtype."""
    return float(jnp.finfo(probability.dtype).tiny) ** 0.5


def smooth_step(backward: Array, filtered: Array, gain: Array) -> tuple[Array, Array]:
    """P(zₜ | x) and gₜ ∘ βₜ, scaled so that the former sums to one."""
    joint = filtered * backward
    total = positive(lax.stop_gradient(jnp.sum(joint)))  # one, to rounding
    return joint / total, gain * (backward / total)


def smooth_steps(transition: Array, steps: Any) -> tuple[Array, Array]:
    def step(backward: Array, here: Any) -> tuple[Array, tuple[Array, Array]]:
        filtered, gain, into = here
        smoothed, after = smooth_step(backward, filtered, gain)
        earlier = push(after, (transition if into is None else into).T)
        return earlier, (smoothed, after)

    filtered, gain, out_of = steps
    into = None if out_of is None else jnp.roll(out_of, 1, axis=0)
    ones = jnp.ones_like(filtered[0])
    return lax.scan(step, ones, (filtered, gain, into), reverse=True)[1]
