"""The level of a river, twenty years of which were not recorded, and a forecast.

The local level model of Durbin & Koopman: a level that walks at random, measured with noise. The
data are the yearly flows of the Nile at Aswan, 1871–1970; those of 1891–1910 are withheld. Both
variances are estimated, the first level is known but for a variance of 10⁶. Run
`python examples/nile.py [picture.png]`.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxem
from jaxem.emissions import Gaussian, LinearRegression
from jaxem.inference import observed_information

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)
file = pathlib.Path(__file__).parent / "data" / "nile.csv"
years, flow = np.loadtxt(file, delimiter=",", skiprows=1, unpack=True)
withheld = (years > 1890) & (years <= 1910)
y = jnp.where(withheld, jnp.nan, flow)[None, :, None]  # one sequence of steps of one number

one, zero = [[[1.0]]], [[0.0]]
start = jaxem.freeze(
    jaxem.LinearGaussianSSM(
        Gaussian([[1000.0]], [[[1e6]]]),
        LinearRegression(one, zero, [[[1000.0]]]),
        LinearRegression(one, zero, [[[10000.0]]]),
    ),
    *("initial", "dynamics.coefficients", "dynamics.intercept"),
    *("emission.coefficients", "emission.intercept"),
)
solution = jaxem.fit(start, y, jaxem.SQUAREM())
print(f"{solution.status} after {int(solution.num_steps)} steps")


def deviations(model):
    """Of the level from year to year, and of a measurement."""
    return jnp.sqrt(jnp.stack([model.dynamics.covariance, model.emission.covariance]).ravel())


model = solution.model
errors = observed_information(solution, y).covariance(deviations).standard_errors
for what, value, error in zip(
    ("the level moves in a year", "a measurement is off"), deviations(model), errors, strict=True
):
    print(f"{what:26} by {value:6.1f} ± {error:.1f}")

mean, covariance = model.states(y)
level, deviation = mean[0, :, 0], jnp.sqrt(covariance[0, :, 0, 0])
gap = np.abs(flow - level)[withheld]
reach = 1.96 * np.sqrt(covariance[0, :, 0, 0] + model.emission.covariance[0, 0, 0])[withheld]
print(f"withheld years within their 95 % band: {np.sum(gap < reach)} of {gap.size}")
ahead, spread = model.forecast(y, 10)
print(f"1980: {ahead[0, -1, 0]:.0f} ± {1.96 * np.sqrt(spread[0, -1, 0, 0]):.0f} (95 %)")

if len(sys.argv) > 1:
    figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
    axes.plot(years[~withheld], flow[~withheld], ".", color="0.4", label="recorded")
    axes.plot(years[withheld], flow[withheld], "x", color="C3", ms=5, label="withheld")
    axes.plot(years, level, color="C0", label="level, 95 %")
    axes.fill_between(years, level - 1.96 * deviation, level + 1.96 * deviation, alpha=0.25)
    coming, half = years[-1] + np.arange(1, 11), 1.96 * np.sqrt(spread[0, :, 0, 0])
    axes.plot(coming, ahead[0, :, 0], color="C1", label="forecast, 95 %")
    axes.fill_between(coming, ahead[0, :, 0] - half, ahead[0, :, 0] + half, color="C1", alpha=0.25)
    axes.set(xlabel="year", ylabel="flow at Aswan, 10⁸ m³", title="The level of the Nile")
    axes.legend(frameon=False, ncols=4, loc="upper right")
    figure.savefig(sys.argv[1], dpi=150)
