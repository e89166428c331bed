"""Genetic linkage, the first example of Dempster, Laird & Rubin (1977), in two plain functions.

197 animals fall into four cells with probabilities (½ + θ/4, (1 − θ)/4, (1 − θ)/4, θ/4). The first
cell is really two, of probabilities ½ and θ/4, that look alike: their counts are the missing data.
Run `python examples/from_functions.py`.
"""

import jax
import jax.numpy as jnp

import jaxem


def e_step(theta, counts):
    """Expected counts that speak for θ and against it, and the log-likelihood."""
    y = counts.sum(axis=0)
    hidden = y[0] * (theta / 4) / (1 / 2 + theta / 4)
    cells = jnp.stack([1 / 2 + theta / 4, (1 - theta) / 4, (1 - theta) / 4, theta / 4])
    return (hidden + y[3], y[1] + y[2]), jnp.sum(y * jnp.log(cells))


def m_step(statistics):
    speaking_for, against = statistics
    return speaking_for / (speaking_for + against)


def estimate(counts):
    return jaxem.fit(jaxem.from_functions(e_step, m_step, 0.5), counts)


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    counts = jnp.array(
        [[125.0, 18.0, 20.0, 34.0]]
    )  # the leading axis is the observation: one experiment
    solution = estimate(counts)
    print(solution)
    print(f"\ntheta = {solution.model.params:.10f}")
    print(f"exact = {(15 + 53809**0.5) / 394:.10f}, the root of 197 θ² − 15 θ − 68 = 0")

    # Forward-mode derivatives pass through the fit: how each count moves the estimate.
    influence = jax.jacfwd(lambda y: estimate(y).model.params)(counts)
    print(f"d theta / d counts = {influence[0].round(6)}")
