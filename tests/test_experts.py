"""Mixtures with weights from covariates: gates, mixtures of experts, latent classes."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import CASES, GATES, INPUTS, RESPONSES
from scipy.optimize import minimize
from scipy.special import log_softmax, logsumexp

import jaxem
from jaxem import MixtureOfExperts
from jaxem.factors import LogisticGate

V, U, Y = (jnp.asarray(a) for a in (GATES, INPUTS, RESPONSES))


def test_weights_are_those_of_a_multinomial_logistic_regression():
    rng = np.random.default_rng(0)
    coefficients, intercept, v = (
        rng.normal(size=(3, 2)),
        rng.normal(size=3),
        rng.normal(size=(5, 2)),
    )
    gate = LogisticGate(coefficients, intercept)
    np.testing.assert_allclose(
        gate.log_weights(v), log_softmax(v @ coefficients.T + intercept, axis=1)
    )
    np.testing.assert_allclose(gate.intercept, intercept - intercept[-1])
    np.testing.assert_allclose(gate.coefficients, coefficients - coefficients[-1])


def test_statistics_are_score_and_curvature_of_the_gate():
    """Of known components: the Newton step is that of the multinomial log-likelihood."""
    model = CASES["experts"]().model
    labels = jnp.arange(len(V)) % 2
    w = jnp.asarray(np.random.default_rng(1).gamma(2.0, 0.5, len(V)))
    gate = model.gate

    def log_likelihood(numbers):
        moved = gate.intercepts + jnp.stack([numbers[0], 0]), gate.slopes.at[0].add(numbers[1:])
        logits = V @ moved[1].T + moved[0]
        return jnp.sum(w * jax.nn.log_softmax(logits)[jnp.arange(len(V)), labels])

    data = (V, ((U, Y), labels[:, None]))
    known = jaxem.emissions.Independent([model.components, jaxem.emissions.Labels(2)])
    sums, _ = MixtureOfExperts(gate, known).e_step(data, w)[0].sums
    zero = jnp.zeros(3)
    about = sums.quadratic
    np.testing.assert_allclose(about.score[:3], jax.grad(log_likelihood)(zero), rtol=1e-10)
    hessian = jax.hessian(log_likelihood)(zero)
    np.testing.assert_allclose(about.curvature.matrix[:3, :3], -hessian, rtol=1e-10)
    np.testing.assert_allclose(about.count, jnp.sum(w), rtol=1e-12)


def test_without_covariates_it_is_a_mixture():
    mixture = jaxem.Mixture([0.4, 0.6], CASES["experts"]().model.components)
    start = MixtureOfExperts.from_mixture(mixture, 1)
    data = (jnp.zeros((len(V), 1)), (U, Y))  # a covariate that does not vary
    np.testing.assert_allclose(start.e_step(data)[1], mixture.e_step((U, Y))[1], rtol=1e-12)
    plain = jaxem.fit(mixture, (U, Y), tol=1e-12)
    gated = jaxem.fit(start, data, tol=1e-12)
    np.testing.assert_allclose(gated.objective, plain.objective, rtol=1e-10)
    weights = jax.nn.softmax(gated.model.gate.intercept)
    np.testing.assert_allclose(weights, plain.model.weights, atol=1e-6)


def test_a_fit_is_the_maximum_that_another_optimiser_finds():
    case = CASES["experts"]()
    solution = jaxem.fit(case.model, case.data, tol=1e-12)

    def minus(numbers):
        gate, lines, log_scale = numbers[:3], numbers[3:9].reshape(2, 3), numbers[9:]
        logits = np.column_stack([gate[0] + V @ gate[1:], np.zeros(len(V))])
        mean = lines[:, 0] + np.asarray(U) @ lines[:, 1:].T
        density = -0.5 * ((Y - mean) / np.exp(log_scale)) ** 2 - log_scale - 0.5 * np.log(2 * np.pi)
        return -np.sum(logsumexp(log_softmax(logits, axis=1) + density, axis=1))

    fitted = solution.model
    c = fitted.components
    numbers = np.concatenate(
        [
            [fitted.gate.intercept[0]],
            fitted.gate.coefficients[0],
            np.column_stack([c.intercept, c.coefficients[:, 0]]).ravel(),
            0.5 * np.log(c.covariance[:, 0, 0]),
        ]
    )
    assert -minus(numbers) == pytest.approx(float(solution.objective), rel=1e-12)
    nearby = numbers + 0.05 * np.random.default_rng(0).normal(size=len(numbers))
    found = minimize(minus, nearby, tol=1e-10)
    assert -found.fun <= float(solution.objective) + 1e-8
    np.testing.assert_allclose(found.x, numbers, atol=1e-3)


@pytest.mark.parametrize(("offset", "scale"), [(1e4, 1.0), (0.0, 1e5), (-3e3, 1e-1)])
def test_covariates_may_lie_anywhere_in_float32(offset, scale):
    rng = np.random.default_rng(0)
    v = rng.normal(size=(600, 1))
    x = np.where(rng.random((600, 1)) < 1 / (1 + np.exp(-1.5 * v)), -2, 2) + rng.normal(
        size=v.shape
    )

    def end(v, x):
        parts = jaxem.emissions.SphericalGaussian(
            np.array([[-1], [1]], x.dtype), np.ones(2, x.dtype)
        )
        start = LogisticGate(np.zeros((2, 1), x.dtype), np.zeros(2, x.dtype))
        return jaxem.fit(MixtureOfExperts(start, parts), (v, x))

    far = (scale * v + offset).astype(np.float32)  # its own rounding is no defect of the fit's
    exact = end((far.astype(float) - offset) / scale, x)
    fitted = end(far, x.astype(np.float32))
    assert fitted.result == jaxem.RESULTS.converged
    np.testing.assert_allclose(fitted.objective, exact.objective, rtol=1e-5)
    np.testing.assert_allclose(
        scale * fitted.model.gate.coefficients[0], exact.model.gate.coefficients[0], 2e-3
    )


def test_a_frozen_intercept_stays_where_covariates_are_zero():
    x = CASES["experts"]().data[1]
    model = jaxem.freeze(CASES["experts"]().model, "gate.intercept")
    far = (V + 3.0, x)
    fitted = jaxem.fit(model, far, tol=1e-12, max_steps=5_000)
    climb = jaxem.EM(maximization=jaxem.em.Gradient(optax.lbfgs(), 20, objective=True))
    other = jaxem.fit(model, far, climb, tol=1e-12, max_steps=5_000)
    np.testing.assert_allclose(fitted.model.gate.intercept, model.gate.intercept, atol=1e-12)
    np.testing.assert_allclose(fitted.objective, other.objective, rtol=1e-9)


def test_latent_classes_with_covariates_are_recovered():
    """Of 4,000 observations with five binary items, whose class depends on a covariate."""
    gate = LogisticGate([[1.5], [0.0]], [0.5, 0.0])
    shares = np.array([[0.9, 0.8, 0.85, 0.7, 0.9], [0.2, 0.3, 0.1, 0.4, 0.2]])
    items = jaxem.emissions.Bernoulli(shares)
    v = jax.random.normal(jax.random.key(0), (4000, 1))
    x, z = MixtureOfExperts(gate, items).sample(jax.random.key(1), v)
    guess = 0.2 + 0.6 * jax.nn.one_hot(1 - x[:, 0], 2)
    start = jaxem.Mixture.from_responsibilities(x, guess, jaxem.emissions.Bernoulli)
    solution = jaxem.fit(MixtureOfExperts.from_mixture(start, 1), (v, x))
    assert solution.status == "converged"
    errors = jaxem.inference.standard_errors(solution, (v, x))
    fitted, errors = solution.model.gate, errors["gate"]
    assert abs(fitted.coefficients[0, 0] - 1.5) < 4 * errors["coefficients"][0, 0]
    assert abs(fitted.intercept[0] - 0.5) < 4 * errors["intercept"][0]
    np.testing.assert_allclose(solution.model.components.probability, shares, atol=0.05)
    assert float(jnp.mean(solution.model.predict((v, x)) == z)) > 0.9


def test_separated_components_need_the_prior_that_keeps_them_finite():
    v = jnp.linspace(-1, 1, 40)[:, None]
    x = jnp.where(v > 0, 8.0, -8.0) + 0.1 * jnp.sin(40 * v)
    start = MixtureOfExperts(
        LogisticGate([[0.0], [0.0]], [0.0, 0.0]),
        jaxem.emissions.Gaussian([[-7.0], [7.0]], np.ones((2, 1, 1))),
    )
    prior = start.prior(gate=start.gate.prior(precision=0.5))
    solution = jaxem.fit(start, (v, x), prior=prior)
    assert solution.status == "converged"
    assert 2 < abs(float(solution.model.gate.coefficients[0, 0])) < 20
    # the two slopes of one contrast share what the prior pulls
    np.testing.assert_allclose(jnp.sum(solution.model.gate.slopes), 0, atol=1e-6)


def test_the_prior_of_a_gate_is_normal_about_its_law():
    gate = LogisticGate([[0.5, -1.0], [0.2, 0.3]], [0.1, -0.4])
    law = {"coefficients": [[1.0, 0.0], [-1.0, 0.5]], "intercept": [0.3, -0.2]}
    prior = gate.prior(precision=[2.0, 0.5], intercept_precision=3.0, **law)

    def value(gate):
        return gate.expected_log_prob(prior.at(gate).sums)

    def by_hand(gate):
        slopes = (gate.slopes - jnp.array(law["coefficients"])) ** 2 * jnp.array([2.0, 0.5])
        levels = 3 * (gate.intercepts - jnp.array(law["intercept"])) ** 2
        return -0.5 * (jnp.sum(slopes) + jnp.sum(levels))

    other = LogisticGate([[0.0, 2.0], [1.0, 0.0]], [1.0, 0.0])
    found, expected = value(other) - value(gate), by_hand(other) - by_hand(gate)
    np.testing.assert_allclose(found, expected, rtol=1e-10)


def test_parts_of_a_gate_are_held():
    case = CASES["experts"]()
    model = jaxem.freeze(case.model, "gate.coefficients", mask=[True, False])
    fitted = jaxem.fit(model, case.data).model
    assert bool(jnp.all(fitted.gate.slopes[0] == model.gate.slopes[0]))
    free = jaxem.fit(case.model, case.data).objective
    frozen = jaxem.fit(jaxem.freeze(case.model, "gate.coefficients", "gate.intercept"), case.data)
    assert float(frozen.objective) < float(free) - 1e-3
    assert frozen.model.gate.num_free_parameters == 0
    assert case.model.gate.num_free_parameters == 3


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: LogisticGate([1.0, 2.0], [0.0, 0.0]), "coefficients"),
        (lambda: LogisticGate([[1.0], [2.0]], [0.0]), "intercept"),
        (lambda: LogisticGate([[np.nan], [2.0]], [0.0, 0.0]), "NaN"),
        (
            lambda: MixtureOfExperts([0.5, 0.5], jaxem.emissions.Poisson([[1.0], [2.0]])),
            "LogisticGate",
        ),
        (lambda: MixtureOfExperts(LogisticGate(np.zeros((2, 1)), np.zeros(2)), 3), "emission"),
        (
            lambda: MixtureOfExperts(
                LogisticGate(np.zeros((3, 1)), np.zeros(3)), jaxem.emissions.Poisson([[1.0], [2.0]])
            ),
            "3 components",
        ),
        (lambda: jaxem.fit(CASES["experts"]().model, (U, Y)), "covariates|expects a tuple"),
        (lambda: jaxem.fit(CASES["experts"]().model, U), r"expects a tuple \(v, x\) of covariates"),
        (lambda: jaxem.fit(CASES["experts"]().model, (V[:, :1], (U, Y))), "2"),
        (lambda: MixtureOfExperts.from_mixture(CASES["experts"]().model, 1), "expects a Mixture"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_covariates_that_are_not_finite_are_reported():
    case = CASES["experts"]()
    spoilt = (case.data[0].at[3, 0].set(jnp.nan), case.data[1])
    solution = jaxem.fit(case.model, spoilt, throw=False)
    assert solution.status == "invalid_data"
    sample_weight = jnp.ones(len(V)).at[3].set(0.0)
    assert bool(jnp.isfinite(jaxem.fit(case.model, spoilt, sample_weight=sample_weight).objective))
