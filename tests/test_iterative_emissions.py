"""Families whose M-step is iterative: density, maximum, prior, derivatives, limits."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import BEARINGS, CASES, COUNTS, DURATIONS, FULL, MEAN, POINTS, N, cases
from scipy import optimize, special, stats
from test_laws import close, e_step, gradient_of_q, log_joint, m_step, map_step, pulled_back, q

import jaxem
from jaxem._core import special as _special
from jaxem.emissions._base import log_prob as _log_prob

W = np.linspace(0.2, 2.0, N)
EXACT = ["gamma", "von-mises-fisher"]  # nothing but z is latent


def density(name, c, x, j):
    """log p(x | z = j) by SciPy."""
    match name:
        case "student-t":
            return stats.multivariate_t.logpdf(x, c.mean[j], c.scale[j], df=float(c.dof[j]))
        case "gamma":
            return stats.gamma.logpdf(x, c.concentration[j], scale=1 / c.rate[j]).sum(1)
        case "negative-binomial":
            s, mean = np.asarray(c.concentration[j]), np.asarray(c.mean[j])
            return stats.nbinom.logpmf(x, s, s / (s + mean)).sum(1)
        case "von-mises-fisher":
            law = stats.vonmises_fisher(np.asarray(c.direction[j]), float(c.concentration[j]))
            return law.logpdf(x)


@eqx.filter_jit
def log_prob(emission, x):
    return _log_prob(emission, x)


@pytest.mark.parametrize("name", cases("iterative"))
def test_log_prob_is_scipys(name):
    case = CASES[name]()
    c = case.model.components
    by_scipy = np.stack([density(name, c, np.asarray(case.data), j) for j in range(2)], axis=1)
    np.testing.assert_allclose(log_prob(c, case.data), by_scipy, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", EXACT)
def test_q_is_the_expected_log_joint_in_any_frame(name):
    case = CASES[name]()
    statistics, _ = e_step(case.model, case.data)
    other = m_step(case.model, statistics)
    r = case.model.responsibilities(case.data)
    rise = q(other, statistics) - q(case.model, statistics)
    close(rise, jnp.sum(r * (log_joint(other, case.data) - log_joint(case.model, case.data))))
    there = pulled_back(other.components, case.data, r)
    close(statistics.at(other).sums[1], there)


@pytest.mark.parametrize("name", cases("iterative"))
def test_map_em_climbs(name):
    case = CASES[name]()
    prior = case.model.prior(weights=4.0, components=case.prior)
    state = start = jaxem.EM().init(case.model, jaxem.em.Problem(case.data, prior=prior))
    for _ in range(12):
        after = map_step(state, case.data, prior)
        assert after.objective >= state.objective - 1e-11 * N
        state = after
    assert state.objective > start.objective + 1e-3


@pytest.mark.parametrize("name", cases("iterative", "mechanism"))
def test_a_map_fit_ends_at_a_posterior_mode(name):
    case = CASES[name]()
    prior = case.model.prior(weights=4.0, components=case.prior)
    solution = jaxem.fit(case.model, case.data, prior=prior, tol=1e-13, max_steps=20_000)
    zero = jax.tree.map(jnp.zeros_like, solution.model)
    close(gradient_of_q(solution.model, solution.statistics + prior), zero, 1e-7)


@pytest.mark.parametrize("name", cases("iterative"))
def test_a_prior_alone_has_its_mode_where_it_says(name):
    c = CASES[name]().model.components
    prior = eqx.tree_at(lambda p: p, c.prior, c.prior)
    counts = {"student-t": dict(count={"mean": 2.0, "scale": 5.0, "dof": 3.0})}
    prior = c.prior(**counts.get(name, {"count": 3.0}))
    mode = eqx.filter_jit(lambda: c.m_step(prior.at(c).sums))()
    close(
        jaxem._core.parameters.named_parameters(mode),
        jaxem._core.parameters.named_parameters(c),
        1e-9,
    )


@pytest.mark.parametrize("name", cases("iterative"))
def test_samples_follow_the_density(name):
    """Frequencies below quantiles of SciPy's law, in the first feature."""
    c = CASES[name]().model.components
    n = 20_000
    z = jnp.arange(2 * n) // n
    drawn = eqx.filter_jit(c.sample)(jax.random.key(1), z)
    c.check(drawn)
    assert np.all(c.in_support(drawn))
    x = np.asarray(drawn, float)
    for j in range(2):
        own = x[j * n : (j + 1) * n]
        if name == "von-mises-fisher":
            rng = np.random.default_rng(0)
            law = stats.vonmises_fisher(np.asarray(c.direction[j]), float(c.concentration[j]))
            assert all(stats.ks_2samp(own.T[i], law.rvs(n, rng).T[i])[1] > 1e-4 for i in range(3))
            continue
        if name == "negative-binomial":
            mean, s = float(c.mean[j, 0]), float(c.concentration[j, 0])
            shares = stats.nbinom.cdf(np.arange(12), s, s / (s + mean))
            found = (own[:, :1] <= np.arange(12)).mean(0)
            assert np.all(np.abs(found - shares) < 5 / np.sqrt(n) * np.sqrt(shares) + 1e-9)
            continue
        if name == "gamma":
            law = stats.gamma(c.concentration[j, 0], scale=1 / c.rate[j, 0])
        else:
            law = stats.t(c.dof[j], c.mean[j, 0], np.sqrt(c.scale[j, 0, 0]))
        assert stats.kstest(own[:, 0], law.cdf)[1] > 1e-4


# Maxima


@eqx.filter_jit
def refit(model, data, sample_weight):
    return model.m_step(model.e_step(data, sample_weight)[0])


def test_gamma_and_fisher_maxima_in_one_step():
    one = jaxem.Mixture([1.0], jaxem.emissions.Gamma(np.ones((1, 2)), np.ones((1, 2))))
    found = refit(one, jnp.asarray(DURATIONS), jnp.ones(N)).components
    by_scipy = [stats.gamma.fit(DURATIONS[:, d], floc=0) for d in range(2)]
    np.testing.assert_allclose(found.concentration[0], [a for a, _, _ in by_scipy], rtol=1e-7)
    np.testing.assert_allclose(1 / found.rate[0], [b for _, _, b in by_scipy], rtol=1e-7)
    one = jaxem.Mixture([1.0], jaxem.emissions.VonMisesFisher([[1.0, 0.0, 0.0]], 1.0))
    found = refit(one, jnp.asarray(BEARINGS), jnp.ones(N)).components
    direction, concentration = stats.vonmises_fisher.fit(BEARINGS)
    np.testing.assert_allclose(found.direction[0], direction, rtol=1e-12)
    np.testing.assert_allclose(found.concentration[0], concentration, rtol=1e-7)


def test_negative_binomial_mean_is_exact_in_one_step_and_shape_is_the_maximum():
    one = jaxem.Mixture([1.0], jaxem.emissions.NegativeBinomial([[1.0, 1.0]], [[3.0, 3.0]]))
    data, sample_weight = jnp.asarray(COUNTS), jnp.asarray(W)
    moved = refit(one, data, sample_weight).components
    np.testing.assert_allclose(moved.mean[0], W @ COUNTS / W.sum(), rtol=1e-13)
    found = jaxem.fit(
        one, data, sample_weight=sample_weight, tol=1e-13, max_steps=20_000
    ).model.components
    for d in range(2):
        mean = float(found.mean[0, d])

        def loss(log_s, d=d, mean=mean):
            s = np.exp(log_s)
            return -W @ stats.nbinom.logpmf(COUNTS[:, d], s, s / (s + mean))

        best = optimize.minimize_scalar(loss, (0, 1), options={"xtol": 1e-12}).x
        np.testing.assert_allclose(np.log(found.concentration[0, d]), best, rtol=1e-6)


@pytest.mark.parametrize(
    ("which", "free"), [("rate", "log_concentration"), ("concentration", "log_rate")]
)
def test_a_held_parameter_of_a_gamma_law_gives_the_constrained_maximum(which, free):
    case = CASES["gamma"]()
    model = jaxem.freeze(case.model, f"components.{which}")
    statistics, _ = e_step(model, case.data)
    slope = gradient_of_q(m_step(model, statistics), statistics).components
    assert np.max(np.abs(getattr(slope, free))) < 1e-8
    kept = {"rate": "log_rate", "concentration": "log_concentration"}[which]
    assert np.max(np.abs(getattr(slope, kept))) > 1e-2


def test_a_held_mean_of_a_negative_binomial_gives_the_constrained_maximum():
    case = CASES["negative-binomial"]()
    model = jaxem.freeze(case.model, "components.mean")
    solution = jaxem.fit(model, case.data, tol=1e-12, max_steps=20_000)
    score = jax.jit(jax.grad(lambda m: m.e_step(case.data)[1]))(solution.model).components
    assert np.max(np.abs(score.log_concentration)) < 1e-6


# Student t


def test_parameter_expansion_needs_fewer_steps():
    """Against the plain M-step, which the same sums give with α = 1."""

    class Plain(jaxem.emissions.StudentT):
        def _expansion(self, sums, dof):
            return jnp.ones_like(self.log_dof)

    x = jnp.asarray(stats.multivariate_t.rvs([0.0, 0.0], FULL[0], df=1.5, size=80, random_state=0))
    steps, values = {}, {}
    for family in (jaxem.emissions.StudentT, Plain):
        model = jaxem.Mixture([1.0], family(MEAN[:1], FULL[:1], 1.5))
        model = jaxem.freeze(model, "components.dof")
        solution = jaxem.fit(model, x, tol=1e-10, max_steps=5000)
        steps[family], values[family] = solution.num_steps, solution.objective
    assert steps[jaxem.emissions.StudentT] < 0.7 * steps[Plain]
    np.testing.assert_allclose(values[Plain], values[jaxem.emissions.StudentT], atol=1e-6)


def test_many_degrees_of_freedom_are_a_gaussian_and_few_are_degenerate():
    x = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (60, 1)))  # tails lighter than any t
    start = jaxem.Mixture([1.0], jaxem.emissions.StudentT([[0.1]], [[[1.0]]], 3.0))
    solution = jaxem.fit(start, x, jaxem.SQUAREM())  # plain EM creeps there, in 1,647 steps
    assert solution.result == jaxem.RESULTS.converged
    np.testing.assert_allclose(solution.model.components.dof, 1000.0)
    y = np.random.default_rng(0).normal(size=(60, 1))
    heavy = jnp.asarray(np.sign(y) * np.exp(40 * np.abs(y)))
    model = jaxem.Mixture([1.0], jaxem.emissions.StudentT([[0.0]], [[[1.0]]], 1.0))
    ended = jaxem.fit(model, heavy, max_steps=300, throw=False)
    np.testing.assert_allclose(ended.model.components.dof, 0.1)
    assert ended.result == jaxem.RESULTS.degenerate


def test_an_outlier_moves_a_student_less_than_a_gaussian():
    x = jnp.asarray(POINTS).at[0].set(jnp.array([1e4, -1e4]))
    model = jaxem.Mixture.init(
        jax.random.key(0), x, 1, functools.partial(jaxem.emissions.StudentT, dof=3.0)
    )
    assert np.all(model.components.dof == 3.0)
    fitted = jaxem.fit(model, x).model.components
    assert np.all(np.abs(fitted.mean[0] - np.median(POINTS, axis=0)) < 1)


# Limits


def test_counts_that_are_not_overdispersed_end_at_poissons_law():
    x = jnp.asarray(np.tile([2, 3, 4], 20))[:, None]
    model = jaxem.Mixture([1.0], jaxem.emissions.NegativeBinomial([[1.0]], [[2.0]]))
    solution = jaxem.fit(model, x, max_steps=2000)
    np.testing.assert_allclose(solution.model.components.concentration, 1e6, rtol=1e-6)
    poisson = jaxem.fit(jaxem.Mixture([1.0], jaxem.emissions.Poisson([[1.0]])), x)
    np.testing.assert_allclose(solution.log_likelihood, poisson.log_likelihood, rtol=1e-6)


@pytest.mark.parametrize(
    ("mean", "shape"), [(3.0, 1e5), (1e6, 2.0), (1e4, 0.01), (0.01, 1.0), (1e5, 1e5)]
)
def test_negative_binomial_keeps_its_digits(mean, shape):
    x = np.unique(stats.nbinom.ppf([1e-6, 0.1, 0.5, 0.9, 1 - 1e-6], shape, shape / (mean + shape)))
    reference = stats.nbinom.logpmf(x, shape, shape / (mean + shape))
    for dtype, tol in ((np.float64, 1e-8), (np.float32, 5e-3)):
        c = jaxem.emissions.NegativeBinomial(
            np.full((1, 1), mean, dtype), np.full((1, 1), shape, dtype)
        )
        found = log_prob(c, jnp.asarray(x.astype(dtype)[:, None]))
        np.testing.assert_allclose(found[:, 0], reference, rtol=tol, atol=tol)


def test_gamma_in_float32_on_narrow_data():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(1000, 0.1, (500, 1)), jnp.float32)
    model = jaxem.Mixture(
        [np.float32(1.0)], jaxem.emissions.Gamma.pooled(x, 1, jnp.ones(500, jnp.float32))
    )
    fitted = jaxem.fit(model, x).model.components
    exact = np.asarray(x, float)
    np.testing.assert_allclose(fitted.concentration, exact.mean() ** 2 / exact.var(), rtol=1e-3)
    np.testing.assert_allclose(fitted.concentration / fitted.rate, exact.mean(), rtol=1e-6)


def test_fisher_norm_by_bessel_functions():
    for d in (2, 3, 7, 40):
        kappa = np.array([0.01, 1.0, 30.0, 300.0])
        order = d / 2 - 1
        scaled = np.log(special.ive(order, kappa))
        expected = order * np.log(kappa) - 0.5 * d * np.log(2 * np.pi) - scaled
        norm = lambda v, d=d: _special.vmf_log_norm(v, d)  # noqa: E731
        np.testing.assert_allclose(norm(jnp.asarray(kappa)), expected, rtol=1e-11)
        slope = jax.jit(jax.vmap(jax.grad(norm)))(jnp.asarray(kappa))
        ratio = special.ive(order + 1, kappa) / special.ive(order, kappa)
        np.testing.assert_allclose(slope, 1 - ratio, rtol=1e-10)
        single = norm(jnp.asarray(kappa, jnp.float32))
        np.testing.assert_allclose(single, expected, rtol=1e-5, atol=1e-5)


def test_binets_function_and_its_derivatives():
    x = np.array([1e-3, 0.1, 1.0, 2.5, 7.9, 8.1, 100.0, 1e5])
    value = special.gammaln(x) - (x - 0.5) * np.log(x) + x - 0.5 * np.log(2 * np.pi)
    np.testing.assert_allclose(_special.binet(jnp.asarray(x)), value, rtol=1e-9, atol=1e-9)
    slope = jax.jit(jax.vmap(jax.grad(_special.binet)))
    psi = special.digamma(x) - np.log(x) + 0.5 / x
    np.testing.assert_allclose(slope(jnp.asarray(x)), psi, rtol=1e-9, atol=1e-12)
    third = jax.jit(jax.vmap(jax.grad(jax.grad(jax.grad(_special.binet)))))(jnp.asarray(x))
    scipys = special.polygamma(2, x) + 1 / x**2 + 1 / x**3
    np.testing.assert_allclose(third, scipys, rtol=1e-9, atol=1e-25)


# What is refused


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: jaxem.emissions.StudentT(MEAN, FULL, 0.0), "dof must be positive"),
        (lambda: jaxem.emissions.StudentT(MEAN, FULL[0], 3.0), "scale has shape"),
        (lambda: jaxem.emissions.StudentT(MEAN, -FULL, 3.0), "not positive definite"),
        (lambda: jaxem.emissions.StudentT(MEAN, FULL, [1.0, 2.0, 3.0]), "dof has shape"),
        (lambda: jaxem.emissions.Gamma([[1.0]], [[0.0]]), "rate must be"),
        (lambda: jaxem.emissions.Gamma([1.0], [1.0]), "concentration has shape"),
        (lambda: jaxem.emissions.NegativeBinomial([[1.0]], [[-1.0]]), "concentration must be"),
        (lambda: jaxem.emissions.NegativeBinomial([[-1.0]], [[1.0]]), "mean must be"),
        (lambda: jaxem.emissions.VonMisesFisher([[0.0, 0.0]], 1.0), "not zero"),
        (lambda: jaxem.emissions.VonMisesFisher([[1.0]], 1.0), "two dimensions"),
        (lambda: jaxem.emissions.VonMisesFisher([[1.0, 0.0]], 0.0), "concentration must be"),
        (lambda: jaxem.emissions.Gamma([[1.0]], [[1.0]]).prior(count=-1.0), "must not be negative"),
        (
            lambda: jaxem.emissions.StudentT(MEAN, FULL, 3.0).check(jnp.zeros((4, 3))),
            "expects data",
        ),
    ],
)
def test_what_is_no_parameter_is_refused(build, says):
    with pytest.raises(ValueError, match=says):
        build()


@pytest.mark.parametrize("name", cases("iterative"))
def test_starts_are_models_and_empty_components_stay(name):
    case = CASES[name]()
    family = type(case.model.components)
    model = jaxem.Mixture.init(jax.random.key(3), case.data, 2, family)
    assert np.isfinite(e_step(refit(model, case.data, jnp.asarray(W)), case.data)[1])
    empty = eqx.tree_at(lambda m: m._weights.logits, case.model, jnp.array([0.0, -800.0]))
    moved = refit(empty, case.data, jnp.asarray(W)).components
    for old, new in zip(jax.tree.leaves(empty.components), jax.tree.leaves(moved), strict=True):
        np.testing.assert_allclose(new[1], old[1], rtol=1e-9)
        assert not np.allclose(new[0], old[0], rtol=1e-6)
    flags = empty.degenerate(empty.e_step(case.data)[0])
    assert np.asarray(flags).tolist() == [False, True]
