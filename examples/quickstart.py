"""Old Faithful: how many kinds of eruption are there?

Fits Gaussian mixtures of 1 to 4 components, each from 100 starts at once, compares them by BIC,
and draws the one chosen. Run `python examples/quickstart.py [picture.png]`.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxem

picture = sys.argv[1] if len(sys.argv) > 1 else "quickstart.png"
data = pathlib.Path(__file__).parent / "data" / "faithful.csv"
x = jnp.asarray(np.loadtxt(data, delimiter=",", skiprows=1), dtype=jnp.float32)
keys = jax.random.split(jax.random.key(0), 100)


def fit_all(k):
    starts = jax.vmap(lambda key: jaxem.Mixture.init(key, x, k, jaxem.emissions.Gaussian))(keys)
    return jaxem.fit_restarts(starts, x, max_steps=2000)


print(f"{len(x)} eruptions of Old Faithful, {len(keys)} starts for each number of components\n")
print("  k   log-likelihood   parameters      BIC      ICL   set aside   starts")
runs, fits, bic = {}, {}, {}
for k in range(1, 5):
    runs[k] = fit_all(k)
    fits[k] = jaxem.best(runs[k])
    bic[k] = float(jaxem.inference.bic(fits[k], x))
    print(
        f"{k:3d}{fits[k].log_likelihood:17.2f}{fits[k].model.num_free_parameters:13d}"
        f"{bic[k]:9.1f}{jaxem.inference.icl(fits[k], x):9.1f}{fits[k].set_aside:12d}   "
        + str(runs[k]).split(": ")[1]
    )
chosen = min(bic, key=bic.__getitem__)
model = fits[chosen].model
print(f"\nBIC chooses {chosen} components.\n{fits[chosen]}")

ink, colours = "#20303c", ["#0b7a75", "#d1603d", "#7768ae", "#c99700"]
figure = Figure(figsize=(12, 6), layout="constrained")
left, right = figure.subplots(1, 2, width_ratios=(1.15, 1))

grid = jnp.stack(jnp.meshgrid(jnp.linspace(1, 5.7, 200), jnp.linspace(36, 103, 200)), axis=-1)
height = model.log_prob(grid.reshape(-1, 2)).reshape(200, 200)
levels = np.quantile(model.log_prob(x), [0, 0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9])
left.contourf(grid[..., 0], grid[..., 1], height, levels, cmap="Blues", alpha=0.6, extend="max")
left.contour(grid[..., 0], grid[..., 1], height, levels, colors="w", linestyles="-", linewidths=0.8)
angle = np.linspace(0, 2 * np.pi, 200)
circle = 2 * np.stack([np.cos(angle), np.sin(angle)])
for j, (mean, covariance) in enumerate(
    zip(model.components.mean, model.components.covariance, strict=True)
):
    own = x[model.predict(x) == j]
    left.plot(*own.T, ".", color=colours[j], ms=6, mec="white", mew=0.4)
    ellipse = mean[:, None] + np.linalg.cholesky(covariance) @ circle
    left.plot(*ellipse, color=colours[j], lw=2.2, label=f"{model.weights[j]:.0%} of eruptions")
    left.plot(*mean, "+", color=colours[j], ms=14, mew=2.2)
left.set(xlabel="eruption (minutes)", ylabel="waiting for the next (minutes)")
left.set_title(f"{chosen} components: density, data and 2-σ ellipses", color=ink)
left.legend(loc="upper left", frameon=False)

for k in sorted(runs, reverse=True):
    colour, width = colours[k - 1], 3.5 if k == chosen else 2
    right.plot(np.asarray(runs[k].history).T, color=colour, lw=0.5, alpha=0.3)
    right.plot(fits[k].history, color=colour, lw=width, label=f"k = {k},  BIC {bic[k]:.1f}")
low, high = float(fits[1].objective), float(fits[4].objective)
right.set(xscale="log", xlim=(1, 2000), ylim=(low - 8, high + 12))
right.set(xlabel="EM steps", ylabel="log-likelihood")
right.set_title(f"{len(keys)} starts for each k, the best one bold", color=ink)
right.legend(loc=(0.62, 0.3), frameon=False)
for axes in (left, right):
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(picture, dpi=160)
print(f"\nThe picture is in {picture}.")
