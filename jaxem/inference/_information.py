"""Uncertainty of fitted parameters from second derivatives of the log-likelihood.

With θ the free unconstrained numbers of a model, ℓ the log-likelihood (plus log-prior)
and sᵢ = ∂ log p(xᵢ)/∂θ the score of observation i,

    observed information   H = −∂²ℓ/∂θ∂θᵀ
    covariance             H⁻¹, or robustly the sandwich H⁻¹ (Σ wᵢ sᵢ sᵢᵀ) H⁻¹,

and for parameters g(θ), by the delta method, G H⁻¹ Gᵀ with G = ∂g/∂θ. Both are products
with H and with the scores, one direction at a time: no array of n × p exists.

Not every direction is determined. Redundant logits move no parameter; an empty component,
a probability of 0 or a variance at its floor moves no likelihood. The convention: directions along
which the information is zero, to rounding, are held fixed, and so is what was frozen.
Parameters that such a direction moves, and those that nothing moves, are marked in `frozen`; what
of their variance remains is that along the other directions.
"""

from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.core import Tracer
from jax.flatten_util import ravel_pytree
from jax.scipy.special import ndtri
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core import linalg as la
from jaxem._core.blocks import lanes_at_once
from jaxem._core.parameters import (
    estimates,
    free_numbers,
    frozen_mask,
    inline,
    named_parameters,
)
from jaxem._core.statistics import Framed
from jaxem.em._problem import Problem
from jaxem.em._solution import Solution
from jaxem.inference._fitted import fitted_problem
from jaxem.latents import Exact
from jaxem.models._alone import shown
from jaxem.models._base import AbstractModel, AbstractNamelessModel, expected_sums


class Covariance(eqx.Module):
    """Covariance matrix of the parameters of a fit.

    - `estimates`: parameters by name, nested as the model is.
    - `matrix` (p, p), in the order in which `jax.flatten_util.ravel_pytree` puts the estimates.
    - `frozen`: like `estimates`, True where a parameter was frozen by `freeze`; its standard error
      is 0.
    - `undetermined`: like `estimates`, True where a parameter is not determined by the data: it
      lies on a boundary, or the likelihood is flat. Its standard error counts only what is
      determined, often 0.
    - `distance`: how far from the maximum the estimates lie, in standard errors; 0 for a converged
      fit.
    - `proper`: whether the information is positive along every direction that it determines.
      Otherwise the estimates are no maximum (a saddle, or a fit that has not converged) and the
      matrix is NaN.
    """

    estimates: PyTree[Array]
    matrix: Float[Array, "p p"]
    frozen: PyTree[Array]
    undetermined: PyTree[Array]
    distance: Float[Array, ""]
    proper: Bool[Array, ""]

    @property
    def standard_errors(self) -> PyTree[Array]:
        """Square roots of the variances, like `estimates`."""
        _, unravel = ravel_pytree(self.estimates)
        return unravel(jnp.sqrt(jnp.maximum(jnp.diagonal(self.matrix), 0)))

    def interval(self, level: float = 0.95) -> tuple[PyTree[Array], PyTree[Array]]:
        """Lower and upper ends of the normal (Wald) confidence interval of each parameter.

        Symmetric about the estimate, so that near the edge of a parameter's range an end can lie
        outside it.
        """
        if not 0 < level < 1:
            raise ValueError(f"level must lie strictly between 0 and 1, got {level!r}.")
        quantile = ndtri(0.5 + 0.5 * level)
        reach = jax.tree.map(lambda error: quantile * error, self.standard_errors)
        lower = jax.tree.map(jnp.subtract, self.estimates, reach)
        return lower, jax.tree.map(jnp.add, self.estimates, reach)

    def __repr__(self) -> str:
        if any(isinstance(leaf, Tracer) for leaf in jax.tree.leaves(self)) or self.matrix.ndim > 2:
            return f"Covariance(shape {self.matrix.shape})"
        head = f"Covariance of {self.matrix.shape[0]} parameters"
        if not bool(self.proper):
            head += "; the information is indefinite: these estimates are no maximum"
        elif float(self.distance) > 0.1:
            head += f"; {float(self.distance):.2g} standard errors away from the maximum"
        rows = [head]
        with_path = jax.tree_util.tree_flatten_with_path(self.estimates)[0]
        errors = jax.tree.leaves(self.standard_errors)
        marks = zip(jax.tree.leaves(self.frozen), jax.tree.leaves(self.undetermined), strict=True)
        for (path, value), error, (frozen, open_) in zip(with_path, errors, marks, strict=True):
            name = jax.tree_util.keystr(path, simple=True, separator=".")
            for index in np.ndindex(value.shape):
                place = f"{name}{list(index) if index else ''}"
                row = f"  {place:<32} {value[index]:>12.6g} ± {error[index]:<8.3g}"
                mark = "   frozen" if bool(frozen[index]) else ""
                mark = "   undetermined" if bool(open_[index]) else mark
                rows.append(row + mark if mark else row.rstrip())
        return "\n".join(rows)


class Information(eqx.Module):
    """Observed information about the unconstrained numbers of a model.

    - `matrix` (p, p): −∂²ℓ/∂θ∂θᵀ, θ all floating numbers of `model` as
      `jax.flatten_util.ravel_pytree` orders them; rows and columns of what is frozen are zero.
    - `score` (p,): ∂ℓ/∂θ, zero at a maximum.
    """

    model: AbstractModel
    matrix: Float[Array, "p p"]
    score: Float[Array, " p"]

    def covariance(self) -> Covariance:
        """Covariance of the parameters: the inverse, by the delta method."""
        return _delta(self, None)


def observed_information(
    fitted: Solution | Any,
    data: PyTree[Array],
    *,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
) -> Information:
    """The observed information at a fitted model: minus the Hessian of the log-likelihood.

    **Arguments:** a solution or a model; the data, sample_weight and prior that it was fitted to.
    With a prior the information is that of the posterior, and its inverse Laplace's approximation
    to the posterior covariance.

    **Returns:** an `Information`; its `covariance()` gives standard errors of parameters.
    The cost is p products of the Hessian, each about four E-steps.

    Efron & Hinkley (1978), Biometrika 65; Louis (1982), JRSS B 44, whose identity this equals.
    """
    model, problem = fitted_problem(fitted, data, sample_weight, prior)
    return _observed(model, problem)


def standard_errors(
    fitted: Solution | Any,
    data: PyTree[Array],
    *,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    robust: bool = False,
) -> PyTree[Array]:
    """Standard errors of the parameters, by name and nested as the model is.

    From the observed information, or with `robust` from the `sandwich`. Entries that
    `Covariance.undetermined` marks count only what is determined. NaN where the model is no
    maximum.

    **Arguments:** as for `observed_information`.
    """
    return _covariance(fitted, data, sample_weight, prior, robust).standard_errors


def confidence_interval(
    fitted: Solution | Any,
    data: PyTree[Array],
    *,
    level: float = 0.95,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    robust: bool = False,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Lower and upper ends of normal confidence intervals of the parameters.

    **Arguments:** `level`, the coverage; the others as for `standard_errors`.
    """
    return _covariance(fitted, data, sample_weight, prior, robust).interval(level)


def sandwich(
    fitted: Solution | Any,
    data: PyTree[Array],
    *,
    sample_weight: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
) -> Covariance:
    """The robust covariance H⁻¹ (Σ w s sᵀ) H⁻¹, valid also if the model is wrong.

    Observations must be independent. Weights count observations: weight 2 equals the observation
    twice.

    **Arguments:** as for `observed_information`.

    Huber (1967), Proc. 5th Berkeley Symp.; White (1982), Econometrica 50.
    """
    model, problem = fitted_problem(fitted, data, sample_weight, prior)
    return _delta(_observed(model, problem), _scatter_of_scores(model, problem))


def _covariance(fitted: Any, data: Any, sample_weight: Any, prior: Any, robust: bool) -> Covariance:
    if robust:
        return sandwich(fitted, data, sample_weight=sample_weight, prior=prior)
    return observed_information(fitted, data, sample_weight=sample_weight, prior=prior).covariance()


def _each_direction(
    product: Callable[[Array], Array], size: int, dtype: Any, numbers: int
) -> Array:
    """The matrix of a linear map, as many columns at once as memory allows."""
    batch = lanes_at_once(size, numbers)
    return lax.map(product, jnp.eye(size, dtype=dtype), batch_size=batch).T


@eqx.filter_jit
def _observed(model: AbstractModel, problem: Problem) -> Information:
    flat, rebuild = free_numbers(model)
    data, weight, prior = problem.data, problem.sample_weight, problem.prior

    def objective(numbers: Array) -> Array:
        new = rebuild(numbers)
        _, log_likelihood = expected_sums(new, data, weight, Exact(), None)
        return log_likelihood if prior is None else log_likelihood + new.expected_log_prob(prior)

    score, push = jax.linearize(jax.grad(objective), flat)
    width = problem.num_observations * model.width(data)
    hessian = _each_direction(push, flat.size, flat.dtype, width)
    return Information(model, -0.5 * (hessian + hessian.T), score)


@eqx.filter_jit
def _scatter_of_scores(model: AbstractModel, problem: Problem) -> Float[Array, "p p"]:
    """Σ w s sᵀ by columns: s·v of every observation, then the score of weights w ∘ (s·v)."""
    flat, rebuild = free_numbers(model)
    data, weight = problem.data, problem.sample_weight
    weight = jnp.ones(problem.num_observations, flat.dtype) if weight is None else weight

    def log_likelihood(numbers: Array, weight: Array) -> Array:
        return expected_sums(rebuild(numbers), data, weight, Exact(), None)[1]

    def column(direction: Array) -> Array:
        observations = jax.grad(log_likelihood, argnums=1)
        _, slopes = jax.jvp(lambda numbers: observations(numbers, weight), (flat,), (direction,))
        return jax.grad(log_likelihood)(flat, weight * jnp.where(weight > 0, slopes, 0))

    width = problem.num_observations * model.width(data)
    return _each_direction(column, flat.size, flat.dtype, width)


@eqx.filter_jit
def _delta(information: Information, meat: Float[Array, "p p"] | None) -> Covariance:
    model, matrix, score = information.model, information.matrix, information.score
    flat, rebuild = free_numbers(model)
    named = estimates(shown(model))
    values, unravel = ravel_pytree(named)
    # Unit diagonal first: whether a direction is determined must not depend on units of measure.
    # Components share them, and one without observations is measured by the others.
    diagonal = jnp.diagonal(matrix)
    if not isinstance(model, AbstractNamelessModel):
        leading = jax.tree.map(
            lambda leaf: jnp.broadcast_to(jnp.max(leaf, axis=0), leaf.shape),
            ravel_pytree(model)[1](diagonal),
        )
        diagonal, _ = ravel_pytree(leading)
    some = diagonal > jnp.finfo(flat.dtype).tiny ** 0.5
    scale = jnp.sqrt(jnp.where(some, diagonal, 1))
    eigenvalues, basis = jnp.linalg.eigh(matrix / la.outer(scale, scale))
    rounding = jnp.finfo(flat.dtype).eps ** (2 / 3)
    determined = eigenvalues > rounding
    proper = jnp.all(eigenvalues > -rounding)

    parameters = jax.jacfwd(lambda numbers: ravel_pytree(estimates(shown(rebuild(numbers))))[0])(
        flat
    )
    moves = la.matmul(parameters / scale, basis)
    solved = jnp.where(determined, moves / jnp.where(determined, eigenvalues, 1), 0)
    if meat is None:
        covariance = la.matmul(solved, moves.T)
    else:
        scores = la.matmul(la.matmul(basis.T, meat / la.outer(scale, scale)), basis)
        covariance = la.matmul(la.matmul(solved, scores), solved.T)
    pull = la.matmul(basis.T, score / scale)
    distance = jnp.sqrt(jnp.sum(jnp.where(determined, pull**2 / jnp.abs(eigenvalues), 0)))

    whole = jnp.sum(moves**2, axis=1)
    lost = jnp.sum(jnp.where(determined, 0, moves**2), axis=1)
    unmoved = ~(whole > jnp.finfo(flat.dtype).tiny)

    def by_name(flags: Array) -> PyTree[Array]:
        return jax.tree.map(lambda leaf: leaf > 0.5, unravel(flags.astype(values.dtype)))

    # what is frozen can be a function of what is not, as a stationary start is
    frozen = jax.tree.map(jnp.logical_and, _frozen_entries(shown(model)), by_name(unmoved))
    undetermined = by_name((lost > rounding * whole) | unmoved)
    undetermined = jax.tree.map(lambda a, b: a & ~b, undetermined, frozen)
    covariance = jnp.where(proper, covariance, jnp.nan)
    return Covariance(named, covariance, frozen, undetermined, distance, proper)


def _frozen_entries(module: Any) -> PyTree[Array]:
    """Like `estimates`: True where a parameter was frozen by name."""
    if isinstance(module, AbstractNamelessModel):
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, bool), module.params)

    def entries(module: Any, named: dict[str, Any]) -> dict[str, Any]:
        found, behind = {}, inline(module)
        for name, value in named.items():
            if not isinstance(value, dict):
                mask = jnp.asarray(
                    _mask(behind[name]) if name in behind else frozen_mask(module, name)
                )
                mask = mask.reshape(mask.shape + (1,) * (value.ndim - mask.ndim))
                found[name] = jnp.broadcast_to(mask, value.shape)
                continue
            inner = getattr(module, name)
            if isinstance(inner, tuple):
                found[name] = {str(i): entries(m, value[str(i)]) for i, m in enumerate(inner)}
            else:
                found[name] = entries(inner, value)
        return found

    return entries(module, named_parameters(module))


def _mask(factor: Any) -> Any:
    """What is frozen of a factor behind one parameter; of one that follows others, nothing."""
    return frozen_mask(factor, *factor.parameters) if factor.parameters else False
