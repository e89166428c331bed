"""Rotations of loadings to simple structure.

With loadings A (d, q), an orthogonal rotation is L = A T with TᵀT = I, and an oblique one
L = A T⁻ᵀ with unit columns of T: factors then have correlations TᵀT, and L TᵀT Lᵀ = A Aᵀ. Each
criterion f(L) is minimised by gradient projection. The minimum is then differentiated by one
Newton step, so that standard errors of rotated loadings follow from those of A.

Kaiser (1958), Psychometrika 23 (varimax, and the normalisation of rows); Hendrickson & White
(1964), Br. J. Stat. Psychol. 17 (promax); Jennrich (2001), Psychometrika 66, and (2002),
Psychometrika 67 (gradient projection); Bernaards & Jennrich (2005), Educ. Psychol. Meas. 65.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_shape
from jaxem._core.numerics import as_float
from jaxem._core.orthogonal import orthonormal, rotation

_MAX_STEPS, _MAX_HALVINGS = 1000, 20


class Rotation(NamedTuple):
    """Rotated loadings, largest columns first, each of positive sum.

    - `loadings` (d, q).
    - `transformation` T (q, q): L = A T⁻ᵀ, which is A T where T is orthogonal.
    - `correlation` (q, q) of the rotated factors, I where T is orthogonal.
    """

    loadings: Float[Array, "d q"]
    transformation: Float[Array, "q q"]
    correlation: Float[Array, "q q"]


def rotate(
    loadings: ArrayLike,
    method: str = "varimax",
    *,
    normalize: bool = True,
    gamma: float = 0.0,
    power: float = 4.0,
) -> Rotation:
    """Loadings rotated to simple structure; differentiable.

    **Arguments:**

    - `loadings` (d, q), as `model.loadings[0]` of a `FactorAnalysis`.
    - `method`: "varimax" and "quartimax" are orthogonal, "oblimin" and "promax" oblique.
    - `normalize`: whether rows are brought to unit length first (Kaiser).
    - `gamma` of oblimin; 0 is quartimin.
    - `power` of promax: the target is the varimax loadings to this power.

    **Raises:** `ValueError` for another method, or loadings of another shape.

    ```python
    rotated = rotate(fitted.loadings[0], "oblimin")
    rotated.loadings, rotated.correlation
    ```
    """
    given = as_float(loadings)
    check_shape("loadings", given, ("d", "q"))
    if method not in ("varimax", "quartimax", "oblimin", "promax"):
        raise ValueError(
            f'method must be "varimax", "quartimax", "oblimin" or "promax", got {method!r}.'
        )
    length = jnp.sqrt(jnp.sum(given**2, axis=1, keepdims=True))
    length = jnp.where(length > 0, length, 1) if normalize else jnp.ones_like(length)
    rows = given / length
    if given.shape[1] == 1:
        turn = jnp.ones((1, 1), given.dtype)
    elif method == "oblimin":
        turn = _minimum(lambda loadings: _oblimin(loadings, gamma), rows, _oblique)
    else:
        criterion = _quartimax if method == "quartimax" else _varimax
        turn = _minimum(criterion, rows, _orthogonal)
        turn = _promax(rows, turn, power) if method == "promax" else turn
    rotated = length * _turned(rows, turn)
    order = jnp.argsort(-jnp.sum(rotated**2, axis=0))
    sign = jnp.where(jnp.sum(rotated, axis=0) < 0, -1, 1)[order]
    turn, rotated = turn[:, order] * sign, rotated[:, order] * sign
    return Rotation(rotated, turn, la.matmul(turn.T, turn))


def _varimax(loadings: Float[Array, "d q"]) -> Float[Array, ""]:
    square = loadings**2
    return -0.25 * jnp.sum((square - jnp.mean(square, axis=0)) ** 2)


def _quartimax(loadings: Float[Array, "d q"]) -> Float[Array, ""]:
    return -0.25 * jnp.sum(loadings**4)


def _oblimin(loadings: Float[Array, "d q"], gamma: float) -> Float[Array, ""]:
    square = loadings**2
    others = jnp.sum(square, axis=1, keepdims=True) - square
    return 0.25 * jnp.sum(square * (others - gamma * jnp.mean(others, axis=0)))


def _promax(rows: Array, turn: Float[Array, "q q"], power: float) -> Float[Array, "q q"]:
    """The oblique T that brings varimax loadings closest to their power, up to scale."""
    loadings = la.matmul(rows, turn)
    target = loadings * jnp.abs(loadings) ** (power - 1)
    square = la.matmul(loadings.T, loadings)
    fit = la.matmul(la.inverse_and_log_det(square)[0], la.matmul(loadings.T, target))
    return _unit_columns(la.inverse_and_log_det(la.matmul(turn, fit))[0].T)


def _turned(rows: Float[Array, "d q"], turn: Float[Array, "q q"]) -> Float[Array, "d q"]:
    return la.matmul(rows, la.inverse_and_log_det(turn)[0].T)


def _unit_columns(turn: Float[Array, "q q"]) -> Float[Array, "q q"]:
    return turn / jnp.sqrt(jnp.sum(turn**2, axis=0))


def _orthogonal(turn: Float[Array, "q q"], move: Float[Array, " p"]) -> Float[Array, "q q"]:
    """The orthogonal matrix at a point `move` about T; to first order T (I + A), A skew."""
    return orthonormal(la.matmul(turn, rotation(move, len(turn))))


def _oblique(turn: Float[Array, "q q"], move: Float[Array, " p"]) -> Float[Array, "q q"]:
    """The matrix of unit columns at a point `move` about T: each other column is added."""
    q = len(turn)
    off = np.nonzero(~np.eye(q, dtype=bool))
    added = jnp.zeros((q, q), turn.dtype).at[off].set(move)
    return _unit_columns(la.matmul(turn, jnp.eye(q, dtype=turn.dtype) + added))


def _minimum(
    criterion: Callable[[Array], Array],
    rows: Float[Array, "d q"],
    at: Callable[[Array, Array], Array],
) -> Float[Array, "q q"]:
    """T with the least criterion, from T = I; differentiable by the rows."""
    q = rows.shape[1]
    size = q * (q - 1) // (2 if at is _orthogonal else 1)
    none = jnp.zeros(size, rows.dtype)
    eps = jnp.finfo(rows.dtype).eps

    def value(move: Array, turn: Array, rows: Array) -> Array:
        return criterion(_turned(rows, at(turn, move)))

    fixed = lax.stop_gradient(rows)
    scale = jnp.sum(jnp.sum(fixed**2, axis=1) ** 2)  # of the criteria, and of their slopes

    def unfinished(carry: Any) -> Array:
        count, _, _, slope = carry
        return (count < _MAX_STEPS) & (jnp.max(jnp.abs(slope)) > 10 * eps * scale)

    def step(carry: Any) -> Any:
        count, turn, length, slope = carry
        now, square = value(none, turn, fixed), jnp.sum(slope**2)

        def too_long(state: Any) -> Array:
            halvings, length = state
            gain = now - value(-length * slope, turn, fixed)
            return (halvings < _MAX_HALVINGS) & ~(gain >= 0.5 * length * square)

        halvings, length = lax.while_loop(
            too_long, lambda state: (state[0] + 1, 0.5 * state[1]), (0, 2 * length)
        )
        turn = at(turn, -length * slope)
        # Where no step along the slope gains, rounding decides: the end
        slope = jnp.where(halvings < _MAX_HALVINGS, jax.grad(value)(none, turn, fixed), 0)
        return count + 1, turn, length, slope

    start = jnp.eye(q, dtype=rows.dtype)
    carry = (0, start, 1 / scale, jax.grad(value)(none, start, fixed))
    turn = lax.stop_gradient(lax.while_loop(unfinished, step, carry)[1])
    # One Newton step: no move in value, and the derivative of the minimum by the rows
    hessian = lax.stop_gradient(jax.hessian(value)(none, turn, rows))
    inverse = jnp.linalg.pinv(hessian, rtol=eps**0.5, hermitian=True)
    return at(turn, -la.apply(inverse, jax.grad(value)(none, turn, rows)))
