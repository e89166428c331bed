"""Uncertainty of fitted parameters from second derivatives of the log-likelihood.

With θ the unconstrained numbers of a model that may move, ℓ the log-likelihood (plus log-prior)
and sᵢ = ∂ log p(xᵢ)/∂θ the score of unit i,

    observed information   H = −∂²ℓ/∂θ∂θᵀ
    covariance             H⁻¹, or robustly the sandwich H⁻¹ (Σ wᵢ sᵢ sᵢᵀ) H⁻¹,

and for natural parameters g(θ), by the delta method, G H⁻¹ Gᵀ with G = ∂g/∂θ. Both are products
with H and with the scores, one direction at a time: no array of n × p exists.

Not every direction is determined. Redundant logits move no natural parameter; an empty component,
a probability of 0 or a variance at its floor moves no likelihood. The convention: directions along
which the information is zero, to rounding, are held, and so is what was frozen. Natural
parameters that such a direction moves, and those that nothing moves, are marked in `held`; what
of their variance remains is that along the other directions.
"""

from __future__ import annotations

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

from jaxem import _linalg as la
from jaxem._hold import estimates, free_numbers
from jaxem._model import AbstractModel
from jaxem._posterior import Exact
from jaxem._solution import Solution, checked
from jaxem._statistics import Framed
from jaxem._units import lanes_at_once, num_units


class Covariance(eqx.Module):
    """Covariance matrix of the natural parameters of a fit.

    - `estimates`: natural parameters by name, nested as the model is.
    - `matrix` (p, p), in the order in which `jax.flatten_util.ravel_pytree` puts the estimates.
    - `held`: like `estimates`, True where a parameter was frozen, sits on a boundary or is not
      determined by the data; its standard error counts only what is determined, often 0.
    - `distance`: how far from the maximum the estimates lie, in standard errors; 0 for a converged
      fit.
    - `proper`: whether the information is positive along every direction that it determines.
      Otherwise the estimates are no maximum (a saddle, or a fit that has not converged) and the
      matrix is NaN.
    """

    estimates: PyTree[Array]
    matrix: Float[Array, "p p"]
    held: PyTree[Array]
    distance: Float[Array, ""]
    proper: Bool[Array, ""]

    @property
    def standard_errors(self) -> PyTree[Array]:
        """Square roots of the variances, like `estimates`."""
        _, unravel = ravel_pytree(self.estimates)
        return unravel(jnp.sqrt(jnp.maximum(jnp.diagonal(self.matrix), 0)))

    def interval(self, level: float = 0.95) -> tuple[PyTree[Array], PyTree[Array]]:
        """Lower and upper ends of the normal (Wald) confidence interval of each parameter.

        Symmetric about the estimate, so that near the edge of a parameter's range an end may lie
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
        head = f"Covariance of {self.matrix.shape[0]} natural parameters"
        if not bool(self.proper):
            head += "; the information is indefinite: these estimates are no maximum"
        elif float(self.distance) > 0.1:
            head += f"; {float(self.distance):.2g} standard errors away from the maximum"
        rows = [head]
        with_path = jax.tree_util.tree_flatten_with_path(self.estimates)[0]
        errors, held = jax.tree.leaves(self.standard_errors), jax.tree.leaves(self.held)
        for (path, value), error, fixed in zip(with_path, errors, held, strict=True):
            name = ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in path)
            for index in np.ndindex(value.shape):
                place = f"{name}{list(index) if index else ''}"
                row = f"  {place:<32} {value[index]:>12.6g} ± {error[index]:<8.3g}"
                rows.append(row + "   held" if bool(fixed[index]) else row.rstrip())
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
        """Covariance of the natural parameters: the inverse, by the delta method."""
        return _delta(self, None)


def observed_information(
    fitted: Solution | AbstractModel,
    data: PyTree[Array],
    *,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
) -> Information:
    """The observed information at a fitted model: minus the Hessian of the log-likelihood.

    **Arguments:** a solution or a model; the data, weights and prior that it was fitted to. With
    a prior the information is that of the posterior, and its inverse Laplace's approximation to
    the posterior covariance.

    **Returns:** an `Information`; its `covariance()` gives standard errors of natural parameters.
    The cost is p products of the Hessian, each about four E-steps.

    Efron & Hinkley (1978), Biometrika 65; Louis (1982), JRSS B 44, whose identity this equals.
    """
    model, data, weights = checked(fitted, data, weights)
    return _observed(model, data, weights, prior)


def standard_errors(
    fitted: Solution | AbstractModel,
    data: PyTree[Array],
    *,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    robust: bool = False,
) -> PyTree[Array]:
    """Standard errors of the natural parameters, by name and nested as the model is.

    From the observed information, or with `robust` from the `sandwich`. What `Covariance.held`
    marks is not determined, and its entry counts only what is. NaN where the model is no maximum.

    **Arguments:** as for `observed_information`.
    """
    return _covariance(fitted, data, weights, prior, robust).standard_errors


def confidence_interval(
    fitted: Solution | AbstractModel,
    data: PyTree[Array],
    *,
    level: float = 0.95,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
    robust: bool = False,
) -> tuple[PyTree[Array], PyTree[Array]]:
    """Lower and upper ends of normal confidence intervals of the natural parameters.

    **Arguments:** `level`, the coverage; the others as for `standard_errors`.
    """
    return _covariance(fitted, data, weights, prior, robust).interval(level)


def sandwich(
    fitted: Solution | AbstractModel,
    data: PyTree[Array],
    *,
    weights: Float[Array, " n"] | None = None,
    prior: Framed | None = None,
) -> Covariance:
    """The robust covariance H⁻¹ (Σ w s sᵀ) H⁻¹, valid also if the model is wrong.

    Units must be independent. Weights count units: weight 2 equals the unit twice.

    **Arguments:** as for `observed_information`.

    Huber (1967), Proc. 5th Berkeley Symp.; White (1982), Econometrica 50.
    """
    model, data, weights = checked(fitted, data, weights)
    information = _observed(model, data, weights, prior)
    return _delta(information, _scatter_of_scores(model, data, weights))


def _covariance(fitted: Any, data: Any, weights: Any, prior: Any, robust: bool) -> Covariance:
    if robust:
        return sandwich(fitted, data, weights=weights, prior=prior)
    return observed_information(fitted, data, weights=weights, prior=prior).covariance()


def _each_direction(
    product: Callable[[Array], Array], size: int, dtype: Any, numbers: int
) -> Array:
    """The matrix of a linear map, as many columns at once as memory allows."""
    batch = lanes_at_once(size, numbers)
    return lax.map(product, jnp.eye(size, dtype=dtype), batch_size=batch).T


@eqx.filter_jit
def _observed(model: AbstractModel, data: Any, weights: Any, prior: Framed | None) -> Information:
    flat, rebuild = free_numbers(model)

    def objective(numbers: Array) -> Array:
        new = rebuild(numbers)
        _, log_likelihood = new.e_step(data, weights, posterior=Exact())
        return log_likelihood if prior is None else log_likelihood + new.expected_log_prob(prior)

    score, push = jax.linearize(jax.grad(objective), flat)
    width = num_units(data) * model.width(data)
    hessian = _each_direction(push, flat.size, flat.dtype, width)
    return Information(model, -0.5 * (hessian + hessian.T), score)


@eqx.filter_jit
def _scatter_of_scores(model: AbstractModel, data: Any, weights: Any) -> Float[Array, "p p"]:
    """Σ w s sᵀ, column by column: s·v of every unit, then the score of weights w ∘ (s·v)."""
    flat, rebuild = free_numbers(model)
    weights = jnp.ones(num_units(data), flat.dtype) if weights is None else weights

    def log_likelihood(numbers: Array, weights: Array) -> Array:
        return rebuild(numbers).e_step(data, weights, posterior=Exact())[1]

    def column(direction: Array) -> Array:
        units = jax.grad(log_likelihood, argnums=1)
        _, along = jax.jvp(lambda numbers: units(numbers, weights), (flat,), (direction,))
        return jax.grad(log_likelihood)(flat, weights * jnp.where(weights > 0, along, 0))

    return _each_direction(column, flat.size, flat.dtype, num_units(data) * model.width(data))


@eqx.filter_jit
def _delta(information: Information, meat: Float[Array, "p p"] | None) -> Covariance:
    model, matrix, score = information.model, information.matrix, information.score
    flat, rebuild = free_numbers(model)
    named = estimates(model)
    values, unravel = ravel_pytree(named)
    # Unit diagonal first: whether a direction is determined must not depend on units of measure.
    # Components share them, and one without units is measured by the others.
    diagonal = jnp.diagonal(matrix)
    if hasattr(model, "natural"):
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

    natural = jax.jacfwd(lambda numbers: ravel_pytree(estimates(rebuild(numbers)))[0])(flat)
    along = la.matmul(natural / scale, basis)
    solved = jnp.where(determined, along / jnp.where(determined, eigenvalues, 1), 0)
    if meat is None:
        covariance = la.matmul(solved, along.T)
    else:
        scores = la.matmul(la.matmul(basis.T, meat / la.outer(scale, scale)), basis)
        covariance = la.matmul(la.matmul(solved, scores), solved.T)
    pull = la.matmul(basis.T, score / scale)
    distance = jnp.sqrt(jnp.sum(jnp.where(determined, pull**2 / jnp.abs(eigenvalues), 0)))

    whole = jnp.sum(along**2, axis=1)
    undetermined = jnp.sum(jnp.where(determined, 0, along**2), axis=1)
    held = (undetermined > rounding * whole) | ~(whole > jnp.finfo(flat.dtype).tiny)
    held = jax.tree.map(lambda leaf: leaf > 0.5, unravel(held.astype(values.dtype)))
    return Covariance(named, jnp.where(proper, covariance, jnp.nan), held, distance, proper)
