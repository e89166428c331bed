"""Every model × emission, as small as compiles fast: a new one joins the law tests by a line here.

A case is a model that has not converged, data, a prior of the components (or None), and the laws
of `check_model` that do not apply to it.
"""

from typing import Any, NamedTuple

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

MEAN = np.array([[0.3, -0.2], [1.9, 2.4]])
FULL = np.array([[[1.0, 0.2], [0.2, 0.8]], [[1.5, -0.3], [-0.3, 0.9]]])
SHARES = np.array([[[0.5, 0.3, 0.2], [0.2, 0.2, 0.6]], [[0.3, 0.4, 0.3], [0.5, 0.2, 0.3]]])


def _mixture(components):
    return jaxem.Mixture(jnp.array([0.4, 0.6]), components)


def _gaussian(**kwargs):
    return lambda c: c.prior(mean=[0.5, 1.0], mean_count=1.5, covariance_count=7.0, **kwargs)


def _scaled(c):
    return c.prior(mean=[0.5, 1.0], mean_count=1.5, variance=0.8, variance_count=6.0)


def _case(components, data, prior):
    data = jax.tree.map(jnp.asarray, data)
    return Case(_mixture(components), data, prior(components))


def _plain_e_step(params, data, weights=None):
    """A mixture of two Poisson laws written as a plain E-step."""
    x, (share, rate) = data[:, 0], params
    joint = jnp.log(jnp.stack([share, 1 - share])) + x[:, None] * jnp.log(rate) - rate
    joint = joint - jax.scipy.special.gammaln(x + 1)[:, None]
    w = jnp.ones(len(x), rate.dtype) if weights is None else weights
    log_prob = jax.nn.logsumexp(joint, axis=1)
    r = w[:, None] * jnp.exp(joint - log_prob[:, None])
    return (r.sum(0), r.T @ x), jnp.sum(w * log_prob)


def _plain_m_step(sums):
    counts, totals = sums
    return counts[0] / counts.sum(), totals / counts


def _functions():
    params = (jnp.array(0.4), jnp.array([1.5, 5.0]))
    laws = {
        "additivity over units",  # its functions may count anything
        "Fisher's identity",  # nor has it a Q,
        "free leaves",  # nor parameters with names
        "held is not updated",
    }
    return Case(
        jaxem.from_functions(_plain_e_step, _plain_m_step, params),
        jnp.asarray(COUNTS, float),
        None,
        frozenset(laws),
    )


CASES = {
    "gaussian": lambda: _case(jaxem.Gaussian(MEAN, FULL), POINTS, _gaussian(covariance=FULL[0])),
    "tied": lambda: _case(jaxem.TiedGaussian(MEAN, FULL[0]), POINTS, _gaussian()),
    "diagonal": lambda: _case(
        jaxem.DiagonalGaussian(MEAN, [[1.0, 0.8], [0.6, 1.2]]), POINTS, _scaled
    ),
    "diagonal-tied": lambda: _case(jaxem.DiagonalGaussian(MEAN, [1.0, 0.8]), POINTS, _scaled),
    "spherical": lambda: _case(jaxem.SphericalGaussian(MEAN, [1.0, 0.7]), POINTS, _scaled),
    "spherical-tied": lambda: _case(jaxem.SphericalGaussian(MEAN, 0.9), POINTS, _scaled),
    "bernoulli": lambda: _case(
        jaxem.Bernoulli([[0.2, 0.5, 0.4], [0.6, 0.5, 0.8]]), BITS, lambda c: c.prior(2.0, 1.5)
    ),
    "categorical": lambda: _case(jaxem.Categorical(SHARES), CODES, lambda c: c.prior(1.5)),
    "multinomial": lambda: _case(jaxem.Multinomial(SHARES[:, 0]), TALLIES, lambda c: c.prior(2.0)),
    "poisson": lambda: _case(
        jaxem.Poisson([[1.0, 3.0], [5.0, 4.0]]), COUNTS, lambda c: c.prior(2.0, 0.5)
    ),
    "exponential": lambda: _case(
        jaxem.Exponential([[1.0, 0.5], [0.2, 0.4]]), DURATIONS, lambda c: c.prior(3.0, 2.0)
    ),
    "independent": lambda: _case(
        jaxem.Independent(
            [jaxem.SphericalGaussian(MEAN, [1.0, 0.7]), jaxem.Poisson([[1.0, 3.0], [5.0, 4.0]])]
        ),
        (POINTS, COUNTS),
        lambda c: c.prior(None, c.parts[1].prior(2.0, 0.5)),
    ),
    "from_functions": _functions,
}
EMISSIONS = [name for name in CASES if name != "from_functions"]
