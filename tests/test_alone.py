"""One emission is a model: fitted alone, and asked what fitted models are asked."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import COUNTS, POINTS, N

import jaxem
from jaxem.emissions import Gaussian, Poisson, StudentT

P, X = jnp.asarray(POINTS), jnp.asarray(COUNTS)
SCALE = jnp.array([[[1.0, 0.2], [0.2, 0.8]]])
T = jaxem.freeze(StudentT([[0.3, 0.1]], SCALE, [4.0]), "dof")


def test_a_gaussian_alone_is_mean_and_covariance():
    solution = jaxem.fit(Gaussian([[0.0, 0.0]], [np.eye(2)]), P)
    assert solution.converged and isinstance(solution.model, Gaussian)
    np.testing.assert_allclose(solution.model.mean[0], POINTS.mean(axis=0), rtol=1e-10)
    np.testing.assert_allclose(solution.model.covariance[0], np.cov(POINTS.T, bias=True), rtol=1e-9)


def test_it_is_a_mixture_of_one():
    alone = jaxem.fit(T, P)
    mixture = jaxem.fit(jaxem.Mixture([1.0], T), P)
    np.testing.assert_allclose(alone.objective, mixture.objective, rtol=1e-12)
    np.testing.assert_allclose(alone.model.mean, mixture.model.components.mean, rtol=1e-6)
    for criterion in (jaxem.inference.aic, jaxem.inference.bic, jaxem.inference.icl):
        np.testing.assert_allclose(criterion(alone, P), criterion(mixture, P), rtol=1e-10)
    own = jaxem.inference.standard_errors(alone, P)
    inner = jaxem.inference.standard_errors(mixture, P)["components"]
    assert own.keys() == inner.keys() == {"mean", "scale", "dof"}
    for name, errors in own.items():
        np.testing.assert_allclose(errors, inner[name], rtol=1e-5)
    rates = [jaxem.inference.convergence_rate(s, P).eigenvalues for s in (alone, mixture)]
    np.testing.assert_allclose(*rates, rtol=1e-6)


def test_names_are_the_emissions_own():
    solution = jaxem.fit(T, P)
    np.testing.assert_array_equal(solution.model.dof, [4.0])
    assert repr(solution.model).startswith("StudentT(")
    covariance = jaxem.inference.observed_information(solution, P).covariance()
    assert bool(covariance.frozen["dof"][0]) and not bool(covariance.undetermined["dof"][0])
    assert not bool(jnp.any(covariance.frozen["mean"]))
    rate = jaxem.inference.convergence_rate(solution, P)
    assert rate.direction.keys() == {"mean", "scale", "dof"}
    assert isinstance(rate.away(0.01), StudentT)


def test_weights_priors_and_every_algorithm():
    weight = jnp.linspace(0.5, 2.0, N)
    start = Poisson([[1.0, 1.0]])
    prior = start.prior(0.5, rate=4.0)
    expected = (2.0 + weight @ X) / (0.5 + jnp.sum(weight))
    for algorithm in (jaxem.EM(), jaxem.SQUAREM(), jaxem.Anderson()):
        found = jaxem.fit(start, X, algorithm, sample_weight=weight, prior=prior)
        np.testing.assert_allclose(found.model.rate[0], expected, rtol=1e-9)


def test_derivatives_and_influence():
    start = Gaussian([[0.3, 0.1]], SCALE)

    def mean(weight):
        return jaxem.fit(start, P, sample_weight=weight).model.mean[0, 0]

    ones, step = jnp.ones(N), 1e-4 * jnp.zeros(N).at[3].set(1)
    slope = jax.grad(mean)(ones)
    difference = (mean(ones + step) - mean(ones - step)) / 2e-4
    np.testing.assert_allclose(slope[3], difference, rtol=1e-3)
    fitted = jaxem.fit(start, P)
    told = jaxem.inference.influence(lambda m: m.mean[0, 0], fitted, P)
    np.testing.assert_allclose(told, slope, rtol=1e-3, atol=1e-8)


def test_densities_and_draws():
    model = jaxem.models.Alone(Poisson([[2.0, 5.0]]))
    log_prob = jax.scipy.stats.poisson.logpmf(X, jnp.array([2.0, 5.0])).sum(axis=1)
    np.testing.assert_allclose(model.log_prob(X), log_prob, rtol=1e-10)
    draws, z = model.sample(jax.random.key(0), 4000)
    assert draws.shape == (4000, 2) and not jnp.any(z)
    np.testing.assert_allclose(draws.mean(axis=0), [2.0, 5.0], rtol=0.05)


def test_many_starts():
    starts = jax.vmap(lambda r: Poisson(r[None]))(jnp.array([[1.0, 2.0], [5.0, 1.0]]))
    ends = jaxem.fit_restarts(starts, X)
    np.testing.assert_allclose(ends.model.rate[:, 0], np.tile(COUNTS.mean(axis=0), (2, 1)))


def test_several_components_need_weights():
    with pytest.raises(ValueError, match=r"has 2: several need weights, write jaxem.Mixture"):
        jaxem.fit(Poisson([[1.0, 2.0], [3.0, 4.0]]), X)
    with pytest.raises(ValueError, match="takes an emission, got int"):
        jaxem.models.Alone(3)
