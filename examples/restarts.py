"""Many starts, and a likelihood without bound: the velocities of 82 galaxies.

With a variance of its own for each of five components, the highest likelihoods are spurious: a
component that rests on two galaxies. Such fits are called degenerate, and `best` sets them aside.
Then the same maximum by emEM: short runs from all starts, long ones from the best of those.
Run `python examples/restarts.py`.
"""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np

import jaxem

jax.config.update("jax_enable_x64", True)
data = pathlib.Path(__file__).parent / "data" / "galaxies_MASS.csv"
velocity = np.loadtxt(data, skiprows=1) / 1000  # 1000 km/s
velocity[velocity == 26.69] = 26.96  # a misprint in MASS; Roeder (1990) has 26.96
x = jnp.asarray(velocity)[:, None]


def start(key):
    return jaxem.Mixture.init(key, x, 5, jaxem.emissions.Gaussian, method="random")


starts = jax.vmap(start)(jax.random.split(jax.random.key(0), 100))
runs = jaxem.fit_restarts(starts, x, max_steps=5000)
print(runs, "\n")

print("log-likelihood   starts   smallest variance   lightest weight   result")
maxima, first, counts = np.unique(
    np.round(runs.log_likelihood, 3), return_index=True, return_counts=True
)
for value, i, count in [*zip(maxima, first, counts, strict=True)][::-1][:8]:
    lane = jax.tree.map(lambda leaf, i=i: leaf[i], runs)
    variance, weight = lane.model.components.covariance.min(), lane.model.weights.min()
    print(f"{value:14.3f}{count:9d}{variance:20.5f}{weight:18.4f}   {lane.status}")

chosen = jaxem.best(runs)
print(f"\nThe best sound maximum, {int(chosen.set_aside)} higher ones set aside:\n{chosen}\n")

polished = jaxem.fit_restarts(starts, x, short_steps=20, num_polished=20, max_steps=5000)
emem = jaxem.best(polished)
steps = 100 * 20 + int(polished.num_steps.sum())
print(f"emEM reaches {emem.log_likelihood:.3f} in {steps} steps instead of {runs.num_steps.sum()}.")
