"""Leading principal axes of data, without a matrix of features by features."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxem._core import linalg as la
from jaxem._core.blocks import sum_over_observations
from jaxem._core.orthogonal import eigen

_ITERATIONS, _OVERSAMPLING = 15, 5


@functools.partial(jax.jit, static_argnames="count")
def leading_axes(
    x: Float[Array, "n d"], sample_weight: Float[Array, " n"], count: int
) -> tuple[Float[Array, " q"], Float[Array, "d q"], Float[Array, ""]]:
    """The largest eigenvalues of the second moments of x, their axes, and the sum of all.

    By subspace iteration, in products with x alone: there is no d × d matrix.

    Halko, Martinsson & Tropp (2011), SIAM Review 53.
    """
    d = x.shape[1]
    weight = sample_weight / jnp.sum(sample_weight)

    def products(axes: Float[Array, "d q"]) -> Float[Array, "d q"]:
        def block(part: Any, w: Any, _: Any) -> Array:
            return la.matmul(part.T, w[:, None] * la.matmul(part, axes))

        return sum_over_observations(block, x, weight, width=d)

    def step(_: Array, axes: Array) -> Array:
        return _spread_out(products(axes))

    width = min(d, count + _OVERSAMPLING)
    axes = jax.random.normal(jax.random.key(0), (d, width), x.dtype)
    axes = lax.fori_loop(0, _ITERATIONS, step, _spread_out(axes))
    values, turn = eigen(la.matmul(axes.T, products(axes)))
    order = jnp.argsort(-values)[:count]
    total = jnp.sum(weight[:, None] * x**2)
    return values[order], la.matmul(axes, turn[:, order]), total


def _spread_out(axes: Float[Array, "d q"]) -> Float[Array, "d q"]:
    """Orthonormal columns with the same span, but for those that rounding cannot tell apart."""
    eye = jnp.eye(axes.shape[1], dtype=axes.dtype)
    for _ in range(3):
        square = la.matmul(axes.T, axes)
        shift = 10 * axes.shape[1] * jnp.finfo(axes.dtype).eps * jnp.trace(square)
        shift = jnp.where(shift > 0, shift, 1)
        axes = la.matmul(axes, la.inverse_of_lower(la.cholesky(square + shift * eye)).T)
    return axes
