"""Small triangular matrices: factors of covariances and their inverses."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float


def transpose(a: Float[Array, "*b m n"]) -> Float[Array, "*b n m"]:
    return jnp.swapaxes(a, -1, -2)


def outer(a: Float[Array, "*b m"], b: Float[Array, "*b n"]) -> Float[Array, "*b m n"]:
    return a[..., :, None] * b[..., None, :]


def matmul(a: Array, b: Array) -> Array:
    """A matrix product in full precision whatever the platform's default (TF32, bf16) is."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def apply(a: Float[Array, "*b m n"], v: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
    return matmul(a, v[..., None])[..., 0]


def unit(v: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """v / ‖v‖ along the last axis, of any length whose inverse fits."""
    v = v / lax.stop_gradient(jnp.max(jnp.abs(v), axis=-1, keepdims=True))  # squares fit
    return v / jnp.sqrt(jnp.sum(v**2, axis=-1, keepdims=True))


def repeat(values: Float[Array, " k"], n: int) -> Float[Array, "k n"]:
    """The values, for each of n observations.

    Its transpose is a product with ones, several times faster on CPU than the sum along the
    minor axis that broadcasting would transpose to.
    """
    return matmul(values[:, None], jnp.ones((1, n), values.dtype))


@jax.custom_jvp
def cholesky(a: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """Lower Cholesky factor; NaN on its diagonal where the matrix is not positive definite."""
    return _on_platform(a, cpu=_cholesky_by_rows, default=_cholesky_by_library)


@cholesky.defjvp
def _cholesky_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    factor = cholesky(*primals)
    inverse = inverse_of_lower(factor)
    relative = jnp.tril(matmul(matmul(inverse, tangents[0]), transpose(inverse)))
    half = 1 - 0.5 * jnp.eye(factor.shape[-1], dtype=factor.dtype)
    return factor, matmul(factor, half * relative)


@jax.custom_jvp
def inverse_of_lower(a: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    return _on_platform(a, cpu=_inverse_by_rows, default=_inverse_by_library)


@inverse_of_lower.defjvp
def _inverse_of_lower_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    inverse = inverse_of_lower(*primals)
    return inverse, -matmul(matmul(inverse, jnp.tril(tangents[0])), inverse)


@jax.custom_jvp
def inverse_and_log_det(
    a: Float[Array, "*b d d"],
) -> tuple[Float[Array, "*b d d"], Float[Array, "*b"]]:
    """The inverse of any regular matrix and log|det|, by elimination with pivots."""
    return _on_platform(a, cpu=_inverse_by_pivots, default=_regular_by_library)


@inverse_and_log_det.defjvp
def _inverse_and_log_det_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    inverse, log_det = inverse_and_log_det(*primals)
    turned = matmul(inverse, tangents[0])
    return (inverse, log_det), (-matmul(turned, inverse), jnp.trace(turned, axis1=-2, axis2=-1))


# On CPU all are loops over rows, batched, within 4 times of LAPACK's time and negligible beside
# an E-step: jaxlib 0.10 runs batches of LAPACK calls as tasks that wait for other tasks of the
# same thread pool, so that two at once can wait for each other forever (0.11.2 does not).


@functools.partial(jax.jit, static_argnames=("cpu", "default"))  # an eager call compiles once
def _on_platform(a: Array, cpu: Callable[[Array], Any], default: Callable[[Array], Any]) -> Any:
    return lax.platform_dependent(a, cpu=cpu, default=default)


def _cholesky_by_rows(a: Array) -> Array:
    def row(j: Any, upper: Array) -> Array:
        done = jnp.sum(lax.dynamic_index_in_dim(upper, j, -1) * upper, axis=-2)
        new = lax.dynamic_index_in_dim(a, j, -2, keepdims=False) - done
        pivot = lax.dynamic_index_in_dim(new, j, -1)
        new = new / jnp.sqrt(jnp.where(pivot > 0, pivot, jnp.nan))
        new = jnp.where(jnp.arange(a.shape[-1]) >= j, new, 0)
        return lax.dynamic_update_index_in_dim(upper, new, j, -2)

    return transpose(_for_each_row(row, a))


def _inverse_by_rows(a: Array) -> Array:
    def row(j: Any, inverse: Array) -> Array:
        coefficients = lax.dynamic_index_in_dim(a, j, -2, keepdims=False)
        done = jnp.sum(coefficients[..., None] * inverse, axis=-2)
        new = (jnp.arange(a.shape[-1]) == j) - done
        new = new / lax.dynamic_index_in_dim(coefficients, j, -1)
        return lax.dynamic_update_index_in_dim(inverse, new, j, -2)

    return _for_each_row(row, a)


def _inverse_by_pivots(a: Array) -> tuple[Array, Array]:
    rows = jnp.arange(a.shape[-1])

    def column(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        """Gauss–Jordan: row j is swapped for the one of largest pivot, and taken off all others."""
        both, log_det = carry
        here = lax.dynamic_index_in_dim(both, j, -2, keepdims=False)
        size = jnp.abs(lax.dynamic_index_in_dim(both, j, -1, keepdims=False))
        largest = jnp.argmax(jnp.where(rows >= j, size, -1), axis=-1)
        chosen = (rows == largest[..., None])[..., None]
        row = jnp.sum(jnp.where(chosen, both, 0), axis=-2)
        pivot = lax.dynamic_index_in_dim(row, j, -1)
        row = row / pivot
        both = jnp.where(chosen, here[..., None, :], both)
        both = both - outer(lax.dynamic_index_in_dim(both, j, -1, keepdims=False), row)
        both = lax.dynamic_update_index_in_dim(both, row, j, -2)
        return both, log_det + jnp.log(jnp.abs(pivot[..., 0]))

    d = a.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(d, dtype=a.dtype), a.shape)
    start = jnp.concatenate([a, eye], axis=-1), jnp.zeros_like(a[..., 0, 0])
    both, log_det = lax.fori_loop(0, d, column, start, unroll=d <= 4)
    return both[..., d:], log_det


def _regular_by_library(a: Array) -> tuple[Array, Array]:
    return jnp.linalg.inv(a), jnp.linalg.slogdet(a)[1]


def _for_each_row(row: Callable[[Any, Array], Array], a: Array) -> Array:
    d, done = a.shape[-1], jnp.zeros_like(a)
    if d > 4:
        return lax.fori_loop(0, d, row, done)
    for j in range(d):  # traced faster than a loop to unroll
        done = row(j, done)
    return done


def _cholesky_by_library(a: Array) -> Array:
    return lax.linalg.cholesky(a, symmetrize_input=False)


def _inverse_by_library(a: Array) -> Array:
    eye = jnp.broadcast_to(jnp.eye(a.shape[-1], dtype=a.dtype), a.shape)
    return lax.linalg.triangular_solve(a, eye, left_side=True, lower=True)


def lower(log_scale: Float[Array, "*b d"], below: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """The factor with diagonal exp(log_scale) and the strictly lower part of `below`."""
    eye = jnp.eye(log_scale.shape[-1], dtype=log_scale.dtype)
    return jnp.tril(below, -1) + jnp.exp(log_scale)[..., None] * eye


def parts_of_lower(factor: Float[Array, "*b d d"]) -> tuple[Array, Array]:
    """The inverse of `lower`; the logs are floored at the smallest normal number."""
    diagonal = jnp.diagonal(factor, axis1=-2, axis2=-1)
    return floored_log(diagonal), jnp.tril(factor, -1)


def floored_log(x: Array) -> Array:
    """log x, never −∞: x is floored at the smallest normal number of its dtype. NaN stays NaN."""
    return jnp.log(jnp.maximum(x, jnp.finfo(x.dtype).tiny))
