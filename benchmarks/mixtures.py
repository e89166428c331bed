"""Mixtures side by side with their peers: `python -m benchmarks.mixtures [section …] [--tiny]`.

Sections: covariances, restarts, kmeans, memory, startup (default: all). Every contender gets the
same data, dtype, start and number of iterations in the same process; runs are interleaved, each
right after an untimed one, and medians and median ratios quoted; the first call (with compilation)
is timed apart. Peers outside JAX get whichever number of threads is faster here. Clusters are
"close", 3 standard deviations apart, where densities are two matrix products, or "far", 300 apart,
where those would cancel.
"""

from __future__ import annotations

import functools
import statistics
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jaxem
from benchmarks._common import PEAK, interleave, main, pinned, python, size
from benchmarks._data import data, jaxem_mixture
from jaxem._kmeans import inertia

N, D, K, STEPS = size(200_000, 4_000), 16, 16, 10
SHAPES = {"N": N, "D": D, "K": K}


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


SHORT = {"diagonal": "diag"}  # what peers call it


def sklearn_mixture(kind: str, x: np.ndarray, means: np.ndarray) -> Callable[[], Any]:
    from sklearn.mixture import GaussianMixture

    k, d = means.shape
    precisions = {
        "full": np.broadcast_to(np.eye(d, dtype=x.dtype), (k, d, d)),
        "tied": np.eye(d, dtype=x.dtype),
        "diagonal": np.ones((k, d), x.dtype),
        "spherical": np.ones(k, x.dtype),
    }[kind]

    def run():
        return GaussianMixture(
            k,
            covariance_type=SHORT.get(kind, kind),
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
        "diagonal": np.ones((k, d), x.dtype),
    }[kind]
    model = GaussianMixtureModelJax.from_squeezed(
        means=means,
        covariances=covariances,
        weights=np.full(k, 1 / k, x.dtype),
        covariance_type=SHORT.get(kind, kind),
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
            Normal(
                torch.from_numpy(m.copy()),
                covariance.clone(),
                covariance_type=SHORT.get(kind, kind),
            )
            for m in means
        ]
        weights = torch.full((k,), 1 / k)
        return GeneralMixtureModel(parts, priors=weights, max_iter=STEPS, tol=-np.inf).fit(xt)

    return run


def fixed_steps(model: jaxem.Mixture, x: jax.Array, algorithm: Any = jaxem.EM()) -> Any:
    return jaxem.fit(model, x, algorithm, tol=0.0, max_steps=STEPS, throw=False)


def covariances() -> Iterator[Any]:
    for kind in ("full", "tied", "diagonal", "spherical"):
        for distance, spread in (("close", 3.0), ("far", 300.0)):
            x, means = data(N, D, K, spread)
            xj, model = jnp.asarray(x), jaxem_mixture(kind, means)
            sklearn = sklearn_mixture(kind, x, means)
            contenders = {"jaxem": functools.partial(fixed_steps, model, xj)}
            contenders |= pinned("scikit-learn", sklearn)
            if kind in ("full", "diagonal"):
                contenders["gmmx"] = gmmx_mixture(kind, x, means)
                contenders |= pinned("pomegranate", pomegranate_mixture(kind, x, means))
            if kind == "full":
                contenders["two matrix products alone"] = gemms(xj, K * D)
            rows = interleave(contenders, runs=5 if kind == "full" else 7)
            ours = float(fixed_steps(model, xj).log_likelihood) / N
            rows["|log-likelihood per observation − peer's|"] = abs(ours - sklearn().score(x))
            yield f"{kind}, {distance} clusters, {STEPS} steps, float32", SHAPES, rows


# Restarts


def restarts() -> Iterator[Any]:
    n, d, k, lanes, steps = 2_000, 2, 4, size(100, 10), size(200, 20)
    x, _ = data(n, d, k, 2.0)
    xj = jnp.asarray(x)
    keys = jax.random.split(jax.random.key(0), lanes)
    models = jax.vmap(lambda key: jaxem.Mixture.init(key, xj, k, jaxem.emissions.Gaussian))(keys)
    options: Any = dict(tol=0.0, max_steps=steps)
    one = jax.jit(lambda m: jaxem.fit(m, xj, throw=False, **options))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], models) for i in range(lanes)]
    plain = jax.jit(jax.vmap(lambda m: jaxem.fit(m, xj, throw=False, **options)))

    from sklearn.mixture import GaussianMixture

    tenth = lanes // 10

    def sklearn():
        for i in range(tenth):
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

    rows = interleave(
        {
            "jaxem.fit_restarts": lambda: jaxem.fit_restarts(models, xj, **options),
            "one after another, jit(fit)": lambda: [one(m) for m in each],
            "jax.vmap(fit)": lambda: plain(models),
            **pinned("scikit-learn, a tenth of them", sklearn),
        },
        runs=5,
    )
    peer = next(row for name, row in rows.items() if name.startswith("scikit-learn"))
    rows["scikit-learn per restart / ours"] = lanes / tenth * peer["ratio"]
    yield f"{lanes} × {steps} steps, full, float32", {"N": n, "D": d, "K": k}, rows


# k-means


def kmeans() -> Iterator[Any]:
    from sklearn.cluster import KMeans

    x, _ = data(N, D, K, 1.0)
    start = x[:K].copy()
    xj = jnp.asarray(x)
    spheres = jaxem.emissions.SphericalGaussian(start, np.float32(1))
    model = jaxem.Mixture(np.full(K, 1 / K, np.float32), spheres)
    model = jaxem.freeze(model, "weights", "components.variance")
    cost = jax.jit(inertia)

    def ours():
        solution = fixed_steps(model, xj, jaxem.EM(jaxem.em.Hard()))
        return solution, cost(solution.model.components.mean, xj, None)

    def sklearn():
        return KMeans(K, init=start, n_init=1, max_iter=STEPS, tol=0, algorithm="lloyd").fit(x)

    peer = sklearn()
    wide = np.asarray(ours()[0].model.components.mean, np.float64)
    exact = min_squares(x.astype(np.float64), wide)
    rows = interleave({"jaxem": ours, **pinned("scikit-learn", sklearn)}, 15)
    rows |= {
        "iterations of the peer": int(peer.n_iter_),
        "|inertia / float64's − 1|": abs(float(ours()[1]) / exact - 1),
        "largest gap between centroids": float(np.abs(wide - peer.cluster_centers_).max()),
    }
    yield f"Lloyd, {STEPS} steps, float32", SHAPES, rows


def min_squares(x: np.ndarray, centres: np.ndarray) -> float:
    return sum(
        float(((rows[:, None] - centres) ** 2).sum(-1).min(1).sum())
        for rows in np.array_split(x, 50)
    )


# Memory and start-up, each in a process of its own

MEMORY = f"""
{PEAK}
import numpy as np, jax, jax.numpy as jnp, jaxem
from benchmarks._common import size
from benchmarks._data import jaxem_mixture
n, d, k = size(2_000_000, 20_000), 16, 64
rng = np.random.default_rng(0)
x = np.empty((n, d), np.float32)
for rows in np.array_split(np.arange(n), 40):
    x[rows] = rng.normal(size=(len(rows), d))
model = jaxem_mixture("full", x[:k].copy())
xj = jax.block_until_ready(jnp.asarray(x))
del x
small = jax.block_until_ready(jaxem.fit(model, xj[:4096], max_steps=1, tol=0.0, throw=False))
before = peak()
jax.block_until_ready(jaxem.fit(model, xj, max_steps=2, tol=0.0, throw=False))
print(peak() - before, before, n)
"""

IMPORT = """
import time; t = time.perf_counter(); import jax, equinox; a = time.perf_counter(); import jaxem
print(time.perf_counter() - a, a - t)
"""


def memory() -> Iterator[Any]:
    extra, before, n = python(MEMORY)
    rows = {"peak beyond the data, MB": round(extra, 1), "before the fit, MB": round(before, 1)}
    yield "full, float32", {"N": int(n), "D": 16, "K": 64}, rows


def startup() -> Iterator[Any]:
    imports = [python(IMPORT) for _ in range(size(5, 1))]
    n = size(20_000, 2_000)
    x, means = data(n, 8, 8, 3.0)
    model, xj = jaxem_mixture("full", means), jnp.asarray(x)
    other = jax.block_until_ready(xj + 1)
    compiled: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, _, **kwargs: compiled.append(event) if "backend_compile" in event else None
    )
    jax.block_until_ready(fixed_steps(model, xj))
    once = len(compiled)
    jax.block_until_ready(fixed_steps(model, other))
    jax.block_until_ready(jaxem.fit(model, xj, tol=1e-3, max_steps=STEPS, throw=False))
    rows = {
        "import jaxem beyond jax and equinox, s": statistics.median(i[0] for i in imports),
        "programs compiled by the first fit": once,
        "programs compiled by two more": len(compiled) - once,
    }
    yield "import and compilation", {"N": n, "D": 8, "K": 8}, rows


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main("mixtures", covariances, restarts, kmeans, memory, startup)
