"""Law 7: a bad input gets a ValueError or its result, the same eagerly, under jit and vmap."""

import functools
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxem
from jaxem import EM, RESULTS, Mixture
from jaxem.em import Hard, Problem

N = 16
KEY = jax.random.key(0)
_rng = np.random.default_rng(0)
X = jnp.asarray(np.r_[_rng.normal(-2, 1, (8, 2)), _rng.normal(2, 1, (8, 2))])
COUNTS = jnp.asarray(np.r_[_rng.poisson(2, (8, 2)), _rng.poisson(9, (8, 2))], float)
BITS = (COUNTS > 4).astype(float)
CODES = jnp.asarray(_rng.integers(0, 3, (N, 2)))
TIMES = jnp.asarray(_rng.exponential(1, (N, 2)))
ONES = jnp.ones(N)
HALF = jnp.full(2, 0.5)
MEANS = jnp.array([[-1.0, -1.0], [1.0, 1.0]])
EYES = jnp.broadcast_to(jnp.eye(2), (2, 2, 2))


def _e_step(params, x, sample_weight):
    gap = x[:, 0] - params
    return (sample_weight @ x[:, 0], jnp.sum(sample_weight)), -0.5 * sample_weight @ gap**2


def _m_step(sums):
    return sums[0] / sums[1]


def _m_step_off(sums):
    return sums[0] / sums[1] + 5


def _m_step_nan(sums):
    return sums[0] * jnp.nan


GAUSSIANS = {
    "full": lambda mean: jaxem.emissions.Gaussian(mean, EYES),
    "tied": lambda mean: jaxem.emissions.TiedGaussian(mean, jnp.eye(2)),
    "diagonal": lambda mean: jaxem.emissions.DiagonalGaussian(mean, jnp.ones((2, 2))),
    "spherical": lambda mean: jaxem.emissions.SphericalGaussian(mean, jnp.ones(2)),
    "one sphere": lambda mean: jaxem.emissions.SphericalGaussian(mean, jnp.array(1.0)),
}
FAMILIES = {
    "full": jaxem.emissions.Gaussian,
    "tied": jaxem.emissions.TiedGaussian,
    "diagonal": jaxem.emissions.DiagonalGaussian,
    "spherical": jaxem.emissions.SphericalGaussian,
    "one sphere": functools.partial(jaxem.emissions.SphericalGaussian, tied=True),
}
INDEPENDENT = jaxem.emissions.Independent(
    (
        jaxem.emissions.Gaussian(MEANS, EYES),
        jaxem.emissions.Poisson(jnp.array([[2.0, 2.0], [8.0, 8.0]])),
        jaxem.emissions.Bernoulli(jnp.array([[0.3, 0.4], [0.6, 0.7]])),
        jaxem.emissions.Categorical(jnp.array([[[0.2, 0.3, 0.5]] * 2, [[0.5, 0.3, 0.2]] * 2])),
    )
)
HEALTHY = {
    **{name: (Mixture(HALF, make(MEANS)), X) for name, make in GAUSSIANS.items()},
    "poisson": (Mixture(HALF, INDEPENDENT.parts[1]), COUNTS),
    "bernoulli": (Mixture(HALF, INDEPENDENT.parts[2]), BITS),
    "categorical": (Mixture(HALF, INDEPENDENT.parts[3]), CODES),
    "multinomial": (
        Mixture(HALF, jaxem.emissions.Multinomial(jnp.array([[0.3, 0.7], [0.6, 0.4]]))),
        COUNTS,
    ),
    "exponential": (
        Mixture(HALF, jaxem.emissions.Exponential(jnp.array([[1.0, 2.0], [0.1, 0.3]]))),
        TIMES,
    ),
    "independent": (Mixture(HALF, INDEPENDENT), (X, COUNTS, BITS, CODES)),
    "functions": (jaxem.from_functions(_e_step, _m_step, jnp.array(0.0)), X),
}


class Case(NamedTuple):
    model: Any
    data: Any
    sample_weight: Any
    expected: str
    options: Any = {}


def _first(data, value):
    """The data with the first number of the first floating leaf replaced."""
    if isinstance(data, tuple):
        return (_first(data[0], value), *data[1:])
    return data.at[0, 0].set(value)


def _weighted(case: Case, sample_weight, expected) -> Case:
    return case._replace(sample_weight=sample_weight, expected=expected)


VALUES: dict[str, Case] = {}

for _name, (_model, _data) in HEALTHY.items():
    _case = Case(_model, _data, ONES, "converged")
    VALUES[f"{_name}: healthy"] = _case
    VALUES[f"{_name}: all weights 0"] = _weighted(_case, 0 * ONES, "invalid_sample_weight")
    VALUES[f"{_name}: a negative weight"] = _weighted(
        _case, ONES.at[3].set(-1), "invalid_sample_weight"
    )
    VALUES[f"{_name}: a NaN weight"] = _weighted(
        _case, ONES.at[3].set(jnp.nan), "invalid_sample_weight"
    )
    VALUES[f"{_name}: an infinite weight"] = _weighted(
        _case, ONES.at[3].set(jnp.inf), "invalid_sample_weight"
    )
    if _name == "categorical":
        continue
    for _what, _value in (("a NaN", jnp.nan), ("an inf", jnp.inf), ("a −inf", -jnp.inf)):
        _bad = _case._replace(data=_first(_data, _value))
        VALUES[f"{_name}: {_what}"] = _bad._replace(expected="invalid_data")
    # The general e_step of plain functions cannot leave an observation out; see ABSENT for the
    # others.

for _name in GAUSSIANS:
    _case = Case(*HEALTHY[_name], ONES, "converged")
    _model = _case.model
    _round = _name in ("spherical", "one sphere")
    _line = "converged" if _round else "degenerate"
    VALUES |= {
        f"{_name}: a column of 3": _case._replace(data=X.at[:, 1].set(3), expected=_line),
        f"{_name}: a column of 0": _case._replace(data=X.at[:, 1].set(0), expected=_line),
        f"{_name}: all points equal": _case._replace(data=jnp.ones((N, 2)), expected="degenerate"),
        f"{_name}: every point twice": _case._replace(data=jnp.repeat(X[::2], 2, axis=0)),
        f"{_name}: one observation present": _weighted(
            _case, jnp.zeros(N).at[2].set(1), "degenerate"
        ),
        f"{_name}: weights 1e300": _weighted(_case, 1e300 * ONES, "converged"),
        f"{_name}: weights 1e-300": _weighted(_case, 1e-300 * ONES, "converged"),
        f"{_name}: a component that dies": _case._replace(
            model=Mixture(HALF, GAUSSIANS[_name](MEANS.at[1].set(1e6))), expected="degenerate"
        ),
        f"{_name}: a component of weight 0": _case._replace(
            model=Mixture(jnp.array([1.0, 0.0]), _model.components), expected="degenerate"
        ),
        f"{_name}: hard, a component that dies": _case._replace(
            model=Mixture(HALF, GAUSSIANS[_name](MEANS.at[1].set(1e6))),
            expected="degenerate",
            options={"algorithm": EM(Hard())},
        ),
        f"{_name}: data far smaller than the start's scale": _case._replace(data=1e-30 * X),
        f"{_name}: data whose squares overflow": _case._replace(
            data=1e200 * X, expected="nonfinite"
        ),
        f"{_name}: no step": _case._replace(expected="max_steps_reached", options={"max_steps": 0}),
        f"{_name}: tol 0": _case._replace(
            expected="max_steps_reached", options={"tol": 0.0, "max_steps": 3}
        ),
        f"{_name}: a NaN mean": _case._replace(
            model=jax.tree.map(lambda leaf: leaf * jnp.nan, _model), expected="nonfinite"
        ),
    }

for _name, _column, _result in (
    ("poisson", COUNTS.at[:, 0].set(0), "converged"),
    ("multinomial", COUNTS.at[:, 0].set(0), "converged"),
    ("bernoulli", BITS.at[:, 0].set(1), "converged"),
    ("categorical", CODES.at[:, 0].set(2), "converged"),
    ("exponential", TIMES.at[:, 0].set(0), "degenerate"),
):
    _case = Case(HEALTHY[_name][0], _column, ONES, _result)
    VALUES[f"{_name}: a column at the boundary"] = _case

for _name, _value in (
    ("poisson", -1.0),
    ("poisson", 0.5),
    ("multinomial", -1.0),
    ("multinomial", 0.5),
    ("bernoulli", 2.0),
    ("bernoulli", 0.5),
    ("categorical", 3),
    ("categorical", -1),
    ("exponential", -1.0),
):
    _model, _data = HEALTHY[_name]
    VALUES[f"{_name}: a value of {_value}"] = Case(
        _model, _first(_data, _value), ONES, "invalid_data"
    )

VALUES |= {
    "multinomial: an observation without counts": Case(
        HEALTHY["multinomial"][0], COUNTS.at[0].set(0), ONES, "converged"
    ),
    "multinomial: no counts at all": Case(HEALTHY["multinomial"][0], 0 * COUNTS, ONES, "converged"),
    "independent: a negative count": Case(
        HEALTHY["independent"][0], (X, COUNTS.at[0, 0].set(-1), BITS, CODES), ONES, "invalid_data"
    ),
    "functions: an M-step that lowers the objective": Case(
        jaxem.from_functions(_e_step, _m_step_off, jnp.mean(X[:, 0])), X, ONES, "decreased"
    ),
    "functions: an M-step that returns NaN": Case(
        jaxem.from_functions(_e_step, _m_step_nan, jnp.array(0.0)), X, ONES, "nonfinite"
    ),
    "functions: a NaN start": Case(
        jaxem.from_functions(_e_step, _m_step, jnp.array(jnp.nan)), X, ONES, "nonfinite"
    ),
    "full: frozen covariance on a constant column": Case(
        jaxem.freeze(HEALTHY["full"][0], "components.covariance"),
        X.at[:, 1].set(0),
        ONES,
        "converged",
    ),
    "full: a prior on a constant column": Case(
        HEALTHY["full"][0],
        X.at[:, 1].set(0),
        ONES,
        "converged",
        {
            "prior": HEALTHY["full"][0].prior(
                components=jaxem.emissions.Gaussian(MEANS, EYES).prior(
                    {"covariance": 6.0}, covariance=jnp.eye(2)
                )
            )
        },
    ),
    "full: a prior with a NaN": Case(
        HEALTHY["full"][0],
        X,
        ONES,
        "nonfinite",
        {"prior": jax.tree.map(lambda leaf: leaf * jnp.nan, HEALTHY["full"][0].prior())},
    ),
}


@eqx.filter_jit
def _start(data, family):
    return Mixture.init(KEY, data, 2, family)


def _scaled(name: str, scale: float, dtype: Any, expected: str) -> Case:
    data = jnp.asarray(scale * X, dtype)
    return Case(_start(data, FAMILIES[name]), data, ONES.astype(dtype), expected)


SCALES = [
    (name, scale, dtype, expected)
    for name in FAMILIES
    for scale, dtype, expected in (
        (1e30, jnp.float64, "converged"),
        (1e-30, jnp.float64, "converged"),
        (1e15, jnp.float32, "converged"),
        (1e-15, jnp.float32, "converged"),
        (1e30, jnp.float32, "nonfinite"),  # a variance of 1e60
        (1e-30, jnp.float32, "degenerate"),  # a variance of 1e-60
        (1e200, jnp.float64, "nonfinite"),
        (1e-200, jnp.float64, "degenerate"),
    )
]


def _fit(inputs, options):
    model, data, sample_weight = inputs
    return jaxem.fit(model, data, sample_weight=sample_weight, throw=False, **options)


@eqx.filter_jit
def _compiled(inputs, options):
    """A solution, and the state of the algorithm at its model."""
    solution = _fit(inputs, options)
    _, data, sample_weight = inputs
    algorithm, prior = options.get("algorithm", EM()), options.get("prior")
    return solution, algorithm.init(solution.model, Problem(data, sample_weight, prior))


@eqx.filter_jit
def _lanes(inputs, options):
    return jax.vmap(lambda lane: _fit(lane, options))(inputs)


def _stack(*trees):
    return jax.tree.map(lambda *leaves: jax.device_put(np.stack(leaves)), *trees)


def _finite(tree) -> bool:
    return all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(tree))


def _close(a, b, rtol):
    jax.tree.map(lambda u, v: np.testing.assert_allclose(u, v, rtol=rtol, atol=rtol), a, b)


def _invariants(case: Case, solution, again):
    """What holds of every solution, whatever its result."""
    result, steps = solution.status, int(solution.num_steps)
    assert solution.history.shape[0] > steps
    reached, rest = np.split(np.asarray(solution.history), [steps + 1])
    assert np.all(np.isnan(rest))
    if result in ("converged", "max_steps_reached", "degenerate"):
        parts = solution.model, solution.statistics, solution.objective, solution.log_likelihood
        assert _finite(parts), "not finite, yet called well"
    if _finite(case.model):
        assert _finite(solution.model)
    if _finite(reached[0]):
        assert _finite(reached)
        np.testing.assert_allclose(solution.objective, reached[-1], rtol=1e-6)
        _close(again.objective, solution.objective, 1e-6)
        sums = jax.tree.map(np.asarray, (again.statistics.sums, solution.statistics.sums))
        scale = 1 + max(np.max(np.abs(leaf)) for leaf in jax.tree.leaves(sums[0]))
        gaps = jax.tree.map(lambda u, v: np.max(np.abs((u - v) / scale)), *sums)
        assert np.max(jax.tree.leaves(gaps)) < 1e-4


def _same_everywhere(case: Case, healthy):
    inputs = case.model, case.data, case.sample_weight
    eager = _fit(inputs, case.options)
    compiled, again = _compiled(inputs, case.options)
    lanes = _lanes(_stack(inputs, healthy), case.options)
    lanes = jax.tree.map(np.asarray, lanes)
    lane, neighbour = (jax.tree.map(lambda leaf, i=i: leaf[i], lanes) for i in (0, 1))
    ended = [s.status for s in (eager, compiled, lane)]
    assert ended == [case.expected] * 3
    _invariants(case, compiled, again)
    alone, _ = _compiled(healthy, case.options)
    assert neighbour.status == alone.status
    # Equal shapes still compile to another order of sums; nothing larger may pass over.
    rtol = 1e-6 if alone.objective.dtype == jnp.float64 else 1e-4
    _close((neighbour.model, neighbour.objective), (alone.model, alone.objective), rtol)


@pytest.mark.parametrize("name", VALUES)
def test_values(name):
    case = VALUES[name]
    family = name.split(":")[0]
    model, data = HEALTHY[family]
    if jax.tree.structure(model) != jax.tree.structure(case.model):
        # Frozen leaves and other functions are other structures: the case's own start, good data.
        model = case.model
    _same_everywhere(case, (model, data, ONES))


@pytest.mark.parametrize(("name", "scale", "dtype", "expected"), SCALES)
def test_scales(name, scale, dtype, expected):
    case = _scaled(name, scale, dtype, expected)
    good = _scaled(name, 1.0, dtype, "converged")
    _same_everywhere(case, (good.model, good.data, good.sample_weight))


def test_the_tables_are_long():
    assert len(VALUES) + len(SCALES) >= 100
    assert len(REFUSED) >= 50


ABSENT = sorted(set(HEALTHY) - {"functions"})


@pytest.mark.parametrize("name", ABSENT)
def test_weight_0_equals_absence(name):
    model, data = HEALTHY[name]
    rubbish = jax.tree.map(
        lambda leaf: leaf.at[:3].set(-7 if leaf.dtype == CODES.dtype else jnp.nan), data
    )
    holed, _ = _compiled((model, rubbish, ONES.at[:3].set(0)), {})
    without, _ = _compiled((model, jax.tree.map(lambda leaf: leaf[3:], data), ONES[3:]), {})
    assert holed.status == without.status == "converged"
    _close(holed.model, without.model, 1e-8)
    np.testing.assert_allclose(holed.objective, without.objective, rtol=1e-12)
    _close(holed.statistics.sums, without.statistics.sums, 1e-8)


@pytest.mark.parametrize("name", ABSENT)
def test_a_start_ignores_absent_units(name):
    _, data = HEALTHY[name]
    families = (
        jaxem.emissions.Gaussian,
        jaxem.emissions.Poisson,
        jaxem.emissions.Bernoulli,
        functools.partial(jaxem.emissions.Categorical, num_categories=3),
    )
    family = {
        **FAMILIES,
        "poisson": families[1],
        "bernoulli": families[2],
        "categorical": families[3],
        "multinomial": jaxem.emissions.Multinomial,
        "exponential": jaxem.emissions.Exponential,
        "independent": functools.partial(jaxem.emissions.Independent, families=families),
    }[name]
    rubbish = jax.tree.map(
        lambda leaf: leaf.at[:3].set(-7 if leaf.dtype == CODES.dtype else jnp.nan), data
    )
    model = Mixture.init(KEY, rubbish, 2, family, sample_weight=ONES.at[:3].set(0))
    assert _finite(model)


def _nan_later(sums):
    """Good for one step from 5, then NaN."""
    mean = 0.5 * (sums[0] / sums[1] + sums[2])
    return jnp.where(jnp.abs(mean - sums[0] / sums[1]) < 1.5, jnp.nan, mean)


def _e_step_with_params(params, x, sample_weight):
    sums, value = _e_step(params, x, sample_weight)
    return (*sums, params), value


def test_the_state_before_a_failing_step_is_returned_whole():
    start = jaxem.from_functions(_e_step_with_params, _nan_later, jnp.mean(X[:, 0]) + 5.0)
    solution = jaxem.fit(start, X, sample_weight=ONES, throw=False)
    assert solution.status == "nonfinite"
    assert int(solution.num_steps) == 1
    assert _finite((solution.model, solution.history[:2], solution.statistics))
    statistics, objective = solution.model.e_step(X, ONES)
    np.testing.assert_allclose(solution.model.params, jnp.mean(X[:, 0]) + 2.5, rtol=1e-12)
    np.testing.assert_allclose(solution.objective, objective, rtol=1e-12)
    np.testing.assert_allclose(solution.history[1], objective, rtol=1e-12)
    _close(solution.statistics.sums, statistics.sums, 1e-12)


def test_more_components_than_units():
    four = jnp.linspace(-1, 1, 4)[:, None] * jnp.ones(2)
    model = Mixture(jnp.full(4, 0.25), jaxem.emissions.SphericalGaussian(four, jnp.ones(4)))
    solution = jaxem.fit(model, X[:2])
    assert solution.status == "degenerate"


@pytest.mark.parametrize("data", [jnp.ones((N, 2)), jnp.zeros((N, 2)), jnp.repeat(X[:2], 8, 0)])
@pytest.mark.parametrize("name", FAMILIES)
def test_starts_survive_duplicates(name, data):
    model = Mixture.init(KEY, data, 2, FAMILIES[name])
    assert _finite(model)
    solution = jaxem.fit(model, data, sample_weight=ONES)
    assert solution.status == "degenerate"
    assert _finite((solution.model, solution.objective))


def test_a_multinomial_start_without_counts():
    assert _finite(Mixture.init(KEY, 0 * COUNTS, 2, jaxem.emissions.Multinomial))


IMPOSSIBLE = {
    "a mean of NaN": lambda v: Mixture(HALF, jaxem.emissions.Gaussian(v * MEANS, EYES)),
    "a covariance of NaN": lambda v: Mixture(HALF, jaxem.emissions.Gaussian(MEANS, v * EYES)),
    "a negative covariance": lambda v: Mixture(
        HALF, jaxem.emissions.Gaussian(MEANS, jnp.where(v == v, 1, -1) * EYES)
    ),
    "a variance of NaN": lambda v: Mixture(
        HALF, jaxem.emissions.DiagonalGaussian(MEANS, v * jnp.ones((2, 2)))
    ),
    "weights of NaN": lambda v: Mixture(v * HALF, jaxem.emissions.Gaussian(MEANS, EYES)),
}


@pytest.mark.parametrize("name", IMPOSSIBLE)
def test_impossible_parameters(name):
    """Refused where their values are known; else the fit says so."""
    with pytest.raises(ValueError, match=r"NaN|positive|non-negative"):
        IMPOSSIBLE[name](jnp.nan)
    fit = jax.jit(lambda v: jaxem.fit(IMPOSSIBLE[name](v), X, throw=False))
    assert fit(jnp.nan).status == "nonfinite"


def _gaussians(k: int, d: int = 2, dtype: Any = float) -> Mixture:
    components = jaxem.emissions.Gaussian(
        jnp.zeros((k, d), dtype), jnp.broadcast_to(jnp.eye(d, dtype=dtype), (k, d, d))
    )
    return Mixture(jnp.full(k, 1 / k, dtype), components)


FULL = HEALTHY["full"][0]


def _fit_full(x, *args, **options):
    return jaxem.fit(FULL, x, *args, throw=False, **options)


def _fit_functions(e_step, m_step):
    def run(x):
        return jaxem.fit(
            jaxem.from_functions(e_step, m_step, jnp.array(0.0)), x, sample_weight=ONES
        )

    return run


def _init(family, k=2):
    return lambda x: Mixture.init(KEY, x, k, family)


# Shapes, dtypes and settings: (what is run, on what, what its ValueError says).
REFUSED = {
    "one axis": (_fit_full, X[:, 0], r"shape \(n, 2\), got \(16,\); write x\[:, None\]"),
    "three axes": (_fit_full, X[None], r"shape \(n, 2\), got \(1, 16, 2\)"),
    "another number of features": (_fit_full, jnp.ones((N, 3)), r"\(n, 2\), got \(16, 3\)"),
    "no observation": (_fit_full, X[:0], "no observation"),
    "no feature": (_fit_full, X[:, :0], r"\(n, 2\), got \(16, 0\)"),
    "integers": (_fit_full, CODES, r"continuous family.*int64.*astype\(float\)"),
    "booleans": (_fit_full, CODES > 0, "continuous family.*bool"),
    "complex numbers": (_fit_full, X + 0j, "complex128"),
    "another precision": (_fit_full, X.astype(jnp.float32), r"float64.*float32.*astype\(float64\)"),
    "a tuple": (_fit_full, (X,), "expects an array of observations, got tuple"),
    "integers for durations": (
        lambda x: jaxem.fit(HEALTHY["exponential"][0], x),
        CODES,
        "continuous family",
    ),
    "integers for a sphere": (lambda x: jaxem.fit(HEALTHY["spherical"][0], x), CODES, "continuous"),
    "floats for categories": (
        lambda x: jaxem.fit(HEALTHY["categorical"][0], x),
        X,
        "integer codes",
    ),
    "float32 counts": (
        lambda x: jaxem.fit(HEALTHY["poisson"][0], x),
        COUNTS.astype(jnp.float32),
        "convert them to integers or to float64",
    ),
    "too few parts": (lambda x: jaxem.fit(HEALTHY["independent"][0], x), (X, COUNTS), "tuple of 4"),
    "an array for parts": (lambda x: jaxem.fit(HEALTHY["independent"][0], x), X, "tuple of 4"),
    "parts of different length": (
        lambda x: jaxem.fit(HEALTHY["independent"][0], x),
        (X, COUNTS[:3], BITS, CODES),
        "disagree on the number of observations",
    ),
    "weights for other observations": (
        lambda x: _fit_full(x, sample_weight=ONES[:3]),
        X,
        r"shape \(16,\)",
    ),
    "a column of weights": (
        lambda x: _fit_full(x, sample_weight=ONES[:, None]),
        X,
        r"got \(16, 1\)",
    ),
    "complex weights": (
        lambda x: _fit_full(x, sample_weight=ONES.astype(complex)),
        X,
        "real, got complex128",
    ),
    "a list of weights": (lambda x: _fit_full(x, sample_weight=[1.0] * N), X, "got list"),
    "a negative tol": (lambda x: _fit_full(x, tol=-1.0), X, "tol must"),
    "a NaN tol": (lambda x: _fit_full(x, tol=float("nan")), X, "tol must"),
    "a tol for each observation": (lambda x: _fit_full(x, tol=ONES), X, "tol must"),
    "a tol in words": (lambda x: _fit_full(x, tol="small"), X, "tol must"),
    "negative max_steps": (lambda x: _fit_full(x, max_steps=-1), X, "max_steps"),
    "fractional max_steps": (lambda x: _fit_full(x, max_steps=2.5), X, "max_steps"),
    "max_steps True": (lambda x: _fit_full(x, max_steps=True), X, "max_steps"),
    "an algorithm in words": (lambda x: _fit_full(x, "EM"), X, "algorithm"),
    "an algorithm's class": (lambda x: _fit_full(x, EM), X, "algorithm"),
    "an expectation as algorithm": (lambda x: _fit_full(x, Hard()), X, r"EM\(Hard\(\)\)"),
    "an expectation's class": (lambda x: _fit_full(x, EM(Hard)), X, "expectation"),
    "no adjoint": (lambda x: _fit_full(x, adjoint=None), X, "adjoint"),
    "progress every 0 steps": (lambda x: _fit_full(x, progress=0), X, "≥ 1"),
    "a model's class": (lambda x: jaxem.fit(Mixture, x), X, r"a class: Mixture.init\("),
    "an emission": (
        lambda x: jaxem.fit(FULL.components, x),
        X,
        "several need weights, write jaxem.Mixture",
    ),
    "a batch of models": (
        lambda x: jaxem.fit(_stack(FULL, FULL, FULL), x),
        X,
        "jax.vmap|fit_restarts",
    ),
    "a prior of more components": (lambda x: _fit_full(x, prior=_gaussians(3).prior()), X, "prior"),
    "a prior of one component": (lambda x: _fit_full(x, prior=_gaussians(1).prior()), X, "prior"),
    "a prior in another dimension": (
        lambda x: _fit_full(x, prior=_gaussians(2, 3).prior()),
        X,
        "prior",
    ),
    "a prior of another family": (
        lambda x: _fit_full(x, prior=HEALTHY["tied"][0].prior()),
        X,
        "prior does not belong",
    ),
    "a prior of the components": (
        lambda x: _fit_full(x, prior=FULL.components.prior()),
        X,
        r"model.prior\(components=",
    ),
    "a prior that is none": (lambda x: _fit_full(x, prior=1.0), X, r"model.prior\(…\), got float"),
    "hard functions": (
        lambda x: jaxem.fit(HEALTHY["functions"][0], x, EM(Hard()), sample_weight=ONES),
        X,
        "Exact",
    ),
    "an M-step of another structure": (_fit_functions(_e_step, lambda s: s), X, "structure"),
    "an M-step of another shape": (_fit_functions(_e_step, lambda s: jnp.ones(3)), X, "shape"),
    "an objective for each observation": (
        _fit_functions(lambda p, x, w: (_e_step(p, x, w)[0], w), _m_step),
        X,
        "scalar",
    ),
    "an E-step without objective": (
        _fit_functions(lambda p, x, w: jnp.sum(w), _m_step),
        X,
        "statistics and the log-likelihood",
    ),
    "a start for integers": (_init(jaxem.emissions.Gaussian), CODES, "continuous family"),
    "a start for integer spheres": (
        _init(jaxem.emissions.SphericalGaussian),
        CODES,
        "continuous family",
    ),
    "a start on one axis": (_init(jaxem.emissions.Gaussian), X[:, 0], r"x\[:, None\]"),
    "a start for counts on one axis": (
        _init(jaxem.emissions.Poisson),
        COUNTS[:, 0],
        r"x\[:, None\]",
    ),
    "a start without observations": (_init(jaxem.emissions.Gaussian), X[:0], "no observation"),
    "more components than observations": (
        _init(jaxem.emissions.Gaussian, 17),
        X,
        "17 components.*16 observations",
    ),
    "no component": (_init(jaxem.emissions.Gaussian, 0), X, "0 components"),
    "half a component": (_init(jaxem.emissions.Gaussian, 1.5), X, "components"),
    "a family in words": (_init("Gaussian"), X, "family"),
    "a family without its parts": (_init(jaxem.emissions.Independent), (X, COUNTS), "families"),
    "another method": (
        lambda x: Mixture.init(KEY, x, 2, jaxem.emissions.Gaussian, method="kmeans"),
        X,
        "k-means",
    ),
    "too few responsibilities": (
        lambda x: Mixture.from_responsibilities(x, jnp.ones((3, 2)), jaxem.emissions.Gaussian),
        X,
        r"expected \(16, k\)",
    ),
    "k-means of more clusters than observations": (
        lambda x: jaxem.kmeans(KEY, x, 17),
        X,
        "17 components",
    ),
    "k-means of integers": (lambda x: jaxem.kmeans(KEY, x, 2), CODES, "continuous family"),
    "k-means on one axis": (lambda x: jaxem.kmeans(KEY, x, 2), X[:, 0], r"x\[:, None\]"),
    "k-means of nothing": (lambda x: jaxem.kmeans(KEY, x, 2), X[:0], "no observation"),
    "k-means from no start": (
        lambda x: jaxem.kmeans(KEY, x, 2, num_restarts=0),
        X,
        "num_restarts",
    ),
    "restarts of a single model": (lambda x: jaxem.fit_restarts(FULL, x), X, "jax.vmap over init"),
    "more polished lanes than lanes": (
        lambda x: jaxem.fit_restarts(_stack(FULL, FULL), x, short_steps=2, num_polished=3),
        X,
        "num_polished",
    ),
    "the best of one": (lambda x: jaxem.best(_fit_full(x)), X, "one leading axis"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    run, data, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        run(data)
    with pytest.raises(ValueError, match=message):
        eqx.filter_jit(run)(data)
    with pytest.raises(ValueError, match=message):
        jax.vmap(run)(_stack(data, data))


TWO = jaxem.emissions.TiedGaussian(MEANS, jnp.eye(2))
# Values that are known when the constructor, `freeze` or `prior` is called.
CONSTRUCTORS = {
    "weights that sum to 1.1": (lambda: Mixture([0.5, 0.6], TWO), "sum to 1"),
    "a negative weight": (lambda: Mixture([-0.5, 1.5], TWO), "non-negative"),
    "a third weight": (lambda: Mixture([0.2, 0.3, 0.5], TWO), r"shape \(3,\); expected \(2,\)"),
    "a flat mean": (lambda: jaxem.emissions.Gaussian([0.0, 1.0], EYES), "mean has shape"),
    "a tied covariance": (
        lambda: jaxem.emissions.Gaussian(MEANS, jnp.eye(2)),
        "covariance has shape",
    ),
    "an indefinite covariance": (
        lambda: jaxem.emissions.TiedGaussian(MEANS, [[1.0, 2.0], [2.0, 1.0]]),
        "positive definite",
    ),
    "an asymmetric covariance": (
        lambda: jaxem.emissions.TiedGaussian(MEANS, [[1.0, 0.5], [-0.5, 1.0]]),
        "symmetric",
    ),
    "a zero covariance": (
        lambda: jaxem.emissions.TiedGaussian([[0.0]], [[0.0]]),
        "positive definite",
    ),
    "an infinite covariance": (
        lambda: jaxem.emissions.TiedGaussian([[0.0]], [[jnp.inf]]),
        "positive definite|finite",
    ),
    "a zero variance": (lambda: jaxem.emissions.DiagonalGaussian(MEANS, [0.0, 1.0]), "positive"),
    "three variances": (lambda: jaxem.emissions.SphericalGaussian(MEANS, [1.0] * 3), "shape"),
    "a probability of 1.5": (lambda: jaxem.emissions.Bernoulli([[1.5]]), r"\[0, 1\]"),
    "a NaN probability": (lambda: jaxem.emissions.Bernoulli([[jnp.nan]]), r"\[0, 1\]"),
    "a category too likely": (lambda: jaxem.emissions.Categorical([[[0.5, 0.6]]]), "sum to 1"),
    "categories of one axis": (lambda: jaxem.emissions.Multinomial([0.5, 0.5]), "shape"),
    "a negative rate": (lambda: jaxem.emissions.Poisson([[-1.0]]), "rate"),
    "an infinite rate": (lambda: jaxem.emissions.Poisson([[jnp.inf]]), "rate"),
    "a zero rate": (lambda: jaxem.emissions.Exponential([[0.0]]), "positive"),
    "no part": (lambda: jaxem.emissions.Independent(()), "number of components"),
    "uneven parts": (
        lambda: jaxem.emissions.Independent((TWO, jaxem.emissions.Poisson([[1.0]]))),
        "number of components",
    ),
    "freezing an unknown name": (lambda: jaxem.freeze(FULL, "components.scale"), "covariance"),
    "freezing into nowhere": (lambda: jaxem.freeze(FULL, "emission.mean"), "no 'emission'"),
    "freezing a module": (lambda: jaxem.freeze(FULL, "component"), "parameter"),
    "a mask too short": (lambda: jaxem.freeze(FULL, "weights", mask=[True]), "1 entries"),
    "a mask on what is shared": (
        lambda: jaxem.freeze(HEALTHY["tied"][0], "components.covariance", mask=[True, False]),
        "takes no mask",
    ),
    "a negative pseudo-count": (lambda: FULL.prior(weights=-0.5), "negative"),
    "three pseudo-counts": (lambda: FULL.prior(weights=jnp.ones(3)), "broadcasts"),
    "a prior count below 0": (lambda: TWO.prior({"mean": -1.0}), "count of mean"),
    "a prior covariance below 0": (lambda: TWO.prior(covariance=-jnp.eye(2)), "definite"),
    "a prior variance below 0": (
        lambda: HEALTHY["spherical"][0].components.prior(variance=-1.0),
        "positive",
    ),
    "a prior mean of NaN": (lambda: TWO.prior({"mean": 1.0}, mean=jnp.nan), "mean"),
    "a Dirichlet below 1": (lambda: INDEPENDENT.parts[3].prior(-1.0), "count must not be negative"),
    "a beta below 1": (lambda: INDEPENDENT.parts[2].prior(0.5, probability=-1.0), "probability"),
    "a gamma below 1": (lambda: INDEPENDENT.parts[1].prior(0.5, rate=-1.0), "rate must be finite"),
    "a negative gamma rate": (
        lambda: INDEPENDENT.parts[1].prior(-1.0),
        "count must not be negative",
    ),
    "a prior for a fifth part": (
        lambda: INDEPENDENT.prior(None, None, None, None, None),
        "5 priors",
    ),
}


@pytest.mark.parametrize("name", CONSTRUCTORS)
def test_constructors_refuse(name):
    call, message = CONSTRUCTORS[name]
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("change", "advice"),
    [
        (lambda x, w: (x.at[0, 0].set(jnp.nan), w), "data hold a NaN.*weight 0, or remove"),
        (lambda x, w: (x, -w), "sample_weight holds a NaN, an infinity or a negative number"),
        (lambda x, w: (1e200 * x, w), "rescale the data or use float64"),
    ],
)
def test_worthless_answers_raise_with_advice(change, advice):
    x, sample_weight = change(X, ONES)
    with pytest.raises(eqx.EquinoxRuntimeError, match=advice):
        jaxem.fit(FULL, x, sample_weight=sample_weight)


def test_what_is_worth_something_does_not_raise():
    for case in ("full: all points equal", "functions: an M-step that lowers the objective"):
        model, data, sample_weight, expected, _ = VALUES[case]
        assert jaxem.fit(model, data, sample_weight=sample_weight).status == expected
    short = jaxem.fit(FULL, X, max_steps=1, sample_weight=ONES)
    assert short.status == "max_steps_reached" and not bool(short.converged)


def test_best_of_lanes_that_failed():
    lanes = _lanes(_stack((FULL, X, ONES), (FULL, X, 0 * ONES), (FULL, X * jnp.nan, ONES)), {})
    chosen = jaxem.best(lanes)
    assert chosen.status == "converged"
    worst = jaxem.best(jax.tree.map(lambda leaf: leaf[1:], lanes))
    assert worst.status == "invalid_sample_weight"
    assert _finite(worst.model)


def test_best_sets_degenerate_lanes_aside():
    means = jnp.stack([X[0], jnp.mean(X, axis=0)])
    covariances = jnp.stack([1e-20 * jnp.eye(2), 5 * jnp.eye(2)])
    spike = Mixture(jnp.array([1 / 16, 15 / 16]), jaxem.emissions.Gaussian(means, covariances))
    lanes = _lanes(_stack((FULL, X, ONES), (spike, X, ONES)), {})
    assert bool((lanes.result == RESULTS.degenerate)[1])
    assert float(lanes.objective[1]) > float(lanes.objective[0])
    chosen = jaxem.best(lanes)
    assert chosen.status == "converged"
    assert int(chosen.set_aside) == 1


@pytest.mark.parametrize("short_steps", [None, 2])
def test_restarts_keep_their_lanes_apart(short_steps):
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, FULL)
    runs = jaxem.fit_restarts(
        _stack(broken, FULL), X, sample_weight=ONES, short_steps=short_steps, num_polished=2
    )
    alone, _ = _compiled((FULL, X, ONES), {})
    assert int(jnp.sum(runs.result == RESULTS.nonfinite)) == 1
    chosen = jaxem.best(runs)
    assert chosen.status == "converged"
    np.testing.assert_allclose(chosen.objective, alone.objective, rtol=1e-9)


KMEANS = {
    "healthy": (X, 2, ONES, "converged"),
    "a NaN of weight 0": (X.at[0, 0].set(jnp.nan), 2, ONES.at[0].set(0), "converged"),
    "no weight": (X, 2, 0 * ONES, "invalid_sample_weight"),
    "a cluster for each observation": (X, N, ONES, "converged"),
    "all points equal": (jnp.ones((N, 2)), 2, ONES, "degenerate"),
    "three points for five clusters": (jnp.repeat(X[:4], 4, 0), 5, ONES, "degenerate"),
    "1e30": (1e30 * X, 2, ONES, "converged"),
    "1e-30": (1e-30 * X, 2, ONES, "converged"),
    "1e30 in float32": ((1e30 * X).astype("float32"), 2, ONES.astype("float32"), "nonfinite"),
    "squares that overflow": (1e200 * X, 2, ONES, "nonfinite"),
}


def test_kmeans_of_a_nan():
    x = X.at[0, 0].set(jnp.nan)
    with pytest.raises(ValueError, match="NaN or an infinity"):
        jaxem.kmeans(KEY, x, 2)
    clusters = jax.jit(lambda x: jaxem.kmeans(KEY, x, 2))(x)
    assert clusters.solution.status == "invalid_data"


def test_starts_are_refused_where_the_data_are_impossible():
    for family in (jaxem.emissions.Gamma, jaxem.emissions.Poisson, jaxem.emissions.VonMisesFisher):
        with pytest.raises(ValueError, match=f"outside the support of {family.__name__}"):
            Mixture.init(KEY, X - 10, 2, family)
    with pytest.raises(ValueError, match="outside the support of Gaussian"):
        Mixture.from_responsibilities(
            X.at[0, 0].set(jnp.nan), jnp.full((N, 2), 0.5), jaxem.emissions.Gaussian
        )
    with pytest.raises(ValueError, match="sum to 1"):
        Mixture.from_responsibilities(X, jnp.ones((N, 2)), jaxem.emissions.Gaussian)


@pytest.mark.parametrize("name", KMEANS)
def test_kmeans(name):
    x, k, sample_weight, expected = KMEANS[name]
    clusters = jaxem.kmeans(KEY, x, k, sample_weight=sample_weight, num_restarts=2)
    assert clusters.solution.status == expected
    if expected in ("converged", "degenerate"):
        assert _finite((clusters.centroids, clusters.inertia, clusters.solution.objective))
    assert bool(jnp.any(clusters.empty)) == (expected == "degenerate") or "invalid" in expected
