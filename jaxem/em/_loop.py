"""The loop of a fit: its start, one turn of it, and the verdict on its end.

A turn is a step of the algorithm, and the stopping rule: a fit has converged when the objective
gains, and the statistics move, by no more than `tol` per observation of weight.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int

from jaxem._core.causes import CAUSES
from jaxem._core.checks import check_count
from jaxem._core.parameters import free_numbers, log_odds, replace
from jaxem._core.statistics import Framed
from jaxem.em._algorithm import AbstractAlgorithm, State
from jaxem.em._problem import Problem
from jaxem.em._rounding import distance, gap, jittered, nudged, rounding
from jaxem.em._solution import RESULTS, is_any
from jaxem.models._base import AbstractModel


def _print_progress(step: int, objective: float, change: float) -> None:
    print(f"step {int(step):5d}   objective {float(objective):.8g}   change {float(change):.1e}")


class Inputs(NamedTuple):
    """All that a fit is a function of, apart from settings; each part can carry a derivative."""

    model: AbstractModel
    problem: Problem
    key: Array | None
    tol: Any  # (), in the dtype of the model

    def key_at(self, step: Int[Array, ""]) -> Array | None:
        return None if self.key is None else jax.random.fold_in(self.key, step)


class Carry(eqx.Module):
    """What one turn of the loop hands to the next."""

    state: State
    change: Float[Array, ""]
    error: Float[Array, ""]
    small_steps: Int[Array, ""]  # in a row
    history: Float[Array, " max_steps+1"]
    result: RESULTS
    unfinished: Bool[Array, ""]


class Progress(eqx.Module):
    """A report on the host every few steps of a fit.

    **Arguments:** `every`, in steps; `report(step, objective, change)`, default: print a line.

    **Raises:** `ValueError` for less than every step, or a report that is no function.
    """

    every: int = eqx.field(static=True, default=10)
    report: Callable[..., None] = eqx.field(static=True, default=_print_progress)

    def __check_init__(self):
        check_count("every, in Progress,", self.every)
        if not callable(self.report):
            raise ValueError(f"report must be a function of three numbers, got {self.report!r}.")

    def emit(self, step: Array, objective: Array, change: Array) -> None:
        """Reports from within a compiled program, if `every` divides the number of this step."""
        lax.cond(
            (step % self.every == 0) & (step > 0),
            lambda: jax.debug.callback(self.report, step, objective, change),
            lambda: None,
        )


class Loop(eqx.Module):
    """A fit as a loop, each part a pure function of the inputs; an adjoint runs it."""

    algorithm: AbstractAlgorithm
    max_steps: int = eqx.field(static=True)
    progress: Progress | None = None

    def run(self, inputs: Inputs, **kind: Any) -> Carry:
        """The final carry, by a while-loop; `kind` makes it one with a reverse mode."""
        model, key = inputs.model, inputs.key_at(jnp.zeros((), jnp.int32))
        # Backwards through a step from sums of zeros there is no finite derivative
        state = None if kind else self.algorithm.unstarted(model, inputs.problem, key=key)
        while_loop = eqxi.while_loop if kind else lax.while_loop

        def turn(carry: Carry) -> Carry:
            if state is None:
                return self.advance(carry, self.step(carry.state, inputs), inputs)
            new = self.step(carry.state, inputs)
            return lax.cond(
                carry.state.step < 0,
                lambda: self._started(carry, new),
                lambda: self.advance(carry, new, inputs),
            )

        begin = self.start(inputs) if state is None else self._unstarted(state, inputs)
        return while_loop(lambda carry: carry.unfinished, turn, begin, **kind)

    def step(self, state: State, inputs: Inputs) -> State:
        """A step of the algorithm."""
        key = inputs.key_at(state.step + 1)
        return self.algorithm.step(state, inputs.problem, key=key)

    def plain_step(self, state: State, inputs: Inputs) -> State:
        """A step of plain EM with the same fixed points."""
        key = inputs.key_at(state.step + 1)
        return self.algorithm.plain().whole_step(state, inputs.problem, key)

    def start(self, inputs: Inputs) -> Carry:
        """The carry before the first step, finished already if data or weights are invalid."""
        key = inputs.key_at(jnp.zeros((), jnp.int32))
        state = self.algorithm.init(inputs.model, inputs.problem, key=key)
        return self._started(self._unstarted(state, inputs), state)

    def _unstarted(self, state: State, inputs: Inputs) -> Carry:
        """The carry before the first E-step, which knows of invalid data and weights."""
        problem = inputs.problem
        fits = jnp.all(problem.possible(inputs.model))
        result = RESULTS.where(fits, RESULTS.max_steps_reached, RESULTS.invalid_data)
        result = RESULTS.where(
            _valid_weight(problem.sample_weight), result, RESULTS.invalid_sample_weight
        )
        nan = jnp.full_like(state.objective, jnp.nan)
        return Carry(
            state=state,
            change=nan,
            error=nan,
            small_steps=jnp.zeros((), jnp.int32),
            history=jnp.full(self.max_steps + 1, jnp.nan, state.objective.dtype),
            result=result,
            unfinished=jnp.asarray(True),
        )

    def _started(self, carry: Carry, state: State) -> Carry:
        """The carry at the first state."""
        known = jnp.isfinite(state.objective) | (carry.result != RESULTS.max_steps_reached)
        result = RESULTS.where(known, carry.result, RESULTS.nonfinite)
        return replace(
            carry,
            state=state,
            history=carry.history.at[0].set(state.objective),
            result=result,
            unfinished=(result == RESULTS.max_steps_reached) & (self.max_steps > 0),
        )

    def advance(self, carry: Carry, new: State, inputs: Inputs) -> Carry:
        """The carry after one step: how far it moved, and whether it is the last."""
        traits, tol = self.algorithm.traits, inputs.tol
        old = carry.state
        total = inputs.problem.total_weight
        gain = new.objective - old.objective
        now, before = (inputs.problem.with_prior(state.statistics) for state in (new, old))
        change, resolution, doubt = _movement(now, before, total) / total
        estimate = traits.exact and traits.stationary
        error = _estimated_error(carry, change, resolution) if estimate else carry.error

        off = rounding(old.objective, total, doubt * total)
        finite = jnp.isfinite(new.objective) & jnp.isfinite(change)
        fell = jnp.asarray(traits.monotone) & (gain < -300 * off)
        small = (tol > 0) & (change <= jnp.maximum(tol, resolution))
        excused = jnp.minimum(10 * off, jnp.sqrt(tol) * total)  # as rounding
        small = small & (jnp.abs(gain) <= jnp.maximum(tol * total, excused))
        small = small & ~_emerges(new.model, old.model, jnp.sqrt(tol))
        small = small & self.algorithm.conclusive(new)
        if not traits.maximal:
            left = _distance(now, total) / total
            small = small & (left <= jnp.maximum(jnp.sqrt(tol), resolution))
        small_steps = jnp.where(small, carry.small_steps + 1, 0)
        converged = small_steps >= traits.period
        failed = ~finite | fell
        result = RESULTS.where(converged, RESULTS.converged, carry.result)
        result = RESULTS.where(fell, RESULTS.decreased, result)
        result = RESULTS.where(finite, result, RESULTS.nonfinite)

        if self.progress is not None:
            self.progress.emit(new.step, new.objective, change)
        return Carry(
            # A choice once for all leaves: a `where` of each would be a program of each
            state=lax.cond(failed, lambda: old, lambda: new),
            change=jnp.where(failed, carry.change, change),
            error=jnp.where(failed, carry.error, error),
            small_steps=small_steps,
            history=carry.history.at[new.step].set(jnp.where(failed, jnp.nan, new.objective)),
            result=result,
            unfinished=~(failed | converged) & (new.step < self.max_steps),
        )


def verdict(
    result: RESULTS, statistics: Framed, problem: Problem
) -> tuple[RESULTS, Int[Array, " k"]]:
    """How the loop ended, or that its model is degenerate and why, or not representable."""
    model, unit = statistics.frame, problem.unit_weight
    combined = problem.with_prior(statistics)
    counted = Framed(jax.tree.map(lambda leaf: leaf / unit, combined.sums), combined.frame)
    valid = ~is_any(result, RESULTS.invalid_data, RESULTS.invalid_sample_weight)
    cause = jnp.where(valid, model.degenerate(counted), CAUSES.none)
    light = (cause == CAUSES.few_observations) & (unit < 1)
    cause = jnp.where(light, CAUSES.small_weights, cause)
    degenerate = jnp.any(cause != CAUSES.none)
    sound = model.representable() | ~valid | degenerate
    result = RESULTS.where(sound, result, RESULTS.nonfinite)
    return RESULTS.where(degenerate, RESULTS.degenerate, result), cause


def _estimated_error(carry: Carry, change: Array, resolution: Array) -> Float[Array, ""]:
    """The distance left, change · ρ / (1 − ρ), with ρ the ratio of the last two changes."""
    ratio = change / carry.change
    error = jnp.where(ratio < 1, change * ratio / (1 - ratio), jnp.inf)
    error = jnp.where(jnp.isnan(carry.change), jnp.nan, jnp.where(change > 0, error, 0))
    # Changes as small as rounding have no rate: keep the last estimate that had one.
    noise = (change <= 10 * resolution) & jnp.isfinite(carry.error)
    return jnp.where(noise, carry.error, error)


def _movement(new: Framed, old: Framed, total: Any) -> Float[Array, " 3"]:
    """How far statistics moved, and how far they do where parameters are off by rounding.

    In the frame of the old ones; of a model each of whose parameters moved by its own rounding; and
    of one where each moved by that of the largest beside it. Counts are the same about any model:
    what moves them is their own rounding.
    """
    frames, aims = jax.tree.map(
        lambda *leaves: jnp.stack(leaves),
        (old.frame, old.sums),
        (nudged(new.frame), new.sums),
        (jittered(new.frame), new.sums),
    )
    moved = jax.vmap(lambda frame: new.at(frame).sums)(frames)  # so that reframing compiles once
    gaps = jax.vmap(gap)(moved, aims)
    leaves = [leaf for leaf in jax.tree.leaves(new.sums) if eqx.is_inexact_array(leaf)]
    sizes = [jnp.finfo(leaf.dtype).eps * jnp.max(jnp.abs(leaf)) for leaf in leaves]
    before, now = jax.tree.map(lambda leaf: leaf[0], (moved, aims))
    coarse = jnp.maximum(gaps[1], jnp.max(jnp.stack(sizes)))
    return jnp.stack([distance(before, now, total), coarse, gaps[2]])


def _distance(statistics: Framed, total: Any) -> Float[Array, ""]:
    """How far statistics would move by the model's own M-step, in the same frames."""
    frame = statistics.frame
    aim = free_numbers(frame)[1](free_numbers(frame.m_step(statistics))[0])
    return distance(statistics.at(aim).sums, statistics.sums, total)


def _emerges(new: AbstractModel, old: AbstractModel, most: Array) -> Bool[Array, ""]:
    """Whether some probability below 1 % of the likeliest grows by more than `most` of itself.

    It moves no statistic by as much as `tol`, but goes on growing at this rate. What is below the
    square of a rounding, such as what was 0 at the start, does not count.
    """
    after, before = log_odds(new), log_odds(old)
    least = 2 * math.log(jnp.finfo(before.dtype).eps)
    small = (after < math.log(0.01)) & (before > least)
    return jnp.any(small & (after - before > most))


def _valid_weight(sample_weight: Float[Array, " n"] | None) -> Bool[Array, ""]:
    if sample_weight is None:
        return jnp.asarray(True)
    return jnp.all((sample_weight >= 0) & jnp.isfinite(sample_weight)) & jnp.any(sample_weight > 0)
