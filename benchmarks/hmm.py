"""Hidden Markov models: `python -m benchmarks.hmm [section …]`.

Sections: gaussian, ragged, categorical, states, memory, parallel (default: all). Ten EM steps from
the same start for each contender, compilation apart. hmmlearn runs in float64, the only dtype it
has, with its default log-space recursions and with its scaled ones. Results are appended to
benchmarks/results/hmm.jsonl.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jaxem
from benchmarks._common import PEAK, interleave, main, python
from benchmarks._common import record as _record
from jaxem.latents import chain

record = functools.partial(_record, "hmm")
STEPS = 10


def sticky(k: int, stay: float = 0.9) -> np.ndarray:
    matrix = np.full((k, k), (1 - stay) / (k - 1))
    np.fill_diagonal(matrix, stay)
    return matrix.astype(np.float32)


def path(rng: np.random.Generator, matrix: np.ndarray, t: int) -> np.ndarray:
    """States of a chain, by inversion of the cumulated rows."""
    cumulated, draws = np.cumsum(matrix, axis=1), rng.random(t)
    z = np.zeros(t, int)
    for now in range(1, t):
        z[now] = min(np.searchsorted(cumulated[z[now - 1]], draws[now]), len(matrix) - 1)
    return z


def clusters(t: int, d: int, k: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A Gaussian chain in float32, its transition matrix, and means to start from."""
    rng = np.random.default_rng(seed)
    matrix, centres = sticky(k), 2 * rng.normal(size=(k, d))
    x = centres[path(rng, matrix, t)] + rng.normal(size=(t, d))
    return x.astype(np.float32), matrix, (centres + 0.3).astype(np.float32)


def gaussian_hmm(matrix: np.ndarray, means: np.ndarray) -> jaxem.HMM:
    k, d = means.shape
    eye = np.broadcast_to(np.eye(d, dtype=np.float32), (k, d, d))
    return jaxem.HMM(np.full(k, 1 / k, np.float32), matrix, jaxem.emissions.Gaussian(means, eye))


def ten_steps(data: Any) -> Any:
    return jax.jit(
        lambda model: jaxem.fit(model, data, max_steps=STEPS, tol=0.0, throw=False).objective
    )


def hmmlearn_steps(kind: str, start: dict[str, Any], x: Any, lengths: Any, **options: Any) -> Any:
    from hmmlearn import hmm  # a peer, not a dependency

    def run() -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = getattr(hmm, kind)(
                len(start["startprob_"]),
                n_iter=STEPS,
                tol=-np.inf,
                init_params="",
                **options,
            )
            for name, value in start.items():
                setattr(model, name, value.copy())
            model.fit(x, lengths)

    return run


def dynamax_steps(model: Any, params: Any, props: Any, x: jax.Array) -> Any:
    """dynamax's own e_step and m_step, compiled once: its fit_em compiles at each call."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        statistics, _ = jax.vmap(lambda one: model.e_step(params, one, None))(x)
        return model.m_step(params, props, statistics, state)

    def run() -> Any:
        now, state = params, model.initialize_m_step_state(params, props)
        for _ in range(STEPS):
            now, state = step(now, state)
        return now

    return run


def gaussian() -> None:
    from dynamax.hidden_markov_model import GaussianHMM  # a peer, not a dependency

    t, d, k = 100_000, 4, 8
    x, matrix, means = clusters(t, d, k)
    start = {
        "startprob_": np.full(k, 1 / k),
        "transmat_": matrix.astype(float) / matrix.sum(1, keepdims=True, dtype=float),
        "means_": means.astype(float),
        "covars_": np.broadcast_to(np.eye(d), (k, d, d)),
    }
    full: dict[str, Any] = {"covariance_type": "full", "covars_prior": 0}
    peer = functools.partial(
        hmmlearn_steps, "GaussianHMM", start, x.astype(float), None, params="stmc", **full
    )
    model = GaussianHMM(k, d)
    params, props = model.initialize(
        jax.random.key(0),
        initial_probs=jnp.full(k, 1 / k),
        transition_matrix=jnp.asarray(matrix),
        emission_means=jnp.asarray(means),
        emission_covariances=jnp.broadcast_to(jnp.eye(d), (k, d, d)),
    )
    ours = ten_steps(jnp.asarray(x)[None])
    first = gaussian_hmm(matrix, means)
    rows = interleave(
        {
            "jaxem": lambda: ours(first),
            "dynamax": dynamax_steps(model, params, props, jnp.asarray(x)[None]),
            "hmmlearn, default (log)": peer(),
            "hmmlearn, scaling": peer(implementation="scaling"),
        },
        runs=5,
    )
    record("gaussian", f"full, T={t} D={d} K={k}, {STEPS} EM steps, float32", rows)


def ragged() -> None:
    d, k, b = 4, 16, 1_000
    lengths = np.random.default_rng(1).integers(50, 501, b)
    x, matrix, means = clusters(int(lengths.sum()), d, k)
    start = {
        "startprob_": np.full(k, 1 / k),
        "transmat_": matrix.astype(float) / matrix.sum(1, keepdims=True, dtype=float),
        "means_": means.astype(float),
        "covars_": np.broadcast_to(np.eye(d), (k, d, d)),
    }
    peer = functools.partial(
        hmmlearn_steps,
        "GaussianHMM",
        start,
        x.astype(float),
        lengths,
        params="stmc",
        covariance_type="full",
        covars_prior=0,
    )
    ours, first = ten_steps(jaxem.Sequences.split(x, lengths)), gaussian_hmm(matrix, means)
    rows = interleave(
        {
            "jaxem": lambda: ours(first),
            "hmmlearn, default (log)": peer(),
            "hmmlearn, scaling": peer(implementation="scaling"),
        },
        runs=3,
    )
    setting = (
        f"full, {b} sequences of 50–500 steps ({lengths.sum()}), D={d} K={k}, {STEPS} EM steps"
    )
    record("ragged", setting, rows)


def categorical() -> None:
    t, m, k = 100_000, 100, 8
    rng = np.random.default_rng(0)
    matrix, symbols = sticky(k), rng.dirichlet(np.full(m, 0.3), k).astype(np.float32)
    cumulated = np.cumsum(symbols, axis=1)[path(rng, matrix, t)]
    x = np.minimum((cumulated < rng.random((t, 1))).sum(axis=1), m - 1)
    begin = 0.5 * symbols + 0.5 / m
    begin = (begin / begin.sum(1, keepdims=True)).astype(np.float32)
    start = {
        "startprob_": np.full(k, 1 / k),
        "transmat_": matrix.astype(float) / matrix.sum(1, keepdims=True, dtype=float),
        "emissionprob_": begin.astype(float) / begin.sum(1, keepdims=True, dtype=float),
    }
    emission = jaxem.emissions.Categorical(begin[:, None, :])
    first = jaxem.HMM(np.full(k, 1 / k, np.float32), matrix, emission)
    ours = ten_steps(jnp.asarray(x, jnp.int32)[None, :, None])
    peer = functools.partial(
        hmmlearn_steps, "CategoricalHMM", start, x[:, None], None, params="ste", n_features=m
    )
    rows = interleave(
        {
            "jaxem": lambda: ours(first),
            "hmmlearn, default (log)": peer(),
            "hmmlearn, scaling": peer(implementation="scaling"),
        },
        runs=5,
    )
    record("categorical", f"T={t} K={k}, {m} symbols, {STEPS} EM steps, float32", rows)


def states() -> None:
    """Forward–backward over many states against the products that it cannot do without."""
    t, k = 10_000, 256
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
    record("states", f"T={t} K={k}, float32", rows)


MEMORY = f"""
{PEAK}
import numpy as np, jax, jax.numpy as jnp, jaxem
from benchmarks.hmm import gaussian_hmm, sticky
t, d, k = 1_000_000, 4, 8
rng = np.random.default_rng(0)
x = jnp.asarray(rng.normal(size=(1, t, d)), jnp.float32)
model = gaussian_hmm(sticky(k), rng.normal(size=(k, d)).astype(np.float32))
step = jax.jit(lambda m: m.e_step(x)).lower(model).compile()
before = peak()
jax.block_until_ready(step(model))
print(peak() - before, t * k * 4 / 2**20)
"""


def memory() -> None:
    extra, one = python(MEMORY)
    rows = {"peak beyond data, MB": round(extra, 1), "arrays of T × K": round(extra / one, 1)}
    record("memory", "E-step of one chain, T=1,000,000 D=4 K=8, float32", rows)


def parallel() -> None:
    """Sequential and parallel smoothing: which is faster where, and which one is chosen."""
    for k in (2, 8, 32):
        for t in (1_000, 10_000, 100_000, 1_000_000):
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
            record("parallel", f"smoothing, T={t} K={k}, float32", rows)


SECTIONS = {
    "gaussian": gaussian,
    "ragged": ragged,
    "categorical": categorical,
    "states": states,
    "memory": memory,
    "parallel": parallel,
}

if __name__ == "__main__":
    main(SECTIONS)
