"""Data that need not fit in memory: statistics add, so chunks of a file are summed one by one.

Writes a file of points, fits a mixture to it while holding one chunk at a time, then loads it whole
to show that the ordinary fit arrives at the same. Run `python examples/out_of_core.py [points]`.
"""

import pathlib
import sys
import tempfile

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxem

NUM_POINTS = int(sys.argv[1]) if len(sys.argv) > 1 else 2_000_000
CHUNK = 100_000
NUM_STEPS = 20
SHAPE = (NUM_POINTS, 2)


@eqx.filter_jit
def e_step(model, chunk):
    return model.e_step(chunk)


@eqx.filter_jit
def add(statistics, log_likelihood, chunk):
    """`+` for statistics; both operands are taken about the same model, their frame."""
    new, value = statistics.frame.e_step(chunk)
    return statistics + new, log_likelihood + value


@eqx.filter_jit
def m_step(statistics):
    return statistics.frame.m_step(statistics)


def chunks(path):
    points = np.memmap(path, np.float32, mode="r", shape=SHAPE)
    for start in range(0, len(points), CHUNK):
        yield jnp.asarray(points[start : start + CHUNK])


def e_step_of_file(model, path):
    remaining = chunks(path)
    total = e_step(model, next(remaining))
    for chunk in remaining:
        total = add(*total, chunk)
    return total


with tempfile.TemporaryDirectory() as folder:
    path = pathlib.Path(folder) / "points.f32"
    means = jnp.array([[0.0, 0.0], [4.0, 1.0], [1.0, 5.0]])
    truth = jaxem.Mixture([0.2, 0.3, 0.5], jaxem.emissions.SphericalGaussian(means, jnp.ones(3)))
    points = np.memmap(path, np.float32, mode="w+", shape=SHAPE)
    for i, start in enumerate(range(0, NUM_POINTS, CHUNK)):
        size = min(CHUNK, NUM_POINTS - start)
        points[start : start + size] = truth.sample(jax.random.key(i), size)[0]
    points.flush()
    print(f"{path.stat().st_size / 2**20:.0f} MiB on disk, {CHUNK * 8 / 2**20:.1f} MiB at a time")

    start = jaxem.Mixture.init(jax.random.key(1), next(chunks(path)), 3, jaxem.emissions.Gaussian)
    model = start
    for step in range(NUM_STEPS):
        statistics, log_likelihood = e_step_of_file(model, path)
        model = m_step(statistics)
        if step % 5 == 0:
            print(f"step {step:2d}   log-likelihood {log_likelihood:.1f}")
    print(model)

    whole = jnp.asarray(np.memmap(path, np.float32, mode="r", shape=SHAPE))
    in_memory = jaxem.fit(start, whole, tol=0.0, max_steps=NUM_STEPS).model
    gap = jnp.max(jnp.abs(in_memory.components.mean - model.components.mean))
    print(f"largest difference of a mean from the fit in memory: {gap:.1e}")
