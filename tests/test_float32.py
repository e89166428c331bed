"""Law 6: a fit in float32 agrees with the fit of the same data in float64."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, cases

import jaxem
from jaxem import Mixture
from jaxem.emissions._base import log_prob as _log_prob

KEY = jax.random.key(0)
GAUSSIANS = {
    "full": jaxem.emissions.Gaussian,
    "tied": jaxem.emissions.TiedGaussian,
    "diagonal": jaxem.emissions.DiagonalGaussian,
    "spherical": jaxem.emissions.SphericalGaussian,
    "one sphere": functools.partial(jaxem.emissions.SphericalGaussian, tied=True),
}


@eqx.filter_jit
def log_prob(components, x):
    return _log_prob(components, x)


def cast(tree, dtype):
    return jax.tree.map(
        lambda leaf: leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf, tree
    )


def spread(components):
    """Variances or covariances, whatever the family calls them."""
    full = isinstance(components, jaxem.emissions.Gaussian | jaxem.emissions.TiedGaussian)
    return components.covariance if full else components.variance


def in_both(model, data):
    """The default fit in float32, checked to be honest and pure, and the one in float64."""
    single = jaxem.fit(cast(model, jnp.float32), cast(data, jnp.float32))
    double = jaxem.fit(cast(model, jnp.float64), cast(cast(data, jnp.float32), jnp.float64))
    assert double.status == "converged"
    assert single.status == "converged"
    n = jax.tree.leaves(data)[0].shape[0]
    assert abs(float(single.objective) - float(double.objective)) / n < 1e-3
    return single, double


def assert_only_float32(tree):
    kinds = {leaf.dtype for leaf in jax.tree.leaves(tree)}
    assert jnp.dtype("float64") not in kinds
    assert jnp.dtype("float32") in kinds


def assert_gaussians_agree(single, double):
    components, exact = single.model.components, double.model.components
    np.testing.assert_allclose(components.mean, exact.mean, rtol=1e-3)
    variance, right = np.asarray(spread(components)), np.asarray(spread(exact))
    # Covariances near 0 are measured against the variances beside them.
    assert np.max(np.abs(variance - right)) < 1e-3 * np.max(np.abs(right))
    np.testing.assert_allclose(single.model.weights, double.model.weights, rtol=1e-3)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("offset", [0.0, 100.0, 1e3, 1e4])
@pytest.mark.parametrize("family", GAUSSIANS)
def test_probe(family, offset, k):
    """N(offset, 0.1²): raw second moments lose every digit at (mean/σ)² ≈ 1/eps."""
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0.0], [1.0, -1.0]])[:k]
    x = np.concatenate([offset + c + 0.1 * rng.normal(size=(1000 // k, 2)) for c in centres])
    x = jnp.asarray(x, jnp.float32)
    start = Mixture.init(KEY, x, k, GAUSSIANS[family])
    single, double = in_both(start, x)
    assert_gaussians_agree(single, double)
    if k == 1:
        right = np.cov(np.asarray(x, float).T, bias=True)
        variance = np.asarray(spread(single.model.components), float).reshape(-1)
        near = [np.mean(np.diag(right))] if variance.size == 1 else np.diag(right)
        near = right.reshape(-1) if variance.size == 4 else near
        np.testing.assert_allclose(variance, near, atol=1e-3 * right[0, 0])


@pytest.mark.parametrize("apart", [1e3, 1e4])
@pytest.mark.parametrize("family", GAUSSIANS)
def test_unit_clusters_far_apart(family, apart):
    rng = np.random.default_rng(1)
    centres = apart * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = jnp.asarray(np.concatenate([c + rng.normal(size=(400, 2)) for c in centres]), jnp.float32)
    labels = np.repeat(np.arange(3), 400)
    given = jax.nn.one_hot(labels, 3, dtype=jnp.float32)
    start = Mixture.from_responsibilities(x, given, GAUSSIANS[family])
    right = Mixture.from_responsibilities(
        x.astype(jnp.float64), given.astype(jnp.float64), GAUSSIANS[family]
    )
    variance = np.asarray(spread(right.components))
    assert np.max(np.abs(spread(start.components) - variance)) < 1e-3 * np.max(variance)
    single, double = in_both(start, x)
    gap = np.abs(np.asarray(single.model.components.mean) - double.model.components.mean)
    assert np.max(gap) < 1e-3 * apart
    variance, right = np.asarray(spread(single.model.components)), spread(double.model.components)
    assert np.max(np.abs(variance - right)) < 1e-3 * np.max(right)
    np.testing.assert_allclose(single.model.weights, double.model.weights, rtol=1e-3)


@pytest.mark.parametrize("family", ["full", "diagonal"])
def test_far_clusters_from_a_start_that_must_travel(family):
    """The objective's rounding, eps × distance, is no fall."""
    rng = np.random.default_rng(2)
    centres = 1e4 * np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    x = jnp.asarray(np.concatenate([c + rng.normal(size=(400, 2)) for c in centres]), jnp.float32)
    start = Mixture.init(KEY, x, 3, GAUSSIANS[family])
    in_both(start, x)


RATES = {
    "poisson": [1e-6, 1e-3, 1.0, 1e3, 1e6, 1e8],
    "exponential": [1e-20, 1e-6, 1.0, 1e6, 1e20],
}


@pytest.mark.parametrize("rate", RATES["poisson"])
def test_poisson(rate):
    """A feature at an extreme rate beside one that tells the components apart."""
    rng = np.random.default_rng(3)
    z = np.repeat([0, 1], 2000)
    x = np.stack([rng.poisson(rate * (1 + 2 * z)), rng.poisson(1 + 19 * z)], axis=1)
    x[:: len(x) - 1, 0] += 1  # some count of each component, however small the rate
    rates = jnp.array([[0.5 * rate, 2.0], [4 * rate, 15.0]])
    start = Mixture(jnp.full(2, 0.5), jaxem.emissions.Poisson(rates))
    single, double = in_both(start, jnp.asarray(x, float))
    np.testing.assert_allclose(
        single.model.components.rate, double.model.components.rate, rtol=1e-3
    )
    _same_log_prob(start.components, jnp.asarray(x, float))


@pytest.mark.parametrize("rate", RATES["exponential"])
def test_exponential(rate):
    rng = np.random.default_rng(4)
    x = np.concatenate([rng.exponential(1, 1000), rng.exponential(30, 1000)])[:, None] / rate
    start = Mixture(
        jnp.full(2, 0.5), jaxem.emissions.Exponential(jnp.array([[rate], [0.03 * rate]]))
    )
    single, double = in_both(start, jnp.asarray(x))
    np.testing.assert_allclose(
        single.model.components.rate, double.model.components.rate, rtol=1e-3
    )
    _same_log_prob(start.components, jnp.asarray(x))


@pytest.mark.parametrize("total", [1e3, 1e5, 1e6])
def test_multinomial_totals(total):
    """Components a standard deviation apart: what they differ by is no rounding."""
    rng = np.random.default_rng(4)
    shift = 1 / np.sqrt(total)
    p = np.array([[0.5, 0.3, 0.2], [0.5 + shift, 0.3, 0.2 - shift]])
    x = jnp.asarray(rng.multinomial(int(total), p[np.repeat([0, 1], 200)]), float)
    start = cast(Mixture(jnp.full(2, 0.5), jaxem.emissions.Multinomial(p)), jnp.float32)
    single, double = (
        jaxem.fit(cast(start, dtype), cast(x, dtype), max_steps=200)
        for dtype in (jnp.float32, jnp.float64)
    )
    assert {single.status, double.status} <= {"converged", "max_steps_reached"}
    assert abs(float(single.objective) - float(double.objective)) / len(x) < 1e-4
    _same_log_prob(start.components, x)


@pytest.mark.parametrize("p", [1e-6, 0.5, 1 - 1e-6])
def test_bernoulli(p):
    """A feature at an extreme probability beside some that tell the components apart."""
    rng = np.random.default_rng(5)
    n = 4000
    z = rng.integers(0, 2, n)
    tell = rng.random((n, 8)) < np.where(z, 0.9, 0.1)[:, None]
    edge = rng.random(n) < p
    edge[[np.argmin(z), np.argmax(z)]] ^= p != 0.5  # one exception in each component
    x = jnp.asarray(np.column_stack([tell, edge]), float)
    probability = jnp.array([[0.3] * 8 + [p], [0.7] * 8 + [p]])
    start = Mixture(jnp.full(2, 0.5), jaxem.emissions.Bernoulli(probability))
    single, double = in_both(start, x)
    for sign in (1, -1):  # the digits of p, and those of 1 − p
        fitted = jax.nn.sigmoid(sign * single.model.components.logits)
        right = jax.nn.sigmoid(sign * double.model.components.logits)
        np.testing.assert_allclose(fitted, right, rtol=1e-3)
    _same_log_prob(start.components, x)


@pytest.mark.parametrize("family", ["categorical", "multinomial"])
def test_rare_categories(family):
    rng = np.random.default_rng(6)
    n, rare = 4000, 1e-8
    p = np.array([[0.95, 0.05 - rare, rare], [0.05, 0.95 - rare, rare]])
    z = rng.integers(0, 2, n)
    first = [np.argmin(z), np.argmax(z)]  # an observation of each component has the rare category
    if family == "categorical":
        x = np.stack([(rng.random(n) > p[z, 0]).astype(int) for _ in range(8)], axis=1)
        x[first, 0] = 2
        components = jaxem.emissions.Categorical(
            jnp.broadcast_to(jnp.asarray(p)[:, None], (2, 8, 3))
        )
        data = jnp.asarray(x)
    else:
        x = np.array([rng.multinomial(20, row) for row in p[z]])
        x[first, 2] += 1
        components, data = jaxem.emissions.Multinomial(jnp.asarray(p)), jnp.asarray(x, float)
    single, double = in_both(Mixture(jnp.full(2, 0.5), components), data)
    np.testing.assert_allclose(
        single.model.components.probability,
        double.model.components.probability,
        rtol=1e-3,
        atol=1e-30,  # categories never seen are floored, at another number in each dtype
    )
    _same_log_prob(components, data)


def _same_log_prob(components, x):
    """log p to 1e-3 in float32, wherever it is of order one; relative to its size beyond."""
    single = log_prob(cast(components, jnp.float32), cast(x, jnp.float32))
    exact = cast(cast(components, jnp.float32), jnp.float64)
    double = log_prob(exact, cast(cast(x, jnp.float32), jnp.float64))
    assert single.dtype == jnp.float32
    np.testing.assert_allclose(single, double, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("name", cases("mixture"))
def test_the_density_of_every_family_keeps_its_digits(name):
    components, data = CASES[name]().model.components, CASES[name]().data
    _same_log_prob(components, data)


@pytest.mark.slow
def test_ten_million_units_lose_no_digits():
    n = 10**7
    x = jax.random.normal(KEY, (n, 1), jnp.float32) + 1000
    weights = jnp.full(2, 0.5, jnp.float32)
    components = jaxem.emissions.DiagonalGaussian(
        jnp.array([[999.5], [1000.5]], jnp.float32), jnp.ones((2, 1), jnp.float32)
    )
    statistics, value = Mixture(weights, components).e_step(x)
    # The same sums in float64, a slice at a time.
    exact = Mixture(weights.astype(float), cast(components, jnp.float64))
    e_step = jax.jit(lambda part: exact.e_step(part))
    sums, total = 0, 0.0
    for part in jnp.split(x, 20):
        part_statistics, part_value = e_step(part.astype(float))
        leaves = jax.tree.leaves(part_statistics.sums)
        sums = leaves if sums == 0 else [a + b for a, b in zip(sums, leaves, strict=True)]
        total += float(part_value)
    # Blocks are compensated; within one, √observations · eps is left. A plain sum would be off by
    # 1e-2.
    for leaf, right in zip(jax.tree.leaves(statistics.sums), sums, strict=True):
        np.testing.assert_allclose(leaf / n, right / n, atol=2e-5)
    np.testing.assert_allclose(float(value) / n, total / n, rtol=1e-6)
    np.testing.assert_allclose(float(jnp.sum(statistics.sums[0])), n, rtol=1e-6)


FAMILIES = {
    **GAUSSIANS,
    "poisson": jaxem.emissions.Poisson,
    "bernoulli": jaxem.emissions.Bernoulli,
    "categorical": functools.partial(jaxem.emissions.Categorical, num_categories=2),
    "multinomial": jaxem.emissions.Multinomial,
    "exponential": jaxem.emissions.Exponential,
    "independent": functools.partial(
        jaxem.emissions.Independent,
        families=(jaxem.emissions.Gaussian, jaxem.emissions.Exponential),
    ),
}


def _data(name):
    rng = np.random.default_rng(7)
    normal = rng.normal(size=(40, 2)) + np.where(rng.random((40, 1)) < 0.5, -2, 2)
    counts = rng.poisson(np.where(normal[:, :1] < 0, 1, 6), (40, 2))
    data = {
        "poisson": counts,
        "bernoulli": counts > 3,
        "categorical": (counts > 3).astype(np.int32),
        "multinomial": counts + 1,
        "exponential": np.abs(normal),
        "independent": (normal, np.abs(normal)),
    }.get(name, normal)
    if name == "categorical":
        return jnp.asarray(data)
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), data)


@pytest.mark.parametrize("name", FAMILIES)
def test_float32_stays_float32(name):
    """With x64 enabled nothing is promoted: start, fit, prior, weights, hard steps."""
    data = _data(name)
    sample_weight = jnp.ones(40, jnp.float32)
    for method in ("k-means++", "random"):
        start = Mixture.init(
            KEY, data, 2, FAMILIES[name], method=method, sample_weight=sample_weight
        )
        assert_only_float32(start)
    if name != "categorical":  # whose data have no floating dtype to follow
        start = Mixture.init(KEY, data, 2, FAMILIES[name])
        assert_only_float32(start)
    labels = jnp.arange(40) % 2
    assert_only_float32(
        Mixture.from_responsibilities(
            data,
            jax.nn.one_hot(labels, 2, dtype=jnp.float32),
            FAMILIES[name],
            sample_weight=sample_weight,
        )
    )
    prior = start.prior(weights=2.0)
    assert_only_float32(prior)
    for options in (
        {},
        {"sample_weight": sample_weight, "prior": prior},
        {"algorithm": jaxem.EM(jaxem.em.Hard())},
    ):
        fit = functools.partial(jaxem.fit, throw=False, max_steps=50, **options)
        solution = eqx.filter_eval_shape(fit, start, data)  # traced, not run
        assert_only_float32(solution)
        assert_only_float32(eqx.filter_eval_shape(jaxem.inference.bic, solution, data))
    for value in (start.log_prob(data), start.responsibilities(data)):
        assert_only_float32(value)


def test_kmeans_stays_float32():
    assert_only_float32(jaxem.kmeans(KEY, _data("full"), 2))
