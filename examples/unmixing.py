"""Three signals from three microphones: independent component analysis.

A sine, a square wave and a saw are mixed with noise of their own and unmixed again, from nothing
but the mixtures. The laws of the sources are learned with the matrix; of twenty random starts the
best is kept. Run `python examples/unmixing.py [picture.png]`.
"""

import sys

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np

import jaxem
from jaxem.emissions import ICA

matplotlib.use("Agg")
import matplotlib.pyplot as plt

time = np.linspace(0, 8, 2000)
saw = 2 * (time % 1) - 1
signals = np.column_stack([np.sin(2 * time), np.sign(np.sin(3 * time)), saw])
signals = signals / signals.std(axis=0) + 0.05 * np.random.default_rng(0).normal(size=(2000, 3))
mixing = np.array([[1.0, 1.0, 1.0], [0.5, 2.0, 1.0], [1.5, 1.0, 2.0]])
x = jnp.asarray(signals @ mixing.T, jnp.float32)

starts = jax.vmap(lambda key: ICA.init(key, x))(jax.random.split(jax.random.key(0), 20))
prior = jax.tree.map(lambda leaf: leaf[0], starts).prior(20.0)
runs = jaxem.fit_restarts(starts, x, prior=prior, max_steps=300)
gaps = np.asarray(runs.objective.max() - runs.objective)
print(f"{np.sum(gaps < 1)} of 20 starts end within 1 nat of the best")
model = jaxem.best(runs).model.standardized()
found = np.asarray(model.sources(x)[:, 0])

alike = np.corrcoef(found.T, signals.T)[:3, 3:]
order = np.argmax(np.abs(alike), axis=0)
for name, j, row in zip(("sine", "square", "saw"), order, alike.T, strict=True):
    print(f"{name:7} source {j + 1}, correlation {abs(row[j]):.4f}")
error = np.abs(np.linalg.inv(model.mixing[0]) @ mixing)
error = error / error.max(axis=1, keepdims=True)
print(f"what is left of other signals in a source: {np.sort(error, axis=1)[:, :2].max():.3f}")

if len(sys.argv) > 1:
    figure, axes = plt.subplots(3, 3, figsize=(11, 5), layout="constrained", sharex=True)
    signs = np.sign(np.take_along_axis(alike, order[None], axis=0))[0]
    columns = signals, np.asarray(x), found[:, order] * signs
    for column, title, values in zip(
        axes.T, ("signals", "what is recorded", "unmixed"), columns, strict=True
    ):
        column[0].set_title(title)
        for axis, line in zip(column, values.T, strict=True):
            axis.plot(time, line, lw=0.8)
            axis.set_yticks([])
    figure.savefig(sys.argv[1], dpi=150)
