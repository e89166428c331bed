"""Where the inputs of a regression lie, so that its statistics keep their digits at any offset.

A regression has no distribution of its inputs u: b + W u is the same line about any origin. Its
statistics are moments of ṽ = (1, v), v = (u − c)/s, with c and s the mean and the scale of the
inputs that a component has seen. They are part of the frame, and no parameters: the density does
not depend on them. The M-step moves them, and reframing is the affine ṽ′ = R ṽ, which is exact
because there is an intercept. Of b + W u the coefficients of ṽ are (b + W c, W s).
"""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from jaxem._core import linalg as la
from jaxem._core.blocks import weighted_mean, weighted_second_moments
from jaxem._core.numerics import ROUNDINGS, divide
from jaxem._core.parameters import free
from jaxem._core.quadratic import RIDGE


class InputFrame(eqx.Module):
    """Mean c and log-scale log s of each component's inputs; held fixed in every derivative."""

    mean: Float[Array, "k p"]
    log_scale: Float[Array, "k p"]

    @classmethod
    def at_zero(cls, coefficients: Float[Array, "k d p"]) -> InputFrame:
        zero = jnp.zeros_like(coefficients[:, 0])
        return cls(zero, zero)

    @classmethod
    def pooled(cls, u: Float[Array, "n p"], sample_weight: Float[Array, " n"]) -> InputFrame:
        """The mean and scale of all inputs, for one component."""
        mean = weighted_mean(u, sample_weight)
        size, second = weighted_second_moments(u, mean, sample_weight)
        deviation = size * jnp.sqrt(jnp.diagonal(second))
        varies = deviation > _rounding(mean)
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
        """ṽ of each observation about each component's own inputs; q = 1 + p."""
        v = (u.T - self._origin[:, :, None]) / self._scale[:, :, None]
        return jnp.pad(v, ((0, 0), (1, 0), (0, 0)), constant_values=1)

    def centred(self, coefficients: Array, intercept: Array) -> Float[Array, "k d q"]:
        """(b + W c, W s), the coefficients of ṽ."""
        level = intercept + la.apply(coefficients, self._origin)
        return jnp.concatenate([level[:, :, None], coefficients * self._scale[:, None, :]], axis=2)

    def uncentred(self, centred: Float[Array, "k d q"]) -> tuple[Array, Array]:
        """The coefficients and the intercept behind the coefficients of ṽ."""
        coefficients = centred[:, :, 1:] / self._scale[:, None, :]
        return coefficients, centred[:, :, 0] - la.apply(coefficients, self._origin)

    def turn_from(self, old: InputFrame) -> Float[Array, "k q q"]:
        """R with ṽ = R ṽ_old."""
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
        varies = (square > 0) & (deviation > _rounding(mean))
        scale = jnp.maximum(jnp.where(varies, deviation, scale), jnp.finfo(scale.dtype).tiny)
        return lax.stop_gradient(InputFrame(mean, jnp.log(scale)))

    def free_directions(self, module: Any) -> Float[Array, "k q q"]:
        """Rows that span the coefficients that are free; zero rows for what is frozen.

        Where the intercept is frozen, and with it the value at u = 0, a coefficient also moves the
        level.
        """
        p = self.mean.shape[1]
        intercept, coefficients = free(module, "intercept"), free(module, "coefficients")
        rows = np.concatenate([intercept[:, None], np.repeat(coefficients[:, None], p, 1)], axis=1)
        level = jnp.where((~intercept & coefficients)[:, None], self._origin / self._scale, 0)
        own = jnp.asarray(rows[:, :, None] * np.eye(1 + p), level.dtype)
        return own + jnp.pad(level[:, :, None], ((0, 0), (1, 0), (0, p)))


def _affine(shift: Float[Array, "k p"], scale: Float[Array, "k p"]) -> Float[Array, "k q q"]:
    """[[1, 0], [shift, diag scale]]."""
    p = shift.shape[1]
    eye = np.eye(1 + p, dtype=shift.dtype)
    diagonal = jnp.pad(scale, ((0, 0), (1, 0)), constant_values=1)
    return diagonal[:, :, None] * eye + jnp.pad(shift[:, :, None], ((0, 0), (1, 0), (0, p)))


def _rounding(mean: Array) -> Array:
    """Deviations that are no more than the rounding of the numbers they are measured at."""
    return ROUNDINGS * jnp.finfo(mean.dtype).eps * jnp.abs(mean)
