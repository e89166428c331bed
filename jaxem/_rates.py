"""How fast EM converges, and whether it converged to a maximum: eigenvalues of its map.

Near a fixed point each step shrinks the distance by the eigenvalues of ∂F/∂s, which are the
fractions of missing information (Dempster, Laird & Rubin 1977). They are found by Arnoldi's
method: products with ∂F/∂s alone, one linearised EM step each.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxem import _linalg as la
from jaxem._adjoint import fixed_point_equation
from jaxem._em import EM, AbstractAlgorithm
from jaxem._hold import estimates
from jaxem._model import AbstractModel
from jaxem._solution import Solution, checked
from jaxem._statistics import Framed
from jaxem._units import total_weight


class ConvergenceRate(eqx.Module):
    """The slowest modes of EM at a fixed point.

    - `eigenvalues` (m,), largest first: in one step of EM the distance along each mode shrinks to
      this fraction. The first is the rate of convergence.
    - `error` (m,): bounds on the residuals ‖∂F/∂s v − λ v‖ / ‖v‖.
    - `direction`: how the natural parameters move along the slowest mode, largest change 1.
    - `change`: how far one more step moves the statistics, per unit of weight; the eigenvalues
      speak of a fixed point only where it is small.
    """

    eigenvalues: Float[Array, " m"]
    error: Float[Array, " m"]
    direction: PyTree[Array]
    change: Float[Array, ""]
    statistics: Framed  # with the prior: what the next M-step sees
    mode: Framed  # the slowest mode, whose largest entry is the total weight

    @property
    def saddle(self) -> Bool[Array, ""]:
        """Whether EM moves away along some mode: the fixed point is no maximum."""
        margin = jnp.finfo(self.eigenvalues.dtype).eps ** 0.5
        return self.eigenvalues[0] > 1 + jnp.maximum(self.error[0], margin)

    def away(self, distance: float = 0.1) -> AbstractModel:
        """A model moved along the slowest mode: at a saddle, a start on the way up.

        `distance` is in statistics per unit of weight; its sign chooses the side.
        """
        moved = self.statistics + distance * self.mode
        return moved.frame.m_step(moved)

    def __repr__(self) -> str:
        if self.eigenvalues.ndim != 1 or isinstance(self.eigenvalues, Tracer):
            return f"ConvergenceRate(shape {self.eigenvalues.shape})"
        values = ", ".join(f"{value:.6g}" for value in self.eigenvalues)
        end = "\n  a saddle: refit from .away()" if bool(self.saddle) else ""
        return f"ConvergenceRate: eigenvalues {values}{end}"


def convergence_rate(
    fitted: Solution | AbstractModel,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    num_eigenvalues: int = 1,
    krylov_steps: int = 30,
) -> ConvergenceRate:
    """The rate at which EM converges to a fitted model: the fraction of missing information.

    An eigenvalue above 1 says that the fit sits on a saddle, as EM started from a symmetric point
    may; `ConvergenceRate.away` leaves it.

    **Arguments:** a solution or a model; the data, algorithm, weights and prior of the fit.

    - `num_eigenvalues`: how many of the largest.
    - `krylov_steps`: products with the Jacobian, each about three E-steps.

    **Raises:** `ValueError` for a stochastic algorithm, which has no such map.

    Dempster, Laird & Rubin (1977), JRSS B 39; Arnoldi (1951), Quart. Appl. Math. 9.
    """
    model, data, weights = checked(fitted, data, weights)
    if not algorithm.exact:
        raise ValueError(
            "convergence_rate needs a deterministic algorithm over all the data, such as EM()."
        )
    if not 1 <= num_eigenvalues <= krylov_steps:
        raise ValueError(
            f"num_eigenvalues must lie between 1 and krylov_steps, got {num_eigenvalues}."
        )
    em_map = algorithm.em_map()
    return _rate(model, data, em_map, weights, prior, num_eigenvalues, krylov_steps)


@eqx.filter_jit
def _rate(
    model: AbstractModel,
    data: Any,
    algorithm: Any,
    weights: Any,
    prior: Any,
    num_eigenvalues: int,
    krylov_steps: int,
) -> ConvergenceRate:
    state = algorithm.init(model, data, weights=weights, prior=prior)

    def step(state: Any, _: Any) -> Any:
        return algorithm.map(state, data, weights=weights, prior=prior)

    flat, after, em_map = fixed_point_equation(step, state)
    image, push = jax.linearize(lambda s: em_map(s, None), flat)
    steps = min(krylov_steps, flat.size)
    start = push(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))
    basis, hessenberg = _arnoldi(push, start, steps)
    values, vectors = jnp.linalg.eig(hessenberg[:-1])
    order = jnp.argsort(-values.real)[:num_eigenvalues]
    error = jnp.abs(hessenberg[-1, -1] * vectors[-1, order])
    slowest = la.apply(basis[:-1].T, vectors[:, order[0]].real.astype(flat.dtype))

    total = total_weight(data, weights)
    slowest = slowest * total / jnp.max(jnp.abs(slowest))
    _, unravel = ravel_pytree(state.statistics.sums)
    _, moved = jax.jvp(
        lambda s: ravel_pytree(estimates(after(s, None).model))[0], (flat,), (slowest,)
    )
    moved = moved / jnp.max(jnp.abs(moved))
    _, by_name = ravel_pytree(estimates(model))
    change = jnp.max(jnp.abs(image - flat)) / total
    statistics = state.statistics if prior is None else state.statistics + prior
    return ConvergenceRate(
        values.real[order].astype(flat.dtype),
        error.astype(flat.dtype),
        by_name(moved),
        change,
        statistics,
        Framed(unravel(slowest), model),
    )


def _arnoldi(
    product: Callable[[Array], Array], start: Array, steps: int
) -> tuple[Float[Array, "m+1 n"], Float[Array, "m+1 m"]]:
    """An orthonormal basis Q of Krylov vectors and H with A Qᵀ[:, :m] = Qᵀ H.

    Where the Krylov space ends, a fresh direction goes on: multiple eigenvalues show as often as
    they are.
    """
    eps = jnp.finfo(start.dtype).eps
    fresh = jax.random.normal(jax.random.key(1), (steps + 1, start.size), start.dtype)

    def outside(basis: Array, new: Array) -> tuple[Array, Array]:
        total = jnp.zeros(steps + 1, start.dtype)
        for _ in range(2):  # once is not enough in floating point
            along = la.apply(basis, new)
            new, total = new - la.apply(basis.T, along), total + along
        return new, total

    def unit(v: Array) -> Array:
        size = jnp.linalg.norm(v)
        return v / jnp.where(size > 0, size, 1)

    def extend(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        basis, hessenberg = carry
        image = product(basis[j])
        new, column = outside(basis, image)
        size = jnp.linalg.norm(new)
        ended = size <= 100 * eps * jnp.maximum(jnp.linalg.norm(image), 1)
        following = unit(jnp.where(ended, outside(basis, unit(fresh[j]))[0], new))
        column = column.at[j + 1].set(jnp.where(ended, 0, size))
        return basis.at[j + 1].set(following), hessenberg.at[:, j].set(column)

    basis = jnp.zeros((steps + 1, start.size), start.dtype).at[0].set(unit(start))
    hessenberg = jnp.zeros((steps + 1, steps), start.dtype)
    return lax.fori_loop(0, steps, extend, (basis, hessenberg))
