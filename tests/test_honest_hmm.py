"""Law 7 for sequences: a bad input gets a ValueError that says what to do, or its result."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxem
from jaxem import HMM, RESULTS, Sequences
from jaxem.factors import LogisticTransition, Transition

KEY = jax.random.key(0)
B, T = 4, 20
_rng = np.random.default_rng(0)
_path = np.cumsum(_rng.random((B, T)) < 0.4, axis=1) % 2
X = jnp.asarray(_rng.normal(size=(B, T, 1)) + 3.0 * _path[:, :, None])
FULL_LENGTH = jnp.full(B, T)
SEEN = jnp.ones((B, T), bool)
U = jnp.asarray(_rng.normal(size=(B, T, 1)))
ONES = jnp.ones(B)
HALF = [0.5, 0.5]
STAY = [[0.8, 0.2], [0.3, 0.7]]
NORMALS = jaxem.emissions.SphericalGaussian([[0.0], [3.0]], [1.0, 1.0])
MODEL = HMM(HALF, STAY, NORMALS)
DRIVEN = HMM(HALF, LogisticTransition(STAY, 1), NORMALS)
AHEAD = HMM([0.9, 0.1], Transition.left_to_right(2, 0.8), NORMALS)


class Case(NamedTuple):
    expected: str
    model: Any = MODEL
    x: Any = X
    lengths: Any = FULL_LENGTH
    observed: Any = SEEN
    inputs: Any = None
    sample_weight: Any = ONES
    algorithm: Any = jaxem.EM()

    @property
    def data(self):
        """Without the constructor's checks, as under `jax.jit`, where lengths are not known."""
        whole = Sequences(self.x, FULL_LENGTH, observed=self.observed, inputs=self.inputs)
        return eqx.tree_at(lambda d: d.lengths, whole, self.lengths)


HOLE = SEEN.at[1, 2].set(False)
NAN = X.at[1, 2].set(jnp.nan)
VALUES = {
    "healthy": Case("converged"),
    "a NaN": Case("invalid_data", x=NAN),
    "an infinity": Case("invalid_data", x=X.at[3, 7].set(-jnp.inf)),
    "a NaN that was not observed": Case("converged", x=NAN, observed=HOLE),
    "a NaN beyond the end": Case("converged", x=NAN, lengths=FULL_LENGTH.at[1].set(2)),
    "a NaN of weight 0": Case("converged", x=NAN, sample_weight=ONES.at[1].set(0)),
    "a NaN, and holes elsewhere": Case("invalid_data", x=X.at[0, 0].set(jnp.nan), observed=HOLE),
    "a NaN of weight 0, and holes elsewhere": Case(
        "converged", x=X.at[0, 0].set(jnp.nan), observed=HOLE, sample_weight=ONES.at[0].set(0)
    ),
    "a length of 0": Case("invalid_data", lengths=FULL_LENGTH.at[2].set(0)),
    "a length of 0 and weight 0": Case(
        "converged", lengths=FULL_LENGTH.at[2].set(0), sample_weight=ONES.at[2].set(0)
    ),
    "a negative length": Case("invalid_data", lengths=FULL_LENGTH.at[2].set(-1)),
    "a length beyond the padding": Case("invalid_data", lengths=FULL_LENGTH.at[2].set(T + 1)),
    "nothing but padding": Case("invalid_data", lengths=0 * FULL_LENGTH),
    "a length of 1": Case("converged", lengths=FULL_LENGTH.at[0].set(1)),
    "lengths of 1": Case("degenerate", lengths=0 * FULL_LENGTH + 1),
    "one that was never seen": Case("converged", observed=SEEN.at[0].set(False)),
    "none was ever seen": Case("degenerate", observed=~SEEN),
    "one step was seen": Case("degenerate", observed=~SEEN.at[0, 0].set(False)),
    "all weights 0": Case("invalid_sample_weight", sample_weight=0 * ONES),
    "a negative weight": Case("invalid_sample_weight", sample_weight=ONES.at[0].set(-1)),
    "a NaN weight": Case("invalid_sample_weight", sample_weight=ONES.at[0].set(jnp.nan)),
    "an infinite weight": Case("invalid_sample_weight", sample_weight=ONES.at[0].set(jnp.inf)),
    "all steps equal": Case("degenerate", x=0 * X + 1),
    "squares that overflow": Case("invalid_data", x=1e200 * X),  # a density of zero everywhere
    "a NaN mean": Case("nonfinite", model=jax.tree.map(lambda leaf: leaf * jnp.nan, MODEL)),
    "a start of zero and one": Case("converged", model=HMM([1.0, 0.0], STAY, NORMALS)),
    "a state that is never reached": Case(
        "degenerate", model=HMM([1.0, 0.0], Transition(np.eye(2), np.ones((2, 2))), NORMALS)
    ),
    "absorbing states": Case("converged", model=HMM(HALF, np.eye(2), NORMALS), x=X.at[:2].add(20)),
    "left to right": Case("converged", model=AHEAD),
    "a periodic chain": Case("converged", model=HMM(HALF, [[0.0, 1.0], [1.0, 0.0]], NORMALS)),
    "a periodic stationary chain": Case(
        "converged", model=HMM("stationary", [[0.0, 1.0], [1.0, 0.0]], NORMALS)
    ),
    "an absorbing stationary chain": Case(
        "degenerate", model=HMM("stationary", [[0.5, 0.5], [0.0, 1.0]], NORMALS)
    ),
    "a stationary chain": Case("converged", model=HMM("stationary", STAY, NORMALS)),
    "hard": Case("converged", algorithm=jaxem.EM(jaxem.em.Hard())),
    "hard, a NaN": Case("invalid_data", x=NAN, algorithm=jaxem.EM(jaxem.em.Hard())),
    "inputs": Case("converged", model=DRIVEN, inputs=U),
    "a NaN input": Case("invalid_data", model=DRIVEN, inputs=U.at[1, 2].set(jnp.nan)),
    "an infinite input": Case("invalid_data", model=DRIVEN, inputs=U.at[1, 2].set(jnp.inf)),
    "a NaN input into the first step": Case(
        "converged", model=DRIVEN, inputs=U.at[1, 0].set(jnp.nan)
    ),
    "a NaN input beyond the end": Case(
        "converged",
        model=DRIVEN,
        inputs=U.at[1, 5:].set(jnp.nan),
        lengths=FULL_LENGTH.at[1].set(5),
    ),
    "a NaN input of weight 0": Case(
        "converged", model=DRIVEN, inputs=U.at[1, 2].set(jnp.nan), sample_weight=ONES.at[1].set(0)
    ),
    "a constant input": Case("converged", model=DRIVEN, inputs=0 * U + 2),
}


@eqx.filter_jit
def compiled(case):
    data = case.data
    options = dict(sample_weight=case.sample_weight, tol=1e-5, max_steps=3000, throw=False)
    solution = jaxem.fit(case.model, data, case.algorithm, **options)
    return solution, case.model.first_impossible(data)


@eqx.filter_jit
def lanes(cases, algorithm):
    return jax.vmap(lambda c: compiled(c._replace(algorithm=algorithm))[0])(cases)


def arrays(case):
    return case._replace(expected=None, algorithm=None)


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    """Compiled, and side by side with a good neighbour."""
    case = VALUES[name]
    solution, impossible = compiled(case._replace(expected=None))
    assert solution.status == case.expected
    good = VALUES["inputs" if case.inputs is not None else "healthy"]._replace(model=case.model)
    pair = jax.tree.map(lambda *leaves: jnp.stack(leaves), arrays(case), arrays(good))
    together = lanes(pair, case.algorithm).status
    alone = compiled(arrays(good)._replace(algorithm=case.algorithm))[0].status
    assert list(together) == [case.expected, alone]
    leaves = jax.tree.leaves((solution.model, solution.objective))
    if case.expected in ("converged", "degenerate", "max_steps_reached"):
        assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in leaves)
    wrong = np.asarray(impossible) >= 0
    assert np.any(wrong & np.asarray(case.sample_weight != 0)) == (
        case.expected == "invalid_data"
    ) or (case.expected == "nonfinite")


def test_eager_fits_say_the_same():
    for name in ("a NaN", "a length of 0", "healthy"):
        case = VALUES[name]
        solution = jaxem.fit(case.model, case.data, sample_weight=case.sample_weight, throw=False)
        assert solution.status == case.expected


# Steps that cannot be


class Bounded(jaxem.emissions.Poisson):
    """Counts below 4 in the first state, from 4 on in the second: a density that is zero."""

    def log_prob(self, x, tilt):
        low = x[:, :1] < 4
        possible = jnp.concatenate([low, ~low], axis=1)
        return jnp.where(possible, jaxem.emissions.Poisson.log_prob(self, x, tilt), -jnp.inf)


ORDERED = HMM([0.5, 0.5], Transition.left_to_right(2), Bounded([[2.0], [6.0]]))
STEPS = jnp.asarray([[1, 2, 5, 6], [1, 5, 2, 6], [5, 6, 6, 1], [2, 2, 2, 2], [7, 5, -1, 5]])
POSSIBLE = [-1, 2, 3, -1, 2]


def test_impossible_steps_are_named():
    data = STEPS[:, :, None]
    np.testing.assert_array_equal(ORDERED.first_impossible(data), POSSIBLE)
    np.testing.assert_array_equal(ORDERED.in_support(data), np.array(POSSIBLE) < 0)
    log_prob = np.asarray(ORDERED.log_prob(data[:4]))
    assert np.all(np.isfinite(log_prob) == (np.array(POSSIBLE[:4]) < 0))
    assert np.all(log_prob[1:3] == -np.inf)
    with pytest.raises(
        eqx.EquinoxRuntimeError, match=r"model.first_impossible\(data\) gives the step"
    ):
        jaxem.fit(ORDERED, data)
    sample_weight = (jnp.asarray(POSSIBLE) < 0).astype(float)
    solution = jaxem.fit(ORDERED, data, sample_weight=sample_weight)
    assert solution.result == RESULTS.converged
    np.testing.assert_allclose(solution.model.emission.rate[:, 0], [11 / 6, 11 / 2], rtol=1e-12)
    slope = jax.grad(lambda w: ORDERED.e_step(data, w)[1])(sample_weight)
    assert np.all(np.isfinite(slope))


def test_an_impossible_step_that_was_not_observed_is_none():
    """Nor one beyond the end; what is impossible after it is found."""
    data = Sequences(
        STEPS[1:3, :, None], [4, 3], observed=jnp.ones((2, 4), bool).at[0, 2].set(False)
    )
    np.testing.assert_array_equal(ORDERED.first_impossible(data), [-1, -1])
    late = Sequences(jnp.asarray([[5, 1, 5, 1]])[:, :, None], observed=[[True, False, True, True]])
    np.testing.assert_array_equal(ORDERED.first_impossible(late), [3])


def test_zeros_of_families_are_floored_not_impossible():
    """A category of probability 0 is possible at 1e-308, and EM finds its share."""
    model = HMM(HALF, STAY, jaxem.emissions.Categorical([[[1.0, 0.0]], [[0.5, 0.5]]]))
    never = HMM(HALF, STAY, jaxem.emissions.Categorical([[[1.0, 0.0]], [[1.0, 0.0]]]))
    codes = jnp.asarray([[0, 0, 1, 0, 1, 1, 0, 0]])[:, :, None]
    assert never.first_impossible(codes)[0] == -1
    for start in (model, never):
        assert jaxem.fit(start, codes, max_steps=3000).result == RESULTS.converged


# What is refused


def _fit(model, x, **options):
    return jaxem.fit(model, x, throw=False, max_steps=2, **options)


@functools.cache
def plain(**options):
    return functools.partial(_fit, MODEL, **options)


def driven(**options):
    return lambda x: _fit(DRIVEN, Sequences(x, **options))


def init(**options):
    return lambda x: HMM.init(
        KEY, x, **{"num_states": 2, "family": jaxem.emissions.Gaussian, **options}
    )


# (what is run, on what, what its ValueError says): eagerly and under jit
REFUSED = {
    "one axis": (plain(), X[0, :, 0], r"\(b, t, …\), got \(20,\).*x\[None\]"),
    "one sequence": (plain(), X[0], r"\(b, t, …\), got \(20, 1\).*x\[None\]"),
    "a list of sequences": (plain(), [X[0], X[1, :3]], "from_list"),
    "another number of features": (plain(), jnp.ones((B, T, 2)), "1"),
    "integers": (plain(), X.astype(int), "continuous family.*int64"),
    "another precision": (plain(), X.astype(jnp.float32), r"float64.*float32"),
    "floats for categories": (
        functools.partial(_fit, HMM(HALF, STAY, jaxem.emissions.Categorical([[HALF], [HALF]]))),
        X,
        "integer codes",
    ),
    "no step": (plain(), X[:, :0], "no step: 4 sequences of 0 steps"),
    "no sequence": (plain(), X[:0], "no step: 0 sequences"),
    "weights for steps": (lambda x: _fit(MODEL, x, sample_weight=jnp.ones((B, T))), X, r"\(4,\)"),
    "weights for another batch": (
        lambda x: _fit(MODEL, x, sample_weight=jnp.ones(3)),
        X,
        r"\(4,\)",
    ),
    "complex weights": (lambda x: _fit(MODEL, x, sample_weight=ONES.astype(complex)), X, "weight"),
    "superfluous inputs": (lambda x: _fit(MODEL, Sequences(x, inputs=U)), X, "takes none"),
    "no inputs": (lambda x: _fit(DRIVEN, x), X, r"needs inputs of shape \(b, t, 1\), got none"),
    "wide inputs": (driven(inputs=jnp.ones((B, T, 2))), X, r"\(b, t, 1\), got shape \(4, 20, 2\)"),
    "flat inputs": (driven(inputs=jnp.ones((B, T))), X, r"expected \(4, 20, p\)"),
    "short inputs": (driven(inputs=U[:, :-1]), X, r"expected \(4, 20, p\)"),
    "fractional lengths": (lambda x: Sequences(x, ONES), X, "one integer for each of 4"),
    "too few lengths": (lambda x: Sequences(x, FULL_LENGTH[:3]), X, "one integer for each of 4"),
    "one length for all": (lambda x: Sequences(x, 20), X, "one integer for each of 4"),
    "lengths that are flags": (lambda x: Sequences(x, ONES > 0), X, "one integer"),
    "a mask of numbers": (lambda x: Sequences(x, observed=ONES), X, "booleans"),
    "a mask for sequences": (lambda x: Sequences(x, observed=ONES > 0), X, r"\(4, 20\)"),
    "leaves of other lengths": (lambda x: Sequences((x, x[:, :3])), X, "disagree"),
    "more states than steps": (
        init(num_states=81),
        X,
        "81 components cannot start from 80 observations",
    ),
    "a start from a list": (init(), [X[0]], "from_list"),
    "a start for integers": (init(), X.astype(int), "continuous family"),
    "a start by another method": (init(method="kmeans"), X, "k-means"),
    "weights of a start for steps": (init(sample_weight=jnp.ones(B * T)), X, r"\(4,\)"),
    "a forecast of inputs": (lambda x: DRIVEN.forecast(Sequences(x, inputs=U), 2), X, "not known"),
    "no path": (lambda x: MODEL.best_paths(x, 0), X, "integer ≥ 1, got 0"),
    "a batch of models": (
        lambda x: _fit(jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), MODEL), x),
        X,
        "fit_restarts|jax.vmap",
    ),
    "a prior of the transition": (
        lambda x: _fit(MODEL, x, prior=MODEL.transition.prior(2.0)),
        X,
        "prior does not belong",
    ),
    "a prior of the emission as transition": (
        lambda x: _fit(MODEL, x, prior=MODEL.prior(transition=NORMALS.prior())),
        X,
        "prior does not belong",
    ),
    "a prior of a mixture": (
        lambda x: _fit(MODEL, x, prior=jaxem.Mixture(HALF, NORMALS).prior()),
        X,
        "prior does not belong",
    ),
    "icl": (lambda x: jaxem.inference.icl(MODEL, x), X, "icl is for mixtures"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    run, data, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        run(data)
    with pytest.raises(ValueError, match=message):
        eqx.filter_jit(run)(data)


def logistic(baseline, coefficients):
    return lambda: LogisticTransition(baseline, coefficients)


# Values that are known when a constructor, `freeze`, `prior` or a draw is called
CONSTRUCTORS = {
    "rows that sum to 1.1": (lambda: Transition([[0.6, 0.5], HALF]), "sum to 1"),
    "a negative transition": (lambda: Transition([[1.5, -0.5], HALF]), "non-negative"),
    "a NaN transition": (lambda: Transition([[np.nan, 1.0], HALF]), "non-negative"),
    "a single row": (lambda: Transition([HALF]), r"shape \(1, 2\)"),
    "a number for a matrix": (lambda: Transition(0.5), r"shape \(\)"),
    "a mask of another shape": (lambda: Transition(STAY, mask=[True, True]), r"\(2, 2\)"),
    "a mask that contradicts": (
        lambda: Transition(STAY, mask=[[True, False], [True, True]]),
        "positive where mask forbids",
    ),
    "labels for some rows": (lambda: Transition(STAY, tied=[0]), "one label for each of 2"),
    "one label": (lambda: Transition(STAY, tied=1), "one label for each of 2"),
    "tied rows that differ": (lambda: Transition(STAY, tied=[0, 0]), "tied must be equal"),
    "tied rows of other zeros": (
        lambda: Transition([[1.0, 0.0]] * 2, [[True, False], [True, True]], tied=[0, 0]),
        "same transitions",
    ),
    "to stay too much": (lambda: Transition.sticky(2, 1.5), "non-negative"),
    "no state": (lambda: Transition.sticky(0), "shape"),
    "a driven matrix of one number": (logistic(0.5, 1), r"baseline has shape \(\)"),
    "a driven matrix that is none": (logistic([[0.5, 0.6], HALF], 1), "sum to 1"),
    "coefficients without inputs": (logistic(STAY, 0), r"\(2, 2, p\)"),
    "coefficients of another shape": (logistic(STAY, np.ones((2, 3, 1))), r"\(2, 2, p\)"),
    "a start that sums to 1.1": (lambda: HMM([0.5, 0.6], STAY, NORMALS), "sum to 1"),
    "a start of three": (lambda: HMM([0.2, 0.3, 0.5], STAY, NORMALS), r"expected \(2,\)"),
    "a start in other words": (lambda: HMM("stationery", STAY, NORMALS), '"stationary"'),
    "three states for two": (lambda: HMM(HALF, np.eye(3), NORMALS), "3 states.*2 components"),
    "no emission": (lambda: HMM(HALF, STAY, "Gaussian"), "must be an emission, got str"),
    "a mixture's emission": (
        lambda: HMM(HALF, STAY, jaxem.Mixture(HALF, NORMALS)),
        "must be an emission, got Mixture",
    ),
    "a stationary driven chain": (
        lambda: HMM("stationary", LogisticTransition(STAY, 1), NORMALS),
        "no stationary distribution",
    ),
    "a stationary chain in two": (
        lambda: HMM("stationary", np.eye(2), NORMALS),
        "one stationary distribution.*give initial",
    ),
    "lengths beyond the steps": (
        lambda: Sequences(X, [20, 21, 20, 20]),
        "between 0 and the 20 steps",
    ),
    "negative lengths": (lambda: Sequences(X, [8, -1, 8, 8]), "between 0 and the 20 steps"),
    "an empty list": (lambda: Sequences.from_list([]), "one entry for each sequence"),
    "an array for a list": (lambda: Sequences.from_list(X), r"write Sequences\(values\)"),
    "an empty sequence": (lambda: Sequences.from_list([X[0], X[1, :0]]), "sequence 1 is empty"),
    "a sequence too long": (
        lambda: Sequences.from_list([X[0]], num_steps=3),
        "20 steps, more than",
    ),
    "steps of two shapes": (
        lambda: Sequences.from_list([X[0], jnp.ones((3, 2))]),
        "one shape",
    ),
    "numbers for sequences": (lambda: Sequences.from_list([1.0, 2.0]), r"\(t, …\)"),
    "steps without features": (lambda: Sequences.from_list([X[0, :, 0]]), r"\(b, t, …\)"),
    "too few masks": (lambda: Sequences.from_list([X[0], X[1]], observed=[SEEN[0]]), "each step"),
    "masks too long": (
        lambda: Sequences.from_list([X[0], X[1, :3]], observed=[SEEN[0], SEEN[1]]),
        "each step of each sequence",
    ),
    "inputs too short": (
        lambda: Sequences.from_list([X[0], X[1]], inputs=[U[0], U[1, :3]]),
        "each step of each sequence",
    ),
    "neither lengths nor starts": (lambda: Sequences.split(X[0]), "either the lengths"),
    "lengths of another sum": (lambda: Sequences.split(X[0], [3, 4]), "sum to the 20 steps"),
    "a length of nothing": (lambda: Sequences.split(X[0], [20, 0]), "positive integers"),
    "lengths that are not whole": (lambda: Sequences.split(X[0], [10.0, 10.0]), "integers"),
    "a start in the middle": (
        lambda: Sequences.split(X[0], starts=np.arange(20) == 1),
        "the first of them True",
    ),
    "freezing a transition": (lambda: jaxem.freeze(MODEL, "transitions"), "parameter"),
    "freezing three rows": (
        lambda: jaxem.freeze(MODEL, "transition.matrix", mask=[True] * 3),
        "3 entries; expected one for each component or state",
    ),
    "freezing a tied row": (
        lambda: jaxem.freeze(Transition([HALF, HALF], tied=[0, 0]), "matrix", mask=[True]),
        "shared takes no mask",
    ),
    "a negative count": (lambda: MODEL.transition.prior(-0.5), "count must not"),
    "three counts": (lambda: MODEL.transition.prior(np.ones(3)), "broadcasts"),
    "fewer than none that stay": (lambda: MODEL.transition.prior(stay=-1.0), "stay must not"),
    "a prior of what is impossible": (
        lambda: AHEAD.transition.prior(1.0, [HALF, HALF]),
        "where the transition is impossible",
    ),
    "a start's negative count": (lambda: MODEL.prior(initial=-0.5), "initial must not"),
    "counts of each value and shares": (
        lambda: jaxem.factors.Simplex(HALF).prior([1.0, 2.0], HALF),
        "beside a probability",
    ),
    "a prior of no factor": (lambda: MODEL.prior(weights=1.0), "no factor of HMM"),
    "a number for a transition": (lambda: MODEL.prior(transition=1.0), "model.transition.prior"),
    "a negative precision": (lambda: DRIVEN.transition.prior(precision=-1.0), "precision"),
    "a draw of no step": (lambda: MODEL.sample(KEY, 2, 0), "1 or more steps"),
    "a draw without inputs": (lambda: DRIVEN.sample(KEY, B, T), "needs inputs"),
    "a draw of other inputs": (lambda: DRIVEN.sample(KEY, B, 3, U), r"expected \(4, 3, p\)"),
    "a start that stays too much": (lambda: init(stay=1.5)(X), "non-negative"),
    "a start from components": (lambda: HMM.from_mixture(NORMALS), "expects a Mixture"),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_refuse(name):
    call, message = CONSTRUCTORS[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_the_tables_are_long():
    assert len(VALUES) + len(REFUSED) + len(CONSTRUCTORS) >= 120
