"""Moments of inputs and whitened residuals of linear regressions, with reframing and M-step.

Of t = (1, v, z), inputs v about their own mean and scale and residuals z of unit covariance. With
M = Σr ṽ ṽᵀ, G = Σr z ṽᵀ and S = Σr z zᵀ the blocks of the moments, ṽ = (1, v), the whitened step of
the coefficients of ṽ is δ = G M⁻¹, and S − Gδᵀ − δGᵀ + δMδᵀ are squares about where it leads.
"""

from typing import NamedTuple, Self

import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxem._core import linalg as la
from jaxem._core.numerics import ROUNDINGS
from jaxem._core.quadratic import solve_free


class JointMoments(NamedTuple):
    """Moments of t; c is k, or 1 where the covariance of residuals is shared."""

    scale_count: Float[Array, " c"]  # how many log-scales count
    joint: Float[Array, "k t t"]  # Σ r t tᵀ

    def turned(self, turn: Float[Array, "k t t"]) -> Self:
        """Moments of R t."""
        joint = la.matmul(la.matmul(turn, self.joint), la.transpose(turn))
        return self._replace(joint=joint)

    def maximum(
        self, directions: Float[Array, "k q q"]
    ) -> tuple[Float[Array, "k d q"], Float[Array, "c d d"]]:
        """The step δ within the span of the rows of `directions`, and squares about its end."""
        q = directions.shape[-1]
        moments, cross = self.joint[:, :q, :q], self.joint[:, q:, :q]
        step = solve_free(moments, cross, directions)
        # Also where the step leads to no free maximum; what is below the rounding of the squares
        # before it counts as scatter.
        moved = la.matmul(2 * cross - la.matmul(step, moments), la.transpose(step))
        moved = self._of_scales(0.5 * (moved + la.transpose(moved)))
        eye = jnp.eye(step.shape[1], dtype=step.dtype)
        trace = jnp.abs(jnp.trace(moved, axis1=1, axis2=2))
        unknown = 4 * ROUNDINGS * jnp.finfo(step.dtype).eps * trace
        squares = self._of_scales(self.joint[:, q:, q:])
        return step, squares - moved + unknown[:, None, None] * eye

    def _of_scales(self, per_component: Array) -> Array:
        """Sums over the components that share one covariance."""
        if len(self.scale_count) == len(per_component):
            return per_component
        return jnp.sum(per_component, axis=0, keepdims=True)
