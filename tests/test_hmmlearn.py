"""The same numbers as hmmlearn and dynamax, from the same start."""

import functools
import warnings

import equinox as eqx
import jax.numpy as jnp
import numpy as np
import pytest

import jaxem
from jaxem import HMM, Sequences

K, D, M = 3, 2, 4
LENGTHS = {"one": [60], "several": [25, 8, 1, 26]}
STEPS = 5

_rng = np.random.default_rng(0)
_path = np.cumsum(_rng.random(60) < 0.3) % K
POINTS = _rng.normal(size=(60, D)) @ [[1.0, 0.5], [0.0, 0.8]] + 2.0 * _path[:, None]
CODES = np.where(_rng.random(60) < 0.6, _path, _rng.integers(0, M, 60))[:, None]
COUNTS = _rng.poisson(1 + 4 * _path[:, None] * np.array([1.0, 0.5]))

INITIAL = np.array([0.5, 0.3, 0.2])
MATRIX = np.array([[0.7, 0.2, 0.1], [0.1, 0.7, 0.2], [0.3, 0.1, 0.6]])
MEAN = np.array([[0.5, 0.0], [1.5, 2.5], [3.0, 4.5]])
FULL = np.array([[[1.0, 0.2], [0.2, 0.8]], [[1.5, -0.3], [-0.3, 0.9]], [[0.7, 0.0], [0.0, 1.2]]])
SHARES = np.array([[0.4, 0.3, 0.2, 0.1], [0.2, 0.4, 0.2, 0.2], [0.1, 0.1, 0.5, 0.3]])
RATE = np.array([[1.5, 1.0], [4.0, 3.0], [9.0, 5.0]])


@functools.cache
def hmmlearn():
    return pytest.importorskip("hmmlearn.hmm", reason="hmmlearn is not installed")


@functools.cache
def dynamax():
    with warnings.catch_warnings():  # TensorFlow Probability's own
        warnings.simplefilter("ignore")
        return pytest.importorskip("dynamax.hidden_markov_model", reason="dynamax is not installed")


def gaussian(kind, covariance):
    def peer(**options):
        neutral = dict(min_covar=0, means_weight=0, covars_prior=0, covars_weight=0)
        found = hmmlearn().GaussianHMM(K, kind, **neutral, **options)
        found.n_features, found.means_, found._covars_ = D, MEAN, covariance
        return found

    return peer


def categorical(**options):
    found = hmmlearn().CategoricalHMM(K, n_features=M, **options)
    found.emissionprob_ = SHARES
    return found


def poisson(**options):
    found = hmmlearn().PoissonHMM(K, lambdas_prior=0, lambdas_weight=0, **options)
    found.n_features, found.lambdas_ = D, RATE
    return found


VARIANCE = np.diagonal(FULL, axis1=1, axis2=2)
# Our emission, the steps, hmmlearn's model, and where it keeps what ours calls so
KINDS = {
    "full": (jaxem.emissions.Gaussian(MEAN, FULL), POINTS, gaussian("full", FULL), "covariance"),
    "tied": (
        jaxem.emissions.TiedGaussian(MEAN, FULL[0]),
        POINTS,
        gaussian("tied", FULL[0]),
        "covariance",
    ),
    "diag": (
        jaxem.emissions.DiagonalGaussian(MEAN, VARIANCE),
        POINTS,
        gaussian("diag", VARIANCE),
        "variance",
    ),
    "spherical": (
        jaxem.emissions.SphericalGaussian(MEAN, VARIANCE[:, 0]),
        POINTS,
        gaussian("spherical", VARIANCE[:, 0]),
        "variance",
    ),
    "categorical": (
        jaxem.emissions.Categorical(SHARES[:, None]),
        CODES,
        categorical,
        "probability",
    ),
    "poisson": (jaxem.emissions.Poisson(RATE), COUNTS, poisson, "rate"),
}
CASES = [(kind, which) for kind in KINDS for which in LENGTHS]


@functools.cache
def fitted(kind, which, num_steps=STEPS):
    """hmmlearn's model and ours after the same number of steps, and their data."""
    emission, x, make, _ = KINDS[kind]
    peer = make(
        startprob_prior=1,
        transmat_prior=1,
        n_iter=num_steps,
        tol=-np.inf,
        init_params="",
        implementation="log",
    )
    peer.startprob_, peer.transmat_ = INITIAL, MATRIX
    data = Sequences.split(x, LENGTHS[which])
    ours = jaxem.fit(HMM(INITIAL, MATRIX, emission), data, tol=0.0, max_steps=STEPS)
    return peer.fit(x, LENGTHS[which]), ours, data


close = functools.partial(np.testing.assert_allclose, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_same_steps_as_hmmlearn(kind, which):
    peer, ours, _ = fitted(kind, which)
    close(ours.history[:STEPS], peer.monitor_.history)
    close(ours.model.initial, peer.startprob_)
    close(ours.model.transition.matrix, peer.transmat_)
    emission, (*_, spread) = ours.model.emission, KINDS[kind]
    if kind == "categorical":
        close(emission.probability[:, 0], peer.emissionprob_)
    elif kind == "poisson":
        close(emission.rate, peer.lambdas_)
    else:
        close(emission.mean, peer.means_)
        theirs = peer._covars_[:, 0] if kind == "spherical" else peer._covars_  # for each feature
        close(getattr(emission, spread), theirs)


@eqx.filter_jit
def said_of(model, data):
    return model.log_prob(data), model.responsibilities(data), model.viterbi(data)


def in_a_row(values, which):
    """What lies within the sequences, one behind the other."""
    return np.concatenate([row[:n] for row, n in zip(values, LENGTHS[which], strict=True)])


@pytest.mark.parametrize(("kind", "which"), CASES)
def test_same_answers_as_hmmlearn(kind, which):
    peer, ours, data = fitted(kind, which)
    _, x, *_ = KINDS[kind]
    log_prob, smoothed, (paths, best) = said_of(ours.model, data)
    total, theirs = peer.score_samples(x, LENGTHS[which])
    close(np.sum(log_prob), total)
    close(in_a_row(smoothed, which), theirs)
    top, states = peer.decode(x, LENGTHS[which], algorithm="viterbi")
    close(np.sum(best), top)
    np.testing.assert_array_equal(in_a_row(paths, which), states)
    decoded = peer.decode(x, LENGTHS[which], algorithm="map")[1]
    np.testing.assert_array_equal(in_a_row(ours.model.predict(data), which), decoded)


# dynamax finds posterior modes under priors of its own


def dynamax_gaussian():
    peer = dynamax().GaussianHMM(K, D, transition_matrix_stickiness=2.0)
    start = dict(emission_means=jnp.asarray(MEAN), emission_covariances=jnp.asarray(FULL))
    model = HMM(INITIAL, MATRIX, jaxem.emissions.Gaussian(MEAN, FULL))
    count = (D + 0.1) + D + 2  # ν₀ + d + 2
    emission = model.emission.prior(np.zeros(D), 1e-4, 1e-4 / count * np.eye(D), count)
    return peer, start, model, POINTS, emission


def dynamax_categorical():
    peer = dynamax().CategoricalHMM(K, 1, M, transition_matrix_stickiness=2.0)
    start = dict(emission_probs=jnp.asarray(SHARES[:, None]))
    model = HMM(INITIAL, MATRIX, jaxem.emissions.Categorical(SHARES[:, None]))
    return peer, start, model, CODES, model.emission.prior(0.1 * M, probability=1 / M)


@pytest.mark.filterwarnings("ignore:shape requires ndarray:DeprecationWarning")  # TFP's own
@pytest.mark.parametrize("make", [dynamax_gaussian, dynamax_categorical])
def test_same_steps_and_answers_as_dynamax(make):
    peer, start, model, x, emission = make()
    params, props = peer.initialize(
        initial_probs=jnp.asarray(INITIAL), transition_matrix=jnp.asarray(MATRIX), **start
    )
    batch = jnp.asarray(x).reshape(3, 20, -1)
    prior = model.prior(
        initial=0.1 * K, transition=model.transition.prior(0.1 * K, stay=2.0), emission=emission
    )
    ours = jaxem.fit(model, batch, prior=prior, tol=0.0, max_steps=STEPS)
    theirs, objectives = peer.fit_em(params, props, batch, num_iters=STEPS, verbose=False)
    # Theirs includes the normaliser of the prior.
    close(np.diff(objectives), np.diff(ours.history[:STEPS]))
    close(ours.model.initial, theirs.initial.probs)
    close(ours.model.transition.matrix, theirs.transitions.transition_matrix)
    if make is dynamax_gaussian:
        close(ours.model.emission.mean, theirs.emissions.means)
        close(ours.model.emission.covariance, theirs.emissions.covs)
    else:
        close(ours.model.emission.probability, theirs.emissions.probs)
    log_prob, smoothed, (paths, _) = said_of(ours.model, batch)
    for i, sequence in enumerate(batch):
        posterior = peer.smoother(theirs, sequence)
        close(log_prob[i], posterior.marginal_loglik)
        close(smoothed[i], posterior.smoothed_probs)
        np.testing.assert_array_equal(paths[i], peer.most_likely_states(theirs, sequence))
