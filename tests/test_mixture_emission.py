"""Components that are mixtures: a mixture of mixtures is a mixture, and GMM-HMMs are hmmlearn's."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.nn import logsumexp
from models import CASES, COUNTS, FULL, MEAN, PART_RATES, POINTS, N
from test_adjoints import agree, gradient_and_difference

import jaxem
from jaxem.emissions._base import expanded_form

SHARES = np.array([[0.4, 0.6], [0.5, 0.5]])
PARTS = jaxem.emissions.Gaussian(
    np.concatenate([MEAN, MEAN[::-1] + [1.0, -0.5]]), np.concatenate([FULL, FULL])
)
NESTED = jaxem.Mixture([0.3, 0.7], jaxem.emissions.MixtureEmission(SHARES, PARTS))
FLAT = jaxem.Mixture((SHARES * [[0.3], [0.7]]).reshape(-1), PARTS)


@eqx.filter_jit
def log_prob(emission, x):
    return emission.log_prob(x, emission.tilt())


@eqx.filter_jit
def fit(model, data, **options):
    return jaxem.fit(model, data, throw=False, **options)


def flattened(model):
    """The mixture of all parts that a mixture of mixtures is."""
    shares = model.weights[:, None] * model.components.weights
    return shares.reshape(-1), model.components.components


def test_density_is_a_sum_over_parts():
    parts = log_prob(PARTS, jnp.asarray(POINTS)).reshape(N, 2, 2)
    expected = logsumexp(parts + jnp.log(SHARES), axis=2)
    np.testing.assert_allclose(
        log_prob(NESTED.components, jnp.asarray(POINTS)), expected, rtol=1e-12
    )
    np.testing.assert_allclose(NESTED.log_prob(POINTS), FLAT.log_prob(POINTS), rtol=1e-12)


def test_a_mixture_of_mixtures_takes_the_steps_of_the_flat_one():
    x = jnp.asarray(POINTS)
    nested, flat = (fit(model, x, tol=0.0, max_steps=12) for model in (NESTED, FLAT))
    np.testing.assert_allclose(nested.history, flat.history, rtol=1e-12)
    weights, parts = flattened(nested.model)
    np.testing.assert_allclose(weights, flat.model.weights, rtol=1e-10)
    np.testing.assert_allclose(parts.mean, flat.model.components.mean, rtol=1e-9)
    np.testing.assert_allclose(parts.covariance, flat.model.components.covariance, rtol=1e-8)
    assert nested.model.num_free_parameters == flat.model.num_free_parameters


def test_cheaper_form_of_the_parts_is_used():
    x = jnp.asarray(POINTS)
    safe, cheaper = expanded_form(NESTED.components)
    assert bool(safe) and cheaper.components.structure.expanded
    np.testing.assert_allclose(log_prob(cheaper, x), log_prob(NESTED.components, x), rtol=1e-10)
    assert expanded_form(CASES["mixture-emission"]().model.components) is None


def test_blocks_count_all_parts():
    from jaxem.emissions._base import width

    assert width(NESTED.components, jnp.asarray(POINTS)) == 2 * 4


# hmmlearn. Its M-step takes covariances about the means *before* the step: it agrees where either
# is frozen, and after one step once the shift of the means is taken off.

INITIAL, MATRIX = np.array([0.6, 0.4]), np.array([[0.8, 0.2], [0.3, 0.7]])
LENGTHS = [50, 60, 40]


def speech():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(150, 2)) + 3 * (np.arange(150) // 15 % 2)[:, None]
    x = x + 2 * rng.integers(0, 2, (150, 1)) * np.array([1, -1.0])
    mean = rng.normal(size=(2, 2, 2)) + np.array([0, 3.0])[:, None, None]
    scale = np.array([[1.0, 1.2], [1.3, 1.5]])
    return x, mean, scale[:, :, None, None] * np.array([[1.0, 0.2], [0.2, 1.0]])


def hmmlearns(kind, params, num_steps):
    hmm = pytest.importorskip("hmmlearn.hmm")
    x, mean, covariance = speech()
    peer = hmm.GMMHMM(
        2, 2, covariance_type=kind, init_params="", params=params, n_iter=num_steps, tol=-np.inf
    )
    peer.startprob_, peer.transmat_ = INITIAL.copy(), MATRIX.copy()
    peer.weights_, peer.means_, peer.n_features = SHARES.copy(), mean.copy(), 2
    diagonal = np.einsum("kmdd->kmd", covariance)
    peer.covars_ = covariance.copy() if kind == "full" else diagonal.copy()
    return peer.fit(x, LENGTHS) if num_steps else peer


def ours(kind):
    x, mean, covariance = speech()
    mean, covariance = mean.reshape(4, 2), covariance.reshape(4, 2, 2)
    parts = {
        "full": lambda: jaxem.emissions.Gaussian(mean, covariance),
        "diag": lambda: jaxem.emissions.DiagonalGaussian(mean, np.einsum("kdd->kd", covariance)),
    }[kind]()
    model = jaxem.HMM(INITIAL, MATRIX, jaxem.emissions.MixtureEmission(SHARES, parts))
    return model, jaxem.Sequences.split(x, LENGTHS)


SPREAD = {"full": "covariance", "diag": "variance"}


def compare(model, peer, kind, about=0.0):
    emission = model.emission
    shape = getattr(emission.components, SPREAD[kind]).shape
    for mine, theirs in [
        (model.initial, peer.startprob_),
        (model.transition.matrix, peer.transmat_),
        (emission.weights, peer.weights_),
        (emission.components.mean, peer.means_.reshape(4, 2)),
        (getattr(emission.components, SPREAD[kind]), peer.covars_.reshape(shape) - about),
    ]:
        np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize("kind", SPREAD)
def test_gmm_hmm_is_hmmlearns(kind):
    model, data = ours(kind)
    x, mean, _ = speech()
    start = hmmlearns(kind, "", 0)
    np.testing.assert_allclose(model.log_prob(data).sum(), start.score(x, LENGTHS), atol=1e-8)
    for name, params in (("mean", "stcw"), (SPREAD[kind], "stmw")):
        frozen = jaxem.freeze(model, f"emission.components.{name}")
        solution = fit(frozen, data, tol=0.0, max_steps=8)
        peer = hmmlearns(kind, params, 8)
        compare(solution.model, peer, kind)
        np.testing.assert_allclose(solution.log_likelihood, peer.score(x, LENGTHS), atol=1e-8)
    peer = hmmlearns(kind, "stmcw", 1)
    shift = (peer.means_ - mean).reshape(4, 2)
    about = shift[:, :, None] * shift[:, None, :] if kind == "full" else shift**2
    compare(fit(model, data, tol=0.0, max_steps=1).model, peer, kind, about)


def test_gmm_hmm_climbs():
    model, data = ours("diag")
    solution = fit(model, data, max_steps=300)
    assert solution.result == jaxem.RESULTS.converged
    assert np.all(np.diff(solution.history[: solution.num_steps + 1]) > -1e-9)


# Derivatives


def test_implicit_gradient_of_a_gmm_hmm():
    model, _ = ours("diag")
    x = jnp.asarray(speech()[0].reshape(10, 15, 2))
    rng = np.random.default_rng(1)
    shift, pull = rng.normal(size=x.shape), rng.normal(size=10)
    prior = model.prior(
        initial=2.0,
        transition=model.transition.prior(2.0),
        emission=model.emission.prior(
            2.0, model.emission.components.prior({"mean": 1.0, "variance": 4.0})
        ),
    )

    def value(t):
        solution = jaxem.fit(
            model,
            x + t[0] * shift,
            sample_weight=1 + t[1] * pull,
            prior=prior,
            tol=1e-13,
            max_steps=5000,
        )
        emission = solution.model.emission
        seen = (emission.weights, emission.components.mean, emission.components.variance)
        return sum(jnp.sum(jnp.cos(leaf)) for leaf in seen) + 0.1 * solution.objective

    zero = jnp.zeros(2)
    agree(*gradient_and_difference(value, zero), 1e-6)


def test_no_nan_where_no_part_of_a_component_is_possible():
    parts = jaxem.emissions.SphericalGaussian(
        [[0.0], [1.0], [2.0], [3.0]], [1e-300, 1e-300, 1.0, 1.0]
    )
    model = jaxem.Mixture([0.5, 0.5], jaxem.emissions.MixtureEmission(SHARES, parts))
    x = jnp.asarray([[1e10], [2.0]])
    assert log_prob(model.components, x)[0, 0] == -jnp.inf
    gradient = eqx.filter_jit(jax.grad(lambda m: m.log_prob(x).sum()))(model)
    for leaf in jax.tree.leaves(gradient.components._weights):
        assert jnp.all(jnp.isfinite(leaf))


# What is frozen, priors, draws, degenerate parts


def test_parameters_of_parts_are_held_by_name():
    x = jnp.asarray(POINTS)
    model = jaxem.freeze(NESTED, "components.components.mean", mask=[True, False, False, True])
    model = jaxem.freeze(model, "components.weights", mask=[True, False])
    moved = fit(model, x, tol=0.0, max_steps=3).model.components
    start = NESTED.components
    kept = np.asarray(moved.components.mean) == np.asarray(start.components.mean)
    np.testing.assert_array_equal(kept.all(axis=1), [True, False, False, True])
    np.testing.assert_array_equal(moved.weights[0], start.weights[0])
    assert np.all(np.abs(moved.weights[1] - start.weights[1]) > 1e-4)
    assert model.num_free_parameters == NESTED.num_free_parameters - 4 - 1
    with pytest.raises(ValueError, match="mask"):
        jaxem.freeze(NESTED, "components.components.mean", mask=[True, False])


def test_prior_of_shares_and_parts():
    x, c = jnp.asarray(COUNTS), CASES["mixture-emission"]().model
    rates = c.components.components.prior(0.5, rate=2.0)
    prior = c.prior(components=c.components.prior(4.0, rates))
    state = eqx.filter_jit(jaxem.EM().init)(c, x)
    shares, parts = state.statistics.sums[1]
    counts = shares.counts[:, 0]
    new = eqx.filter_jit(lambda s: s.frame.m_step(s))(state.statistics + prior).components
    expected = (counts + 2.0) / jnp.sum(counts + 2.0, axis=1, keepdims=True)
    np.testing.assert_allclose(new.weights, expected, rtol=1e-12)
    rate = (parts.total * np.sqrt(PART_RATES) + 1.0) / (parts.count + 0.5)
    np.testing.assert_allclose(new.components.rate, rate, rtol=1e-12)
    for leaf in jax.tree.leaves(c.components.prior().sums):
        np.testing.assert_array_equal(leaf, 0)
    with pytest.raises(ValueError, match="negative"):
        c.components.prior(-0.5)


def test_draws_come_from_the_parts():
    z = jnp.arange(40_000) % 2
    x = np.asarray(eqx.filter_jit(NESTED.components.sample)(jax.random.key(0), z))
    for j in range(2):
        draws = x[np.asarray(z) == j]
        mean = SHARES[j] @ np.asarray(PARTS.mean[2 * j : 2 * j + 2])
        np.testing.assert_allclose(draws.mean(0), mean, atol=0.06)


def test_an_empty_part_makes_its_component_degenerate():
    c = NESTED.components
    x = jnp.asarray(POINTS)
    empty = eqx.tree_at(
        lambda m: m.components._weights.logits, NESTED, c._weights.logits.at[1, 0, 0].set(-800.0)
    )
    for model, flags in ((NESTED, [False, False]), (empty, [False, True])):
        sums = eqx.filter_jit(model.e_step)(x)[0].sums[1]
        found = eqx.filter_jit(c.degenerate)(sums)
        assert np.asarray(found).tolist() == flags
    moved = eqx.filter_jit(c.m_step)(eqx.filter_jit(empty.e_step)(x)[0].sums[1])
    np.testing.assert_allclose(moved.components.mean[2], c.components.mean[2], rtol=1e-12)


# Starts


@pytest.mark.parametrize(
    ("family", "k"),
    [
        (jaxem.emissions.Gaussian, 2),
        (jaxem.emissions.TiedGaussian, 1),
        (functools.partial(jaxem.emissions.DiagonalGaussian, tied=True), 2),
        (jaxem.emissions.Poisson, 1),
    ],
)
def test_starts_have_parts_that_differ(family, k):
    data = jnp.asarray(COUNTS if family is jaxem.emissions.Poisson else POINTS)
    nested = functools.partial(jaxem.emissions.MixtureEmission, family=family, num_parts=3)
    model = jaxem.Mixture.init(jax.random.key(1), data, k, nested)
    c = model.components
    assert (c.num_components, c.components.num_components) == (k, 3 * k)
    fitted = fit(model, data, max_steps=40).model.components
    assert jax.tree.map(jnp.shape, fitted) == jax.tree.map(jnp.shape, c)
    parts = np.asarray(jax.tree.leaves(c.components)[0]).reshape(k, 3, -1)
    gaps = np.abs(parts[:, :, None] - parts[:, None]).max(-1) + np.eye(3)
    assert np.all(gaps > 1e-3)
    one = jaxem.Mixture.init(jax.random.key(0), data, 1, family)
    assert fit(model, data, max_steps=40).objective > fit(one, data, max_steps=2).objective + 1
    located = c.located_at(data[:4], jnp.array(0.5)).components
    assert len(np.unique(np.asarray(jax.tree.leaves(located)[0]), axis=0)) == 12


def test_seeds_are_grouped_by_nearness():
    """Three pairs of clusters, the pairs far apart: each component gets both of a pair."""
    rng = np.random.default_rng(2)
    centres = np.array([[0.0, 0], [5, 0], [100, 0], [105, 0], [0, 100], [5, 100]])
    x = jnp.asarray(np.concatenate([c + 0.1 * rng.normal(size=(20, 2)) for c in centres]))
    nested = functools.partial(
        jaxem.emissions.MixtureEmission, family=jaxem.emissions.SphericalGaussian, num_parts=2
    )
    for seed in range(4):
        parts = jaxem.Mixture.init(jax.random.key(seed), x, 3, nested).components.components
        pairs = np.asarray(parts.mean).reshape(3, 2, 2)
        np.testing.assert_allclose(np.linalg.norm(pairs[:, 0] - pairs[:, 1], axis=1), 5, atol=0.6)
    with pytest.raises(ValueError, match="3 × 2 parts"):
        jaxem.Mixture.init(jax.random.key(0), x[:5], 3, nested)


def test_restarts_of_a_gmm_hmm():
    _, data = ours("full")
    nested = functools.partial(
        jaxem.emissions.MixtureEmission, family=jaxem.emissions.SphericalGaussian, num_parts=2
    )
    keys = jax.random.split(jax.random.key(0), 3)
    starts = jax.vmap(lambda key: jaxem.HMM.init(key, data, 2, nested))(keys)
    best = jaxem.best(jaxem.fit_restarts(starts, data, max_steps=60))
    plain = fit(
        jaxem.HMM.init(keys[0], data, 2, jaxem.emissions.SphericalGaussian), data, max_steps=60
    )
    assert best.objective > plain.objective + 5


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: jaxem.emissions.MixtureEmission(
                [[0.5, 0.6]], jaxem.emissions.Poisson([[1.0], [2.0]])
            ),
            "sum to 1",
        ),
        (
            lambda: jaxem.emissions.MixtureEmission(
                [0.5, 0.5], jaxem.emissions.Poisson([[1.0], [2.0]])
            ),
            "weights",
        ),
        (
            lambda: jaxem.emissions.MixtureEmission([[0.5, 0.5]], jaxem.emissions.Poisson([[1.0]])),
            "need 2 parts",
        ),
        (
            lambda: jaxem.Mixture.init(
                jax.random.key(0), jnp.asarray(COUNTS), 2, jaxem.emissions.MixtureEmission
            ),
            "needs the family",
        ),
    ],
)
def test_what_is_no_mixture_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
