"""The fourteen covariance structures: their maximisers against optimisers and differences."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.optimize
from sklearn.datasets import load_iris

import jaxem
from jaxem._core.orthogonal import eigen, orthonormal
from jaxem._core.parameters import replace
from jaxem._core.parsimonious import STRUCTURES, Parsimonious
from jaxem.emissions import ParsimoniousGaussian

K, D = 3, 3
SMOOTH = [name for name in STRUCTURES if name[2] == "I" or name[1] == name[2]]
TURNED = [name for name in STRUCTURES if name not in SMOOTH]

from_covariance = jax.jit(Parsimonious.from_covariance, static_argnums=0)
maximize = jax.jit(lambda scale, scatter, count: scale.best(scatter, count))


def scatters(seed, k=K, d=D, n=30):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(k, n, d)) @ rng.normal(size=(k, d, d))
    count = jnp.asarray(rng.uniform(20, 40, k))
    return jnp.asarray(np.einsum("knd,kne->kde", x, x)), count


def transition(old, new):
    """L_new⁻¹ L_old for each component."""
    return new.whitener() @ old.factor()


def log_det(scale):
    """log|L| of each component."""
    return -scale.log_norm() - 0.5 * scale.num_features * jnp.log(2 * jnp.pi)


def times(scale, factor):
    """The scale with all variances times a factor."""
    return replace(scale, log_volume=scale.log_volume + 0.5 * jnp.log(factor))


def reframed(scatter, old, new):
    turn = transition(old, new)
    return turn @ scatter @ jnp.swapaxes(turn, 1, 2)


def objective(scale, old, scatter, count):
    trace = jnp.trace(reframed(scatter, old, scale), axis1=1, axis2=2)
    return -jnp.sum(count * log_det(scale)) - 0.5 * jnp.sum(trace)


def problem(name, seed, k=K, d=D):
    covariance = scatters(seed, k, d)[0] / 30
    return from_covariance(name, covariance), *scatters(seed + 1000, k, d)


@functools.cache
def derivatives(name):
    """Value, jvp and vjp of the covariances in scatters and counts."""

    @jax.jit
    def both(scale, scatter, count, directions, cotangent):
        f = lambda s, n: scale.best(s, n).covariance  # noqa: E731
        value, pushed = jax.jvp(f, (scatter, count), directions)
        return value, pushed, jax.vjp(f, scatter, count)[1](cotangent)

    return both


def central(name, scale, scatter, count, directions, h=1e-5):
    up, down = (
        maximize(scale, scatter + s * h * directions[0], count + s * h * directions[1]).covariance
        for s in (1, -1)
    )
    return (up - down) / (2 * h)


def symmetric(rng, k=K, d=D):
    a = rng.normal(size=(k, d, d))
    return jnp.asarray(a + a.transpose(0, 2, 1))


@pytest.mark.parametrize("d", [1, 2, 5, 8])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_eigenvalues_are_numpys(d, dtype):
    a = np.asarray(scatters(d, 4, d)[0])
    values, vectors = jax.jit(eigen)(jnp.asarray(a, dtype))
    eps = jnp.finfo(dtype).eps
    np.testing.assert_allclose(np.sort(values), np.linalg.eigvalsh(a), atol=50 * eps * a.max())
    np.testing.assert_allclose(
        vectors @ jnp.swapaxes(vectors, 1, 2), np.broadcast_to(np.eye(d), a.shape), atol=50 * eps
    )
    np.testing.assert_allclose(orthonormal(vectors), vectors, atol=50 * eps)


def test_eigenvalues_of_a_graded_matrix_are_relatively_exact():
    scale = 10.0 ** -np.arange(0, 15, 3)
    a = scale[:, None] * (0.5 * np.eye(5) + 0.5) * scale
    values = np.sort(eigen(jnp.asarray(a))[0])[::-1]
    # The product of the m largest is the largest sum that a minor can have
    minors = [np.linalg.det(0.5 * np.eye(m) + 0.5) for m in range(1, 6)]
    expected = minors * np.cumprod(scale**2)
    np.testing.assert_allclose(np.cumprod(values), expected, rtol=1e-5)
    np.testing.assert_allclose(np.prod(values), expected[-1], rtol=1e-13)


def test_a_diagonal_matrix_stays_as_it_is():
    values, vectors = eigen(jnp.diag(jnp.array([2.0, 3.0, 0.0, 2.0])))
    np.testing.assert_array_equal(vectors, np.eye(4))
    np.testing.assert_array_equal(values, [2, 3, 0, 2])


@pytest.mark.parametrize("name", STRUCTURES)
def test_numbers_of_free_parameters_are_mclusts(name):
    k, d = K, D
    pairs = d * (d - 1) // 2
    volume = {"E": 1, "V": k}[name[0]]
    shape = {"I": 0, "E": d - 1, "V": k * (d - 1)}[name[1]]
    orientation = {"I": 0, "E": pairs, "V": k * pairs}[name[2]]
    scale, *_ = problem(name, 0)
    assert scale.num_free_parameters(np.ones(k, bool)) == volume + shape + orientation


@pytest.mark.parametrize("name", STRUCTURES)
def test_any_numbers_are_a_model(name):
    """Factor, whitener, log-determinant and structure at random leaves near a model."""
    scale, *_ = problem(name, 1)
    leaves, tree = jax.tree.flatten(scale)
    rng = np.random.default_rng(2)
    scale = jax.tree.unflatten(tree, [leaf + 0.1 * rng.normal(size=leaf.shape) for leaf in leaves])
    covariance = np.asarray(scale.covariance)
    eye = scale.factor() @ scale.whitener()
    np.testing.assert_allclose(eye, np.broadcast_to(np.eye(D), eye.shape), atol=1e-12)
    half = np.broadcast_to(log_det(scale), K)
    np.testing.assert_allclose(2 * half, np.linalg.slogdet(covariance)[1], rtol=1e-12)
    np.testing.assert_allclose(times(scale, 3.0).covariance, 3 * covariance, rtol=1e-12)
    volume = np.linalg.det(covariance) ** (1 / D)
    unit = covariance / volume[:, None, None]
    alike = lambda a: np.allclose(a, a[:1])  # noqa: E731
    assert alike(volume) == (name[0] == "E")
    assert alike(np.linalg.eigvalsh(unit)) == (name[1] != "V")
    commute = np.allclose(unit[0] @ unit[1], unit[1] @ unit[0], atol=1e-10)
    assert commute == (name[2] != "V")


@pytest.mark.parametrize("name", STRUCTURES)
def test_maximize_is_stationary_and_idempotent(name):
    """Leaves are unconstrained: the gradient of Q in them is zero, and a second step stays."""
    slope = jax.jit(jax.grad(objective))
    for seed in range(3):
        old, scatter, count = problem(name, seed)
        new = maximize(old, scatter, count)
        assert objective(new, old, scatter, count) > objective(old, old, scatter, count)
        gradient = slope(new, old, scatter, count)
        assert max(jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)) < 1e-7
        again = maximize(new, reframed(scatter, old, new), count)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(new), strict=True):
            np.testing.assert_allclose(a, b, atol=1e-8)


@pytest.mark.parametrize("name", STRUCTURES)
def test_no_optimiser_finds_more(name):
    old, scatter, count = problem(name, 5)
    new = maximize(old, scatter, count)
    best = objective(new, old, scatter, count)
    flat, unravel = jax.flatten_util.ravel_pytree(old)
    loss = jax.jit(jax.value_and_grad(lambda v: -objective(unravel(v), old, scatter, count)))
    rng = np.random.default_rng(0)
    starts = (flat, 0), (flat, 0.3), (jax.flatten_util.ravel_pytree(new)[0], 0.05)
    found = [
        -scipy.optimize.minimize(
            lambda v: [np.asarray(part, float) for part in loss(v)],
            start + spread * rng.normal(size=flat.shape),
            jac=True,
            method="BFGS",
            options={"gtol": 1e-8},
        ).fun
        for start, spread in starts
    ]
    assert best > max(found) - 1e-7
    assert best < max(found) + 1e-4  # at least one of them got there


@pytest.mark.parametrize("name", STRUCTURES)
def test_derivatives_are_central_differences(name):
    """At the maximiser, where implicit derivatives of a fit are taken, and elsewhere."""
    rng = np.random.default_rng(3)
    old, scatter, count = problem(name, 4)
    new = maximize(old, scatter, count)
    for scale, sums in ((old, scatter), (new, reframed(scatter, old, new))):
        directions = symmetric(rng), jnp.asarray(rng.normal(size=K))
        cotangent = symmetric(rng)
        _, pushed, pulled = derivatives(name)(scale, sums, count, directions, cotangent)
        expected = central(name, scale, sums, count, directions)
        size = np.abs(expected).max()
        np.testing.assert_allclose(pushed, expected, rtol=1e-6, atol=1e-6 * size)
        inner = sum(jnp.vdot(a, b) for a, b in zip(pulled, directions, strict=True))
        np.testing.assert_allclose(inner, jnp.vdot(pushed, cotangent), rtol=1e-9)


@pytest.mark.parametrize("name", ["VEE", "VVE", "VEV"])
def test_second_derivatives_are_central_differences(name):
    old, scatter, count = problem(name, 4)
    new = maximize(old, scatter, count)
    sums = reframed(scatter, old, new)
    rng = np.random.default_rng(3)
    direction, weight = symmetric(rng), symmetric(rng)
    slope = jax.jit(jax.grad(lambda s: jnp.vdot(weight, new.best(s, count).covariance)))
    second = jax.jit(lambda s: jax.jvp(slope, (s,), (direction,))[1])(sums)
    expected = (slope(sums + 1e-5 * direction) - slope(sums - 1e-5 * direction)) / 2e-5
    np.testing.assert_allclose(second, expected, rtol=1e-4, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", STRUCTURES)
def test_derivatives_where_eigenvalues_are_equal(name):
    """Exact where the covariance is a smooth function of the scatter; finite everywhere."""
    rng = np.random.default_rng(6)
    scale = from_covariance(name, jnp.broadcast_to(2 * jnp.eye(D), (K, D, D)))
    count = jnp.array([20.0, 30.0, 40.0])
    scatter = count[:, None, None] * jnp.eye(D)
    directions = symmetric(rng), jnp.asarray(rng.normal(size=K))
    if name in TURNED:  # there they are smooth along the present axes alone
        directions = directions[0] * jnp.eye(D) * (name[2] == "E"), directions[1]
    value, pushed, pulled = derivatives(name)(scale, scatter, count, directions, symmetric(rng))
    np.testing.assert_allclose(value, scale.covariance, rtol=1e-12)
    expected = central(name, scale, scatter, count, directions)
    np.testing.assert_allclose(pushed, expected, atol=1e-8)
    assert all(jnp.isfinite(part).all() for part in pulled)


@pytest.mark.parametrize("name", TURNED)
def test_two_equal_variances_do_not_stop_the_other_axes(name):
    """Variances 1 and 2 of each component are equal; the third axis still turns."""
    variances = jnp.array([[2.0, 2.0, 5.0], [3.0, 3.0, 7.0], [1.0, 1.0, 4.0]])
    if name[1] == "E":
        variances = variances[:1] * jnp.array([[1.0], [1.0 if name[0] == "E" else 2.0], [1.0]])
    else:
        size = jnp.prod(variances, axis=1, keepdims=True) ** (1 / D)
        variances = variances / (size if name[0] == "E" else 1)
    scale = from_covariance(name, variances[:, :, None] * jnp.eye(D))
    count = jnp.array([20.0, 30.0, 40.0])
    scatter = count[:, None, None] * jnp.eye(D)
    turn = jnp.zeros((K, D, D)).at[:, 0, 2].set(1).at[:, 2, 0].set(1)
    directions = turn * jnp.array([1.0, -2.0, 0.5])[:, None, None], jnp.zeros(K)
    _, pushed, pulled = derivatives(name)(scale, scatter, count, directions, turn)
    expected = central(name, scale, scatter, count, directions)
    assert np.abs(expected).max() > 1e-4
    np.testing.assert_allclose(pushed, expected, atol=1e-8)
    assert all(jnp.isfinite(part).all() for part in pulled)


@pytest.mark.parametrize("name", STRUCTURES)
def test_what_has_no_count_stays(name):
    old, scatter, count = problem(name, 7)
    empty = maximize(old, scatter * 0, count * 0)
    for a, b in zip(jax.tree.leaves(empty), jax.tree.leaves(old), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-12)
    present = jnp.array([1.0, 0.0, 1.0])
    count, scatter = count * present, scatter * present[:, None, None]
    new = maximize(old, scatter, count)
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(old), strict=True):
        if a.shape[0] == K:
            np.testing.assert_array_equal(a[1], b[1])
        else:
            assert not np.allclose(a, b)
    # The others are what they are without it
    two = np.array([0, 2])
    pair = from_covariance(name, old.covariance[two])
    alone = maximize(pair, reframed(scatter[two], _only(old, two), pair), count[two])
    np.testing.assert_allclose(new.covariance[two], alone.covariance, rtol=1e-7, atol=1e-9)
    directions, cotangent = (scatter, count), symmetric(np.random.default_rng(0))
    _, pushed, pulled = derivatives(name)(old, scatter, count, directions, cotangent)
    assert jnp.isfinite(pushed).all() and all(jnp.isfinite(part).all() for part in pulled)


def _only(scale, index):
    """The components `index` of a scale, in what they have of their own."""
    pick = lambda leaf: leaf[index] if leaf.shape[0] == K else leaf  # noqa: E731
    leaves = [None if leaf is None else pick(leaf) for leaf in _leaves(scale)]
    names = ("log_volume", "log_shape", "orientation")
    return replace(scale, **dict(zip(names, leaves, strict=True)), num_components=len(index))


def _leaves(scale):
    return scale.log_volume, scale.log_shape, scale.orientation


@pytest.mark.parametrize("name", STRUCTURES)
@pytest.mark.parametrize("unit", [1.0, 1e-15, 1e15])
def test_float32_agrees_at_any_scale(name, unit):
    """Data of size 1e±15, variances of 1e±30; a feature in units a thousand times another's."""
    old, scatter, count = problem(name, 8)
    expected = maximize(old, scatter, count)
    single = lambda tree: jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)  # noqa: E731
    small = single(times(old, unit**2))
    new = maximize(small, *single((scatter, count)))
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(new))
    whitened = expected.whitener() @ (np.asarray(new.factor(), float) / unit)
    relative = whitened @ jnp.swapaxes(whitened, 1, 2)
    np.testing.assert_allclose(relative, np.broadcast_to(np.eye(D), relative.shape), atol=2e-3)
    loss = [objective(scale, old, scatter, count) for scale in (expected, _double(new, unit))]
    np.testing.assert_allclose(loss[1], loss[0], rtol=2e-6)


def _double(scale, unit):
    scale = jax.tree.map(lambda leaf: leaf.astype(jnp.float64), scale)
    return times(scale, unit**-2)


@pytest.mark.parametrize("name", STRUCTURES)
def test_a_component_with_hardly_any_observations(name):
    """Two observations in three dimensions: shared shapes do without more."""
    old, scatter, count = problem(name, 10)
    flat = np.random.default_rng(0).normal(size=(2, D))
    new = maximize(old, scatter.at[1].set(flat.T @ flat), count.at[1].set(2.0))
    others = [0, 2]
    if name in ("EVV", "VVV"):  # none has a maximum: the determinant is zero
        assert jnp.isnan(new.covariance[1]).any()
        others *= name == "VVV"
    elif name != "VVE":
        others = [0, 1, 2]
    assert jnp.isfinite(new.covariance[jnp.array(others, int)]).all()


@pytest.mark.parametrize("name", STRUCTURES)
def test_nan_is_not_hidden(name):
    old, scatter, count = problem(name, 10)
    new = maximize(old, scatter.at[0, 0, 0].set(jnp.nan), count)
    assert jnp.isnan(new.covariance[0]).any()
    new = maximize(old, scatter, count.at[0].set(jnp.nan))
    assert jnp.isnan(new.covariance[0]).any()


def test_data_too_small_for_their_squares():
    factor = 1e-25 * jnp.linalg.cholesky(scatters(0)[0] / 30).astype(jnp.float32)
    for name in STRUCTURES:
        scale = Parsimonious.from_factor(name, factor)
        assert jnp.isfinite(scale.whitener()).all()
        np.testing.assert_allclose(log_det(scale) / D, np.log(1e-25), atol=3)


@pytest.mark.parametrize("name", STRUCTURES)
def test_one_component_or_one_feature(name):
    one, scatter, count = problem(name, 9, k=1)
    full = scatter / count[:, None, None]
    full = one.factor() @ full @ jnp.swapaxes(one.factor(), 1, 2)
    new = maximize(one, scatter, count)
    if name[2] != "I":
        np.testing.assert_allclose(new.covariance, full, rtol=1e-10)
        assert one.num_free_parameters(np.ones(1, bool)) == D * (D + 1) // 2
    elif name[1] != "I":
        np.testing.assert_allclose(new.covariance, full * jnp.eye(D), rtol=1e-10)
    flat, scatter, count = problem(name, 9, d=1)
    variance = maximize(flat, scatter, count).covariance[:, 0, 0] / flat.covariance[:, 0, 0]
    pooled = jnp.broadcast_to(jnp.sum(scatter) / jnp.sum(count), K)
    own = scatter[:, 0, 0] / count
    np.testing.assert_allclose(variance, pooled if name[0] == "E" else own, rtol=1e-10)


@pytest.mark.parametrize("name", ["EVE", "VEV"])
def test_batches_are_single_maximisations(name):
    problems = [problem(name, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems)
    batch = jax.jit(jax.vmap(lambda s, *sums: s.best(*sums)))(*stacked)
    for i, one in enumerate(problems):
        for a, b in zip(jax.tree.leaves(batch), jax.tree.leaves(maximize(*one)), strict=True):
            np.testing.assert_allclose(a[i], b, atol=1e-9)


def test_messages():
    eye = jnp.broadcast_to(jnp.eye(2), (3, 2, 2))
    with pytest.raises(ValueError, match="unknown covariance structure 'VVW'; expected one of EII"):
        Parsimonious.from_covariance("VVW", eye)
    with pytest.raises(ValueError, match=r"covariance has shape \(2, 2\); expected \(k, d, d\)"):
        Parsimonious.from_covariance("VVV", eye[0])
    with pytest.raises(ValueError, match="positive definite"):
        Parsimonious.from_covariance("VVV", eye.at[0, 0, 1].set(2).at[0, 1, 0].set(2))
    with pytest.raises(ValueError, match="variances must be positive"):
        Parsimonious.from_covariance("VVV", -eye)


def em(name, x, responsibilities, num_steps=300):
    """A mixture by EM from a partition: log-likelihoods, degrees of freedom."""
    (n, d), k = x.shape, responsibilities.shape[1]

    def sums(r, whitener):
        count = jnp.sum(r, axis=0)
        mean = r.T @ x / count[:, None]
        y = jnp.einsum("kde,nke->nkd", whitener, x[:, None] - mean)
        return count, mean, jnp.einsum("nk,nkd,nke->kde", r, y, y)

    @jax.jit
    def step(scale, mean, weights):
        whitener = jnp.broadcast_to(scale.whitener(), (k, d, d))
        y = jnp.einsum("kde,nke->nkd", whitener, x[:, None] - mean)
        log_prob = jnp.log(weights) - log_det(scale) - 0.5 * jnp.sum(y**2, axis=2)
        log_prob = log_prob - 0.5 * d * jnp.log(2 * jnp.pi)
        total = jax.scipy.special.logsumexp(log_prob, axis=1)
        count, mean, scatter = sums(jnp.exp(log_prob - total[:, None]), whitener)
        return (scale.best(scatter, count), mean, count / n), jnp.sum(total)

    eye = jnp.broadcast_to(jnp.eye(d), (k, d, d))
    count, mean, scatter = sums(responsibilities, eye)
    scale = from_covariance(name, scatter / count[:, None, None])
    whitener = jnp.broadcast_to(scale.whitener(), (k, d, d))
    scale = maximize(scale, sums(responsibilities, whitener)[2], count)
    state, trace = (scale, mean, count / n), []
    while len(trace) < num_steps and (len(trace) < 2 or trace[-1] - trace[-2] > 1e-10):
        state, log_prob = step(*state)
        trace.append(float(log_prob))
    return np.array(trace), scale.num_free_parameters(np.ones(k, bool)) + k * d + k - 1


# BIC from setosa and the rest. VEV and VVV are mclust's published ones; the others are our own, and
# only held as they are.
IRIS_2 = {
    "EII": -1123.4117,
    "VII": -1012.2352,
    "EEI": -1042.9679,
    "VEI": -956.2823,
    "EVI": -1007.3082,
    "VVI": -857.5515,
    "EEE": -688.0972,
    "VEE": -656.3270,
    "EVE": -657.2263,
    "EEV": -644.5997,
    "VEV": -561.7285,
    "EVV": -658.3306,
    "VVV": -574.0178,
    "VVE": -604.3858,
}


@pytest.mark.parametrize("name", STRUCTURES)
def test_iris_in_two_components(name):
    x, labels = load_iris(return_X_y=True)
    trace, df = em(name, jnp.asarray(x), jnp.asarray(np.eye(2)[np.minimum(labels, 1)]))
    assert np.diff(trace).min() > -1e-9
    bic = 2 * trace[-1] - df * np.log(len(x))
    np.testing.assert_allclose(bic, IRIS_2[name], atol=1e-3)
    if name == "VEV":
        np.testing.assert_allclose(trace[-1], -215.726, atol=5e-4)
        assert df == 26


@pytest.mark.parametrize(("name", "bic"), [("VEV", -562.5522), ("VVV", -580.8389)])
def test_iris_in_three_components(name, bic):
    x, labels = load_iris(return_X_y=True)
    trace, df = em(name, jnp.asarray(x), jnp.asarray(np.eye(3)[labels]))
    assert np.diff(trace).min() > -1e-9
    np.testing.assert_allclose(2 * trace[-1] - df * np.log(len(x)), bic, atol=2e-3)


@pytest.mark.parametrize(("name", "bic"), [("VEV", -561.72), ("VVV", -574.02)])
def test_mixtures_of_iris_have_the_published_bic(name, bic):
    x, labels = load_iris(return_X_y=True)
    x, start = jnp.asarray(x), jax.nn.one_hot(np.minimum(labels, 1), 2)
    family = functools.partial(ParsimoniousGaussian, structure=name)
    model = jaxem.Mixture.from_responsibilities(x, start, family)
    solution = jaxem.fit(model, x, tol=1e-10, max_steps=3000)
    assert solution.status == "converged"
    np.testing.assert_allclose(-jaxem.inference.bic(solution, x), bic, atol=0.01)
