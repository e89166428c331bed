"""The laws that every model must obey, as a public function with a readable report."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

from jaxem._em import EM, State
from jaxem._emission import float_dtype
from jaxem._fit import fit
from jaxem._hold import freeze, natural_names, natural_parameters
from jaxem._model import AbstractModel, FunctionModel, all_finite
from jaxem._posterior import Exact
from jaxem._solution import RESULTS
from jaxem._statistics import Framed
from jaxem._units import num_units


class Verdict(NamedTuple):
    law: str
    verdict: str  # "holds", "fails" or "not applicable"
    detail: str


class Report(tuple[Verdict, ...]):
    """One verdict for each law; `ok` if none fails. Printing it gives a table."""

    @property
    def ok(self) -> bool:
        return all(verdict.verdict != "fails" for verdict in self)

    def __str__(self) -> str:
        return "\n".join(
            f"{v.law:<28} {v.verdict}" + (f", {v.detail}" if v.detail else "") for v in self
        )

    __repr__ = __str__


class _NotApplicable(Exception):
    pass


def check_model(model: AbstractModel, data: PyTree[Array], *, tol: float | None = None) -> Report:
    """Tests the laws of CONTRIBUTING.md on a model and some data, and reports.

    For whoever writes a model or an emission: `print(jaxem.check_model(model, data))`. The data
    should be ordinary ones, a few dozen units or more, and the model not yet converged.

    **Arguments:** `tol`, relative; default 1e-9 in float64 and 1e-3 in float32.

    **Returns:** a `Report`, one verdict for each law.
    """
    if tol is None:
        tol = 1e-9 if float_dtype(model) == jnp.float64 else 1e-3
    laws: dict[str, Callable[[AbstractModel, Any, float], str]] = {
        "additivity over units": _additivity,
        "weights count units": _weights,
        "reframing is exact": _reframing,
        "Fisher's identity": _fisher,
        "ascent": _ascent,
        "free leaves": _free_leaves,
        "held is not updated": _held,
        "float32 agrees": _float32,
        "results are honest": _honest,
        "gradients are finite": _gradients,
    }
    verdicts = []
    for name, law in laws.items():
        try:
            verdicts.append(Verdict(name, "holds", law(model, data, tol)))
        except _NotApplicable as reason:
            verdicts.append(Verdict(name, "not applicable", f"because {reason}"))
        except AssertionError as failure:
            verdicts.append(Verdict(name, "fails", str(failure)))
    return Report(verdicts)


@eqx.filter_jit
def _e_step(model: Any, data: Any, weights: Any = None) -> tuple[Framed, Array]:
    return model.e_step(data, weights, posterior=Exact())


@eqx.filter_jit
def _m_step(model: Any, statistics: Framed) -> Any:
    return model.m_step(statistics)


@eqx.filter_jit
def _step(state: State, data: Any) -> State:
    return EM().step(state, data)


@eqx.filter_jit
def _score(model: Any, data: Any, weights: Any) -> Any:
    return jax.grad(lambda m: m.e_step(data, weights, posterior=Exact())[1])(model)


@eqx.filter_jit
def _gradient_of_q(model: Any, statistics: Framed) -> Any:
    return jax.grad(lambda m: m.expected_log_prob(statistics))(model)


@eqx.filter_jit
def _at(statistics: Framed, frame: Any) -> Framed:
    return statistics.at(frame)


def _rows(data: Any, rows: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf[rows], data)


def _near(what: str, a: Any, b: Any, tol: float) -> str:
    """Asserts that two PyTrees agree relative to the largest number in each leaf."""
    worst = 0.0
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = np.asarray(left, float), np.asarray(right, float)
        gap = np.max(np.abs(left - right), initial=0) / max(1.0, np.max(np.abs(right), initial=0))
        worst = max(worst, float(gap)) if np.isfinite(gap) else np.inf
    assert worst <= tol, f"{what} differ by {worst:.1e} (allowed {tol:.0e})"
    return f"within {worst:.1e}"


def _ones(model: Any, data: Any) -> Array:
    return jnp.ones(num_units(data), float_dtype(model))


def _weighs(model: Any, data: Any) -> None:
    try:
        jax.eval_shape(lambda: _plain(model.e_step(data, _ones(model, data))))
    except TypeError:
        raise _NotApplicable("its E-step takes no unit weights") from None


def _additivity(model: Any, data: Any, tol: float) -> str:
    if isinstance(model, FunctionModel):
        raise _NotApplicable("its functions may count what they like as a unit")
    n = num_units(data)
    whole, value = _e_step(model, data)
    first, first_value = _e_step(model, _rows(data, slice(0, n // 2)))
    second, second_value = _e_step(model, _rows(data, slice(n // 2, n)))
    _near("log-likelihoods of a union and of its parts", first_value + second_value, value, tol)
    return _near("statistics of a union and of its parts", (first + second).sums, whole.sums, tol)


def _weights(model: Any, data: Any, tol: float) -> str:
    """Twice the first half and none of the second, which is spoilt, against the first half."""
    _weighs(model, data)
    n = num_units(data)
    first = jnp.arange(n) < n // 2
    weights = jnp.where(first, 2.0, 0.0).astype(float_dtype(model))
    spoilt = jax.tree.map(lambda leaf: _where(first, leaf, _spoil(leaf)), data)
    weighted = _plain(_e_step(model, spoilt, weights))
    half = _plain(_e_step(model, _rows(data, slice(0, n // 2))))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, half)
    return _near("weights 2 and 0, and units given twice or not at all", weighted, doubled, tol)


def _where(keep: Array, leaf: Array, other: Array) -> Array:
    return jnp.where(keep.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, other)


def _plain(outcome: tuple[Framed, Array]) -> Any:
    return outcome[0].sums, outcome[1]


def _spoil(leaf: Array) -> Array:
    """Data that no family accepts, in every unit; what is observed stays so."""
    if leaf.dtype == jnp.bool_:
        return leaf
    bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.iinfo(leaf.dtype).min
    return jnp.full_like(leaf, bad)


def _spoil_first(data: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.at[0].set(_spoil(leaf)[0]), data)


def _next(model: Any, data: Any) -> Any:
    return _m_step(model, _e_step(model, data)[0])


def _reframing(model: Any, data: Any, tol: float) -> str:
    statistics, _ = _e_step(model, data)
    other = _next(model, data)
    back = _at(_at(statistics, other), model)
    _near("statistics there and back", back.sums, statistics.sums, tol)
    double = _at(2.0 * statistics, other)
    return _near("twice the sums, reframed", double.sums, (2.0 * _at(statistics, other)).sums, tol)


def _fisher(model: Any, data: Any, tol: float) -> str:
    _has_q(model, data)
    statistics, _ = _e_step(model, data)
    everyone = _ones(model, data)
    score, of_q = _score(model, data, everyone), _gradient_of_q(model, statistics)
    return _near("the score and the gradient of Q", of_q, score, 10 * tol)


def _has_q(model: Any, data: Any) -> None:
    try:
        statistics, _ = _e_step(model, data)
        model.expected_log_prob(statistics)
    except NotImplementedError as reason:
        raise _NotApplicable(str(reason)) from None


def _ascent(model: Any, data: Any, tol: float) -> str:
    state = EM().init(model, data)
    n = num_units(data)
    for number in range(1, 11):
        after = _step(state, data)
        slack = tol * (n + abs(float(state.objective)))
        assert after.objective >= state.objective - slack, (
            f"step {number} lowered the objective from {state.objective} to {after.objective}"
        )
        state = after
    return "10 steps"


def _free_leaves(model: Any, data: Any, tol: float) -> str:
    other = _next(model, data)
    if not hasattr(model, "natural"):
        raise _NotApplicable("its parameters are what its functions take them for")
    for share in (0.5, -0.5, 1.5):
        blend = jax.tree.map(lambda a, b, s=share: (1 - s) * a + s * b, model, other)
        value = _e_step(blend, data)[1]
        assert bool(all_finite(natural_parameters(blend))), "a blend of two models is not a model"
        assert bool(jnp.isfinite(value)), "a blend of two models has no likelihood"
    return "three blends of two models"


def _held(model: Any, data: Any, tol: float) -> str:
    names = natural_names(model) if hasattr(model, "natural") else []
    # What is held from the start may follow from other parameters, as a stationary start does.
    already = {name for name, _ in getattr(model, "held", ())}
    names = [name for name in names if name not in already]
    if not names:
        raise _NotApplicable("it has no named natural parameters")
    statistics, _ = _e_step(model, data)
    for name in names:
        held = freeze(model, name)
        moved = _m_step(held, Framed(statistics.sums, held))
        before, after = _lookup(held, name), _lookup(moved, name)
        assert bool(jnp.array_equal(before, after)), f"{name} moved although it is held"
    return ", ".join(names)


def _lookup(model: Any, path: str) -> Array:
    for part in path.split("."):
        model = model[int(part)] if part.isdigit() else getattr(model, part)
    return model


def _float32(model: Any, data: Any, tol: float) -> str:
    if float_dtype(model) != jnp.float64:
        raise _NotApplicable("the model is not in float64; enable jax_enable_x64 to compare")
    cast = lambda tree: jax.tree.map(_to_single, tree)  # noqa: E731
    wide = fit(model, data, max_steps=20, tol=0.0, throw=False)
    narrow = fit(cast(model), cast(data), max_steps=20, tol=0.0, throw=False)
    n = num_units(data)
    return _near("objectives per unit", narrow.objective / n, wide.objective / n, 1e-3)


def _to_single(leaf: Array) -> Array:
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf


def _honest(model: Any, data: Any, tol: float) -> str:
    solution = fit(model, data, max_steps=20, throw=False)
    again = _e_step(solution.model, data)
    last = solution.history[solution.num_steps]
    _near("objective and last history entry", solution.objective, last, 0.0)
    slack = tol * max(1.0, abs(float(again[1])))
    _near(
        "statistics of the solution and of its model", solution.statistics.sums, again[0].sums, tol
    )
    assert abs(float(again[1] - solution.log_likelihood)) <= slack, "stale log-likelihood"
    spoilt = fit(model, _spoil_first(data), max_steps=20, throw=False)
    assert bool(spoilt.result == RESULTS.invalid_data), "a spoilt unit was not called invalid"
    return "objective and statistics belong to the model"


def _gradients(model: Any, data: Any, tol: float) -> str:
    _weighs(model, data)
    weights = _ones(model, data).at[0].set(0)
    spoilt = _spoil_first(data)
    assert bool(all_finite(_score(model, spoilt, weights))), (
        "a unit of weight 0 spoils the gradient"
    )
    return "with a spoilt unit of weight 0"
