"""What a fit returns."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int

from jaxem._core.causes import CAUSES
from jaxem._core.parameters import replace
from jaxem._core.statistics import Framed


class RESULTS(eqx.Enumeration):
    """How a fit ended, a name and what it means. Under vmap each lane has a result of its own."""

    converged = "converged: The fit converged."
    max_steps_reached = (
        "max_steps_reached: "
        "The fit did not converge within max_steps: raise max_steps, or tol if the error is small "
        "enough already."
    )
    nonfinite = (
        "nonfinite: "
        "The fit met a NaN or an infinity; the state before that step is returned. Likely a "
        "parameter that the dtype cannot represent (rescale the data or use float64), or a start "
        "at which the data are impossible."
    )
    decreased = (
        "decreased: "
        "The objective fell by more than rounding; the state before that step is returned. Likely "
        "the M-step does not maximise, or the E-step does not belong to the same model."
    )
    degenerate = (
        "degenerate: "
        "A component rests on too few observations or on hardly any variance, or its coefficients "
        "grow for ever: there the likelihood may have no maximum. `causes` of the solution says "
        "which and why. Try other starts, fewer components, a shared covariance or a prior; if a "
        "component is meant to be so narrow, lower min_spread."
    )
    invalid_data = (
        "invalid_data: "
        "The data hold a NaN, an infinity or a value outside the family's support; give such "
        "observations weight 0, or remove them. (Of sequences, model.first_impossible(data) gives "
        "the step.)"
    )
    invalid_sample_weight = (
        "invalid_sample_weight: "
        "sample_weight holds a NaN, an infinity or a negative number, or no positive one."
    )


def impossible_data(possible: np.ndarray) -> str:
    """The message of `invalid_data`, with the first observations that it is about."""
    wrong = np.flatnonzero(~possible)
    first = ", ".join(map(str, wrong[:5])) + (", …" if len(wrong) > 5 else "")
    here = f"{len(wrong)} of {len(possible)} observations, number {first}"
    return f"{RESULTS[RESULTS.invalid_data]} Here: {here}."


STATUSES = (
    "converged",
    "max_steps_reached",
    "nonfinite",
    "decreased",
    "degenerate",
    "invalid_data",
    "invalid_sample_weight",
)


class Runs(eqx.Module):
    """How each of several fits ended: `objective` (lanes,) and `result`, with `status` in words."""

    objective: Float[Array, " lanes"]
    result: RESULTS

    @property
    def status(self) -> Any:
        """An array with the name of each result."""
        return _names(self.result)


class Solution(eqx.Module):
    """A fitted model and how it was reached.

    For accumulations over all the data, `statistics`, `objective`, `log_likelihood` and
    `history[num_steps]` belong to exactly the returned `model`.

    - `model`: what was fitted: a model, or an emission that was fitted alone.
    - `objective`: what the fit climbs, log-likelihood (or the bound that the expectation gives:
      the classification log-likelihood for `Hard`) plus log-prior, up to a constant.
    - `log_likelihood`: the objective without the prior.
    - `history`: the objective after 0, 1, … steps; NaN after `num_steps`.
    - `error`: estimated distance of the statistics, per observation of weight, from the fixed
      point: change · ρ / (1 − ρ), with ρ the ratio of the last two changes. NaN before two steps,
      and where their ratio means nothing (accelerated, incremental and random steps); inf while
      changes do not shrink.
    - `result`: a member of `RESULTS`; `converged` and `status` say it in a boolean and a word.
    - `cause` (k,): why each component is degenerate, a member of `CAUSES`, 0 where it is not;
      `causes` says it in words.
    - `runs`: of the solution that `best` picks, how all of the fits ended; else None.
    """

    model: Any
    objective: Float[Array, ""]
    log_likelihood: Float[Array, ""]
    statistics: Framed
    history: Float[Array, " max_steps+1"]
    num_steps: Int[Array, ""]
    error: Float[Array, ""]
    result: RESULTS
    cause: Int[Array, " k"]
    runs: Runs | None = None

    @property
    def converged(self) -> Bool[Array, ""]:
        """Whether the fit converged, lane by lane."""
        return self.result == RESULTS.converged

    @property
    def status(self) -> Any:
        """The name of the result, such as `"converged"`; of a batch of fits, an array of names."""
        return _names(self.result)

    @property
    def causes(self) -> np.ndarray:
        """In words why components are degenerate, `""` for those that are not."""
        words = ["", *(cause.name.replace("_", " ") for cause in CAUSES if cause)]
        return np.array(words)[np.asarray(self.cause)]

    @property
    def set_aside(self) -> Int[Array, ""]:
        """How many fits with a higher objective `best` passed over, because they are unsound."""
        if self.runs is None:
            return jnp.zeros((), jnp.int32)
        others = self.runs.objective
        own = self.objective[..., None]
        above = jnp.isfinite(others) & (others > own + _slack(own))
        return jnp.sum(above, axis=-1, dtype=jnp.int32)

    def __repr__(self) -> str:
        return _summary(self)


def best(solutions: Solution) -> Solution:
    """The best lane of a batch of fits, such as `fit_restarts` or `jax.vmap` over starts gives.

    Lanes that ended well come first, then degenerate ones, then those that failed, each by
    objective; of those as good as the best, to rounding, the first. `runs` of the solution says how
    all of them ended, and `set_aside` how many were passed over although their objective was
    higher. The lane returned is NaN only if all are.

    **Raises:** `ValueError` for something else than a batch of solutions.
    """
    if not isinstance(solutions, Solution):
        raise ValueError(
            "best expects the Solution of many lanes, as from fit_restarts or jax.vmap(fit); got "
            f"{type(solutions).__name__}."
        )
    if jnp.ndim(solutions.objective) != 1:
        raise ValueError(
            "best expects solutions with one leading axis, as from jax.vmap(fit) or "
            f"fit_restarts; got an objective of shape {jnp.shape(solutions.objective)}."
        )
    winner = lane_order(solutions)[0]
    chosen = jax.tree.map(lambda leaf: leaf[winner], solutions)
    return replace(chosen, runs=Runs(solutions.objective, solutions.result))


def lane_order(solutions: Solution) -> Int[Array, " lanes"]:
    """Lanes from best to worst: sound ones, degenerate ones, failed ones, each by objective."""
    objective = solutions.objective
    finite = jnp.isfinite(objective)
    sound = is_any(solutions.result, RESULTS.converged, RESULTS.max_steps_reached)
    degenerate = solutions.result == RESULTS.degenerate
    rank = jnp.where(finite, jnp.where(sound, 3, jnp.where(degenerate, 2, 1)), 0)
    alike = rank[:, None] == rank
    best = jnp.max(jnp.where(alike & finite, objective, -jnp.inf), axis=1)
    behind = jnp.where(objective >= best - _slack(best), 0, best - objective)
    return jnp.lexsort((jnp.where(finite, behind, jnp.inf), -rank))


def _slack(objective: Array) -> Array:
    """How far objectives of one model may differ by rounding."""
    size = jnp.where(jnp.isfinite(objective), jnp.abs(objective), 0)
    return 8 * jnp.finfo(objective.dtype).eps * size


def is_any(result: RESULTS, *members: RESULTS) -> Array:
    """Whether a result is one of several members, lane by lane."""
    return jnp.any(jnp.stack([result == member for member in members]), axis=0)


def _names(result: RESULTS) -> Any:
    """The name of a result, or an array of names.

    **Raises:** `ValueError` where it is traced.
    """
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(result)):
        raise ValueError(
            "status is a word, which a traced fit does not have: inside jit or vmap ask "
            "solution.converged or solution.result == RESULTS.degenerate, or ask outside."
        )
    flags = [np.asarray(result == getattr(RESULTS, name)) for name in STATUSES]
    index = np.argmax(flags, axis=0)
    names = np.array(STATUSES)[index]
    return names if np.ndim(index) else str(names)


def _summary(solution: Solution) -> str:
    """A readable account of a solution, or a count of results for a batch of them."""
    if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(solution)):
        return f"Solution(model={type(solution.model).__name__}, traced)"
    if np.ndim(solution.objective):
        return f"Solutions of {_counted(solution.status)}"
    error = float(solution.error)
    lines = [
        f"Solution: {solution.status} after {int(solution.num_steps)} steps",
        f"  log-likelihood {float(solution.log_likelihood):.6g}, objective "
        f"{float(solution.objective):.6g}"
        + ("" if np.isnan(error) else f", estimated error {error:.1e}"),
    ]
    if np.any(solution.cause):
        found = (f"component {k}: {cause}" for k, cause in enumerate(solution.causes) if cause)
        lines.append("  " + "; ".join(found))
    if solution.runs is not None:
        aside = int(solution.set_aside)
        note = f"; {aside} higher but unsound set aside" if aside else ""
        lines.append(f"  best of {_counted(solution.runs.status)}{note}")
    return "\n".join([*lines, "  " + repr(solution.model).replace("\n", "\n  ")])


def _counted(status: Any) -> str:
    names = list(np.ravel(status))
    ended = (f"{names.count(name)} {name}" for name in STATUSES if name in names)
    return f"{len(names)} fits: " + ", ".join(ended)
