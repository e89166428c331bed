"""Independent components: known sources, equivariance, conventions, endings."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.signal
from models import CASES

import jaxem
from jaxem.emissions import ICA

TIME = np.linspace(0, 8, 2000)
WAVES = np.column_stack(
    [np.sin(2 * TIME), np.sign(np.sin(3 * TIME)), scipy.signal.sawtooth(2 * np.pi * TIME)]
)
WAVES /= WAVES.std(axis=0)
MIXING = np.array([[1.0, 1.0, 1.0], [0.5, 2.0, 1.0], [1.5, 1.0, 2.0]])
X = jnp.asarray(WAVES @ MIXING.T)


def amari(matrix):
    """How far a matrix is from a scaled permutation, 0 to 1 (Amari, Cichocki & Yang 1996)."""
    size, n = np.abs(matrix), len(matrix)
    rows = np.sum(size / size.max(axis=1, keepdims=True), axis=1) - 1
    columns = np.sum(size / size.max(axis=0, keepdims=True), axis=0) - 1
    return (rows.sum() + columns.sum()) / (2 * n * (n - 1))


def fitted(x, key=0, **options):
    start = ICA.init(jax.random.key(key), x)
    return jaxem.fit(start, x, prior=start.prior(20.0), tol=1e-8, max_steps=2000, **options)


@pytest.fixture(scope="module")
def solution():
    return fitted(X)


def test_waves_are_unmixed(solution):
    """Gold case ica_three_sources: scikit-learn's FastICA reaches 0.0415, by its best contrast."""
    assert solution.converged
    assert amari(np.asarray(solution.model.unmixing[0]) @ MIXING) < 0.0415
    model = solution.model.standardized()
    found = np.corrcoef(model.sources(X)[:, 0].T, WAVES.T)[:3, 3:]
    assert np.all(np.sort(np.abs(found), axis=1)[:, 2] > 0.99)
    assert sorted(np.argmax(np.abs(found), axis=1)) == [0, 1, 2]


def test_standardized_is_the_same_law_in_units(solution):
    model = solution.model.standardized()
    np.testing.assert_allclose(
        model.log_prob(X, model.tilt()),
        solution.model.log_prob(X, solution.model.tilt()),
        rtol=1e-9,
    )
    y = np.asarray(model.sources(X)[:, 0])
    np.testing.assert_allclose(y.mean(axis=0), 0, atol=0.02)  # those of its law, which has a prior
    np.testing.assert_allclose(y.std(axis=0), 1, atol=0.02)
    np.testing.assert_allclose(y @ model.mixing[0].T + model.mean[0], X, atol=1e-10)
    twice = model.standardized()
    np.testing.assert_allclose(twice.unmixing, model.unmixing, rtol=1e-9)


def test_fits_do_not_depend_on_units(solution):
    turn = np.array([[2.0, 0.0, 1.0], [0.0, 1e3, 0.0], [1.0, -1.0, 1e-2]])
    moved = jnp.asarray(X @ turn.T + np.array([5.0, -1e4, 3.0]))
    start = ICA.init(jax.random.key(0), X)
    inverse = jnp.asarray(np.linalg.inv(turn))
    other = ICA(
        start.mean @ turn.T + np.array([5.0, -1e4, 3.0]),
        start.unmixing @ inverse,
        start.source_weights,
        start.source_mean,
        start.source_variance,
    )
    there = jaxem.fit(other, moved, prior=other.prior(20.0), tol=1e-8, max_steps=2000)
    log_det = np.log(np.abs(np.linalg.det(turn)))
    assert abs(int(there.num_steps) - int(solution.num_steps)) < 20
    np.testing.assert_allclose(there.objective + len(X) * log_det, solution.objective, rtol=1e-8)


def test_a_source_of_two_values_has_no_maximum():
    start = ICA.init(jax.random.key(0), X[::10])
    found = jaxem.fit(start, X[::10], max_steps=300, throw=False)
    assert found.status == "degenerate" and found.causes.tolist() == ["no variance"]


def test_single_precision_far_from_the_origin():
    far = np.asarray(X[::4]) + 1000.0
    wide = fitted(jnp.asarray(far))
    narrow = fitted(jnp.asarray(far, "float32"))
    found = amari(np.asarray(narrow.model.unmixing[0], float) @ np.asarray(wide.model.mixing[0]))
    assert narrow.model.unmixing.dtype == jnp.float32 and found < 1e-2


def test_all_laws_hold():
    case = CASES["ica"]()
    report = jaxem.testing.check_model(case.model, case.data)
    assert all(verdict.verdict == "holds" for verdict in report), report


def test_derivatives_of_a_fit():
    """Of the held-out likelihood by weights, with and without a prior of the sources' laws."""
    rng = np.random.default_rng(0)
    sources = np.column_stack([rng.laplace(size=200), rng.uniform(-1, 1, 200)])
    x = jnp.asarray(sources @ np.array([[1.0, 0.5], [-0.3, 1.0]]))
    start = ICA.init(jax.random.key(0), x, num_parts=2)
    way = jnp.cos(jnp.arange(200.0))

    @jax.jit
    @jax.value_and_grad
    def held_out(step, count):
        weight, prior = 1 + step * way, start.prior(count)
        found = jaxem.fit(start, x, sample_weight=weight, prior=prior, tol=1e-13, max_steps=5000)
        return jnp.sum(found.model.log_prob(x[:50] + 0.1, found.model.tilt()))

    for count in (0.0, 10.0):
        difference = (held_out(1e-4, count)[0] - held_out(-1e-4, count)[0]) / 2e-4
        np.testing.assert_allclose(held_out(0.0, count)[1], difference, rtol=1e-5)


def test_two_models_in_a_mixture():
    rng = np.random.default_rng(0)
    turns = np.array([[[1.0, 0.6], [0.0, 0.8]], [[0.3, -1.0], [1.0, 0.2]]])
    z = rng.integers(0, 2, 3000)
    x = jnp.asarray(np.einsum("nij,nj->ni", turns[z], rng.laplace(size=(3000, 2))))
    start = ICA(np.zeros((2, 2)), np.linalg.inv(turns + 0.1), *_parts())
    found = jaxem.fit(jaxem.Mixture([0.5, 0.5], start), x, max_steps=300, throw=False).model
    for own, turn in zip(found.components.unmixing, turns, strict=True):
        assert amari(np.asarray(own) @ turn) < 0.15


def _parts():
    return np.full((2, 2, 2), 0.5), np.full((2, 2, 2), [-0.1, 0.1]), np.full((2, 2, 2), [0.5, 3.0])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ICA.init(jax.random.key(0), jnp.ones((50, 2))), "fewer dimensions"),
        (lambda: ICA.init(jax.random.key(0), X[:, [0, 1, 1]]), "fewer dimensions"),
        (lambda: ICA.init(jax.random.key(0), X.at[3, 0].set(jnp.nan)), "NaN"),
        (lambda: ICA.init(jax.random.key(0), X, num_parts=0), "num_parts"),
        (lambda: ICA.init(jax.random.key(0), X, parts=2), "parts"),
        (lambda: ICA(np.zeros((2, 2)), np.ones((2, 2, 2)), *_parts()), "regular"),
        (
            lambda: ICA(np.zeros((2, 2)), np.ones((2, 2, 3)), *_parts()),
            r"unmixing has shape .* expected \(2, 2, 2\)",
        ),
    ],
)
def test_wrong_arguments(make, message):
    with pytest.raises(ValueError, match=message):
        make()
