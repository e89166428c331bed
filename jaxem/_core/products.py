"""Quadratic forms as linear functions of products of features."""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

# Products zᵢzⱼ in eight strips of rows, each from its own diagonal block on: nearly the upper
# triangle, in few slices. (Index arrays would become scatters, which take a CPU minutes.)


def _strips(d: int) -> list[tuple[slice, slice]]:
    """Rows of each strip, and its columns: all from its first row on."""
    height = -(-d // 8)
    return [(slice(top, min(top + height, d)), slice(top, d)) for top in range(0, d, height)]


def _beyond(d: int) -> np.ndarray:
    """Whether an entry lies right of its strip's diagonal block, and so stands for two."""
    beyond = np.zeros((d, d), bool)
    for rows, _ in _strips(d):
        beyond[rows, rows.stop :] = True
    return beyond


def products(z: Float[Array, "d n"]) -> Float[Array, "f n"]:
    d, n = z.shape
    strips = [(z[rows, None] * z[None, columns]).reshape(-1, n) for rows, columns in _strips(d)]
    return jnp.concatenate(strips)


def packed(a: Float[Array, "k d d"]) -> Float[Array, "k f"]:
    """Coefficients of the products in zᵀ a z."""
    k, d, _ = a.shape
    a = a * (1 + _beyond(d)).astype(a.dtype)
    return jnp.concatenate([a[:, r, c].reshape(k, -1) for r, c in _strips(d)], axis=1)
