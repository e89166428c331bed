"""Mixtures side by side with their peers: `python -m benchmarks.mixtures [section …]`.

Sections: covariances, restarts, kmeans, memory, startup (default: all). Every contender gets the
same data, dtype, start and number of iterations in the same process; runs are interleaved, each
right after an untimed one, and medians and median ratios quoted; the first call (with compilation)
is timed apart. scikit-learn gets whichever number of BLAS threads is faster here. Results are
appended to benchmarks/results/mixtures.jsonl.
"""

from __future__ import annotations

import functools
import os
import statistics
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from threadpoolctl import threadpool_limits

import jaxem
from benchmarks._common import PEAK, data, interleave, jaxem_mixture, main, python, seconds
from benchmarks._common import record as _record
from jaxem.emissions._base import expanded_form

record = functools.partial(_record, "mixtures")
N, D, K, STEPS = 200_000, 16, 16, 10


def best_threads(run: Callable[[], Any]) -> int:
    """The number of BLAS threads, 1 or all, with which a peer runs faster here."""

    def with_threads(threads: int) -> float:
        with threadpool_limits(threads):
            return min(seconds(run) for _ in range(2))

    return min((1, os.cpu_count() or 1), key=with_threads)


def limited(threads: int, run: Callable[[], Any]) -> Callable[[], Any]:
    def inner() -> Any:
        with threadpool_limits(threads):
            return run()

    return inner


# Covariance types


def gemms(x: jax.Array, width: int) -> Callable[[], Any]:
    """Only the two matrix products of a full-covariance E-step, block by block."""
    block = 4_000
    matrix = jnp.asarray(np.random.default_rng(1).normal(size=(width, x.shape[1])), x.dtype)

    @jax.jit
    def run(x, matrix):
        def step(_, matrix):
            def one(total, i):
                rows = jax.lax.dynamic_slice_in_dim(x, i * block, block)
                white = jnp.matmul(matrix, rows.T, precision="highest")
                return total + jnp.matmul(white, rows, precision="highest"), None

            blocks = jnp.arange(x.shape[0] // block)
            total, _ = jax.lax.scan(one, jnp.zeros_like(matrix), blocks)
            return matrix + 1e-12 * total

        return jax.lax.fori_loop(0, STEPS + 1, step, matrix)

    return lambda: run(x, matrix)


def sklearn_mixture(kind: str, x: np.ndarray, means: np.ndarray) -> Callable[[], Any]:
    from sklearn.mixture import GaussianMixture

    k, d = means.shape
    precisions = {
        "full": np.broadcast_to(np.eye(d, dtype=x.dtype), (k, d, d)),
        "tied": np.eye(d, dtype=x.dtype),
        "diag": np.ones((k, d), x.dtype),
        "spherical": np.ones(k, x.dtype),
    }[kind]

    def run():
        return GaussianMixture(
            k,
            covariance_type=kind,
            tol=0,
            max_iter=STEPS,
            reg_covar=0,
            weights_init=np.full(k, 1 / k, x.dtype),
            means_init=means,
            precisions_init=precisions,
        ).fit(x)

    return run


def gmmx_mixture(kind: str, x: np.ndarray, means: np.ndarray) -> Callable[[], Any]:
    from gmmx import EMFitter, GaussianMixtureModelJax

    k, d = means.shape
    covariances = {
        "full": np.broadcast_to(np.eye(d, dtype=x.dtype), (k, d, d)),
        "diag": np.ones((k, d), x.dtype),
    }[kind]
    model = GaussianMixtureModelJax.from_squeezed(
        means=means,
        covariances=covariances,
        weights=np.full(k, 1 / k, x.dtype),
        covariance_type=kind,
    )
    fitter = EMFitter(max_iter=STEPS, tol=-1.0, reg_covar=0.0)
    xj = jnp.asarray(x)
    return lambda: fitter.fit(xj, model).log_likelihood


def pomegranate_mixture(kind: str, x: np.ndarray, means: np.ndarray) -> Callable[[], Any]:
    import torch
    from pomegranate.distributions import Normal
    from pomegranate.gmm import GeneralMixtureModel

    k, d = means.shape
    xt = torch.from_numpy(x)

    def run():
        covariance = torch.eye(d) if kind == "full" else torch.ones(d)
        parts = [
            Normal(torch.from_numpy(m.copy()), covariance.clone(), covariance_type=kind)
            for m in means
        ]
        weights = torch.full((k,), 1 / k)
        return GeneralMixtureModel(parts, priors=weights, max_iter=STEPS, tol=-np.inf).fit(xt)

    return run


def fixed_steps(model: jaxem.Mixture, x: jax.Array, algorithm: Any = jaxem.EM()) -> Any:
    return jaxem.fit(model, x, algorithm, tol=0.0, max_steps=STEPS, throw=False)


def covariances() -> None:
    for kind in ("full", "tied", "diag", "spherical"):
        # Spread 3: the expanded form is safe. Spread 300: it is not, and residuals are used.
        for spread in (3.0,) if kind == "full" else (3.0, 300.0):
            x, means = data(N, D, K, spread)
            xj, model = jnp.asarray(x), jaxem_mixture(kind, means)
            sklearn = sklearn_mixture(kind, x, means)
            threads = best_threads(sklearn)
            contenders = {
                "jaxem": functools.partial(fixed_steps, model, xj),
                f"scikit-learn ({threads} BLAS threads)": limited(threads, sklearn),
            }
            if kind == "full":
                contenders["its two GEMMs alone"] = gemms(xj, K * D)
            if kind in ("full", "diag"):
                contenders["gmmx"] = gmmx_mixture(kind, x, means)
                contenders["pomegranate"] = pomegranate_mixture(kind, x, means)
            ours = fixed_steps(model, xj)
            peer = sklearn()
            shortcut = expanded_form(ours.model.components)
            form = "residual" if shortcut is None or not bool(shortcut[0]) else "expanded"
            gap = abs(float(ours.log_likelihood) / N - peer.score(x))
            results: dict[str, Any] = {
                "form": form,
                "|log-likelihood per observation − peer's|": gap,
            }
            results |= interleave(contenders, runs=5 if kind == "full" else 7)
            setting = f"{kind}, N={N} D={D} K={K} spread {spread:g}, float32, {STEPS} steps"
            record("covariances", setting, results)


# Restarts


def restarts() -> None:
    n, d, k, lanes, steps = 2_000, 2, 4, 100, 200
    x, _ = data(n, d, k, 2.0)
    xj = jnp.asarray(x)
    keys = jax.random.split(jax.random.key(0), lanes)
    models = jax.vmap(lambda key: jaxem.Mixture.init(key, xj, k, jaxem.emissions.Gaussian))(keys)
    options: Any = dict(tol=0.0, max_steps=steps)
    one = jax.jit(lambda m: jaxem.fit(m, xj, throw=False, **options))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], models) for i in range(lanes)]
    plain = jax.jit(jax.vmap(lambda m: jaxem.fit(m, xj, throw=False, **options)))

    from sklearn.mixture import GaussianMixture

    def sklearn():
        for i in range(10):  # a tenth of the lanes; times are scaled up below
            weights, components = each[i].weights, each[i].components
            GaussianMixture(
                k,
                tol=0,
                max_iter=steps,
                reg_covar=0,
                weights_init=np.asarray(weights, np.float64),
                means_init=np.asarray(components.mean),
                precisions_init=np.linalg.inv(np.asarray(components.covariance, np.float64)),
            ).fit(x)

    threads = best_threads(sklearn)
    results = interleave(
        {
            "jaxem.fit_restarts": lambda: jaxem.fit_restarts(models, xj, **options),
            "one after another, 100 × jit(fit)": lambda: [one(m) for m in each],
            "jax.vmap(fit)": lambda: plain(models),
            f"scikit-learn, 10 lanes ({threads} BLAS threads)": limited(threads, sklearn),
        },
        runs=5,
    )
    peer = results[f"scikit-learn, 10 lanes ({threads} BLAS threads)"]
    results["scikit-learn per restart / ours"] = round(10 * peer["times_ours"], 1)
    record("restarts", f"{lanes} × {steps} steps, N={n} D={d} K={k}, float32", results)


# k-means


def kmeans() -> None:
    from sklearn.cluster import KMeans

    x, _ = data(N, D, K, 1.0)
    start = x[:K].copy()
    xj = jnp.asarray(x)
    spheres = jaxem.emissions.SphericalGaussian(start, np.float32(1))
    model = jaxem.Mixture(np.full(K, 1 / K, np.float32), spheres)
    model = jaxem.freeze(model, "weights", "components.variance")
    inertia = jax.jit(jaxem._kmeans.inertia)

    def ours():
        solution = fixed_steps(model, xj, jaxem.EM(jaxem.em.Hard()))
        return solution, inertia(solution.model.components.mean, xj, None)

    def sklearn():
        return KMeans(K, init=start, n_init=1, max_iter=STEPS, tol=0, algorithm="lloyd").fit(x)

    threads = best_threads(sklearn)
    peer = sklearn()
    wide = np.asarray(ours()[0].model.components.mean, np.float64)
    exact = min_squares(x.astype(np.float64), wide)
    results: dict[str, Any] = {
        "iterations of the peer": int(peer.n_iter_),
        "|inertia / float64's − 1|": abs(float(ours()[1]) / exact - 1),
        "largest gap between centroids": float(np.abs(wide - peer.cluster_centers_).max()),
    }
    results |= interleave(
        {"jaxem": ours, f"scikit-learn lloyd ({threads} threads)": limited(threads, sklearn)}, 15
    )
    record("kmeans", f"Lloyd, N={N} D={D} K={K}, float32, {STEPS} steps", results)


def min_squares(x: np.ndarray, centres: np.ndarray) -> float:
    return sum(
        float(((rows[:, None] - centres) ** 2).sum(-1).min(1).sum())
        for rows in np.array_split(x, 50)
    )


# Memory and start-up, each in a process of its own

MEMORY = f"""
{PEAK}
import numpy as np, jax, jax.numpy as jnp, jaxem
n, d, k = 2_000_000, 16, 64
rng = np.random.default_rng(0)
x = np.empty((n, d), np.float32)
for rows in np.array_split(np.arange(n), 40):
    x[rows] = rng.normal(size=(len(rows), d))
means = x[:k].copy()
eye = np.broadcast_to(np.eye(d, dtype=np.float32), (k, d, d))
xj = jax.block_until_ready(jnp.asarray(x))
del x
model = jaxem.Mixture(np.full(k, 1 / k, np.float32), jaxem.emissions.Gaussian(means, eye))
small = jax.block_until_ready(jaxem.fit(model, xj[:4096], max_steps=1, tol=0.0, throw=False))
before = peak()
jax.block_until_ready(jaxem.fit(model, xj, max_steps=2, tol=0.0, throw=False))
print(peak() - before, before)
"""

IMPORT = """
import time; t = time.perf_counter(); import jax, equinox; a = time.perf_counter(); import jaxem
from jaxem.emissions._base import expanded_form
print(time.perf_counter() - a, a - t)
"""


def memory() -> None:
    extra, before = python(MEMORY)
    rows = {"peak beyond the data, MB": round(extra, 1), "before the fit, MB": round(before, 1)}
    record("memory", "full, N=2,000,000 D=16 K=64, float32", rows)


def startup() -> None:
    imports = [python(IMPORT) for _ in range(5)]
    x, means = data(20_000, 8, 8, 3.0)
    model, xj = jaxem_mixture("full", means), jnp.asarray(x)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kwargs: compiled.append(event) if "backend_compile" in event else None
    )
    jax.block_until_ready(fixed_steps(model, xj))
    once = len(compiled)
    jax.block_until_ready(fixed_steps(model, xj + 1))
    jax.block_until_ready(jaxem.fit(model, xj, tol=1e-3, max_steps=STEPS, throw=False))
    rows = {
        "import jaxem beyond jax and equinox, s": round(
            statistics.median(i[0] for i in imports), 3
        ),
        "programs compiled by the first fit": once,
        "programs compiled by two more": len(compiled) - once - 1,  # less the one of `x + 1`
    }
    record("startup", "import and compilation", rows)


SECTIONS = {
    "covariances": covariances,
    "restarts": restarts,
    "kmeans": kmeans,
    "memory": memory,
    "startup": startup,
}

if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main(SECTIONS)
