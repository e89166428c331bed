"""Factor analysis and PPCA: published results, starts, rotations, tests, moments."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gold import FACTORS, match, table
from jax.scipy.stats import multivariate_normal
from models import CASES
from sklearn.datasets import load_iris

import jaxem
from jaxem.emissions import PPCA, FactorAnalysis, Gaussian, compressed, from_moments
from jaxem.inference import factor_test, observed_information, parallel_analysis, rotate

IRIS = jnp.asarray(load_iris().data)
SIZES = {"ability": 112, "emmett": 211, "harman74": 145}


@functools.cache
def moments(name):
    """Observations that have a published correlation matrix, and their weights."""
    if name == "ability":
        covariance = table("ability_cov").iloc[:, 1:].to_numpy()
        unit = np.sqrt(np.diag(covariance))
        return from_moments(SIZES[name], covariance / np.outer(unit, unit))
    matrix = table(f"{name}_cor")
    return from_moments(SIZES[name], matrix.select_dtypes(float).to_numpy())


@functools.cache
def fitted(name, num_factors):
    x, weight = moments(name)
    start = FactorAnalysis.init(jax.random.key(0), x, sample_weight=weight, num_factors=num_factors)
    options = {"sample_weight": weight, "tol": 1e-11, "max_steps": 20_000}
    return jaxem.fit(start, x, jaxem.SQUAREM(), **options)


@pytest.mark.parametrize("case", [name for name in FACTORS if name[3:].startswith(tuple(SIZES))])
def test_factor_analysis(case):
    _, name, num_factors = case.split("_")
    x, weight = moments(name)
    solution = fitted(name, int(num_factors))
    assert solution.converged
    match(case, "uniquenesses", solution.model.uniqueness[0])
    match(case, "loglik_n", solution.objective)
    test = factor_test(solution, x, sample_weight=weight)
    match(case, "discrepancy_F", test.discrepancy)
    match(case, "bartlett_stat_R", test.statistic)
    match(case, "dof", test.dof)


def test_steps_are_those_of_rubin_and_thayer():
    """Plain EM where the mean is frozen."""
    x, weight = moments("emmett")
    loadings = np.stack([np.full(9, 0.7), 0.1 * (-1.0) ** np.arange(9)], axis=1)
    start = FactorAnalysis(np.zeros((1, 9)), loadings[None], np.full((1, 9), 0.5))
    start = jaxem.freeze(start, "mean")
    solution = jaxem.fit(start, x, sample_weight=weight, tol=0, max_steps=11)
    match("fa_emmett_2", "loglik_trajectory", solution.history[:11])
    match("fa_emmett_2", "psi_after_11_steps", solution.model.noise_variance[0])


@pytest.mark.parametrize("num_factors", [1, 2, 3])
def test_ppca_is_its_closed_form(num_factors):
    start = PPCA.init(jax.random.key(0), IRIS, num_factors=num_factors)
    solution = jaxem.fit(start, IRIS, tol=1e-12)
    assert solution.converged and solution.num_steps < 200
    case = f"ppca_iris_{num_factors}"
    match(case, "sigma2", solution.model.noise_variance[0])
    match(case, "loglik", solution.objective)


def test_a_heywood_case_is_degenerate():
    start = FactorAnalysis.init(jax.random.key(0), IRIS, num_factors=1)
    solution = jaxem.fit(start, IRIS, jaxem.SQUAREM(), max_steps=2000)
    assert solution.status == "degenerate"
    match("fa_iris_heywood", "loglik_limit", solution.objective)


@pytest.mark.parametrize("kind", ["unique", "common"])
def test_mixture_of_factor_analysers(kind):
    family = functools.partial(FactorAnalysis, num_factors=1, tied=kind == "common")

    def one(key):
        start = jaxem.Mixture.init(key, IRIS, 3, family)
        return jaxem.fit(start, IRIS, jaxem.SQUAREM(), tol=1e-9, max_steps=2000)

    solution = jaxem.best(jax.jit(jax.vmap(one))(jax.random.split(jax.random.key(0), 10)))
    assert solution.converged
    match("mfa_iris_q1", f"loglik_{kind}_psi", solution.objective)
    match("mfa_iris_q1", f"weights_{kind}", jnp.sort(solution.model.weights))


def test_the_density_is_that_of_the_covariance():
    model = CASES["factor-analysis"]().model.components
    x = CASES["factor-analysis"]().data
    own = jaxem.Mixture([0.4, 0.6], model).log_prob(x)
    dense = [
        multivariate_normal.logpdf(x, mean, covariance)
        for mean, covariance in zip(model.mean, model.covariance, strict=True)
    ]
    np.testing.assert_allclose(
        own, jax.nn.logsumexp(jnp.stack(dense) + jnp.log(jnp.array([[0.4], [0.6]])), axis=0)
    )


def test_compressed_data_have_the_same_fit_and_errors():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 1)) @ [[1.0, -0.8, 0.6, 0.5]] + rng.normal(size=(300, 4)) + 1000
    few, weight = compressed(x)
    assert few.shape == (8, 4) and weight.sum() == pytest.approx(300)
    start = FactorAnalysis.init(jax.random.key(0), x)
    whole = jaxem.fit(start, x, tol=1e-10)
    short = jaxem.fit(start, few, tol=1e-10, sample_weight=weight)
    np.testing.assert_allclose(whole.objective, short.objective, rtol=1e-10)
    np.testing.assert_allclose(whole.model.covariance, short.model.covariance, rtol=1e-8)
    errors = jaxem.inference.standard_errors(whole, x)
    same = jaxem.inference.standard_errors(short, few, sample_weight=weight)
    np.testing.assert_allclose(errors["noise_variance"], same["noise_variance"], rtol=1e-5)
    assert compressed(x[:7])[0].shape == (7, 4)


def test_scores():
    model, x = fitted("ability", 2).model, moments("ability")[0]
    scores = model.scores(x)
    regression = model.loadings[0].T @ jnp.linalg.inv(model.covariance[0])
    np.testing.assert_allclose(scores.mean[:, 0], (x - model.mean) @ regression.T, atol=1e-10)
    np.testing.assert_allclose(
        scores.covariance[0], jnp.eye(2) - regression @ model.loadings[0], atol=1e-10
    )
    own = model.mean + jnp.array([[1.0, -2.0], [0.0, 3.0]]) @ model.loadings[0].T
    np.testing.assert_allclose(
        model.scores(own, "bartlett").mean[:, 0], [[1.0, -2.0], [0.0, 3.0]], atol=1e-10
    )
    with pytest.raises(ValueError, match='"regression" or "bartlett", got \'thomson\''):
        model.scores(x, "thomson")


@pytest.mark.parametrize("method", ["varimax", "quartimax", "oblimin", "promax"])
def test_rotations(method):
    loadings = fitted("ability", 2).model.loadings[0]
    found = rotate(loadings, method)
    np.testing.assert_allclose(
        found.loadings @ found.correlation @ found.loadings.T, loadings @ loadings.T, atol=1e-12
    )
    np.testing.assert_allclose(jnp.diagonal(found.correlation), 1, rtol=1e-12)
    angle = jnp.array(0.7)
    turn = jnp.array([[jnp.cos(angle), jnp.sin(angle)], [-jnp.sin(angle), jnp.cos(angle)]])
    np.testing.assert_allclose(rotate(loadings @ turn, method).loadings, found.loadings, atol=1e-8)
    step = 1e-6 * jnp.zeros((6, 2)).at[2, 1].set(1)
    ahead, behind = (rotate(loadings + s, method).loadings for s in (step, -step))
    slope = jax.jvp(lambda a: rotate(a, method).loadings, (loadings,), (1e6 * step,))[1]
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-6, atol=1e-6)


def test_varimax_and_quartimin_are_the_best_of_all_angles():
    loadings = np.asarray(fitted("ability", 2).model.loadings[0])
    length = np.linalg.norm(loadings, axis=1, keepdims=True)
    rows = loadings / length
    angles = np.linspace(0, np.pi, 721)
    axes = np.stack([np.cos(angles), np.sin(angles)])  # columns of T
    orthogonal = (rows @ axes) ** 2, (rows @ np.stack([-axes[1], axes[0]])) ** 2
    best = np.argmax(sum(np.var(square, axis=0) for square in orthogonal))
    found = np.abs(rotate(loadings).loadings / length)
    own = np.sqrt([square[:, best] for square in orthogonal]).T
    own = own[:, np.argsort(own[0])]
    np.testing.assert_allclose(found[:, np.argsort(found[0])], own, atol=0.01)

    def quartimin(one, two):
        turn = np.stack([axes[:, one], axes[:, two]], axis=1)
        return np.prod((rows @ np.linalg.inv(turn).T) ** 2, axis=1).sum()

    best = min(
        quartimin(a, b) for a in range(0, 721, 4) for b in range(a + 40, a + 320, 4) if b < 721
    )
    found = rotate(loadings, "oblimin").loadings / length
    assert np.prod(np.asarray(found) ** 2, axis=1).sum() <= best


def test_standard_errors_of_what_rotation_leaves():
    x, weight = moments("ability")
    solution = fitted("ability", 2)
    information = observed_information(solution, x, sample_weight=weight)
    covariance = information.covariance()
    assert covariance.proper and covariance.undetermined["loadings"].all()
    assert not covariance.undetermined["noise_variance"].any()
    turned = information.covariance(lambda model: rotate(model.loadings[0]).loadings)
    assert not turned.undetermined.any()
    assert jnp.all((turned.standard_errors > 0.05) & (turned.standard_errors < 0.2))


def test_parallel_analysis_counts_factors():
    rng = np.random.default_rng(1)
    x = rng.normal(size=(300, 2)) @ rng.normal(size=(2, 8)) + rng.normal(size=(300, 8))
    found = parallel_analysis(jax.random.key(0), x, num_draws=50)
    assert found.num_factors == 2
    np.testing.assert_allclose(found.eigenvalues.sum(), 8)
    assert parallel_analysis(jax.random.key(0), rng.normal(size=(300, 8))).num_factors == 0


def test_wide_data_make_no_matrix_of_features_by_features():
    x = jnp.asarray(np.random.default_rng(2).normal(size=(30, 400)), jnp.float32)

    def fit(x):
        start = FactorAnalysis.pooled(x, 1, jnp.ones(30, x.dtype), num_factors=2)
        return jaxem.fit(start, x, max_steps=3).model

    assert "400,400" not in str(jax.make_jaxpr(fit)(x))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: FactorAnalysis([[0.0, 0.0]], np.ones((1, 2, 2)), [[1.0, 1.0]]),
            "less than the number of features, 2; got 2",
        ),
        (
            lambda: FactorAnalysis.init(jax.random.key(0), IRIS, num_factors=0),
            "num_factors must be at least 1",
        ),
        (
            lambda: FactorAnalysis([[0.0, 0.0]], np.ones((1, 2, 1)), [[1.0, 0.0]]),
            "noise_variance must be positive",
        ),
        (
            lambda: FactorAnalysis([[0.0, 0.0]], np.ones((1, 3, 1)), [[1.0, 1.0]]),
            "loadings has shape",
        ),
        (lambda: FactorAnalysis.init(jax.random.key(0), IRIS, factors=2), "factors"),
        (lambda: from_moments(10, [[1.0, 0.5], [0.4, 1.0]]), "not symmetric"),
        (lambda: from_moments(10, [[1.0, 2.0], [2.0, 1.0]]), "negative eigenvalues"),
        (lambda: from_moments(0, np.eye(2)), "must be positive"),
        (lambda: rotate(np.ones((4, 2)), "equamax"), "method must be"),
        (
            lambda: factor_test(Gaussian([[0.0] * 4], [np.eye(4)]), IRIS),
            "expects a FactorAnalysis or PPCA",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
