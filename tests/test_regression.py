"""Regressions: closed forms, likelihood equations, offsets, collinear inputs, autoregression."""

import functools
import itertools
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import ANSWERS, CASES, EVENTS, INPUTS, RESPONSES, N, cases
from scipy import stats
from test_adjoints import agree, gradient_and_difference

import jaxem
from jaxem.authoring import AbstractLocal, Framed, real
from jaxem.emissions import _base

W = np.random.default_rng(0).uniform(0.2, 2.0, N)
TWO = np.concatenate([RESPONSES, RESPONSES[::-1] + INPUTS[:, :1]], axis=1)  # two outputs
FREE = ("coefficients", "intercept", "covariance")


@eqx.filter_jit
def log_prob(emission, x):
    return _base.log_prob(emission, x)


@eqx.filter_jit
def sums_of(emission, x, r):
    return _base.sums_of(emission, x, r)


@eqx.filter_jit
def maximum(emission, sums):
    return emission.m_step(sums)


@eqx.filter_jit
def fitted(model, data, **options):
    return jaxem.fit(model, data, tol=1e-13, max_steps=5000, throw=False, **options)


def arrays(*columns):
    return tuple(jnp.asarray(column) for column in columns)


def one(family, *parameters):
    return jaxem.Mixture([1.0], family(*parameters))


# Densities


@pytest.mark.parametrize("name", cases("regression"))
def test_log_prob_is_scipys(name):
    model, (u, y), *_ = CASES[name]()
    c = model.components
    line = np.einsum("kdp,np->nkd", c.coefficients, u) + np.asarray(c.intercept)
    y = np.asarray(y)[:, None]
    match name:
        case "linear-regression":
            expected = stats.norm.logpdf(y, line, np.sqrt(np.asarray(c.covariance)[:, 0]))
            mean = line
        case "logistic-regression":
            mean = 1 / (1 + np.exp(-line))
            expected = stats.bernoulli.logpmf(y, mean)
        case "poisson-regression":
            mean = np.exp(line)
            expected = stats.poisson.logpmf(y, mean)
    np.testing.assert_allclose(log_prob(c, (u, y[:, 0])), expected.sum(2), rtol=1e-11, atol=1e-11)
    np.testing.assert_allclose(c.predict(u), mean, rtol=1e-12)


# Linear regressions: weighted least squares


def least_squares(design, y, w):
    root = np.sqrt(w)[:, None]
    b = np.linalg.lstsq(root * design, root * y, rcond=None)[0]
    residual = y - design @ b
    return b, (w[:, None] * residual).T @ residual


R = np.random.default_rng(1).dirichlet([1.0, 1.0], N)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("frozen", [None, *FREE])
def test_the_m_step_is_constrained_least_squares(frozen, tied):
    """Whatever is frozen; far from the start, at other offsets than the start's."""
    u, y = INPUTS + [100.0, -50.0], TWO + 30.0
    covariance = np.array([[2.0, 0.3], [0.3, 1.0]])
    rng = np.random.default_rng(2)
    start = jaxem.emissions.LinearRegression(
        rng.normal(size=(2, 2, 2)),
        rng.normal(size=(2, 2)),
        covariance if tied else np.stack([covariance] * 2),
    )
    start = jaxem.freeze(start, frozen) if frozen else start
    found = maximum(start, sums_of(start, arrays(u, y), jnp.asarray(R)))
    again = maximum(found, sums_of(found, arrays(u, y), jnp.asarray(R)))
    scatters, design = [], np.concatenate([np.ones((N, 1)), u], axis=1)
    for j in range(2):
        coefficients, intercept = np.asarray(start.coefficients[j]), np.asarray(start.intercept[j])
        match frozen:
            case "coefficients":
                b, scatter = least_squares(design[:, :1], y - u @ coefficients.T, R[:, j])
                intercept = b[0]
            case "intercept":
                b, scatter = least_squares(u, y - intercept, R[:, j])
                coefficients = b.T
            case _:
                b, scatter = least_squares(design, y, R[:, j])
                intercept, coefficients = b[0], b[1:].T
        scatters.append(scatter)
        np.testing.assert_allclose(found.coefficients[j], coefficients, rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(found.intercept[j], intercept, rtol=1e-8, atol=1e-6)
        np.testing.assert_allclose(again.coefficients[j], coefficients, rtol=1e-11, atol=1e-11)
    right = [s / R[:, j].sum() for j, s in enumerate(scatters)]
    right = sum(scatters) / N if tied else np.stack(right)
    right = np.asarray(start.covariance) if frozen == "covariance" else right
    np.testing.assert_allclose(found.covariance, right, rtol=1e-8)


def test_some_components_held_and_others_free():
    model, data, *_ = CASES["linear-regression"]()
    start = jaxem.freeze(model.components, "intercept", mask=[True, False])
    start = jaxem.freeze(start, "coefficients", mask=[False, True])
    found = maximum(start, sums_of(start, data, jnp.asarray(R)))
    u, y = map(np.asarray, data)
    b, _ = least_squares(u, y - np.asarray(start.intercept[0]), R[:, 0])
    np.testing.assert_allclose(found.coefficients[0], b.T, rtol=1e-11)
    assert found.intercept[0] == start.intercept[0]
    b, _ = least_squares(np.ones((N, 1)), y - u @ np.asarray(start.coefficients[1]).T, R[:, 1])
    np.testing.assert_allclose(found.intercept[1], b[0], rtol=1e-11)
    assert jnp.all(found.coefficients[1] == start.coefficients[1])
    assert found.num_free_parameters == 2 + 1 + 2


def test_sums_reframed_are_those_computed_there():
    model, data, *_ = CASES["linear-regression"]()
    here = model.components
    there = maximum(here, sums_of(here, data, jnp.asarray(R)))
    assert jnp.any(there.inputs.mean != 0)
    moved = eqx.filter_jit(lambda s: there.reframe(s, here))(sums_of(here, data, jnp.asarray(R)))
    for a, b in zip(moved, sums_of(there, data, jnp.asarray(R)), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-12 * np.max(np.abs(b)))


@pytest.mark.parametrize("tied", [False, True])
def test_prior_is_a_matrix_normal_inverse_wishart(tied):
    d, p = 2, 2
    mean, precision, count = np.array([[0.5, -0.2], [0.1, 0.3]]), np.array([2.0, 0.7]), 9.0
    psi, intercept = np.array([[1.0, 0.2], [0.2, 0.8]]), np.array([1.0, -1.0])
    rng = np.random.default_rng(3)

    def random():
        root = rng.normal(size=(2, 2)) + 2 * np.eye(2)
        covariance = root @ root.T
        covariance = covariance if tied else covariance[None]
        return jaxem.emissions.LinearRegression(
            rng.normal(size=(1, d, p)), rng.normal(size=(1, d)), covariance
        )

    def by_scipy(c):
        covariance = np.reshape(c.covariance, (d, d))
        columns = stats.matrix_normal.logpdf(
            c.coefficients[0], mean, covariance, np.diag(1 / precision)
        )
        level = stats.multivariate_normal.logpdf(c.intercept[0], intercept, covariance / 1.5)
        return columns + level + stats.invwishart.logpdf(covariance, count - d - p - 2, count * psi)

    a, b = random(), random()
    prior = a.prior(
        {"intercept": 1.5, "covariance": count},
        precision=precision,
        coefficients=mean,
        intercept=intercept,
        covariance=psi,
    )
    value = eqx.filter_jit(lambda c: c.expected_log_prob(prior.at(c).sums))
    np.testing.assert_allclose(value(b) - value(a), by_scipy(b) - by_scipy(a), rtol=1e-10)
    for leaf in jax.tree.leaves(a.prior().sums):
        np.testing.assert_array_equal(leaf, 0)
    for wrong in ({"intercept": -1.0}, {"covariance": -1.0}, -1.0):
        with pytest.raises(ValueError, match="negative"):
            a.prior(wrong)
    with pytest.raises(ValueError, match="negative"):
        a.prior(precision=-1.0)
    with pytest.raises(ValueError, match="not of 'coefficients'"):
        a.prior({"coefficients": 1.0})
    with pytest.raises(ValueError, match="not positive definite"):
        a.prior(covariance=-psi)


def test_ridge_is_its_closed_form():
    u, y = INPUTS + 20.0, RESPONSES
    model = one(
        jaxem.emissions.LinearRegression, np.zeros((1, 1, 2)), np.zeros((1, 1)), np.ones((1, 1, 1))
    )
    prior = model.prior(components=model.components.prior(precision=[5.0, 0.0]))
    found = fitted(model, arrays(u, y), prior=prior).model.components
    centred = u - u.mean(0)
    right = np.linalg.solve(centred.T @ centred + np.diag([5.0, 0.0]), centred.T @ y)
    np.testing.assert_allclose(found.coefficients[0], right.T, rtol=1e-9)
    np.testing.assert_allclose(found.intercept[0], y.mean(0) - u.mean(0) @ right, rtol=1e-9)


def test_standard_errors_are_those_of_least_squares():
    data = arrays(INPUTS, RESPONSES)
    start = one(
        jaxem.emissions.LinearRegression, np.zeros((1, 1, 2)), np.zeros((1, 1)), np.ones((1, 1, 1))
    )
    solution = jaxem.fit(start, data)
    design = np.concatenate([np.ones((N, 1)), INPUTS], axis=1)
    covariance = np.linalg.inv(design.T @ design) * float(
        solution.model.components.covariance.item()
    )
    errors = jaxem.inference.standard_errors(solution, data)["components"]
    found = np.append(np.ravel(errors["intercept"]), np.ravel(errors["coefficients"]))
    np.testing.assert_allclose(found, np.sqrt(np.diag(covariance)), rtol=1e-6)


# Regressions with a link: the likelihood equations


def test_one_logistic_regression_solves_its_likelihood_equations():
    model = one(jaxem.emissions.LogisticRegression, np.zeros((1, 3, 2)), np.zeros((1, 3)))
    solution = fitted(model, arrays(INPUTS, ANSWERS), sample_weight=jnp.asarray(W))
    assert solution.result == jaxem.RESULTS.converged
    assert np.all(np.diff(solution.history[: solution.num_steps + 1]) > -1e-11)
    mean = np.asarray(solution.model.components.predict(jnp.asarray(INPUTS)))[:, 0]
    design = np.concatenate([np.ones((N, 1)), INPUTS], axis=1)
    np.testing.assert_allclose(design.T @ (W[:, None] * (ANSWERS - mean)), 0, atol=1e-8)


@pytest.mark.parametrize("exposed", [False, True])
def test_one_poisson_regression_solves_its_likelihood_equations(exposed):
    exposure = np.random.default_rng(4).uniform(0.5, 3.0, (N, 1))
    data = arrays(INPUTS, EVENTS, exposure) if exposed else arrays(INPUTS, EVENTS)
    model = one(jaxem.emissions.PoissonRegression, np.zeros((1, 1, 2)), np.zeros((1, 1)))
    solution = fitted(model, data, sample_weight=jnp.asarray(W))
    assert solution.result == jaxem.RESULTS.converged
    mean = np.asarray(solution.model.components.predict(jnp.asarray(INPUTS)))[:, 0]
    mean = mean * exposure if exposed else mean
    design = np.concatenate([np.ones((N, 1)), INPUTS], axis=1)
    np.testing.assert_allclose(design.T @ (W[:, None] * (EVENTS - mean)), 0, atol=1e-8)


def test_exposure_shifts_the_intercept():
    model, (u, y), *_ = CASES["poisson-regression"]()
    plain = fitted(model, (u, y)).model.components
    start = eqx.tree_at(
        lambda m: m.components.intercept, model, model.components.intercept - jnp.log(7.0)
    )
    exposed = fitted(start, (u, y, jnp.full((N, 1), 7.0))).model.components
    np.testing.assert_allclose(exposed.coefficients, plain.coefficients, rtol=1e-7)
    np.testing.assert_allclose(exposed.intercept + np.log(7.0), plain.intercept, rtol=1e-7)


@pytest.mark.parametrize("frozen", ["coefficients", "intercept"])
@pytest.mark.parametrize("name", ["logistic-regression", "poisson-regression"])
def test_what_is_held_leaves_a_constrained_maximum(name, frozen):
    case = CASES[name]()
    prior = case.model.prior(components=case.prior)
    model = jaxem.freeze(case.model, f"components.{frozen}")
    solution = fitted(model, case.data, prior=prior)
    assert solution.result == jaxem.RESULTS.converged

    @eqx.filter_jit
    @jax.grad
    def slope(model):
        return model.e_step(case.data)[1] + model.expected_log_prob(prior)

    components = slope(solution.model).components
    other = {"coefficients": "intercept", "intercept": "coefficients"}[frozen]
    np.testing.assert_allclose(getattr(components, other), 0, atol=1e-7)
    assert np.max(np.abs(getattr(components, frozen))) > 1e-2
    assert jnp.all(getattr(solution.model.components, frozen) == getattr(model.components, frozen))


@pytest.mark.parametrize("name", ["logistic-regression", "poisson-regression"])
def test_ridge_of_a_link_function_is_a_normal_prior(name):
    c = CASES[name]().model.components
    other = eqx.tree_at(
        lambda c: (c.coefficients, c.intercept), c, (c.coefficients + 0.3, c.intercept - 0.2)
    )
    mean, precision = 0.1, np.array([2.0, 0.5])
    prior = c.prior(precision=precision, intercept_precision=3.0, coefficients=mean, intercept=0.4)
    value = eqx.filter_jit(lambda c: c.expected_log_prob(prior.at(c).sums))

    def by_scipy(c):
        slopes = stats.norm.logpdf(c.coefficients, mean, 1 / np.sqrt(precision)).sum()
        return slopes + stats.norm.logpdf(c.intercept, 0.4, 1 / np.sqrt(3.0)).sum()

    np.testing.assert_allclose(value(other) - value(c), by_scipy(other) - by_scipy(c), rtol=1e-10)
    with pytest.raises(ValueError, match="negative"):
        c.prior(precision=-1.0)


# Steps that overshoot


class Overshooting(jaxem.models.AbstractModel):
    """N(x; shift, 1), whose M-step goes `reach` times too far."""

    parameters: ClassVar = {"shift": real("shift", "")}
    shift: Any
    reach: float = eqx.field(static=True, default=7.0)
    frozen: tuple = eqx.field(static=True, default=())

    def expected_sums(self, data, sample_weight, posterior, key):
        y = data[:, 0] - self.shift
        return (jnp.asarray(1.0 * len(y)), jnp.sum(y)), -0.5 * jnp.sum(y**2)

    def m_step(self, statistics):
        n, first = statistics.at(self).sums
        return eqx.tree_at(lambda m: m.shift, self, self.shift + self.reach * first / n)

    def reframe(self, sums, old):
        n, first = sums
        return n, first + n * (old.shift - self.shift)

    def expected_log_prob(self, statistics):
        n, first = statistics.at(self).sums
        return -0.5 * first**2 / n

    def prior(self):
        return Framed((jnp.asarray(0.0), jnp.asarray(0.0)), self)

    num_free_parameters = 1

    def log_prob(self, data):
        return -0.5 * (data[:, 0] - self.shift) ** 2

    def sample(self, key, n):
        return self.shift + jax.random.normal(key, (n, 1)), jnp.zeros(n, int)

    def check(self, data):
        pass

    def in_support(self, data):
        return jnp.isfinite(data[:, 0])

    def width(self, data):
        return 1

    def num_observed(self, data):
        return jnp.ones(len(data), int)

    def degenerate(self, statistics):
        return jnp.zeros(1, int)

    def serial_steps(self, data):
        return 1

    def representable(self):
        return jnp.isfinite(self.shift)


class Stubborn(Overshooting, AbstractLocal):
    """The same with statistics that count as local."""

    has_curvature: ClassVar[bool] = True


def test_a_step_that_overshoots_is_halved():
    x = jnp.asarray(RESPONSES)
    unguarded = fitted(Overshooting(jnp.array(3.0)), x)
    assert unguarded.result == jaxem.RESULTS.decreased
    solution = fitted(Stubborn(jnp.array(3.0)), x)
    assert solution.result == jaxem.RESULTS.converged
    np.testing.assert_allclose(solution.model.shift, np.mean(RESPONSES), atol=1e-5)
    history = solution.history[: solution.num_steps + 1]
    assert np.all(np.diff(history) >= -1e-10)
    np.testing.assert_allclose(
        history[1] - history[0], 0.5 * N * (3 - np.mean(x)) ** 2 * (1 - 0.125**2)
    )
    lanes = jax.vmap(lambda s: fitted(Stubborn(s), x).model.shift)(jnp.array([3.0, -20.0]))
    np.testing.assert_allclose(lanes, np.mean(RESPONSES), atol=1e-5)


def test_newton_from_a_bad_start_still_climbs():
    rng = np.random.default_rng(5)
    u = rng.exponential(size=(60, 1)) ** 2
    y = rng.poisson(np.exp(np.minimum(0.5 * u, 6)))
    model = one(jaxem.emissions.PoissonRegression, [[[-1.0]]], [[-6.0]])
    solution = fitted(model, arrays(u, y))
    assert solution.result == jaxem.RESULTS.converged
    assert np.all(np.diff(solution.history[: solution.num_steps + 1]) > -1e-8)


def test_the_guard_is_for_local_statistics_alone():
    from jaxem.models._base import local_part

    assert not local_part(CASES["linear-regression"]().model)
    logistic = CASES["logistic-regression"]().model
    assert local_part(logistic)
    assert local_part(jaxem.HMM([0.5, 0.5], np.full((2, 2), 0.5), logistic.components))
    parts = jaxem.emissions.Independent(
        [jaxem.emissions.Poisson([[1.0], [2.0]]), logistic.components]
    )
    assert local_part(jaxem.Mixture([0.5, 0.5], parts))


# Derivatives: see test_adjoints.py as well


def test_gradient_with_respect_to_an_intercept_that_is_frozen():
    case = CASES["linear-regression"]()
    model = jaxem.freeze(case.model, "components.intercept")

    def value(t):
        moved = eqx.tree_at(
            lambda m: m.components.intercept, model, model.components.intercept + t[:, None]
        )
        solution = jaxem.fit(moved, case.data, tol=1e-13, max_steps=5000)
        return jnp.sum(jnp.sin(solution.model.log_prob(case.data))) + solution.objective

    agree(*gradient_and_difference(value, jnp.zeros(2)), 1e-6)


# Offsets and precision


def lines(offset, scale, dtype=jnp.float32):
    rng = np.random.default_rng(6)
    u = scale * rng.normal(size=(3000, 1))
    z = np.arange(3000) % 2
    y = np.where(z == 0, 1.5 * u[:, 0], 4 * scale - u[:, 0]) + 0.4 * scale * rng.normal(size=3000)
    return jnp.asarray(offset + u, dtype), jnp.asarray(offset + y[:, None], dtype)


@pytest.mark.parametrize(("offset", "scale"), [(0.0, 1.0), (1e3, 0.1), (1e3, 1.0), (1e4, 1.0)])
def test_float32_at_an_offset(offset, scale):
    data = lines(offset, scale)
    start = jaxem.Mixture.init(jax.random.key(0), data, 2, jaxem.emissions.LinearRegression)
    wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), (start, data))
    single, double = jaxem.fit(start, data), jaxem.fit(*wide, tol=1e-7)
    assert single.result == double.result == jaxem.RESULTS.converged
    assert abs(float(single.objective) - float(double.objective)) / 3000 < 1e-4
    a, b = single.model.components, double.model.components
    np.testing.assert_allclose(a.coefficients, b.coefficients, rtol=1e-3)
    np.testing.assert_allclose(a.covariance, b.covariance, rtol=3e-3)
    gap = np.asarray(a.predict(data[0]), float) - np.asarray(b.predict(wide[1][0]))
    assert np.max(np.abs(gap)) < 1e-2 * scale
    right = np.sort(np.ravel(b.coefficients))
    np.testing.assert_allclose(right, [-1.0, 1.5], atol=0.06)


def test_a_start_that_knows_nothing_of_the_offset_in_float32():
    data = lines(1e3, 0.1)
    start = jaxem.emissions.LinearRegression(
        [[[1.0]], [[-0.5]]], [[0.0], [1500.0]], np.full((2, 1, 1), 0.05)
    )
    start = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), jaxem.Mixture([0.5, 0.5], start))
    solution = jaxem.fit(start, data)
    assert solution.result == jaxem.RESULTS.converged
    np.testing.assert_allclose(
        np.sort(np.ravel(solution.model.components.coefficients)), [-1, 1.5], atol=0.06
    )


@pytest.mark.parametrize("name", ["logistic-regression", "poisson-regression"])
def test_float32_of_link_functions_at_an_offset(name):
    case = CASES[name]()
    u, y = case.data
    offset = 1e3
    c = case.model.components
    moved = eqx.tree_at(
        lambda m: (m.components.intercept, m.components.inputs.mean),
        case.model,
        (c.intercept - offset * jnp.sum(c.coefficients, axis=2), c.inputs.mean + offset),
    )
    prior = case.model.prior(components=case.model.components.prior(precision=1.0))
    options = dict(max_steps=60, tol=0.0)
    right = jaxem.fit(case.model, (u, y), prior=prior, **options)
    cast = functools.partial(
        jax.tree.map, lambda a: a.astype(jnp.float32) if a.dtype == float else a
    )
    single = jaxem.fit(cast(moved), cast((u + offset, y)), prior=cast(prior), **options)
    assert abs(single.log_likelihood - right.log_likelihood) / N < 1e-3
    np.testing.assert_allclose(
        single.model.components.coefficients, right.model.components.coefficients, atol=5e-3
    )


def test_nothing_changes_when_inputs_and_outputs_are_rescaled():
    model, (u, y), *_ = CASES["linear-regression"]()
    c = model.components
    scale = np.array([1e6, 1e-3])
    intercept = (
        10 * c.intercept + 5 - 10 * jnp.sum(c.coefficients * np.array([7.0, -3.0]) / scale, axis=2)
    )
    other = jaxem.emissions.LinearRegression(
        10 * c.coefficients / scale, intercept, 100 * c.covariance
    )
    plain = jaxem.fit(model, (u, y))
    moved = jaxem.fit(
        jaxem.Mixture(model.weights, other), (u * scale + np.array([7.0, -3.0]), 10 * y + 5)
    )
    assert abs(int(moved.num_steps) - int(plain.num_steps)) <= 1
    np.testing.assert_allclose(
        moved.model.components.coefficients * scale / 10,
        plain.model.components.coefficients,
        rtol=1e-6,
    )
    np.testing.assert_allclose(moved.objective + N * np.log(10), plain.objective, rtol=1e-9)


# Inputs that do not tell


@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        ("linear", jnp.float32),
        ("linear", jnp.float64),
        ("logistic", jnp.float32),
        ("poisson", jnp.float64),
    ],
)
def test_collinear_and_constant_inputs(family, dtype):
    """Predictions are those without the redundant inputs; coefficients that nothing tells stay."""
    rng = np.random.default_rng(7)
    u = rng.normal(size=(80, 1)) + 5
    design = np.concatenate([u, 2 * u - 3, np.full_like(u, 10.0)], axis=1)
    eta = 0.5 * u - 2
    y, build = {
        "linear": (
            eta + 0.3 * rng.normal(size=(80, 1)),
            lambda w: jaxem.emissions.LinearRegression(w, np.zeros((1, 1)), np.ones((1, 1, 1))),
        ),
        "logistic": (
            (rng.random((80, 1)) < 1 / (1 + np.exp(-eta))).astype(int),
            lambda w: jaxem.emissions.LogisticRegression(w, np.zeros((1, 1))),
        ),
        "poisson": (
            rng.poisson(np.exp(eta)),
            lambda w: jaxem.emissions.PoissonRegression(w, np.zeros((1, 1))),
        ),
    }[family]
    y = jnp.asarray(y, dtype if family == "linear" else int)

    def run(inputs, coefficients):
        model = jaxem.Mixture([1.0], build(coefficients))
        model = jax.tree.map(lambda leaf: leaf.astype(dtype), model)
        solution = jaxem.fit(model, (jnp.asarray(inputs, dtype), y))
        assert solution.result == jaxem.RESULTS.converged
        return solution.model.components.predict(jnp.asarray(inputs, dtype)), solution

    near = dict(rtol=1e-6, atol=1e-6) if dtype == jnp.float64 else dict(rtol=2e-3, atol=2e-3)
    alone, _ = run(u, np.zeros((1, 1, 1)))
    redundant, solution = run(design, np.array([[[0.0, 0.0, 0.25]]]))
    np.testing.assert_allclose(redundant, alone, **near)
    np.testing.assert_allclose(solution.model.components.coefficients[0, 0, 2], 0.25, rtol=1e-6)
    pooled = jaxem.Mixture.init(
        jax.random.key(0), (jnp.asarray(design, dtype), y), 1, type(solution.model.components)
    )
    assert jnp.isfinite(jaxem.fit(pooled, (jnp.asarray(design, dtype), y)).objective)


def test_a_component_on_too_few_units_is_degenerate():
    for name in cases("regression"):
        model, data, *_ = CASES[name]()
        model = eqx.tree_at(lambda m: m._weights.logits, model, jnp.array([0.0, -800.0]))
        statistics, _ = eqx.filter_jit(model.e_step)(data)
        flags = eqx.filter_jit(model.components.degenerate)(statistics.sums[1])
        assert np.asarray(flags).tolist() == [False, True]
        moved = maximum(model.components, statistics.sums[1])
        np.testing.assert_allclose(
            moved.coefficients[1], model.components.coefficients[1], rtol=1e-12
        )
        np.testing.assert_allclose(moved.intercept[1], model.components.intercept[1], rtol=1e-12)
        assert not np.allclose(moved.intercept[0], model.components.intercept[0])


def test_a_perfect_fit_is_degenerate():
    u = jnp.asarray(INPUTS)
    y = jnp.concatenate([u[:, :1] * 2 + 1, jnp.asarray(RESPONSES)], axis=1)
    start = one(
        jaxem.emissions.LinearRegression, np.zeros((1, 2, 2)), np.zeros((1, 2)), np.eye(2)[None]
    )
    solution = jaxem.fit(start, (u, y), throw=False)
    assert solution.result == jaxem.RESULTS.degenerate


# Starts, draws, errors


@pytest.mark.parametrize("name", cases("regression"))
def test_restarts_find_the_maximum(name):
    model, data, *_ = CASES[name]()
    family = type(model.components)
    keys = jax.random.split(jax.random.key(0), 4)
    starts = jax.vmap(lambda key: jaxem.Mixture.init(key, data, 2, family))(keys)
    assert np.ptp(np.asarray(starts.components.intercept)[:, 0]) > 0
    options = dict(max_steps=200, tol=1e-8)
    best = jaxem.best(jaxem.fit_restarts(starts, data, **options))
    right = jaxem.fit(model, data, throw=False, **options)
    assert best.objective > right.objective - 0.1


def test_draws_have_the_regression():
    rng = np.random.default_rng(8)
    u = jnp.asarray(rng.normal(size=(40_000, 2)))
    z = jnp.arange(40_000) % 2
    for name in cases("regression"):
        c = CASES[name]().model.components
        inputs, y = eqx.filter_jit(c.sample)(jax.random.key(1), z, u)
        c.check((inputs, y))
        mean = np.take_along_axis(np.asarray(c.predict(u)), np.asarray(z)[:, None, None], 1)[:, 0]
        residual = np.asarray(y) - mean
        deviation = residual.std(0)
        assert np.all(np.abs(residual.mean(0)) < 5 * deviation / 200)
        assert np.all(np.abs(u.T @ residual / 40_000) < 5 * deviation / 200)
        with pytest.raises(ValueError, match="no distribution of its inputs"):
            CASES[name]().model.sample(jax.random.key(0), 3)


@pytest.mark.parametrize("name", cases("regression"))
def test_data_of_the_wrong_shape_are_refused(name):
    model, (u, y), *_ = CASES[name]()
    wrong: list[tuple[Any, str]] = [
        (u, "tuple of inputs"),
        ((u,), "tuple of inputs"),
        ((u[:, :1], y), r"expects data of shape \(n, 2\)"),
        ((u, jnp.concatenate([y, y], axis=1)), "expects data of shape"),
        ((u.astype(jnp.float32), y), "float32"),
        ((u[:5], y), "disagree on the number of observations"),
    ]
    for data, message in wrong:
        with pytest.raises(ValueError, match=message):
            model.log_prob(data)
    for data in [
        (u.at[0, 0].set(jnp.nan), y),
        (u, y.at[0].set(-5 if y.dtype != float else jnp.nan)),
    ]:
        assert jaxem.fit(model, data, throw=False).result == jaxem.RESULTS.invalid_data
    if name == "poisson-regression":
        bad = (u, y, jnp.ones((N, 1)).at[3].set(0.0))
        assert jaxem.fit(model, bad, throw=False).result == jaxem.RESULTS.invalid_data


@pytest.mark.parametrize(
    "build",
    [
        lambda: jaxem.emissions.LinearRegression(
            np.zeros((2, 1)), np.zeros((2, 1)), np.ones((2, 1, 1))
        ),
        lambda: jaxem.emissions.LinearRegression(
            np.zeros((2, 1, 1)), np.zeros(2), np.ones((2, 1, 1))
        ),
        lambda: jaxem.emissions.LinearRegression(
            np.zeros((2, 1, 1)), np.zeros((2, 1)), -np.ones((2, 1, 1))
        ),
        lambda: jaxem.emissions.LinearRegression(np.zeros((2, 1, 1)), np.zeros((2, 1)), np.ones(2)),
        lambda: jaxem.emissions.LogisticRegression(np.full((1, 1, 1), np.nan), np.zeros((1, 1))),
        lambda: jaxem.emissions.PoissonRegression(np.zeros((1, 1, 1)), np.zeros((2, 1))),
    ],
)
def test_constructors_refuse_what_is_no_parameter(build):
    with pytest.raises(ValueError):
        build()


# Hidden Markov models of regressions, autoregression


def autoregression(num_sequences, num_steps, seed=0):
    rng = np.random.default_rng(seed)
    slope, level, deviation = np.array([0.95, -0.6]), np.array([0.3, 2.0]), np.array([0.5, 1.0])
    x, z = np.zeros((num_sequences, num_steps, 1)), np.zeros((num_sequences, num_steps), int)
    for t in range(1, num_steps):
        stay = rng.random(num_sequences) < 0.95
        z[:, t] = np.where(stay, z[:, t - 1], 1 - z[:, t - 1])
        noise = deviation[z[:, t]] * rng.normal(size=num_sequences)
        x[:, t, 0] = slope[z[:, t]] * x[:, t - 1, 0] + level[z[:, t]] + noise
    return x, z


def test_lagged_holds_the_steps_before():
    values = np.arange(2 * 5 * 2, dtype=float).reshape(2, 5, 2)
    observed = np.array([[True] * 5, [True, True, False, True, True]])
    inputs = np.arange(10.0).reshape(2, 5, 1)
    sequences = jaxem.Sequences(values, np.array([5, 4]), observed=observed, inputs=inputs)
    two = sequences.lagged(2)
    lags, x = two.values
    np.testing.assert_array_equal(x, values[:, 2:])
    np.testing.assert_array_equal(lags[:, :, :2], values[:, 1:4])
    np.testing.assert_array_equal(lags[:, :, 2:], values[:, :3])
    np.testing.assert_array_equal(two.lengths, [3, 2])
    np.testing.assert_array_equal(two.observed, [[True] * 3, [False] * 3])
    np.testing.assert_array_equal(sequences.lagged(1).observed[1], [True, False, False, True])
    np.testing.assert_array_equal(two.inputs, inputs[:, 2:])
    plain = jaxem.Sequences(values).lagged(1)
    assert plain.lengths is None and plain.observed is None and plain.inputs is None
    for wrong in (0, 5, True, 1.0):
        with pytest.raises(ValueError, match="order"):
            sequences.lagged(wrong)
    with pytest.raises(ValueError, match="no more than the 4"):
        sequences.lagged(4)
    with pytest.raises(ValueError, match="one array"):
        plain.lagged(1)


def test_autoregressive_likelihood_by_hand():
    """Σ over all paths of P(path) Π N(xₜ; φ xₜ₋₁ + b, σ²), for two sequences."""
    x, _ = autoregression(2, 5)
    slope, level, variance = np.array([0.8, -0.5]), np.array([0.1, 1.0]), np.array([0.6, 1.3])
    initial, matrix = np.array([0.7, 0.3]), np.array([[0.9, 0.1], [0.2, 0.8]])
    emission = jaxem.emissions.LinearRegression(
        slope[:, None, None], level[:, None], variance[:, None, None]
    )
    model = jaxem.HMM(initial, matrix, emission)
    by_hand = np.zeros(2)
    for path in itertools.product(range(2), repeat=4):
        path = np.array(path)
        chance = initial[path[0]] * np.prod(matrix[path[:-1], path[1:]])
        mean = slope[path] * x[:, :-1, 0] + level[path]
        by_hand += chance * stats.norm.pdf(x[:, 1:, 0], mean, np.sqrt(variance[path])).prod(1)
    lagged = jaxem.Sequences(x).lagged(1)
    np.testing.assert_allclose(model.log_prob(lagged), np.log(by_hand), rtol=1e-12)


def test_autoregression_is_recovered():
    x, z = autoregression(8, 250)
    data = jaxem.Sequences(x).lagged(1)
    keys = jax.random.split(jax.random.key(0), 3)
    starts = jax.vmap(lambda key: jaxem.HMM.init(key, data, 2, jaxem.emissions.LinearRegression))(
        keys
    )
    best = jaxem.best(jaxem.fit_restarts(starts, data, tol=1e-8))
    assert best.result == jaxem.RESULTS.converged
    model = best.model
    order = np.argsort(-np.ravel(model.emission.coefficients))
    c = model.emission
    np.testing.assert_allclose(np.ravel(c.coefficients)[order], [0.95, -0.6], atol=0.05)
    np.testing.assert_allclose(np.ravel(c.intercept)[order], [0.3, 2.0], atol=0.2)
    np.testing.assert_allclose(np.sqrt(np.ravel(c.covariance))[order], [0.5, 1.0], atol=0.06)
    np.testing.assert_allclose(np.diag(model.transition.matrix), 0.95, atol=0.03)
    states = np.argsort(order)[np.asarray(model.viterbi(data)[0])]
    assert np.mean(states == z[:, 1:]) > 0.9


def two_lines(**settings):
    """Two outputs on three inputs that lie far from 0, one coefficient of each known."""
    rng = np.random.default_rng(6)
    u = rng.normal(size=(200, 3)) @ rng.normal(size=(3, 3)) + [100.0, 5.0, -3.0]
    y = u @ [[0.5, 0.1], [-0.2, 0.0], [0.3, 1.0]] + rng.normal(size=(200, 2)) * [1.0, 0.3]
    known = [[[0.4, 0.0, 0.0], [0.0, 0.7, 0.0]]]
    return jaxem.emissions.LinearRegression(
        known, [[1.0, 2.0]], [np.diag([1.0, 4.0])], **settings
    ), (u, y)


KNOWN = np.array([[True, False, False], [False, True, False]])


@pytest.mark.parametrize(("intercept", "free"), [(None, 7), ([True, False], 6), ([True, True], 5)])
def test_single_elements_are_frozen(intercept, free):
    """Of what is free the score is zero, and all else is as it was."""
    model, data = two_lines(diagonal=True)
    model = jaxem.freeze(model, "coefficients", mask=KNOWN)
    model = jaxem.freeze(model, "covariance", mask=[[False, True]])
    if intercept is not None:
        model = jaxem.freeze(model, "intercept", mask=intercept)
    assert model.num_free_parameters == free
    solution = jaxem.fit(model, data)
    assert solution.converged
    fitted, (u, y) = solution.model, data
    np.testing.assert_array_equal(fitted.coefficients[0][KNOWN], [0.4, 0.7])
    np.testing.assert_allclose(fitted.covariance[0, 1, 1], 4.0, rtol=1e-15)
    still = np.zeros(2, bool) if intercept is None else np.array(intercept)
    np.testing.assert_array_equal(fitted.intercept[0][still], np.array([1.0, 2.0])[still])
    for i in range(2):
        left = y[:, i] - u @ fitted.coefficients[0, i] - fitted.intercept[0, i]
        slopes = np.where(KNOWN[i], 0, left @ (u - np.mean(u, axis=0) * (not still[i])))
        np.testing.assert_allclose(slopes, 0, atol=1e-8)
        assert still[i] or abs(np.sum(left)) < 1e-9
        if i == 0:
            np.testing.assert_allclose(fitted.covariance[0, 0, 0], np.mean(left**2), rtol=1e-9)


def test_masks_of_elements_are_shown_counted_and_refused():
    model, data = two_lines()
    with pytest.raises(ValueError, match="independent residuals: make it .*, or freeze them alike"):
        jaxem.freeze(model, "coefficients", mask=KNOWN)
    with pytest.raises(ValueError, match="elements of 'covariance' need independent residuals"):
        jaxem.freeze(model, "covariance", mask=[True, False])
    with pytest.raises(ValueError, match=r"or the shape \(1, 2, 3\) of single elements"):
        jaxem.freeze(model, "coefficients", mask=[True, False])
    with pytest.raises(ValueError, match="one for each component"):
        jaxem.freeze(jaxem.emissions.Poisson([[1.0, 2.0]]), "rate", mask=[[True, False]])
    column = jaxem.freeze(model, "coefficients", mask=[[False, True, False]] * 2)
    assert column.num_free_parameters == 9
    assert "frozen where [[[0, 1, 0], [0, 1, 0]]]" in repr(column)
    (u, y), fitted = data, jaxem.fit(column, data).model
    others = np.column_stack([u[:, [0, 2]], np.ones(200)])
    own = np.linalg.lstsq(others, y - u[:, [1]] * [0.0, 0.7], rcond=None)[0]
    np.testing.assert_allclose(fitted.coefficients[0][:, [0, 2]], own[:2].T, rtol=1e-8)
    assert jaxem.freeze(model, "intercept", mask=[True, True]).frozen == (("intercept", None),)
