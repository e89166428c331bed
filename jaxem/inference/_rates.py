"""How fast EM converges, and whether it converged to a maximum: eigenvalues of its map.

Near a fixed point each step shrinks the distance by the eigenvalues of ∂F/∂s, which are the
fractions of missing information (Dempster, Laird & Rubin 1977). They are found by Arnoldi's
method: products with ∂F/∂s alone, one linearised EM step each.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core import linalg as la
from jaxem._core.parameters import estimates
from jaxem._core.statistics import Framed
from jaxem.em._adjoint import fixed_point_equation
from jaxem.em._algorithm import AbstractAlgorithm, State
from jaxem.em._em import EM
from jaxem.em._problem import Problem
from jaxem.em._solution import Solution
from jaxem.inference._fitted import possible_problem
from jaxem.models._alone import shown
from jaxem.models._base import AbstractModel


class ConvergenceRate(eqx.Module):
    """The slowest modes of EM at a fixed point.

    - `eigenvalues` (m,), largest first: in one step of EM the distance along each mode shrinks to
      this fraction. The first is the rate of convergence.
    - `error` (m,): bounds on the residuals ‖∂F/∂s v − λ v‖ / ‖v‖.
    - `direction`: how the parameters move along the slowest mode, largest change 1.
    - `change`: how far one more step moves the statistics, per observation of weight; the
      eigenvalues speak of a fixed point only where it is small.
    """

    eigenvalues: Float[Array, " m"]
    error: Float[Array, " m"]
    direction: PyTree[Array]
    change: Float[Array, ""]
    statistics: Framed  # with the prior: what the next M-step sees
    mode: Framed  # the slowest mode, whose largest entry is the total weight

    @property
    def saddle(self) -> Bool[Array, ""]:
        """Whether EM moves away from the fixed point along some mode: it is no maximum."""
        margin = jnp.finfo(self.eigenvalues.dtype).eps ** 0.5
        return self.eigenvalues[0] > 1 + jnp.maximum(self.error[0], margin)

    def away(self, distance: float = 0.1) -> Any:
        """A model moved along the slowest mode: at a saddle, a start on the way up.

        `distance` is in statistics per observation of weight; its sign chooses the side.
        """
        moved = self.statistics + distance * self.mode
        return shown(moved.frame.m_step(moved))

    def __repr__(self) -> str:
        if self.eigenvalues.ndim != 1 or isinstance(self.eigenvalues, Tracer):
            return f"ConvergenceRate(shape {self.eigenvalues.shape})"
        values = ", ".join(f"{value:.6g}" for value in self.eigenvalues)
        end = "\n  a saddle: refit from .away()" if bool(self.saddle) else ""
        return f"ConvergenceRate: eigenvalues {values}{end}"


def convergence_rate(
    fitted: Solution | Any,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    num_eigenvalues: int = 1,
    krylov_steps: int = 30,
) -> ConvergenceRate:
    """The rate at which EM converges to a fitted model: the fraction of missing information.

    An eigenvalue above 1 means that the fit is at a saddle, where EM from a symmetric start ends;
    `ConvergenceRate.away` leaves it.

    **Arguments:** a solution or a model; the data, algorithm, sample_weight and prior of the fit.

    - `num_eigenvalues`: how many of the largest.
    - `krylov_steps`: products with the Jacobian, each about three E-steps.

    **Raises:** `ValueError` for a stochastic algorithm, which has no such map.

    Dempster, Laird & Rubin (1977), JRSS B 39; Arnoldi (1951), Quart. Appl. Math. 9.
    """
    model, problem = possible_problem(fitted, data, sample_weight, prior)
    if not algorithm.traits.exact:
        raise ValueError(
            "convergence_rate needs a deterministic algorithm over all the data, such as EM()."
        )
    if not 1 <= num_eigenvalues <= krylov_steps:
        raise ValueError(
            f"num_eigenvalues must lie between 1 and krylov_steps, got {num_eigenvalues}."
        )
    return _rate(model, problem, algorithm.plain(), num_eigenvalues, krylov_steps)


@eqx.filter_jit
def _rate(
    model: AbstractModel, problem: Problem, em: EM, num_eigenvalues: int, krylov_steps: int
) -> ConvergenceRate:
    state = em.init(model, problem)

    def step(state: State, _: Any) -> State:
        return em.whole_step(state, problem)

    flat, after, em_map = fixed_point_equation(step, state)
    image, push = jax.linearize(lambda s: em_map(s, None), flat)
    steps = min(krylov_steps, flat.size)
    start = push(jax.random.normal(jax.random.key(0), flat.shape, flat.dtype))
    basis, hessenberg = _arnoldi(push, start, steps)
    values, vectors = jnp.linalg.eig(hessenberg[:-1])
    order = jnp.argsort(-values.real)[:num_eigenvalues]
    error = jnp.abs(hessenberg[-1, -1] * vectors[-1, order])
    slowest = la.apply(basis[:-1].T, vectors[:, order[0]].real.astype(flat.dtype))

    total = problem.total_weight
    slowest = slowest * total / jnp.max(jnp.abs(slowest))
    _, unravel = ravel_pytree(state.statistics.sums)
    _, moved = jax.jvp(
        lambda s: ravel_pytree(estimates(shown(after(s, None).model)))[0], (flat,), (slowest,)
    )
    moved = moved / jnp.max(jnp.abs(moved))
    _, by_name = ravel_pytree(estimates(shown(model)))
    change = jnp.max(jnp.abs(image - flat)) / total
    prior = problem.prior
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
            shares = la.apply(basis, new)
            new, total = new - la.apply(basis.T, shares), total + shares
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
