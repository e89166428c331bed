"""Criteria for choosing among models: less is better."""

import warnings
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxem._core.checks import concrete
from jaxem.em._expectation import infer
from jaxem.em._problem import Problem
from jaxem.em._solution import impossible_data
from jaxem.inference._fitted import fitted_problem, num_observed
from jaxem.latents import Exact
from jaxem.models._base import AbstractModel
from jaxem.models._finite import AbstractJointModel


def aic(
    fitted: Any, data: PyTree[Array], *, sample_weight: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Akaike's criterion, −2 log L + 2 p, from the log-likelihood without any prior.

    `fitted` is a model, an emission or a `Solution`; p counts the parameters that are not frozen.
    """
    model, problem = fitted_problem(fitted, data, sample_weight)
    return -2 * _log_likelihood(model, problem) + 2 * model.num_free_parameters


def bic(
    fitted: Any, data: PyTree[Array], *, sample_weight: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Schwarz's criterion, −2 log L + p log n, with n the total weight of the observations.

    Where observations are sequences n counts the steps that were observed, each by its weight.
    """
    model, problem = fitted_problem(fitted, data, sample_weight)
    return _bic(model, problem)


def icl(
    fitted: Any, data: PyTree[Array], *, sample_weight: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Integrated completed likelihood, BIC + 2 × the entropy of the responsibilities.

    **Raises:** `ValueError` for a model of sequences, or one without a finite latent.

    Biernacki, Celeux & Govaert (2000), IEEE PAMI 22.
    """
    model, problem = fitted_problem(fitted, data, sample_weight)
    if not isinstance(model, AbstractJointModel):
        raise ValueError(
            "icl is for mixtures, whose latents are independent given the data; "
            f"{type(model).__name__} is none: use bic."
        )
    return _bic(model, problem) + 2 * _entropy(model, problem)


def _bic(model: AbstractModel, problem: Problem) -> Float[Array, ""]:
    penalty = model.num_free_parameters * jnp.log(num_observed(model, problem))
    return -2 * _log_likelihood(model, problem) + penalty


def _log_likelihood(model: AbstractModel, problem: Problem) -> Float[Array, ""]:
    """Σ w log p(x); −∞ with a warning, where that is known, if an observation is impossible."""
    value, possible = _evaluated(model, problem)
    known = concrete(possible)
    if known is not None and not known.all():
        warnings.warn(impossible_data(known), stacklevel=3)
    return jnp.where(jnp.all(possible) | jnp.isnan(value), value, -jnp.inf)


@eqx.filter_jit  # in one program, since what is possible in a chain is known from its filter
def _evaluated(model: AbstractModel, problem: Problem) -> tuple[Float[Array, ""], Array]:
    return infer(model, problem, Exact(), None)[1], problem.possible(model)


@eqx.filter_jit
def _entropy(model: AbstractJointModel, problem: Problem) -> Float[Array, ""]:
    entropy = jnp.sum(jax.scipy.special.entr(model.responsibilities(problem.data)), axis=1)
    weight = problem.sample_weight
    return jnp.sum(entropy if weight is None else jnp.where(weight != 0, weight * entropy, 0))
