"""Data, and models to start from, in float32."""

from __future__ import annotations

import numpy as np

import jaxem


def data(n: int, d: int, k: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit clusters, and means to start from."""
    rng = np.random.default_rng(seed)
    centres = spread * rng.normal(size=(k, d))
    x = centres[rng.integers(k, size=n)] + rng.normal(size=(n, d))
    return x.astype(np.float32), (centres + 0.3 * rng.normal(size=(k, d))).astype(np.float32)


def jaxem_mixture(kind: str, means: np.ndarray) -> jaxem.Mixture:
    k, d = means.shape
    eye, one = np.eye(d, dtype=np.float32), np.float32(1)
    components = {
        "full": lambda: jaxem.emissions.Gaussian(means, np.broadcast_to(eye, (k, d, d))),
        "tied": lambda: jaxem.emissions.TiedGaussian(means, eye),
        "diagonal": lambda: jaxem.emissions.DiagonalGaussian(means, np.ones((k, d), np.float32)),
        "spherical": lambda: jaxem.emissions.SphericalGaussian(means, np.ones(k, np.float32)),
    }[kind]()
    return jaxem.Mixture(np.full(k, one / k, np.float32), components)


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
    """A Gaussian chain, its transition matrix, and means to start from."""
    rng = np.random.default_rng(seed)
    matrix, centres = sticky(k), 2 * rng.normal(size=(k, d))
    x = centres[path(rng, matrix, t)] + rng.normal(size=(t, d))
    return x.astype(np.float32), matrix, (centres + 0.3).astype(np.float32)


def gaussian_hmm(matrix: np.ndarray, means: np.ndarray) -> jaxem.HMM:
    k, d = means.shape
    eye = np.broadcast_to(np.eye(d, dtype=np.float32), (k, d, d))
    return jaxem.HMM(np.full(k, 1 / k, np.float32), matrix, jaxem.emissions.Gaussian(means, eye))
