"""How fits end: what is called a fall, degenerate or converged, over families of inputs."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxem
from jaxem import Mixture
from jaxem.em import CAUSES, Gradient
from jaxem.emissions import (
    DiagonalGaussian,
    Gaussian,
    LinearRegression,
    LogisticRegression,
    PoissonRegression,
    TiedGaussian,
)
from jaxem.factors import LogisticGate

LANES = 8


def lanes(make: Any, dtype: Any) -> Any:
    """Data of each lane, stacked."""
    rng = np.random.default_rng(0)
    each = [make(rng) for _ in range(LANES)]
    return jax.tree.map(lambda *leaves: jnp.asarray(np.stack(leaves), dtype), *each)


def ends(family: Any, data: Any, num_components: int, max_steps: int = 1000) -> Any:
    def one(key: Any, x: Any) -> Any:
        start = Mixture.init(key, x, num_components, family)
        return jaxem.fit(start, x, throw=False, max_steps=max_steps)

    return jax.jit(jax.vmap(one))(
        jax.random.split(jax.random.key(0), len(jax.tree.leaves(data)[0])), data
    )


# A fall is never rounding


def _about_a_line(noise: float) -> Any:
    def make(rng: Any) -> Any:
        x = rng.normal(size=(40, 1)) + 4 * rng.integers(0, 2, (40, 1))
        return np.c_[x, 2 * x + noise * rng.normal(size=(40, 1))]

    return make


def _outlier(rng: Any) -> Any:
    x = rng.normal(size=(40, 2)) + 4 * rng.integers(0, 2, (40, 1))
    x[0] = 1e5
    return x


def _far(rng: Any) -> Any:
    return rng.normal(size=(40, 2)) + 1e6 * np.r_[0, 0, 1, 1, 1][rng.integers(0, 5, 40)][:, None]


@pytest.mark.parametrize("family", [TiedGaussian, Gaussian])
def test_rounding_is_no_fall(family):
    """Of plain EM, whose objective never falls: 6 of 7 of these fits were called `decreased`."""
    kinds = [_about_a_line(1e-4), _about_a_line(1e-6), _outlier, _far]
    data = jnp.concatenate([lanes(kind, float) for kind in kinds])
    status = ends(family, data, 3).status
    assert not np.any(status == "decreased")
    assert np.mean(status == "max_steps_reached") < 0.1


# Separation


SIGNS = jnp.linspace(-1, 1, 20, dtype=jnp.float32)[:, None]
CELL = jnp.arange(200) % 5 == 0
INPUTS = jnp.stack([jax.random.normal(jax.random.key(1), (200,)), CELL], axis=1)
BITS = jax.random.bernoulli(jax.random.key(2), jax.nn.sigmoid(4 * INPUTS[:, :1])).astype(int)
LOGISTIC = LogisticRegression([[[0.0, 0.0]]], [[0.0]])
POISSON = PoissonRegression([[[0.0, 0.0]]], [[0.0]])
REGRESSIONS = {
    "bits of both kinds everywhere": (LOGISTIC, BITS, False),
    "a rare bit": (LOGISTIC, 0 * BITS.at[7].set(1).at[10].set(1), True),
    "bits all alike in a cell": (LOGISTIC, jnp.where(CELL[:, None], 1, BITS), True),
    "bits that the sign of an input gives": (LOGISTIC, (INPUTS[:, :1] > 0).astype(int), True),
    "counts": (POISSON, BITS, False),
    "no counts in a cell": (POISSON, jnp.where(CELL[:, None], 0, BITS), True),
}


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
@pytest.mark.parametrize("name", REGRESSIONS)
def test_coefficients_that_grow_for_ever_are_told(name, dtype):
    start, y, separated = REGRESSIONS[name]
    start, u = jax.tree.map(lambda leaf: leaf.astype(dtype), (start, INPUTS))
    solution = jaxem.fit(start, (u, y))
    expected = CAUSES.separation if separated else CAUSES.none
    assert solution.cause.tolist() == [expected]
    assert solution.status == ("degenerate" if separated else "converged")


@pytest.mark.parametrize("tol", [None, 1e-2, 1e-9])
def test_a_gate_that_covariates_separate(tol):
    v = np.r_[np.linspace(-2, -1, 50), np.linspace(1, 2, 50)][:, None].astype(np.float32)
    noise = np.random.default_rng(0).normal(size=(100, 1))
    y = (np.sign(v) * 5 + 0.3 * noise).astype(np.float32)
    gate = LogisticGate([[0.0], [0.5]], [0.0, 0.0])
    start = jaxem.MixtureOfExperts(gate, Gaussian([[-4.0], [4.0]], np.ones((2, 1, 1))))
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), start)
    solution = jaxem.fit(start, (v, y), tol=tol)
    assert solution.causes.tolist() == ["separation", ""]
    assert "component 0: separation" in repr(solution)


@pytest.mark.parametrize("algorithm", [jaxem.SQUAREM(), jaxem.Anderson()])
def test_accelerated_steps_do_not_hide_it(algorithm):
    start = LogisticRegression([[[0.0]]], [[0.0]])
    solution = jaxem.fit(start, (SIGNS.astype(float), (SIGNS > 0).astype(int)), algorithm)
    assert solution.causes.tolist() == ["separation"]


# Weights that are no counts


def test_weights_are_judged_by_each_other():
    rng = np.random.default_rng(0)
    x = np.r_[rng.normal(size=(60, 2)), 5 + rng.normal(size=(60, 2))]
    start = Mixture([0.5, 0.5], Gaussian([[0.0, 0.0], [4.0, 4.0]], np.stack([np.eye(2)] * 2)))

    def fitted(weight: Any) -> Any:
        return jaxem.fit(start, x, sample_weight=weight)

    whole = fitted(np.ones(120))
    for size in (1e-6, 1 / 120, 1e6):
        solution = fitted(np.full(120, size))
        assert solution.status == "converged"
        np.testing.assert_allclose(
            solution.model.components.mean, whole.model.components.mean, atol=1e-6
        )
    two = np.where(np.arange(120) < 62, 1e-3, 0.0)
    assert fitted(two).causes.tolist() == ["", "small weights"]
    assert fitted(1e3 * two).causes.tolist() == ["", "few observations"]


# Inputs that differ by little, in float32


def _inputs(rng: Any, kind: str, size: float) -> Any:
    u = rng.normal(size=(60, 2))
    if kind == "offset":
        u = u + size
    elif kind == "two groups":
        u[:30] += size
    elif kind == "correlated":
        u[:, 1] = u[:, 0] + size * u[:, 1]
    elif kind == "outlier":
        u[0] = size
    return u


KINDS = [
    ("offset", 1e4),
    ("two groups", 1e3),
    ("two groups", 1e4),
    ("correlated", 1e-3),
    ("correlated", 1e-4),
    ("outlier", 1e4),
]


@pytest.mark.parametrize("family", [LinearRegression, LogisticRegression])
def test_columns_that_differ_by_little_are_not_frozen(family):
    """Where EM stops in float32 it gains nothing in float64."""

    def make(rng: Any) -> Any:
        each = []
        for kind, size in KINDS:
            u = _inputs(rng, kind, size)
            s = np.clip(u[:, :1] - np.median(u[:, :1]), -3, 3)
            z = rng.integers(0, 2, (60, 1))
            eta = np.where(z == 1, 2 * s, -2 * s + 1)
            bits = rng.random((60, 1)) < 1 / (1 + np.exp(-eta))
            linear = eta + 0.3 * rng.normal(size=(60, 1))
            each.append((u, linear if family is LinearRegression else bits.astype(float)))
        return jax.tree.map(lambda *leaves: np.stack(leaves), *each)

    data = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), lanes(make, jnp.float32))
    found = ends(family, data, 2, 500)
    double = jax.tree.map(lambda leaf: leaf.astype(float), (found.model, data))
    on = jax.jit(jax.vmap(lambda m, x: jaxem.fit(m, x, throw=False, max_steps=300, tol=0.0)))
    history = on(*double).history
    rise = (np.nanmax(history, axis=1) - history[:, 0]) / 60
    error = np.where(np.isfinite(found.error), found.error, 0)
    assert not np.any(found.converged & (rise > np.maximum(1e-3, 10 * error)))
    assert not np.any(found.status == "decreased")
    if family is LinearRegression:
        assert np.mean(found.converged) > 0.9


# What an optimiser sees has no units


@pytest.mark.parametrize("optimiser", [optax.adam(1e-2), optax.lbfgs()], ids=["adam", "lbfgs"])
def test_an_optimiser_sees_no_units(optimiser):
    rng = np.random.default_rng(0)
    base = np.r_[rng.normal(0, 1, (150, 2)), rng.normal(4, 1, (150, 2))]
    algorithm = jaxem.EM(maximization=Gradient(optimiser, 5))

    @jax.jit
    @jax.vmap
    def both(unit: Any) -> Any:
        x = jnp.asarray(base, jnp.float32) * unit
        mean = jnp.array([[1, 1], [2, 2]], jnp.float32) * unit
        variance = jnp.full((2, 2), 4, jnp.float32) * unit**2
        start = Mixture(jnp.array([0.5, 0.5], jnp.float32), DiagonalGaussian(mean, variance))
        found = jaxem.fit(start, x, algorithm, throw=False)
        return found, jaxem.fit(found.model, x, throw=False).objective

    found, further = both(jnp.array([1.0, 1e2, 1e4, 1e6], jnp.float32))
    assert np.all(found.converged)
    assert np.all(np.abs(further - found.objective) < 1e-3 * 300)
    assert np.ptp(np.asarray(found.num_steps)) <= 10
