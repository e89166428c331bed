"""Message passing against sums over all paths, in both forms, in value and in derivative."""

import functools
import itertools

import equinox as eqx
import hypothesis
import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import logsumexp

from jaxem.latents import chain

K = 3
FORMS = [pytest.param(False, id="sequential"), pytest.param(True, id="parallel")]


@functools.partial(jax.jit, static_argnames="parallel")
def filtering(initial, transition, log_prob, parallel=False):
    return chain.filtering(initial, transition, log_prob, parallel=parallel)


@functools.partial(jax.jit, static_argnames="parallel")
def smoothing(initial, transition, log_prob, parallel=False):
    return chain.smoothing(initial, transition, log_prob, parallel=parallel)


@functools.partial(jax.jit, static_argnames="num_paths")
def viterbi(initial, transition, log_prob, length=None, num_paths=1):
    return chain.viterbi(initial, transition, log_prob, length=length, num_paths=num_paths)


def problem(kind, t, seed=0):
    """Initial, transition and log-likelihoods; few of the latter are of like size."""
    rng = np.random.default_rng(seed)
    initial = rng.dirichlet(np.ones(K))
    matrix = rng.dirichlet(np.ones(K), (t, K) if kind == "varying" else K)
    log_prob = 2 * rng.normal(size=(t, K))
    if kind == "zeros":  # left to right, and a step that one state cannot have produced
        initial = np.array([0.4, 0.6, 0.0])
        matrix = np.array([[0.6, 0.3, 0.1], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
        log_prob[t // 2, 1] = -np.inf
    if kind == "missing":
        log_prob[1::3] = 0
    return jnp.asarray(initial), jnp.asarray(matrix), jnp.asarray(log_prob)


KINDS = ["plain", "varying", "zeros", "missing"]


def enumerated(initial, transition, log_prob):
    """All paths and their joint log-probabilities."""
    t = len(log_prob)
    steps = np.broadcast_to(transition[:t] if np.ndim(transition) == 3 else transition, (t, K, K))
    paths = np.array(list(itertools.product(range(K), repeat=t)))
    with np.errstate(divide="ignore"):
        joint = np.log(initial)[paths[:, 0]] + np.asarray(log_prob)[np.arange(t), paths].sum(1)
        for s in range(t - 1):
            joint = joint + np.log(steps[s])[paths[:, s], paths[:, s + 1]]
    return paths, joint


def shares(paths, joint, *steps):
    """P(z at these steps | x), an array with an axis for each of them."""
    table = np.zeros((K,) * len(steps))
    np.add.at(table, tuple(paths[:, list(steps)].T), np.exp(joint - logsumexp(joint)))
    return table


def close(a, b, tol=1e-12):
    np.testing.assert_allclose(a, b, rtol=tol, atol=tol)


# Against enumeration


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("t", [1, 2, 7])
@pytest.mark.parametrize("kind", KINDS)
def test_filter_and_smoother(kind, t, parallel):
    initial, transition, log_prob = given = problem(kind, t)
    forward, both = filtering(*given, parallel), smoothing(*given, parallel)
    so_far = []
    for s in range(t):
        paths, joint = enumerated(initial, transition, log_prob[: s + 1])
        so_far.append(logsumexp(joint))
        close(forward.filtered[s], shares(paths, joint, s))
    close(forward.log_likelihood, so_far[-1])
    close(both.log_likelihood, so_far[-1])
    close(forward.log_increments, np.diff(so_far, prepend=0.0))
    paths, joint = enumerated(*given)
    steps = np.broadcast_to(transition, (t, K, K))
    for s in range(t):
        close(both.smoothed[s], shares(paths, joint, s))
    for s in range(1, t):
        pair = both.before[s - 1, :, None] * steps[s - 1] * both.after[s]
        close(pair, shares(paths, joint, s - 1, s))
    if kind == "zeros":  # exactly
        impossible = np.array([shares(paths, joint, s) for s in range(t)]) == 0
        assert impossible.any()
        assert np.all(np.asarray(both.smoothed)[impossible] == 0)


@pytest.mark.parametrize("parallel", FORMS)
def test_gains_are_likelihoods_over_predictive_densities(parallel):
    given = problem("plain", 7)
    forward = filtering(*given, parallel)
    close(forward.gain, jnp.exp(given[2] - forward.log_increments[:, None]))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("t", "num_paths"), [(1, 1), (1, 5), (6, 1), (6, 40)])
def test_best_paths(kind, t, num_paths):
    given = problem(kind, t)
    paths, joint = enumerated(*given)
    order = np.argsort(-joint)[:num_paths]
    order = order[np.isfinite(joint[order])]
    found, log_prob = viterbi(*given, num_paths=num_paths)
    assert found.shape == (num_paths, t) and log_prob.shape == (num_paths,)
    np.testing.assert_array_equal(found[: len(order)], paths[order])
    close(log_prob[: len(order)], joint[order])
    assert np.all(log_prob[len(order) :] == -np.inf)
    if num_paths > 1 and kind == "zeros":
        assert len(order) < num_paths


@pytest.mark.parametrize("length", [1, 4, 6])
@pytest.mark.parametrize("kind", ["plain", "varying", "zeros"])
def test_best_paths_of_a_padded_sequence(kind, length):
    """What lies beyond the end does not count, and the last state is repeated."""
    initial, transition, log_prob = problem(kind, 6)
    spoilt = log_prob.at[length:].set(jnp.array([50.0, -50.0, 10.0]))
    found, value = viterbi(initial, transition, spoilt, length=length, num_paths=3)
    kept = transition[:length] if kind == "varying" else transition
    shorter, expected = viterbi(initial, kept, log_prob[:length], num_paths=3)
    possible = np.isfinite(expected)
    np.testing.assert_array_equal(found[:, :length][possible], shorter[possible])
    assert np.all(found[:, length:] == found[:, [length - 1]])
    close(value, expected)


def test_equal_paths_are_listed_once():
    """With all paths alike, ten best paths are ten different ones."""
    flat = jnp.full(K, 1 / K), jnp.full((K, K), 1 / K), jnp.zeros((4, K))
    paths, log_prob = viterbi(*flat, num_paths=10)
    assert len(np.unique(paths, axis=0)) == 10
    close(log_prob, jnp.full(10, -4 * np.log(3)))


@pytest.mark.parametrize("kind", KINDS)
def test_drawn_paths_have_their_frequencies(kind):
    initial, transition, log_prob = given = problem(kind, 4)
    filtered = filtering(*given).log_filtered
    n = 20_000
    keys = jax.random.split(jax.random.key(0), n)
    drawn = jax.jit(jax.vmap(lambda key: chain.sample_path(key, filtered, transition)))(keys)
    paths, joint = enumerated(*given)
    expected = np.exp(joint - logsumexp(joint))
    codes = np.asarray(drawn) @ K ** np.arange(4)[::-1]
    counts = np.bincount(codes, minlength=K**4)
    assert np.all(counts[expected == 0] == 0)
    deviation = np.sqrt(n * expected * (1 - expected))
    assert np.all(np.abs(counts - n * expected) < 5 * deviation + 1)


def test_drawn_paths_of_one_step():
    filtered = jnp.log(jnp.array([[0.0, 1.0, 0.0]]))
    assert chain.sample_path(jax.random.key(0), filtered, jnp.eye(3)).tolist() == [1]


def test_forecast_and_stationary_distribution():
    initial, matrix, _ = problem("plain", 1)
    ahead = chain.forecast(initial, matrix, 5)
    for h in range(5):
        close(ahead[h], initial @ np.linalg.matrix_power(matrix, h + 1))
    delta = chain.stationary(matrix)
    close(delta @ matrix, delta)
    close(jnp.sum(delta), 1.0)
    values, vectors = np.linalg.eig(np.asarray(matrix).T)
    vector = vectors[:, np.argmax(values.real)].real
    close(delta, vector / vector.sum())
    periodic = jnp.array([[0.0, 1.0], [1.0, 0.0]])
    close(chain.stationary(periodic), jnp.array([0.5, 0.5]))


def test_stationary_distribution_of_a_chain_that_hardly_moves():
    """To all digits, where states are left once in 10¹² steps."""
    matrix = jnp.array([[1 - 1e-12, 1e-12], [3e-12, 1 - 3e-12]])
    expected = np.array([matrix[1, 0], matrix[0, 1]]) / (matrix[1, 0] + matrix[0, 1])
    close(chain.stationary(matrix), expected, 1e-15)


def test_stationary_distributions_call_no_library():
    """Batches of LAPACK calls in jaxlib 0.10 can wait for each other for ever."""
    batch = jax.ShapeDtypeStruct((100, 8, 8), float)
    slopes = jax.vmap(jax.grad(lambda a: jnp.sum(jnp.log(chain.stationary(a)))))
    assert "custom-call" not in jax.jit(slopes).lower(batch).compile().as_text()


def test_derivative_of_the_stationary_distribution():
    _, matrix, _ = problem("plain", 1)
    way = np.array([[1.0, -1, 0], [0, 1, -1], [-1, 0, 1]])
    h = 1e-6
    difference = (chain.stationary(matrix + h * way) - chain.stationary(matrix - h * way)) / (2 * h)
    close(jax.jvp(chain.stationary, (matrix,), (way,))[1], difference, 1e-8)


def test_a_path_in_the_form_of_the_smoother():
    """Its pairs are the steps that it takes, for one matrix and for one at each step."""
    path = jnp.array([0, 0, 2, 1, 1])
    for kind in ("plain", "varying"):
        _, transition, _ = problem(kind, 5)
        found = chain.of_path(path, jnp.zeros(()), transition)
        np.testing.assert_array_equal(found.smoothed, np.eye(K)[path])
        steps = np.broadcast_to(transition, (5, K, K))
        pairs = [found.before[s - 1, :, None] * steps[s - 1] * found.after[s] for s in range(1, 5)]
        expected = [np.outer(np.eye(K)[path[s - 1]], np.eye(K)[path[s]]) for s in range(1, 5)]
        close(pairs, expected)


# Derivatives


def unpacked(numbers, kind, t):
    """A chain from unconstrained numbers; impossible steps stay so."""
    initial, transition, log_prob = problem(kind, t)
    size = K, transition.size, log_prob.size
    a, b, c = jnp.split(numbers, np.cumsum(size)[:-1])

    def tilted(p, by):
        p = p * jnp.exp(by.reshape(p.shape))
        return p / jnp.sum(p, axis=-1, keepdims=True)

    return tilted(initial, a), tilted(transition, b), log_prob + c.reshape(log_prob.shape)


def functional(numbers, kind, t, parallel):
    """Something smooth that sees everything the smoother says."""
    initial, transition, log_prob = unpacked(numbers, kind, t)
    found = chain.smoothing(initial, transition, log_prob, parallel=parallel)
    steps = jnp.broadcast_to(transition, (t, K, K))
    pairs = found.before[:-1, :, None] * steps[:-1] * found.after[1:, None, :]
    weigh = jnp.cos(jnp.arange(t * K).reshape(t, K))
    far = jnp.sin(jnp.arange((t - 1) * K * K).reshape(t - 1, K, K))
    return found.log_likelihood + jnp.sum(weigh * found.smoothed) + jnp.sum(far * pairs)


@functools.partial(jax.jit, static_argnames=("kind", "t", "parallel"))
def two_derivatives(numbers, way, kind, t, parallel):
    gradient = jax.grad(functional)
    slope, bend = jax.jvp(lambda n: gradient(n, kind, t, parallel), (numbers,), (way,))
    return functional(numbers, kind, t, parallel), slope, bend


def numbers_of(kind, t):
    size = K + problem(kind, t)[1].size + t * K
    rng = np.random.default_rng(1)
    return 0.1 * jnp.asarray(rng.normal(size=size)), jnp.asarray(rng.normal(size=size))


@pytest.mark.parametrize(  # all with a last block that is filled up
    ("kind", "t"), [("plain", 41), *((kind, 7) for kind in KINDS)]
)
def test_both_forms_and_differences_agree(kind, t):
    numbers, way = numbers_of(kind, t)
    sequential = two_derivatives(numbers, way, kind, t, False)
    for a, b in zip(two_derivatives(numbers, way, kind, t, True), sequential, strict=True):
        close(a, b, 1e-10)
        assert np.all(np.isfinite(a))
    h = 1e-5
    above, below = (two_derivatives(numbers + s * way, way, kind, t, False) for s in (h, -h))
    value, slope, bend = sequential
    close(slope @ way, (above[0] - below[0]) / (2 * h), 1e-8)
    close(bend, (above[1] - below[1]) / (2 * h), 1e-6)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("kind", KINDS)
def test_expectations_are_derivatives(kind, parallel):
    """Fisher: ∂ log p(x) / ∂ log lₜₖ = P(zₜ = k | x), and ∂ / ∂ log A the expected transitions."""
    initial, transition, log_prob = given = problem(kind, 7)

    def log_likelihood(start, moves, log_prob):
        return chain.log_likelihood(
            initial * jnp.exp(start), transition * jnp.exp(moves), log_prob, parallel=parallel
        )

    zeros = jnp.zeros(K), jnp.zeros(transition.shape)
    by_start, by_moves, by_log_prob = jax.jit(jax.grad(log_likelihood, argnums=(0, 1, 2)))(
        *zeros, log_prob
    )
    found = smoothing(*given, parallel)
    close(by_log_prob, found.smoothed)
    close(by_start, found.smoothed[0])
    steps = np.broadcast_to(transition, (7, K, K))[:-1]
    pairs = found.before[:-1, :, None] * steps * found.after[1:, None, :]
    if transition.ndim == 2:
        close(by_moves, jnp.sum(pairs, axis=0))
    else:
        close(by_moves[:-1], pairs)
        assert np.all(by_moves[-1] == 0)


def test_structural_zeros_equal_a_smaller_chain():
    """States that cannot be reached change nothing, in values and in two derivatives."""
    initial, matrix, log_prob = problem("plain", 9)

    def embedded(log_prob, moves):
        rows = matrix * jnp.exp(moves)
        rows = rows / jnp.sum(rows, axis=1, keepdims=True)
        beyond = jnp.array([[0.2, 0.2, 0.2, 0.4]])
        larger = jnp.concatenate([jnp.pad(rows, ((0, 0), (0, 1))), beyond])
        likelier = jnp.concatenate([log_prob, jnp.full((9, 1), 30.0)], axis=1)
        return chain.log_likelihood(jnp.append(initial, 0), larger, likelier)

    def alone(log_prob, moves):
        rows = matrix * jnp.exp(moves)
        return chain.log_likelihood(initial, rows / jnp.sum(rows, axis=1, keepdims=True), log_prob)

    at = log_prob, jnp.zeros((K, K))
    for transform in (lambda f: f, jax.grad, jax.hessian):
        a, b = (jax.jit(transform(f))(*at) for f in (embedded, alone))
        close(a, b, 1e-11)


@pytest.mark.parametrize("parallel", FORMS)
def test_derivatives_by_probabilities_that_are_zero_are_finite(parallel):
    """Two of them, in the probabilities themselves."""
    initial, transition, log_prob = problem("zeros", 9)

    def value(initial, transition):
        found = chain.smoothing(initial, transition, log_prob, parallel=parallel)
        return found.log_likelihood + jnp.sum(jnp.cos(found.smoothed))

    first = jax.jit(jax.grad(value, argnums=(0, 1)))(initial, transition)
    second = jax.jit(jax.jacfwd(jax.grad(value, argnums=1), argnums=1))(initial, transition)
    for leaf in jax.tree.leaves((first, second)):
        assert np.all(np.isfinite(leaf))


# Steps that cannot be


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("bad", [0, 4, 8])
def test_an_impossible_step(bad, parallel):
    initial, transition, log_prob = problem("plain", 9)
    given = initial, transition, log_prob.at[bad].set(-jnp.inf)
    forward, both = filtering(*given, parallel), smoothing(*given, parallel)
    assert forward.log_likelihood == -np.inf and both.log_likelihood == -np.inf
    impossible = np.asarray(forward.log_increments) == -np.inf
    assert np.argmax(impossible) == bad and not impossible[:bad].any()
    close(forward.filtered[:bad], filtering(initial, transition, log_prob).filtered[:bad])
    assert np.all(forward.filtered[bad:] == 0)
    assert not any(np.any(np.isnan(leaf)) for leaf in jax.tree.leaves((forward, both)))
    assert viterbi(*given)[1] == -np.inf


@pytest.mark.parametrize("parallel", FORMS)
def test_an_impossible_move(parallel):
    """Each step is possible by itself, but not one after the other."""
    matrix = jnp.array([[0.5, 0.5, 0.0], [0.0, 0.5, 0.5], [0.0, 0.0, 1.0]])
    certain = jnp.where(jnp.eye(K)[jnp.array([0, 1, 1, 0, 2, 2])] == 1, 0.0, -jnp.inf)
    forward = filtering(jnp.array([1.0, 0.0, 0.0]), matrix, certain, parallel)
    assert forward.log_likelihood == -np.inf
    np.testing.assert_array_equal(forward.log_increments[:3], np.log([1.0, 0.5, 0.5]))
    assert np.argmax(np.asarray(forward.log_increments) == -np.inf) == 3


@pytest.mark.parametrize("parallel", FORMS)
def test_an_impossible_step_has_derivatives_without_nan(parallel):
    initial, transition, log_prob = problem("plain", 9)
    log_prob = log_prob.at[4].set(-jnp.inf)
    of_all = jax.grad(
        lambda *args: chain.log_likelihood(*args, parallel=parallel), argnums=(0, 1, 2)
    )
    for leaf in jax.jit(of_all)(initial, transition, log_prob):
        assert not np.any(np.isnan(leaf))


# float32


@pytest.mark.parametrize("parallel", FORMS)
def test_an_unreachable_state_that_is_far_likelier_does_not_underflow_the_others(parallel):
    """Left to right in float32: the state that has been left explains later steps best."""
    t = 40
    rng = np.random.default_rng(0)
    matrix = np.array([[0.5, 0.5, 0.0], [0.0, 0.9, 0.1], [0.0, 0.0, 1.0]])
    log_prob = rng.normal(size=(t, K))
    log_prob[:, 0] += 200
    log_prob[0, 0] = -np.inf  # it is never in state 0
    initial = np.array([0.3, 0.7, 0.0])
    wide = smoothing(*map(jnp.asarray, (initial, matrix, log_prob)), parallel)
    single = (jnp.asarray(a, jnp.float32) for a in (initial, matrix, log_prob))
    narrow = smoothing(*single, parallel)
    assert narrow.smoothed.dtype == jnp.float32
    close(narrow.log_likelihood, wide.log_likelihood, 1e-5)
    close(narrow.smoothed, wide.smoothed, 1e-5)
    assert np.all(narrow.smoothed[:, 0] == 0)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_a_state_that_is_never_reached_does_not_grow(dtype, parallel):
    """Nothing leads to the last state, which stays in itself and explains every step best."""
    t = 2000
    matrix = jnp.array([[0.5, 0.5, 0.0], [0.5, 0.5, 0.0], [0.0, 0.0, 1.0]], dtype)
    log_prob = jnp.zeros((t, K), dtype).at[:, 2].set(200)
    found = smoothing(jnp.array([0.5, 0.5, 0.0], dtype), matrix, log_prob, parallel)
    assert np.all(np.isfinite(found.after))
    close(found.smoothed, np.tile([0.5, 0.5, 0.0], (t, 1)), 1e-6)
    close(found.log_likelihood, 0.0, 1e-4)


@pytest.mark.parametrize("parallel", FORMS)
def test_a_million_steps_in_single_precision(parallel):
    rng = np.random.default_rng(0)
    t = 10**6
    initial, transition, _ = problem("plain", 1)
    log_prob = rng.normal(size=(t, K)) - 1.0
    wide = jnp.asarray(log_prob)
    value = jax.jit(chain.log_likelihood, static_argnames="parallel")
    expected = value(initial, transition, wide, parallel=False)
    single = [a.astype(jnp.float32) for a in (initial, transition, wide)]
    found = value(*single, parallel=parallel)
    assert found.dtype == jnp.float32
    assert abs(float(found) - float(expected)) / t < 1e-6


# Any chain


T = 9


@st.composite
def chains(draw):
    """Chains with any pattern of zeros, and likelihoods hundreds of nats apart."""
    unit = st.floats(0, 1, width=32)
    numbers = draw(hnp.arrays(float, (K + 1, K), elements=unit))
    keep = draw(hnp.arrays(bool, (K + 1, K)))
    rows = np.where(keep, numbers, 0)
    rows = np.where(rows < 1e-3, 0, rows)
    rows = np.where(rows.sum(axis=1, keepdims=True) > 0, rows, np.eye(K + 1, K) + 1e-2)
    rows = rows / rows.sum(axis=1, keepdims=True)
    log_prob = draw(hnp.arrays(float, (T, K), elements=st.floats(-35, 35, width=32)))
    return tuple(map(jnp.asarray, (rows[0], rows[1:], log_prob)))


@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
@hypothesis.given(chains())
def test_any_chain(given):
    initial, transition, log_prob = given
    found, other = smoothing(*given), smoothing(*given, parallel=True)
    close(found.smoothed, other.smoothed, 1e-9)
    close(found.log_likelihood, other.log_likelihood, 1e-11)
    assert np.all(np.isfinite(found.after))
    close(jnp.sum(found.smoothed, axis=1), np.ones(T))
    pairs = transition * (found.before[:-1].T @ found.after[1:])
    close(jnp.sum(pairs, axis=1), jnp.sum(found.smoothed[:-1], axis=0), 1e-9)
    close(jnp.sum(pairs, axis=0), jnp.sum(found.smoothed[1:], axis=0), 1e-9)
    (path, *_), (value, second) = viterbi(*given, num_paths=2)
    assert value <= found.log_likelihood + 1e-9 and second <= value
    with np.errstate(divide="ignore"):
        joint = np.log(initial[path[0]]) + np.sum(log_prob[np.arange(T), path])
        joint += np.sum(np.log(transition[path[:-1], path[1:]]))
    close(value, joint, 1e-9)


def test_many_chains_at_once_are_each_of_them():
    batch = [problem("plain", 7, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *batch)
    together = jax.jit(jax.vmap(chain.smoothing))(*stacked)
    for i, single in enumerate(batch):
        for a, b in zip(*map(jax.tree.leaves, (together, smoothing(*single))), strict=True):
            close(a[i], b)


def test_the_form_is_chosen_without_being_told():
    """On this machine's CPU the default is the sequential form, with equal numbers."""
    given = problem("plain", 70)
    both = eqx.filter_jit(chain.smoothing)(*given), smoothing(*given, parallel=True)
    for a, b in zip(*map(jax.tree.leaves, both), strict=True):
        close(a, b, 1e-10)


def late_truth(dtype, nats):
    """A chain that leaves state 0 for good, and data that look as if it had, until they do not."""
    matrix = jnp.array([[0.9, 0.1], [0.0, 1.0]], dtype)
    log_prob = np.zeros((60, 2))
    log_prob[:10, 1], log_prob[10, 0], log_prob[11:, 1] = -5, -nats, -nats
    return jnp.array([1.0, 0.0], dtype), matrix, jnp.asarray(log_prob, dtype)


@pytest.mark.parametrize("parallel", FORMS)
@pytest.mark.parametrize("dtype, nats", [("float32", 60), ("float32", 95), ("float64", 800)])
def test_a_state_that_vanished_and_was_the_true_one(dtype, nats, parallel):
    """Beyond the range of the dtype logarithms take over, beside chains that need none too.

    What all states have in common takes no digits, and a NaN stays one.
    """
    initial, matrix, log_prob = late_truth(dtype, nats)
    both = jnp.stack([log_prob - 1e5, log_prob.at[11:].set(0), log_prob.at[3].set(jnp.nan)])
    found, (forward, slopes) = lost_paths(initial, matrix, both, parallel)
    assert np.isnan(found.log_likelihood[2]) and np.isnan(forward.log_likelihood[2])
    for i in range(2):  # in the second no evidence follows
        joint = all_of_two_states(initial, matrix, both[i])
        share = np.exp(joint - logsumexp(joint))
        np.testing.assert_allclose(found.log_likelihood[i], logsumexp(joint), rtol=1e-5)
        np.testing.assert_allclose(forward.log_likelihood[i], logsumexp(joint), rtol=1e-5)
        zero = np.array([share[s:].sum() for s in range(len(both[i]))])  # P(zₜ = 0 | x)
        np.testing.assert_allclose(found.smoothed[i], np.stack([zero, 1 - zero], 1), atol=1e-4)
        np.testing.assert_allclose(slopes[i], found.smoothed[i], atol=1e-4)
        pairs = matrix * (found.before[i, :-1].T @ found.after[i, 1:]) + found.moved[i]
        expected = [[zero[1:].sum(), share[:-1].sum()], [0, (1 - zero[:-1]).sum()]]
        np.testing.assert_allclose(pairs, expected, atol=1e-3)
    draw = jax.jit(chain.sample_path)(jax.random.key(0), forward.log_filtered[0], matrix)
    assert bool(jnp.all(draw == 0))


@functools.partial(jax.jit, static_argnames="parallel")
def lost_paths(initial, matrix, log_probs, parallel):
    def one(log_prob):
        value = lambda b: chain.log_likelihood(initial, matrix, b, parallel=parallel)  # noqa: E731
        forward = chain.filtering(initial, matrix, log_prob, parallel=parallel)
        both = chain.smoothing(initial, matrix, log_prob, parallel=parallel)
        return both, (forward, jax.grad(value)(log_prob))

    return jax.vmap(one)(log_probs)


def all_of_two_states(initial, matrix, log_prob):
    """Joint log-probabilities of all paths that go from state 0 to 1 once, or never."""
    log_prob = np.asarray(log_prob, float)
    stay, leave = np.log(0.9), np.log(0.1)
    t = len(log_prob)
    leaves = [
        stay * (s - 1) + leave + log_prob[:s, 0].sum() + log_prob[s:, 1].sum() for s in range(1, t)
    ]
    return [*leaves, stay * (t - 1) + log_prob[:, 0].sum()]
