"""Hidden Markov models: what the laws of `test_laws.py` do not see."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from compilations import compilations
from jax.flatten_util import ravel_pytree
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models import CASES, LENGTHS, MEAN, OBSERVED, SEQUENCES, STAGES, STAY, cases
from test_adjoints import agree, gradient_and_difference

import jaxem
from jaxem import HMM, RESULTS, Sequences
from jaxem._core.parameters import named_parameters
from jaxem.factors import LogisticTransition, Transition

KEY = jax.random.key(0)
RAGGED = ["hmm-gaussian", "hmm-left-to-right"]


@eqx.filter_jit
def e_step(model, data, sample_weight=None, posterior=jaxem.em.Exact()):
    statistics, value = model.e_step(data, sample_weight, posterior=posterior)
    return statistics.sums, value


@eqx.filter_jit
def step(model, data, prior=None, posterior=jaxem.em.Exact()):
    """One step of EM: the next model and the statistics that it comes from."""
    statistics, value = model.e_step(data, posterior=posterior)
    total = statistics if prior is None else statistics + prior
    return model.m_step(total), total, value


def climb(model, data, num_steps):
    """The model after some steps, none of which falls."""
    values = []
    for _ in range(num_steps):
        model, _, value = step(model, data)
        values.append(value)
    assert np.all(np.diff(values) > -1e-9)
    return model


@eqx.filter_jit
def of_q(model, statistics):
    return jax.value_and_grad(lambda m: m.expected_log_prob(statistics))(model)


@eqx.filter_jit
def slopes(model, data, sample_weight):
    """Derivatives of the log-likelihood by model, data (zero for integers) and weights."""

    def total(model, values, sample_weight):
        new = eqx.tree_at(lambda d: d.values, data, values)
        return model.e_step(new, sample_weight)[1]

    by_model, by_values, by_weights = jax.grad(total, argnums=(0, 1, 2), allow_int=True)(
        model, data.values, sample_weight
    )
    if by_values.dtype == jax.dtypes.float0:
        by_values = jnp.zeros(data.values.shape)
    return by_model, by_values, by_weights


def close(a, b, tol=1e-10):
    """Trees agree leaf by leaf; a list is an array."""
    a, b = (jax.tree.leaves(tree, is_leaf=lambda node: isinstance(node, list)) for tree in (a, b))
    for left, right in zip(a, b, strict=True):
        np.testing.assert_allclose(left, right, rtol=tol, atol=tol)


def finite(tree):
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def lane(tree, index):
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[index]), tree)


def gaussians(initial=(0.6, 0.4), transition=STAY):
    return HMM(initial, transition, jaxem.emissions.SphericalGaussian(MEAN, [1.0, 1.3]))


X = jnp.asarray(SEQUENCES)


# Sequences of different lengths


def alone(data, i):
    """One sequence without what lies beyond its end."""
    n = int(data.lengths[i])
    return Sequences(data.values[i : i + 1, :n], observed=data.observed[i : i + 1, :n])


@eqx.filter_jit
def said_of(model, data):
    """What the model says of each sequence and each of its steps."""
    paths, best = model.best_paths(data, 2)
    of_steps = {
        "filtered": model.filtered(data),
        "smoothed": model.responsibilities(data),
        "increments": model.one_step_log_prob(data),
        "paths": jnp.moveaxis(paths, 1, 2),
    }
    of_sequences = {
        "log_prob": model.log_prob(data),
        "best": best,
        "forecast": model.forecast(data, 3),
        "impossible": model.first_impossible(data),
    }
    return of_steps, of_sequences


def test_ragged_sequences_are_each_of_them():
    model, data, *_ = CASES["hmm-left-to-right"]()
    of_steps, of_sequences = said_of(model, data)
    for i in (3, 6):
        one = alone(data, i)
        close(e_step(model, data, jnp.zeros(14).at[i].set(1)), e_step(model, one, jnp.ones(1)))
        own_steps, own = said_of(model, one)
        n = int(data.lengths[i])
        close(jax.tree.map(lambda leaf, i=i, n=n: leaf[i, :n], of_steps), lane(own_steps, 0))
        close(lane(of_sequences, i), lane(own, 0))
    beyond = np.arange(9) >= LENGTHS[:, None]
    for what in ("filtered", "smoothed", "increments"):
        assert np.all(np.asarray(of_steps[what])[beyond] == 0)
    # Nothing is learnt of a step that was not observed.
    np.testing.assert_allclose(of_steps["increments"][~OBSERVED], 0, atol=1e-14)
    close(jnp.sum(of_steps["increments"], axis=1), of_sequences["log_prob"])


@pytest.mark.parametrize("name", RAGGED)
def test_padding_is_nothing(name):
    """Longer, and filled with NaN: equal statistics, and derivatives that are zero there."""
    model, data, *_ = CASES[name]()
    sample_weight = jnp.linspace(0, 2, 14)
    counts = np.asarray(data.present)
    spoilt = jnp.where(counts[:, :, None], data.values, jnp.nan)
    longer = jnp.concatenate([spoilt, jnp.full((14, 3, spoilt.shape[2]), jnp.nan)], axis=1)
    seen = jnp.concatenate([data.observed, jnp.ones((14, 3), bool)], axis=1)
    longer = Sequences(longer, LENGTHS, observed=seen)
    close(e_step(model, longer, sample_weight), e_step(model, data, sample_weight))
    close(model.log_prob(longer), model.log_prob(data))
    of_model, of_values, of_weights = slopes(model, longer, sample_weight)
    other = slopes(model, data, sample_weight)
    close((of_model, of_weights), (other[0], other[2]))
    close(of_values[:, :9], other[1])
    assert np.all(np.asarray(of_values)[:, 9:] == 0)
    assert np.all(np.asarray(of_values)[:, :9][~counts] == 0)


def test_a_step_that_was_not_observed_is_summed_over():
    """Its two values summed over give the probability of the rest."""
    bits = jaxem.emissions.Bernoulli([[0.2], [0.7]])
    model = HMM([0.6, 0.4], STAY, bits)
    x = jnp.asarray([[1, 0, 1, 1, 0], [0, 0, 1, 1, 1]])[:, :, None]
    observed = np.ones((2, 5), bool)
    observed[0, 0] = observed[1, 2] = observed[1, 4] = False
    hidden = jnp.where(observed[:, :, None], x, 7)
    found = model.log_prob(Sequences(hidden, observed=observed))
    each = [
        model.log_prob(x.at[0, 0].set(a).at[1, 2].set(a).at[1, 4].set(b))
        for a in (0, 1)
        for b in (0, 1)
    ]
    first, second = jnp.stack(each).T
    close(found, [jax.nn.logsumexp(first[jnp.array([0, 2])]), jax.nn.logsumexp(second)])


@pytest.mark.parametrize("name", cases("chain"))
def test_weights_count_sequences(name):
    """2 is twice and 0 is absent, whatever its steps hold, within its length."""
    model, data, *_ = CASES[name]()
    data = data if isinstance(data, Sequences) else Sequences(data)
    spoil = lambda leaf: leaf.at[1].set(jnp.nan if leaf.dtype == float else -7)  # noqa: E731
    spoilt = eqx.tree_at(lambda d: d.values, data, spoil(data.values))
    if data.inputs is not None:
        spoilt = eqx.tree_at(lambda d: d.inputs, spoilt, spoil(data.inputs))
    sample_weight = jnp.ones(14).at[0].set(2).at[1].set(0)
    listed = lane(data, jnp.array([0, 0, *range(2, 14)]))
    close(e_step(model, spoilt, sample_weight), e_step(model, listed))
    of_model, of_values, of_weights = slopes(model, spoilt, sample_weight)
    assert finite((of_model, of_weights))
    assert np.all(of_values[1] == 0)


def test_a_sequence_of_weight_0_has_a_derivative_where_it_is_possible():
    model, data, *_ = CASES["hmm-gaussian"]()
    sample_weight = jnp.ones(14).at[1].set(0)
    close(slopes(model, data, sample_weight)[2], model.log_prob(data))


# Lists of sequences


def test_from_list_and_split_agree():
    parts = [SEQUENCES[i, :n] for i, n in enumerate(LENGTHS)]
    listed = Sequences.from_list(parts)
    assert listed.values.shape == (14, 10, 2) and listed.lengths.tolist() == LENGTHS.tolist()
    rows = np.concatenate(parts)
    starts = np.zeros(len(rows), bool)
    starts[np.cumsum(LENGTHS) - LENGTHS] = True
    for other in (Sequences.split(rows, LENGTHS), Sequences.split(rows, starts=starts)):
        close(other, listed, 0)
    fixed = Sequences.split(rows, LENGTHS, num_steps=9)
    assert fixed.values.shape == (14, 9, 2)
    model = gaussians()
    close(e_step(model, listed), e_step(model, fixed))
    close(e_step(model, fixed), e_step(model, Sequences(SEQUENCES, LENGTHS)))
    np.testing.assert_array_equal(listed.within, np.arange(10) < LENGTHS[:, None])


def test_lists_of_mixed_steps_with_masks_and_inputs():
    pair = [(SEQUENCES[i, :n], np.arange(2 * n).reshape(n, 2)) for i, n in enumerate((4, 6))]
    masks = [np.arange(4) != 2, np.arange(6) != 5]
    inputs = [np.ones((4, 1)), 2 * np.ones((6, 1))]
    data = Sequences.from_list(pair, observed=masks, inputs=inputs)
    assert [leaf.shape for leaf in data.values] == [(2, 6, 2), (2, 6, 2)]
    assert data.values[1].dtype == int and data.inputs.shape == (2, 6, 1)
    present = [[1, 1, 0, 1, 0, 0], [1, 1, 1, 1, 1, 0]]
    np.testing.assert_array_equal(data.present, np.array(present, bool))
    np.testing.assert_array_equal(data.steps()[1][6:], pair[1][1])


def test_lists_of_integers_and_floats_become_floats():
    data = Sequences.from_list([np.ones((2, 1), int), np.full((3, 1), 0.5)])
    assert data.values[1, 0, 0] == 0.5


@pytest.mark.parametrize("longest", [1, 2, 7, 8, 9, 11, 17, 100, 129, 1000])
def test_rounded_lengths_are_at_most_a_quarter_longer(longest):
    steps = Sequences.from_list([np.zeros((longest, 1))]).values.shape[1]
    assert longest <= steps <= 1.25 * longest


def test_new_lengths_of_like_size_compile_nothing():
    def call(lengths):
        data = Sequences.from_list(
            [SEQUENCES[i, :n] for i, n in enumerate(lengths)], num_steps=None
        )
        model = gaussians()
        solution = jaxem.fit(model, data, max_steps=5)
        return solution, model.viterbi(data), model.log_prob(data), model.forecast(data, 2)

    call([9, 3, 4])
    assert compilations(lambda: call([9, 9, 1])) == 0
    assert compilations(lambda: call([5, 3, 2])) > 0  # another size


# The M-step


@eqx.filter_jit
def counted(model, data):
    """Expected first states and transitions, pair by pair."""
    log_b = model.emission.log_prob(data.steps(), model.emission.tilt())
    log_b = jnp.where(data.present[:, :, None], log_b.reshape(*data.present.shape, -1), 0)
    matrix = model.transition.matrix
    found = jax.vmap(lambda b: jaxem.latents.chain.smoothing(model.initial, matrix, b))(log_b)
    pairs = found.before[:, :-1, :, None] * matrix * found.after[:, 1:, None, :]
    pairs = jnp.where(data.within[:, 1:, None, None], pairs, 0)
    return jnp.sum(found.smoothed[:, 0], axis=0), jnp.sum(pairs, axis=(0, 1))


def shares(counts):
    return counts / jnp.sum(counts, axis=-1, keepdims=True)


def test_the_m_step_shares_expected_counts():
    model, data, *_ = CASES["hmm-gaussian"]()
    first, moved = counted(model, data)
    after, *_ = step(model, data)
    close(after.initial, shares(first))
    close(after.transition.matrix, shares(moved))
    close(jnp.sum(first), 14.0)
    close(jnp.sum(moved), float(np.sum(LENGTHS - 1)))


def test_structural_zeros_stay_zero():
    model, data, *_ = CASES["hmm-left-to-right"]()
    fitted = climb(model, data, 10)
    possible = np.triu(np.tri(3, k=1)) > 0
    matrix = np.asarray(fitted.transition.matrix)
    assert np.all((matrix > 0) == possible)
    assert model.num_free_parameters == 2 + 2 + 6
    close(shares(counted(model, data)[1]), step(model, data)[0].transition.matrix)
    smoothed = np.asarray(fitted.responsibilities(data))
    paths, _ = fitted.viterbi(data)
    assert np.all(np.diff(paths, axis=1) >= 0) and np.all(np.diff(paths, axis=1) <= 1)
    never = jaxem.factors.Transition.left_to_right(3, 0.7)
    ahead = HMM([1.0, 0.0, 0.0], never, model.emission)  # floored, not a structural zero
    assert np.all(ahead.responsibilities(data)[:, 0, 1:] < 1e-290) and np.all(smoothed >= 0)


def test_zeros_under_jit_need_a_mask():
    matrix, mask = jnp.array([[0.5, 0.5], [0.0, 1.0]]), [[True, True], [False, True]]
    assert Transition(matrix).mask == ((True, True), (False, True))
    assert jax.jit(lambda m: Transition(m).matrix)(matrix)[1, 0] > 0
    assert jax.jit(lambda m: Transition(m, mask).matrix)(matrix)[1, 0] == 0


def test_a_row_that_is_never_left_stays_as_it_is():
    """No transitions out of the last state were seen: nothing was counted."""
    model = HMM([0.5, 0.5], STAY, jaxem.emissions.SphericalGaussian(MEAN, [1.0, 1.3]))
    after, *_ = step(model, X[:, :1])
    close(after.transition.matrix, STAY)
    assert finite(after)


def test_tied_rows_share_their_counts():
    three = jaxem.emissions.SphericalGaussian([[0.0], [1.5], [4.0]], [1.0, 1.2, 0.9])
    rows = np.array([[0.2, 0.5, 0.3], [0.6, 0.1, 0.3], [0.2, 0.5, 0.3]])
    model = HMM([0.4, 0.3, 0.3], Transition(rows, tied=["a", "b", "a"]), three)
    data = Sequences(jnp.asarray(STAGES), LENGTHS)
    assert model.num_free_parameters == 2 + 2 * 2 + 6
    _, moved = counted(model, data)
    pooled = jnp.stack([moved[0] + moved[2], moved[1], moved[0] + moved[2]])
    close(step(model, data)[0].transition.matrix, shares(pooled))
    matrix = climb(model, data, 15).transition.matrix
    np.testing.assert_array_equal(matrix[0], matrix[2])


@pytest.mark.parametrize(
    ("name", "mask"),
    [
        ("initial", None),
        ("initial", [True, False]),
        ("transition.matrix", None),
        ("transition.matrix", [False, True]),
        ("emission.mean", [True, False]),
    ],
)
def test_freezing(name, mask):
    """What is frozen does not move, what is free goes to the constrained maximum."""
    model, data, *_ = CASES["hmm-gaussian"]()
    frozen = jaxem.freeze(model, name, mask=mask)
    after, statistics, _ = step(frozen, data)
    free, *_ = step(model, data)
    which = np.array([True, True] if mask is None else mask)
    get = lambda m: functools.reduce(getattr, name.split("."), m)  # noqa: E731
    np.testing.assert_allclose(get(after)[which], get(model)[which], rtol=1e-15)
    if name == "initial":
        close(jnp.sum(after.initial), 1.0)
        assert frozen.num_free_parameters == model.num_free_parameters - 1
    elif name == "transition.matrix":
        close(get(after)[~which], get(free)[~which])
        assert frozen.num_free_parameters == model.num_free_parameters - which.sum()
    moved = jaxem.freeze(free, name, mask=mask)
    assert of_q(after, statistics)[0] <= of_q(moved, statistics)[0] + 1e-9
    fitted = climb(frozen, data, 10)
    np.testing.assert_allclose(get(fitted)[which], get(model)[which], rtol=1e-14)
    assert jax.tree.structure(jaxem.unfreeze(frozen, name)) == jax.tree.structure(model)


# Priors


@pytest.mark.parametrize("sticky", [0.0, 3.0])
def test_dirichlet_priors_are_pseudo_counts(sticky):
    model, data, *_ = CASES["hmm-gaussian"]()
    concentration = np.array([[1.5, 2.0], [1.0, 4.0]])
    counts = concentration - 1
    rows = model.transition.prior(counts.sum(1), shares(counts), sticky)
    prior = model.prior(initial=[1.0, 0.5], transition=rows)
    first, moved = counted(model, data)
    after, *_ = step(model, data, prior)
    close(after.initial, shares(first + jnp.array([1.0, 0.5])))
    close(after.transition.matrix, shares(moved + concentration - 1 + sticky * np.eye(2)))
    plain, *_ = step(model, data)
    close(after.emission, plain.emission)


def test_the_prior_of_driven_transitions_is_normal_about_its_law():
    matrix, slopes = jnp.array([[0.7, 0.3], [0.4, 0.6]]), jnp.array([[[1.0], [0.0]], [[0.5], [-1]]])
    driven = LogisticTransition(matrix, slopes)
    law = {"coefficients": 0.5 * slopes, "baseline": [[0.5, 0.5], [0.2, 0.8]]}
    prior = driven.prior(precision=2.0, baseline_precision=[3.0, 0.0], **law)

    def centred(values):
        return values - jnp.mean(values, axis=1, keepdims=True)

    def by_hand(driven):
        levels = centred(driven.logits - jnp.log(jnp.array(law["baseline"]))) ** 2
        others = centred(driven.slopes - law["coefficients"]) ** 2
        return -0.5 * (3 * jnp.sum(levels[0]) + 2 * jnp.sum(others))

    def value(driven):
        return driven.expected_log_prob(prior.at(driven).sums)

    other = LogisticTransition(law["baseline"], -slopes)
    close(value(other) - value(driven), by_hand(other) - by_hand(driven))
    with pytest.raises(ValueError, match="negative"):
        driven.prior(precision=-1.0)


def test_a_prior_of_tied_and_forbidden_transitions():
    """Rows that share a distribution share their pseudo-counts; what is forbidden gets none."""
    tied = Transition([[0.5, 0.5], [0.5, 0.5]], tied=[0, 0])
    close(tied.prior(1.0, stay=1.0).sums, [[2.0, 2.0]])
    ahead = Transition.left_to_right(3)
    close(ahead.prior([2.0, 2.0, 1.0], stay=4.0).sums, [[5.0, 1, 0], [0, 5, 1], [0, 0, 5]])
    flat = ahead.prior()
    assert np.all(flat.sums == 0)


@pytest.mark.parametrize("name", cases("chain", "mechanism"))
def test_map_em_climbs_to_a_posterior_mode(name):
    model, data, *_ = CASES[name]()
    logistic = name == "hmm-logistic-transition"
    if logistic:
        rows = model.transition.prior(precision=2.0)
    else:
        possible = np.sum(model.transition.matrix > 0, axis=1)
        rows = model.transition.prior(0.5 * possible, stay=2.0)
    prior = model.prior(initial=float(model.num_states), transition=rows)
    solution = jaxem.fit(model, data, prior=prior, tol=1e-12, max_steps=3000)
    assert solution.result == RESULTS.converged
    history = solution.history[: solution.num_steps + 1]
    assert np.all(np.diff(history) > -1e-9) and history[-1] > history[0] + 1

    @jax.jit
    def objective(m):
        return jax.value_and_grad(lambda m: m.e_step(data)[1] + m.expected_log_prob(prior))(m)

    value, gradient = objective(solution.model)
    close(value, solution.objective, 1e-12)
    assert max(float(jnp.max(jnp.abs(leaf))) for leaf in jax.tree.leaves(gradient)) < 1e-5


# A stationary start


def test_the_stationary_m_step_maximises():
    """No other matrix has a higher Q: its gradient is zero, and counting alone falls short."""
    model, data, *_ = CASES["hmm-stationary"]()
    after, statistics, _ = step(model, data)
    value, gradient = of_q(after, statistics)
    assert np.max(np.abs(gradient.transition.logits)) < 1e-9
    first, moved = statistics.sums[:2]
    counting = HMM("stationary", shares(moved), after.emission)
    assert value > of_q(counting, statistics)[0] + 1e-4
    close(after.initial @ after.transition.matrix, after.initial)
    assert model.num_free_parameters == 2 + 2


@pytest.mark.parametrize(
    ("arrows", "unique"),
    [
        ([(0, 1), (1, 2), (2, 3), (3, 0)], True),  # a cycle
        ([(0, 1), (1, 2), (2, 3), (3, 3)], True),  # towards one state
        ([(0, 1), (1, 2), (2, 1), (3, 0)], True),  # towards two that alternate
        ([(0, 1), (1, 0), (2, 3), (3, 2)], False),
        ([(0, 0), (1, 0), (1, 2), (2, 3), (3, 3)], False),  # one of two ends
    ],
)
def test_which_chains_have_one_stationary_distribution(arrows, unique):
    matrix = np.zeros((4, 4))
    matrix[tuple(np.array(arrows).T)] = 1
    matrix = shares(matrix)
    transition = Transition(matrix)
    assert transition.has_one_class() == unique
    if unique:
        delta = jaxem.latents.chain.stationary(transition.matrix)
        close(delta @ matrix, delta)
        close(jnp.sum(delta), 1.0)


def test_stationary_fits_are_maxima_of_the_likelihood_in_lanes_and_alone():
    """Few short sequences: first states weigh as much as transitions, and some matrices decay."""
    rng = np.random.default_rng(0)
    z = rng.integers(0, 3, (12, 5, 12))
    for t in range(1, 12):
        z[..., t] = np.where(rng.random((12, 5)) < 0.8, z[..., t - 1], z[..., t])
    data = jnp.asarray(rng.poisson(np.array([1.0, 4.0, 10.0])[z]))[..., None]
    starts = jnp.asarray(rng.dirichlet(np.ones(3), (12, 3)))

    def fit(x, matrix):
        model = HMM("stationary", matrix, jaxem.emissions.Poisson([[0.5], [3.0], [8.0]]))
        found = jaxem.fit(model, x, throw=False, max_steps=2000)
        score = jax.grad(lambda m: m.e_step(x)[1])(found.model)
        steep = jnp.max(jnp.stack([jnp.max(jnp.abs(s)) for s in jax.tree.leaves(score)]))
        return found.objective, found.result == jaxem.RESULTS.converged, steep

    objective, converged, steep = jax.jit(jax.vmap(fit))(data, starts)
    assert int(jnp.sum(converged)) >= 11
    assert float(jnp.max(jnp.where(converged, steep, 0))) < 1e-3
    alone = jax.jit(fit)(data[3], starts[3])
    close(alone[0], objective[3], 1e-8)


@pytest.mark.parametrize("rows", [None, [True, False]])
def test_a_stationary_fit_with_zeros_and_held_rows_climbs(rows):
    matrix = np.array([[0.7, 0.3, 0.0], [0.1, 0.6, 0.3], [0.4, 0.0, 0.6]])
    emission = jaxem.emissions.SphericalGaussian([[0.0], [1.5], [4.0]], [1.0, 1.2, 0.9])
    model = HMM("stationary", matrix, emission)
    if rows is not None:
        model = jaxem.freeze(model, "transition.matrix", mask=[True, False, True])
    solution = jaxem.fit(model, jnp.asarray(STAGES), tol=0.0, max_steps=25)
    assert np.all(np.diff(solution.history) > -1e-9)
    fitted = np.asarray(solution.model.transition.matrix)
    assert np.all((fitted > 0) == (matrix > 0))
    if rows is not None:
        close(fitted[[0, 2]], matrix[[0, 2]], 1e-14)
        assert abs(fitted[1] - matrix[1]).max() > 1e-3


# Transitions driven by inputs


def test_weights_of_zero_are_a_plain_transition():
    model, data, *_ = CASES["hmm-logistic-transition"]()
    driven = HMM(model.initial, LogisticTransition(STAY, 1), model.emission)
    plain = HMM(model.initial, STAY, model.emission)
    close(driven.log_prob(data), plain.log_prob(data.values))
    fitted = jaxem.fit(
        jaxem.freeze(driven, "transition.coefficients"), data, tol=1e-11, max_steps=5000
    ).model
    other = jaxem.fit(plain, data.values, tol=1e-11).model
    close(fitted.transition.baseline, other.transition.matrix, 1e-6)
    close(fitted.emission, other.emission, 1e-6)


def test_inputs_that_drive_nothing_do_not_matter():
    """Those of first steps and beyond the ends."""
    model, data, *_ = CASES["hmm-logistic-transition"]()
    ends = jnp.asarray(LENGTHS)
    within = Sequences(data.values, ends, inputs=data.inputs)
    idle = (np.arange(9) == 0) | (np.arange(9) >= LENGTHS[:, None])
    spoilt = Sequences(data.values, ends, inputs=jnp.where(idle[:, :, None], jnp.nan, data.inputs))
    close(e_step(model, spoilt), e_step(model, within))
    close(model.log_prob(spoilt), model.log_prob(within))
    assert finite(slopes(model, spoilt, jnp.ones(14)))
    other = Sequences(data.values, ends, inputs=data.inputs.at[:, 4].add(1.0))
    assert np.max(np.abs(model.log_prob(other) - model.log_prob(within))) > 1e-3


def test_inputs_drive_the_step_into_theirs():
    """An input that forces state 1 at one step alone."""
    force = LogisticTransition([[0.5, 0.5], [0.5, 0.5]], [[[-40.0], [40.0]]] * 2)
    model = HMM([1.0, 0.0], force, jaxem.emissions.Poisson([[1.0], [5.0]]))
    inputs = jnp.zeros((50, 6, 1)).at[:, 3].set(1.0)
    _, z = model.sample(KEY, 50, 6, inputs)
    assert np.all(z[:, 3] == 1) and 0 < np.mean(z[:, 2]) < 1 and 0 < np.mean(z[:, 4]) < 1
    x = jnp.ones((50, 6, 1), int)
    smoothed = model.responsibilities(Sequences(x, inputs=inputs))
    assert np.all(smoothed[:, 3, 1] > 0.999) and np.all(smoothed[:, 2, 1] < 0.5)


def test_logistic_weights_are_found_again():
    truth = LogisticTransition(STAY, [[[1.0], [-1.0]], [[-0.5], [0.5]]])
    model = HMM([0.5, 0.5], truth, jaxem.emissions.Poisson([[1.0], [30.0]]))
    inputs = jax.random.normal(jax.random.key(1), (20, 100, 1))
    x, _ = model.sample(jax.random.key(2), 20, 100, inputs)
    start = HMM([0.5, 0.5], LogisticTransition(STAY, 1), model.emission)
    data = Sequences(x, inputs=inputs)
    solution = jaxem.fit(start, data, tol=1e-6)
    errors = jaxem.inference.standard_errors(solution, data)["transition"]["coefficients"]
    gaps = np.abs(solution.model.transition.coefficients - truth.coefficients)
    assert np.all(gaps < 4 * errors) and np.all(errors < 0.2)


# Starts


@pytest.mark.parametrize("method", ["k-means++", "random"])
def test_a_start_is_pure_and_ignores_what_does_not_count(method):
    keys = jax.random.split(KEY, 3)
    counts = np.asarray(Sequences(SEQUENCES, LENGTHS, observed=OBSERVED).present)
    spoilt = Sequences(jnp.where(counts[:, :, None], X, jnp.nan), LENGTHS, observed=OBSERVED)

    def start(key, data=spoilt):
        return HMM.init(key, data, 2, jaxem.emissions.Gaussian, method=method, stay=0.8)

    batch = jax.jit(jax.vmap(start))(keys)
    for i, key in enumerate(keys):
        close(lane(batch, i), start(key))
    assert finite(batch)
    steps = SEQUENCES[counts]
    gaps = np.abs(steps[None] - np.asarray(batch.emission.mean)[:, :, None].reshape(6, 1, 2))
    assert np.all(gaps.sum(-1).min(1) < 1e-12)  # around steps that count
    close(lane(batch, 0).transition.matrix, 0.2 + 0.6 * np.eye(2))
    close(lane(batch, 0).initial, [0.5, 0.5])
    sample_weight = jnp.ones(14).at[0].set(0)
    light = HMM.init(
        KEY, spoilt, 2, jaxem.emissions.Gaussian, method=method, sample_weight=sample_weight
    )
    assert not np.any(np.all(np.isin(light.emission.mean, SEQUENCES[0]), axis=1))


def test_a_left_to_right_start_has_its_states_in_order_of_time():
    ahead = Transition.left_to_right(3, 0.8)
    level = jnp.repeat(jnp.array([5.0, -5.0, 0.0]), 10)
    x = level[None, :, None] + 0.1 * jax.random.normal(KEY, (4, 30, 1))
    for family in (
        jaxem.emissions.SphericalGaussian,
        functools.partial(jaxem.emissions.DiagonalGaussian, tied=True),
    ):
        model = HMM.init(jax.random.key(3), x, 3, family, transition=ahead)
        np.testing.assert_allclose(model.emission.mean[:, 0], [5.0, -5.0, 0.0], atol=1.0)
    any_way = Transition(np.full((3, 3), 1 / 3))
    free = HMM.init(jax.random.key(3), x, 3, jaxem.emissions.SphericalGaussian, transition=any_way)
    plain = HMM.init(jax.random.key(3), x, 3, jaxem.emissions.SphericalGaussian)
    close(free.emission, plain.emission)
    with pytest.raises(ValueError, match="has 3 states"):
        HMM.init(KEY, x, 2, jaxem.emissions.SphericalGaussian, transition=ahead)


def test_a_feed_forward_chain_whose_path_vanishes_is_fitted_in_single_precision():
    """pomegranate#120: the state that explains the first counts cannot explain the last ones."""
    matrix, rate = np.array([[0.97, 0.03], [0.0, 1.0]]), np.array([[30.0], [1.0]])
    model = HMM(
        jnp.array([1.0, 0.0], jnp.float32),
        jnp.asarray(matrix, jnp.float32),
        jaxem.emissions.Poisson(jnp.asarray(rate, jnp.float32)),
    )
    x = np.r_[np.ones(40), np.full(40, 30)]
    log_b = scipy.stats.poisson.logpmf(x[:, None], rate[:, 0])
    leaves = [log_b[:s, 0].sum() + log_b[s:, 1].sum() for s in range(1, 81)]  # the first s steps
    leaves = leaves + np.log(0.97) * np.arange(80) + np.r_[np.full(79, np.log(0.03)), 0]
    data = jnp.asarray(x, jnp.float32)[None, :, None]
    np.testing.assert_allclose(model.log_prob(data)[0], scipy.special.logsumexp(leaves), rtol=1e-6)
    assert np.all(model.sample_paths(KEY, data) == 0)
    solution = jaxem.fit(model, data)
    np.testing.assert_allclose(solution.model.emission.rate, [[1.0], [30.0]], rtol=1e-4)


def test_a_start_keeps_the_dtype_of_the_data():
    for data in (X, Sequences(X, LENGTHS), Sequences(X, observed=OBSERVED)):
        single = jax.tree.map(lambda a: a.astype("float32") if a.dtype == float else a, data)
        model = HMM.init(KEY, single, 2, jaxem.emissions.Gaussian)
        assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype("float32")}
    prior = model.prior(initial=2.0, transition=model.transition.prior(1.0, stay=2.0))
    after, *_ = step(model, single, prior)
    assert {leaf.dtype for leaf in jax.tree.leaves(after)} == {jnp.dtype("float32")}
    ahead = Transition.left_to_right(3, jnp.float32(0.5))
    assert ahead.logits.dtype == jnp.float32


def test_a_start_from_a_mixture():
    mixture = jaxem.Mixture([0.3, 0.7], jaxem.emissions.SphericalGaussian(MEAN, [1.0, 1.3]))
    model = HMM.from_mixture(mixture, stay=0.6)
    matrix = model.transition.matrix
    close(matrix, 0.6 * np.eye(2) + 0.4 * np.array([0.3, 0.7]))
    close(model.initial, [0.3, 0.7])
    # Without staying an HMM is its mixture.
    alike = HMM.from_mixture(mixture, stay=0.0)
    close(alike.log_prob(X), jnp.sum(mixture.log_prob(X.reshape(-1, 2)).reshape(14, 9), axis=1))

    def fitted(data):
        return jaxem.fit(
            HMM.from_mixture(jaxem.fit(mixture, data.reshape(-1, 2), throw=False).model),
            data,
            throw=False,
        )

    batch = jax.jit(jax.vmap(fitted))(jnp.stack([X[:7], X[7:]]))
    single = fitted(X[7:])
    close(lane(batch.model, 1), single.model, 1e-6)


def test_restarts():
    def start(key):
        model = HMM.init(key, X, 2, jaxem.emissions.SphericalGaussian)
        return HMM("stationary", model.transition, model.emission)

    models = jax.vmap(start)(jax.random.split(KEY, 5))
    runs = jaxem.fit_restarts(models, X, tol=1e-8)
    single = jaxem.fit(lane(models, 3), X, tol=1e-8)
    close(lane(runs, 3).objective, single.objective, 1e-9)
    chosen = jaxem.best(runs)
    assert chosen.objective == jnp.max(runs.objective) and chosen.result == RESULTS.converged


# Hard EM


@pytest.mark.parametrize("name", cases("chain", "mechanism"))
def test_viterbi_training(name):
    model, data, *_ = CASES[name]()
    hard = jaxem.EM(jaxem.em.Hard())
    (first, _, _), value = e_step(model, data, posterior=jaxem.em.Hard())
    paths, best = model.viterbi(data)
    close(value, jnp.sum(best))
    np.testing.assert_array_equal(first, np.bincount(np.asarray(paths[:, 0]), minlength=len(first)))
    if name != "hmm-logistic-transition":
        within = np.asarray(jaxem._core.sequences.as_sequences(data).within)
        pairs = [
            (p[t - 1], p[t]) for p, w in zip(paths, within, strict=True) for t in range(1, w.sum())
        ]
        counts = np.zeros_like(model.transition.matrix)
        np.add.at(counts, tuple(np.array(pairs).T), 1)
        sums = e_step(model, data, posterior=jaxem.em.Hard())[0][1]
        close(sums, counts)
    solution = jaxem.fit(model, data, hard, tol=1e-9, throw=False)
    history = solution.history[: solution.num_steps + 1]
    assert np.all(np.diff(history) > -1e-9) and len(history) > 2
    close(history[-1], jnp.sum(solution.model.viterbi(data)[1]))
    soft = jnp.sum(solution.model.log_prob(data))
    assert history[-1] < soft


# Derivatives


def moved_data(data, t):
    rng = np.random.default_rng(1)

    def shift(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf * (1 + t * rng.normal(size=leaf.shape))

    return jax.tree.map(shift, data)


def perturbed_fit(name, t, adjoint, **options):
    """A smooth function of a fit whose data, weights and prior move with t."""
    model, data, *_ = CASES[name]()
    sample_weight = 1 + t[1] * np.random.default_rng(2).normal(size=14)
    driven = name == "hmm-logistic-transition"
    rows = model.transition.prior(precision=1.5) if driven else model.transition.prior(1.0)
    prior = (1 + t[2]) * model.prior(initial=2.0, transition=rows)
    solution = jaxem.fit(
        model,
        moved_data(data, t[0]),
        sample_weight=sample_weight,
        prior=prior,
        adjoint=adjoint,
        throw=False,
        **options,
    )
    spread = sum(
        jnp.sum(jnp.cos(leaf)) for leaf in jax.tree.leaves(named_parameters(solution.model))
    )
    return jnp.sum(jnp.sin(solution.model.log_prob(data))) + spread + 0.1 * solution.objective


@pytest.mark.parametrize("name", cases("chain", "mechanism"))
def test_implicit_gradients(name):
    def value(t):
        return perturbed_fit(name, t, jaxem.em.Implicit(), tol=1e-13, max_steps=20_000)

    agree(*gradient_and_difference(value), 1e-6)


def test_gradients_through_the_steps():
    def value(t, adjoint):
        return perturbed_fit("hmm-left-to-right", t, adjoint, tol=0.0, max_steps=3)

    backwards, difference = gradient_and_difference(lambda t: value(t, jaxem.em.Unrolled()))
    agree(backwards, difference, 1e-6)
    forwards = jax.jit(jax.jacfwd(lambda t: value(t, jaxem.em.Forward())))
    agree(forwards(jnp.zeros(3)), difference, 1e-6)


@pytest.mark.parametrize("name", cases("chain"))
def test_gradient_of_the_log_likelihood(name):
    model, data, *_ = CASES[name]()
    flat, unravel = ravel_pytree(model)
    way = jnp.asarray(np.random.default_rng(0).normal(size=flat.shape))
    value = jax.jit(lambda numbers: jnp.sum(unravel(numbers).log_prob(data) * jnp.arange(14)))
    slope = jax.jit(jax.grad(value))(flat) @ way
    h = 1e-3
    near, far = (value(flat + s * way) - value(flat - s * way) for s in (h, 2 * h))
    np.testing.assert_allclose(slope, (8 * near - far) / (12 * h), rtol=1e-6)


def stationary_poissons(numbers):
    """The fit of "hmm-stationary" as a function of P(1|0), P(0|1) and the two rates."""
    leave, back, low, high = numbers
    matrix = jnp.stack([jnp.stack([1 - leave, leave]), jnp.stack([back, 1 - back])])
    return HMM(
        "stationary", Transition(matrix), jaxem.emissions.Poisson(jnp.stack([low, high])[:, None])
    )


def test_standard_errors_are_those_of_the_hessian_by_differences():
    model, data, *_ = CASES["hmm-stationary"]()
    solution = jaxem.fit(model, data, tol=1e-13)
    matrix, rate = solution.model.transition.matrix, solution.model.emission.rate
    at = np.array([matrix[0, 1], matrix[1, 0], rate[0, 0], rate[1, 0]])
    value = jax.jit(lambda numbers: jnp.sum(stationary_poissons(numbers).log_prob(data)))
    h = 1e-3 * np.diag(at)
    hessian = [
        [
            (value(at + a + b) - value(at + a - b) - value(at - a + b) + value(at - a - b))
            / (4 * a.sum() * b.sum())
            for b in h
        ]
        for a in h
    ]
    expected = np.sqrt(np.diag(np.linalg.inv(-np.array(hessian))))
    errors = jaxem.inference.standard_errors(solution, data)
    found = errors["transition"]["matrix"][[0, 1], [1, 0]], errors["emission"]["rate"][:, 0]
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-4)
    # That of the start, by the delta method: δ₀ = P(0|1) / (P(1|0) + P(0|1)).
    way = np.array([-at[1], at[0]]) / (at[0] + at[1]) ** 2
    covariance = np.linalg.inv(-np.array(hessian))[:2, :2]
    np.testing.assert_allclose(errors["initial"], np.sqrt(way @ covariance @ way), rtol=1e-4)


def test_influence_predicts_refits_and_makes_the_sandwich():
    model, data, *_ = CASES["hmm-stationary"]()
    solution = jaxem.fit(model, data, sample_weight=jnp.ones(14), tol=1e-13, throw=False)
    numbers = lambda m: ravel_pytree(named_parameters(m))[0]  # noqa: E731
    influence = jaxem.inference.influence(numbers, solution, data)
    options = dict(tol=1e-13, throw=False)
    h = jnp.zeros(14).at[3].set(1e-4)
    above, below = (
        numbers(jaxem.fit(solution.model, data, sample_weight=1 + s * h, **options).model)
        for s in (1, -1)
    )
    size = float(jnp.max(jnp.abs(influence)))
    np.testing.assert_allclose(influence[:, 3], (above - below) / 2e-4, rtol=0, atol=1e-6 * size)
    robust = jaxem.inference.sandwich(solution, data)
    np.testing.assert_allclose(robust.matrix, influence @ influence.T, rtol=1e-5, atol=1e-9)


def test_a_sequence_that_cannot_be_spoils_no_other():
    """Of weight 0, with a NaN in its first step, beside sequences with steps not observed."""
    model, data, *_ = CASES["hmm-gaussian"]()
    spoilt = eqx.tree_at(lambda d: d.values, data, data.values.at[0, 0].set(jnp.nan))
    spoilt = eqx.tree_at(lambda d: d.observed, spoilt, data.observed.at[0, 0].set(True))
    np.testing.assert_array_equal(model.first_impossible(spoilt), [0] + [-1] * 13)
    np.testing.assert_array_equal(model.in_support(spoilt), [False] + [True] * 13)


def test_the_rate_of_convergence_is_that_of_the_steps():
    model, data, *_ = CASES["hmm-stationary"]()
    solution = jaxem.fit(model, data, tol=1e-13)
    rate = jaxem.inference.convergence_rate(solution, data)
    assert not bool(rate.saddle)
    gaps = []
    for _ in range(25):
        model, *_ = step(model, data)
        gaps.append(float(model.emission.rate[0, 0] - solution.model.emission.rate[0, 0]))
    np.testing.assert_allclose(gaps[-1] / gaps[-2], rate.eigenvalues[0], rtol=1e-3)


# One sequence: its initial distribution runs to a unit vector


def one_sequence():
    rng = np.random.default_rng(3)
    z = np.cumsum(rng.random(120) < 0.15) % 2
    return jnp.asarray(rng.normal(size=(1, 120, 1)) + 3.0 * z[None, :, None])


@functools.cache
def single():
    x = one_sequence()
    model = HMM([0.5, 0.5], STAY, jaxem.emissions.SphericalGaussian([[0.0], [2.0]], [1.0, 1.0]))
    return x, model, jaxem.fit(model, x, tol=1e-12, max_steps=5000)


def test_one_sequence_converges_to_a_unit_vector():
    x, _, solution = single()
    assert solution.result == RESULTS.converged
    np.testing.assert_allclose(jnp.sort(solution.model.initial), [0.0, 1.0], atol=1e-12)
    assert finite((solution.model, solution.history[: solution.num_steps + 1]))
    covariance = jaxem.inference.observed_information(solution, x).covariance()
    assert bool(covariance.proper) and finite(covariance.matrix)
    assert np.all(covariance.undetermined["initial"]) and np.all(
        covariance.standard_errors["initial"] < 1e-6
    )
    rest = {name: value for name, value in covariance.undetermined.items() if name != "initial"}
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(rest))
    # The others are those of a start that is known.
    known = jaxem.freeze(
        HMM(
            jnp.round(solution.model.initial),
            solution.model.transition,
            solution.model.emission,
        ),
        "initial",
    )
    errors = jaxem.inference.standard_errors(known, x)
    for name in ("transition", "emission"):
        close(covariance.standard_errors[name], errors[name], 1e-6)


def test_one_sequence_has_finite_derivatives():
    x, model, _ = single()

    def value(t):
        fitted = jaxem.fit(model, x * (1 + t), tol=1e-12, max_steps=5000, throw=False)
        return jnp.sum(jnp.sin(fitted.model.emission.mean)) + fitted.model.transition.matrix[0, 0]

    both = jax.jit(jax.value_and_grad(value))
    slope = both(jnp.zeros(x.shape))[1]
    assert finite(slope)
    way = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))
    h = 1e-5
    difference = (both(h * way)[0] - both(-h * way)[0]) / (2 * h)
    np.testing.assert_allclose(jnp.vdot(slope, way), difference, rtol=1e-6)


# float32


@pytest.mark.parametrize("family", [jaxem.emissions.Gaussian, jaxem.emissions.SphericalGaussian])
def test_an_offset_costs_no_digits(family):
    """Law 6 at offset 1000: statistics are about the means."""
    x = X + 1000
    start = HMM.init(KEY, x, 2, family)
    cast = lambda tree: jax.tree.map(lambda a: a.astype(jnp.float32), tree)  # noqa: E731
    single = jaxem.fit(cast(start), cast(x))
    double = jaxem.fit(start, cast(x).astype(float))
    assert single.objective.dtype == jnp.float32
    assert single.result == RESULTS.converged and double.result == RESULTS.converged
    assert abs(float(single.objective) - float(double.objective)) / X.size < 1e-4
    for name, ours in named_parameters(single.model)["emission"].items():
        exact = named_parameters(double.model)["emission"][name]
        np.testing.assert_allclose(
            ours, exact, atol=2e-3 * float(jnp.max(jnp.abs(exact))) if name != "mean" else 2e-3
        )
    np.testing.assert_allclose(
        single.model.transition.matrix, double.model.transition.matrix, atol=2e-3
    )


# Devices and blocks


@pytest.mark.parametrize("name", ["hmm-logistic-transition"])
def test_sequences_spread_over_devices(name):
    model, data, *_ = CASES[name]()
    mesh = jax.make_mesh((2,), ("observations",), axis_types=(AxisType.Auto,))
    spread = lambda tree: jax.device_put(tree, NamedSharding(mesh, PartitionSpec("observations")))  # noqa: E731
    sample_weight = jnp.linspace(0, 2, 14)
    options = dict(tol=1e-8, max_steps=30)
    sharded = jaxem.fit(model, spread(data), sample_weight=spread(sample_weight), **options)
    plain = jaxem.fit(model, data, sample_weight=sample_weight, **options)
    assert int(sharded.num_steps) == int(plain.num_steps)
    close(sharded, plain, 1e-9)


@pytest.mark.parametrize("name", ["hmm-left-to-right", "hmm-logistic-transition"])
def test_blocks_of_sequences_give_what_one_block_gives(name, monkeypatch):
    model, data, *_ = CASES[name]()
    data = lane(data, slice(0, 13))  # so that the last block overlaps
    sample_weight = jnp.linspace(0, 2, 13)

    def everything(model, sample_weight):
        def value(model, sample_weight):
            statistics, value = model.e_step(data, sample_weight)
            return value, statistics.sums

        return jax.grad(value, argnums=(0, 1), has_aux=True)(model, sample_weight), model.log_prob(
            data
        )

    whole = jax.jit(lambda *args: everything(*args))(model, sample_weight)
    jax.clear_caches()
    monkeypatch.setattr(
        jaxem._core.blocks, "_BUDGET", {jax.default_backend(): 4 * model.width(data)}
    )
    assert jaxem._core.blocks._blocking(13, model.width(data)) == (4, 4)
    close(jax.jit(lambda *args: everything(*args))(model, sample_weight), whole, 1e-9)
    jax.clear_caches()


# Draws and predictions


def test_draws_have_their_frequencies():
    model = HMM([0.2, 0.8], STAY, jaxem.emissions.Poisson([[1.0], [8.0]]))
    x, z = model.sample(KEY, 4000, 3)
    assert x.shape == (4000, 3, 1) and z.shape == (4000, 3)
    for t in range(3):
        expected = np.array([0.2, 0.8]) @ np.linalg.matrix_power(STAY, t)
        assert abs(np.mean(z[:, t]) - expected[1]) < 0.03
    from_zero = np.asarray(z[:, 1])[np.asarray(z[:, 0]) == 0]
    assert abs(np.mean(from_zero) - STAY[0, 1]) < 0.05
    assert abs(np.mean(x[..., 0][z == 1]) - 8) < 0.15
    one, state = model.sample(KEY, 5, 1)
    assert one.shape == (5, 1, 1) and state.shape == (5, 1)


def test_drawn_paths_follow_the_posterior():
    model, data, *_ = CASES["hmm-gaussian"]()
    draw = jax.jit(jax.vmap(lambda key: model.sample_paths(key, data)))
    paths = np.asarray(draw(jax.random.split(KEY, 2000)))
    within = np.asarray(data.within)
    smoothed = np.asarray(model.responsibilities(data))[..., 1]
    assert np.max(np.abs(np.mean(paths, axis=0) - smoothed)[within]) < 0.06
    ahead = np.asarray(model.forecast(data, 2))[..., 1]  # and beyond the end, the forecast
    for i in np.flatnonzero(LENGTHS < 8):
        n = LENGTHS[i]
        assert np.max(np.abs(np.mean(paths[:, i, n : n + 2], axis=0) - ahead[i])) < 0.06


def test_predictive_densities():
    """log p(xₜ | past) is that of the mixture whose weights are the forecast of the states."""
    model = gaussians()
    increments = model.one_step_log_prob(X)
    for t in (3, 8):
        state = model.forecast(X[:, :t], 1)[:, 0]
        predicted = jax.vmap(lambda p, x: jaxem.Mixture(p, model.emission).log_prob(x[None])[0])(
            state, X[:, t]
        )
        close(increments[:, t], predicted)
    close(increments[:, 0], jaxem.Mixture(model.initial, model.emission).log_prob(X[:, 0]))


def test_predict_is_the_likeliest_state_of_each_step():
    model, data, *_ = CASES["hmm-gaussian"]()
    smoothed = np.asarray(model.responsibilities(data))
    likeliest = np.where(data.within, smoothed.argmax(axis=2), -1)
    np.testing.assert_array_equal(model.predict(data), likeliest)
    close(smoothed.sum(axis=2), np.asarray(data.within, float))


def test_criteria_count_steps():
    """BIC's n is the number of steps that were observed, not of sequences."""
    model, data, *_ = CASES["hmm-gaussian"]()
    p, steps = model.num_free_parameters, np.sum(np.asarray(data.present), axis=1)
    assert p == 1 + 2 + 2 * 2 + 2 * 3
    ll = np.asarray(model.log_prob(data))
    close(jaxem.inference.aic(model, data), -2 * ll.sum() + 2 * p)
    close(jaxem.inference.bic(model, data), -2 * ll.sum() + p * np.log(steps.sum()))
    w = np.linspace(0, 2, 14)
    close(jaxem.inference.bic(model, data, sample_weight=w), -2 * w @ ll + p * np.log(w @ steps))
    close(
        jaxem.inference.bic(gaussians(), X[:1]),
        -2 * gaussians().log_prob(X[:1])[0] + (1 + 2 + 4 + 2) * np.log(9),
    )
    with pytest.raises(ValueError, match="icl is for mixtures"):
        jaxem.inference.icl(model, data)


# Transformations


def test_fits_in_lanes_and_compiled_are_the_fit():
    model, data, *_ = CASES["hmm-stationary"]()
    other = data[::-1] + 1
    options = dict(tol=1e-6, throw=False)
    batch = jax.jit(jax.vmap(lambda x: jaxem.fit(model, x, **options)))(jnp.stack([data, other]))
    for i, x in enumerate((data, other)):
        close(lane(batch, i), jaxem.fit(model, x, **options), 1e-9)


def test_a_second_call_compiles_nothing():
    def everything(i):
        model = gaussians((0.5 + 0.1 * i, 0.5 - 0.1 * i))
        x = X + i
        prior = model.prior(
            initial=2.0 * i, transition=model.transition.prior(2.0 * i, stay=float(i))
        )
        return (
            jaxem.fit(model, x, prior=prior, max_steps=5),
            model.log_prob(x),
            model.viterbi(x),
            model.best_paths(x, 3),
            model.sample_paths(jax.random.key(i), x),
            model.forecast(x, 2),
            model.first_impossible(x),
            HMM.init(jax.random.key(i), x, 2, jaxem.emissions.SphericalGaussian),
            HMM.from_mixture(jaxem.Mixture([0.5, 0.5], model.emission)),
        )

    everything(0)
    assert compilations(lambda: everything(1)) == 0


def test_mixtures_are_chains_without_memory_and_one_state_is_no_chain():
    """K = 1: the likelihood of independent steps, and a fit in closed form."""
    model = HMM([1.0], [[1.0]], jaxem.emissions.Gaussian([[0.0, 0.0]], np.eye(2)[None]))
    solution = jaxem.fit(model, X)
    rows = SEQUENCES.reshape(-1, 2)
    close(solution.model.emission.mean[0], rows.mean(0))
    close(solution.model.emission.covariance[0], np.cov(rows.T, bias=True))
    assert model.num_free_parameters == 5


def test_time_runs_in_parallel_where_the_model_says_so():
    model, data, *_ = CASES["hmm-gaussian"]()
    forms = [
        HMM(model.initial, model.transition, model.emission, parallel=p) for p in (False, True)
    ]
    e_step = eqx.filter_jit(lambda m: m.e_step(data))
    (plain, value), (blocks, other) = (e_step(m) for m in forms)
    np.testing.assert_allclose(value, other, rtol=1e-12)
    close(plain.sums, blocks.sums)
    close(forms[0].responsibilities(data), forms[1].responsibilities(data))
    programs = [str(jax.make_jaxpr(lambda m=m: m.log_prob(data))()) for m in forms]
    assert len(programs[0]) < len(programs[1])  # blocks are not what one chain runs
    with pytest.raises(ValueError, match="parallel must be"):
        HMM(model.initial, model.transition, model.emission, parallel=1)


def test_a_start_that_follows_the_transitions_says_so():
    model = CASES["hmm-stationary"]().model
    assert "initial=[0.6 0.4],  # stationary" in repr(model)
    assert "frozen" in repr(jaxem.freeze(model, "emission.rate"))


def test_second_derivatives_of_a_fit():
    """By weights of sequences: the Hessian is symmetric, and the derivative of the gradient."""
    model, data, *_ = CASES["hmm-categorical"]()
    direction = jnp.asarray(np.random.default_rng(0).normal(size=(2, len(data))))

    def value(t):
        solution = jaxem.fit(
            model, data, sample_weight=1 + t @ direction, tol=1e-12, max_steps=5000
        )
        return jnp.sum(solution.model.transition.matrix[0] * jnp.array([1.0, -2.0]))

    gradient = jax.jit(jax.grad(value))
    hessian = jax.jit(jax.jacfwd(gradient))(jnp.zeros(2))
    step = 1e-4 * jnp.eye(2)
    differences = jnp.stack([(gradient(h) - gradient(-h)) / 2e-4 for h in step])
    np.testing.assert_allclose(hessian, differences, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(hessian, hessian.T, atol=1e-8)
