"""Uncertainty of fitted parameters from second derivatives of the log-likelihood.

With θ the free unconstrained numbers of a model, ℓ the log-likelihood (plus log-prior)
and sᵢ = ∂ log p(xᵢ)/∂θ the score of observation i,

    observed information   H = −∂²ℓ/∂θ∂θᵀ
    covariance             H⁻¹, or robustly the sandwich H⁻¹ (Σ wᵢ sᵢ sᵢᵀ) H⁻¹,

and for parameters g(θ), by the delta method, G H⁻¹ Gᵀ with G = ∂g/∂θ. Both are products
with H and with the scores, one direction at a time: no array of n × p exists.

Not every direction is determined. Redundant logits move no parameter; an empty component,
a probability of 0 or a variance at its floor moves no likelihood. The convention: directions along
which the information is zero, to rounding, are held fixed, and so is what was frozen. Parameters
that such a direction moves, and those on a boundary, are marked in `undetermined`; what of their
variance remains is that along the other directions.
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
from jaxem._core.parameters import estimates, free_numbers, log_leaves
from jaxem._core.statistics import Framed
from jaxem.em._expectation import infer
from jaxem.em._problem import Problem
from jaxem.em._solution import Solution
from jaxem.inference._fitted import num_observed, possible_problem
from jaxem.latents import Exact
from jaxem.models._alone import shown
from jaxem.models._base import AbstractModel, AbstractNamelessModel, expected_sums


class Covariance(eqx.Module):
    """Covariance matrix of the parameters of a fit.

    - `estimates`: parameters by name, nested as the model is.
    - `matrix` (p, p), in the order in which `jax.flatten_util.ravel_pytree` puts the estimates.
    - `frozen`: like `estimates`, True where a parameter was frozen by `freeze`, or follows from
      such; its standard error is 0.
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
        head = f"Covariance of {self.matrix.shape[0]} numbers"
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
    - `num_observations`: the weight of all observations, steps of sequences counted one by one.
    """

    model: AbstractModel
    matrix: Float[Array, "p p"]
    score: Float[Array, " p"]
    num_observations: Float[Array, ""]

    def covariance(self, of: Callable[[Any], PyTree[Array]] | None = None) -> Covariance:
        """Covariance of the parameters: the inverse, by the delta method.

        **Arguments:** `of(model)`, what takes the place of the parameters, by name or an array:
        `lambda model: rotate(model.loadings[0]).loadings` for example.
        """
        return _delta(self, None, estimates if of is None else of)


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
    model, problem = possible_problem(fitted, data, sample_weight, prior)
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
    `Covariance.undetermined` marks count only what is determined. NaN where the information is
    indefinite, so that the model is no maximum. Of a model that is not fitted they are those of its
    parameters as given: `observed_information(…).covariance().distance` says how far away the
    maximum is.

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
    model, problem = possible_problem(fitted, data, sample_weight, prior)
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

    def objective(numbers: Array) -> Array:
        new = rebuild(numbers)
        return infer(new, problem, Exact(), None)[1] + problem.log_prior(new)

    score, push = jax.linearize(jax.grad(objective), flat)
    width = problem.num_observations * model.width(problem.data)
    hessian = _each_direction(push, flat.size, flat.dtype, width)
    information = -0.5 * (hessian + hessian.T)
    return Information(model, information, score, num_observed(model, problem))


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
def _delta(
    information: Information,
    meat: Float[Array, "p p"] | None,
    of: Callable[[Any], PyTree[Array]] = estimates,
) -> Covariance:
    model, matrix, score = information.model, information.matrix, information.score
    flat, rebuild = free_numbers(model)
    named = of(shown(model))
    values, by_name = ravel_pytree(named)

    def parameters(numbers: Array, model_at: Callable[[Array], Any] = rebuild) -> Array:
        return ravel_pytree(of(shown(model_at(numbers))))[0]

    scale, rounding = _scale(information)
    eigenvalues, basis = jnp.linalg.eigh(matrix / la.outer(scale, scale))
    rounding = jnp.finfo(flat.dtype).eps ** (2 / 3) + la.apply(basis.T**2, rounding)
    determined = eigenvalues > rounding
    proper = jnp.all(eigenvalues > -rounding)

    moves = la.matmul(jax.jacfwd(parameters)(flat) / scale, basis)
    solved = jnp.where(determined, moves / jnp.where(determined, eigenvalues, 1), 0)
    if meat is None:
        covariance = la.matmul(solved, moves.T)
    else:
        scores = la.matmul(la.matmul(basis.T, meat / la.outer(scale, scale)), basis)
        covariance = la.matmul(la.matmul(solved, scores), solved.T)
    pull = la.matmul(basis.T, score / scale)
    distance = jnp.sqrt(jnp.sum(jnp.where(determined, pull**2 / jnp.abs(eigenvalues), 0)))

    eps = jnp.finfo(flat.dtype).eps ** (2 / 3)
    whole = jnp.sum(moves**2, axis=1)
    lost = jnp.sum(jnp.where(determined, 0, moves**2), axis=1) > eps * whole
    still = ~(whole > jnp.finfo(flat.dtype).tiny)
    # What is still at a boundary is another value elsewhere. What is frozen is so where all numbers
    # are others; what is not even then, as one probability of 1, is known.
    elsewhere = jnp.cos(1.0 + jnp.arange(flat.size, dtype=flat.dtype))

    def differs(model_at: Callable[[Array], Any]) -> Array:
        gap = jnp.abs(parameters(elsewhere, model_at) - values)
        return ~(gap <= eps * jnp.abs(values))

    moves_free = differs(rebuild)
    frozen = ~moves_free & differs(ravel_pytree(model)[1])
    undetermined = lost | (still & moves_free)
    frozen, undetermined = (
        jax.tree.map(lambda leaf: leaf > 0.5, by_name(flag.astype(values.dtype)))
        for flag in (frozen, undetermined)
    )
    covariance = jnp.where(proper, covariance, jnp.nan)
    return Covariance(named, covariance, frozen, undetermined, distance, proper)


def _scale(information: Information) -> tuple[Float[Array, " p"], Float[Array, " p"]]:
    """Square roots of each number's information, and the rounding of information in those units.

    Whether a direction is determined must not depend on units of measure. Components share them, so
    that one without observations is measured by the others. Logarithms have none: their information
    is a sum of differences of probabilities over the observations, which rounds as 1 for each.
    """
    model, diagonal = information.model, jnp.diagonal(information.matrix)
    eps, tiny = jnp.finfo(diagonal.dtype).eps, jnp.finfo(diagonal.dtype).tiny
    rounding = jnp.full_like(diagonal, tiny**0.5)
    if not isinstance(model, AbstractNamelessModel):
        leaves, kind = jax.tree.flatten(ravel_pytree(model)[1](diagonal))
        shared = [jnp.broadcast_to(jnp.max(leaf, axis=0), leaf.shape) for leaf in leaves]
        diagonal, _ = ravel_pytree(jax.tree.unflatten(kind, shared))
        logs = {id(leaf) for leaf in log_leaves(model)}
        noise = 10 * eps * information.num_observations
        noises = [
            jnp.full(leaf.shape, noise if id(leaf) in logs else tiny**0.5, diagonal.dtype)
            for leaf in jax.tree.leaves(model)
        ]
        rounding, _ = ravel_pytree(jax.tree.unflatten(kind, noises))
    square = jnp.where(diagonal > rounding, diagonal, jnp.maximum(rounding, 1))
    return jnp.sqrt(square), rounding / square
