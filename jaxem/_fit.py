"""The loop around an algorithm: one compiled while-loop, its stopping rule, its verdict."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._adjoint import AbstractAdjoint, Implicit, Loop
from jaxem._checks import check_count, check_nonnegative, name_of, or_absent
from jaxem._em import EM, AbstractAlgorithm, State
from jaxem._emission import AbstractEmission, float_dtype
from jaxem._model import AbstractModel
from jaxem._posterior import AbstractExpectation, Exact
from jaxem._sharding import on_shards
from jaxem._solution import RESULTS, Solution, checked, is_any
from jaxem._statistics import Framed, distance
from jaxem._units import total_weight


def _print_progress(step: int, objective: float, change: float) -> None:
    print(f"step {int(step):5d}   objective {float(objective):.8g}   change {float(change):.1e}")


class Progress(eqx.Module):
    """A report from inside the compiled loop, on the host, every few steps.

    **Arguments:** `every`, in steps; `report(step, objective, change)`, default: print a line.
    """

    every: int = eqx.field(static=True, default=10)
    report: Callable[..., None] = eqx.field(static=True, default=_print_progress)

    def __check_init__(self):
        if self.every < 1:
            raise ValueError(f"Progress reports every 1 or more steps, got {self.every}.")

    def tell(self, step: Array, objective: Array, change: Array) -> None:
        """Reports from within a compiled program, if it is the turn of this step."""
        jax.lax.cond(
            step % self.every == 0,
            lambda: jax.debug.callback(self.report, step, objective, change),
            lambda: None,
        )


def fit(
    model: AbstractModel,
    data: PyTree[Array],
    algorithm: AbstractAlgorithm = EM(),
    *,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    key: Array | None = None,
    tol: float | None = None,
    max_steps: int = 1000,
    min_variance: float = 1e-3,
    adjoint: AbstractAdjoint = Implicit(),
    throw: bool = True,
    progress: Progress | int | None = None,
) -> Solution:
    """Fits a model to data, starting from the model as it is given.

    The fit is one compiled loop. It may be jitted, vmapped (over models: restarts, each lane
    stops by itself; over data, weights, priors or `tol`) and differentiated, with respect to
    data, weights, prior and held parameters. The start has derivative zero, unless `adjoint`
    says otherwise.

    **Arguments:**

    - `data`: what the model's `e_step` takes; the leading axis of every leaf is the unit.
    - `algorithm`: how to step; default `EM()`.
    - `weights`: one non-negative number for each unit. Weight 0 equals absence, whatever the
      unit holds; weight 2 equals the unit twice.
    - `prior`: pseudo-statistics from `model.prior(…)`; the fit then seeks the posterior mode.
    - `key`: for algorithms that draw random numbers.
    - `tol`: converged when in one step the objective gains, and the statistics move, by no more
      than this, both per unit of weight. Dimensionless: nothing changes when data are rescaled.
      Default eps^⅔ of the dtype: 4e-11 in float64, 2e-5 in float32. It bounds the *step*, which
      is smaller than the distance left; that is estimated in `Solution.error`. Where parameters
      are so coarse that rounding alone moves the statistics more, that movement takes the place
      of `tol`. With 0 the fit takes `max_steps` steps.
    - `max_steps`: at most this many steps.
    - `min_variance`: a component with a smaller variance than this fraction of the average
      within-component one is reported as `degenerate`.
    - `adjoint`: how derivatives pass through the fit. `Implicit()` takes them at the fixed
      point, exactly for a converged fit; with respect to the start they are then zero.
      `Unrolled()`, `Truncated()` and `Forward()` go through the steps.
    - `throw`: raise where the answer would be worthless (non-finite, invalid data or weights),
      instead of saying so in `Solution.result` alone. Under vmap it raises if any lane fails:
      restarts use `throw=False`.
    - `progress`: report every so many steps, from inside the loop.

    **Returns:** a `Solution`.

    **Raises:** `ValueError` for wrong shapes, dtypes or settings; with `throw`,
    `equinox.EquinoxRuntimeError` for the outcomes above.
    """
    if not isinstance(model, AbstractModel):
        raise ValueError(_no_model(model))
    model, data, weights = checked(model, data, weights)
    _check_settings(algorithm, prior, tol, max_steps, min_variance, adjoint)
    dtype = float_dtype(model)
    tol = float(jnp.finfo(dtype).eps) ** (2 / 3) if tol is None else tol
    progress = Progress(progress) if isinstance(progress, int) else progress
    solution = _fit(
        on_shards(algorithm, data),
        _Inputs(model, data, weights, prior, key, jnp.asarray(tol, dtype)),
        jnp.asarray(min_variance, dtype),
        max_steps,
        adjoint,
        progress,
    )
    if throw:
        worthless = is_any(
            solution.result, RESULTS.nonfinite, RESULTS.invalid_data, RESULTS.invalid_weights
        )
        if not isinstance(worthless, Tracer) and bool(worthless):
            raise eqx.EquinoxRuntimeError(_what_is_wrong(solution.result, model, data, weights))
        solution = solution.result.error_if(solution, worthless)
    return solution


def _what_is_wrong(result: RESULTS, model: AbstractModel, data: Any, weights: Any) -> str:
    """The message of a result, and the units that it is about."""
    message = RESULTS[result]
    if bool(result == RESULTS.invalid_data):
        fits = np.asarray(or_absent(model.in_support(data), weights))
        wrong = np.flatnonzero(~fits)
        first = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
        message += f" Here: {len(wrong)} of {len(fits)} units, number {first}."
    return message


def _no_model(given: Any) -> str:
    kind = name_of(given)
    if isinstance(given, AbstractEmission):
        advice = f"an emission becomes one by jaxem.Mixture(weights, {kind}(…))"
    elif isinstance(given, Solution):
        advice = "its model is solution.model"
    elif isinstance(given, type):
        advice = f"that is a class: {kind}.init(key, data, …) or {kind}(…) makes one"
    elif hasattr(given, "shape"):
        advice = "the model comes first, then the data"
    else:
        advice = "two plain functions become one by jaxem.from_functions"
    return f"fit expects a model such as jaxem.Mixture, got {kind}; {advice}."


def _check_settings(
    algorithm: Any, prior: Any, tol: Any, max_steps: Any, min_variance: Any, adjoint: Any
) -> None:
    if not isinstance(algorithm, AbstractAlgorithm):
        advice = "EM(Hard())" if isinstance(algorithm, AbstractExpectation) else "EM() or SQUAREM()"
        raise ValueError(f"the algorithm must be one such as {advice}, got {algorithm!r}.")
    if not isinstance(adjoint, AbstractAdjoint):
        raise ValueError(f"the adjoint must be one such as Implicit(), got {adjoint!r}.")
    if prior is not None and not isinstance(prior, Framed):
        raise ValueError(f"prior must come from model.prior(…), got {type(prior).__name__}.")
    check_count("max_steps", max_steps, 0)
    check_nonnegative("tol", tol if tol is not None else 0.0)
    check_nonnegative("min_variance", min_variance)


def _check_prior(own: Framed, prior: Framed) -> None:
    """At trace time alone: whether the prior's statistics are those of the model."""
    if _kind(own) != _kind(prior):
        raise ValueError(
            "prior does not belong to this model: it was made by another family, or for other "
            "numbers of components or features. It comes from this model's model.prior(…); a "
            "prior of the components goes in as model.prior(components=…)."
        )


def _kind(tree: Any) -> Any:
    """The types in a tree and the shapes of its arrays; held or not makes no difference."""
    if tree is None or jax.tree_util.all_leaves([tree]):
        return getattr(tree, "shape", None)
    parts = jax.tree.leaves(tree, is_leaf=lambda node: node is not tree)
    return type(tree), tuple(_kind(part) for part in parts)


class _Inputs(NamedTuple):
    """All that a fit is a function of, apart from settings."""

    model: AbstractModel
    data: PyTree[Array]
    weights: Float[Array, " n"] | None
    prior: Framed | None
    key: Array | None
    tol: Float[Array, ""]

    def key_at(self, step: Int[Array, ""]) -> Array | None:
        return None if self.key is None else jax.random.fold_in(self.key, step)


class _Carry(eqx.Module):
    state: State
    change: Float[Array, ""]
    error: Float[Array, ""]
    still: Int[Array, ""]  # the steps that hardly moved, one after another
    history: Float[Array, " max_steps+1"]
    result: RESULTS
    unfinished: Bool[Array, ""]


@eqx.filter_jit
def _fit(
    algorithm: AbstractAlgorithm,
    inputs: _Inputs,
    min_variance: Float[Array, ""],
    max_steps: int,
    adjoint: AbstractAdjoint,
    progress: Progress | None,
) -> Solution:
    def start(inputs: _Inputs) -> _Carry:
        model, data, weights, prior, *_ = inputs
        if prior is not None:
            own = jax.eval_shape(lambda: model.e_step(data, weights, posterior=Exact())[0])
            _check_prior(own, prior)
        key = inputs.key_at(jnp.zeros((), jnp.int32))
        state = algorithm.init(model, data, weights=weights, prior=prior, key=key)
        blank = jnp.full(max_steps + 1, jnp.nan, state.objective.dtype)
        result = RESULTS.where(
            jnp.isfinite(state.objective), RESULTS.max_steps_reached, RESULTS.nonfinite
        )
        result = RESULTS.where(_valid_data(model, data, weights), result, RESULTS.invalid_data)
        result = RESULTS.where(_valid_weights(weights), result, RESULTS.invalid_weights)
        history = blank.at[0].set(state.objective)
        going = (result == RESULTS.max_steps_reached) & (max_steps > 0)
        nan = jnp.full_like(state.objective, jnp.nan)
        none = jnp.zeros((), jnp.int32)
        return _Carry(state, nan, nan, none, history, result, going)

    def step(state: State, inputs: _Inputs) -> State:
        _, data, weights, prior, *_ = inputs
        key = inputs.key_at(state.step + 1)
        return algorithm.step(state, data, weights=weights, prior=prior, key=key)

    def advance(carry: _Carry, inputs: _Inputs) -> _Carry:
        _, data, weights, _, _, tol = inputs
        old, new = carry.state, step(carry.state, inputs)
        total = total_weight(data, weights)
        gain = new.objective - old.objective
        change = distance(new.statistics, old.statistics) / total
        ratio = change / carry.change
        error = jnp.where(ratio < 1, change * ratio / (1 - ratio), jnp.inf)
        error = jnp.where(jnp.isnan(carry.change), jnp.nan, jnp.where(change > 0, error, 0))
        # Changes as small as rounding have no rate: keep the last estimate that had one.
        resolution = _resolution(new.statistics) / total
        noise = (change <= 10 * resolution) & jnp.isfinite(carry.error)
        error = jnp.where(noise, carry.error, error) if algorithm.steady else carry.error

        rounding = jnp.finfo(gain.dtype).eps * (jnp.abs(old.objective) + total)
        finite = jnp.isfinite(new.objective) & jnp.isfinite(change)
        fell = jnp.asarray(algorithm.ascends) & (gain < -300 * rounding)
        still = (tol > 0) & (change <= jnp.maximum(tol, resolution))
        still = still & (jnp.abs(gain) <= jnp.maximum(tol * total, 10 * rounding))
        still = jnp.where(still & algorithm.settles(new), carry.still + 1, 0)
        settled = still >= algorithm.period
        failed = ~finite | fell
        result = RESULTS.where(settled, RESULTS.converged, carry.result)
        result = RESULTS.where(fell, RESULTS.decreased, result)
        result = RESULTS.where(finite, result, RESULTS.nonfinite)

        if progress is not None:
            progress.tell(new.step, new.objective, change)
        written = jnp.where(failed, jnp.nan, new.objective)
        return _Carry(
            state=jax.tree.map(lambda a, b: jnp.where(failed, a, b), old, new),
            change=jnp.where(failed, carry.change, change),
            error=jnp.where(failed, carry.error, error),
            still=still,
            history=carry.history.at[new.step].set(written),
            result=result,
            unfinished=~(failed | settled) & (new.step < max_steps),
        )

    def em_step(state: State, inputs: _Inputs) -> State:
        _, data, weights, prior, *_ = inputs
        key = inputs.key_at(state.step + 1)
        return algorithm.em_map().map(state, data, weights=weights, prior=prior, key=key)

    unfinished = lambda carry: carry.unfinished  # noqa: E731
    loop = Loop(start, unfinished, advance, step, em_step, max_steps, algorithm.exact)
    final = adjoint(loop, inputs)
    _, data, weights, prior, *_ = inputs
    state = final.state
    statistics, log_likelihood, objective = state.statistics, state.log_likelihood, state.objective
    key = inputs.key_at(state.step + 1)
    model = algorithm.finish(state, data, weights=weights, prior=prior, key=key)
    if not (algorithm.exact and algorithm.ascends):
        statistics, log_likelihood = algorithm.closing(model, data, weights, state.step, None)
        objective = (
            log_likelihood if prior is None else (log_likelihood + model.expected_log_prob(prior))
        )
    combined = statistics if prior is None else statistics + prior
    held_still = jax.tree.map(jax.lax.stop_gradient, (model, combined, min_variance))
    thin = jnp.any(held_still[0].degenerate(*held_still[1:]))
    valid = ~is_any(final.result, RESULTS.invalid_data, RESULTS.invalid_weights)
    result = RESULTS.where(model.representable() | ~valid | thin, final.result, RESULTS.nonfinite)
    result = RESULTS.where(thin & valid, RESULTS.degenerate, result)
    return Solution(
        model=model,
        objective=objective,
        log_likelihood=log_likelihood,
        statistics=statistics,
        history=final.history,
        num_steps=state.step,
        error=final.error,
        result=result,
        set_aside=jnp.zeros((), jnp.int32),
    )


def _resolution(statistics: Framed) -> Float[Array, ""]:
    """How far the statistics move if each parameter moves by its own rounding."""
    eps = {leaf.dtype: jnp.finfo(leaf.dtype).eps for leaf in jax.tree.leaves(statistics.frame)}
    nudged = jax.tree.map(lambda leaf: leaf * (1 + eps[leaf.dtype]), statistics.frame)
    return distance(statistics.at(nudged), Framed(statistics.sums, nudged))


def _valid_data(model: AbstractModel, data: PyTree[Array], weights: Any) -> Bool[Array, ""]:
    return jnp.all(or_absent(model.in_support(data), weights))


def _valid_weights(weights: Any) -> Bool[Array, ""]:
    if weights is None:
        return jnp.asarray(True)
    return jnp.all((weights >= 0) & jnp.isfinite(weights)) & jnp.any(weights > 0)
