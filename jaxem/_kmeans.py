"""k-means as hard EM: a mixture of spheres whose weights and one scale are frozen.

With equal weights and one variance the hard E-step assigns each observation to the nearest
centroid, and the M-step moves each centroid to the mean of its observations: Lloyd's algorithm.
"""

from __future__ import annotations

import functools
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxem._core.blocks import sum_over_observations
from jaxem._core.checks import (
    check_count,
    check_observations,
    check_values,
    checked_key,
    num_features,
    or_absent,
)
from jaxem._core.compilation import filter_jit
from jaxem._core.conversion import as_arrays
from jaxem._core.freezing import freeze
from jaxem._core.numerics import finite
from jaxem._core.printing import numbers
from jaxem.em._em import EM
from jaxem.em._restarts import fit_restarts
from jaxem.em._solution import Solution, lane_order
from jaxem.emissions import SphericalGaussian
from jaxem.latents import Hard
from jaxem.models import Mixture


class KMeans(eqx.Module):
    """Clusters found by `kmeans`.

    - `centroids` (k, d).
    - `inertia`: Σ w ‖x − nearest centroid‖², from the residuals themselves.
    - `sizes` (k,): weight of the observations of each cluster.
    - `empty` (k,): clusters without any.
    - `solution`: how the best start ended; its model predicts.
    """

    centroids: Float[Array, "k d"]
    inertia: Float[Array, ""]
    sizes: Float[Array, " k"]
    empty: Bool[Array, " k"]
    solution: Solution

    def __repr__(self) -> str:
        ended = repr(self.solution).splitlines()[0].removeprefix("Solution: ")
        return (
            f"KMeans: {ended}\n  centroids={numbers(self.centroids, 12)}\n"
            f"  sizes={numbers(self.sizes, 8)}\n  inertia={numbers(self.inertia, 10)}"
        )

    def predict(self, x: Float[Array, "n d"]) -> Int[Array, " n"]:
        """The nearest centroid of each observation."""
        return self.solution.model.predict(x)


def kmeans(
    key: Array,
    x: Float[Array, "n d"],
    num_clusters: int,
    *,
    sample_weight: Float[Array, " n"] | None = None,
    num_restarts: int = 10,
    tol: float | None = None,
    max_steps: int = 300,
) -> KMeans:
    """k-means clustering: the best of several greedy k-means++ starts.

    **Arguments:** as for `fit`; the key draws the starts. A start that ends with an empty cluster
    counts as degenerate and is returned only if every start does.

    **Raises:** `ValueError` for wrong shapes or dtypes, more clusters than observations, or an
    observation that is not finite; under `jit`, where that is not known, `solution.result` says it.

    Lloyd (1982), IEEE Trans. Inf. Theory 28; Arthur & Vassilvitskii (2007), SODA.
    """
    x, sample_weight = as_arrays(x), as_arrays(sample_weight)
    check_observations(x, num_features(x), "kmeans")
    check_count("num_clusters", num_clusters)
    check_count("num_restarts", num_restarts)
    checked_key(key)
    models, sound = _starts(key, x, int(num_clusters), sample_weight, int(num_restarts))
    check_values(
        sound,
        "kmeans: the data hold a NaN or an infinity; give such observations weight 0, or remove "
        "them.",
    )
    runs = fit_restarts(
        models, x, EM(Hard()), sample_weight=sample_weight, tol=tol, max_steps=max_steps
    )
    return _best(runs, x, sample_weight)


@filter_jit(optimized=False)
def _starts(
    key: Array, x: Array, num_clusters: int, sample_weight: Array | None, num_restarts: int
) -> tuple[Mixture, Bool[Array, ""]]:
    """The starts, and whether all observations that count are finite."""
    spheres: Any = SphericalGaussian  # to a type checker, a partial of it would be a call
    family = functools.partial(spheres, tied=True)

    def start(start_key: Array) -> Mixture:
        model = Mixture.init(start_key, x, num_clusters, family, sample_weight=sample_weight)
        return freeze(model, "weights", "components.variance")

    models = jax.vmap(start)(jax.random.split(key, num_restarts))
    return models, jnp.all(or_absent(finite(x), sample_weight))


@filter_jit(optimized=False)
def _best(runs: Solution, x: Array, sample_weight: Array | None) -> KMeans:
    # Starts differ in the scale they hold, which is no part of k-means: compare inertias.
    centroids = runs.model.components.mean
    inertias = jax.lax.map(lambda lane: inertia(lane, x, sample_weight), centroids)
    winner = lane_order(eqx.tree_at(lambda s: s.objective, runs, -inertias))[0]
    solution = jax.tree.map(lambda leaf: leaf[winner], runs)
    sizes, _ = solution.statistics.sums
    return KMeans(solution.model.components.mean, inertias[winner], sizes, sizes <= 0, solution)


def inertia(
    centroids: Float[Array, "k d"], x: Float[Array, "n d"], sample_weight: Float[Array, " n"] | None
) -> Float[Array, ""]:
    """Σ w ‖x − nearest centroid‖², from residuals, without cancellation."""

    def block(part: Array, w: Array | None, _: None) -> Array:
        gaps = part.T[None] - centroids[:, :, None]
        nearest = jnp.min(jnp.sum(gaps * gaps, axis=1), axis=0)
        return jnp.sum(nearest if w is None else jnp.where(w != 0, w * nearest, 0))

    return sum_over_observations(block, x, sample_weight, width=centroids.size)
