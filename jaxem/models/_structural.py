"""Structural time-series models by name: linear-Gaussian models whose known elements are frozen.

    local level      μₜ = μₜ₋₁ + noise
    linear trend     μₜ = μₜ₋₁ + βₜ₋₁ + noise,    βₜ = βₜ₋₁ + noise
    seasonal         γₜ = −(γₜ₋₁ + … + γₜ₋ₛ₊₁) + noise
    autoregression   ξₜ = φ₁ ξₜ₋₁ + … + φₚ ξₜ₋ₚ + noise
    factors          fₜ = A₁ fₜ₋₁ + … + N(0, I),    yₜ = Λ fₜ + d + noise

Levels, trends and seasons start *diffuse*: the first state has κ times the mean square of changes
of the data from step to step for a variance, which is frozen; κ is 50,000 in float64 and 120 in
float32. Without its first n steps, n the number of such states, `one_step_log_prob` sums to the
exact diffuse log-likelihood, to about n/κ.

Harvey (1989), *Forecasting, Structural Time Series Models and the Kalman Filter*; Durbin & Koopman
(2012), chapter 3. Loadings with zeros above the diagonal: Zuur et al. (2003), Environmetrics 14.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import block_diag
from jaxtyping import Array, Bool, Float, PyTree
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_count, check_values, name_of
from jaxem._core.conversion import as_arrays
from jaxem._core.freezing import freeze, unfreeze
from jaxem._core.numerics import as_float
from jaxem._core.parameters import free, free_elements, replace
from jaxem._core.sequences import as_sequences
from jaxem.emissions._gaussian import Gaussian
from jaxem.emissions._linear_regression import LinearRegression
from jaxem.models._state_space import LinearGaussianSSM


class Component(NamedTuple):
    """What a component adds to the outputs: `mean` (b, t, p), `covariance` (b, t, p, p)."""

    mean: Float[Array, "b t p"]
    covariance: Float[Array, "b t p p"]


def local_level(y: PyTree[Array] | None = None) -> LinearGaussianSSM:
    """A level that walks at random, seen with noise. Two variances are free.

    **Arguments:** `y` (b, t, 1), or `Sequences`: the start takes its level, units and dtype from
    these data. Default: mean 0 and variance 1.

    ```python
    solution = jaxem.fit(local_level(y), y, jaxem.SQUAREM())
    ```
    """
    units = _units(y)
    step, start = units.step, _start(units.first, units.diffuse * units.step)
    return _frozen([[1.0]], step / 3, [True], start, step / 3)


def local_linear_trend(y: PyTree[Array] | None = None) -> LinearGaussianSSM:
    """A level with a slope, both of which walk at random, seen with noise.

    **Arguments:** `y`, as of `local_level`.
    """
    units = _units(y)
    step = units.step
    start = _start(jnp.append(units.first, 0), jnp.repeat(units.diffuse * step, 2))
    noise = jnp.concatenate([step / 6, step / 100])
    return _frozen([[1.0, 1.0], [0.0, 1.0]], noise, [True, True], start, step / 3)


def seasonal(period: int, y: PyTree[Array] | None = None) -> LinearGaussianSSM:
    """Effects of the seasons about a mean, which change slowly and sum to noise over a period.

    **Arguments:** `period` ≥ 2, in steps; `y`, as of `local_level`.
    """
    check_count("period, of seasonal,", period, least=2)
    n, units = period - 1, _units(y)
    matrix, first = np.eye(n, k=-1), np.arange(n) == 0
    matrix[0] = -1
    start = _start(jnp.zeros(n), jnp.repeat(units.diffuse * units.step, n))
    model = _frozen(matrix, units.variance / 100 * first, first, start, units.variance / 4)
    return _about(units.mean, model)


def autoregressive(
    order: int, y: PyTree[Array] | None = None, *, noise: bool = True
) -> LinearGaussianSSM:
    """An autoregression about a mean, seen with noise or without.

    The first state holds `order` values, at first independent, of the variance of the data.

    **Arguments:** `order` ≥ 1; `y`, as of `local_level`; `noise`: whether the outputs have noise.
    Without, its variance is frozen at √eps of that of the data: 10⁻⁸ in float64, 3 · 10⁻⁴ in
    float32.
    """
    check_count("order, of autoregressive,", order)
    n, units, first = order, _units(y), np.arange(order) == 0
    variance = units.variance
    matrix = np.eye(n, k=-1) + 0.5 * np.eye(n)[0] * first[:, None]
    own = variance / 4 if noise else variance * jnp.finfo(variance.dtype).eps ** 0.5
    start = _start(jnp.zeros(n), jnp.repeat(variance, n))
    model = _about(units.mean, _frozen(matrix, variance / 2 * first, first, start, own))
    known = np.broadcast_to(~first[:, None], (n, n))
    model = freeze(model, "dynamics.coefficients", mask=known)
    return model if noise else freeze(model, "emission.covariance")


def dynamic_factors(
    num_outputs: int, num_factors: int, order: int = 1, y: PyTree[Array] | None = None
) -> LinearGaussianSSM:
    """Outputs that have a few autoregressive factors in common, each with noise of its own.

    Innovations of factors have variance 1, and loadings are 0 above the diagonal: both are
    determined then, up to the signs of factors.

    **Arguments:** `num_outputs` p; `num_factors` q ≤ p; `order` of the vector autoregression of the
    factors; `y` (b, t, p), as of `local_level`: loadings start from their principal components.
    States are fₜ and the `order` − 1 before it, at first independent of variance 4/3.

    **Raises:** `ValueError` for more factors than outputs, or data of another shape.
    """
    for name, count in (("num_outputs", num_outputs), ("num_factors", num_factors)):
        check_count(f"{name}, of dynamic_factors,", count)
    check_count("order, of dynamic_factors,", order)
    p, q, n = num_outputs, num_factors, num_factors * order
    if q > p:
        raise ValueError(f"dynamic_factors: {q} factors need as many outputs, got {p}.")
    units, first = _units(y, p), np.arange(n) < q
    # Of all bases of the plane of the first principal components, one with zeros above the diagonal
    values, vectors = jnp.linalg.eigh(units.correlation)
    loadings = vectors[:, -q:] * jnp.sqrt(values[-q:])
    loadings = la.matmul(loadings, jnp.linalg.qr(loadings[:q].T)[0])
    own = jnp.maximum(1 - jnp.sum(loadings**2, axis=1), 0.1) * units.variance
    known = np.triu(np.ones((p, n), bool), 1) | ~first
    loadings = jnp.sqrt(0.75 * units.variance)[:, None] * jnp.pad(loadings, ((0, 0), (0, n - q)))
    matrix = np.eye(n, k=-q) + 0.5 * np.diag(first)
    model = LinearGaussianSSM(
        _start(jnp.zeros(n, own.dtype), jnp.full(n, 4 / 3, own.dtype)),
        _independent(matrix, jnp.zeros(n, own.dtype), first),
        _independent(jnp.where(known, 0, loadings), units.mean, own),
    )
    model = freeze(model, "initial", "dynamics.intercept", "dynamics.covariance")
    rows = np.broadcast_to(~first[:, None], (n, n))
    model = freeze(model, "dynamics.coefficients", mask=rows)
    return freeze(model, "emission.coefficients", mask=known)


def sum_of(*models: LinearGaussianSSM) -> LinearGaussianSSM:
    """The model of a sum of independent components, each the outputs of a model.

    What is frozen in a component stays so. The noise of outputs adds up, and is free where it is in
    one of the components. Their intercept is that of the components in which it is frozen, and free
    where there are none.

    **Raises:** `ValueError` for models with inputs, of different numbers of outputs, whose first
    state is free, or whose noise is correlated.

    ```python
    parts = local_linear_trend(y), seasonal(12, y)
    solution = jaxem.fit(sum_of(*parts), y, jaxem.SQUAREM())
    trend, season = components(solution.model, y, parts)
    ```
    """
    if not models:
        raise ValueError("sum_of takes one model at least.")
    for model in models:
        _check_summand(model, models[0])
    starts, moves, reads = zip(*((m.initial, m.dynamics, m.emission) for m in models), strict=True)
    first = Gaussian(
        jnp.concatenate([s.mean for s in starts], axis=1),
        block_diag(*(s.covariance[0] for s in starts))[None],
    )
    dynamics = _independent(
        block_diag(*(m.coefficients[0] for m in moves)),
        jnp.concatenate([m.intercept[0] for m in moves]),
        jnp.concatenate([_variances(m) for m in moves]),
    )
    of_levels = np.stack([~free_elements(r, "intercept")[0] for r in reads])
    levels = jnp.stack([r.intercept[0] for r in reads])
    known = np.any(of_levels, axis=0)
    level = jnp.where(known, jnp.sum(of_levels * levels, axis=0), jnp.mean(levels, axis=0))
    emission = _independent(
        jnp.concatenate([r.coefficients[0] for r in reads], axis=1),
        level,
        sum(_variances(r) for r in reads),
    )
    apart = np.ones(2 * (dynamics.intercept.shape[1],), bool)
    for own, m in zip(_places(models), moves, strict=True):
        apart[own, own] = ~free_elements(m, "coefficients")[0]
    masks = {
        "dynamics.coefficients": apart,
        "dynamics.intercept": np.concatenate([~free_elements(m, "intercept")[0] for m in moves]),
        "dynamics.covariance": np.concatenate([~_free_variances(m) for m in moves]),
        "emission.coefficients": np.concatenate(
            [~free_elements(r, "coefficients")[0] for r in reads], axis=1
        ),
        "emission.intercept": known,
        "emission.covariance": np.all([~_free_variances(r) for r in reads], axis=0),
    }
    model = freeze(LinearGaussianSSM(first, dynamics, emission), "initial")
    for name, mask in masks.items():
        model = freeze(model, name, mask=mask)
    return model


def components(
    model: LinearGaussianSSM, data: PyTree[Array], parts: Sequence[LinearGaussianSSM]
) -> list[Component]:
    """What each component adds to the outputs, given all the data.

    Their means, and the intercept of the outputs, sum to the mean of the outputs without noise.

    **Arguments:** a model of the sum of `parts`, fitted or not; the data; the parts, of which only
    the numbers of states matter.

    **Raises:** `ValueError` for parts that have not as many states as the model.
    """
    sizes = [part.num_states for part in parts]
    if sum(sizes) != model.num_states:
        raise ValueError(
            f"components: parts have {sizes} states, and the model {model.num_states}: give those "
            "that it is the sum of, in their order."
        )
    mean, covariance = model.states(data)
    found = []
    for own in _places(parts):
        c = model.emission.coefficients[0, :, own]
        spread = la.matmul(la.matmul(c, covariance[:, :, own, own]), c.T)
        found.append(Component(la.apply(c, mean[:, :, own]), spread))
    return found


class _Units(NamedTuple):
    """What a start takes from data, and κ."""

    mean: Float[Array, " p"]
    first: Float[Array, " p"]  # the mean of the first that was seen of each sequence
    variance: Float[Array, " p"]
    step: Float[Array, " p"]  # the mean square of its differences
    correlation: Float[Array, "p p"]
    diffuse: float


def _units(y: PyTree[Array] | None, num_outputs: int = 1) -> _Units:
    """Those of data; of None, those of data of mean 0 and variance 1."""
    if y is None:
        one = jnp.ones(num_outputs)
        apart = np.abs(np.subtract.outer(np.arange(num_outputs), np.arange(num_outputs)))
        return _Units(0 * one, 0 * one, one, one, jnp.asarray(0.5**apart), _diffuse(one))
    sequences = as_sequences(as_arrays(y))
    values = sequences.values
    if isinstance(values, tuple) or values.ndim != 3 or values.shape[2] != num_outputs:
        raise ValueError(
            f"y must have shape (b, t, {num_outputs}), or be Sequences of such, got "
            f"{[v.shape for v in values] if isinstance(values, tuple) else values.shape}."
        )
    values = as_float(values, "y")
    values = jnp.where(sequences.present[:, :, None], values, jnp.nan)
    mean = jnp.nanmean(values, axis=(0, 1))
    centred = values - mean
    variance = jnp.nanmean(centred**2, axis=(0, 1))
    check_values(variance > 0, "y: each output must vary to give a start its units.")
    step = jnp.nanmean(jnp.diff(centred, axis=1) ** 2, axis=(0, 1))
    step = jnp.where(step > 0, step, variance)
    earliest = jnp.argmax(~jnp.isnan(values), axis=1)[:, None]
    first = jnp.nanmean(jnp.take_along_axis(values, earliest, axis=1), axis=(0, 1))
    scaled = jnp.nan_to_num(centred / jnp.sqrt(variance)).reshape(-1, num_outputs)
    correlation = la.matmul(scaled.T, scaled)
    size = jnp.sqrt(jnp.diagonal(correlation))
    correlation = correlation / la.outer(size, size)
    return _Units(mean, first, variance, step, correlation, _diffuse(mean))


def _diffuse(like: Array) -> float:
    """κ: a wider start has fewer digits of what its states do not tell apart at first."""
    return float(jnp.finfo(like.dtype).eps) ** -0.3


def _frozen(
    matrix: ArrayLike, noise: Array, moves: Sequence[bool], start: Gaussian, own: Array
) -> LinearGaussianSSM:
    """A model whose output is its first state; free are variances, of states only if they move."""
    n = start.mean.shape[1]
    dynamics = _independent(matrix, jnp.zeros(n, noise.dtype), noise)
    emission = _independent(np.eye(1, n), jnp.zeros_like(own), own)
    model = freeze(
        LinearGaussianSSM(start, dynamics, emission),
        *("initial", "dynamics.coefficients", "dynamics.intercept"),
        *("emission.coefficients", "emission.intercept"),
    )
    return freeze(model, "dynamics.covariance", mask=~np.asarray(moves))


def _about(level: Array, model: LinearGaussianSSM) -> LinearGaussianSSM:
    """The model about a level of the outputs that is free."""
    emission = unfreeze(model.emission.with_parameters(intercept=level), "intercept")
    return replace(model, emission=emission)


def _start(mean: Array, variance: Array) -> Gaussian:
    return Gaussian(mean[None].astype(variance.dtype), jnp.diag(variance)[None])


def _independent(coefficients: Any, intercept: Array, variance: Any) -> LinearRegression:
    """A regression with independent residuals, in the dtype of the intercept."""
    dtype = intercept.dtype
    covariance = jnp.diag(jnp.asarray(variance, dtype))
    coefficients = jnp.asarray(coefficients, dtype)
    return LinearRegression(coefficients[None], intercept[None], covariance[None], diagonal=True)


def _variances(factor: LinearRegression) -> Float[Array, " d"]:
    return jnp.diagonal(factor.covariance.reshape(factor.intercept.shape[1:] * 2))


def _free_variances(factor: LinearRegression) -> Bool[np.ndarray, " d"]:
    return np.broadcast_to(free(factor, "covariance").reshape(-1), factor.intercept.shape[1])


def _places(models: Sequence[LinearGaussianSSM]) -> list[slice]:
    """Which states of the sum are those of each model."""
    ends = np.cumsum([model.num_states for model in models])
    return [slice(int(e) - m.num_states, int(e)) for e, m in zip(ends, models, strict=True)]


def _check_summand(model: Any, first: Any) -> None:
    """Raises `ValueError` for what `sum_of` cannot add."""
    if not isinstance(model, LinearGaussianSSM):
        raise ValueError(f"sum_of adds models LinearGaussianSSM, got {name_of(model)}.")
    n, p = model.num_states, first.emission.intercept.shape[1]
    moved, read = model.dynamics.coefficients.shape, model.emission.coefficients.shape
    if read[1] != p or moved[2] != n or read[2] != n:
        raise ValueError(
            f"sum_of adds models of the same outputs without inputs; got coefficients of shapes "
            f"{moved} and {read} beside those of {p} outputs."
        )
    if not all(not np.any(free(model.initial, name)) for name in model.initial.parameters):
        raise ValueError(
            'sum_of: the first state of each component must be known: freeze "initial".'
        )
    for name, factor in (("dynamics", model.dynamics), ("emission", model.emission)):
        if factor.structure.below is not None and factor.intercept.shape[1] > 1:
            raise ValueError(
                f"sum_of: {name} must have independent noise: LinearRegression(…, diagonal=True)."
            )
