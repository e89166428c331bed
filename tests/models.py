"""Every model × emission, as small as compiles fast: a new one joins the law tests by a line here.

A case is a model that has not converged, data, a prior of the components (or None), and the laws
of `check_model` that do not apply to it.
"""

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np

import jaxem


class Case(NamedTuple):
    model: Any
    data: Any
    prior: Any = None
    not_applicable: frozenset[str] = frozenset()


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


CASES = {
    "gaussian": lambda: _case(
        jaxem.emissions.Gaussian(MEAN, FULL), POINTS, _gaussian(7.0, covariance=FULL[0])
    ),
    "tied": lambda: _case(jaxem.emissions.TiedGaussian(MEAN, FULL[0]), POINTS, _gaussian(3.5)),
    "diagonal": lambda: _case(
        jaxem.emissions.DiagonalGaussian(MEAN, [[1.0, 0.8], [0.6, 1.2]]), POINTS, _scaled(6.0)
    ),
    "diagonal-tied": lambda: _case(
        jaxem.emissions.DiagonalGaussian(MEAN, [1.0, 0.8]), POINTS, _scaled(3.0)
    ),
    "spherical": lambda: _case(
        jaxem.emissions.SphericalGaussian(MEAN, [1.0, 0.7]), POINTS, _scaled(3.0)
    ),
    "spherical-tied": lambda: _case(
        jaxem.emissions.SphericalGaussian(MEAN, 0.9), POINTS, _scaled(1.5)
    ),
    "bernoulli": lambda: _case(
        jaxem.emissions.Bernoulli([[0.2, 0.5, 0.4], [0.6, 0.5, 0.8]]),
        BITS,
        lambda c: c.prior(1.5, probability=2 / 3),
    ),
    "categorical": lambda: _case(
        jaxem.emissions.Categorical(SHARES), CODES, lambda c: c.prior(1.5, probability=1 / 3)
    ),
    "multinomial": lambda: _case(
        jaxem.emissions.Multinomial(SHARES[:, 0]),
        TALLIES,
        lambda c: c.prior(3.0, probability=1 / 3),
    ),
    "poisson": lambda: _case(
        jaxem.emissions.Poisson([[1.0, 3.0], [5.0, 4.0]]),
        COUNTS,
        lambda c: c.prior(0.5, rate=2.0),
    ),
    "exponential": lambda: _case(
        jaxem.emissions.Exponential([[1.0, 0.5], [0.2, 0.4]]),
        DURATIONS,
        lambda c: c.prior(2.0, rate=1.0),
    ),
    "independent": lambda: _case(
        jaxem.emissions.Independent(
            [
                jaxem.emissions.SphericalGaussian(MEAN, [1.0, 0.7]),
                jaxem.emissions.Poisson([[1.0, 3.0], [5.0, 4.0]]),
            ]
        ),
        (POINTS, COUNTS),
        lambda c: c.prior(None, c.parts[1].prior(0.5, rate=2.0)),
    ),
    "linear-regression": lambda: _case(
        jaxem.emissions.LinearRegression(
            [[[0.8, 0.2]], [[-0.6, 0.4]]], [[0.2], [1.2]], np.ones((2, 1, 1))
        ),
        (INPUTS, RESPONSES),
        lambda c: c.prior({"intercept": 0.5, "covariance": 6.0}, precision=0.5, intercept=[0.3]),
    ),
    "logistic-regression": lambda: _case(
        jaxem.emissions.LogisticRegression(np.full((2, 3, 2), 0.1), [[-1.0] * 3, [1.0] * 3]),
        (INPUTS, ANSWERS),
        lambda c: c.prior(precision=2.0, intercept_precision=1.0),
    ),
    "poisson-regression": lambda: _case(
        jaxem.emissions.PoissonRegression([[[0.3, 0.0]], [[-0.2, 0.1]]], [[0.8], [1.2]]),
        (INPUTS, EVENTS),
        lambda c: c.prior(precision=0.5),
    ),
    "student-t": lambda: _case(
        jaxem.emissions.StudentT(MEAN, FULL, [4.0, 9.0]),
        POINTS,
        lambda c: c.prior(
            {"mean": 1.5, "scale": 7.0, "dof": 4.0}, mean=[0.5, 1.0], scale=FULL[0], dof=6.0
        ),
    ),
    "negative-binomial": lambda: _case(
        jaxem.emissions.NegativeBinomial([[1.0, 3.0], [5.0, 4.0]], [[2.0, 8.0], [4.0, 3.0]]),
        COUNTS,
        lambda c: c.prior(3.0, mean=4.0, concentration=2.0),
    ),
    "gamma": lambda: _case(
        jaxem.emissions.Gamma([[1.0, 2.5], [1.5, 0.8]], [[1.0, 1.5], [0.4, 0.2]]),
        DURATIONS,
        lambda c: c.prior(3.0, concentration=1.5, rate=0.5),
    ),
    "von-mises-fisher": lambda: _case(
        jaxem.emissions.VonMisesFisher([[-1.0, -1.0, 1.0], [1.0, 1.0, 1.0]], [2.0, 6.0]),
        BEARINGS,
        lambda c: c.prior(2.0, direction=[0.0, 0.0, 1.0], concentration=3.0),
    ),
    "mixture-emission": lambda: _case(
        jaxem.emissions.MixtureEmission(
            [[0.4, 0.6], [0.5, 0.5]], jaxem.emissions.Poisson(PART_RATES)
        ),
        COUNTS,
        lambda c: c.prior(1.5, c.components.prior(0.5, rate=2.0)),
    ),
    "gradient-emission": lambda: _case(
        jaxem.emissions.GradientEmission(_smooth_modules()), POINTS, lambda c: c.prior()
    ),
    "labels": lambda: _case(
        jaxem.emissions.Independent(
            [jaxem.emissions.SphericalGaussian(MEAN, [1.0, 0.7]), jaxem.emissions.Labels(2)]
        ),
        (POINTS, np.where(np.arange(N) < 12, _side, -1)[:, None]),
        lambda c: c.prior(),
    ),
    "experts": lambda: Case(
        jaxem.MixtureOfExperts(
            jaxem.factors.LogisticGate([[0.2, -0.3], [0.0, 0.0]], [0.4, 0.0]),
            jaxem.emissions.LinearRegression(
                [[[0.8, 0.2]], [[-0.6, 0.4]]], [[0.2], [1.2]], np.ones((2, 1, 1))
            ),
        ),
        jax.tree.map(jnp.asarray, (GATES, (INPUTS, RESPONSES))),
    ),
    "log-joint": _log_joint,
    "hmm-gaussian": lambda: _hmm(
        [0.6, 0.4], STAY, jaxem.emissions.Gaussian(MEAN, FULL), _ragged(SEQUENCES)
    ),
    "hmm-categorical": lambda: _hmm([0.6, 0.4], STAY, jaxem.emissions.Categorical(SHARES), CODED),
    "hmm-stationary": lambda: _hmm(
        "stationary", STAY, jaxem.emissions.Poisson([[1.5], [6.0]]), COUNTED
    ),
    "hmm-left-to-right": lambda: _hmm(
        [0.5, 0.3, 0.2],
        jaxem.factors.Transition.left_to_right(3, 0.7),
        jaxem.emissions.SphericalGaussian([[0.0], [1.5], [4.0]], [1.0, 1.2, 0.9]),
        _ragged(STAGES),
    ),
    "hmm-logistic-transition": lambda: _hmm(
        [0.6, 0.4],
        jaxem.factors.LogisticTransition(STAY, [[[0.3], [-0.3]], [[-0.2], [0.2]]]),
        jaxem.emissions.Poisson([[1.5], [6.0]]),
        jaxem.Sequences(COUNTED, inputs=DRIVES),
    ),
    "hsmm": lambda: Case(
        jaxem.HSMM(
            [0.6, 0.4],
            [[0.0, 1.0], [1.0, 0.0]],
            jaxem.factors.PoissonDuration([1.0, 2.0], 5),
            jaxem.emissions.Poisson([[1.5], [6.0]]),
        ),
        jax.tree.map(jnp.asarray, _ragged(COUNTED)),
    ),
    "from_functions": _functions,
}
HMMS = [name for name in CASES if name.startswith("hmm-")]
REGRESSIONS = ["linear-regression", "logistic-regression", "poisson-regression"]
NESTED = ["mixture-emission"]  # parts of its own are latent: no responsibilities fix its sums
ITERATIVE = ["student-t", "negative-binomial", "gamma", "von-mises-fisher"]
OPEN = ["gradient-emission", "labels", "experts", "log-joint"]
_APART = {"from_functions", "hsmm", *OPEN, *HMMS, *REGRESSIONS, *NESTED, *ITERATIVE}
EMISSIONS = [name for name in CASES if name not in _APART]
FAMILIES = [*EMISSIONS, *REGRESSIONS, *NESTED]
