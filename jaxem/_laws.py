"""The ten laws of CONTRIBUTING.md, each a function of a model and data that raises what broke."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal, jaxprs_in_params
from jaxtyping import Array

from jaxem import _law_programs as programs
from jaxem._core.blocks import num_observations
from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import parameter_names
from jaxem._core.statistics import Framed
from jaxem.em._em import EM
from jaxem.em._fit import fit
from jaxem.em._problem import Problem
from jaxem.em._solution import RESULTS
from jaxem.emissions._family import AbstractConjugateFamily
from jaxem.latents import Exact
from jaxem.models._alone import as_model, shown
from jaxem.models._base import AbstractModel, AbstractNamelessModel
from jaxem.models._functions import FunctionModel

_DRAWS = 500  # of each component


class NotApplicable(Exception):
    """The law does not concern this model, for the reason that the message gives."""


class Broken(Exception):
    """The law is broken; the message says how."""


def _require(holds: Any, otherwise: str) -> None:
    if not bool(holds):
        raise Broken(otherwise)


def _weight(model: AbstractModel, data: Any) -> Array | None:
    """1 for each observation, where the model takes weights: so laws share their programs."""
    if isinstance(model, FunctionModel) and not model.takes_sample_weight:
        return None
    return jax.device_put(np.ones(num_observations(data), float_dtype(model)))


def _e_step(model: Any, data: Any) -> tuple[Framed, Array]:
    return model.e_step(data, _weight(model, data), posterior=Exact())


def _fit(model: Any, data: Any, weight: Array | None, tol: float | None = None) -> Any:
    return fit(model, data, sample_weight=weight, tol=tol, max_steps=20, throw=False)


def _rows(data: Any, rows: slice) -> Any:
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[rows]), data)


def _near(what: str, a: Any, b: Any, tol: float, least: float = 1.0) -> str:
    """Requires that two PyTrees agree relative to the largest number in each leaf, or `least`."""
    worst = 0.0
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        left, right = np.asarray(left, float), np.asarray(right, float)
        with np.errstate(invalid="ignore"):  # of infinities
            gap = np.max(np.abs(left - right), initial=0)
        gap = gap / max(least, np.max(np.abs(right), initial=0))
        worst = max(worst, float(gap)) if np.isfinite(gap) else np.inf
    _require(worst <= tol, f"{what} differ by {worst:.1e} (allowed {tol:.0e})")
    return f"within {worst:.1e}"


def _spoilt(data: Any, rows: slice) -> Any:
    """The data, but what no family accepts in some observations; what is observed stays so."""

    def one(leaf: Array) -> Array:
        spoilt = np.array(leaf)
        if leaf.dtype != jnp.bool_:
            inexact = jnp.issubdtype(leaf.dtype, jnp.inexact)
            spoilt[rows] = jnp.inf if inexact else jnp.iinfo(leaf.dtype).min
        return jax.device_put(spoilt)

    return jax.tree.map(one, data)


def _next(model: Any, data: Any) -> Any:
    return programs.m_step(model, _e_step(model, data)[0])


def _parameters(model: AbstractModel) -> list[str]:
    """Names of parameters that can be frozen."""
    if isinstance(model, AbstractNamelessModel):
        raise NotApplicable("its parameters have no names")
    return parameter_names(shown(model))


def _additivity(model: Any, data: Any, tol: float) -> str:
    """Unions are sums, weight 2 is twice, weight 0 is absence, reframing back is the identity."""
    n, weight = num_observations(data), _weight(model, data)
    whole = _e_step(model, data)
    first, second = (
        model.e_step(_rows(data, rows), posterior=Exact())
        for rows in (slice(n // 2), slice(n // 2, n))
    )
    found = _near(
        "log-likelihoods of a union and of its parts", first[1] + second[1], whole[1], tol
    )
    pairs = programs.sums_of(
        model, programs.m_step(model, whole[0]), *(s.sums for s, _ in (whole, first, second))
    )
    for what, (left, right) in pairs.items():
        _near(f"statistics {what}", left, right, tol)
    if weight is not None:
        weight = jax.device_put(np.where(np.arange(n) < n // 2, 2.0, 0.0).astype(weight.dtype))
        spoilt = _spoilt(data, slice(n // 2, n))
        statistics, value = model.e_step(spoilt, weight, posterior=Exact())
        weighted = statistics.sums, value
        doubled = jax.tree.map(lambda leaf: 2 * np.asarray(leaf), (first[0].sums, first[1]))
        _near("weights 2 and 0, and observations given twice or not", weighted, doubled, tol)
    return found


def _fisher(model: Any, data: Any, tol: float) -> str:
    if isinstance(model, FunctionModel):
        raise NotApplicable("its functions do not give its Q")
    statistics, _ = _e_step(model, data)
    score = programs.score(model, data, _weight(model, data))
    of_q = programs.gradient_of_q(model, statistics)
    for family in filter(_is_family, jax.tree.leaves(model, is_leaf=_is_family)):
        _mean_score_is_zero(family, tol)
    return _near("the score and the gradient of Q", of_q, score, 10 * tol)


def _is_family(node: Any) -> bool:
    return isinstance(node, AbstractConjugateFamily)


def _mean_score_is_zero(family: AbstractConjugateFamily, tol: float) -> None:
    """What is expected of a law is at its maximum there, and draws are of that law."""
    name, k = type(family).__name__, family.num_components
    z = jax.device_put(np.arange(_DRAWS * k) % k)
    slope, possible, scores = programs.scores_of_law(family, jax.random.key(0), z)
    zero = jax.tree.map(np.zeros_like, slope)
    _near(f"the slope of Q at {name}.expected() and zero", slope, zero, 10 * tol)
    _require(possible, f"{name}.sample draws outside its support")
    for mean, spread in scores:
        far = np.abs(mean) > 6 * np.asarray(spread) / len(z) ** 0.5 + tol
        _require(not np.any(far), f"{name}.sample draws from another law than log_prob says")


def _ascent(model: Any, data: Any, tol: float) -> str:
    problem = Problem(data, _weight(model, data))
    state = EM().init(model, problem)
    n = problem.num_observations
    for number in range(1, 11):
        after = programs.step(state, problem)
        slack = tol * (n + abs(float(state.objective)))
        _require(
            after.objective >= state.objective - slack,
            f"step {number} lowered the objective from {state.objective} to {after.objective}",
        )
        state = after
    return "10 steps"


def _free_leaves(model: Any, data: Any, tol: float) -> str:
    _parameters(model)
    other = _next(model, data)
    for share in (0.5, -0.5, 1.5):
        blend, finite = programs.blend(
            model, other, jax.device_put(np.asarray(share, float_dtype(model)))
        )
        _require(finite, "a blend of two models has parameters that are not finite")
        _require(jnp.isfinite(_e_step(blend, data)[1]), "a blend of two models has no likelihood")
    return "three blends of two models"


def _frozen(model: Any, data: Any, tol: float) -> str:
    names = _parameters(model)
    statistics, _ = _e_step(model, data)
    pairs = programs.frozen_parameters(model, statistics.sums, names)
    for name, (before, after) in zip(names, pairs, strict=True):
        _require(np.array_equal(before, after), f"{name} moved although it is frozen")
    return ", ".join(names)


def _float32(model: Any, data: Any, tol: float) -> str:
    if float_dtype(model) != jnp.float64:
        raise NotApplicable("the model is not in float64; enable jax_enable_x64 to compare")

    def single(leaf: Array) -> Array:
        return leaf.astype(jnp.float32) if leaf.dtype == jnp.float64 else leaf

    given = model, data, _weight(model, data)
    wide, narrow = _fit(*given, tol=0.0), _fit(*jax.tree.map(single, given), tol=0.0)
    n = num_observations(data)
    found = _near("objectives per observation", narrow.objective / n, wide.objective / n, 1e-3)
    tiny = float(jnp.finfo(jnp.float32).eps)
    pair = programs.estimates_of(narrow.model), programs.estimates_of(wide.model)
    return f"objective {found}, parameters " + _near("parameters", *pair, 1e-3, tiny)


def _honest(model: Any, data: Any, tol: float) -> str:
    solution = _fit(model, data, _weight(model, data))
    again = _e_step(as_model(solution.model, "check_model"), data)
    last = solution.history[solution.num_steps]
    _near("objective and last history entry", solution.objective, last, 0.0)
    own = solution.statistics.sums
    _near("statistics of the solution and of its model", own, again[0].sums, tol)
    _near("log-likelihood of the solution and of its model", solution.log_likelihood, again[1], tol)
    spoilt = _fit(model, _spoilt(data, slice(1)), _weight(model, data))
    _require(spoilt.result == RESULTS.invalid_data, "a spoilt observation was not called invalid")
    return "objective and statistics belong to the model"


def _derivatives(model: Any, data: Any, tol: float) -> str:
    """The scale of weights changes nothing; derivatives are differences, and finite at weight 0."""
    ones = _weight(model, data)
    if ones is None:
        raise NotApplicable("its E-step takes no sample_weight")
    once, fourfold = _fit(model, data, ones, 1e-3), _fit(model, data, 4 * ones, 1e-3)
    _require(once.num_steps == fourfold.num_steps, "weights of 4 change the number of steps")
    single = ones.dtype != jnp.float64
    step, allowed = (1e-2, 5e-2) if single else (1e-5, 1e-6)
    direction = jnp.cos(jnp.arange(len(ones), dtype=ones.dtype))
    after, _ = programs.em_map(model, data, ones + step * direction, direction)
    before, _ = programs.em_map(model, data, ones - step * direction, direction)
    _, slope = programs.em_map(model, data, ones, direction)
    found = _near("a derivative and differences", slope, (after - before) / (2 * step), allowed)
    score = programs.score(model, _spoilt(data, slice(1)), ones.at[0].set(0))
    _require(programs.is_finite(score), "an observation of weight 0 spoils the gradient")
    return f"a derivative and differences {found}"


def _compile_once(model: Any, data: Any, tol: float) -> str:
    """A fit of an equal model, with other numbers, runs the program of the first fit."""
    weight, other = _weight(model, data), copy.deepcopy(model)
    scaled = None if weight is None else 4 * weight
    _fit(model, data, weight, 1e-3)
    compiled: list[str] = []

    def listen(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        _fit(other, data, scaled, 1e-3)
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    _require(not compiled, f"a second fit of an equal model compiled {len(compiled)} programs")
    return "a second fit compiled nothing"


def _memory(model: Any, data: Any, tol: float) -> str:
    """The E-step of 2²⁸ observations, traced: no array has two numbers for each of them.

    Its derivative may keep the data themselves.
    """
    if isinstance(model, FunctionModel):
        raise NotApplicable("its functions see all the data at once")
    n = 2**28

    def many(leaf: Array) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((n, *leaf.shape[1:]), leaf.dtype)

    def value(model: Any, data: Any, weight: Array) -> tuple[Array, Any]:
        sums, value = model.expected_sums(data, weight, Exact(), None)
        return value, sums

    args = model, jax.tree.map(many, data), jax.ShapeDtypeStruct((n,), float_dtype(model))
    of_data = max(int(np.prod(leaf.shape, dtype=object)) for leaf in jax.tree.leaves(args[1]))
    programs = (value, n), (jax.value_and_grad(value, has_aux=True), of_data)
    for program, most in programs:
        shapes = list(_computed(jax.make_jaxpr(program)(*args).jaxpr))
        worst = max(shapes, key=lambda shape: int(np.prod(shape, dtype=object)), default=())
        _require(
            int(np.prod(worst, dtype=object)) <= most,
            f"an E-step of n = {n} observations holds an array of shape {worst}",
        )
    return "no array of n × k"


def _computed(jaxpr: Any) -> Iterator[tuple[int, ...]]:
    """The shapes of what a program computes and uses."""
    used = {var for var in jaxpr.outvars if not isinstance(var, Literal)}
    for equation in reversed(jaxpr.eqns):
        if used.isdisjoint(equation.outvars) and not equation.effects:
            continue
        used.update(var for var in equation.invars if not isinstance(var, Literal))
        yield from (var.aval.shape for var in equation.outvars)
        for inner in jaxprs_in_params(equation.params):
            yield from _computed(inner)


LAWS: dict[str, Callable[[AbstractModel, Any, float], str]] = {
    "additivity": _additivity,
    "Fisher's identity": _fisher,
    "ascent": _ascent,
    "free leaves": _free_leaves,
    "frozen is not updated": _frozen,
    "float32 agrees": _float32,
    "honest results": _honest,
    "tolerance and derivatives": _derivatives,
    "compile once": _compile_once,
    "memory": _memory,
}
