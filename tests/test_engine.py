"""EM as a pure (init, step) with three slots, the loop around it, and what it reports."""

from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from models import CASES, COUNTS, MEAN, POINTS

import jaxem
from jaxem import EM, Framed

# Deaths of women of 80 years and more reported by The Times, 1910–1912 (Hasselblad 1969).
DEATHS = jnp.arange(10)[:, None]
DAYS = jnp.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
X = jnp.asarray(COUNTS)


def london():
    return jaxem.Mixture([0.3, 0.7], jaxem.Poisson([[1.0], [2.5]]))


def poissons():
    return CASES["poisson"]().model


@eqx.filter_jit
def step(algorithm, state, data, weights=None, prior=None, key=None):
    return algorithm.step(state, data, weights=weights, prior=prior, key=key)


@eqx.filter_jit
def init(algorithm, model, data, weights=None, prior=None, key=None):
    return algorithm.init(model, data, weights=weights, prior=prior, key=key)


def equal(a, b, tol=0.0):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tol, atol=tol)


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
    weights = jnp.linspace(0, 2, len(X)) if kind == "weights" else None
    prior = case.model.prior(2.0, case.prior) if kind == "prior" else None
    solution = jaxem.fit(case.model, X, weights=weights, prior=prior, tol=0.0, max_steps=6)
    state = init(EM(), case.model, X, weights, prior)
    history = [state.objective]
    for _ in range(6):
        state = step(EM(), state, X, weights, prior)
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
    solution = jaxem.fit(london(), DEATHS, weights=DAYS, tol=tol, max_steps=4000)
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
    once = jaxem.fit(poissons(), X, weights=jnp.ones(len(X)))
    thrice = jaxem.fit(poissons(), X, weights=jnp.full(len(X), 3.0))
    assert int(once.num_steps) == int(thrice.num_steps)
    np.testing.assert_allclose(thrice.objective, 3 * once.objective, rtol=1e-13)
    np.testing.assert_allclose(thrice.error, once.error, rtol=1e-3)


@pytest.mark.parametrize("name", ["gaussian", "tied", "spherical", "exponential"])
@pytest.mark.parametrize("unit", [1e6, 1e-6])
def test_rescaled_data_change_neither_steps_nor_result(name, unit):
    case = CASES[name]()
    c = case.model.components
    if name == "exponential":
        scaled = jaxem.Exponential(c.rate / unit)
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
        model, data, weights, most = london(), DEATHS, DAYS, 20_000
    else:
        model = jaxem.Mixture([0.5, 0.5], jaxem.DiagonalGaussian(MEAN, np.ones((2, 2))))
        data, weights, most = jnp.asarray(POINTS), jnp.ones(len(POINTS)), 3000
    rough = jaxem.fit(model, data, weights=weights, tol=tol, max_steps=most)
    exact = jaxem.fit(model, data, weights=weights, tol=0.0, max_steps=most)
    assert rough.result == jaxem.RESULTS.converged
    gaps = jax.tree.map(
        lambda a, b: float(jnp.max(jnp.abs(a - b))),
        exact.statistics.at(rough.model).sums,
        rough.statistics.sums,
    )
    true = max(jax.tree.leaves(gaps)) / float(weights.sum())
    assert true / 3 < float(rough.error) < 3 * true


def test_progress_is_reported_every_k_steps_and_off_by_default():
    seen = []

    def report(number, objective, change):
        seen.append((int(number), float(objective), float(change)))

    progress = jaxem.Progress(3, report)
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
    with pytest.raises(ValueError, match="every 1 or more steps"):
        jaxem.fit(poissons(), X, progress=0)


# The slots carry the classical variants from outside the package


class Minibatch(jaxem.AbstractAccumulation):
    """Online EM (Cappé & Moulines 2009): s ← (1 − ρₜ) s + ρₜ s_batch, with ρₜ = (t + 1)^−power."""

    ascends: ClassVar[bool] = False
    exact: ClassVar[bool] = False
    power: float
    size: int | None = eqx.field(static=True, default=None)  # None: all the data

    def init(self, model, data, weights):
        return None

    def select(self, memory, data, weights, step, key):
        n = len(data)
        if self.size is None:
            return data, weights
        chosen = jax.random.choice(jax.random.fold_in(key, 1), n, (self.size,), replace=False)
        w = jnp.ones(n) if weights is None else weights
        return data[chosen], w[chosen] * (n / self.size)

    def __call__(self, memory, new, objective, step):
        if memory is None:
            return (new, objective), new, objective
        rate = (step + 1.0) ** -self.power
        old, old_objective = memory
        average = rate * new + (1 - rate) * old
        objective = rate * objective + (1 - rate) * old_objective
        return (average, objective), average, objective


def running(power=0.6):
    return Minibatch(power)


class Incremental(jaxem.AbstractAccumulation):
    """Neal & Hinton (1998): each step renews the statistics of one block and keeps the others'."""

    ascends: ClassVar[bool] = False  # while blocks are still missing
    exact: ClassVar[bool] = False
    num_blocks: int = eqx.field(static=True)

    def init(self, model, data, weights):
        return None

    def select(self, memory, data, weights, step, key):
        size = len(data) // self.num_blocks
        cut = lambda a: lax.dynamic_slice_in_dim(a, (step % self.num_blocks) * size, size)  # noqa: E731
        return cut(data), None if weights is None else cut(weights)

    def __call__(self, memory, new, objective, step):
        frame = new.frame
        if memory is None:
            blank = lambda a: jnp.zeros((self.num_blocks, *a.shape), a.dtype)  # noqa: E731
            sums, values = jax.tree.map(blank, new.sums), blank(objective)
        else:
            old, values = memory
            sums = jax.vmap(lambda s: frame.reframe(s, old.frame))(old.sums)
        at = step % self.num_blocks
        sums = jax.tree.map(lambda a, b: a.at[at].set(b), sums, new.sums)
        values = values.at[at].set(objective)
        total = jax.tree.map(lambda a: jnp.sum(a, axis=0), sums)
        return (Framed(sums, frame), values), Framed(total, frame), jnp.sum(values)


class Sampled(jaxem.AbstractPosterior):
    """Monte-Carlo EM (Wei & Tanner 1990): m draws of z for each unit."""

    ascends: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False
    m: int = eqx.field(static=True)

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def marginalize(self, log_joint, key):
        n, k = log_joint.shape
        z = jax.random.categorical(key, log_joint[:, None], shape=(n, self.m))
        return jax.nn.logsumexp(log_joint, axis=1), jax.nn.one_hot(z, k).mean(axis=1)


class Tempered(jaxem.AbstractPosterior):
    ascends: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True
    temperature: Any

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def marginalize(self, log_joint, key):
        t = self.temperature
        return t * jax.nn.logsumexp(log_joint / t, axis=1), jax.nn.softmax(log_joint / t, axis=1)


class Annealed(jaxem.AbstractExpectation):
    """Deterministic annealing (Ueda & Nakano 1998): the temperature falls to 1."""

    ascends: ClassVar[bool] = False
    deterministic: ClassVar[bool] = False
    start: float
    decay: float

    def __call__(self, model, data, weights, step, key):
        temperature = jnp.maximum(1.0, self.start * self.decay**step)
        return Tempered(temperature)(model, data, weights, step, key)


class Gradient(jaxem.AbstractMaximization):
    """Generalised EM: gradient ascent on Q by backtracking, which remembers its step size."""

    ascends: ClassVar[bool] = True
    num_steps: int = eqx.field(static=True, default=5)

    def init(self, model):
        return jnp.ones(())

    def __call__(self, statistics, memory, evaluate):
        def ascend(carry, _):
            model, size = carry
            value, slope = jax.value_and_grad(lambda m: m.expected_log_prob(statistics))(model)
            rise = sum(jnp.vdot(g, g) for g in jax.tree.leaves(slope))

            def moved(size):
                return jax.tree.map(lambda leaf, g: leaf + size * g, model, slope)

            def poor(size):  # Armijo's condition
                risen = moved(size).expected_log_prob(statistics) - value
                return ~(risen >= 1e-4 * size * rise) & (size > 1e-12)

            size = lax.while_loop(poor, lambda t: t / 2, 2 * size)
            return (moved(size), size), None

        (model, size), _ = lax.scan(ascend, (statistics.frame, memory), length=self.num_steps)
        return model, size


class Overrelaxed(jaxem.AbstractMaximization):
    """A longer step than EM's where the objective itself says that it pays."""

    ascends: ClassVar[bool] = True
    factor: float = 1.8

    def init(self, model):
        return jnp.zeros((), jnp.int32)

    def __call__(self, statistics, memory, evaluate):
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


VARIANTS = {
    # algorithm, steps, how far below the optimum it may end, in nats for all 48 units
    "online, all units": (EM(accumulation=running()), 400, 1e-3),
    "online, mini-batches": (EM(accumulation=Minibatch(0.6, 16)), 1500, 0.3),
    "Monte-Carlo": (EM(Sampled(400)), 30, 0.1),
    "stochastic approximation": (EM(Sampled(2), running(0.8)), 1000, 0.1),
    "incremental": (EM(accumulation=Incremental(4)), 400, 1e-8),
    "annealed": (EM(Annealed(3.0, 0.9)), 400, 1e-8),
    "gradient": (EM(maximization=Gradient()), 400, 1e-6),
    "over-relaxed": (EM(maximization=Overrelaxed()), 400, 1e-8),
    "incremental, gradient": (EM(accumulation=Incremental(4), maximization=Gradient(8)), 400, 1e-4),
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
    if algorithm.ascends:
        assert np.all(np.diff(solution.history) > -1e-9)


def test_variants_declare_what_they_promise():
    assert EM().ascends and EM().exact
    assert EM(maximization=Gradient()).ascends
    for name in ("online, all units", "Monte-Carlo", "incremental", "annealed"):
        algorithm = VARIANTS[name][0]
        assert not algorithm.ascends and not algorithm.exact


def test_a_variant_with_a_prior_reaches_the_posterior_mode():
    case = CASES["poisson"]()
    prior = case.model.prior(3.0, case.prior)
    mode = jaxem.fit(case.model, X, prior=prior)
    for algorithm in (EM(maximization=Gradient()), EM(accumulation=Incremental(4))):
        solution = jaxem.fit(case.model, X, algorithm, prior=prior, tol=0.0, max_steps=400)
        np.testing.assert_allclose(solution.objective, mode.objective, atol=1e-6)
        np.testing.assert_allclose(
            solution.model.components.rate, mode.model.components.rate, rtol=1e-3
        )


def test_batches_of_a_stream_in_ones_own_loop():
    algorithm = EM(accumulation=running())
    rng = np.random.default_rng(5)
    truth = jaxem.Mixture([0.3, 0.7], jaxem.Poisson([[1.0, 2.0], [8.0, 5.0]]))
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
