"""Where the inputs of a regression lie, so that its statistics keep their digits at any offset.

A regression says nothing about its inputs u: b + W u is the same line about any origin. Its
statistics are moments of ṽ = (1, v), v = (u − c)/s, with c and s the mean and the scale of the
inputs that a component has seen. They are part of the frame, and no parameters: the density does
not depend on them. The M-step moves them, and reframing is the affine ṽ′ = T ṽ, which is exact
because there is an intercept. Of b + W u the coefficients of ṽ are (b + W c, W s).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxem import _linalg as la
from jaxem._checks import check_continuous
from jaxem._hold import free
from jaxem._units import weighted_mean, weighted_second_moments
from jaxem.emissions._common import ROUNDINGS, divide

# Relative to the square of an input, in roundings: variation that is less counts as none.
RIDGE = 100


class InputFrame(eqx.Module):
    """Mean c and log-scale log s of each component's inputs; held in every derivative."""

    mean: Float[Array, "k p"]
    log_scale: Float[Array, "k p"]

    @classmethod
    def at_zero(cls, weights: Float[Array, "k d p"]) -> InputFrame:
        zero = jnp.zeros_like(weights[:, 0])
        return cls(zero, zero)

    @classmethod
    def pooled(cls, u: Float[Array, "n p"], weights: Float[Array, " n"]) -> InputFrame:
        """The mean and scale of all inputs, for one component."""
        mean = weighted_mean(u, weights)
        unit, second = weighted_second_moments(u, mean, weights)
        deviation = unit * jnp.sqrt(jnp.diagonal(second))
        varies = deviation > _resolution(mean)
        return cls(mean[None], jnp.log(jnp.where(varies, deviation, 1))[None])

    def repeated(self, num_components: int) -> InputFrame:
        """The first component's, for each."""
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[:1], (num_components, leaf.shape[1])), self
        )

    @property
    def _scale(self) -> Float[Array, "k p"]:
        return lax.stop_gradient(jnp.exp(self.log_scale))

    @property
    def _origin(self) -> Float[Array, "k p"]:
        return lax.stop_gradient(self.mean)

    def standardized(self, u: Float[Array, "n p"]) -> Float[Array, "k q n"]:
        """ṽ of each unit about each component's own inputs; q = 1 + p."""
        v = (u.T - self._origin[:, :, None]) / self._scale[:, :, None]
        return jnp.pad(v, ((0, 0), (1, 0), (0, 0)), constant_values=1)

    def coefficients(self, weights: Array, bias: Array) -> Float[Array, "k d q"]:
        """(b + W c, W s), the coefficients of ṽ."""
        level = bias + la.apply(weights, self._origin)
        return jnp.concatenate([level[:, :, None], weights * self._scale[:, None, :]], axis=2)

    def uncentred(self, coefficients: Float[Array, "k d q"]) -> tuple[Array, Array]:
        """The weights and the bias behind coefficients of ṽ."""
        weights = coefficients[:, :, 1:] / self._scale[:, None, :]
        return weights, coefficients[:, :, 0] - la.apply(weights, self._origin)

    def turn_from(self, old: InputFrame) -> Float[Array, "k q q"]:
        """T with ṽ = T ṽ_old."""
        shift = (old._origin - self._origin) / self._scale
        return _affine(shift, old._scale / self._scale)

    def moved(self, moments: Float[Array, "k q q"]) -> InputFrame:
        """The frame at the mean and scale of inputs with moments Σ r ṽ ṽᵀ about self."""
        count = moments[:, 0, :1]
        square = divide(jnp.diagonal(moments, axis1=1, axis2=2)[:, 1:], count)
        first = divide(moments[:, 0, 1:], count)
        eps = jnp.finfo(count.dtype).eps
        variance = jnp.maximum(square - first**2, RIDGE * eps * square)
        scale = jnp.exp(self.log_scale)
        mean = self.mean + scale * first
        deviation = scale * jnp.sqrt(jnp.where(square > 0, variance, 1))
        varies = (square > 0) & (deviation > _resolution(mean))
        scale = jnp.maximum(jnp.where(varies, deviation, scale), jnp.finfo(scale.dtype).tiny)
        return lax.stop_gradient(InputFrame(mean, jnp.log(scale)))

    def directions(self, module: Any) -> Float[Array, "k q q"]:
        """Rows that span the coefficients that are free; zero rows for what is held.

        Where the bias is held, and with it the value at u = 0, a weight also moves the level.
        """
        k, p = self.mean.shape
        bias, weights = free(module, "bias"), free(module, "weights")
        rows = free_coefficients(module, p)
        tilt = jnp.where((~bias & weights)[:, None], self._origin / self._scale, 0)
        own = jnp.asarray(rows[:, :, None] * np.eye(1 + p), tilt.dtype)
        return own + jnp.pad(tilt[:, :, None], ((0, 0), (1, 0), (0, p)))


def free_coefficients(module: Any, num_inputs: int) -> np.ndarray:
    """Which of `bias` and `weights` are free, (k, 1 + p)."""
    bias, weights = free(module, "bias")[:, None], free(module, "weights")[:, None]
    return np.concatenate([bias, np.repeat(weights, num_inputs, axis=1)], axis=1)


def share_within(reach: Array, limit: Array) -> Array:
    """The share of a step whose squared length `reach` may not exceed `limit`."""
    beyond = reach > limit
    return jnp.sqrt(jnp.where(beyond, limit / jnp.where(beyond, reach, 1), 1))


def _affine(shift: Float[Array, "k p"], scale: Float[Array, "k p"]) -> Float[Array, "k q q"]:
    """[[1, 0], [shift, diag scale]]."""
    p = shift.shape[1]
    eye = np.eye(1 + p, dtype=shift.dtype)
    diagonal = jnp.pad(scale, ((0, 0), (1, 0)), constant_values=1)
    return diagonal[:, :, None] * eye + jnp.pad(shift[:, :, None], ((0, 0), (1, 0), (0, p)))


def _resolution(mean: Array) -> Array:
    """Deviations that are no more than the rounding of the numbers they are measured at."""
    return ROUNDINGS * jnp.finfo(mean.dtype).eps * jnp.abs(mean)


@jax.custom_jvp
def along(quadratic: Float[Array, "*b t t"], t: Float[Array, "*b t n"]) -> Float[Array, "*b n"]:
    """½ tᵀ Q t at Q = 0, a direction: the value costs nothing, its derivative by Q is ½ t tᵀ."""
    shape = jnp.broadcast_shapes(quadratic.shape[:-2], t.shape[:-2])
    return jnp.zeros((*shape, t.shape[-1]), t.dtype)


@along.defjvp
def _along_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    t = primals[1]
    return along(*primals), 0.5 * jnp.sum(t * la.matmul(tangents[0], t), axis=-2)


def solve_free(
    moments: Float[Array, "*b q q"],
    gradient: Float[Array, "*b r q"],
    directions: Float[Array, "*b q q"],
) -> Float[Array, "*b r q"]:
    """The step gradient · moments⁻¹ within the span of the rows of `directions`.

    A direction along which inputs do not vary, to rounding, moves nothing. Nor does one that
    those before it explain, the intercept first: of collinear inputs the last ones stay.
    """
    matrix = la.matmul(la.matmul(directions, moments), la.transpose(directions))
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    size = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    matrix = matrix / la.outer(size, size)
    told = (diagonal > 0) & _told(lax.stop_gradient(matrix))
    inverse = la.inverse_of_lower(la.cholesky(_among(matrix, told)))
    share = jnp.where(told, 1 / size, 0)[..., None, :]
    right = la.matmul(gradient, la.transpose(directions)) * share
    step = la.matmul(la.matmul(right, la.transpose(inverse)), inverse) * share
    return la.matmul(step, directions)


def _told(matrix: Float[Array, "*b q q"]) -> Bool[Array, "*b q"]:
    """Which rows of a matrix of unit diagonal the rows before them do not explain, to rounding."""
    ridge = RIDGE * jnp.finfo(matrix.dtype).eps

    def sweep(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        left, told = carry
        row = lax.dynamic_index_in_dim(left, j, -1, keepdims=False)
        pivot = lax.dynamic_index_in_dim(row, j, -1)
        new = ~(pivot <= ridge)  # NaN is no reason to leave one out
        explained = jnp.where(new[..., None], la.outer(row, row / jnp.where(new, pivot, 1)), 0)
        return left - explained, told | (new & (jnp.arange(told.shape[-1]) == j))

    none = jnp.zeros(matrix.shape[:-1], bool)
    return lax.fori_loop(0, matrix.shape[-1], sweep, (matrix, none))[1]


def _among(matrix: Float[Array, "*b q q"], chosen: Bool[Array, "*b q"]) -> Float[Array, "*b q q"]:
    """The matrix in rows and columns that are chosen, the identity in others."""
    eye = np.eye(matrix.shape[-1], dtype=matrix.dtype)
    both = chosen[..., :, None] & chosen[..., None, :]
    return jnp.where(both, matrix, jnp.where(chosen[..., None], 0, eye))


def inputs_and_outputs(x: Any, who: str, most: int = 2) -> tuple[Any, ...]:
    """`x` if it is a tuple of inputs, outputs and perhaps exposures. Raises `ValueError` if not."""
    if not isinstance(x, tuple) or not 2 <= len(x) <= most:
        given = f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
        exposures = " and perhaps exposures (n, d)" if most == 3 else ""
        raise ValueError(
            f"{who} expects a tuple of inputs (n, p) and outputs (n, d){exposures}; got {given}."
        )
    return x


def check_regression(x: Any, weights: Float[Array, "k d p"], who: str, most: int = 2) -> None:
    """Raises `ValueError` unless `x` is such a tuple, with p inputs."""
    inputs = inputs_and_outputs(x, who, most)[0]
    check_continuous(inputs, weights.shape[2], weights.dtype, f"{who} (inputs)")


def given_inputs(inputs: Array | None) -> Array:
    """The inputs. Raises `ValueError` if there are none to draw outputs at."""
    if inputs is None:
        raise ValueError(
            "a regression has no distribution of its inputs: draw from the emission itself, "
            "emission.sample(key, z, inputs=u), with a component z for each row of u."
        )
    return inputs
