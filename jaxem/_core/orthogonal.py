"""Small orthogonal matrices: Gram–Schmidt, and the eigenvectors of symmetric matrices.

Both are batched loops without LAPACK (see `linalg`). Eigenvectors are found by Jacobi's method:
rotations of at most 45° each make one entry in each of ⌊d/2⌋ disjoint pairs of rows zero. It finds
small eigenvalues of a graded matrix to high relative accuracy, and leaves a diagonal matrix as it
is, in its order.

Demmel & Veselić (1992), SIAM J. Matrix Anal. Appl. 13 (accuracy); Brent & Luk (1985), SIAM J. Sci.
Stat. Comput. 6 (rounds of disjoint pairs).
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxem._core import linalg as la

# Jacobi's method converges quadratically: 5 to 8 sweeps are usual.
MAX_SWEEPS = 15

# Eigenvalues this many roundings apart are equal: within their space no vector is distinguished.
TIE = 64


def orthonormal(x: Float[Array, "*b d d"]) -> Float[Array, "*b d d"]:
    """The orthogonal factor of x = QR where the diagonal of R is positive; x itself if orthogonal.

    Smooth wherever x is regular. The second pass takes off what rounding leaves of the first.
    """
    for _ in range(2):
        factor = la.cholesky(la.matmul(la.transpose(x), x))
        x = la.matmul(x, la.transpose(la.inverse_of_lower(factor)))
    return x


def skew(angles: Float[Array, " p"], d: int) -> Float[Array, "d d"]:
    """The skew-symmetric matrix with these d(d − 1)/2 numbers below its diagonal."""
    rows, columns = np.tril_indices(d, -1)
    below = jnp.zeros((d, d), angles.dtype).at[rows, columns].set(angles)
    return below - below.T


def rotation(angles: Float[Array, " p"], d: int) -> Float[Array, "d d"]:
    """An orthogonal matrix that is I + A to first order, A the skew matrix of the angles."""
    return orthonormal(jnp.eye(d, dtype=angles.dtype) + skew(angles, d))


@jax.custom_jvp
def eigen(a: Float[Array, "*b d d"]) -> tuple[Float[Array, "*b d"], Float[Array, "*b d d"]]:
    """Eigenvalues of symmetric matrices, and eigenvectors as columns; in no particular order.

    Eigenvectors of equal eigenvalues have derivative zero within their space.
    """
    return _jacobi(a)


@eigen.defjvp
def _eigen_jvp(primals: Any, tangents: Any) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    values, vectors = eigen(*primals)
    inner = la.matmul(la.matmul(la.transpose(vectors), tangents[0]), vectors)
    inner = 0.5 * (inner + la.transpose(inner))
    left, right = values[..., :, None], values[..., None, :]
    size = jnp.maximum(jnp.abs(left), jnp.abs(right))
    tied = jnp.abs(right - left) <= TIE * jnp.finfo(values.dtype).eps * size
    turn = jnp.where(tied, 0, inner / jnp.where(tied, 1, right - left))
    change = jnp.diagonal(inner, axis1=-2, axis2=-1), la.matmul(vectors, turn)
    return (values, vectors), change


def _jacobi(a: Array) -> tuple[Array, Array]:
    d = a.shape[-1]
    eye = jnp.eye(d, dtype=a.dtype)
    eps = jnp.finfo(a.dtype).eps
    rounds = jnp.asarray(_rounds(d))
    own = jnp.arange(d)

    def rotate(i: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
        a, vectors, moved = carry
        partner = rounds[i]
        pair = (own[:, None] != own) & (partner[:, None] == own)
        diagonal = jnp.diagonal(a, axis1=-2, axis2=-1)
        other = diagonal[..., partner]
        between = jnp.sum(jnp.where(pair, a, 0), axis=-1)
        large = jnp.abs(between) > eps * jnp.sqrt(jnp.abs(diagonal)) * jnp.sqrt(jnp.abs(other))
        # With t = tan θ: t² + 2τt = 1; for the other of the pair τ and t change their signs
        tau = (other - diagonal) / (2 * jnp.where(large, between, 1))
        sign = jnp.where(tau == 0, jnp.sign(partner - own), jnp.sign(tau))
        tangent = jnp.where(large, sign / (jnp.abs(tau) + jnp.hypot(tau, 1)), 0)
        cosine = 1 / jnp.sqrt(1 + tangent**2)
        sine = (tangent * cosine)[..., None]
        turn = cosine[..., None] * eye + jnp.where(pair, sine, 0)
        a = la.matmul(la.matmul(la.transpose(turn), a), turn)
        a = jnp.where(pair & large[..., None], 0, 0.5 * (a + la.transpose(a)))
        return a, la.matmul(vectors, turn), moved | jnp.any(large)

    def sweep(carry: Any) -> Any:
        count, a, vectors, _ = carry
        start = (a, vectors, jnp.asarray(False))
        return count + 1, *lax.fori_loop(0, len(rounds), rotate, start)

    def unfinished(carry: Any) -> Array:
        return (carry[0] < MAX_SWEEPS) & carry[-1]

    start = (0, a, jnp.broadcast_to(eye, a.shape), jnp.asarray(True))
    _, a, vectors, _ = lax.while_loop(unfinished, sweep, start)
    return jnp.diagonal(a, axis1=-2, axis2=-1), vectors


def _rounds(d: int) -> np.ndarray:
    """The partner of each of d rows in each round of a tournament; itself if it has none."""
    places = list(range(d + d % 2))
    rounds = []
    for _ in range(len(places) - 1):
        partner = np.arange(len(places))
        for a, b in zip(places, reversed(places), strict=True):
            partner[a] = b
        rounds.append(np.where(partner[:d] < d, partner[:d], np.arange(d)))
        places = [places[0], places[-1], *places[1:-1]]
    return np.array(rounds)
