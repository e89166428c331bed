"""Linear solvers for (I − A) x = b, with A the Jacobian of the EM map, as lineax has them.

Both make their products in one place of the program and return the residual that is left. lineax's
GMRES does neither: with a product to check it, it takes a fourth longer to compile.
"""

from typing import Any

import jax.numpy as jnp
import lineax as lx
from jax import lax
from jaxtyping import Array

from jaxem._core import linalg as la
from jaxem._core.checks import check_count, check_nonnegative


class _Iterative(lx.AbstractLinearSolver[Any]):
    """A solver that needs only products; `stats` hold `num_steps` and the relative `residual`."""

    def init(self, operator, options):
        return operator

    def transpose(self, state, options):
        return state.transpose(), options

    def conj(self, state, options):
        return state, options

    def assume_full_rank(self):
        return True


class GCR(_Iterative):
    """Generalised conjugate residuals: the iterates of GMRES, one product each.

    **Arguments:** `rtol`, the relative residual to stop at, default eps^0.65 (7e-11 in float64,
    3e-5 in float32); `max_steps`; `basis`, how many directions are kept, the oldest making room.

    Eisenstat, Elman & Schultz (1983), SIAM J. Numer. Anal. 20; Saad & Schultz (1986), SIAM J. Sci.
    Stat. Comput. 7 (GMRES).
    """

    rtol: float | None = None
    max_steps: int = 500
    basis: int = 40

    def __check_init__(self):
        if self.rtol is not None:
            check_nonnegative("rtol, of GCR,", self.rtol)
        check_count("max_steps", self.max_steps)
        check_count("basis", self.basis)

    def compute(self, state, vector, options):
        operator = state
        rtol = float(jnp.finfo(vector.dtype).eps) ** 0.65 if self.rtol is None else self.rtol
        size = jnp.linalg.norm(vector)

        def unfinished(carry: Any) -> Array:
            _, residual, _, _, _, step = carry
            return (jnp.linalg.norm(residual) > rtol * size) & (step < self.max_steps)

        def advance(carry: Any) -> Any:
            x, residual, direction, directions, images, step = carry
            image = operator.mv(direction)
            for _ in range(2):  # once is not enough in floating point
                shares = la.apply(images, image)
                image = image - la.apply(images.T, shares)
                direction = direction - la.apply(directions.T, shares)
            length = jnp.linalg.norm(image)
            inverse = jnp.where(length > 0, 1 / jnp.where(length > 0, length, 1), 0)
            direction, image = direction * inverse, image * inverse
            gain = jnp.vdot(image, residual)
            before = jnp.linalg.norm(residual)
            x, residual = x + gain * direction, residual - gain * image
            # Where the residual is no new direction (it did not move), the last image is one.
            following = jnp.where(jnp.abs(gain) > 1e-3 * before, residual, image)
            place = step % self.basis
            directions, images = directions.at[place].set(direction), images.at[place].set(image)
            return x, residual, following, directions, images, step + 1

        none = jnp.zeros((self.basis, vector.size), vector.dtype)
        start = (jnp.zeros_like(vector), vector, vector, none, none, 0)
        x, residual, _, _, _, steps = lax.while_loop(unfinished, advance, start)
        return _outcome(x, residual, size, rtol, steps)


class Neumann(_Iterative):
    """The series x = Σ Aᵏ b.

    Each term costs one product and k terms leave an error of about ρᵏ, with ρ the rate of
    convergence: more products than GCR, and no stored basis.

    **Arguments:** `rtol`, the relative residual to stop at; `max_steps`, at most this many terms.
    """

    rtol: float = 1e-10
    max_steps: int = 10_000

    def __check_init__(self):
        check_nonnegative("rtol, of Neumann,", self.rtol)
        check_count("max_steps", self.max_steps)

    def compute(self, state, vector, options):
        operator = state
        size = jnp.linalg.norm(vector)

        def unfinished(carry: tuple[Array, Array, Array]) -> Array:
            _, residual, step = carry
            return (jnp.linalg.norm(residual) > self.rtol * size) & (step < self.max_steps)

        def add(carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            x, residual, step = carry
            return x + residual, residual - operator.mv(residual), step + 1

        start: Any = (jnp.zeros_like(vector), vector, 0)
        x, residual, steps = lax.while_loop(unfinished, add, start)
        return _outcome(x, residual, size, self.rtol, steps)


def _outcome(x: Array, residual: Array, size: Array, rtol: float, steps: Array) -> Any:
    left = jnp.linalg.norm(residual) / jnp.where(size > 0, size, 1)
    result = lx.RESULTS.where(left <= rtol, lx.RESULTS.successful, lx.RESULTS.max_steps_reached)
    return x, result, {"num_steps": steps, "residual": left}
