"""Each family by itself: density, weighted maximum likelihood, prior, sampling, degeneracy."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import BITS, CASES, CODES, COUNTS, DURATIONS, MEAN, POINTS, TALLIES, N, cases
from scipy import stats

import jaxem
from jaxem.em import CAUSES
from jaxem.emissions._base import expanded_form
from jaxem.emissions._base import log_prob as _log_prob

W = np.linspace(0.2, 2.0, N)
TOTAL = W.sum()
AVERAGE = W @ POINTS / TOTAL
RESIDUAL = POINTS - AVERAGE
SCATTER = (W[:, None] * RESIDUAL).T @ RESIDUAL / TOTAL


@eqx.filter_jit
def log_prob(emission, x):
    return _log_prob(emission, x)


@eqx.filter_jit
def refit(model, data, sample_weight):
    return model.m_step(model.e_step(data, sample_weight)[0])


@eqx.filter_jit
def expected(emission, sums):
    return emission.expected_log_prob(sums)


@eqx.filter_jit
def degenerate(emission, sums):
    return emission.degenerate(sums) != CAUSES.none


@eqx.filter_jit
def maximum(emission, statistics):
    return emission.m_step(statistics.at(emission).sums)


# Densities


def density(name, c, x, j):
    """log p(x | z = j) by SciPy, with the categories by hand."""
    match name:
        case "gaussian":
            return stats.multivariate_normal.logpdf(x, c.mean[j], c.covariance[j])
        case "tied":
            return stats.multivariate_normal.logpdf(x, c.mean[j], c.covariance)
        case "diagonal":
            return stats.norm.logpdf(x, c.mean[j], np.sqrt(c.variance[j])).sum(1)
        case "spherical":
            return stats.norm.logpdf(x, c.mean[j], np.sqrt(c.variance[j])).sum(1)
        case "diagonal-tied" | "spherical-tied":
            return stats.norm.logpdf(x, c.mean[j], np.sqrt(c.variance)).sum(1)
        case "bernoulli":
            return stats.bernoulli.logpmf(x, c.probability[j]).sum(1)
        case "categorical":
            p = np.asarray(c.probability[j])
            return np.log(p[np.arange(p.shape[0]), np.asarray(x)]).sum(1)
        case "multinomial":
            p = np.asarray(c.probability[j], float)
            return stats.multinomial.logpmf(x, np.asarray(x).sum(1), p / p.sum())
        case "poisson":
            return stats.poisson.logpmf(x, c.rate[j]).sum(1)
        case "exponential":
            return stats.expon.logpdf(x, scale=1 / c.rate[j]).sum(1)
        case "independent":
            return density("spherical", c.parts[0], x[0], j) + density(
                "poisson", c.parts[1], x[1], j
            )


@pytest.mark.parametrize("name", cases("closed"))
def test_log_prob_is_scipys(name):
    model, data, *_ = CASES[name]()
    by_scipy = np.stack([density(name, model.components, data, j) for j in range(2)], axis=1)
    np.testing.assert_allclose(log_prob(model.components, data), by_scipy, rtol=1e-11, atol=1e-11)
    mixture = np.logaddexp(*(by_scipy + np.log(np.asarray(model.weights))).T)
    np.testing.assert_allclose(model.log_prob(data), mixture, rtol=1e-11)


@pytest.mark.parametrize("rate", [1e-6, 0.3, 14.0, 1e6])
def test_poisson_density_at_extreme_rates(rate):
    x = np.unique(stats.poisson.ppf([1e-9, 0.2, 0.5, 0.9, 1 - 1e-9], rate)).astype(int)
    x = np.r_[x, np.zeros(5 - len(x), int)][:, None]
    ours = log_prob(jaxem.emissions.Poisson([[rate]]), jnp.asarray(x))
    np.testing.assert_allclose(ours, stats.poisson.logpmf(x, rate), rtol=1e-9, atol=1e-9)


# Maximum likelihood on one component


def one(emission, data):
    """One step from any start is the weighted maximum: with one component z is known."""
    model = jaxem.Mixture([1.0], emission)
    return refit(model, jax.tree.map(jnp.asarray, data), jnp.asarray(W)).components


ORIGIN = np.zeros((1, 2))
LIKELIEST = {
    "gaussian": (jaxem.emissions.Gaussian(ORIGIN, np.eye(2)[None]), POINTS, (AVERAGE, SCATTER)),
    "tied": (jaxem.emissions.TiedGaussian(ORIGIN, np.eye(2)), POINTS, (AVERAGE, SCATTER)),
    "diagonal": (
        jaxem.emissions.DiagonalGaussian(ORIGIN, np.ones((1, 2))),
        POINTS,
        (AVERAGE, np.diag(SCATTER)),
    ),
    "spherical": (
        jaxem.emissions.SphericalGaussian(ORIGIN, np.ones(1)),
        POINTS,
        (AVERAGE, np.trace(SCATTER) / 2),
    ),
    "bernoulli": (jaxem.emissions.Bernoulli(np.full((1, 3), 0.5)), BITS, (W @ BITS / TOTAL,)),
    "categorical": (
        jaxem.emissions.Categorical(np.full((1, 2, 3), 1 / 3)),
        CODES,
        (np.stack([[W @ (CODES[:, d] == j) for j in range(3)] for d in range(2)]) / TOTAL,),
    ),
    "multinomial": (
        jaxem.emissions.Multinomial(np.full((1, 3), 1 / 3)),
        TALLIES,
        (W @ TALLIES / (W @ TALLIES).sum(),),
    ),
    "poisson": (jaxem.emissions.Poisson(np.ones((1, 2))), COUNTS, (W @ COUNTS / TOTAL,)),
    "exponential": (
        jaxem.emissions.Exponential(np.ones((1, 2))),
        DURATIONS,
        (TOTAL / (W @ DURATIONS),),
    ),
}


@pytest.mark.parametrize("name", LIKELIEST)
def test_weighted_maximum_likelihood(name):
    emission, data, closed_form = LIKELIEST[name]
    fitted = one(emission, data)
    for parameter, value in zip(emission.parameters, closed_form, strict=True):
        got = np.asarray(getattr(fitted, parameter)).reshape(np.shape(value))
        np.testing.assert_allclose(got, value, rtol=1e-11, atol=1e-12)


def test_tied_scales_pool_the_scatter_within_components():
    labels = np.arange(N) % 2
    r = jax.nn.one_hot(labels, 2)
    within = [POINTS[labels == j] - POINTS[labels == j].mean(0) for j in range(2)]
    scatter = sum(part.T @ part for part in within) / N

    def fitted(family):
        return jaxem.Mixture.from_responsibilities(jnp.asarray(POINTS), r, family).components

    diagonal = functools.partial(jaxem.emissions.DiagonalGaussian, tied=True)
    spherical = functools.partial(jaxem.emissions.SphericalGaussian, tied=True)
    np.testing.assert_allclose(fitted(jaxem.emissions.TiedGaussian).covariance, scatter, rtol=1e-11)
    np.testing.assert_allclose(fitted(diagonal).variance, np.diag(scatter), rtol=1e-11)
    np.testing.assert_allclose(fitted(spherical).variance, np.trace(scatter) / 2, rtol=1e-11)


# Priors


def modes(name, c, x):
    """The posterior mode by the textbook formula, for one component and its weights."""
    n = len(jax.tree.leaves(x)[0])
    if name in ("gaussian", "tied", "diagonal", "spherical"):
        kappa, m, mean = 1.5, np.array([0.5, 1.0]), x.mean(0)
        posterior_mean = (kappa * m + n * mean) / (kappa + n)
        s = (x - mean).T @ (x - mean) + kappa * n / (kappa + n) * np.outer(mean - m, mean - m)
    match name:
        case "gaussian" | "tied":  # N(μ; m, Σ/κ₀) IW(Σ; ν₀, Ψ): mode (Ψ + S) / (ν₀ + d + 2 + n)
            nu, psi = 7.0 - 2 - 2, 7.0 * np.array([[1.0, 0.2], [0.2, 0.8]])
            count = nu + 2 + 2 + n
            return posterior_mean, (psi + s) / count
        case "diagonal":  # N(μ; m, σ²/κ₀) IG(σ²; α, β): mode (2β + S) / (2α + 3 + n)
            alpha, beta = (6.0 - 3) / 2, 6.0 * 0.8 / 2
            return posterior_mean, (2 * beta + np.diag(s)) / (2 * alpha + 3 + n)
        case "spherical":
            return posterior_mean, (6.0 * 0.8 + np.trace(s)) / (6.0 + 2 * n)
        case "bernoulli":
            return ((x.sum(0) + 2.0 - 1) / (n + 2.0 + 1.5 - 2),)
        case "categorical":
            counts = np.stack([np.bincount(x[:, d], minlength=3) for d in range(2)])
            return ((counts + 0.5) / (n + 1.5),)
        case "multinomial":
            return ((x.sum(0) + 1) / (x.sum() + 3),)
        case "poisson":
            return ((x.sum(0) + 2.0 - 1) / (n + 0.5),)
        case "exponential":
            return ((n + 3.0 - 1) / (x.sum(0) + 2.0),)


PRIORS = {
    "gaussian": dict(
        count={"mean": 1.5, "covariance": 7.0}, mean=[0.5, 1.0], covariance=[[1.0, 0.2], [0.2, 0.8]]
    ),
    "diagonal": dict(count={"mean": 1.5, "variance": 6.0}, mean=[0.5, 1.0], variance=0.8),
    "bernoulli": dict(count=1.5, probability=2 / 3),  # Beta(2, 1.5)
    "categorical": dict(count=1.5, probability=1 / 3),  # Dirichlet(1.5, 1.5, 1.5)
    "multinomial": dict(count=3.0, probability=1 / 3),  # Dirichlet(2, 2, 2)
    "poisson": dict(count=0.5, rate=2.0),  # Gamma(2, 0.5)
    "exponential": dict(count=2.0, rate=1.0),  # Gamma(3, 2)
}
# One component: what a sphere counts is every feature
PRIORS["tied"] = PRIORS["gaussian"]
PRIORS["spherical"] = PRIORS["diagonal"] | dict(count={"mean": 1.5, "variance": 3.0})


@pytest.mark.parametrize("name", PRIORS)
def test_the_m_step_with_a_prior_is_the_posterior_mode(name):
    emission, data, _ = LIKELIEST[name]
    model = jaxem.Mixture([1.0], emission)
    prior = model.prior(components=emission.prior(**PRIORS[name]))
    statistics, _ = eqx.filter_jit(model.e_step)(jnp.asarray(data))
    fitted = eqx.filter_jit(lambda m, s: m.m_step(s))(model, statistics + prior).components
    for parameter, value in zip(emission.parameters, modes(name, emission, data), strict=True):
        got = np.asarray(getattr(fitted, parameter)).reshape(np.shape(value))
        np.testing.assert_allclose(got, value, rtol=1e-11)


def log_prior(name, c):
    """The density that the docstring of `prior` names, by SciPy, up to a constant."""
    match name:
        case "gaussian" | "tied":
            covariance = np.reshape(c.covariance, (2, 2))
            psi = 7.0 * np.array([[1.0, 0.2], [0.2, 0.8]])
            mean = stats.multivariate_normal.logpdf(c.mean[0], [0.5, 1.0], covariance / 1.5)
            return mean + stats.invwishart.logpdf(covariance, 7.0 - 2 - 2, psi)
        case "diagonal":
            variance = np.asarray(c.variance[0])
            mean = stats.norm.logpdf(c.mean[0], [0.5, 1.0], np.sqrt(variance / 1.5))
            return (mean + stats.invgamma.logpdf(variance, (6.0 - 3) / 2, scale=6 * 0.8 / 2)).sum()
        case "bernoulli":
            return stats.beta.logpdf(c.probability, 2.0, 1.5).sum()
        case "categorical":
            rows = np.asarray(c.probability[0])
            return sum(stats.dirichlet.logpdf(p / p.sum(), np.full(3, 1.5)) for p in rows)
        case "multinomial":
            p = np.asarray(c.probability[0])
            return stats.dirichlet.logpdf(p / p.sum(), np.full(3, 2.0))
        case "poisson":
            return stats.gamma.logpdf(c.rate, 2.0, scale=1 / 0.5).sum()
        case "exponential":
            return stats.gamma.logpdf(c.rate, 3.0, scale=1 / 2.0).sum()


@pytest.mark.parametrize("name", sorted(set(PRIORS) - {"spherical"}))
def test_a_prior_is_the_density_that_its_docstring_names(name):
    emission, data, _ = LIKELIEST[name]
    other = one(emission, data)
    prior = emission.prior(**PRIORS[name])

    def ours(c):
        return expected(c, prior.at(c).sums)

    by_scipy = log_prior(name, other) - log_prior(name, emission)
    np.testing.assert_allclose(ours(other) - ours(emission), by_scipy, rtol=1e-10)


@pytest.mark.parametrize("name", PRIORS)
def test_a_flat_prior_changes_nothing(name):
    emission, _, _ = LIKELIEST[name]
    for leaf in jax.tree.leaves(emission.prior().sums):
        np.testing.assert_array_equal(leaf, 0)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("gaussian", dict(count={"mean": -1.0})),
        ("gaussian", dict(count={"covariance": -1.0})),
        ("gaussian", dict(count={"covariance": 1.0}, covariance=-np.eye(2))),
        ("gaussian", dict(count={"mean": 1.0}, mean=[1.0, 2.0, 3.0])),
        ("diagonal", dict(count={"variance": -1.0})),
        ("diagonal", dict(count={"variance": 1.0}, variance=0.0)),
        ("bernoulli", dict(count=-0.5)),
        ("bernoulli", dict(count=0.5, probability=-1.0)),  # Beta(0.5, 2)
        ("bernoulli", dict(count=0.5, probability=2.0)),  # Beta(2, 0.5)
        ("categorical", dict(count=-1.5, probability=1 / 3)),  # Dirichlet(0.5, 0.5, 0.5)
        ("categorical", dict(count=1.0, probability=0.5)),
        ("multinomial", dict(count=-1.5, probability=1 / 3)),
        ("multinomial", dict(count=1.0, probability=0.5)),
        ("poisson", dict(count=0.5, rate=-1.0)),  # Gamma(0.5, 0.5)
        ("poisson", dict(count=-0.5)),
        ("exponential", dict(count=-0.5)),
        ("exponential", dict(count=1.0, rate=-0.5)),
    ],
)
def test_priors_that_no_data_could_have_made_are_refused(name, arguments):
    with pytest.raises(ValueError):
        LIKELIEST[name][0].prior(**arguments)


def test_prior_of_the_weights_is_a_dirichlet():
    model = CASES["poisson"]().model
    prior = model.prior(weights=jnp.array([2.0, 1.0]))
    other = jaxem.Mixture([0.7, 0.3], model.components)
    rise = other.expected_log_prob(prior) - model.expected_log_prob(prior)
    by_scipy = stats.dirichlet.logpdf([0.7, 0.3], [3.0, 2.0]) - stats.dirichlet.logpdf(
        [0.4, 0.6], [3.0, 2.0]
    )
    np.testing.assert_allclose(rise, by_scipy, rtol=1e-12)
    with pytest.raises(ValueError, match="negative"):
        model.prior(weights=-0.5)


# Sampling


def moments(name, c):
    """Mean and variance of each feature, component by component."""
    match name:
        case "gaussian":
            return c.mean, jnp.diagonal(c.covariance, axis1=1, axis2=2)
        case "tied":
            return c.mean, jnp.broadcast_to(jnp.diagonal(c.covariance), c.mean.shape)
        case "spherical":
            return c.mean, jnp.broadcast_to(c.variance[:, None], c.mean.shape)
        case "diagonal" | "diagonal-tied" | "spherical-tied":
            return c.mean, jnp.broadcast_to(c.variance, c.mean.shape)
        case "bernoulli" | "multinomial":
            return c.probability, c.probability * (1 - c.probability)
        case "categorical":
            values = jnp.arange(c.probability.shape[-1])
            mean = c.probability @ values
            return mean, c.probability @ values**2 - mean**2
        case "poisson":
            return c.rate, c.rate
        case "exponential":
            return 1 / c.rate, 1 / c.rate**2


@pytest.mark.parametrize("name", [name for name in cases("closed") if name != "independent"])
def test_samples_have_the_moments(name):
    c = CASES[name]().model.components
    n = 20_000
    z = jnp.arange(2 * n) // n
    x = np.asarray(eqx.filter_jit(c.sample)(jax.random.key(1), z), float)
    c.check(eqx.filter_jit(c.sample)(jax.random.key(1), z))
    assert np.all(c.in_support(eqx.filter_jit(c.sample)(jax.random.key(1), z)))
    mean, variance = moments(name, c)
    for j in range(2):
        draws = x[j * n : (j + 1) * n]
        deviation = np.sqrt(np.asarray(variance[j]))
        np.testing.assert_array_less(np.abs(draws.mean(0) - mean[j]), 5 * deviation / np.sqrt(n))
        fourth = ((draws - draws.mean(0)) ** 4).mean(0)
        slack = 5 * np.sqrt(fourth / n)
        np.testing.assert_array_less(np.abs(draws.var(0) - variance[j]), slack + 1e-12)


def test_a_full_gaussian_samples_its_correlations():
    c = CASES["gaussian"]().model.components
    x = c.sample(jax.random.key(2), jnp.zeros(20_000, int))
    np.testing.assert_allclose(np.cov(np.asarray(x).T), c.covariance[0], atol=0.05)


def test_a_mixture_samples_components_by_weight_and_says_which():
    model, data, *_ = CASES["independent"]()
    x, z = eqx.filter_jit(model.sample)(jax.random.key(0), 10_000)
    assert jax.tree.structure(x) == jax.tree.structure(data)
    share = np.mean(np.asarray(z) == 1)
    assert abs(share - 0.6) < 5 * np.sqrt(0.24 / 10_000)
    of_one = np.asarray(x[1])[np.asarray(z) == 1].mean(0)
    np.testing.assert_allclose(of_one, model.components.parts[1].rate[1], rtol=0.05)


# Parameters


FREE = {
    "gaussian": 2 * 2 + 2 * 3,
    "tied": 2 * 2 + 3,
    "diagonal": 2 * 2 + 2 * 2,
    "diagonal-tied": 2 * 2 + 2,
    "spherical": 2 * 2 + 2,
    "spherical-tied": 2 * 2 + 1,
    "bernoulli": 2 * 3,
    "categorical": 2 * 2 * 2,
    "multinomial": 2 * 2,
    "poisson": 2 * 2,
    "exponential": 2 * 2,
    "independent": 2 * 2 + 2 + 2 * 2,
}


@pytest.mark.parametrize("name", cases("closed"))
def test_number_of_free_parameters(name):
    model = CASES[name]().model
    assert (expanded_form(model.components) is not None) == (name in cases("expanded"))
    assert model.components.num_free_parameters == FREE[name]
    assert model.num_free_parameters == FREE[name] + 1
    assert jaxem.freeze(model, "weights").num_free_parameters == FREE[name]


@pytest.mark.parametrize("name", [name for name in cases("closed") if name != "independent"])
def test_constructors_take_what_properties_give(name):
    c = CASES[name]().model.components
    again = type(c)(*(getattr(c, parameter) for parameter in c.parameters))
    assert jax.tree.structure(again) == jax.tree.structure(c)
    for left, right in zip(jax.tree.leaves(again), jax.tree.leaves(c), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-12, atol=1e-14)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6),
    st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=2),
)
def test_gaussian_covariances_round_trip(numbers, diagonal):
    factor = np.array([[diagonal[0], 0.0], [numbers[4], diagonal[1]]])
    covariance = factor @ factor.T
    if np.linalg.cond(covariance) > 1e12:
        return
    c = jaxem.emissions.TiedGaussian(np.reshape(numbers[:4], (2, 2)), covariance)
    np.testing.assert_array_equal(c.mean, np.reshape(numbers[:4], (2, 2)))
    np.testing.assert_allclose(c.covariance, covariance, rtol=1e-12, atol=1e-12 * covariance.max())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(1e-12, 1 - 1e-12), min_size=3, max_size=3), st.floats(0, 1e8))
def test_probabilities_and_rates_round_trip(probabilities, rate):
    np.testing.assert_allclose(
        jaxem.emissions.Bernoulli([probabilities]).probability[0], probabilities, rtol=1e-10
    )
    np.testing.assert_allclose(
        jaxem.emissions.Poisson([[rate]]).rate, [[rate]], rtol=1e-12, atol=1e-300
    )


@pytest.mark.parametrize(
    "build",
    [
        lambda: jaxem.emissions.Gaussian(MEAN, np.eye(2)),
        lambda: jaxem.emissions.Gaussian(MEAN, -np.ones((2, 2, 2))),
        lambda: jaxem.emissions.Gaussian(MEAN[0], np.eye(2)[None]),
        lambda: jaxem.emissions.Gaussian(MEAN * np.nan, np.stack([np.eye(2)] * 2)),
        lambda: jaxem.emissions.TiedGaussian(MEAN, np.ones((2, 2, 2))),
        lambda: jaxem.emissions.DiagonalGaussian(MEAN, [[1.0, 0.0], [1.0, 1.0]]),
        lambda: jaxem.emissions.SphericalGaussian(MEAN, [1.0, -1.0]),
        lambda: jaxem.emissions.SphericalGaussian(MEAN, [1.0, 1.0, 1.0]),
        lambda: jaxem.emissions.Bernoulli([[1.2]]),
        lambda: jaxem.emissions.Categorical([[[0.5, 0.4]]]),
        lambda: jaxem.emissions.Multinomial([[1.5, -0.5]]),
        lambda: jaxem.emissions.Poisson([[-1.0]]),
        lambda: jaxem.emissions.Poisson([1.0]),
        lambda: jaxem.emissions.Exponential([[0.0]]),
        lambda: jaxem.emissions.Independent([]),
        lambda: jaxem.emissions.Independent(
            [jaxem.emissions.Poisson([[1.0]]), jaxem.emissions.Poisson([[1.0], [2.0]])]
        ),
        lambda: jaxem.Mixture([0.5, 0.6], jaxem.emissions.Poisson([[1.0], [2.0]])),
        lambda: jaxem.Mixture([1.0], jaxem.emissions.Poisson([[1.0], [2.0]])),
    ],
)
def test_constructors_refuse_what_is_no_parameter(build):
    with pytest.raises(ValueError):
        build()


# Degenerate components


@pytest.mark.parametrize("name", cases("closed"))
def test_a_component_without_units_is_degenerate(name):
    model, data, *_ = CASES[name]()
    model = eqx.tree_at(lambda m: m._weights.logits, model, jnp.array([0.0, -800.0]))
    (_, sums), _ = model.e_step(data)[0].sums, None
    flags = np.asarray(degenerate(model.components, sums))
    assert flags.tolist() == [False, True]
    healthy = CASES[name]().model
    statistics, _ = healthy.e_step(data)
    assert not np.any(degenerate(healthy.components, statistics.sums[1]))


@pytest.mark.parametrize("name", ["gaussian", "diagonal", "spherical"])
def test_a_variance_below_a_thousandth_of_the_average_is_degenerate(name):
    c = CASES[name]().model.components
    model, data, *_ = CASES[name]()
    sums = model.e_step(data)[0].sums[1]

    def shrunk(factor):
        scale = np.array([1.0, factor])
        if name == "gaussian":
            return type(c)(c.mean, np.stack([np.eye(2)] * 2) * scale[:, None, None])
        return type(c)(c.mean, scale if name == "spherical" else np.outer(scale, [1.0, 1.0]))

    assert np.asarray(degenerate(shrunk(1e-2), sums)).tolist() == [False, False]
    assert np.asarray(degenerate(shrunk(1e-4), sums)).tolist() == [False, True]
    frozen = jaxem.freeze(shrunk(1e-4), "variance" if name != "gaussian" else "covariance")
    assert not np.any(degenerate(frozen, sums))


@pytest.mark.parametrize("name", cases("closed"))
def test_a_component_without_units_stays_where_it_is(name):
    model, data, *_ = CASES[name]()
    model = eqx.tree_at(lambda m: m._weights.logits, model, jnp.array([0.0, -800.0]))
    moved = refit(model, data, jnp.asarray(W)).components
    for old, new in zip(jax.tree.leaves(model.components), jax.tree.leaves(moved), strict=True):
        if old.shape[0] == 2:
            np.testing.assert_allclose(new[1], old[1], rtol=1e-12)
            assert not np.allclose(new[0], old[0])
