"""The same numbers as scikit-learn, from the same start."""

import functools

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.cluster import KMeans
from sklearn.mixture import GaussianMixture

import jaxem

pytestmark = pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")

N, D, K = 400, 3, 3
SEEDS = (0, 3, 7)


# The family, what it calls its covariances, and identities in the shape that both sides take.
FAMILIES = {
    "full": (jaxem.emissions.Gaussian, "covariance", np.tile(np.eye(D), (K, 1, 1))),
    "tied": (jaxem.emissions.TiedGaussian, "covariance", np.eye(D)),
    "diag": (jaxem.emissions.DiagonalGaussian, "variance", np.ones((K, D))),
    "spherical": (jaxem.emissions.SphericalGaussian, "variance", np.ones(K)),
}
CASES = [(kind, seed) for kind in FAMILIES for seed in SEEDS]


@functools.cache
def problem(seed):
    """Units from random overlapping clusters, and random means to start from."""
    rng = np.random.default_rng(seed)
    mean = 4 * rng.normal(size=(K, D))
    factor = np.eye(D) + 0.5 * rng.normal(size=(K, D, D))
    z = rng.choice(K, N, p=rng.dirichlet(np.full(K, 5.0)))
    x = mean[z] + np.einsum("nij,nj->ni", factor[z], rng.normal(size=(N, D)))
    weights = rng.dirichlet(np.full(K, 10.0))
    return x, weights, mean + 0.5 * rng.normal(size=(K, D))


@functools.cache
def fitted(kind, seed, num_steps):
    """scikit-learn's mixture and ours after the same number of steps; to the end if None."""
    x, weights, mean = problem(seed)
    family, _, identity = FAMILIES[kind]
    peer = GaussianMixture(
        K,
        covariance_type=kind,
        reg_covar=0,
        tol=0,
        max_iter=num_steps or 300,
        weights_init=weights,
        means_init=mean,
        precisions_init=identity,
        init_params="random_from_data",
        random_state=0,
    ).fit(x)
    start = jaxem.Mixture(weights, family(mean, identity))
    tol, max_steps = (1e-13, 300) if num_steps is None else (0, num_steps)
    return peer, jaxem.fit(start, jnp.asarray(x), tol=tol, max_steps=max_steps)


def assert_same_model(model, peer, name):
    close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)
    close(model.weights, peer.weights_)
    close(model.components.mean, peer.means_)
    close(getattr(model.components, name), peer.covariances_)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_same_steps(kind, seed):
    x, _, _ = problem(seed)
    peer, ours = fitted(kind, seed, 7)
    assert ours.num_steps == 7
    assert_same_model(ours.model, peer, FAMILIES[kind][1])
    np.testing.assert_allclose(ours.history[6] / N, peer.lower_bound_, rtol=1e-10)
    np.testing.assert_allclose(ours.log_likelihood / N, peer.score(x), rtol=1e-10)


@pytest.mark.parametrize(("kind", "seed"), CASES)
def test_same_optimum(kind, seed):
    x, _, _ = problem(seed)
    peer, ours = fitted(kind, seed, None)
    assert ours.result == jaxem.RESULTS.converged
    assert ours.error < 1e-9
    assert_same_model(ours.model, peer, FAMILIES[kind][1])
    np.testing.assert_allclose(ours.log_likelihood / N, peer.score(x), rtol=1e-10)


@eqx.filter_jit
def said_of(model, x):
    return {
        "score_samples": model.log_prob(x),
        "predict_proba": model.responsibilities(x),
        "predict": model.predict(x),
        "aic": jaxem.inference.aic(model, x),
        "bic": jaxem.inference.bic(model, x),
    }


@pytest.mark.parametrize("kind", FAMILIES)
def test_same_answers(kind):
    """At a model far from converged, so that observations are shared among components."""
    peer, ours = fitted(kind, 0, 7)
    x, _, _ = problem(0)
    x = np.concatenate([x, 2 * x[::-1]])
    for method, value in said_of(ours.model, jnp.asarray(x)).items():
        theirs = getattr(peer, method)(x)
        np.testing.assert_allclose(value, theirs, rtol=1e-8, atol=1e-12, err_msg=method)


@pytest.mark.parametrize("seed", SEEDS)
def test_same_clusters(seed):
    x, _, centroids = problem(seed)
    peer = KMeans(K, init=centroids, n_init=1, algorithm="lloyd", tol=0, max_iter=300).fit(x)
    spheres = jaxem.emissions.SphericalGaussian(centroids, 1.0)
    start = jaxem.freeze(
        jaxem.Mixture(np.full(K, 1 / K), spheres), "weights", "components.variance"
    )
    ours = jaxem.fit(start, jnp.asarray(x), jaxem.EM(jaxem.em.Hard()))
    constant = N * (np.log(K) + 0.5 * D * np.log(2 * np.pi))
    assert ours.result == jaxem.RESULTS.converged
    np.testing.assert_allclose(ours.model.components.mean, peer.cluster_centers_, rtol=1e-12)
    np.testing.assert_allclose(-2 * (ours.objective + constant), peer.inertia_, rtol=1e-12)
    np.testing.assert_array_equal(ours.model.predict(jnp.asarray(x)), peer.labels_)
    np.testing.assert_array_equal(ours.statistics.sums[0], np.bincount(peer.labels_))
