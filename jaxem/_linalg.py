"""Small triangular matrices: factors of covariances and their inverses."""

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


def repeat(values: Float[Array, " k"], n: int) -> Float[Array, "k n"]:
    """The values, for each of n units.

    Its transpose is a product with ones, several times faster on CPU than the sum along the
    minor axis that broadcasting would transpose to.
    """
    return matmul(values[:, None], jnp.ones((1, n), values.dtype))


def cholesky(a: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """Lower Cholesky factor; NaN where the matrix is not positive definite."""
    if a.shape[-1] == 1:
        return jnp.sqrt(a)
    return lax.linalg.cholesky(a, symmetrize_input=False)


def inverse_of_lower(a: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    if a.shape[-1] == 1:
        return 1 / a
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
