"""Criteria for choosing among models: less is better."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxem._solution import checked
from jaxem._units import total_weight


def aic(
    fitted: Any, data: PyTree[Array], *, weights: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Akaike's criterion, −2 log L + 2 p, from the log-likelihood without any prior.

    `fitted` is a model or a `Solution`; p counts the parameters that are not held.
    """
    log_likelihood, model, _ = _evaluate(fitted, data, weights)
    return -2 * log_likelihood + 2 * model.num_free_parameters


def bic(
    fitted: Any, data: PyTree[Array], *, weights: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Schwarz's criterion, −2 log L + p log n, with n the total weight of the units."""
    log_likelihood, model, total = _evaluate(fitted, data, weights)
    return -2 * log_likelihood + model.num_free_parameters * jnp.log(total)


def icl(
    fitted: Any, data: PyTree[Array], *, weights: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Integrated completed likelihood, BIC + 2 × the entropy of the responsibilities.

    Biernacki, Celeux & Govaert (2000), IEEE PAMI 22.
    """
    model, data, weights = checked(fitted, data, weights)
    return bic(model, data, weights=weights) + 2 * _entropy(model, data, weights)


def _evaluate(fitted: Any, data: Any, weights: Any) -> tuple[Array, Any, Array]:
    model, data, weights = checked(fitted, data, weights)
    log_likelihood = _log_likelihood(model, data, weights)
    total = jnp.asarray(total_weight(data, weights), log_likelihood.dtype)
    return log_likelihood, model, total


@eqx.filter_jit
def _log_likelihood(model: Any, data: Any, weights: Any) -> Array:
    return model.e_step(data, weights)[1]


@eqx.filter_jit
def _entropy(model: Any, data: Any, weights: Any) -> Array:
    entropy = jnp.sum(jax.scipy.special.entr(model.responsibilities(data)), axis=1)
    return jnp.sum(entropy if weights is None else jnp.where(weights != 0, weights * entropy, 0))
