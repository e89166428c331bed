"""Mixtures of regressions against published values and what reference programs gave when run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gold import REGRESSIONS, match_all, solve, table

import jaxem

# flexmix divides residual variances by (n − p)/n: deliberately not the maximum
OTHERS = frozenset({("mixreg_npreg", "flexmix_loglik"), ("mixreg_npreg", "flexmix_sigma")})


def coefficients(model):
    """Intercept and slopes of one output, a row for each component."""
    c = model.components
    return jnp.concatenate([c.intercept, c.coefficients[:, 0]], axis=1)


def by_labels(data, labels, family, sure=1.0):
    k = int(np.max(labels)) + 1
    r = jnp.where(jax.nn.one_hot(labels, k) > 0, sure, (1 - sure) / (k - 1))
    return jaxem.Mixture.from_responsibilities(data, r, family)


def tone(case):
    frame = table("tonedata").to_numpy(float)
    data = jnp.asarray(frame[:, :1]), jnp.asarray(frame[:, 1:])
    u, y = frame.T
    labels = np.argmin(np.abs(np.stack([1.9 + 0.05 * u - y, u - y])), axis=0)
    numbers = {}
    for prefix, tied in (("", False), ("eqvar_", True)):
        family = functools.partial(jaxem.emissions.LinearRegression, tied=tied)
        solution = solve(case, by_labels(data, labels, family, 0.95), data)
        covariance = solution.model.components.covariance
        numbers[f"{prefix}loglik"] = solution.log_likelihood
        numbers[f"{prefix}beta"] = coefficients(solution.model)
        numbers[f"{prefix}sigma"] = jnp.sqrt(covariance[0, 0] if tied else covariance[:, 0, 0])
        if not tied:
            numbers["pi"] = solution.model.weights
    return numbers


def parabola(case):
    frame = table("NPreg")
    u = frame["x"].to_numpy(float)[:, None]
    data = jnp.asarray(np.concatenate([u, u**2], axis=1)), jnp.asarray(frame[["yn"]].to_numpy())
    labels = frame["class"].to_numpy(int) - 1
    solution = solve(case, by_labels(data, labels, jaxem.emissions.LinearRegression), data)
    model = solution.model
    order = jnp.argsort(model.components.intercept[:, 0])
    return {
        "loglik_ML": solution.log_likelihood,
        "pi": model.weights[order],
        "beta": coefficients(model)[order],
        "sigma_ML": jnp.sqrt(model.components.covariance[order, 0, 0]),
    }


def patents(case):
    frame = table("patent")
    data = jnp.asarray(frame[["lgRD"]].to_numpy(float)), jnp.asarray(frame[["Patents"]].to_numpy())
    k = int(case[-1])

    def start(key):
        return jaxem.Mixture.init(key, data, k, jaxem.emissions.PoissonRegression)

    models = jax.vmap(start)(jax.random.split(jax.random.key(0), 12))
    rough = jaxem.best(jaxem.fit_restarts(models, data, tol=1e-7, max_steps=500))
    solution = solve(case, rough.model, data)
    wanted = jnp.asarray(REGRESSIONS[case]["expected"]["beta"]["value"])
    gaps = jnp.abs(coefficients(solution.model)[None] - wanted[:, None]).sum(axis=2)
    order = jnp.argmin(gaps, axis=1)
    return {
        "loglik": solution.log_likelihood,
        "pi": solution.model.weights[order],
        "beta": coefficients(solution.model)[order],
    }


def experts(case):
    """Weights that depend on R&D by sales; one slope of the gate is near −40."""
    frame = table("patent")
    u, y = (jnp.asarray(frame[[name]].to_numpy()) for name in ("lgRD", "Patents"))
    v = jnp.asarray(frame[["RDS"]].to_numpy())

    def start(key):
        mixture = jaxem.Mixture.init(key, (u, y), 3, jaxem.emissions.PoissonRegression)
        return jaxem.MixtureOfExperts.from_mixture(mixture, 1)

    models = jax.vmap(start)(jax.random.split(jax.random.key(0), 12))
    rough = jaxem.best(jaxem.fit_restarts(models, (v, (u, y)), tol=1e-7, max_steps=500))
    solution = solve(case, rough.model, (v, (u, y)))
    beta = coefficients(solution.model)
    wanted = jnp.asarray(REGRESSIONS[case]["expected"]["beta"]["value"])
    order = jnp.argmin(jnp.abs(beta[None] - wanted[:, None]).sum(axis=2), axis=1)
    return {"loglik": solution.log_likelihood, "beta": beta[order]}


RECIPES = {
    "mixreg_tonedata": tone,
    "mixreg_npreg": parabola,
    "mixpois_patent_2": patents,
    "mixpois_patent_3": patents,
    "mixpois_patent_concomitant": experts,
}


@pytest.mark.parametrize("case", REGRESSIONS)
def test_reference(case):
    match_all(case, RECIPES[case](case), OTHERS)
