"""Starts: k-means++ in the family's own deviance, random observations, responsibilities."""

import functools
import inspect

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import BITS, CASES, CODES, COUNTS, DURATIONS, POINTS, TALLIES, N

import jaxem

P = jnp.asarray(POINTS)
MIXED = functools.partial(
    jaxem.emissions.Independent,
    families=(
        jaxem.emissions.Gaussian,
        jaxem.emissions.Poisson,
        functools.partial(jaxem.emissions.Categorical, num_categories=3),
    ),
)
FAMILIES = {
    "gaussian": (jaxem.emissions.Gaussian, POINTS),
    "tied": (jaxem.emissions.TiedGaussian, POINTS),
    "diagonal": (jaxem.emissions.DiagonalGaussian, POINTS),
    "spherical-tied": (functools.partial(jaxem.emissions.SphericalGaussian, tied=True), POINTS),
    "bernoulli": (jaxem.emissions.Bernoulli, BITS),
    "categorical": (functools.partial(jaxem.emissions.Categorical, num_categories=3), CODES),
    "multinomial": (jaxem.emissions.Multinomial, TALLIES),
    "poisson": (jaxem.emissions.Poisson, COUNTS),
    "exponential": (jaxem.emissions.Exponential, DURATIONS),
    "mixed": (MIXED, (POINTS, COUNTS, CODES)),
}
# Four tight, well separated groups of very different sizes, in two dimensions.
CORNERS = np.array([[0.0, 0.0], [50.0, 0.0], [0.0, 50.0], [50.0, 50.0]])
GROUP = np.repeat(np.arange(4), [61, 20, 8, 3])
CORNERED = jnp.asarray(CORNERS[GROUP] + np.random.default_rng(2).normal(size=(92, 2)))


@pytest.mark.parametrize(
    "model",
    [jaxem.Mixture, jaxem.MixtureOfExperts, jaxem.HMM, jaxem.HSMM],
    ids=lambda m: m.__name__,
)
def test_all_starts_take_the_same_arguments(model):
    taken = inspect.signature(model.init).parameters.values()
    positional = [p.name for p in taken if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional[:2] == ["key", "data"] and positional[3:] == ["family"]
    assert positional[2] in ("num_components", "num_states")
    named = [p.name for p in taken if p.kind is p.KEYWORD_ONLY]
    assert {"sample_weight", "method"} <= set(named)


@functools.partial(jax.jit, static_argnames=("family", "k", "method"))
def starts(keys, data, family, k, sample_weight=None, method="k-means++"):
    def one(key):
        return jaxem.Mixture.init(key, data, k, family, sample_weight=sample_weight, method=method)

    return jax.vmap(one)(keys)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize(
    ("name", "method"),
    [("gaussian", "random"), ("mixed", "random"), *((name, "k-means++") for name in FAMILIES)],
)
def test_a_start_is_a_model_under_which_all_data_are_possible(name, method):
    family, data = FAMILIES[name]
    data = jax.tree.map(jnp.asarray, data)
    batch = starts(keys(3), data, family, 3, method=method)
    eager = jaxem.Mixture.init(keys(3)[1], data, 3, family, method=method)
    for ours, lanes in zip(jax.tree.leaves(eager), jax.tree.leaves(batch), strict=True):
        np.testing.assert_allclose(ours, lanes[1], rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(eager.weights, 1 / 3)
    assert np.all(np.isfinite(jax.vmap(lambda m: m.log_prob(data))(batch)))
    first = jax.tree.leaves(batch.components)[0]
    assert not np.array_equal(first[0], first[1])


def test_k_means_plus_plus_finds_groups_that_random_units_miss():
    def found(method):
        means = starts(
            keys(40), CORNERED, jaxem.emissions.SphericalGaussian, 4, method=method
        ).components.mean
        nearest = np.argmin(np.linalg.norm(means[:, :, None] - CORNERS, axis=-1), axis=-1)
        return np.mean([len(set(row)) == 4 for row in nearest])

    assert found("k-means++") > 0.95
    assert found("random") < 0.5


def test_seeds_are_units_and_distinct():
    means = starts(keys(10), P, jaxem.emissions.Gaussian, 5).components.mean
    for lane in np.asarray(means):
        rows = [int(np.flatnonzero(np.all(POINTS == mean, axis=1))[0]) for mean in lane]
        assert len(set(rows)) == 5


def test_the_scale_of_a_start_is_that_of_what_lies_around_the_seeds():
    starts4 = starts(keys(20), CORNERED, jaxem.emissions.SphericalGaussian, 4)
    scale = np.sqrt(np.median(starts4.components.variance))
    assert 0.3 < scale < 4  # the groups have 1, all data together about 20


def test_duplicates_and_data_that_are_all_equal():
    few = jnp.asarray(np.repeat([[0.0, 1.0], [5.0, 2.0]], 10, axis=0))
    means = np.asarray(starts(keys(20), few, jaxem.emissions.Gaussian, 2).components.mean)
    assert np.all(np.sort(means[:, :, 0], axis=1) == [0.0, 5.0])  # never twice the same point
    for k in (2, 4):
        for data in (few, jnp.ones((20, 2))):
            batch = starts(keys(4), data, jaxem.emissions.Gaussian, k)
            for leaf in jax.tree.leaves(batch):
                assert np.all(np.isfinite(leaf))


def test_as_many_components_as_units():
    few = P[:5]
    means = np.asarray(starts(keys(3), few, jaxem.emissions.SphericalGaussian, 5).components.mean)
    for lane in means:
        np.testing.assert_array_equal(lane[np.argsort(lane[:, 0])], few[np.argsort(few[:, 0])])


@pytest.mark.parametrize("method", ["k-means++", "random"])
@pytest.mark.parametrize("name", ["gaussian", "poisson", "mixed"])
def test_units_of_weight_zero_are_absent_whatever_they_hold(name, method):
    family, data = FAMILIES[name]
    sample_weight = jnp.ones(N).at[jnp.arange(10)].set(0)

    def spoil(leaf):
        leaf = jnp.asarray(leaf)
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else jnp.iinfo(leaf.dtype).min
        return leaf.at[:10].set(bad)

    data = jax.tree.map(jnp.asarray, data)
    batch = starts(keys(20), jax.tree.map(spoil, data), family, 3, sample_weight, method)
    clean = starts(keys(20), data, family, 3, sample_weight, method)
    for ours, theirs in zip(jax.tree.leaves(batch), jax.tree.leaves(clean), strict=True):
        assert np.all(np.isfinite(ours))
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    if name == "gaussian":
        seeds = np.asarray(batch.components.mean).reshape(-1, 2)
        present = POINTS[10:]
        assert np.all(np.any(np.all(seeds[:, None] == present, axis=2), axis=1))
        assert len(np.unique(seeds, axis=0)) > 10


@pytest.mark.parametrize("method", ["k-means++", "random"])
def test_weights_draw_the_first_seed(method):
    sample_weight = jnp.ones(N).at[7].set(1000.0 * N)
    means = np.asarray(
        starts(keys(30), P, jaxem.emissions.Gaussian, 1, sample_weight, method).components.mean
    )
    assert np.mean(np.all(means[:, 0] == POINTS[7], axis=1)) > 0.9


def test_random_seeds_without_weight_are_uniform():
    means = np.asarray(
        starts(keys(2000), P[:4], jaxem.emissions.Gaussian, 1, method="random").components.mean
    )
    counts = [np.sum(np.all(means[:, 0] == point, axis=1)) for point in POINTS[:4]]
    assert sum(counts) == 2000
    assert np.all(np.abs(np.array(counts) - 500) < 5 * np.sqrt(2000 * 3 / 16))


def test_from_responsibilities_is_the_m_step():
    model, data, *_ = CASES["gaussian"]()
    r = model.responsibilities(data)
    start = jaxem.Mixture.from_responsibilities(data, r, jaxem.emissions.Gaussian)
    step = model.m_step(model.e_step(data)[0])
    np.testing.assert_allclose(start.weights, step.weights, rtol=1e-12)
    np.testing.assert_allclose(start.components.mean, step.components.mean, rtol=1e-10)
    np.testing.assert_allclose(start.components.covariance, step.components.covariance, rtol=1e-10)


def test_labels_are_one_hot_responsibilities_and_weights_count():
    labels = np.arange(N) % 2
    w = np.linspace(0, 2, N)
    model = jaxem.Mixture.from_responsibilities(
        jnp.asarray(COUNTS),
        jax.nn.one_hot(labels, 2),
        jaxem.emissions.Poisson,
        sample_weight=jnp.asarray(w),
    )
    for j in range(2):
        own = w * (labels == j)
        np.testing.assert_allclose(model.weights[j], own.sum() / w.sum(), rtol=1e-12)
        np.testing.assert_allclose(model.components.rate[j], own @ COUNTS / own.sum(), rtol=1e-12)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda init: init(keys(1)[0], P, N + 1, jaxem.emissions.Gaussian), "cannot start"),
        (lambda init: init(keys(1)[0], P, 0, jaxem.emissions.Gaussian), "cannot start"),
        (lambda init: init(keys(1)[0], P, 2, jaxem.emissions.Gaussian, method="pca"), "k-means"),
        (lambda init: init(keys(1)[0], P, 2, "gaussian"), "family"),
        (lambda init: init(keys(1)[0], P, 2, MIXED), "tuple"),
        (lambda init: init(keys(1)[0], (P, P), 2, jaxem.emissions.Independent), "families"),
        (
            lambda init: init(keys(1)[0], jnp.asarray(COUNTS), 2, jaxem.emissions.Gaussian),
            "continuous",
        ),
        (lambda init: init(keys(1)[0], P[:, 0], 2, jaxem.emissions.Gaussian), r"x\[:, None\]"),
        (
            lambda init: init(
                keys(1)[0], P, 2, jaxem.emissions.Gaussian, sample_weight=jnp.ones(3)
            ),
            "one entry",
        ),
        (lambda init: init(keys(1)[0], P, 2, jaxem.emissions.Categorical), "integer codes"),
    ],
)
def test_errors_are_clear(call, says):
    with pytest.raises(ValueError, match=says):
        call(jaxem.Mixture.init)


def test_traced_categories_cannot_be_counted():
    with pytest.raises(ValueError, match="num_categories"):
        eqx.filter_jit(jaxem.Mixture.init)(
            keys(1)[0], jnp.asarray(CODES), 2, jaxem.emissions.Categorical
        )


def test_responsibilities_need_a_row_for_each_unit():
    with pytest.raises(ValueError, match="responsibilities"):
        jaxem.Mixture.from_responsibilities(P, jnp.ones((3, 2)), jaxem.emissions.Gaussian)
