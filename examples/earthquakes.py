"""How many regimes has a series of counts, and when did it change between them?

Stationary Poisson hidden Markov models of 1 to 4 states, each from 20 starts, compared by AIC and
BIC; then the most probable path through the states, drawn over time. The counts are the seizures
of one patient on 140 days, treated from the 28th on, or those of a file with one count a line:
the yearly numbers of major earthquakes 1900–2006 of Zucchini & MacDonald, *Hidden Markov Models
for Time Series*, say. Run `python examples/earthquakes.py [picture.png [counts.csv]]`.
"""

import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

import jaxem

jax.config.update("jax_enable_x64", True)
picture = sys.argv[1] if len(sys.argv) > 1 else "earthquakes.png"
seizures = pathlib.Path(__file__).parent / "data" / "seizure.csv"
file = sys.argv[2] if len(sys.argv) > 2 else seizures
counts = np.loadtxt(file, delimiter=",", skiprows=1, usecols=0, dtype=int)
x = jnp.asarray(counts)[None, :, None]  # one sequence of steps of one number
keys = jax.random.split(jax.random.key(0), 20)


def fit_all(k):
    def start(key):
        free = jaxem.HMM.init(key, x, k, jaxem.emissions.Poisson)
        return jaxem.HMM("stationary", free.transition, free.emission)

    return jaxem.fit_restarts(jax.vmap(start)(keys), x, tol=1e-7, max_steps=500)


print(f"{counts.size} counts, {len(keys)} starts for each number of states\n")
print("  k   log-likelihood   parameters      AIC      BIC   starts there   rates")
fits, aic, bic = {}, {}, {}
for k in range(1, 5):
    runs = fit_all(k)
    fits[k] = jaxem.best(runs)
    aic[k], bic[k] = float(jaxem.inference.aic(fits[k], x)), float(jaxem.inference.bic(fits[k], x))
    there = int(jnp.sum(runs.objective > fits[k].objective - 1e-3))
    rates = np.sort(fits[k].model.emission.rate[:, 0])
    print(
        f"{k:3d}{fits[k].log_likelihood:17.4f}{fits[k].model.num_free_parameters:13d}"
        f"{aic[k]:9.1f}{bic[k]:9.1f}{there:15d}   " + " ".join(f"{rate:.2f}" for rate in rates)
    )
chosen = min(bic, key=bic.__getitem__)
model = fits[chosen].model
print(f"\nBIC chooses {chosen} states.\n{fits[chosen]}\n")

order = np.argsort(model.emission.rate[:, 0])
rank, rate = np.argsort(order), np.asarray(model.emission.rate[:, 0])
states = rank[np.asarray(model.viterbi(x)[0][0])]  # numbered by rate
begins = np.diff(states, prepend=-1) != 0
print("state    rate   steps on the path   visits   first   last   mean count")
for j in range(chosen):
    here = np.flatnonzero(states == j)
    print(
        f"{j + 1:5d}{rate[order[j]]:8.2f}{here.size:20d}{begins[here].sum():9d}{here[0] + 1:8d}"
        f"{here[-1] + 1:7d}{counts[here].mean():13.2f}"
    )

ink, colours = "#20303c", np.array(["#0b7a75", "#c99700", "#d1603d", "#7768ae", "#8d99a6"])
figure = Figure(figsize=(12, 7), layout="constrained")
grid = figure.add_gridspec(2, 2, width_ratios=(2.4, 1), height_ratios=(1.6, 1))
over_time, certainty = figure.add_subplot(grid[0, 0]), figure.add_subplot(grid[1, 0])
criteria, times = figure.add_subplot(grid[:, 1]), np.arange(1, counts.size + 1)
over_time.vlines(times, 0, counts, color=colours[states], lw=2.2, alpha=0.75)
over_time.step(
    times, rate[order[states]], where="mid", color=ink, lw=1.6, label="rate of the state"
)
over_time.set(xlim=(0, counts.size + 1), ylim=(0, None), ylabel="count")
over_time.set_title(f"Counts, and the most probable path through {chosen} states", color=ink)
over_time.legend(frameon=False)
smoothed = np.asarray(model.responsibilities(x)[0])[:, order]
names = [f"rate {rate[j]:.1f}" for j in order]
certainty.stackplot(times, smoothed.T, step="mid", colors=colours, labels=names, alpha=0.85)
certainty.set(xlim=(0, counts.size + 1), ylim=(0, 1), xlabel="time", ylabel="P(state | all counts)")
certainty.legend(loc="lower left")
for values, name, style in ((aic, "AIC", "o--"), (bic, "BIC", "o-")):
    criteria.plot(list(values), list(values.values()), style, color=ink, label=name)
low, high = min(aic.values()), max(bic[2], bic[4])
criteria.set(xlabel="number of states", xticks=range(1, 5), ylim=(low - 10, high + 10))
criteria.set_title("AIC and BIC: less is better", color=ink)
criteria.legend(frameon=False)
for axes in (over_time, certainty, criteria):
    axes.spines[["top", "right"]].set_visible(False)
figure.savefig(picture, dpi=160)
print(f"\nThe picture is in {picture}.")
