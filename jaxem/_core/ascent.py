"""Newton's method where gradient and Hessian are written down, on vectors or on rotations.

The same climb as in `newton`, for functions whose derivatives have a short formula: to trace and
compile them costs a fraction of automatic second derivatives. Where −H is not positive definite,
the least of a few multiples of |diag H| is added that makes it so (Marquardt). No derivative passes
through the climb. Three more steps carry one,

    θ ← θ − H⁻¹ g(θ; a),    H held fixed,

each of which makes one more order of derivatives exact: two are to rounding, as H is taken at a
point that is a maximum only to rounding of the value.

Nocedal & Wright (2006), *Numerical Optimization*, chapter 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core import linalg as la


class Function(NamedTuple):
    """A function of a point and of arguments, of order one, and how its point moves."""

    value: Callable[[Array, Any], Float[Array, ""]]
    gradient: Callable[[Array, Any], Float[Array, " p"]]
    hessian: Callable[[Array, Any], Float[Array, "p p"]]
    move: Callable[[Array, Float[Array, " p"]], Array] = jnp.add


class _Climb(NamedTuple):
    point: Array
    inverse: Float[Array, "p p"]  # the inverse Cholesky factor of −H there
    arrived: Bool[Array, ""]  # at a maximum, as far as values tell
    going: Bool[Array, ""]


def ascend(
    function: Function,
    start: Array,
    args: PyTree[Array],
    free: Bool[Array, " p"] | bool = True,
    max_steps: int = 50,
) -> Array:
    """The point of a maximum of `function`, reached uphill from `start`.

    It never returns less than the start has, to rounding. Coordinates that are not free do not
    move. A climb that `max_steps` or a saddle ends is returned with derivative zero.
    """
    known = lax.stop_gradient((start, args))
    climb = lax.stop_gradient(_climb(function, *known, free, max_steps))
    inverse = jnp.where(climb.arrived, climb.inverse, 0)

    def refine(point: Array, _: None) -> tuple[Array, None]:
        gradient = jnp.where(free & climb.arrived, function.gradient(point, args), 0)
        return function.move(point, _solve(inverse, gradient)), None

    return lax.scan(refine, climb.point, length=3)[0]


def _climb(function: Function, start: Array, args: Any, free: Any, max_steps: int) -> _Climb:
    eps = jnp.finfo(start.dtype).eps
    shares = 0.25 ** jnp.arange(12, dtype=start.dtype)

    def advance(carry: tuple[Array, _Climb]) -> tuple[Array, _Climb]:
        count, (point, *_) = carry
        gradient = jnp.where(free, function.gradient(point, args), 0)
        inverse, concave = _inverse_factor(function.hessian(point, args), free)
        step = _solve(inverse, gradient)
        value, slope = function.value(point, args), jnp.sum(gradient * step)
        rounding = 8 * eps * (1 + jnp.abs(value))
        candidates = jax.vmap(lambda share: function.move(point, share * step))(shares)
        values = jax.vmap(lambda candidate: function.value(candidate, args))(candidates)
        rises = values >= value + 1e-4 * shares * slope - rounding
        going = (slope > rounding) & jnp.any(rises)
        point = jnp.where(going, candidates[jnp.argmax(rises)], point)
        return count + 1, _Climb(point, inverse, concave & ~going, going)

    def unfinished(carry: tuple[Array, _Climb]) -> Array:
        count, now = carry
        return (count < max_steps) & now.going

    size = function.gradient(start, args).shape[0]
    inverse = jnp.zeros((size, size), start.dtype)
    begin = _Climb(start, inverse, jnp.asarray(False), jnp.asarray(True))
    return lax.while_loop(unfinished, advance, (jnp.zeros((), jnp.int32), begin))[1]


def _inverse_factor(hessian: Array, free: Any) -> tuple[Float[Array, "p p"], Bool[Array, ""]]:
    """The inverse Cholesky factor of −H + τ|diag H| in what is free, and whether τ is 0."""
    eye = jnp.eye(len(hessian), dtype=hessian.dtype)
    free = jnp.broadcast_to(free, hessian.shape[:1])
    curvature = jnp.where(free[:, None] & free, -hessian, eye)
    size = jnp.abs(jnp.diagonal(curvature))
    size = jnp.sqrt(jnp.maximum(size, jnp.finfo(size.dtype).eps * jnp.max(size)))
    curvature = curvature / size[:, None] / size
    bound = jnp.max(jnp.sum(jnp.abs(curvature), axis=1))
    shifts = jnp.asarray([0, 2**-10, 2**-7, 2**-4, 2**-2, 1.1], hessian.dtype) * bound
    factors = la.cholesky(curvature + shifts[:, None, None] * eye)
    definite = jnp.isfinite(factors).all(axis=(1, 2))
    return la.inverse_of_lower(factors[jnp.argmax(definite)]) / size, definite[0]


def _solve(inverse: Float[Array, "p p"], vector: Float[Array, " p"]) -> Float[Array, " p"]:
    return la.apply(la.transpose(inverse), la.apply(inverse, vector))
