"""Continuous latents: `python -m benchmarks.gaussian [section …] [--tiny]`.

Sections: state_space, missing, sequences, factors, wide, mixture, ica (default: all). Ten EM steps
from one start for each contender, compilation apart; factor analysis to one log-likelihood;
independent components to one distance from the truth.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxem
from benchmarks._common import PEAK, dynamax_steps, interleave, main, pinned, python, size
from jaxem.emissions import ICA, FactorAnalysis, Gaussian, LinearRegression

STEPS, STATES, OUTPUTS = 10, 4, 8


# State space


def truth() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    turn = np.linalg.qr(rng.normal(size=(STATES, STATES)))[0]
    return {
        "dynamics": 0.95 * turn,
        "emission": rng.normal(size=(OUTPUTS, STATES)),
        "mean": np.zeros(STATES),
    }


def series(num_sequences: int, num_steps: int) -> np.ndarray:
    rng, law = np.random.default_rng(1), truth()
    z = rng.normal(size=(num_sequences, STATES))
    y = np.empty((num_sequences, num_steps, OUTPUTS), np.float32)
    for t in range(num_steps):
        noise = rng.normal(size=(num_sequences, OUTPUTS))
        y[:, t] = z @ law["emission"].T + noise
        z = z @ law["dynamics"].T + 0.5 * rng.normal(size=z.shape)
    return y


def first_model() -> jaxem.LinearGaussianSSM:
    law, one = truth(), np.float32
    return jaxem.LinearGaussianSSM(
        Gaussian(np.zeros((1, STATES), one), np.eye(STATES, dtype=one)[None]),
        LinearRegression(
            0.9 * law["dynamics"][None].astype(one),
            np.zeros((1, STATES), one),
            np.eye(STATES, dtype=one)[None],
        ),
        LinearRegression(
            law["emission"][None].astype(one),
            np.zeros((1, OUTPUTS), one),
            np.eye(OUTPUTS, dtype=one)[None],
        ),
    )


def jaxem_steps(y: Any) -> Callable[[], Any]:
    run = jax.jit(lambda m: jaxem.fit(m, y, max_steps=STEPS, tol=0.0, throw=False).objective)
    first, y = first_model(), jnp.asarray(y)
    return lambda: run(first)


def dynamax(y: np.ndarray) -> Callable[[], Any]:
    from dynamax.linear_gaussian_ssm import LinearGaussianSSM  # a peer, not a dependency

    law, model = truth(), LinearGaussianSSM(STATES, OUTPUTS)
    params, props = model.initialize(
        jax.random.key(0),
        initial_mean=jnp.zeros(STATES),
        initial_covariance=jnp.eye(STATES),
        dynamics_weights=jnp.asarray(0.9 * law["dynamics"], jnp.float32),
        dynamics_bias=jnp.zeros(STATES),
        dynamics_covariance=jnp.eye(STATES),
        emission_weights=jnp.asarray(law["emission"], jnp.float32),
        emission_bias=jnp.zeros(OUTPUTS),
        emission_covariance=jnp.eye(OUTPUTS),
    )
    return dynamax_steps(model, params, props, jnp.asarray(y), STEPS)


def pykalman_steps(y: np.ndarray) -> dict[str, Callable[[], Any]]:
    from pykalman import KalmanFilter  # a peer, not a dependency

    law = truth()

    def run() -> Any:
        model = KalmanFilter(
            0.9 * law["dynamics"],
            law["emission"],
            np.eye(STATES),
            np.eye(OUTPUTS),
            np.zeros(STATES),
            np.zeros(OUTPUTS),
            np.zeros(STATES),
            np.eye(STATES),
            em_vars="all",
        )
        return model.em(y[0].astype(float), n_iter=STEPS)

    return pinned("pykalman, float64", run)


def state_space() -> Iterator[Any]:
    y = series(1, size(1_000, 50))
    contenders = {"jaxem": jaxem_steps(y), "dynamax": dynamax(y), **pykalman_steps(y)}
    shapes = {"T": y.shape[1], "states": STATES, "outputs": OUTPUTS}
    yield f"one sequence, {STEPS} EM steps, float32", shapes, interleave(contenders, runs=5)


def missing() -> Iterator[Any]:
    y = series(1, size(1_000, 50))
    holes = np.random.default_rng(2).random(y.shape) < 0.1
    contenders = {
        "jaxem, 10 % of entries missing": jaxem_steps(np.where(holes, np.nan, y)),
        "jaxem, complete": jaxem_steps(y),
        "dynamax, complete": dynamax(y),
    }
    shapes = {"T": y.shape[1], "states": STATES, "outputs": OUTPUTS}
    yield f"missing entries, {STEPS} EM steps, float32", shapes, interleave(contenders, runs=5)


def sequences() -> Iterator[Any]:
    y = series(size(100, 5), size(1_000, 50))
    contenders = {"jaxem": jaxem_steps(y), "dynamax": dynamax(y)}
    shapes = {"B": len(y), "T": y.shape[1], "states": STATES, "outputs": OUTPUTS}
    yield f"many sequences, {STEPS} EM steps, float32", shapes, interleave(contenders, runs=5)


# Factor analysis


def loaded(n: int, d: int, q: int) -> np.ndarray:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(n, d)) * np.sqrt(rng.uniform(0.3, 1.5, d))
    return (rng.normal(size=(n, q)) @ rng.normal(size=(q, d)) + noise).astype(np.float32)


def against_sklearn(n: int, d: int, q: int) -> Iterator[Any]:
    """The time to the log-likelihood at which scikit-learn stops, less 1e-4 nats an observation."""
    from sklearn.decomposition import FactorAnalysis as Peer  # a peer, not a dependency

    x = loaded(n, d, q)
    goal = Peer(q, svd_method="randomized", random_state=0).fit(x).score(x) - 1e-4
    data, start = jnp.asarray(x), functools.partial(FactorAnalysis.init, num_factors=q)

    @jax.jit
    def run(x: jax.Array) -> Any:
        moments, weight = jaxem.emissions.compressed(x)
        first = start(jax.random.key(0), moments, sample_weight=weight)
        found = jaxem.fit(first, moments, jaxem.SQUAREM(), sample_weight=weight, throw=False)
        return found.objective / n, found.num_steps

    def peer() -> Any:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return Peer(q, svd_method="randomized", random_state=0).fit(x)

    rows = interleave({"jaxem": lambda: run(data), **pinned("scikit-learn", peer)}, runs=5)
    reached = float(run(data)[0])
    if reached < goal:
        raise RuntimeError(f"jaxem ends at {reached}, scikit-learn at {goal}")
    rows |= {"nats an observation above scikit-learn": reached - goal}
    yield "factor analysis to convergence, float32", {"N": n, "D": d, "Q": q}, rows


def factors() -> Iterator[Any]:
    yield from against_sklearn(size(20_000, 500), size(50, 10), size(5, 2))


def wide() -> Iterator[Any]:
    yield from against_sklearn(size(2_000, 100), size(2_000, 40), size(10, 2))


MIXTURE = f"""
{PEAK}
import functools, numpy as np, jax, jax.numpy as jnp, jaxem
from benchmarks._common import size
n, d, q, k = size(100_000, 1_000), 100, 5, 10
x = jnp.asarray(np.random.default_rng(0).normal(size=(n, d)), jnp.float32)
family = functools.partial(jaxem.emissions.FactorAnalysis, num_factors=q)
model = jaxem.Mixture.init(jax.random.key(0), x, k, family)
step = jax.jit(lambda m: m.e_step(x)).lower(model).compile()
before = peak()
jax.block_until_ready(step(model))
print(peak() - before, k * d * d * 4 / 2**20, n)
"""


def mixture() -> Iterator[Any]:
    extra, square, n = python(MIXTURE)
    rows = {
        "peak beyond data, MB": round(extra, 1),
        "covariances of all would be": round(square, 1),
    }
    yield "E-step of a mixture of factor analysers", {"N": int(n), "D": 100, "Q": 5, "K": 10}, rows


# Independent components


def amari(matrix: np.ndarray) -> float:
    """How far a matrix is from a scaled permutation, 0 to 1 (Amari, Cichocki & Yang 1996)."""
    square, n = np.abs(matrix), len(matrix)
    rows = np.sum(square / square.max(axis=1, keepdims=True)) - n
    columns = np.sum(square / square.max(axis=0, keepdims=True)) - n
    return (rows + columns) / (2 * n * (n - 1))


def ica() -> Iterator[Any]:
    """The time to picard's distance: as many steps, in tens, as jaxem needs to be no farther."""
    from picard import picard  # a peer, not a dependency

    n, d = size(100_000, 2_000), size(20, 4)
    rng = np.random.default_rng(0)
    halves = rng.laplace(size=(n, d // 2)), rng.uniform(-1, 1, size=(n, d - d // 2))
    sources, mixing = np.concatenate(halves, axis=1), rng.normal(size=(d, d))
    x = (sources / sources.std(axis=0) @ mixing.T).astype(np.float32)

    def peer(ortho: bool) -> np.ndarray:
        turn, unmixing, _ = picard(
            x.T, ortho=ortho, extended=True, tol=1e-6, max_iter=500, random_state=0
        )
        return unmixing @ turn

    data, start = jnp.asarray(x), ICA.init(jax.random.key(0), jnp.asarray(x))

    def run(steps: int) -> Any:
        found = jaxem.fit(start, data, tol=0.0, max_steps=steps, throw=False)
        return found.model.unmixing[0]

    goal = min(amari(peer(ortho) @ mixing) for ortho in (False, True))
    reached = ((s, amari(np.asarray(run(s)) @ mixing)) for s in range(10, 510, 10))
    steps, distance = next(pair for pair in reached if pair[1] <= goal)
    contenders = {"jaxem": functools.partial(run, steps)}
    contenders |= pinned("picard", functools.partial(peer, False))
    contenders |= pinned("picard-o", functools.partial(peer, True))
    rows = interleave(contenders, runs=3)
    rows |= {"jaxem's steps": steps, "its Amari distance": distance, "picard's": goal}
    yield "independent components, float32", {"N": n, "D": d, "parts": 3}, rows


if __name__ == "__main__":
    main("gaussian", state_space, missing, sequences, factors, wide, mixture, ica)
