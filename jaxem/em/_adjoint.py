"""How derivatives pass through the iterations of a fit: a strategy object given to `fit`.

At a fixed point s* = F(s*, u) of the EM map, in statistics space and the frozen frame of the
solution, with u the data, sample_weight, prior and frozen parameters, the implicit function theorem
says

    ds*/du = (I − ∂F/∂s)⁻¹ ∂F/∂u.

The eigenvalues of ∂F/∂s are the rates of convergence of EM, the fractions of missing information,
below 1 near a proper maximum. In statistics space boundaries are harmless (an empty component has
eigenvalue 0) and no redundant logit makes I − ∂F/∂s singular.
"""

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import lineax as lx
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core.checks import check_count
from jaxem._core.parameters import with_frozen
from jaxem._core.statistics import Framed
from jaxem.em._algorithm import State
from jaxem.em._loop import Loop
from jaxem.em._solvers import GCR


class AbstractAdjoint(eqx.Module):
    """Runs the loop of a fit, and decides what derivative its outcome has."""

    @abc.abstractmethod
    def __call__(self, loop: Loop, inputs: PyTree[Array]) -> Any:
        """The final carry."""


class Forward(AbstractAdjoint):
    """Derivatives in forward mode, through every step of the loop.

    `jax.jvp` and `jax.jacfwd` of a fit work, at the cost of one tangent for each step; `jax.grad`
    and `jax.vjp` raise `RuntimeError`. The start has a derivative too.
    """

    def __call__(self, loop: Loop, inputs: PyTree[Array]) -> Any:
        return eqxi.nondifferentiable_backward(
            loop.run(inputs),
            msg="jaxem.em.Forward() differentiates a fit in forward mode only (jax.jvp, "
            "jax.jacfwd); for jax.grad use adjoint=jaxem.em.Implicit() or jaxem.em.Unrolled().",
        )


class Unrolled(AbstractAdjoint):
    """Backpropagation through every step, converged or not, with checkpoints.

    Exact for the steps that were taken, with respect to the start too. Memory grows with the
    number of checkpoints, time with the logarithm of steps over checkpoints.

    **Arguments:** `checkpoints`, how many states to keep; default: about the square root of
    2 × max_steps.

    Stumm & Walther (2010), SIAM J. Sci. Comput. 32 (online checkpointing).
    """

    checkpoints: int | None = eqx.field(static=True, default=None)

    def __call__(self, loop: Loop, inputs: PyTree[Array]) -> Any:
        if loop.max_steps == 0:
            return loop.start(inputs)
        return loop.run(
            inputs, kind="checkpointed", max_steps=loop.max_steps, checkpoints=self.checkpoints
        )


class Truncated(AbstractAdjoint):
    """Differentiates the last steps alone; one step by default.

    Runs the fit without derivatives and then `num_steps` steps with them, from the fixed point.
    The derivative lacks what the earlier steps carry, (∂F/∂s)ᵏ of it: its relative error is about
    ρᵏ with ρ the rate of convergence, and it is a descent direction more often than exact.

    Bolte, Pauwels & Vaiter (2023), NeurIPS 36 (one-step differentiation).
    """

    num_steps: int = eqx.field(static=True, default=1)

    def __check_init__(self):
        check_count("num_steps, of Truncated,", self.num_steps)

    def __call__(self, loop: Loop, inputs: PyTree[Array]) -> Any:
        final = _stopped(loop.run(_stopped(inputs)))
        start = _at_inputs(final.state, inputs)
        last, _ = lax.scan(
            lambda state, _: (loop.step(state, inputs), None), start, length=self.num_steps
        )
        moving = jax.tree.map(_with_derivative_of, final.state, last)
        return eqx.tree_at(lambda carry: carry.state, final, moving)


class Implicit(AbstractAdjoint):
    """The implicit function theorem at the fixed point of the EM map.

    Exact for a converged fit, whatever algorithm found it, in forward and in reverse mode and to
    any order; its cost does not depend on the number of steps. The derivative with respect to the
    start is zero: `Unrolled` is for that. Of a fit that did not converge it is the derivative of
    nothing in particular; `Solution.error` estimates how far off the fixed point it is taken.

    **Arguments:**

    - `linear_solver`: one of lineax's, or `jaxem.em.GCR()` (the default, equal to GMRES) or
      `jaxem.em.Neumann()` (the series Σ (∂F/∂s)ᵏ). These need only products with I − ∂F/∂s, and its
      transpose in reverse mode; `lineax.LU()` builds the matrix, for few statistics.
    - `throw`: raise where the linear solve fails, at a fixed point that is none or not isolated;
      else the derivative is as inexact as the solve. Under vmap it raises if any lane's fails.

    **Raises:** `ValueError` for a stochastic algorithm or one that does not use all the data.
    """

    linear_solver: lx.AbstractLinearSolver = GCR()
    throw: bool = eqx.field(static=True, default=True)

    def __check_init__(self):
        if not isinstance(self.linear_solver, lx.AbstractLinearSolver):
            raise ValueError(
                f"linear_solver must be one such as GCR(), got {self.linear_solver!r}."
            )

    def __call__(self, loop: Loop, inputs: PyTree[Array]) -> Any:
        @eqx.filter_custom_jvp
        def fixed_point(inputs: Any) -> Any:
            return loop.run(inputs)

        @fixed_point.def_jvp
        def _(primals: Any, tangents: Any) -> Any:
            (inputs,), (inputs_dot,) = primals, tangents
            final = fixed_point(inputs)
            return final, self._tangent(loop, final, inputs, inputs_dot)

        return fixed_point(inputs)

    def _tangent(self, loop: Loop, final: Any, inputs: Any, inputs_dot: Any) -> Any:
        if not loop.algorithm.traits.exact:
            raise ValueError(
                "Implicit needs a deterministic algorithm over all the data, whose fixed point is "
                "one of the EM map; differentiate this one by adjoint=jaxem.em.Unrolled()."
            )
        flat, step, em_map = fixed_point_equation(
            lambda state, inputs: loop.plain_step(_at_inputs(state, inputs), inputs), final.state
        )
        _, direct = eqx.filter_jvp(lambda u: em_map(flat, u), (inputs,), (inputs_dot,))
        if direct is None:  # nothing but the start has a tangent
            return jax.tree.map(_no_tangent, final)
        _, push = jax.linearize(lambda s: em_map(s, inputs), flat)
        flat_dot = self._solve(lambda v: v - push(v), direct)
        _, state_dot = eqx.filter_jvp(step, (flat, inputs), (flat_dot, inputs_dot))
        zeros = jax.tree.map(_no_tangent, final)
        return eqx.tree_at(
            lambda carry: carry.state, zeros, state_dot, is_leaf=lambda leaf: leaf is None
        )

    def _solve(self, product: Callable[[Array], Array], right: Array) -> Array:
        def solve(product: Callable[[Array], Array], right: Array) -> Array:
            shape = jax.ShapeDtypeStruct(right.shape, right.dtype)
            operator = lx.FunctionLinearOperator(product, shape)
            found = lx.linear_solve(operator, right, self.linear_solver, throw=False)
            finite = jnp.all(jnp.isfinite(right))
            value = jnp.where(finite, found.value, jnp.nan)
            if not self.throw:
                return value
            left = found.stats.get("residual")
            if left is None:
                size = jnp.linalg.norm(right)
                left = jnp.linalg.norm(right - product(value)) / jnp.where(size > 0, size, 1)
            return _check_residual(value, left, finite)

        return lax.custom_linear_solve(product, right, solve, transpose_solve=solve)


def fixed_point_equation(
    step: Callable[[State, PyTree[Array]], State], at: State
) -> tuple[Array, Callable[[Array, Any], State], Callable[[Array, Any], Array]]:
    """The equation s = F(s, u) that a fixed point of EM solves, as functions of flat vectors.

    Returns the statistics s at a state, the whole state after one step from s with inputs u, and F
    itself, all in the frame of that state.
    """
    rest = _stopped(at)
    frame = rest.model
    flat, unravel = ravel_pytree(at.statistics.at(frame).sums)  # differentiable; the frame is not

    def state(flat: Array, inputs: Any) -> State:
        there = eqx.tree_at(lambda s: s.statistics, rest, Framed(unravel(flat), frame))
        return step(there, inputs)

    def em_map(flat: Array, inputs: Any) -> Array:
        return ravel_pytree(state(flat, inputs).statistics.at(frame).sums)[0]

    return flat, state, em_map


# Relative residuals at which a linear solve has failed; the messages name the decade.
_FAILED = {jnp.dtype("float64"): 1e-6, jnp.dtype("float32"): 1e-2}
_DECADES = 7


def _check_residual(
    solution: Array, left: Float[Array, ""], finite: Bool[Array, ""]
) -> Float[Array, " s"]:
    """The solution, or an error where that of a finite right side is none."""
    failed = finite & ~(left <= _FAILED.get(solution.dtype, 1e-2))
    decade = jnp.clip(-jnp.floor(jnp.log10(left)), 0, _DECADES)
    number = jnp.where(jnp.isfinite(left), decade, _DECADES + 1).astype(jnp.int32)
    sizes = [f"at a relative residual of about 1e-{i}" for i in range(_DECADES + 1)]
    messages = [
        f"The linear solve of the implicit derivative stopped {where}. "
        "Likely the fit is not at an isolated maximum (not converged, degenerate, or "
        "components that are all alike); else give Implicit another linear_solver. With "
        "Implicit(throw=False) the inexact derivative is returned."
        for where in (*sizes, "at a product that is not finite")
    ]
    return eqxi.branched_error_if(solution, failed, number, messages)


def _at_inputs(state: State, inputs: Any) -> State:
    """A state whose frozen parameters are those of the inputs, and carry their derivative."""
    model = with_frozen(state.model, inputs.model)
    return eqx.tree_at(lambda s: s.statistics, state, state.statistics.at(model))


def _stopped(tree: Any) -> Any:
    return jax.tree.map(
        lambda leaf: lax.stop_gradient(leaf) if eqx.is_inexact_array(leaf) else leaf, tree
    )


def _with_derivative_of(value: Any, moving: Any) -> Any:
    if not eqx.is_inexact_array(value):
        return value
    return value + (moving - lax.stop_gradient(moving))


def _no_tangent(leaf: Any) -> Array | None:
    return jnp.zeros_like(leaf) if eqx.is_inexact_array(leaf) else None
