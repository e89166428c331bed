"""EM as a pure (init, step) with three slots, the loop around it, and what it reports."""

import functools
from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import CASES, COUNTS, MEAN, POINTS

import jaxem
from jaxem import EM, SQUAREM, Anderson
from jaxem.em import (
    Annealed,
    ClosedForm,
    Conditional,
    Geometric,
    Gradient,
    Incremental,
    Linear,
    Online,
    Overrelaxed,
    Power,
    Problem,
    Sampled,
    Traits,
)

# Deaths of women of 80 years and more reported by The Times, 1910–1912 (Hasselblad 1969).
DEATHS = jnp.arange(10)[:, None]
DAYS = jnp.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
X = jnp.asarray(COUNTS)


def london():
    return jaxem.Mixture([0.3, 0.7], jaxem.emissions.Poisson([[1.0], [2.5]]))


def poissons():
    return CASES["poisson"]().model


@eqx.filter_jit
def step(algorithm, state, data, sample_weight=None, prior=None, key=None):
    return algorithm.step(state, Problem(data, sample_weight, prior), key=key)


@eqx.filter_jit
def init(algorithm, model, data, sample_weight=None, prior=None, key=None):
    return algorithm.init(model, Problem(data, sample_weight, prior), key=key)


def equal(a, b, tol=0.0):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tol, atol=tol)


@pytest.mark.parametrize("dtype", [bool, jnp.uint8, np.int64])
def test_weights_may_be_whole_numbers_or_booleans(dtype):
    """Counts of repeats, and a selection, are what their floating values are."""
    weight = (np.arange(len(X)) % 3 * 100).astype(dtype)  # whose sum is no uint8
    pair = weight, jnp.asarray(weight, float)
    equal(*(poissons().e_step(X, w) for w in pair))
    equal(*(jaxem.fit(poissons(), X, sample_weight=w, max_steps=3, throw=False) for w in pair))
    start = functools.partial(jaxem.Mixture.init, jax.random.key(0), X, 2, jaxem.emissions.Poisson)
    equal(*(start(sample_weight=w) for w in pair))


def test_weights_of_sequences_may_be_whole_numbers():
    case = CASES["hmm-categorical"]()
    weight = np.arange(len(jax.tree.leaves(case.data)[0])) % 3
    pair = weight, jnp.asarray(weight, float)
    equal(*(case.model.e_step(case.data, w) for w in pair))
    family = functools.partial(jaxem.emissions.Categorical, num_categories=3)
    moves = jaxem.factors.Transition.left_to_right(2)
    start = functools.partial(jaxem.HMM.init, jax.random.key(0), case.data, 2, family)
    equal(*(start(sample_weight=w, transition=moves) for w in pair))


# The pure pair


def test_init_is_one_e_step_and_step_is_an_m_step_then_an_e_step():
    model = poissons()
    state = init(EM(), model, X)
    statistics, value = model.e_step(X)
    equal((state.statistics.sums, state.log_likelihood), (statistics.sums, value), 1e-12)
    assert int(state.step) == 0
    before = jax.tree.map(np.array, state)
    after = step(EM(), state, X)
    equal(state, before)  # the old state is untouched
    equal(step(EM(), state, X), after)  # and the same again
    equal(after.model, model.m_step(statistics), 1e-12)
    statistics, value = after.model.e_step(X)
    equal((after.statistics.sums, after.objective), (statistics.sums, value), 1e-12)
    assert int(after.step) == 1


@pytest.mark.parametrize("kind", ["plain", "weights", "prior"])
def test_fit_is_its_own_python_loop(kind):
    case = CASES["poisson"]()
    sample_weight = jnp.linspace(0, 2, len(X)) if kind == "weights" else None
    prior = case.model.prior(weights=2.0, components=case.prior) if kind == "prior" else None
    solution = jaxem.fit(
        case.model, X, sample_weight=sample_weight, prior=prior, tol=0.0, max_steps=6
    )
    state = init(EM(), case.model, X, sample_weight, prior)
    history = [state.objective]
    for _ in range(6):
        state = step(EM(), state, X, sample_weight, prior)
        history.append(state.objective)
    equal(solution.model, state.model, 1e-12)
    equal(solution.statistics.sums, state.statistics.sums, 1e-12)
    np.testing.assert_allclose(solution.history, jnp.stack(history), rtol=1e-13)
    assert int(solution.num_steps) == int(state.step) == 6


def test_statistics_of_batches_add_up_to_a_step():
    model = poissons()
    parts = [model.e_step(X[rows])[0] for rows in (slice(0, 20), slice(20, 48))]
    equal(model.m_step(parts[0] + parts[1]), step(EM(), init(EM(), model, X), X).model, 1e-12)


# What the loop reports


def test_history_is_padded_with_nan():
    solution = jaxem.fit(poissons(), X, max_steps=400)
    steps = int(solution.num_steps)
    assert solution.result == jaxem.RESULTS.converged
    assert 2 < steps < 400
    assert solution.history.shape == (401,)
    assert np.all(np.isfinite(solution.history[: steps + 1]))
    assert np.all(np.isnan(solution.history[steps + 1 :]))
    assert solution.history[steps] == solution.objective
    assert np.all(np.diff(solution.history[: steps + 1]) > -1e-10)


def test_no_steps_give_the_start_and_its_likelihood():
    model = poissons()
    solution = jaxem.fit(model, X, max_steps=0)
    equal(solution.model, model)
    assert int(solution.num_steps) == 0
    assert solution.history.shape == (1,)
    assert solution.result == jaxem.RESULTS.max_steps_reached
    np.testing.assert_allclose(solution.objective, model.log_prob(X).sum(), rtol=1e-12)
    assert np.isnan(solution.error)


def test_tol_zero_takes_every_step():
    solution = jaxem.fit(poissons(), X, tol=0.0, max_steps=400)
    assert int(solution.num_steps) == 400
    assert solution.result == jaxem.RESULTS.max_steps_reached
    assert float(solution.error) < 1e-12


@pytest.mark.parametrize("tol", [1e-3, 1e-6])
def test_it_stops_at_the_first_step_within_tol_per_unit_of_weight(tol):
    solution = jaxem.fit(london(), DEATHS, sample_weight=DAYS, tol=tol, max_steps=4000)
    total = DAYS.sum()
    state = init(EM(), london(), DEATHS, DAYS)
    for number in range(1, int(solution.num_steps) + 1):
        new = step(EM(), state, DEATHS, DAYS)
        moved = new.statistics.at(state.model)
        gaps = jax.tree.map(
            lambda a, b: float(jnp.max(jnp.abs(a - b))), moved.sums, state.statistics.sums
        )
        change = max(jax.tree.leaves(gaps)) / total
        gain = (new.objective - state.objective) / total
        assert bool((change <= tol) & (gain <= tol)) == (number == int(solution.num_steps))
        state = new


def test_the_unit_of_weight_does_not_matter_to_the_stopping_rule():
    once = jaxem.fit(poissons(), X, sample_weight=jnp.ones(len(X)))
    thrice = jaxem.fit(poissons(), X, sample_weight=jnp.full(len(X), 3.0))
    assert int(once.num_steps) == int(thrice.num_steps)
    np.testing.assert_allclose(thrice.objective, 3 * once.objective, rtol=1e-13)
    np.testing.assert_allclose(thrice.error, once.error, rtol=1e-3)


@pytest.mark.parametrize("name", ["gaussian", "tied", "spherical", "exponential"])
@pytest.mark.parametrize("unit", [1e6, 1e-6])
def test_rescaled_data_change_neither_steps_nor_result(name, unit):
    case = CASES[name]()
    c = case.model.components
    if name == "exponential":
        scaled = jaxem.emissions.Exponential(c.rate / unit)
    elif name != "spherical":
        scaled = type(c)(c.mean * unit, c.covariance * unit**2)
    else:
        scaled = type(c)(c.mean * unit, c.variance * unit**2)
    plain = jaxem.fit(case.model, case.data)
    other = jaxem.fit(jaxem.Mixture(case.model.weights, scaled), case.data * unit)
    assert plain.result == other.result == jaxem.RESULTS.converged
    assert int(plain.num_steps) == int(other.num_steps)
    np.testing.assert_allclose(other.model.weights, plain.model.weights, rtol=1e-7)
    np.testing.assert_allclose(other.error, plain.error, rtol=1e-2)
    shift = -case.data.size * np.log(unit)
    np.testing.assert_allclose(other.objective, plain.objective + shift, rtol=1e-12)


@pytest.mark.parametrize("tol", [1e-5, 1e-8])
@pytest.mark.parametrize("problem", ["london", "gaussians"])
def test_error_estimates_the_distance_to_the_fixed_point(problem, tol):
    if problem == "london":
        model, data, sample_weight, most = london(), DEATHS, DAYS, 20_000
    else:
        model = jaxem.Mixture([0.5, 0.5], jaxem.emissions.DiagonalGaussian(MEAN, np.ones((2, 2))))
        data, sample_weight, most = jnp.asarray(POINTS), jnp.ones(len(POINTS)), 3000
    rough = jaxem.fit(model, data, sample_weight=sample_weight, tol=tol, max_steps=most)
    exact = jaxem.fit(model, data, sample_weight=sample_weight, tol=0.0, max_steps=most)
    assert rough.result == jaxem.RESULTS.converged
    gaps = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))),
        exact.statistics.at(rough.model).sums,
        rough.statistics.sums,
    )
    true = max(jax.tree.leaves(gaps)) / float(sample_weight.sum())
    assert true / 3 < float(rough.error) < 3 * true


def test_progress_is_reported_every_k_steps_and_off_by_default():
    seen = []

    def report(number, objective, change):
        seen.append((int(number), float(objective), float(change)))

    progress = jaxem.em.Progress(3, report)
    solution = jaxem.fit(poissons(), X, tol=0.0, max_steps=10, progress=progress)
    jax.effects_barrier()
    assert [number for number, _, _ in seen] == [3, 6, 9]
    for number, objective, change in seen:
        assert objective == float(solution.history[number])
        assert change > 0

    def program(**options):
        traced = eqx.filter_make_jaxpr(lambda m: jaxem.fit(m, X, throw=False, **options))
        return str(traced(poissons())[0])

    assert "callback" in program(progress=3)
    assert "callback" not in program()


def test_progress_prints_a_line_and_refuses_nonsense(capsys):
    jaxem.fit(poissons(), X, tol=0.0, max_steps=4, progress=2)
    jax.effects_barrier()
    assert [line.split()[1] for line in capsys.readouterr().out.splitlines()] == ["2", "4"]
    with pytest.raises(ValueError, match="integer ≥ 1"):
        jaxem.fit(poissons(), X, progress=0)


# The slots carry the classical variants, one of them from outside the package


class Bold(jaxem.em.AbstractMaximization):
    """A longer step than EM's where the objective itself says that it pays."""

    traits: ClassVar[Traits] = Traits(stationary=False, uses_objective=True)
    factor: float = 1.8

    def init(self, model):
        return jnp.zeros((), jnp.int32)

    def conclusive(self, memory, step):
        return True

    def __call__(self, statistics, memory, evaluate, total):
        safe = statistics.frame.m_step(statistics)
        bold = jax.tree.map(lambda a, b: a + self.factor * (b - a), statistics.frame, safe)
        pays = evaluate(bold)[1] > evaluate(safe)[1]
        model = jax.tree.map(lambda a, b: jnp.where(pays, a, b), bold, safe)
        return model, memory + pays.astype(jnp.int32)


OPTIMUM = {}


def optimum():
    if not OPTIMUM:
        OPTIMUM["it"] = jaxem.fit(poissons(), X, tol=0.0, max_steps=400)
    return OPTIMUM["it"]


LBFGS = Gradient(optax.lbfgs(), 5)
BLOCKS = Conditional(("weights", ClosedForm()), ("components.rate", LBFGS))
VARIANTS = {
    # algorithm, steps, how far below the optimum it may end, in nats for all 48 observations
    "online, all observations": (EM(accumulation=Online()), 400, 1e-3),
    "online, mini-batches": (EM(accumulation=Online(batch_size=16)), 1500, 0.3),
    "Monte-Carlo": (EM(Sampled(100)), 30, 0.2),
    "Monte-Carlo, growing": (EM(Sampled(Linear(1, 4))), 40, 0.1),
    "stochastic approximation": (EM(Sampled(2), Online(Power(0.8))), 1000, 0.1),
    "incremental": (EM(accumulation=Incremental(4)), 400, 1e-8),
    "incremental, unequal blocks": (EM(accumulation=Incremental(5)), 400, 1e-8),
    "annealed": (EM(Annealed(Geometric(3.0, 0.9))), 400, 1e-8),
    "gradient": (EM(maximization=LBFGS), 400, 1e-6),
    "conditional": (EM(maximization=BLOCKS), 200, 1e-6),
    "over-relaxed by a slot of one's own": (EM(maximization=Bold()), 400, 1e-8),
    "incremental, gradient": (EM(accumulation=Incremental(4), maximization=LBFGS), 400, 1e-4),
    "SQUAREM": (SQUAREM(), 60, 1e-9),
    "Anderson": (Anderson(), 60, 1e-9),
    "over-relaxed, growing": (Overrelaxed(), 100, 1e-9),
    "Anderson of gradients": (Anderson(EM(maximization=LBFGS)), 60, 1e-9),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_slots_carry_the_variants(name):
    algorithm, steps, slack = VARIANTS[name]
    key = jax.random.key(3)
    solution = jaxem.fit(poissons(), X, algorithm, key=key, tol=0.0, max_steps=steps)
    assert int(solution.num_steps) == steps
    best, start = optimum().objective, poissons().log_prob(X).sum()
    assert start < best - 5
    assert best - slack < solution.objective < best + 1e-9
    # Whatever the history estimates, the answer belongs to the returned model.
    statistics, value = solution.model.e_step(X)
    equal(solution.log_likelihood, value, 1e-12)
    equal(solution.statistics.sums, statistics.sums, 1e-10)
    if algorithm.traits.monotone:
        assert np.all(np.diff(solution.history) > -1e-9)


def test_variants_declare_what_they_promise():
    assert EM().traits == Traits()
    assert EM(maximization=LBFGS).traits == Traits(stationary=False, maximal=False)
    assert EM(accumulation=Incremental(4)).traits.period == 4
    for name in ("online, all observations", "Monte-Carlo", "incremental"):
        algorithm = VARIANTS[name][0]
        assert not algorithm.traits.monotone and not algorithm.traits.exact
    assert EM(Annealed()).traits == Traits(monotone=False)


def test_a_variant_with_a_prior_reaches_the_posterior_mode():
    case = CASES["poisson"]()
    prior = case.model.prior(weights=4.0, components=case.prior)
    mode = jaxem.fit(case.model, X, prior=prior)
    for algorithm in (EM(maximization=LBFGS), EM(accumulation=Incremental(4)), SQUAREM()):
        solution = jaxem.fit(case.model, X, algorithm, prior=prior, tol=0.0, max_steps=400)
        np.testing.assert_allclose(solution.objective, mode.objective, atol=1e-6)
        np.testing.assert_allclose(
            solution.model.components.rate, mode.model.components.rate, rtol=1e-3
        )


def test_batches_of_a_stream_in_ones_own_loop():
    algorithm = EM(accumulation=Online())
    rng = np.random.default_rng(5)
    truth = jaxem.Mixture([0.3, 0.7], jaxem.emissions.Poisson([[1.0, 2.0], [8.0, 5.0]]))
    draws, _ = truth.sample(jax.random.key(0), 4000)
    batches = np.asarray(draws)[rng.permutation(4000)].reshape(80, 50, 2)
    state = init(algorithm, poissons(), jnp.asarray(batches[0]))
    for batch in batches[1:]:
        state = step(algorithm, state, jnp.asarray(batch))
    full = jaxem.fit(truth, draws)
    assert jnp.mean(state.model.log_prob(draws)) > full.objective / 4000 - 5e-3


def test_keys_differ_between_steps_and_between_draws_of_one_step():
    model = poissons()
    one = jaxem.fit(model, X, EM(Sampled(1)), key=jax.random.key(0), tol=0.0, max_steps=5)
    same = jaxem.fit(model, X, EM(Sampled(1)), key=jax.random.key(0), tol=0.0, max_steps=5)
    other = jaxem.fit(model, X, EM(Sampled(1)), key=jax.random.key(1), tol=0.0, max_steps=5)
    equal(one.model, same.model)
    assert not np.array_equal(one.model.components.rate, other.model.components.rate)


# What a fit is given, and what is not available


def test_a_problem_holds_all_that_a_fit_is_given():
    case = CASES["poisson"]()
    weight, prior = np.linspace(0, 2, len(X)), case.model.prior(weights=2.0, components=case.prior)
    problem = Problem(np.asarray(COUNTS), weight, prior)
    assert not problem.checked and isinstance(problem.data, jax.Array)
    equal(
        jaxem.fit(case.model, problem),
        jaxem.fit(case.model, COUNTS, sample_weight=weight, prior=prior),
    )
    np.testing.assert_allclose(problem.total_weight, weight.sum())
    assert problem.num_observations == len(X)


def test_data_are_checked_wherever_they_enter():
    state = init(EM(), poissons(), X)
    for wrong, says in (
        (lambda: EM().init(poissons(), X[:, 0]), "expects data of shape"),
        (lambda: EM().step(state, X[:, :1]), "expects data of shape"),
        (lambda: SQUAREM().init(poissons(), Problem(X, jnp.ones(3))), "one entry per observation"),
        (lambda: Problem(X, prior=3), "prior must come from model.prior"),
        (lambda: jaxem.fit(poissons(), Problem(X), prior=poissons().prior()), "holds its"),
    ):
        with pytest.raises(ValueError, match=says):
            wrong()


def test_a_plain_loop_takes_plain_data():
    state = EM().init(poissons(), COUNTS)
    for _ in range(3):
        state = EM().step(state, COUNTS)
    found = EM().finish(state, COUNTS)
    equal(found.model, jaxem.fit(poissons(), X, tol=0.0, max_steps=3).model, 1e-12)


@pytest.mark.parametrize("name", ["from_functions", "log-joint"])
def test_what_functions_do_not_say_ends_in_a_message(name):
    case = CASES[name]()
    solution = jaxem.fit(case.model, case.data, max_steps=3)
    assert jnp.isfinite(jaxem.inference.aic(solution, case.data))
    assert jnp.isfinite(jaxem.inference.bic(solution, case.data))
    calls = [lambda m: m.prior(), lambda m: m.sample(jax.random.key(0), 3)]
    if name == "from_functions":
        calls.append(lambda m: m.log_prob(case.data))
        with pytest.raises(ValueError, match="icl is for mixtures"):
            jaxem.inference.icl(solution, case.data)
        without = jaxem.from_functions(
            lambda params, data: case.model.e_function(params, data),
            case.model.m_function,
            case.model.params,
        )
        with pytest.raises(ValueError, match=r"e_step\(params, data, sample_weight\)"):
            jaxem.fit(without, case.data, sample_weight=jnp.ones(len(case.data)))
    for call in calls:
        with pytest.raises(NotImplementedError, match="a model from"):
            call(solution.model)


@pytest.mark.parametrize("algorithm", [jaxem.EM(), jaxem.SQUAREM()], ids=["EM", "SQUAREM"])
def test_a_probability_that_emerges_from_its_bound_has_not_converged(algorithm):
    """It grows by 2 % in a step, from 1e-9: statistics hardly move, for some hundred steps."""
    codes = "000000000000000000000000000111111111444a"  # four bits each
    bits = jnp.asarray([[int(bit) for bit in f"{int(code, 16):04b}"] for code in codes])
    chance = jnp.asarray([[0.153, 0.458, 0.153, 0.0], [0.0, 1e-9, 0.0, 0.269]], "float32")
    weights = jnp.asarray([0.1637, 0.8363], "float32")
    start = jaxem.Mixture(weights, jaxem.emissions.Bernoulli(chance))
    solution = jaxem.fit(start, bits, algorithm, max_steps=2000)
    assert solution.converged
    assert solution.model.components.probability[1, 1] > 0.01
    assert solution.objective > solution.history[0] + 2
