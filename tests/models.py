"""Every model × emission, as small as compiles fast: a new one joins the tests by a line here.

The tags of a case say which tests it takes part in, besides those of every case.

- mixture: a `Mixture`, whose components have a prior
- closed: with known z the M-step is a formula in sums of the data
- expanded: its density has a cheaper form, for where rounding allows it
- iterative: with known z the M-step is no formula
- nested: parts of an emission are latent as well
- regression, chain: what the words say
- mechanism: stands for all cases that are built alike wherever a test takes long: fits, derivatives
  of fits, standard errors. What a family can get wrong by itself is tested on every one.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxem


class Case(NamedTuple):
    """A model that has not converged, data, and a prior of the components (or None).

    Of the laws of `check_model`, some do not apply to it, and it may break some.
    """

    model: Any
    data: Any
    prior: Any = None
    not_applicable: frozenset[str] = frozenset()
    may_break: frozenset[str] = frozenset()


class Entry(NamedTuple):
    tags: frozenset[str]
    build: Callable[[], Case]

    def __call__(self) -> Case:
        return self.build()


def _entry(tags: str, build: Callable[[], Case]) -> Entry:
    @functools.cache
    def built() -> Case:
        with jax.ensure_compile_time_eval():  # may be called first where something is traced
            return build()

    return Entry(frozenset(tags.split()), built)


def cases(*tags: str) -> list[str]:
    """Names of the cases that have all these tags."""
    found = [name for name, entry in CASES.items() if entry.tags.issuperset(tags)]
    assert found, f"no case has the tags {tags}"
    return found


_rng = np.random.default_rng(0)
N = 48
_side = np.arange(N) % 2
POINTS = _rng.normal(size=(N, 2)) @ np.array([[1.0, 0.4], [0.0, 0.7]]) + 2.5 * _side[:, None]
COUNTS = _rng.poisson(2 + 4 * _side[:, None], size=(N, 2))
BITS = (_rng.random((N, 3)) < 0.3 + 0.4 * _side[:, None]).astype(int)
CODES = np.minimum(_rng.integers(0, 3, (N, 2)), 2 - _side[:, None])
TALLIES = np.where(
    _side[:, None] == 1,
    _rng.multinomial(9, [0.2, 0.3, 0.5], N),
    _rng.multinomial(7, [0.6, 0.3, 0.1], N),
)
DURATIONS = _rng.exponential(1 + 3 * _side[:, None], (N, 2))
BEARINGS = np.column_stack([POINTS - 1, POINTS[:, 0] ** 2])
BEARINGS = BEARINGS / np.linalg.norm(BEARINGS, axis=1, keepdims=True)

_one = np.random.default_rng(8).normal(size=(N, 1))
LOADED = np.where(
    _side[:, None] == 1, _one * [0.5, 1.0, 0.4] + [2.0, 1.0, 0.0], -_one * [1.0, 0.5, -0.3]
)
LOADED = LOADED + np.random.default_rng(10).normal(size=(N, 3)) * [0.6, 0.7, 0.8]
LOADED_MEAN = np.array([[0.2, 0.1, 0.0], [1.7, 0.8, 0.2]])
LOADED_NOISE = np.array([[0.5, 0.6, 0.7], [0.4, 0.5, 0.8]])

MEAN = np.array([[0.3, -0.2], [1.9, 2.4]])
FULL = np.array([[[1.0, 0.2], [0.2, 0.8]], [[1.5, -0.3], [-0.3, 0.9]]])
SHARES = np.array([[[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [[0.3, 0.4, 0.3], [0.5, 0.2, 0.3]]])


def _mixture(components):
    return jaxem.Mixture(jnp.array([0.4, 0.6]), components)


def _gaussian(count, **kwargs):
    return lambda c: c.prior({"mean": 1.5, "covariance": count}, mean=[0.5, 1.0], **kwargs)


def _scaled(count):
    return lambda c: c.prior({"mean": 1.5, "variance": count}, mean=[0.5, 1.0], variance=0.8)


def _case(components, data, prior):
    data = jax.tree.map(jnp.asarray, data)
    return Case(_mixture(components), data, prior(components))


def _parsimonious(structure, *may_break):
    components = jaxem.emissions.ParsimoniousGaussian(MEAN, FULL, structure)
    return _case(components, POINTS, _gaussian(7.0))._replace(may_break=frozenset(may_break))


def _chains(states, num_sequences, num_steps, seed):
    """State paths that stay two steps out of three, and a generator for what they emit."""
    rng = np.random.default_rng(seed)
    moves = np.where(rng.random((num_sequences, num_steps)) < 2 / 3, 0, 1)
    return (rng.integers(0, states, (num_sequences, 1)) + np.cumsum(moves, axis=1)) % states, rng


_path, _draw = _chains(2, 14, 9, 1)
SEQUENCES = _draw.normal(size=(14, 9, 2)) + 1.8 * _path[:, :, None]
LENGTHS = np.tile([9, 6, 8, 4, 9, 7, 2], 2)
OBSERVED = _draw.random((14, 9)) < 0.9
COUNTED = _draw.poisson(2 + 5 * _path[:, :, None])
DRIVES = _draw.normal(size=(14, 9, 1))
CODED = np.where(
    _draw.random((14, 9, 2)) < 0.7, _path[:, :, None], _draw.integers(0, 3, (14, 9, 2))
)
_ahead, _draw = _chains(1, 14, 9, 2)
_ahead = np.minimum(np.cumsum(_draw.random((14, 9)) < 0.4, axis=1), 2)
STAGES = _draw.normal(size=(14, 9, 1)) + 2.0 * _ahead[:, :, None]
STAY = np.array([[0.8, 0.2], [0.3, 0.7]])
PART_RATES = np.array([[1.0, 3.0], [3.0, 1.0], [6.0, 4.0], [4.0, 8.0]])


ONE = np.ones((2, 1, 1))
_slopes = np.array([[1.0, 0.3], [-0.8, 0.5]])
INPUTS = np.random.default_rng(3).normal(size=(N, 2)) + [3.0, -1.0]
_level = np.sum(INPUTS * _slopes[_side], axis=1, keepdims=True)
RESPONSES = _level + np.random.default_rng(4).normal(size=(N, 1)) * 0.6
ANSWERS = (np.random.default_rng(5).random((N, 3)) < 0.2 + 0.6 * _side[:, None]).astype(int)
GATES = np.random.default_rng(7).normal(size=(N, 2)) + _side[:, None] * [0.8, 0.0]
EVENTS = np.random.default_rng(6).poisson(np.exp(1 + 0.4 * _level))


def _ragged(values):
    return jaxem.Sequences(values, LENGTHS, observed=OBSERVED)


def _hmm(initial, transition, emission, data):
    return Case(jaxem.HMM(initial, transition, emission), jax.tree.map(jnp.asarray, data))


def _hsmm_negative_binomial():
    durations = jaxem.factors.NegativeBinomialDuration([2.0, 1.0], [3.0, 0.5], 5)
    emission = jaxem.emissions.Poisson([[1.5], [6.0]])
    model = jaxem.HSMM([0.6, 0.4], [[0.0, 1.0], [1.0, 0.0]], durations, emission)
    return Case(model, jax.tree.map(jnp.asarray, _ragged(COUNTED)))


def _hmm_regression():
    emission = jaxem.emissions.LinearRegression(
        [[[0.8, 0.2]], [[-0.6, 0.4]]], [[0.2], [1.2]], np.ones((2, 1, 1))
    )
    values = INPUTS.reshape(6, 8, 2), RESPONSES.reshape(6, 8, 1)
    seen = np.random.default_rng(9).random((6, 8)) < 0.9
    return _hmm(
        [0.6, 0.4],
        STAY,
        emission,
        jaxem.Sequences(values, np.array([8, 5, 8, 7, 3, 8]), observed=seen),
    )


def _hmm_mixture_emission():
    mean = np.array([[-2.0, 0.0], [1.0, 1.0], [2.0, 3.0], [3.0, -1.0]])
    parts = jaxem.emissions.DiagonalGaussian(mean, np.full((4, 2), 1.2))
    emission = jaxem.emissions.MixtureEmission([[0.4, 0.6], [0.5, 0.5]], parts)
    return _hmm([0.6, 0.4], STAY, emission, _ragged(SEQUENCES))


def _plain_e_step(params, data, sample_weight=None):
    """A mixture of two Poisson laws written as a plain E-step."""
    x, (share, rate) = data[:, 0], params
    joint = jnp.log(jnp.stack([share, 1 - share])) + x[:, None] * jnp.log(rate) - rate
    joint = joint - jax.scipy.special.gammaln(x + 1)[:, None]
    w = jnp.ones(len(x), rate.dtype) if sample_weight is None else sample_weight
    log_prob = jax.nn.logsumexp(joint, axis=1)
    r = w[:, None] * jnp.exp(joint - log_prob[:, None])
    return (r.sum(0), r.T @ x), jnp.sum(w * log_prob)


def _plain_m_step(sums):
    counts, totals = sums
    return counts[0] / counts.sum(), totals / counts


def _functions():
    params = (jnp.array(0.4), jnp.array([1.5, 5.0]))
    laws = {
        "Fisher's identity",  # it has no Q,
        "free leaves",  # nor parameters with names,
        "frozen is not updated",
        "memory",  # and its functions see all the data at once
    }
    return Case(
        jaxem.from_functions(_plain_e_step, _plain_m_step, params),
        jnp.asarray(COUNTS, float),
        None,
        frozenset(laws),
    )


def _smooth_modules():
    return [SmoothStudent(jnp.array(mean), jnp.zeros(2)) for mean in MEAN]


class SmoothStudent(eqx.Module):
    """Independent t₃ densities, whose derivatives are smooth everywhere."""

    centre: jax.Array
    log_scale: jax.Array

    def log_prob(self, x):
        z = (x - self.centre) / jnp.exp(self.log_scale)
        return jnp.sum(-2 * jnp.log1p(z**2 / 3) - self.log_scale)


def _two_poisson_laws(params, x):
    """log p(x, z = k) of a mixture of Poisson laws, written out."""
    log_weights = jax.nn.log_softmax(params["logits"])
    x = x[:, None, :]
    own = x * params["log_rate"] - jnp.exp(params["log_rate"]) - jax.scipy.special.gammaln(x + 1)
    return log_weights + jnp.sum(own, axis=2)


def _log_joint():
    params = {"logits": jnp.zeros(2), "log_rate": jnp.log(jnp.array([[1.0, 3.0], [5.0, 4.0]]))}
    model = jaxem.from_log_joint(_two_poisson_laws, params)
    nameless = frozenset({"free leaves", "frozen is not updated"})
    return Case(model, jnp.asarray(COUNTS, float), None, nameless)


def _state_space():
    model = jaxem.LinearGaussianSSM(
        jaxem.emissions.Gaussian([[0.5, -1.0]], [[[1.0, 0.2], [0.2, 0.8]]]),
        jaxem.emissions.LinearRegression(
            [[[0.8, 0.3], [-0.2, 0.7]]], [[0.1, 0.2]], [[[0.5, 0.1], [0.1, 0.3]]]
        ),
        jaxem.emissions.LinearRegression(
            [[[1.0, 0.4], [-0.6, 0.8], [0.3, -0.5]]],
            [[0.2, -0.1, 0.4]],
            [[[0.6, 0.2, 0.0], [0.2, 0.5, 0.1], [0.0, 0.1, 0.7]]],
        ),
    )
    rng = np.random.default_rng(11)
    values = rng.normal(size=(14, 9, 3)) + np.cumsum(rng.normal(size=(14, 9, 1)), axis=1)
    values[rng.random(values.shape) < 0.1] = np.nan
    return Case(model, jax.tree.map(jnp.asarray, _ragged(values)))


CASES: dict[str, Entry] = {
    "gaussian": _entry(
        "mixture closed expanded mechanism",
        lambda: _case(
            jaxem.emissions.Gaussian(MEAN, FULL), POINTS, _gaussian(7.0, covariance=FULL[0])
        ),
    ),
    "tied": _entry(
        "mixture closed expanded",
        lambda: _case(jaxem.emissions.TiedGaussian(MEAN, FULL[0]), POINTS, _gaussian(3.5)),
    ),
    "diagonal": _entry(
        "mixture closed expanded",
        lambda: _case(
            jaxem.emissions.DiagonalGaussian(MEAN, [[1.0, 0.8], [0.6, 1.2]]), POINTS, _scaled(6.0)
        ),
    ),
    "diagonal-tied": _entry(
        "mixture closed expanded",
        lambda: _case(jaxem.emissions.DiagonalGaussian(MEAN, [1.0, 0.8]), POINTS, _scaled(3.0)),
    ),
    "spherical": _entry(
        "mixture closed expanded",
        lambda: _case(jaxem.emissions.SphericalGaussian(MEAN, [1.0, 0.7]), POINTS, _scaled(3.0)),
    ),
    "spherical-tied": _entry(
        "mixture closed expanded",
        lambda: _case(jaxem.emissions.SphericalGaussian(MEAN, 0.9), POINTS, _scaled(1.5)),
    ),
    "bernoulli": _entry(
        "mixture closed",
        lambda: _case(
            jaxem.emissions.Bernoulli([[0.2, 0.5, 0.4], [0.6, 0.5, 0.8]]),
            BITS,
            lambda c: c.prior(1.5, probability=2 / 3),
        ),
    ),
    "categorical": _entry(
        "mixture closed mechanism",
        lambda: _case(
            jaxem.emissions.Categorical(SHARES), CODES, lambda c: c.prior(1.5, probability=1 / 3)
        ),
    ),
    "multinomial": _entry(
        "mixture closed",
        lambda: _case(
            jaxem.emissions.Multinomial(SHARES[:, 0]),
            TALLIES,
            lambda c: c.prior(3.0, probability=1 / 3),
        ),
    ),
    "poisson": _entry(
        "mixture closed",
        lambda: _case(
            jaxem.emissions.Poisson([[1.0, 3.0], [5.0, 4.0]]),
            COUNTS,
            lambda c: c.prior(0.5, rate=2.0),
        ),
    ),
    "exponential": _entry(
        "mixture closed",
        lambda: _case(
            jaxem.emissions.Exponential([[1.0, 0.5], [0.2, 0.4]]),
            DURATIONS,
            lambda c: c.prior(2.0, rate=1.0),
        ),
    ),
    "independent": _entry(
        "mixture closed expanded mechanism",
        lambda: _case(
            jaxem.emissions.Independent(
                [
                    jaxem.emissions.SphericalGaussian(MEAN, [1.0, 0.7]),
                    jaxem.emissions.Poisson([[1.0, 3.0], [5.0, 4.0]]),
                ]
            ),
            (POINTS, COUNTS),
            lambda c: c.prior(None, c.parts[1].prior(0.5, rate=2.0)),
        ),
    ),
    "linear-regression": _entry(
        "mixture regression mechanism",
        lambda: _case(
            jaxem.emissions.LinearRegression(
                [[[0.8, 0.2]], [[-0.6, 0.4]]], [[0.2], [1.2]], np.ones((2, 1, 1))
            ),
            (INPUTS, RESPONSES),
            lambda c: c.prior(
                {"intercept": 0.5, "covariance": 6.0}, precision=0.5, intercept=[0.3]
            ),
        ),
    ),
    "logistic-regression": _entry(
        "mixture regression",
        lambda: _case(
            jaxem.emissions.LogisticRegression(np.full((2, 3, 2), 0.1), [[-1.0] * 3, [1.0] * 3]),
            (INPUTS, ANSWERS),
            lambda c: c.prior(precision=2.0, intercept_precision=1.0),
        ),
    ),
    "poisson-regression": _entry(
        "mixture regression mechanism",
        lambda: _case(
            jaxem.emissions.PoissonRegression([[[0.3, 0.0]], [[-0.2, 0.1]]], [[0.8], [1.2]]),
            (INPUTS, EVENTS),
            lambda c: c.prior(precision=0.5),
        ),
    ),
    "student-t": _entry(
        "mixture iterative mechanism",
        lambda: _case(
            jaxem.emissions.StudentT(MEAN, FULL, [4.0, 9.0]),
            POINTS,
            lambda c: c.prior(
                {"mean": 1.5, "scale": 7.0, "dof": 4.0}, mean=[0.5, 1.0], scale=FULL[0], dof=6.0
            ),
        ),
    ),
    "negative-binomial": _entry(
        "mixture iterative",
        lambda: _case(
            jaxem.emissions.NegativeBinomial([[1.0, 3.0], [5.0, 4.0]], [[2.0, 8.0], [4.0, 3.0]]),
            COUNTS,
            lambda c: c.prior(3.0, mean=4.0, concentration=2.0),
        ),
    ),
    "gamma": _entry(
        "mixture iterative",
        lambda: _case(
            jaxem.emissions.Gamma([[1.0, 2.5], [1.5, 0.8]], [[1.0, 1.5], [0.4, 0.2]]),
            DURATIONS,
            lambda c: c.prior(3.0, concentration=1.5, rate=0.5),
        ),
    ),
    "von-mises-fisher": _entry(
        "mixture iterative",
        lambda: _case(
            jaxem.emissions.VonMisesFisher([[-1.0, -1.0, 1.0], [1.0, 1.0, 1.0]], [2.0, 6.0]),
            BEARINGS,
            lambda c: c.prior(2.0, direction=[0.0, 0.0, 1.0], concentration=3.0),
        ),
    ),
    "mixture-emission": _entry(
        "mixture nested mechanism",
        lambda: _case(
            jaxem.emissions.MixtureEmission(
                [[0.4, 0.6], [0.5, 0.5]], jaxem.emissions.Poisson(PART_RATES)
            ),
            COUNTS,
            lambda c: c.prior(1.5, c.components.prior(0.5, rate=2.0)),
        ),
    ),
    "gradient-emission": _entry(
        "mixture mechanism",
        lambda: _case(
            jaxem.emissions.GradientEmission(_smooth_modules()), POINTS, lambda c: c.prior()
        ),
    ),
    "labels": _entry(
        "mixture",
        lambda: _case(
            jaxem.emissions.Independent(
                [jaxem.emissions.SphericalGaussian(MEAN, [1.0, 0.7]), jaxem.emissions.Labels(2)]
            ),
            (POINTS, np.where(np.arange(N) < 12, _side, -1)[:, None]),
            lambda c: c.prior(),
        ),
    ),
    "factor-analysis": _entry(
        "mixture mechanism",
        lambda: _case(
            jaxem.emissions.FactorAnalysis(
                LOADED_MEAN, np.array([[[0.8], [0.5], [-0.3]], [[0.2], [0.9], [0.4]]]), LOADED_NOISE
            ),
            LOADED,
            lambda c: c.prior({"loadings": 1.5, "noise_variance": 4.0}, noise_variance=0.7),
        ),
    ),
    "ica": _entry(
        "mixture",
        lambda: _case(
            jaxem.emissions.ICA(
                MEAN,
                [[[0.8, 0.3], [0.2, 0.9]], [[0.9, 0.0], [-0.4, 0.7]]],
                np.full((2, 2, 2), [0.4, 0.6]),
                np.full((2, 2, 2), [-0.5, 0.6]),
                np.full((2, 2, 2), [0.5, 0.9]),
            ),
            POINTS,
            lambda c: c.prior(3.0, source_variance=0.7),
        ),
    ),
    "ppca-tied": _entry(
        "mixture",
        lambda: _case(
            jaxem.emissions.PPCA(LOADED_MEAN, np.array([[[0.8], [0.5], [-0.3]]] * 2), 0.6),
            LOADED,
            lambda c: c.prior({"loadings": 1.5, "noise_variance": 4.0}, noise_variance=0.7),
        ),
    ),
    "parsimonious-EVV": _entry("mixture", lambda: _parsimonious("EVV")),
    "parsimonious-VEE": _entry("mixture", lambda: _parsimonious("VEE")),
    "parsimonious-VEV": _entry("mixture", lambda: _parsimonious("VEV", "free leaves")),
    "state-space": _entry("mechanism", _state_space),
    "experts": _entry(
        "mechanism",
        lambda: Case(
            jaxem.MixtureOfExperts(
                jaxem.factors.LogisticGate([[0.2, -0.3], [0.0, 0.0]], [0.4, 0.0]),
                jaxem.emissions.LinearRegression(
                    [[[0.8, 0.2]], [[-0.6, 0.4]]], [[0.2], [1.2]], np.ones((2, 1, 1))
                ),
            ),
            jax.tree.map(jnp.asarray, (GATES, (INPUTS, RESPONSES))),
        ),
    ),
    "log-joint": _entry("mechanism", _log_joint),
    "hmm-gaussian": _entry(
        "chain mechanism",
        lambda: _hmm([0.6, 0.4], STAY, jaxem.emissions.Gaussian(MEAN, FULL), _ragged(SEQUENCES)),
    ),
    "hmm-categorical": _entry(
        "chain", lambda: _hmm([0.6, 0.4], STAY, jaxem.emissions.Categorical(SHARES), CODED)
    ),
    "hmm-stationary": _entry(
        "chain mechanism",
        lambda: _hmm("stationary", STAY, jaxem.emissions.Poisson([[1.5], [6.0]]), COUNTED),
    ),
    "hmm-left-to-right": _entry(
        "chain",
        lambda: _hmm(
            [0.5, 0.3, 0.2],
            jaxem.factors.Transition.left_to_right(3, 0.7),
            jaxem.emissions.SphericalGaussian([[0.0], [1.5], [4.0]], [1.0, 1.2, 0.9]),
            _ragged(STAGES),
        ),
    ),
    "hmm-logistic-transition": _entry(
        "chain mechanism",
        lambda: _hmm(
            [0.6, 0.4],
            jaxem.factors.LogisticTransition(STAY, [[[0.3], [-0.3]], [[-0.2], [0.2]]]),
            jaxem.emissions.Poisson([[1.5], [6.0]]),
            jaxem.Sequences(COUNTED, inputs=DRIVES),
        ),
    ),
    "hsmm": _entry(
        "mechanism",
        lambda: Case(
            jaxem.HSMM(
                [0.6, 0.4],
                [[0.0, 1.0], [1.0, 0.0]],
                jaxem.factors.PoissonDuration([1.0, 2.0], 5),
                jaxem.emissions.Poisson([[1.5], [6.0]]),
            ),
            jax.tree.map(jnp.asarray, _ragged(COUNTED)),
        ),
    ),
    "hsmm-negative-binomial": _entry("", _hsmm_negative_binomial),
    "hmm-regression": _entry("", _hmm_regression),
    "hmm-mixture-emission": _entry("", _hmm_mixture_emission),
    "from_functions": _entry("mechanism", _functions),
}
