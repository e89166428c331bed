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
    """Schwarz's criterion, −2 log L + p log n, with n the total weight of the units.

    Where units are sequences n counts the steps that were observed, each by its weight.
    """
    log_likelihood, model, total = _evaluate(fitted, data, weights)
    return -2 * log_likelihood + model.num_free_parameters * jnp.log(total)


def icl(
    fitted: Any, data: PyTree[Array], *, weights: Float[Array, " n"] | None = None
) -> Float[Array, ""]:
    """Integrated completed likelihood, BIC + 2 × the entropy of the responsibilities.

    Biernacki, Celeux & Govaert (2000), IEEE PAMI 22.
    """
    model, data, weights = checked(fitted, data, weights)
    if hasattr(model, "sizes"):
        raise ValueError("icl is for mixtures: the states of a sequence are not independent.")
    return bic(model, data, weights=weights) + 2 * _entropy(model, data, weights)


def _evaluate(fitted: Any, data: Any, weights: Any) -> tuple[Array, Any, Array]:
    model, data, weights = checked(fitted, data, weights)
    log_likelihood = _log_likelihood(model, data, weights)
    return log_likelihood, model, _sample_size(model, data, weights).astype(log_likelihood.dtype)


def _sample_size(model: Any, data: Any, weights: Any) -> Array:
    if not hasattr(model, "sizes"):
        return jnp.asarray(total_weight(data, weights))
    sizes = model.sizes(data)
    return jnp.sum(sizes if weights is None else sizes * weights)


@eqx.filter_jit
def _log_likelihood(model: Any, data: Any, weights: Any) -> Array:
    return model.e_step(data, weights)[1]


@eqx.filter_jit
def _entropy(model: Any, data: Any, weights: Any) -> Array:
    entropy = jnp.sum(jax.scipy.special.entr(model.responsibilities(data)), axis=1)
    return jnp.sum(entropy if weights is None else jnp.where(weights != 0, weights * entropy, 0))
