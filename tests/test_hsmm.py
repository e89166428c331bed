"""Hidden semi-Markov models: all segmentations of short sequences, HMMs, durations, derivatives."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import optimize, special, stats

import jaxem
from jaxem import HSMM
from jaxem._core.newton import maximize_by_newton
from jaxem.factors import CategoricalDuration, NegativeBinomialDuration, PoissonDuration
from jaxem.latents import Segments

INITIAL = np.array([0.7, 0.3, 0.0])
MATRIX = np.array([[0.0, 0.4, 0.6], [1.0, 0.0, 0.0], [0.5, 0.5, 0.0]])
LASTS = np.array([[0.2, 0.5, 0.3], [0.6, 0.0, 0.4], [0.1, 0.3, 0.6]])
with np.errstate(divide="ignore"):
    LOGS = np.log(INITIAL), np.log(MATRIX), np.log(LASTS)
RATES = np.array([[1.0], [4.0], [9.0]])
TWO = np.array([[0.0, 1.0], [1.0, 0.0]])
FAMILIES = {
    "categorical": lambda k: CategoricalDuration(np.full((k, 6), 1 / 6)),
    "poisson": lambda k: PoissonDuration(np.arange(1.0, k + 1), 6),
    "negative binomial": lambda k: NegativeBinomialDuration(np.arange(1.0, k + 1), np.ones(k), 6),
}


def model_of(duration, k=3):
    matrix = MATRIX if k == 3 else TWO
    return HSMM(np.full(k, 1 / k), matrix, duration, jaxem.emissions.Poisson(RATES[:k]))


def segmentations(steps, longest, states):
    """All (states, durations) of segments that cover the steps, the last one perhaps longer."""

    def grow(z, d):
        if sum(d) >= steps:
            yield z, d
            return
        for j, r in itertools.product(range(states), range(1, longest + 1)):
            if not z or j != z[-1]:
                yield from grow((*z, j), (*d, r))

    yield from grow((), ())


def enumerated(initial, matrix, lasts, log_b):
    """log p(x), P(z | x), counts of first states, transitions and durations, and the best path.

    All from logarithms.
    """
    steps, k = log_b.shape
    states, first = np.zeros((steps, k)), np.zeros(k)
    moved, lasted, paths, found = np.zeros((k, k)), np.zeros(lasts.shape), {}, []
    for z, d in segmentations(steps, lasts.shape[1], k):
        path = np.repeat(z, d)[:steps]
        log_p = initial[z[0]] + sum(lasts[j, r - 1] for j, r in zip(z, d, strict=True))
        log_p += sum(matrix[i, j] for i, j in itertools.pairwise(z))
        found.append((log_p + log_b[np.arange(steps), path].sum(), z, d, path))
    value = special.logsumexp([log_p for log_p, *_ in found])
    for log_p, z, d, path in found:
        p = np.exp(log_p - value)
        paths[tuple(path)] = np.logaddexp(paths.get(tuple(path), -np.inf), log_p)
        states[np.arange(steps), path] += p
        first[z[0]] += p
        for i, j in itertools.pairwise(z):
            moved[i, j] += p
        for j, r in zip(z, d, strict=True):
            lasted[j, r - 1] += p
    best = max(paths, key=lambda path: paths[path])
    return value, states, first, moved, lasted, best, paths[best]


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_all_segmentations_of_a_short_sequence(steps):
    x = np.random.default_rng(steps).poisson(3.0, (1, steps, 1))
    seen = np.arange(steps) != 3
    data = jaxem.Sequences(x, observed=seen[None])
    model = HSMM(INITIAL, MATRIX, CategoricalDuration(LASTS), jaxem.emissions.Poisson(RATES))
    log_b = stats.poisson.logpmf(x[0], RATES.T) * seen[:, None]
    value, states, first, moved, lasted, path, of_path = enumerated(*LOGS, log_b)
    statistics, log_likelihood = model.e_step(data)
    np.testing.assert_allclose(log_likelihood, value, rtol=1e-13)
    np.testing.assert_allclose(model.log_prob(data)[0], value, rtol=1e-13)
    np.testing.assert_allclose(model.responsibilities(data)[0], states, atol=1e-13)
    for sums, counts in zip(statistics.sums[:3], (first, moved, lasted), strict=True):
        np.testing.assert_allclose(sums, counts, atol=1e-13)
    best, of_best = model.viterbi(data)
    assert tuple(best[0].tolist()) == path
    np.testing.assert_allclose(of_best[0], of_path, rtol=1e-13)


inferred = jax.jit(lambda s: (s.exact(), s.best_path(), s.filtered(), s.log_increments()))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_paths_that_vanish_have_a_likelihood(dtype, seed):
    """What explains the later steps was less probable than any number of the dtype.

    One state explains them all, but lasts three steps at most; states and durations take turns in
    being impossible, or nearly so; and the first state explains nothing.
    """
    rng, size = np.random.default_rng(seed), 50 if dtype == "float32" else 500
    log_b = rng.normal(size=(6, 3))
    lasts = special.log_softmax(rng.normal(size=(3, 3)), axis=1)
    if seed < 2:
        log_b[:, 1:] -= 4 * size
    elif seed < 4:
        log_b *= 10 * size
        lasts = special.log_softmax(5 * size * lasts, axis=1)
    else:
        log_b -= 10 * size * (np.arange(3) != np.array([2, 2, 0, 0, 1, 1])[:, None])
        log_b[:, 0] -= 30 * size
    own = [np.asarray(leaf, dtype).astype(float) for leaf in (*LOGS[:2], lasts, log_b)]
    steps = 6 - seed % 2
    expected = enumerated(*own[:3], own[3][:steps])
    latent = Segments(*(jnp.asarray(leaf, dtype) for leaf in own), jnp.arange(6) < steps)
    (value, found), (path, of_path), filtered, increments = inferred(latent)
    rtol, atol = (1e-6, 2e-3) if dtype == "float32" else (1e-13, 1e-10)
    np.testing.assert_allclose(value, expected[0], rtol=rtol)
    np.testing.assert_allclose(np.sum(increments), expected[0], rtol=rtol)
    np.testing.assert_allclose(filtered[steps - 1], expected[1][-1], atol=atol)
    counts = found.smoothed[:steps], found.initial, found.transition, found.duration
    for sums, counted in zip(counts, expected[1:5], strict=True):
        np.testing.assert_allclose(sums, counted, atol=atol)
    assert tuple(path[:steps].tolist()) == expected[5]
    np.testing.assert_allclose(of_path, expected[6], rtol=rtol)


def test_derivatives_of_counts_of_paths_that_vanish():
    own = [jnp.asarray(leaf) for leaf in LOGS]
    log_b, drift = np.random.default_rng(0).normal(size=(2, 6, 3))
    log_b -= 1000.0 * (np.arange(3) > 0)

    @jax.jit
    def score(change):
        latent = Segments(*own, log_b + change * drift, jnp.ones(6, bool))
        return jnp.stack([jnp.sum(jnp.sin(leaf)) for leaf in latent.exact()[1][1:]])

    slope = jax.jacfwd(score)(0.0)
    step = 1e-5
    assert abs(slope[0]) > 0.05
    np.testing.assert_allclose(
        slope, (score(step) - score(-step)) / (2 * step), rtol=1e-5, atol=1e-6
    )


def test_an_absorbing_state_lasts_for_ever():
    """As one does that lasts longer than any sequence, whatever is said of its duration."""
    x = jnp.asarray(np.random.default_rng(2).poisson(4.0, (3, 7, 1)))
    emission, start = jaxem.emissions.Poisson(RATES), np.full(3, 1 / 3)
    ends = MATRIX.copy()
    ends[2] = 0, 0, 1
    model = HSMM(start, ends, CategoricalDuration(LASTS), emission)
    longer = np.pad(LASTS, ((0, 0), (0, 4)))
    longer[2] = np.eye(7)[-1]
    other = HSMM(start, MATRIX, CategoricalDuration(longer), emission)
    np.testing.assert_allclose(model.log_prob(x), other.log_prob(x), rtol=1e-12)
    np.testing.assert_array_equal(model.viterbi(x)[0], other.viterbi(x)[0])
    np.testing.assert_allclose(model.viterbi(x)[1], other.viterbi(x)[1], rtol=1e-12)
    found, expected = model.e_step(x)[0].sums, other.e_step(x)[0].sums
    np.testing.assert_allclose(found[1][:2], expected[1][:2], atol=1e-12)
    np.testing.assert_allclose(found[2], np.r_[expected[2][:2, :3], np.zeros((1, 3))], atol=1e-12)
    fitted = jaxem.fit(model, x, max_steps=3, throw=False).model
    np.testing.assert_array_equal(fitted.transition.matrix[2], [0, 0, 1])
    np.testing.assert_allclose(fitted.duration.probability[2], LASTS[2], rtol=1e-12)
    assert model.num_free_parameters == other.num_free_parameters - 1 - 2 - 3 * 4


def test_hard_posterior_is_the_best_path_and_its_objective_never_falls():
    x, _ = model_of(PoissonDuration([1.0, 2.0, 3.0], 6)).sample(jax.random.key(0), 8, 12)
    model = model_of(CategoricalDuration(np.full((3, 6), 1 / 6)))
    statistics, value = model.e_step(x, posterior=jaxem.em.Hard())
    paths, of_paths = model.viterbi(x)
    np.testing.assert_allclose(value, of_paths.sum(), rtol=1e-13)
    first, moved, lasted, _ = statistics.sums
    runs = [[(z, len(list(run))) for z, run in itertools.groupby(row)] for row in paths.tolist()]
    np.testing.assert_allclose(first, np.bincount([run[0][0] for run in runs], minlength=3))
    expected = np.zeros((3, 6))
    for z, seen in (segment for run in runs for segment in run[:-1]):
        expected[z, seen - 1] += 1
    for z, seen in (run[-1] for run in runs):  # known to be as long, uniform beyond
        expected[z, seen - 1 :] += 1 / (6 - seen + 1)
    np.testing.assert_allclose(lasted, expected, atol=1e-12)
    np.testing.assert_allclose(np.sum(moved), sum(len(run) - 1 for run in runs), rtol=1e-12)
    solution = jaxem.fit(model, x, jaxem.EM(jaxem.em.Hard()), max_steps=30)
    history = solution.history[: solution.num_steps + 1]
    assert np.all(np.diff(history) > -1e-9)
    assert history[-1] > history[0] + 1


def test_tempered_segmentations_are_powers_of_all_of_them():
    """log p(x, z, d) counts 1/T times, d with what the last segment lasts beyond the end."""
    steps, temperature = 5, 2.5
    x = np.random.default_rng(5).poisson(3.0, (1, steps, 1))
    model = HSMM(INITIAL, MATRIX, CategoricalDuration(LASTS), jaxem.emissions.Poisson(RATES))
    log_b = stats.poisson.logpmf(x[0], RATES.T) / temperature
    powered = (part / temperature for part in LOGS)
    value, states, *counts, _, _ = enumerated(*powered, log_b)
    statistics, found = model.e_step(x, posterior=jaxem.em.Tempered(temperature))
    np.testing.assert_allclose(found, temperature * value, rtol=1e-12)
    for sums, expected in zip(statistics.sums[:3], counts, strict=True):
        np.testing.assert_allclose(sums, expected, atol=1e-12)
    np.testing.assert_allclose(statistics.sums[3].count, states.sum(0)[:, None], rtol=1e-10)
    exact, of_one = model.e_step(x), model.e_step(x, posterior=jaxem.em.Tempered(1.0))
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(of_one), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)


def test_draws_have_the_expected_counts_on_average():
    x = jnp.asarray(np.random.default_rng(6).poisson(3.0, (1, 7, 1)))
    data = jaxem.Sequences(jnp.repeat(x, 4000, axis=0), jnp.tile(jnp.array([7, 5]), 2000))
    model = HSMM(INITIAL, MATRIX, CategoricalDuration(LASTS), jaxem.emissions.Poisson(RATES))
    expected, value = model.e_step(data)
    drawn, same = model.e_step(data, posterior=jaxem.em.Drawn(), key=jax.random.key(0))
    np.testing.assert_allclose(same, value, rtol=1e-12)
    for a, b in zip(drawn.sums[:3], expected.sums[:3], strict=True):
        np.testing.assert_allclose(a, b, atol=5 * np.sqrt(4000))
        np.testing.assert_array_equal(a, np.round(a))
    first, moved, lasted, _ = drawn.sums
    np.testing.assert_allclose([first.sum(), lasted.sum()], [4000, 4000 + moved.sum()])
    paths = model.sample_paths(jax.random.key(1), data)
    shares = jax.nn.one_hot(paths, 3)[::2].mean(0)
    np.testing.assert_allclose(shares, model.responsibilities(data)[0], atol=0.06)
    with pytest.raises(ValueError, match="give e_step"):
        model.e_step(data, posterior=jaxem.em.Drawn())


def test_draws_of_what_the_model_cannot_have_made_count_nothing():
    emission = jaxem.emissions.Exponential([[20.0], [100.0]])
    model = HSMM([0.5, 0.5], TWO, PoissonDuration([1.0, 3.0], 5), emission)
    x = jnp.full((1, 4, 1), 0.1).at[0, 2].set(1e308)
    statistics, value = model.e_step(x, posterior=jaxem.em.Drawn(), key=jax.random.key(0))
    assert value == -jnp.inf
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(statistics))
    assert np.all(model.sample_paths(jax.random.key(0), x) == -1)
    assert model.first_impossible(x).tolist() == [2]


def test_fits_by_draws_and_at_a_temperature():
    x, _ = model_of(PoissonDuration([1.0, 2.0, 3.0], 6)).sample(jax.random.key(0), 12, 15)
    model = model_of(PoissonDuration([2.0, 2.0, 2.0], 6))
    options = dict(max_steps=60, throw=False)
    drawn = jaxem.fit(model, x, jaxem.EM(jaxem.em.Sampled()), key=jax.random.key(1), **options)
    assert drawn.log_likelihood > model.e_step(x)[1] + 1
    warm = jaxem.fit(model, x, jaxem.EM(jaxem.em.Tempered(1.5)), **options)
    history = warm.history[: warm.num_steps + 1]
    assert np.all(np.diff(history) > -1e-9)
    assert history[-1] > history[0] + 1


def test_geometric_durations_make_a_hidden_markov_model():
    stay, steps = np.array([0.7, 0.4, 0.9]), 12
    chain = np.diag(stay) + (1 - stay)[:, None] * MATRIX
    hmm = jaxem.HMM(INITIAL, chain, jaxem.emissions.Poisson(RATES))
    x, _ = hmm.sample(jax.random.key(0), 5, steps)
    data = jaxem.Sequences(x, [12, 7, 1, 10, 3])
    # what lasts longer than any sequence is one duration
    lasts = (1 - stay)[:, None] * stay[:, None] ** np.arange(steps)
    lasts[:, -1] = stay ** (steps - 1)
    model = HSMM(INITIAL, MATRIX, CategoricalDuration(lasts), jaxem.emissions.Poisson(RATES))
    np.testing.assert_allclose(model.log_prob(data), hmm.log_prob(data), rtol=1e-13)
    np.testing.assert_allclose(model.responsibilities(data), hmm.responsibilities(data), atol=1e-13)
    for ours, theirs in zip(model.viterbi(data), hmm.viterbi(data), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-13)
    sums, expected = model.e_step(data)[0].sums, hmm.e_step(data)[0].sums
    np.testing.assert_allclose(sums[0], expected[0], atol=1e-13)
    np.testing.assert_allclose(sums[1], expected[1] * (1 - np.eye(3)), atol=1e-12)
    np.testing.assert_allclose(sums[3].total, expected[2].total, rtol=1e-12)


def test_sequences_of_different_lengths_are_what_each_is_alone():
    model = model_of(PoissonDuration([1.0, 2.0, 3.0], 5))
    x, _ = model.sample(jax.random.key(2), 2, 8)
    lengths = [8, 3]
    parts = [x[i : i + 1, :t] for i, t in enumerate(lengths)]
    data = jaxem.Sequences(x, lengths)
    alone = [model.e_step(part) for part in parts]
    together = model.e_step(data)
    np.testing.assert_allclose(together[1], sum(value for _, value in alone), rtol=1e-13)
    total = jax.tree.map(lambda *leaves: sum(leaves), *(found.sums for found, _ in alone))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-12), together[0].sums, total)
    paths, of_paths = model.viterbi(data)
    states = model.responsibilities(data)
    for i, part in enumerate(parts):
        path, of_path = model.viterbi(part)
        np.testing.assert_array_equal(paths[i, : lengths[i]], path[0])
        assert np.all(paths[i, lengths[i] :] == path[0, -1])
        np.testing.assert_allclose(of_paths[i], of_path[0], rtol=1e-13)
        np.testing.assert_allclose(
            states[i, : lengths[i]], model.responsibilities(part)[0], atol=1e-13
        )
        assert np.all(states[i, lengths[i] :] == 0)


def test_a_sequence_of_weight_zero_is_absent_whatever_it_holds():
    emission = jaxem.emissions.Exponential([[20.0], [100.0]])
    model = HSMM([0.5, 0.5], TWO, PoissonDuration([1.0, 3.0], 5), emission)
    x, _ = model.sample(jax.random.key(3), 5, 8)
    spoilt = x.at[1].set(jnp.nan).at[4].set(1e308)  # whose likelihood is zero
    sample_weight = jnp.array([1.0, 0.0, 2.0, 0.5, 0.0])
    some = jnp.array([0, 2, 3])
    found, expected = (
        model.e_step(spoilt, sample_weight),
        model.e_step(x[some], sample_weight[some]),
    )
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-12)
    score = jax.grad(lambda m, w: m.e_step(spoilt, w)[1], argnums=(0, 1))(model, sample_weight)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(score))
    assert model.in_support(spoilt).tolist() == [True, False, True, True, False]
    solution = jaxem.fit(model, spoilt, sample_weight=sample_weight, max_steps=3)
    assert np.isfinite(solution.objective)


def test_zeros_of_the_model_have_finite_derivatives():
    model = HSMM(
        INITIAL, MATRIX, CategoricalDuration(LASTS), jaxem.emissions.Categorical(np.eye(3)[:, None])
    )
    # state 2 cannot come first nor follow state 1, which cannot last 2 steps: zeros that are
    # floored, except for those of transitions
    x = jnp.array([[0, 0, 2, 2, 1], [2, 2, 2, 0, 0], [0, 1, 1, 2, 2]])[..., None]
    log_prob = model.log_prob(x)
    assert log_prob[0] > -10
    assert np.all(log_prob[1:] < -600)
    assert np.all(np.isfinite(log_prob))
    for sample_weight in (jnp.array([1.0, 0.0, 0.0]), jnp.ones(3)):
        (sums, _), score = jax.value_and_grad(
            lambda m, w=sample_weight: m.e_step(x, w)[::-1], has_aux=True
        )(model)
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((sums, score)))
        assert score.transition.logits[1, 2] == 0


def test_data_that_surprise_have_finite_statistics_and_derivatives():
    rates = 10.0 ** np.random.default_rng(0).uniform(-3, 5, (2, 300, 1))
    x = jnp.asarray(np.random.default_rng(1).poisson(rates))
    duration = NegativeBinomialDuration([1e-3, 1e3, 1.0], [1e-3, 1e3, 1.0], 30)
    emission = jaxem.emissions.Poisson([[1e-3], [1.0], [1e3]])
    model = HSMM([1.0, 0.0, 0.0], np.roll(np.eye(3), 1, axis=1), duration, emission)

    @jax.jit
    def run(model):
        score = lambda m: jax.grad(lambda m: m.e_step(x)[1])(m)  # noqa: E731
        ones = jax.tree.map(jnp.ones_like, model)
        return model.e_step(x), jax.jvp(score, (model,), (ones,))

    for precision in (jnp.float64, jnp.float32):
        cast = jax.tree.map(lambda leaf, to=precision: leaf.astype(to), model)
        (statistics, value), (score, change) = run(cast)
        first, moved, lasted, emitted = statistics.sums
        assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((value, score)))
        np.testing.assert_allclose(jnp.sum(first), 2, rtol=1e-5)
        np.testing.assert_allclose(jnp.sum(lasted), jnp.sum(moved) + 2, rtol=1e-5)
        np.testing.assert_allclose(jnp.sum(emitted.count), 600, rtol=1e-5)
        if precision == jnp.float64:
            assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(change))


@pytest.mark.parametrize("family", FAMILIES)
def test_durations_are_recovered_from_data(family):
    truth = {
        "categorical": CategoricalDuration([[0.1, 0.2, 0.3, 0.4], [0.4, 0.3, 0.2, 0.1]]),
        "poisson": PoissonDuration([2.0, 6.0], 20),
        "negative binomial": NegativeBinomialDuration([4.0, 2.0], [2.0, 5.0], 20),
    }[family]
    emission = jaxem.emissions.SphericalGaussian([[0.0], [2.0]], [0.3, 0.3])
    model = HSMM([0.5, 0.5], TWO, truth, emission)
    x, z = jax.jit(lambda key: model.sample(key, 40, 300))(jax.random.key(4))
    longest = truth.max_duration
    start = {
        "categorical": CategoricalDuration(np.full((2, longest), 1 / longest)),
        "poisson": PoissonDuration([4.0, 4.0], longest),
        "negative binomial": NegativeBinomialDuration([3.0, 3.0], [1.0, 1.0], longest),
    }[family]
    blurred = jaxem.emissions.SphericalGaussian([[0.5], [1.5]], [1.0, 1.0])
    solution = jaxem.fit(HSMM([0.5, 0.5], TWO, start, blurred), x, tol=1e-7)
    assert solution.result == jaxem.RESULTS.converged
    found = solution.model.duration
    np.testing.assert_allclose(jnp.exp(found.log_prob()), jnp.exp(truth.log_prob()), atol=0.02)
    np.testing.assert_allclose(found.mean_duration, truth.mean_duration, rtol=0.05)
    assert solution.log_likelihood > model.e_step(x)[1]
    hits = [np.mean(m.viterbi(x)[0] == z) for m in (solution.model, model)]
    assert hits[0] > hits[1] - 0.005 > 0.9


def test_implicit_derivatives_are_those_of_finite_differences():
    truth = model_of(PoissonDuration([1.0, 3.0], 6), 2)
    data, _ = truth.sample(jax.random.key(5), 10, 12)
    model, direction = model_of(FAMILIES["poisson"](2), 2), jnp.sin(jnp.arange(10.0))
    prior = model.prior(duration=jaxem.authoring.Framed(jnp.full((2, 6), 0.5), model.duration))

    @jax.jit
    def fitted(change):
        sample_weight = 1 + change * direction
        found = jaxem.fit(
            model, data, sample_weight=sample_weight, prior=prior, tol=1e-14, max_steps=3000
        )
        return (
            jnp.sum(jnp.cos(found.model.duration.log_prob())) + found.model.transition.matrix[0, 1]
        )

    slope = jax.jit(jax.grad(fitted))(0.1)
    step = 1e-4
    assert abs(slope) > 1e-3
    np.testing.assert_allclose(
        slope, (fitted(0.1 + step) - fitted(0.1 - step)) / (2 * step), rtol=1e-6
    )


def test_gradient_of_the_log_likelihood_is_that_of_finite_differences():
    emission = jaxem.emissions.SphericalGaussian([[0.0], [1.5], [4.0]], [0.5, 1.0, 0.7])
    model = HSMM(
        INITIAL, MATRIX, NegativeBinomialDuration([1.0, 2.0, 3.0], [1.0, 2.0, 0.5], 4), emission
    )
    x, _ = model.sample(jax.random.key(6), 2, 6)
    move = jax.random.normal(jax.random.key(7), x.shape)
    along = jax.jit(lambda h: jnp.sum(model.log_prob(x + h * move)))
    step = 1e-4
    np.testing.assert_allclose(
        jax.grad(along)(0.0), (along(step) - along(-step)) / (2 * step), rtol=1e-7
    )
    slope = jax.jit(jax.grad(along))
    np.testing.assert_allclose(
        jax.grad(slope)(0.0), (slope(step) - slope(-step)) / (2 * step), rtol=1e-6
    )


def test_fits_run_under_jit_and_vmap():
    truth = model_of(PoissonDuration([2.0, 1.0, 3.0], 8))
    x, _ = truth.sample(jax.random.key(8), 6, 20)
    start = PoissonDuration([2.0, 2.0, 2.0], 8)

    def run(key):
        model = HSMM.init(key, x, 3, jaxem.emissions.Poisson, duration=start)
        return jaxem.fit(model, x, max_steps=20, throw=False)

    keys = jax.random.split(jax.random.key(9), 3)
    many, one = jax.jit(jax.vmap(run))(keys), run(keys[1])
    np.testing.assert_allclose(many.objective[1], one.objective, rtol=1e-10)
    assert np.all(np.diff(many.history[:, : int(many.num_steps.min()) + 1]) > -1e-8)
    assert one.model.transition.mask is not None
    assert np.all(np.diag(one.model.transition.matrix) == 0)
    parameters = 2 + 3 + 3 + 3  # initial, transition, durations, rates
    assert one.model.num_free_parameters == parameters


def test_float32_keeps_its_digits_over_long_sequences():
    model = model_of(PoissonDuration([5.0, 2.0, 8.0], 20))
    x, _ = model.sample(jax.random.key(10), 1, 3000)
    narrow = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), model)
    (wide, value), (single, rounded) = model.e_step(x), narrow.e_step(x)
    np.testing.assert_allclose(rounded, value, rtol=1e-6)
    for a, b in zip(single.sums[:3], wide.sums[:3], strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


# Durations


def test_duration_laws_are_truncated_ones_of_scipy():
    mean, size, steps = np.array([3.0, 0.5]), np.array([1.5, 2e5]), np.arange(12)
    poisson = stats.poisson.pmf(steps, mean[:, None])
    negative = stats.nbinom.pmf(steps, size[:, None], (size / (size + mean))[:, None])
    for duration, p in (
        (PoissonDuration(mean, 12), poisson),
        (NegativeBinomialDuration(mean, size, 12), negative),
    ):
        p = p / p.sum(axis=1, keepdims=True)
        np.testing.assert_allclose(jnp.exp(duration.log_prob()), p, atol=1e-11)
        np.testing.assert_allclose(duration.mean_duration, p @ (steps + 1), rtol=1e-10)
    np.testing.assert_allclose(NegativeBinomialDuration(mean, size, 12).concentration, size)
    drawn = PoissonDuration(mean, 12).sample(jax.random.key(0), jnp.zeros(20000, int))
    assert drawn.min() == 1
    np.testing.assert_allclose(
        np.mean(drawn), PoissonDuration(mean, 12).mean_duration[0], rtol=0.02
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_m_step_of_durations_is_the_maximum(family):
    rng = np.random.default_rng(0)
    drawn = 1 + rng.negative_binomial(2, 0.4, (2, 300))
    counts = np.stack([np.bincount(d, minlength=7)[1:7] for d in drawn]) + 0.25
    counts = jnp.concatenate([jnp.asarray(counts), jnp.zeros((1, 6))])
    start = FAMILIES[family](3)
    found = jax.jit(type(start).m_step)(start, counts)
    slope = jax.grad(lambda d: d.expected_log_prob(counts))(found)
    for leaf, before, after in zip(*map(jax.tree.leaves, (slope, start, found)), strict=True):
        np.testing.assert_allclose(leaf, 0, atol=1e-9)
        np.testing.assert_array_equal(before[2], after[2])  # nothing was counted
    by_start = jax.grad(lambda d: sum(map(jnp.sum, jax.tree.leaves(d.m_step(counts)))))(start)
    for leaf in jax.tree.leaves(by_start):
        np.testing.assert_allclose(leaf[:2], 0, atol=1e-12)
        np.testing.assert_allclose(leaf[2], 1)

    def loss(numbers):
        leaves, structure = jax.tree.flatten(start)
        parts = np.split(numbers, len(leaves))
        moved = [
            leaf.at[0].set(part if leaf.ndim > 1 else part[0])
            for leaf, part in zip(leaves, parts, strict=True)
        ]
        return -jax.tree.unflatten(structure, moved).expected_log_prob(counts)

    begin = np.concatenate([np.atleast_1d(leaf[0]) for leaf in jax.tree.leaves(start)])
    best = optimize.minimize(loss, begin, jac=jax.grad(loss), tol=1e-10)
    mine = np.concatenate([np.atleast_1d(leaf[0]) for leaf in jax.tree.leaves(found)])
    np.testing.assert_allclose(loss(mine), best.fun, rtol=1e-12)


@pytest.mark.parametrize("family", ["poisson", "negative binomial"])
def test_extreme_counts_do_not_break_the_m_step(family):
    eye = np.eye(6)
    start = FAMILIES[family](4)
    counts = jnp.asarray(np.stack([eye[0], 50 * eye[5], eye[0] + eye[5], 1e-30 * eye[2]]))
    step = jax.jit(lambda d: (d.m_step(counts), jax.jacobian(d.m_step)(counts)))
    found, slope = step(start)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves((found, slope)))
    of_each = jnp.sum(counts * found.log_prob(), axis=1) / jnp.sum(counts, axis=1)
    assert np.all(of_each[:2] > -1e-6)  # certain to last 1 step, or 6
    again, _ = step(found)
    assert again.expected_log_prob(counts) >= found.expected_log_prob(counts) - 1e-12
    one = FAMILIES[family](2)
    one = jaxem._core.parameters.replace(one, max_duration=1)
    assert (
        jax.tree.leaves(one.m_step(jnp.ones((2, 1))))[0].tolist()
        == jax.tree.leaves(one)[0].tolist()
    )


def test_held_parameters_of_durations_stay_and_the_others_maximise():
    start = NegativeBinomialDuration([2.0, 3.0], [1.5, 4.0], 6)
    counts = jnp.asarray(np.random.default_rng(1).random((2, 6)))
    frozen = jaxem.freeze(start, "concentration")

    def mean_for(log_concentration):
        module = jaxem._core.parameters.replace(frozen, log_concentration=log_concentration)
        return module.m_step(counts).log_mean

    found = frozen.m_step(counts)
    np.testing.assert_array_equal(found.log_concentration, start.log_concentration)
    slope = jax.grad(lambda d: d.expected_log_prob(counts))(found)
    np.testing.assert_allclose(slope.log_mean, 0, atol=1e-12)
    step = jnp.array([1e-4, 0.0])
    expected = (
        mean_for(frozen.log_concentration + step) - mean_for(frozen.log_concentration - step)
    )[0] / 2e-4
    np.testing.assert_allclose(
        jax.jacobian(mean_for)(frozen.log_concentration)[0, 0], expected, rtol=1e-6
    )
    assert (frozen.num_free_parameters, start.num_free_parameters) == (2, 4)
    some = jaxem.freeze(start, "mean", mask=[True, False]).m_step(counts)
    assert some.log_mean[0] == start.log_mean[0]
    assert some.log_mean[1] != start.log_mean[1]


def test_priors_are_segments_seen_before():
    model = model_of(PoissonDuration([1.0, 2.0, 3.0], 4))
    x, _ = model.sample(jax.random.key(11), 4, 8)
    seen = 5 * np.exp(PoissonDuration([2.0] * 3, 4).log_prob())
    prior = model.prior(initial=3.0, duration=model.duration.prior(5.0, rate=2.0))
    statistics, _ = model.e_step(x)
    both = statistics + prior
    np.testing.assert_allclose(both.sums[2], statistics.sums[2] + seen)
    np.testing.assert_allclose(both.sums[0], statistics.sums[0] + 1)
    assert np.isfinite(jaxem.fit(model, x, prior=prior, max_steps=5).objective)


# The maximiser


def test_newton_maximises_with_derivatives_of_every_order_to_three():
    find = lambda a: maximize_by_newton(  # noqa: E731
        lambda theta, a: a * theta[0] - jnp.exp(theta[0]), jnp.array([5.0]), a
    )[0]
    a, derivatives = jnp.array(0.3), find
    for expected in (jnp.log(a), 1 / a, -1 / a**2, 2 / a**3):
        np.testing.assert_allclose(derivatives(a), expected, rtol=1e-9)
        derivatives = jax.grad(derivatives)
    many = jax.jit(jax.vmap(find))(jnp.array([1e-3, 1.0, 1e4]))
    np.testing.assert_allclose(many, np.log([1e-3, 1.0, 1e4]), atol=1e-12)


def test_newton_climbs_where_the_function_is_not_concave_and_stays_in_its_box():
    bump = lambda theta, a: -jnp.log1p(jnp.sum((theta - a) ** 2))  # noqa: E731
    goal = jnp.array([1.0, -2.0])
    start = jnp.array([9.0, 5.0])
    np.testing.assert_allclose(maximize_by_newton(bump, start, goal), goal, atol=1e-9)
    bounded = jax.jit(lambda a: maximize_by_newton(bump, start, a, lower=jnp.array([3.0, -9.0])))
    np.testing.assert_allclose(bounded(goal), [3.0, -2.0], atol=1e-9)
    np.testing.assert_allclose(jax.jacobian(bounded)(goal), [[0, 0], [0, 1]], atol=1e-9)
    frozen = lambda s: maximize_by_newton(bump, s, goal, free=jnp.array([True, False]))  # noqa: E731
    np.testing.assert_allclose(frozen(start), [1.0, 5.0], atol=1e-9)
    np.testing.assert_allclose(jax.jacobian(frozen)(start), [[0, 0], [0, 1]], atol=1e-9)
    flat = maximize_by_newton(lambda theta, a: a * theta[0], jnp.array([2.0]), jnp.array(0.0))
    assert flat.tolist() == [2.0]
    stopped = maximize_by_newton(bump, start, goal, max_steps=2)
    assert bump(stopped, goal) > bump(start, goal)


# What is refused


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: model_of(PoissonDuration([1.0, 2.0], 4)), "the duration has 2 states"),
        (lambda: PoissonDuration([1.0, 2.0], 0), "max_duration must be an integer"),
        (lambda: PoissonDuration([1.0, 2.0], 3.0), "max_duration must be an integer"),
        (lambda: PoissonDuration([1.0, -2.0], 3), "rate must be finite and not negative"),
        (lambda: PoissonDuration([[1.0]], 3), "rate has shape"),
        (lambda: NegativeBinomialDuration([1.0], [1.0, 2.0], 3), "concentration has shape"),
        (lambda: CategoricalDuration([0.5, 0.5]), "probability has shape"),
        (lambda: CategoricalDuration([[0.5, 0.4]]), "sum to 1"),
        (lambda: CategoricalDuration([[0.5, 0.5]]).prior(-1.0), "count must not be negative"),
        (
            lambda: HSMM([0.5, 0.5], TWO, np.ones((2, 3)) / 3, jaxem.emissions.Poisson(RATES[:2])),
            "the duration must be one such as PoissonDuration",
        ),
        (
            lambda: HSMM(
                [0.5, 0.5],
                [[0.1, 0.9], [1, 0]],
                FAMILIES["poisson"](2),
                jaxem.emissions.Poisson(RATES[:2]),
            ),
            "cannot follow itself",
        ),
        (
            lambda: HSMM(
                [0.5, 0.5],
                jaxem.factors.Transition(TWO, np.ones((2, 2), bool)),
                FAMILIES["poisson"](2),
                jaxem.emissions.Poisson(RATES[:2]),
            ),
            "cannot follow itself",
        ),
        (
            lambda: HSMM(
                [0.5, 0.5], MATRIX, FAMILIES["poisson"](2), jaxem.emissions.Poisson(RATES[:2])
            ),
            "transition matrix has shape",
        ),
        (
            lambda: HSMM(
                [1.0], [[0.0]], FAMILIES["poisson"](1), jaxem.emissions.Poisson(RATES[:1])
            ),
            "two states",
        ),
        (
            lambda: HSMM([1.0], TWO, FAMILIES["poisson"](2), jaxem.emissions.Poisson(RATES[:2])),
            "initial has shape",
        ),
        (
            lambda: model_of(FAMILIES["poisson"](3)).sample(jax.random.key(0), 1, 0),
            "num_steps must be an integer ≥ 1",
        ),
        (lambda: model_of(FAMILIES["poisson"](3)).log_prob(np.ones((4, 5))), "have shape"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()
