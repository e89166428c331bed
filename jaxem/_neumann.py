"""The Neumann series as a linear solver."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array


class Neumann(lx.AbstractLinearSolver[Any]):
    """Solves (I − A) x = b by x = Σ Aᵏ b, with A the Jacobian of the EM map.

    Each term costs one product and k terms leave an error of about ρᵏ, with ρ the rate of
    convergence: GMRES needs fewer products, this one no stored basis.

    **Arguments:** `rtol`, the relative residual to stop at; `max_steps`, at most this many terms.
    """

    rtol: float = 1e-10
    max_steps: int = 10_000

    def init(self, operator, options):
        return operator

    def compute(self, state, vector, options):
        operator = state
        limit = self.rtol * jnp.linalg.norm(vector)

        def left(x: Array) -> Array:
            return vector - operator.mv(x)

        def unfinished(carry: tuple[Array, Array, Array]) -> Array:
            _, residual, step = carry
            return (jnp.linalg.norm(residual) > limit) & (step < self.max_steps)

        def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, residual, step = carry
            x = x + residual
            return x, left(x), step + 1

        start = jnp.zeros_like(vector)
        x, residual, steps = lax.while_loop(unfinished, add, (start, vector, 0))
        reached = jnp.linalg.norm(residual) <= limit
        result = lx.RESULTS.where(reached, lx.RESULTS.successful, lx.RESULTS.max_steps_reached)
        return x, result, {"num_steps": steps}

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True
