"""Two abilities behind six tests: factors, a rotation, and how sure its loadings are.

Only the correlations of the tests are published (112 people). The fit is the one that R's factanal
finds; standard errors of the rotated loadings come from the observed information. Run
`python examples/factor_analysis.py [picture.png]`.
"""

import pathlib
import sys

import jax
import matplotlib
import numpy as np

import jaxem
from jaxem.emissions import FactorAnalysis, from_moments
from jaxem.inference import factor_test, observed_information, rotate

matplotlib.use("Agg")
import matplotlib.pyplot as plt

jax.config.update("jax_enable_x64", True)
file = pathlib.Path(__file__).parent / "data" / "ability_cov.csv"
names = file.read_text().splitlines()[0].replace('"', "").split(",")[1:]
covariance = np.loadtxt(file, delimiter=",", skiprows=1, usecols=range(1, 7))
deviation = np.sqrt(np.diag(covariance))
x, weight = from_moments(112, covariance / np.outer(deviation, deviation))

print("factors   log-likelihood   chi-squared   dof   p-value")
solutions = {}
for q in (1, 2):
    start = FactorAnalysis.init(jax.random.key(0), x, sample_weight=weight, num_factors=q)
    solutions[q] = jaxem.fit(start, x, jaxem.SQUAREM(), sample_weight=weight, max_steps=10_000)
    test = factor_test(solutions[q], x, sample_weight=weight)
    print(
        f"{q:7d}{solutions[q].objective:17.3f}{test.statistic:14.3f}{test.dof:6d}"
        f"{test.p_value:10.3g}"
    )


def rotated(model):
    """Loadings after an oblique rotation, which lets abilities be correlated."""
    return rotate(model.loadings[0], "oblimin").loadings


model = solutions[2].model
information = observed_information(solutions[2], x, sample_weight=weight)
loadings, errors = rotated(model), information.covariance(rotated).standard_errors
print("\ntest        uniqueness        first factor       second factor")
for i, name in enumerate(names):
    columns = "".join(f"{loadings[i, j]:13.3f} ± {errors[i, j]:.3f}" for j in (0, 1))
    print(f"{name:10}{model.uniqueness[0, i]:12.3f}{columns}")
correlation = rotate(model.loadings[0], "oblimin").correlation[0, 1]
print(f"\nThe two abilities have a correlation of {correlation:.2f}.")

if len(sys.argv) > 1:
    figure, axes = plt.subplots(figsize=(6, 5.4), layout="constrained")
    axes.axhline(0, color="0.8", zorder=0)
    axes.axvline(0, color="0.8", zorder=0)
    axes.errorbar(*loadings.T, xerr=errors[:, 0], yerr=errors[:, 1], fmt="o", lw=1)
    for name, place in zip(names, np.asarray(loadings), strict=True):
        axes.annotate(name, place, xytext=(6, 6), textcoords="offset points")
    axes.set(xlabel="first factor", ylabel="second factor", title="Six tests, loadings ± one error")
    axes.set_aspect("equal")
    figure.savefig(sys.argv[1], dpi=150)
