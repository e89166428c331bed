"""Hidden Markov models: `python -m benchmarks.hmm [section …] [--tiny]`.

Sections: gaussian, ragged, categorical, states, memory, parallel (default: all). Ten EM steps from
the same start for each contender, compilation apart. hmmlearn runs in float64, the only dtype it
has, with its default log-space recursions and with its scaled ones.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxem
from benchmarks._common import PEAK, dynamax_steps, interleave, main, pinned, python, size
from benchmarks._data import clusters, gaussian_hmm, path, sticky
from jaxem.latents import chain

STEPS = 10


def ten_steps(data: Any) -> Any:
    return jax.jit(
        lambda model: jaxem.fit(model, data, max_steps=STEPS, tol=0.0, throw=False).objective
    )


def hmmlearn(
    kind: str, matrix: np.ndarray, start: dict[str, Any], x: Any, lengths: Any, **options: Any
) -> dict[str, Callable[[], Any]]:
    """hmmlearn with both of its recursions, from the same start as ours."""
    from hmmlearn import hmm  # a peer, not a dependency

    k = len(matrix)
    start = start | {
        "startprob_": np.full(k, 1 / k),
        "transmat_": matrix.astype(float) / matrix.sum(1, keepdims=True, dtype=float),
    }

    def run(implementation: str) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(hmm, kind)(
                k,
                n_iter=STEPS,
                tol=-np.inf,
                init_params="",
                implementation=implementation,
                **options,
            )
            for name, value in start.items():
                setattr(model, name, value.copy())
            model.fit(x, lengths)

    return pinned("hmmlearn", functools.partial(run, "log")) | pinned(
        "hmmlearn with scaling", functools.partial(run, "scaling")
    )


def gaussian_hmmlearn(matrix: np.ndarray, means: np.ndarray, x: Any, lengths: Any = None) -> Any:
    k, d = means.shape
    start = {"means_": means.astype(float), "covars_": np.broadcast_to(np.eye(d), (k, d, d))}
    options: dict[str, Any] = dict(params="stmc", covariance_type="full", covars_prior=0)
    return hmmlearn("GaussianHMM", matrix, start, x.astype(float), lengths, **options)


def gaussian() -> Iterator[Any]:
    from dynamax.hidden_markov_model import GaussianHMM  # a peer, not a dependency

    t, d, k = size(100_000, 2_000), 4, 8
    x, matrix, means = clusters(t, d, k)
    model = GaussianHMM(k, d)
    params, props = model.initialize(
        jax.random.key(0),
        initial_probs=jnp.full(k, 1 / k),
        transition_matrix=jnp.asarray(matrix),
        emission_means=jnp.asarray(means),
        emission_covariances=jnp.broadcast_to(jnp.eye(d), (k, d, d)),
    )
    one = jnp.asarray(x)[None]
    ours, first = ten_steps(one), gaussian_hmm(matrix, means)
    rows = interleave(
        {
            "jaxem": lambda: ours(first),
            "dynamax": dynamax_steps(model, params, props, one, STEPS),
            **gaussian_hmmlearn(matrix, means, x),
        },
        runs=5,
    )
    yield f"Gaussian, full, {STEPS} EM steps, float32", {"T": t, "D": d, "K": k}, rows


def ragged() -> Iterator[Any]:
    d, k, b = 4, 16, size(1_000, 10)
    lengths = np.random.default_rng(1).integers(50, 501, b)
    t = int(lengths.sum())
    x, matrix, means = clusters(t, d, k)
    ours, first = ten_steps(jaxem.Sequences.split(x, lengths)), gaussian_hmm(matrix, means)
    peers = gaussian_hmmlearn(matrix, means, x, lengths)
    rows = interleave({"jaxem": lambda: ours(first), **peers}, runs=3)
    setting = f"Gaussian, full, sequences of 50–500 steps, {STEPS} EM steps, float32"
    yield setting, {"B": b, "T": t, "D": d, "K": k}, rows


def categorical() -> Iterator[Any]:
    t, m, k = size(100_000, 2_000), 100, 8
    rng = np.random.default_rng(0)
    matrix, symbols = sticky(k), rng.dirichlet(np.full(m, 0.3), k).astype(np.float32)
    cumulated = np.cumsum(symbols, axis=1)[path(rng, matrix, t)]
    x = np.minimum((cumulated < rng.random((t, 1))).sum(axis=1), m - 1)
    begin = 0.5 * symbols + 0.5 / m
    begin = (begin / begin.sum(1, keepdims=True)).astype(np.float32)
    start = {"emissionprob_": begin.astype(float) / begin.sum(1, keepdims=True, dtype=float)}
    emission = jaxem.emissions.Categorical(begin[:, None, :])
    first = jaxem.HMM(np.full(k, 1 / k, np.float32), matrix, emission)
    ours = ten_steps(jnp.asarray(x, jnp.int32)[None, :, None])
    options: dict[str, Any] = dict(params="ste", n_features=m)
    peers = hmmlearn("CategoricalHMM", matrix, start, x[:, None], None, **options)
    rows = interleave({"jaxem": lambda: ours(first), **peers}, runs=5)
    yield f"categorical, {STEPS} EM steps, float32", {"T": t, "M": m, "K": k}, rows


def states() -> Iterator[Any]:
    """Forward–backward over many states against the products that it cannot do without."""
    t, k = size(10_000, 200), 256
    rng = np.random.default_rng(0)
    matrix = jnp.asarray(rng.dirichlet(np.ones(k), k), jnp.float32)
    log_b = jnp.asarray(3 * rng.normal(size=(t, k)), jnp.float32)
    initial = jnp.full(k, 1 / k, jnp.float32)

    @jax.jit
    def expectations(matrix: jax.Array, log_b: jax.Array) -> Any:
        found = chain.smoothing(initial, matrix, log_b)
        return (
            found.log_likelihood,
            found.smoothed,
            matrix * (found.before[:-1].T @ found.after[1:]),
        )

    @jax.jit
    def products(matrix: jax.Array, rows: jax.Array) -> Any:
        def step(v: jax.Array, row: jax.Array) -> Any:
            following = (v * row) @ matrix
            return following, following

        _, there = lax.scan(step, initial, rows)
        _, back = lax.scan(step, initial, rows, reverse=True)
        return there.T @ back

    rows = interleave(
        {
            "forward–backward": lambda: expectations(matrix, log_b),
            "2 T products with the matrix, 1 product": lambda: products(matrix, jnp.exp(log_b)),
        }
    )
    yield "forward–backward, float32", {"T": t, "K": k}, rows


MEMORY = f"""
{PEAK}
import numpy as np, jax, jax.numpy as jnp
from benchmarks._common import size
from benchmarks._data import gaussian_hmm, sticky
t, d, k = size(1_000_000, 10_000), 4, 8
rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(1, t, d)), jnp.float32)
model = gaussian_hmm(sticky(k), rng.normal(size=(k, d)).astype(np.float32))
step = jax.jit(lambda m: m.e_step(x)).lower(model).compile()
before = peak()
jax.block_until_ready(step(model))
print(peak() - before, t * k * 4 / 2**20, t)
"""


def memory() -> Iterator[Any]:
    extra, one, t = python(MEMORY)
    rows = {"peak beyond data, MB": round(extra, 1), "arrays of T × K": round(extra / one, 1)}
    yield "E-step of one chain, float32", {"T": int(t), "D": 4, "K": 8}, rows


def parallel() -> Iterator[Any]:
    """Sequential and parallel smoothing: which is faster where, and which one is chosen."""
    for k in (2, 8, 32):
        for t in (1_000, *size((10_000, 100_000, 1_000_000), ())):
            if t * k > 8_000_000:
                continue
            rng = np.random.default_rng(0)
            matrix = jnp.asarray(rng.dirichlet(np.ones(k), k), jnp.float32)
            log_b = jnp.asarray(3 * rng.normal(size=(t, k)), jnp.float32)
            initial = jnp.full(k, 1 / k, jnp.float32)
            runs = {
                name: jax.jit(functools.partial(chain.smoothing, parallel=choice))
                for name, choice in (("chosen", None), ("sequential", False), ("parallel", True))
            }
            rows = interleave(
                {
                    name: functools.partial(run, initial, matrix, log_b)
                    for name, run in runs.items()
                },
                runs=3,
            )
            yield "smoothing, float32", {"T": t, "K": k}, rows


if __name__ == "__main__":
    main("hmm", gaussian, ragged, categorical, states, memory, parallel)
