"""The maximum of a smooth function of a few parameters, as a differentiable function of the rest.

M-steps without a closed form (a shape, degrees of freedom, a truncated rate) come down to it.
Newton's method climbs f(θ; a) in a box, by the diagonal of the curvature where f is not concave,
and takes the longest of 1, ¼, … of a step that rises enough (Armijo). No derivative passes
through the climb: at the maximum two more Newton steps are taken that carry one,

    θ ← θ − H⁻¹ ∂f/∂θ,    with dθ/da = −H⁻¹ ∂²f/∂θ∂a, by the implicit function theorem exact

after the first; the second makes second and third derivatives exact as well.

Nocedal & Wright (2006), *Numerical Optimization*, chapters 3 and 16.7.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree
from numpy.typing import ArrayLike

from jaxem._core import linalg as la

_NEAR = 0.1  # how far from where a climb ended the maximum can be, relative to 1 + |θ|


def maximize_by_newton(
    function: Callable[[Float[Array, " p"], Any], Float[Array, ""]],
    start: Float[Array, " p"],
    args: PyTree[Array] = None,
    *,
    free: ArrayLike = True,
    lower: ArrayLike = -jnp.inf,
    upper: ArrayLike = jnp.inf,
    max_steps: int = 100,
) -> Float[Array, " p"]:
    """The θ that maximises `function(θ, args)`; `jax.vmap` makes it many maximisations.

    It never returns less than the start has, to rounding, concave or not; of several maxima it
    finds one. Where the function is flat it stays.

    **Arguments:**

    - `function`: twice differentiable, and of order one: what it differs by less than its
      rounding at 1 is not looked for. All that is differentiated goes in as `args`.
    - `start` (p,), within the bounds.
    - `free` (p,): entries that are not free stay at the start, and have its derivative.
    - `lower`, `upper` (p,): bounds of θ; where one holds it back θ has derivative zero.
    - `max_steps`: a climb that this ends is returned as it stands, with derivative zero.
    """
    derivatives = jax.jit(functools.partial(_derivatives, function))  # so that it is traced once
    free = jnp.broadcast_to(jnp.asarray(free), start.shape)
    lower, upper = (
        jnp.broadcast_to(jnp.asarray(b, start.dtype), start.shape) for b in (lower, upper)
    )
    box = lax.stop_gradient((lower, upper))
    climb = _climb(function, derivatives, *lax.stop_gradient((start, args)), box, free, max_steps)
    found, moves, arrived = lax.stop_gradient((climb.theta, climb.moves, climb.arrived))
    theta = jnp.where(free, found, start)

    def again(theta: Array, _: Any) -> tuple[Array, None]:
        gradient, hessian = derivatives(theta, args)
        step, _ = _newton_step(gradient, hessian, moves & arrived)
        # where the function is flat, slope and curvature are rounding, and their ratio any number
        near = jnp.all(jnp.abs(lax.stop_gradient(step)) <= _NEAR * (1 + jnp.abs(found)))
        step = jnp.where(near, step, 0)
        return jnp.where(moves, jnp.clip(theta + step, *box), theta), None

    return lax.scan(again, theta, length=2)[0]  # one program for both steps


def maximize_each(
    function: Callable[..., Float[Array, ""]],
    start: Float[Array, "*b"],
    *args: Array,
    free: ArrayLike,
    bounds: tuple[float, float],
) -> Float[Array, "*b"]:
    """The θ that maximises `function(θ, *args)`, entry by entry, as `maximize_by_newton` does.

    Entries that are not free stay; the others start from where bounds allow.
    """

    def one(free: Array, start: Array, *args: Array) -> Array:
        within = jnp.clip(start, *bounds)[None]
        found = maximize_by_newton(
            lambda theta, own: function(theta[0], *own),
            within,
            args,
            free=free,
            lower=bounds[0],
            upper=bounds[1],
        )
        return jnp.where(free, found[0], start)

    return jnp.vectorize(one)(jnp.asarray(free), start, *args)


class _Climb(NamedTuple):
    theta: Float[Array, " p"]
    moves: Bool[Array, " p"]  # free, and not pressed against a bound
    arrived: Bool[Array, ""]  # near enough a maximum for Newton's method to be quadratic
    going: Bool[Array, ""]


def _climb(
    function: Any,
    derivatives: Any,
    start: Array,
    args: Any,
    box: tuple[Array, Array],
    free: Array,
    max_steps: int,
) -> _Climb:
    lower, upper = box
    eps = jnp.finfo(start.dtype).eps
    shares = 0.25 ** jnp.arange(12, dtype=start.dtype)

    def advance(carry: tuple[Array, _Climb]) -> tuple[Array, _Climb]:
        count, (theta, *_) = carry
        gradient, hessian = derivatives(theta, args)
        pressed = (theta <= lower) & (gradient < 0) | (theta >= upper) & (gradient > 0)
        moves = free & ~pressed
        newton, concave = _newton_step(gradient, hessian, moves)
        step = jnp.where(concave, newton, _diagonal_step(gradient, hessian, moves))
        value, slope = function(theta, args), jnp.sum(gradient * step)
        rounding = 8 * eps * (1 + jnp.abs(value))
        candidates = jnp.clip(theta + shares[:, None] * step, lower, upper)
        values = jax.vmap(lambda candidate: function(candidate, args))(candidates)
        rises = values >= value + 1e-4 * shares * slope - rounding
        still = slope <= rounding
        theta = jnp.where(jnp.any(rises), candidates[jnp.argmax(rises)], theta)
        return count + 1, _Climb(theta, moves, still & concave, ~still & jnp.any(rises))

    def unfinished(carry: tuple[Array, _Climb]) -> Array:
        count, now = carry
        return (count < max_steps) & now.going

    begin = _Climb(start, free, jnp.asarray(False), jnp.asarray(True))
    return lax.while_loop(unfinished, advance, (jnp.zeros((), jnp.int32), begin))[1]


def _derivatives(function: Any, theta: Array, args: Any) -> tuple[Array, Array]:
    return jax.grad(function)(theta, args), jax.hessian(function)(theta, args)


def _newton_step(gradient: Array, hessian: Array, moves: Array) -> tuple[Array, Array]:
    """−H⁻¹ g in what moves, and whether −H is positive definite there; if not, zero."""
    eye = jnp.eye(len(gradient), dtype=gradient.dtype)
    curvature = jnp.where(moves[:, None] & moves, -hessian, eye)
    concave = jnp.all(jnp.isfinite(la.cholesky(lax.stop_gradient(curvature))))
    inverse = la.inverse_of_lower(la.cholesky(jnp.where(concave, curvature, eye)))
    gradient = jnp.where(moves & concave, gradient, 0)
    return la.apply(la.transpose(inverse), la.apply(inverse, gradient)), concave


def _diagonal_step(gradient: Array, hessian: Array, moves: Array) -> Float[Array, " p"]:
    scale = jnp.abs(jnp.diagonal(hessian))
    return jnp.where(moves, gradient / jnp.where(scale > 0, scale, 1), 0)
