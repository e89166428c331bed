"""Variants of EM on mixtures and HMMs: what each must reach, promise and refuse."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import CASES

import jaxem
from jaxem import (
    EM,
    SQUAREM,
    Anderson,
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
    Minibatch,
    Overrelaxed,
    Power,
    Running,
    Sampled,
    Tempered,
)

KEY = jax.random.key(0)
TRUTH = jaxem.HMM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], jaxem.Poisson([[2.0], [6.0]]))
SEQUENCES, _ = TRUTH.sample(KEY, 4, 50)
START = jaxem.HMM([0.5, 0.5], [[0.6, 0.4], [0.4, 0.6]], jaxem.Poisson([[3.0], [5.0]]))
LBFGS = Gradient(optax.lbfgs(), 5)
ACCELERATORS = (SQUAREM(), Anderson(), Overrelaxed())


def slow_mixture(seed, n=150):
    """Two overlapping Poisson laws, a random start and random unit weights."""
    rng = np.random.default_rng(seed)
    rate = rng.gamma(4.0, 1.0, (2, 1))
    x = rng.poisson(rate[rng.integers(0, 2, n)])
    start = jaxem.Mixture([0.5, 0.5], jaxem.Poisson(rng.gamma(4.0, 1.0, (2, 1))))
    return start, jnp.asarray(x), jnp.asarray(rng.gamma(2.0, 0.5, n))


@pytest.fixture(scope="module")
def best():
    return jaxem.fit(START, SEQUENCES)


HMM_VARIANTS = {
    # algorithm, steps, how far below EM's optimum it may end
    "annealed": (EM(Annealed(Geometric(3.0, 0.8))), 300, 1e-6),
    "stochastic": (EM(Sampled()), 60, 3.0),
    "Monte-Carlo": (EM(Sampled(20)), 30, 0.3),
    "stochastic approximation": (EM(Sampled(), Running(Power(0.7))), 300, 0.2),
    "incremental": (EM(accumulation=Incremental(2)), 100, 1e-6),
    "mini-batches": (EM(accumulation=Minibatch(2)), 300, 0.3),
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
    if algorithm.ascends:
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
        found = Tempered(temperature).marginalize_chain(
            *map(jnp.asarray, (initial, matrix, observed)),
            None if length is None else jnp.asarray(length),
            None,
        )
        np.testing.assert_allclose(
            found.log_likelihood, temperature * np.log(flat.sum()), rtol=1e-12
        )
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
    start, x, weights = slow_mixture(0)
    cold = EM(Annealed(Geometric(5.0, 0.99)))
    early = jaxem.fit(start, x, cold, weights=weights, max_steps=50)
    assert early.result == jaxem.RESULTS.max_steps_reached
    late = jaxem.fit(start, x, cold, weights=weights, max_steps=5000)
    assert late.result == jaxem.RESULTS.converged
    assert int(late.num_steps) >= 160
    exact = jaxem.fit(late.model, x, weights=weights)
    np.testing.assert_allclose(late.objective, exact.objective, atol=1e-9)


@pytest.mark.parametrize("algorithm", ACCELERATORS, ids=lambda a: type(a).__name__)
def test_accelerators_never_fall_and_end_no_lower(algorithm):
    """100 random problems here; `python -m benchmarks.variants ascent` takes 1,000 of each."""

    @eqx.filter_jit
    @jax.vmap
    def run(start, x, weights):
        fast = jaxem.fit(start, x, algorithm, weights=weights, max_steps=1000, throw=False)
        slow = jaxem.fit(start, x, weights=weights, max_steps=3000, throw=False)
        return fast, slow

    problems = [slow_mixture(seed) for seed in range(100)]
    fast, slow = run(*jax.tree.map(lambda *leaves: jnp.stack(leaves), *problems))
    total = np.array([float(jnp.sum(w)) for _, _, w in problems])
    history = np.asarray(fast.history)
    falls = np.diff(history, axis=1)
    assert np.nanmin(falls) > -1e-10 * np.nanmax(np.abs(history))
    below = np.asarray(slow.objective - fast.objective) / total
    assert np.mean(below > 1e-6) <= 0.05, np.sort(below)[-10:]


def test_accelerators_need_far_fewer_e_steps_on_a_slow_problem():
    deaths = jnp.arange(10)[:, None]
    days = jnp.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
    start = jaxem.Mixture([0.3, 0.7], jaxem.Poisson([[1.0], [2.5]]))
    plain = jaxem.fit(start, deaths, weights=days, max_steps=20_000)
    for algorithm, cost, gain in ((SQUAREM(), 4, 10), (Anderson(), 2, 10), (Overrelaxed(), 2, 1)):
        fast = jaxem.fit(start, deaths, algorithm, weights=days, max_steps=20_000)
        assert fast.result == jaxem.RESULTS.converged
        assert gain * cost * int(fast.num_steps) < int(plain.num_steps)
        np.testing.assert_allclose(fast.objective, plain.objective, atol=1e-7)


def test_accelerators_do_not_stall_where_a_logarithm_runs_away():
    """One sequence starts in one state: the logarithm of the other's probability falls forever."""
    truth = jaxem.HMM([1.0, 0.0], [[0.8, 0.2], [0.2, 0.8]], jaxem.Poisson([[3.0], [4.0]]))
    x, _ = truth.sample(KEY, 1, 1000)
    start = jaxem.HMM([0.5, 0.5], [[0.6, 0.4], [0.4, 0.6]], jaxem.Poisson([[2.0], [6.0]]))
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
    prior = case.model.prior(2.0, case.prior)
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

    def mean(weights, algorithm):
        fitted = jaxem.fit(case.model, case.data, algorithm, weights=weights).model
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


def test_online_em_over_batches_of_a_stream_stands_for_its_population():
    truth = jaxem.Mixture([0.3, 0.7], jaxem.Poisson([[1.0, 2.0], [8.0, 5.0]]))
    draws, _ = truth.sample(KEY, 3000)
    algorithm = EM(accumulation=Running(Power(0.7), population=3000.0))
    start = jaxem.Mixture([0.5, 0.5], jaxem.Poisson([[2.0, 3.0], [6.0, 4.0]]))
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
        chosen, weight, times = Minibatch(size).select(None, x, w, 0, key)
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
    "accumulation", [Running, lambda **options: Minibatch(20, **options)], ids=["running", "batch"]
)
def test_polyak_averaging_ends_at_the_mean_of_the_running_statistics(accumulation):
    case = CASES["poisson"]()
    averaging, steps, first = accumulation(average_from=4), 9, 4
    prior = case.model.prior(2.0, case.prior)
    algorithm, plain = EM(Sampled(), averaging), EM(Sampled(), accumulation())
    options = {"prior": prior, "key": KEY, "max_steps": steps}
    found = jaxem.fit(case.model, case.data, algorithm, **options)
    same = jaxem.fit(case.model, case.data, plain, **options)
    np.testing.assert_allclose(found.history, same.history, rtol=1e-12)

    state, kept = plain.init(case.model, case.data, key=jax.random.fold_in(KEY, 0)), []
    for step in range(1, steps + 1):
        key = jax.random.fold_in(KEY, step)
        state = plain.step(state, case.data, prior=prior, key=key)
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
    start = jaxem.Mixture([0.5, 0.5], jaxem.SphericalGaussian([[0.0, 0.5], [1.0, 1.5]], [1.0, 1.0]))
    best_value = jaxem.fit(start, x).objective
    plain = jaxem.fit(start, x, tol=0.0, max_steps=10)
    blocks = EM(accumulation=Incremental(10))
    parts = jaxem.fit(start, x, blocks, tol=0.0, max_steps=9 * 10)  # its start takes one pass
    assert best_value - parts.objective < 0.5 * (best_value - plain.objective)


REFUSED = {
    "a constant rate": (lambda: Running(Constant(0.1)), "Robbins and Monro"),
    "a rate that falls too slowly": (lambda: Minibatch(8, Power(0.4)), "Robbins and Monro"),
    "a rate that falls too fast": (lambda: Running(Power(1.5)), "Robbins and Monro"),
    "a rate in words": (lambda: Running("fast"), "Robbins and Monro"),
    "an empty batch": (lambda: Minibatch(0), "one unit or more"),
    "an average from no step": (lambda: Running(average_from=0), "number of a step"),
    "an average from a share": (lambda: Minibatch(8, average_from=0.5), "number of a step"),
    "no block": (lambda: Incremental(0), "one block or more"),
    "no draw": (lambda: Sampled(0), "draws ≥ 1"),
    "a schedule that leads away": (lambda: Geometric(3.0, 1.1), "never reaches"),
    "a negative exponent": (lambda: Power(-0.6), "positive"),
    "a number of draws that falls": (lambda: Linear(5.0, -1.0), "no negative slope"),
    "acceleration of random steps": (lambda: SQUAREM(EM(Sampled())), "multiplies their noise"),
    "acceleration of batches": (lambda: Anderson(EM(accumulation=Minibatch(8))), "deterministic"),
    "acceleration while annealing": (lambda: SQUAREM(EM(Annealed())), "anneal first"),
    "acceleration of no EM": (lambda: Overrelaxed(SQUAREM()), "accelerates an EM"),
    "an order of nothing": (lambda: Anderson(order=0), "one step or more"),
    "no growth": (lambda: Overrelaxed(growth=1.0), "must grow"),
    "no optimiser": (lambda: Gradient("adam"), "Optax optimiser"),
    "no gradient step": (lambda: Gradient(optax.adam(1e-2), 0), "one step or more"),
    "no block of parameters": (lambda: Conditional(), "pairs of parameter names"),
    "a block without its M-step": (lambda: Conditional("weights"), "pairs of parameter names"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_nonsense_is_refused_when_it_is_made(name):
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        make()


REFUSED_BY_FIT = {
    "batches without a key": (EM(accumulation=Minibatch(8)), {}, "a key"),
    "a batch of more than all": (
        EM(accumulation=Minibatch(1000)),
        {"key": KEY},
        "batch of 1000 units cannot be drawn",
    ),
    "draws without a key": (EM(Sampled()), {}, "a key"),
    "more blocks than units": (EM(accumulation=Incremental(1000)), {}, "cannot make 1000 blocks"),
    "a parameter that is none": (
        EM(maximization=Conditional(("components.mean", ClosedForm()))),
        {},
        "not a natural parameter",
    ),
}


@pytest.mark.parametrize("name", REFUSED_BY_FIT)
def test_nonsense_is_refused_by_fit(name):
    algorithm, options, message = REFUSED_BY_FIT[name]
    case = CASES["poisson"]()
    with pytest.raises(ValueError, match=message):
        jaxem.fit(case.model, case.data, algorithm, **options)


@pytest.mark.parametrize(
    "algorithm", [EM(Sampled()), EM(accumulation=Minibatch(8)), EM(accumulation=Incremental(4))]
)
def test_random_and_remembering_variants_have_no_implicit_derivative(algorithm):
    case = CASES["poisson"]()

    def value(weights):
        options = {"weights": weights, "key": KEY, "max_steps": 5}
        return jaxem.fit(case.model, case.data, algorithm, **options).objective

    with pytest.raises(ValueError, match="Implicit needs a deterministic algorithm"):
        jax.grad(lambda w: value(w))(jnp.ones(len(case.data)))


def test_settings_compare_by_value():
    assert hash(EM(Annealed(Geometric(2.0, 0.9)))) == hash(EM(Annealed(Geometric(2.0, 0.9))))
    assert EM(Sampled(Linear(1, 2)), Running(Power(0.7))) == EM(
        Sampled(Linear(1, 2)), Running(Power(0.7))
    )
    assert EM(Hard()) != EM(Exact())
