"""Heavy tails and overdispersion against published values and what reference programs gave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gold import ROBUST, match_all, solve, table

import jaxem

# Coefficients of a regression, which these families are not
OTHERS = frozenset({("negbin_quine", "theta_regression"), ("negbin_quine", "loglik_regression")})


def with_dof(x, dof, labels=None):
    """A start with fixed degrees of freedom, from labels or from the moments of all data."""
    r = jnp.ones((len(x), 1)) if labels is None else jax.nn.one_hot(labels, int(labels.max()) + 1)
    model = jaxem.Mixture.from_responsibilities(x, r, jaxem.emissions.StudentT)
    components = type(model.components)(model.components.mean, model.components.scale, dof)
    return jaxem.freeze(jaxem.Mixture(model.weights, components), "components.dof")


def newcomb(case):
    x = jnp.asarray(table("newcomb").time.to_numpy(float))[:, None]
    solution = solve(case, jaxem.unfreeze(with_dof(x, 30.0), "components.dof"), x)
    fitted = solution.model.components
    errors = jaxem.inference.standard_errors(solution, x)["components"]
    scale = jnp.sqrt(fitted.scale[0, 0, 0])
    return {
        "mu_sigma_nu": jnp.stack([fitted.mean[0, 0], scale, fitted.dof[0]]),
        "se": jnp.stack(
            [errors["mean"][0, 0], errors["scale"][0, 0, 0] / (2 * scale), errors["dof"][0]]
        ),
        "loglik": solution.log_likelihood,
    }


def stackloss(case):
    x = jnp.asarray(table("stackloss").to_numpy(float))
    solution = solve(case, with_dof(x, 3.0), x)
    fitted = solution.model.components
    return {"mu": fitted.mean[0], "S": fitted.scale[0], "loglik": solution.log_likelihood}


def faithful(case):
    x = jnp.asarray(table("faithful").to_numpy(float))
    solution = solve(case, with_dof(x, 4.0, np.asarray(x[:, 0] < 3).astype(int)), x)
    fitted = solution.model.components
    rows, columns = np.tril_indices(2)
    numbers = [solution.model.weights[:1], *fitted.mean, *fitted.scale[:, rows, columns]]
    return {
        "par [pi1,mu1,mu2,S1(11,21,22),S2(11,21,22)] comp1=long": jnp.concatenate(numbers),
        "loglik": solution.log_likelihood,
    }


def quine(case):
    x = jnp.asarray(table("quine").Days.to_numpy())[:, None]
    start = jaxem.Mixture([1.0], jaxem.emissions.NegativeBinomial([[1.0]], [[10.0]]))
    solution = solve(case, start, x)
    fitted = solution.model.components
    numbers = {"mu": fitted.mean[0, 0], "theta": fitted.concentration[0, 0]}
    return numbers | {"loglik": solution.log_likelihood}


RECIPES = {
    "t_newcomb": newcomb,
    "mvt_stackloss_nu3": stackloss,
    "tmix_faithful_nu4": faithful,
    "negbin_quine": quine,
}


@pytest.mark.parametrize("case", ROBUST)
def test_reference(case):
    match_all(case, RECIPES[case](case), OTHERS)
