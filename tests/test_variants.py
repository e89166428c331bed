"""Variants of EM on mixtures and HMMs: what each must reach, promise and refuse."""

import functools

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from models import CASES

import jaxem
from jaxem import EM, SQUAREM, Anderson
from jaxem.em import (
    Annealed,
    ClosedForm,
    Conditional,
    Constant,
    Exact,
    Geometric,
    Gradient,
    Hard,
    Incremental,
    Linear,
    Online,
    Overrelaxed,
    Power,
    Problem,
    Sampled,
    Tempered,
)

KEY = jax.random.key(0)
TRUTH = jaxem.HMM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], jaxem.emissions.Poisson([[2.0], [6.0]]))
SEQUENCES, _ = TRUTH.sample(KEY, 4, 50)
START = jaxem.HMM([0.5, 0.5], [[0.6, 0.4], [0.4, 0.6]], jaxem.emissions.Poisson([[3.0], [5.0]]))
LBFGS = Gradient(optax.lbfgs(), 5)
ACCELERATORS = (SQUAREM(), Anderson(), Overrelaxed())


def slow_mixture(seed, n=150):
    """Two overlapping Poisson laws, a random start and random weights."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(4.0, 1.0, (2, 1))
    x = rng.poisson(rate[rng.integers(0, 2, n)])
    start = jaxem.Mixture([0.5, 0.5], jaxem.emissions.Poisson(rng.gamma(4.0, 1.0, (2, 1))))
    return start, jnp.asarray(x), jnp.asarray(rng.gamma(2.0, 0.5, n))


@pytest.fixture(scope="module")
def best():
    return jaxem.fit(START, SEQUENCES)


HMM_VARIANTS = {
    # algorithm, steps, how far below EM's optimum it may end
    "annealed": (EM(Annealed(Geometric(3.0, 0.8))), 300, 1e-6),
    "stochastic": (EM(Sampled()), 60, 3.0),
    "Monte-Carlo": (EM(Sampled(20)), 30, 0.3),
    "stochastic approximation": (EM(Sampled(), Online(Power(0.7))), 300, 0.2),
    "incremental": (EM(accumulation=Incremental(2)), 100, 1e-6),
    "mini-batches": (EM(accumulation=Online(batch_size=2)), 300, 0.3),
    "gradient": (EM(maximization=LBFGS), 200, 1e-6),
    "conditional": (
        EM(
            maximization=Conditional(
                (("initial", "transition.matrix"), ClosedForm()), ("emission.rate", LBFGS)
            )
        ),
        200,
        1e-6,
    ),
    "SQUAREM": (SQUAREM(), 40, 1e-6),
    "Anderson": (Anderson(), 100, 1e-6),
    "over-relaxed": (Overrelaxed(), 100, 1e-6),
}


@pytest.mark.parametrize("name", HMM_VARIANTS)
def test_hmms_take_every_variant(name, best):
    algorithm, steps, slack = HMM_VARIANTS[name]
    solution = jaxem.fit(START, SEQUENCES, algorithm, key=KEY, max_steps=steps)
    assert best.objective - slack < solution.objective < best.objective + 1e-8
    np.testing.assert_allclose(
        solution.objective, jnp.sum(solution.model.log_prob(SEQUENCES)), rtol=1e-12
    )
    if algorithm.traits.monotone:
        history = solution.history[: int(solution.num_steps) + 1]
        assert np.all(np.diff(history) > -1e-9)


def test_a_tempered_chain_is_the_one_whose_paths_are_flattened():
    rng = np.random.default_rng(1)
    k, t, temperature = 3, 4, 2.5
    matrix = rng.dirichlet(np.ones(k), k)
    matrix[0, 2] = 0
    matrix /= matrix.sum(axis=1, keepdims=True)
    initial, log_b = rng.dirichlet(np.ones(k)), 2 * rng.normal(size=(t, k))
    for length in (None, 3):
        steps = length or t
        paths = np.stack(np.meshgrid(*[np.arange(k)] * steps, indexing="ij"), -1).reshape(-1, steps)
        joint = initial[paths[:, 0]] * np.exp(log_b[np.arange(steps), paths].sum(axis=1))
        joint = joint * np.prod(matrix[paths[:, :-1], paths[:, 1:]], axis=1)
        flat = joint ** (1 / temperature)
        observed = np.where(np.arange(t)[:, None] < steps, log_b, 0)
        chain = jaxem.latents.Chain(
            *map(jnp.asarray, (initial, matrix, observed)),
            None if length is None else jnp.asarray(length),
            None,
        )
        value, found = jaxem.latents.infer(chain, Tempered(temperature), None)
        np.testing.assert_allclose(value, temperature * np.log(flat.sum()), rtol=1e-12)
        for step in range(steps):
            shares = [flat[paths[:, step] == i].sum() / flat.sum() for i in range(k)]
            np.testing.assert_allclose(found.smoothed[step], shares, atol=1e-14)
        later = (np.arange(1, t) < steps)[:, None]
        moves = (found.before[:-1] * later).T @ found.after[1:] * found.ratio * matrix
        counts = np.zeros((k, k))
        for step in range(1, steps):
            np.add.at(counts, (paths[:, step - 1], paths[:, step]), flat / flat.sum())
        np.testing.assert_allclose(moves, counts, atol=1e-14)


def test_annealing_converges_at_temperature_one_only():
    start, x, sample_weight = slow_mixture(0)
    cold = EM(Annealed(Geometric(5.0, 0.99)))
    early = jaxem.fit(start, x, cold, sample_weight=sample_weight, max_steps=50)
    assert early.result == jaxem.RESULTS.max_steps_reached
    late = jaxem.fit(start, x, cold, sample_weight=sample_weight, max_steps=5000)
    assert late.result == jaxem.RESULTS.converged
    assert int(late.num_steps) >= 160
    exact = jaxem.fit(late.model, x, sample_weight=sample_weight)
    np.testing.assert_allclose(late.objective, exact.objective, atol=1e-9)


@eqx.filter_jit
def fits_of(problems, algorithm, max_steps):
    def run(start, x, sample_weight):
        options = dict(sample_weight=sample_weight, max_steps=max_steps, throw=False)
        return jaxem.fit(start, x, algorithm, **options)

    return jax.vmap(run)(*problems)


@functools.cache
def slow_fits():
    """40 random problems, and where EM ends."""
    problems = [slow_mixture(seed) for seed in range(40)]
    problems = jax.tree.map(lambda *leaves: np.stack(leaves), *problems)
    return problems, fits_of(problems, EM(), 3000)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ACCELERATORS, ids=lambda a: type(a).__name__)
def test_accelerators_never_fall_and_end_no_lower(algorithm):
    """40 random problems here; `python -m benchmarks.variants ascent` takes 1,000 of each."""

    problems, slow = slow_fits()
    fast = fits_of(problems, algorithm, 1000)
    total = np.sum(problems[2], axis=1)
    history = np.asarray(fast.history)
    falls = np.diff(history, axis=1)
    assert np.nanmin(falls) > -1e-10 * np.nanmax(np.abs(history))
    below = np.asarray(slow.objective - fast.objective) / total
    assert np.mean(below > 1e-6) <= 0.05, np.sort(below)[-10:]


def test_accelerators_need_far_fewer_e_steps_on_a_slow_problem():
    deaths = jnp.arange(10)[:, None]
    days = jnp.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
    start = jaxem.Mixture([0.3, 0.7], jaxem.emissions.Poisson([[1.0], [2.5]]))
    plain = jaxem.fit(start, deaths, sample_weight=days, max_steps=20_000)
    for algorithm, cost, gain in ((SQUAREM(), 4, 10), (Anderson(), 2, 10), (Overrelaxed(), 2, 1)):
        fast = jaxem.fit(start, deaths, algorithm, sample_weight=days, max_steps=20_000)
        assert fast.result == jaxem.RESULTS.converged
        assert gain * cost * int(fast.num_steps) < int(plain.num_steps)
        np.testing.assert_allclose(fast.objective, plain.objective, atol=1e-7)


def test_accelerators_do_not_stall_where_a_logarithm_runs_away():
    """One sequence starts in one state: the logarithm of the other's probability falls forever."""
    truth = jaxem.HMM([1.0, 0.0], [[0.8, 0.2], [0.2, 0.8]], jaxem.emissions.Poisson([[3.0], [4.0]]))
    x, _ = truth.sample(KEY, 1, 1000)
    start = jaxem.HMM([0.5, 0.5], [[0.6, 0.4], [0.4, 0.6]], jaxem.emissions.Poisson([[2.0], [6.0]]))
    plain = jaxem.fit(start, x, max_steps=20_000)
    assert plain.result == jaxem.RESULTS.converged
    assert jnp.min(plain.model.initial) < 1e-9
    for algorithm, cost in ((SQUAREM(), 4), (Anderson(), 2)):
        fast = jaxem.fit(start, x, algorithm, max_steps=20_000)
        assert fast.result == jaxem.RESULTS.converged
        assert 3 * cost * int(fast.num_steps) < int(plain.num_steps)
        assert fast.objective > plain.objective - 1e-6


def test_accelerators_keep_what_is_held_and_take_priors():
    case = CASES["gaussian"]()
    prior = case.model.prior(weights=2.0, components=case.prior)
    model = jaxem.freeze(case.model, "components.mean", mask=[True, False])
    plain = jaxem.fit(model, case.data, prior=prior)
    for algorithm in ACCELERATORS:
        fast = jaxem.fit(model, case.data, algorithm, prior=prior)
        np.testing.assert_array_equal(fast.model.components.mean[0], model.components.mean[0])
        np.testing.assert_allclose(fast.objective, plain.objective, rtol=1e-11)


@pytest.mark.parametrize(
    "algorithm",
    [*ACCELERATORS, EM(maximization=LBFGS), EM(Annealed(Geometric(2.0, 0.8)))],
    ids=lambda a: type(a).__name__,
)
def test_implicit_derivatives_are_those_of_em(algorithm):
    case = CASES["poisson"]()

    def mean(sample_weight, algorithm):
        fitted = jaxem.fit(case.model, case.data, algorithm, sample_weight=sample_weight).model
        return jnp.sum(fitted.components.rate**2)

    ones = jnp.ones(len(case.data))
    expected = jax.grad(mean)(ones, EM())
    np.testing.assert_allclose(jax.grad(mean)(ones, algorithm), expected, rtol=1e-6, atol=1e-9)


def test_a_gradient_step_never_lowers_q():
    """A learning rate that overshoots by far is cut back."""
    case = CASES["poisson"]()
    wild = EM(maximization=Gradient(optax.sgd(10.0), 1))
    solution = jaxem.fit(case.model, case.data, wild, max_steps=60, tol=0.0)
    assert np.all(np.diff(solution.history) > -1e-9)
    assert solution.history[-1] > solution.history[0]


def test_gradient_steps_compile_once():
    case = CASES["poisson"]()
    traces = []

    @eqx.filter_jit
    def step(algorithm, state, x):
        traces.append(None)
        return algorithm.step(state, x)

    algorithm = EM(maximization=Gradient(optax.adam(1e-2)))
    state = algorithm.init(case.model, case.data)
    for _ in range(3):
        state = step(algorithm, state, case.data)
    assert len(traces) == 1


@pytest.mark.parametrize("population", [None, 60.0])
def test_a_batch_without_weight_changes_nothing(population):
    model, x, *_ = CASES["gaussian"]()
    algorithm = EM(accumulation=Online(Power(0.7), population=population))
    state = algorithm.init(model, x)
    nothing = jaxem.em.Problem(x[:10], jnp.zeros(10))
    after = algorithm.step(state, nothing)
    np.testing.assert_allclose(after.objective, state.objective, rtol=1e-12)
    assert jnp.isfinite(algorithm.step(after, x).objective)


def test_online_em_over_batches_of_a_stream_stands_for_its_population():
    truth = jaxem.Mixture([0.3, 0.7], jaxem.emissions.Poisson([[1.0, 2.0], [8.0, 5.0]]))
    draws, _ = truth.sample(KEY, 3000)
    algorithm = EM(accumulation=Online(Power(0.7), population=3000.0))
    start = jaxem.Mixture([0.5, 0.5], jaxem.emissions.Poisson([[2.0, 3.0], [6.0, 4.0]]))
    state = algorithm.init(start, draws[:100])
    for batch in range(1, 30):
        state = algorithm.step(state, draws[100 * batch : 100 * (batch + 1)])
    counts, _ = state.statistics.sums
    np.testing.assert_allclose(jnp.sum(counts), 3000.0, rtol=1e-10)
    full = jaxem.fit(truth, draws)
    assert jnp.mean(state.model.log_prob(draws)) > full.objective / 3000 - 0.01


@pytest.mark.parametrize("size", [1, 3, 7])
@pytest.mark.parametrize("weighted", [False, True])
def test_a_batch_stands_for_all_the_data_whatever_its_size(size, weighted):
    """Unit i is drawn with its weight on average: within 6 standard errors of 20,000 batches."""
    n, repeats = 7, 20_000
    x, w = jnp.arange(n), jnp.linspace(0.5, 2.0, n) if weighted else None

    def weight_of_each(key):
        part, times, chosen = Online(batch_size=size).select(None, Problem(x, w), 0, key)
        weight = part.sample_weight
        return jnp.zeros(n).at[chosen].add(times * (1 if weight is None else weight))

    drawn = jax.vmap(weight_of_each)(jax.random.split(KEY, repeats))
    expected = jnp.ones(n) if w is None else w
    error = drawn.std(axis=0) / repeats**0.5
    assert jnp.all(jnp.abs(drawn.mean(axis=0) - expected) <= 6 * error)
    if not weighted:
        np.testing.assert_allclose(drawn.sum(axis=1), n)
    if size == n:
        np.testing.assert_array_equal(drawn, jnp.broadcast_to(expected, (repeats, n)))


@pytest.mark.parametrize(
    "accumulation",
    [Online, lambda **options: Online(batch_size=20, **options)],
    ids=["running", "batch"],
)
def test_polyak_averaging_ends_at_the_mean_of_the_running_statistics(accumulation):
    case = CASES["poisson"]()
    averaging, steps, first = accumulation(average_from=4), 9, 4
    prior = case.model.prior(weights=2.0, components=case.prior)
    algorithm, plain = EM(Sampled(), averaging), EM(Sampled(), accumulation())
    options = {"prior": prior, "key": KEY, "max_steps": steps}
    found = jaxem.fit(case.model, case.data, algorithm, **options)
    same = jaxem.fit(case.model, case.data, plain, **options)
    np.testing.assert_allclose(found.history, same.history, rtol=1e-12)

    state, kept = plain.init(case.model, case.data, key=jax.random.fold_in(KEY, 0)), []
    for step in range(1, steps + 1):
        key = jax.random.fold_in(KEY, step)
        state = plain.step(state, Problem(case.data, prior=prior), key=key)
        kept.append(state.statistics)
    last = kept[first - 1]
    for other in kept[first:]:
        last = last + other
    mean = (1 / (steps - first + 1)) * last
    expected = case.model.m_step(mean + prior)
    for a, b in zip(*map(jax.tree.leaves, (found.model, expected)), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9)


def test_incremental_em_beats_em_in_passes():
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(600, 2)) + 2.0 * rng.integers(0, 2, (600, 1)))
    start = jaxem.Mixture(
        [0.5, 0.5], jaxem.emissions.SphericalGaussian([[0.0, 0.5], [1.0, 1.5]], [1.0, 1.0])
    )
    best_value = jaxem.fit(start, x).objective
    plain = jaxem.fit(start, x, tol=0.0, max_steps=10)
    blocks = EM(accumulation=Incremental(10))
    parts = jaxem.fit(start, x, blocks, tol=0.0, max_steps=9 * 10)  # its start takes one pass
    assert best_value - parts.objective < 0.5 * (best_value - plain.objective)


def weightless_block():
    return jnp.ones(48).at[8:16].set(0)


@pytest.mark.parametrize(
    ("num_blocks", "sample_weight"),
    [(6, weightless_block), (20, lambda: None), (31, lambda: None)],
    ids=["a block without weight", "blocks of two sizes", "blocks of one observation and of two"],
)
def test_incremental_em_converges_where_em_does(num_blocks, sample_weight):
    case, sample_weight = CASES["spherical"](), sample_weight()
    whole = jaxem.fit(case.model, case.data, sample_weight=sample_weight)
    blocks = EM(accumulation=Incremental(num_blocks))
    parts = jaxem.fit(case.model, case.data, blocks, sample_weight=sample_weight, max_steps=20_000)
    assert parts.result == jaxem.RESULTS.converged
    assert abs(parts.objective - whole.objective) < 1e-8


def test_incremental_em_ends_with_its_own_objective():
    case = CASES["poisson"]()
    for posterior in (Hard(), Tempered(2.0)):
        whole = jaxem.fit(case.model, case.data, EM(posterior))
        parts = jaxem.fit(case.model, case.data, EM(posterior, Incremental(4)))
        assert abs(parts.objective - whole.objective) < 1e-6
        assert abs(parts.history[parts.num_steps] - parts.objective) < 1e-6


@pytest.mark.parametrize(
    ("optimiser", "num_steps"),
    [
        pytest.param(optax.sgd(1.0), 5, id="too long"),
        pytest.param(optax.sgd(1e9), 20, id="beyond all numbers"),
        pytest.param(optax.adam(1.0), 5, id="Adam"),
        pytest.param(optax.adam(1.0), 20, id="Adam, many steps"),
        pytest.param(optax.lbfgs(), 5, id="L-BFGS"),
    ],
)
def test_a_step_that_was_cut_is_not_convergence(optimiser, num_steps):
    case = CASES["poisson"]()
    best_value = jaxem.fit(case.model, case.data).objective
    climb = EM(maximization=Gradient(optimiser, num_steps))
    solution = jaxem.fit(case.model, case.data, climb, max_steps=2_000)
    assert solution.result == jaxem.RESULTS.converged
    assert abs(solution.objective - best_value) < 1e-6


def test_frames_of_inputs_are_no_parameters():
    case = CASES["linear-regression"]()
    rest = ("components.coefficients", "components.intercept", "components.covariance")
    blocks = Conditional(("weights", Gradient(optax.lbfgs())), (rest, ClosedForm()))
    ended = jaxem.fit(case.model, case.data, EM(maximization=blocks))
    assert ended.result == jaxem.RESULTS.converged
    assert abs(ended.objective - jaxem.fit(case.model, case.data).objective) < 1e-7


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_squarem_does_not_depend_on_units(scale):
    case = CASES["gaussian"]()

    def steps(unit):
        components = case.model.components
        mean, covariance = unit * components.mean, unit**2 * components.covariance
        model = jaxem.Mixture(case.model.weights, jaxem.emissions.Gaussian(mean, covariance))
        return int(jaxem.fit(model, unit * jnp.asarray(case.data), SQUAREM()).num_steps)

    assert abs(steps(scale) - steps(1.0)) <= 3


def test_the_error_is_told_where_steps_have_a_rate():
    case = CASES["poisson"]()
    assert jnp.isfinite(jaxem.fit(case.model, case.data).error)
    for algorithm in (SQUAREM(), Anderson(), EM(accumulation=Incremental(4))):
        solution = jaxem.fit(case.model, case.data, algorithm)
        assert jnp.isnan(solution.error) and "error" not in repr(solution)


@pytest.mark.parametrize(
    ("name", "algorithm"),
    [
        ("gradient-emission", EM()),
        *(("log-joint", algorithm) for algorithm in (EM(), Anderson(), Overrelaxed(), SQUAREM())),
    ],
    ids=repr,
)
def test_steps_along_the_slope_converge_and_have_derivatives(name, algorithm):
    case = CASES[name]()
    sample_weight = jnp.ones(48)

    def end(sample_weight, algorithm, **options):
        solution = jaxem.fit(
            case.model, case.data, algorithm, sample_weight=sample_weight, **options
        )
        return jnp.sum(ravel_pytree(solution.model)[0] ** 2), solution

    grad, solution = jax.grad(end, has_aux=True)(sample_weight, algorithm)
    assert solution.result == jaxem.RESULTS.converged
    step = 1e-4 * jnp.zeros(48).at[1].set(1)
    exact = dict(tol=1e-13, max_steps=5_000)
    difference = (
        end(sample_weight + step, EM(), **exact)[0] - end(sample_weight - step, EM(), **exact)[0]
    )
    assert abs(grad[1] - difference / 2e-4) < 1e-5 * jnp.max(jnp.abs(grad))


def test_annealing_guards_the_steps_that_it_cannot_trust():
    def log_joint(params, x):
        return -0.5e4 * (x[:, :1] - params) ** 2

    model = jaxem.from_log_joint(log_joint, jnp.array([0.0, 1.0]))
    x = jnp.asarray(CASES["spherical"]().data)
    plain = jaxem.fit(model, x)
    cooled = jaxem.fit(model, x, EM(Annealed(Geometric(2.0, 0.5))))
    assert cooled.result == jaxem.RESULTS.converged
    assert abs(cooled.objective / plain.objective - 1) < 1e-9


@pytest.mark.parametrize(
    "algorithm", [SQUAREM(), Anderson(), EM(accumulation=Incremental(5))], ids=repr
)
def test_unrolled_derivatives_of_steps_that_remember(algorithm):
    case = CASES["poisson"]()

    def value(sample_weight):
        options = dict(adjoint=jaxem.em.Unrolled(), max_steps=5, tol=0.0)
        model = jaxem.fit(
            case.model, case.data, algorithm, sample_weight=sample_weight, **options
        ).model
        return jnp.sum(model.components.rate**2)

    sample_weight, step = jnp.ones(48), 1e-5 * jnp.zeros(48).at[3].set(1)
    difference = (value(sample_weight + step) - value(sample_weight - step)) / 2e-5
    assert abs(jax.grad(value)(sample_weight)[3] - difference) < 1e-4 * abs(difference) + 1e-8


def test_unrolled_derivatives_at_a_point_that_stands_still():
    x = jnp.asarray(CASES["poisson"]().data)

    def value(sample_weight):
        options = dict(adjoint=jaxem.em.Unrolled(), max_steps=20)
        model = jaxem.Mixture([1.0], jaxem.emissions.Poisson([[2.0, 2.0]]))
        return jaxem.fit(
            model, x, SQUAREM(), sample_weight=sample_weight, **options
        ).model.components.rate[0, 0]

    grad = jax.grad(value)(jnp.ones(48))
    assert jnp.allclose(grad, (x[:, 0] - jnp.mean(x[:, 0])) / 48, atol=1e-10)


def test_random_restarts_have_keys_of_their_own():
    case = CASES["poisson"]()
    models = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), case.model)
    options = dict(key=KEY, max_steps=5)
    ends = jaxem.fit_restarts(models, case.data, EM(Sampled()), **options).objective
    assert len(np.unique(np.asarray(ends))) == 3
    polished = dict(short_steps=2, num_polished=2, **options)
    assert jaxem.fit_restarts(models, case.data, EM(Sampled()), **polished).objective.shape == (2,)


def test_a_fit_that_ends_before_its_average_begins_returns_its_own_model():
    case = CASES["poisson"]()
    plain, averaged = (EM(accumulation=Online(average_from=at)) for at in (None, 9))
    for steps in (0, 5):
        a, b = (jaxem.fit(case.model, case.data, e, max_steps=steps) for e in (plain, averaged))
        chex.assert_trees_all_close(a.model, b.model, rtol=1e-14)


def test_annealing_keeps_the_dtype_of_the_model():
    case = CASES["poisson"]()
    model = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), case.model)
    for algorithm in (EM(Annealed()), EM(maximization=Gradient(optax.lbfgs()))):
        assert jaxem.fit(model, case.data, algorithm).objective.dtype == jnp.float32


def test_batches_may_be_arrays_of_others():
    case = CASES["poisson"]()

    class Tensor:  # as PyTorch and pandas have it
        def __array__(self, dtype=None, copy=None):
            return np.asarray(case.data, dtype)

    for algorithm in (EM(accumulation=Online()), EM(accumulation=Online(batch_size=8)), SQUAREM()):
        ends = []
        for data in (case.data, np.asarray(case.data), Tensor()):
            state = algorithm.init(case.model, data, key=KEY)
            ends.append(algorithm.step(state, Problem(data, np.ones(48)), key=KEY).objective)
        assert ends[0] == ends[1] == ends[2]


CLIMB = Gradient(optax.lbfgs(), objective=True)
REFUSED = {
    "a constant rate": (lambda: Online(Constant(0.1)), "Robbins and Monro"),
    "a rate that falls too slowly": (lambda: Online(Power(0.4), batch_size=8), "Robbins and Monro"),
    "a rate that falls too fast": (lambda: Online(Power(1.5)), "Robbins and Monro"),
    "a rate in words": (lambda: Online("fast"), "Robbins and Monro"),
    "an empty batch": (lambda: Online(batch_size=0), "batch_size must be an integer ≥ 1"),
    "an average from no step": (lambda: Online(average_from=0), "must be an integer ≥ 1, got 0"),
    "an average from a share": (lambda: Online(batch_size=8, average_from=0.5), "≥ 1, got 0.5"),
    "no block": (lambda: Incremental(0), "num_blocks must be an integer ≥ 1"),
    "no draw": (lambda: Sampled(0), "draws ≥ 1"),
    "a schedule of no draws": (lambda: Sampled(Constant(0.0)), "draws ≥ 1"),
    "a temperature that stays": (lambda: Annealed(Constant(2.0)), r"ends at 1.*Tempered"),
    "a temperature that ends above 1": (lambda: Annealed(Geometric(5.0, 0.9, 2.0)), "ends at 1"),
    "a temperature for a schedule": (lambda: Annealed(2.0), "takes a schedule"),
    "a negative temperature": (lambda: Tempered(-1.0), "must be positive"),
    "a schedule that stays away": (lambda: Geometric(0.5, 1.0), "never reaches"),
    "a negative population": (lambda: Online(population=-5.0), "population must not be negative"),
    "a share of a burn-in": (lambda: Power(burn_in=2.5), "burn_in must be an integer"),
    "one batch's objective": (
        lambda: EM(accumulation=Online(batch_size=8), maximization=CLIMB),
        "use Full",
    ),
    "one block's objective": (
        lambda: EM(accumulation=Incremental(2), maximization=Conditional(("weights", CLIMB))),
        "use Full",
    ),
    "a slot in another's place": (lambda: EM(Online()), r"write accumulation=Online"),
    "an accelerator in a slot": (lambda: EM(SQUAREM()), "goes around an EM"),
    "a bare optimiser": (
        lambda: EM(maximization=optax.adam(1e-2)),
        r"maximization=Gradient\(optimiser\)",
    ),
    "a class in a slot": (lambda: EM(Hard), r"a class: write Hard"),
    "a schedule that leads away": (lambda: Geometric(3.0, 1.1), "never reaches"),
    "a negative exponent": (lambda: Power(-0.6), "positive"),
    "a number of draws that falls": (lambda: Linear(5.0, -1.0), "no negative slope"),
    "acceleration of random steps": (lambda: SQUAREM(EM(Sampled())), "multiplies their noise"),
    "acceleration of batches": (
        lambda: Anderson(EM(accumulation=Online(batch_size=8))),
        "deterministic",
    ),
    "acceleration while annealing": (lambda: SQUAREM(EM(Annealed())), "anneal first"),
    "acceleration of no EM": (lambda: Overrelaxed(SQUAREM()), "accelerates an EM"),
    "an order of nothing": (lambda: Anderson(order=0), "order must be an integer ≥ 1"),
    "no growth": (lambda: Overrelaxed(growth=1.0), "must grow"),
    "no optimiser": (lambda: Gradient("adam"), "Optax optimiser"),
    "no gradient step": (lambda: Gradient(optax.adam(1e-2), 0), "num_steps must be an integer ≥ 1"),
    "no block of parameters": (lambda: Conditional(), "pairs of parameter names"),
    "a block without its M-step": (lambda: Conditional("weights"), "pairs of parameter names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused_when_it_is_made(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


REFUSED_BY_FIT = {
    "batches without a key": (EM(accumulation=Online(batch_size=8)), {}, "a key"),
    "a batch of more than all": (
        EM(accumulation=Online(batch_size=1000)),
        {"key": KEY},
        "batch_size=1000 exceeds the number of observations, 48",
    ),
    "draws without a key": (EM(Sampled()), {}, "a key"),
    "more blocks than observations": (
        EM(accumulation=Incremental(1000)),
        {},
        "num_blocks=1000 exceeds",
    ),
    "a parameter that is none": (
        EM(maximization=Conditional(("components.mean", ClosedForm()))),
        {},
        "not a parameter",
    ),
    "a parameter in no block": (
        EM(maximization=Conditional(("weights", ClosedForm()))),
        {},
        r"freeze\(model, 'components.rate'\)",
    ),
}


@pytest.mark.parametrize("name", REFUSED_BY_FIT)
def test_nonsense_is_refused_by_fit(name):
    algorithm, options, message = REFUSED_BY_FIT[name]
    case = CASES["poisson"]()
    with pytest.raises(ValueError, match=message):
        jaxem.fit(case.model, case.data, algorithm, **options)


def test_what_cannot_be_judged_or_named_is_refused():
    case = CASES["log-joint"]()
    with pytest.raises(ValueError, match="LogJointModel has the slope of Q alone"):
        jaxem.fit(case.model, case.data, EM(Sampled()), key=KEY)
    with pytest.raises(ValueError, match="LogJointModel hold only near"):
        jaxem.fit(case.model, case.data, EM(accumulation=Online()))
    with pytest.raises(ValueError, match="LogJointModel has none"):
        jaxem.fit(case.model, case.data, EM(maximization=Conditional(("a", ClosedForm()))))
    with pytest.raises(ValueError, match="State that init gave"):
        EM().step(case.model, case.data)


@pytest.mark.parametrize(
    "algorithm",
    [EM(Sampled()), EM(accumulation=Online(batch_size=8)), EM(accumulation=Incremental(4))],
)
def test_random_and_remembering_variants_have_no_implicit_derivative(algorithm):
    case = CASES["poisson"]()

    def value(sample_weight):
        options = {"sample_weight": sample_weight, "key": KEY, "max_steps": 5}
        return jaxem.fit(case.model, case.data, algorithm, **options).objective

    with pytest.raises(ValueError, match="Implicit needs a deterministic algorithm"):
        jax.grad(lambda w: value(w))(jnp.ones(len(case.data)))


def test_settings_compare_by_value():
    assert hash(EM(Annealed(Geometric(2.0, 0.9)))) == hash(EM(Annealed(Geometric(2.0, 0.9))))
    assert EM(Sampled(Linear(1, 2)), Online(Power(0.7))) == EM(
        Sampled(Linear(1, 2)), Online(Power(0.7))
    )
    assert EM(Hard()) != EM(Exact())
