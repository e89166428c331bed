"""How sure are the estimates, and which observations decide them? Eruptions of Old Faithful.

Standard errors from the observed information, robust ones from the sandwich, the rate at which EM
converged (the fraction of information that is missing), and the influence of every eruption on
one number, checked by leaving the most influential out. Run `python examples/standard_errors.py`.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxem

jax.config.update("jax_enable_x64", True)
data = pathlib.Path(__file__).parent / "data" / "faithful.csv"
x = jnp.asarray(np.loadtxt(data, delimiter=",", skiprows=1))
components = jaxem.emissions.Gaussian([[2.0, 50.0], [4.3, 80.0]], jnp.stack([jnp.cov(x.T)] * 2))
solution = jaxem.fit(jaxem.Mixture([0.5, 0.5], components), x, tol=1e-12)

print(jaxem.inference.observed_information(solution, x).covariance(), "\n")

robust = jaxem.inference.sandwich(solution, x)
classic, sturdy = (
    jaxem.inference.standard_errors(solution, x, robust=choice)["components"]["mean"]
    for choice in (False, True)
)
print("standard errors of the means, if the model is true:\n", np.round(classic, 4))
print("and if it may be wrong:\n", np.round(sturdy, 4))
lower, upper = jaxem.inference.confidence_interval(solution, x, level=0.95)
low, high = lower["weights"][0], upper["weights"][0]
print(f"95 % interval for the share of short eruptions: {low:.3f} … {high:.3f}\n")

rate = jaxem.inference.convergence_rate(solution, x, num_eigenvalues=3)
print(rate, "\n  so each step of EM removes", f"{1 - rate.eigenvalues[0]:.0%} of the error left\n")


def correlation(model):
    """Of duration and waiting time, among short eruptions."""
    covariance = model.components.covariance[0]
    return covariance[0, 1] / jnp.sqrt(covariance[0, 0] * covariance[1, 1])


influence = jaxem.inference.influence(correlation, solution, x)
print(f"correlation among short eruptions: {correlation(solution.model):.4f}")
print("eruption   minutes   waiting   predicted without it   refitted without it")
for i in np.argsort(-np.abs(influence))[:4]:
    without = jaxem.fit(solution.model, x, sample_weight=jnp.ones(len(x)).at[i].set(0), tol=1e-12)
    predicted = correlation(solution.model) - influence[i]
    print(
        f"{i:8d}{x[i, 0]:10.2f}{x[i, 1]:10.0f}{predicted:23.4f}{correlation(without.model):22.4f}"
    )
