"""The door of a fit: arguments are checked once, then one compiled loop runs."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jaxtyping import Array, Float, PyTree

from jaxem._core.checks import (
    check_count,
    check_nonnegative,
    checked_key,
    is_integer,
)
from jaxem._core.compilation import filter_jit
from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import replace
from jaxem._core.statistics import Framed
from jaxem.em._adjoint import AbstractAdjoint, Implicit
from jaxem.em._algorithm import AbstractAlgorithm
from jaxem.em._em import EM
from jaxem.em._expectation import AbstractExpectation
from jaxem.em._loop import Inputs, Loop, Progress, verdict
from jaxem.em._problem import Problem, as_problem
from jaxem.em._sharding import shards_of
from jaxem.em._solution import RESULTS, Solution, impossible_data, is_any
from jaxem.latents import AbstractPosterior
from jaxem.models._alone import as_model, shown
from jaxem.models._base import AbstractModel


def fit(
    model: Any,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    key: Array | None = None,
    tol: float | None = None,
    max_steps: int = 1000,
    adjoint: AbstractAdjoint = Implicit(),
    throw: bool = True,
    progress: Progress | int | None = None,
) -> Solution:
    """Fits a model to data, starting from the model as it is given.

    The fit is one compiled loop. It can be jitted, vmapped (over models: restarts, each lane
    stops by itself; over data, weights, priors or `tol`) and differentiated, with respect to
    data, sample_weight, prior and frozen parameters. The start has derivative zero, unless
    `adjoint` says otherwise.

        start = jaxem.Mixture.init(key, x, 3, jaxem.emissions.Gaussian)
        solution = jaxem.fit(start, x)
        solution.model.weights, solution.converged

    **Arguments:**

    - `model`: a model, or an emission of one component, which is then fitted alone.
    - `data`: what the model's `e_step` takes; the leading axis of every leaf is the observation.
      Or a `Problem`, which holds weights and prior too.
    - `algorithm`: how to step; default `EM()`.
    - `sample_weight` (n,): one non-negative number for each observation. Weight 0 equals absence,
      whatever the observation holds; weight 2 equals the observation twice.
    - `prior`: pseudo-statistics from `model.prior(…)`; the fit then seeks the posterior mode.
    - `key`: for algorithms that draw random numbers.
    - `tol`: converged when in one step the objective gains, and the statistics move, by no more
      than this, both per observation of weight. Dimensionless: nothing changes when data are
      rescaled. Default eps^⅔ of the dtype: 4e-11 in float64, 2e-5 in float32. It bounds the
      *step*, which is smaller than the distance left; that is estimated in `Solution.error`. Where
      parameters are so coarse that rounding alone moves the statistics more, that movement takes
      the place of `tol`. With 0 the fit takes `max_steps` steps.
    - `max_steps`: at most this many steps.
    - `adjoint`: how derivatives pass through the fit. `Implicit()` takes them at the fixed
      point, exactly for a converged fit; with respect to the start they are then zero.
      `Unrolled()`, `Truncated()` and `Forward()` go through the steps.
    - `throw`: raise where the answer would be worthless (non-finite, invalid data or weights),
      instead of in `Solution.result` alone. Under vmap it raises if any lane fails: restarts use
      `throw=False`.
    - `progress`: report every so many steps, from inside the loop.

    **Returns:** a `Solution`; its `model` is an emission where one was given.

    **Raises:** `ValueError` for wrong shapes, dtypes or settings; with `throw`,
    `equinox.EquinoxRuntimeError` for the outcomes above.
    """
    if isinstance(model, Solution):
        raise ValueError(
            "fit expects a model such as jaxem.Mixture, got Solution; its model is solution.model."
        )
    model = as_model(model, "fit")
    problem = as_problem(data, model, sample_weight, prior)
    _check_settings(algorithm, tol, max_steps, adjoint, progress)
    dtype = float_dtype(model)
    tol = float(jnp.finfo(dtype).eps) ** (2 / 3) if tol is None else tol
    progress = Progress(progress) if isinstance(progress, int | np.integer) else progress
    problem = replace(problem, shards=problem.shards or shards_of(problem.data))
    loop = Loop(algorithm, int(max_steps), progress)
    key = None if key is None else checked_key(key)
    known = isinstance(tol, int | float)  # then NumPy's array of it compiles no program
    bound = np.asarray(tol, dtype) if known else jnp.asarray(tol, dtype)
    inputs = Inputs(model, problem, key, bound)
    solution, worthless = _fit(loop, inputs, adjoint)
    if not throw:
        return solution
    if isinstance(worthless, Tracer):
        return solution.result.error_if(solution, worthless)
    if bool(worthless):
        raise eqx.EquinoxRuntimeError(_what_is_wrong(solution.result, model, problem))
    return solution


@filter_jit()
def _fit(loop: Loop, inputs: Inputs, adjoint: AbstractAdjoint) -> tuple[Solution, Array]:
    """The solution, and whether there is none to speak of."""
    final = adjoint(loop, inputs)
    problem, step = inputs.problem, final.state.step
    state = loop.algorithm.finish(final.state, problem, key=inputs.key_at(step + 1))
    fixed = jax.tree.map(lax.stop_gradient, (state.statistics, problem))
    result, cause = verdict(final.result, *fixed)
    solution = Solution(
        model=shown(state.model),
        objective=state.objective,
        log_likelihood=state.log_likelihood,
        statistics=shown(Framed(state.statistics.sums, state.model)),
        history=final.history,
        num_steps=step,
        error=final.error,
        result=result,
        cause=cause,
    )
    failures = RESULTS.nonfinite, RESULTS.invalid_data, RESULTS.invalid_sample_weight
    return solution, is_any(result, *failures)


def _check_settings(algorithm: Any, tol: Any, max_steps: Any, adjoint: Any, progress: Any) -> None:
    if not isinstance(algorithm, AbstractAlgorithm):
        advice = (
            "EM(Hard())"
            if isinstance(algorithm, AbstractExpectation | AbstractPosterior)
            else "EM() or SQUAREM()"
        )
        raise ValueError(f"the algorithm must be one such as {advice}, got {algorithm!r}.")
    if not isinstance(adjoint, AbstractAdjoint):
        raise ValueError(f"the adjoint must be one such as Implicit(), got {adjoint!r}.")
    check_count("max_steps", max_steps, 0)
    most = jnp.iinfo(jnp.int32).max - 1
    if max_steps > most:
        raise ValueError(f"max_steps must be at most {most}, got {max_steps}.")
    if not (progress is None or is_integer(progress) or isinstance(progress, Progress)):
        raise ValueError(
            f"progress is a number of steps or Progress(every, report), got {progress!r}."
        )
    check_nonnegative("tol", tol if tol is not None else 0.0)


def _what_is_wrong(result: RESULTS, model: AbstractModel, problem: Problem) -> str:
    """The message of a result, and the observations that it is about."""
    if bool(result == RESULTS.invalid_data):
        return impossible_data(np.asarray(problem.possible(model)))
    return RESULTS[result]
