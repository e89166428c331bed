"""The maximum of a function of logits, as a differentiable function of the counts in it.

Newton's method by conjugate gradients; along the gradient, in units of expected counts, where they
find no way up. As much of each step is taken as neither lowers the function nor passes its maximum
along the step.

Nocedal & Wright (2006), *Numerical Optimization*, chapter 7.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.sparse.linalg import cg
from jaxtyping import Array, Float, PyTree

from jaxem._core.numerics import divide

_MOST_STEPS, _MOST_PRODUCTS, _HALVINGS = 50, 64, 12


def climbed(
    function: Callable[[Array, Any], Float[Array, ""]],
    scale: Callable[[Array, Any], tuple[Float[Array, "g k"], Float[Array, "g 1"]]],
    start: Float[Array, "g k"],
    args: PyTree[Array],
) -> Float[Array, "g k"]:
    """The logits of largest `function(logits, args)`, up from a start that has no derivative.

    **Arguments:** `scale(logits, args)`, the probabilities of each row, and how often it counts;
    `args`, all that is differentiated.
    """

    @jax.custom_jvp
    def maximum(start: Array, args: Any) -> Array:
        return _climb(function, scale, start, args)

    @maximum.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        (start, args), (_, moves) = primals, tangents
        found = maximum(start, args)
        _, push = jax.linearize(lambda at: jax.grad(function)(at, args), found)
        slope, change = jax.jvp(lambda args: jax.grad(function)(found, args), (args,), (moves,))

        def step(slope: Array) -> Array:
            return _newton(slope, push, *scale(found, args))

        return found, jax.jvp(step, (slope,), (change,))[1]

    return maximum(lax.stop_gradient(start), args)


def _newton(
    slope: Array, push: Callable[[Array], Array], shares: Array, counts: Array
) -> Float[Array, "g k"]:
    """The step along which the slope vanishes, of which `push` is the derivative."""

    def curvature(step: Array) -> Array:
        # What is added to a whole row changes nothing: no slope, and here a curvature.
        return shares * counts * jnp.sum(shares * step, axis=1, keepdims=True) - push(step)

    return cg(
        curvature,
        slope,
        tol=float(jnp.finfo(slope.dtype).eps) ** 0.75,
        maxiter=min(slope.size, _MOST_PRODUCTS),
        M=lambda step: divide(step, shares * counts),
    )[0]


def _climb(function: Any, scale: Any, start: Array, args: Any) -> Float[Array, "g k"]:
    eps = jnp.finfo(start.dtype).eps
    lengths = 0.5 ** jnp.arange(_HALVINGS, dtype=start.dtype)

    def climb(carry: tuple[Array, ...]) -> tuple[Array, ...]:
        count, logits, _ = carry
        slope, push = jax.linearize(lambda at: jax.grad(function)(at, args), logits)
        shares, counts = scale(logits, args)
        step = _newton(slope, push, shares, counts)
        simple = divide(slope, shares * counts)
        step = jnp.where(jnp.sum(slope * step) > 0, step, simple)

        def height(length: Array) -> tuple[Array, Array]:
            return jax.jvp(lambda at: function(at, args), (logits + length * step,), (step,))

        values, slopes = jax.vmap(height)(jnp.append(0, lengths))
        slack = 30 * eps * jnp.abs(values[0])
        rises = (values >= values[0] - slack) & (slopes >= -0.5 * slopes[0])
        length = lengths[jnp.argmax(rises[1:])] * jnp.any(rises[1:])
        going = length * slopes[0] > eps * jnp.abs(values[0]) * 1e-3
        return count + 1, logits + length * step, going

    carry = jnp.zeros((), jnp.int32), start, jnp.asarray(True)
    return lax.while_loop(lambda now: now[-1] & (now[0] < _MOST_STEPS), climb, carry)[1]
