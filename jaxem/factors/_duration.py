"""How long a segment of a hidden semi-Markov model lasts: p(d), d = 1 … D, for each state.

The statistics are expected counts n (k, D) of segments by duration, whatever the family: they
depend on the data alone and need no reframing. The M-step maximises Σ n(d) log p(d), with the
truncation to D steps taken into account. The parametric families are written by their ratios,

    p(d + 1) / p(d) = λ / d   (Poisson),    (α + d − 1) / d · μ / (α + μ)   (negative binomial),

whose logs, cumulated and normalised, lose no digits where log-gammas cancel.

Johnson, Kemp & Kotz (2005), *Univariate Discrete Distributions*, sections 4.10 and 5.11.
"""

import abc
import math
from typing import Any, ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_count
from jaxem._core.constraints import leaves_of, positive, simplex
from jaxem._core.newton import maximize_by_newton
from jaxem._core.numerics import divide, float_dtype, pseudo_count
from jaxem._core.parameters import Frozen, free, leading_size, update
from jaxem._core.statistics import Framed
from jaxem.factors._base import AbstractFactor
from jaxem.factors._simplex import log_shares


class AbstractDuration(AbstractFactor):
    """K distributions over durations of 1 … D steps, one for each state.

    Leaves are unconstrained, with the states as leading axis, as in emissions.
    """

    max_duration: eqx.AbstractVar[int]

    @abc.abstractmethod
    def log_prob(self) -> Float[Array, "k D"]:
        """log p(d) of d = 1 … D; finite."""

    @property
    def num_states(self) -> int:
        return leading_size(self, next(iter(self.parameters)))

    def tilt(self) -> Float[Array, "k D"]:
        return jnp.zeros((self.num_states, self.max_duration), float_dtype(self))

    def expected_log_prob(self, sums: Float[Array, "k D"]) -> Float[Array, ""]:
        """Q(self; sums) = Σ n(d) log p(d)."""
        return jnp.sum(sums * self.log_prob())

    def reframe(self, sums: Float[Array, "k D"], old: Self) -> Float[Array, "k D"]:
        return sums

    def prior(self, count: ArrayLike = 0.0, **parameters: ArrayLike) -> Framed:
        """A prior as pseudo-observations: `count` segments of a law of this family.

        The law is self with other `parameters`, such as `rate=2.0`. With n segments of a uniform
        law the shares of a `CategoricalDuration` have the Dirichlet prior of concentration
        n/D + 1. (Any other counts (k, D) make a prior as well: `Framed(counts, self)`.)

        **Arguments:** `count` ≥ 0, one number or (k,).

        **Raises:** `ValueError` for a negative count, another shape, or parameters that the family
        does not have.
        """
        law = self.with_parameters(**parameters).log_prob()
        counts = pseudo_count("count", count, law[:, 0])
        return Framed(counts[:, None] * jnp.exp(law), self)

    @property
    def mean_duration(self) -> Float[Array, " k"]:
        """Expected number of steps of a segment of each state."""
        probability = jnp.exp(self.log_prob())
        return la.matmul(probability, jnp.arange(1, self.max_duration + 1, dtype=probability.dtype))

    def sample(self, key: Array, z: Int[Array, " n"]) -> Int[Array, " n"]:
        """The duration of one segment of state z for each entry of `z`."""
        return 1 + jax.random.categorical(key, self.log_prob()[z])


class CategoricalDuration(AbstractDuration):
    """Any distribution over 1 … D steps: p(d) for each.

    **Arguments:** `probability` (k, D), rows in the simplex; a 0 is floored at the smallest
    normal number.

    **Raises:** `ValueError` for another shape or values that are not probabilities.
    """

    parameters: ClassVar = {"probability": simplex("logits", "k max_duration")}
    logits: Float[Array, "k D"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        leaves = leaves_of(self.parameters, probability=probability)
        self.logits, self.frozen = leaves["logits"], ()

    @property
    def probability(self) -> Float[Array, "k D"]:
        return jax.nn.softmax(self.logits, axis=1)

    @property
    def max_duration(self) -> int:
        return self.logits.shape[1]

    @property
    def num_free_parameters(self) -> int:
        return int(np.sum(free(self, "probability"))) * (self.logits.shape[1] - 1)

    def log_prob(self) -> Float[Array, "k D"]:
        return jax.nn.log_softmax(self.logits, axis=1)

    def m_step(self, sums: Float[Array, "k D"]) -> Self:
        return update(self, logits=log_shares(sums, self.logits))


class AbstractParametricDuration(AbstractDuration):
    """Durations of a family that is written by its ratios; each parameter is one number a state."""

    @classmethod
    @abc.abstractmethod
    def log_ratios(cls, leaves: Float[Array, "*k p"], d: Float[Array, " D-1"]) -> Array:
        """log p(d + 1) / p(d), shape (*k, D − 1), from the leaves in the order of `parameters`."""

    @property
    def num_free_parameters(self) -> int:
        return int(np.sum(np.minimum(np.sum(self._free(), axis=1), self.max_duration - 1)))

    def log_prob(self) -> Float[Array, "k D"]:
        return _log_prob(self.log_ratios, self._leaves(), self.max_duration)

    def m_step(self, sums: Float[Array, "k D"]) -> Self:
        found = _maximum(self.log_ratios, self._leaves(), sums, self._free())
        leaves = (parameter.leaf for parameter in self.parameters.values())
        return update(self, **dict(zip(leaves, found.T, strict=True)))

    def _leaves(self) -> Float[Array, "k p"]:
        return jnp.stack([getattr(self, p.leaf) for p in self.parameters.values()], axis=1)

    def _free(self) -> np.ndarray:
        return np.stack([free(self, name) for name in self.parameters], axis=1)


class PoissonDuration(AbstractParametricDuration):
    """d − 1 ~ Poisson(λ), truncated to d ≤ D.

    **Arguments:** `rate` (k,), λ, not negative; `max_duration`, D. The M-step keeps rates
    between eps and D/√eps of the dtype, beyond which rounding hides what they do.

    **Raises:** `ValueError` for another shape, a negative rate, or `max_duration` < 1.
    """

    parameters: ClassVar = {"rate": positive("log_rate", "k", zero=True)}
    log_rate: Float[Array, " k"]
    max_duration: int = eqx.field(static=True)
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, rate: ArrayLike, max_duration: int):
        check_count("max_duration", max_duration)
        self.log_rate = leaves_of(self.parameters, rate=rate)["log_rate"]
        self.max_duration, self.frozen = max_duration, ()

    @property
    def rate(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_rate)

    @classmethod
    def log_ratios(cls, leaves, d):
        return leaves - jnp.log(d)


class NegativeBinomialDuration(AbstractParametricDuration):
    """d − 1 ~ NB(μ, α), of mean μ and variance μ + μ²/α, truncated to d ≤ D.

    Concentration 1 gives geometric durations, those of a Markov chain that stays with probability
    μ/(1 + μ); a large one gives a Poisson distribution.

    **Arguments:** `mean` (k,), μ, before truncation; `concentration` (k,), α > 0; `max_duration`,
    D. The M-step keeps concentrations between √eps and 1/√eps of the dtype, means as for
    `PoissonDuration`.

    **Raises:** `ValueError` for another shape, a negative mean or concentration, or
    `max_duration` < 1.
    """

    parameters: ClassVar = {
        "mean": positive("log_mean", "k", zero=True),
        "concentration": positive("log_concentration", "k", zero=True, broadcasts=True),
    }
    log_mean: Float[Array, " k"]
    log_concentration: Float[Array, " k"]
    max_duration: int = eqx.field(static=True)
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, concentration: ArrayLike, max_duration: int):
        check_count("max_duration", max_duration)
        leaves = leaves_of(self.parameters, mean=mean, concentration=concentration)
        self.log_mean, self.log_concentration = leaves["log_mean"], leaves["log_concentration"]
        self.max_duration, self.frozen = max_duration, ()

    @property
    def mean(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_mean)

    @property
    def concentration(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_concentration)

    @classmethod
    def log_ratios(cls, leaves, d):
        log_mean, log_alpha = leaves[..., :1], leaves[..., 1:]
        # log (α + d − 1) − log (α + μ) about α, which may be large
        grown = jax.nn.softplus(la.floored_log(d - 1) - log_alpha)
        shrunk = jax.nn.softplus(log_mean - log_alpha)
        return log_mean + grown - shrunk - jnp.log(d)


def _log_prob(log_ratios: Any, leaves: Float[Array, "*k p"], longest: int) -> Float[Array, "*k D"]:
    ratios = log_ratios(leaves, jnp.arange(1, longest, dtype=leaves.dtype))
    first = jnp.zeros((*leaves.shape[:-1], 1), leaves.dtype)
    relative = jnp.concatenate([first, jnp.cumsum(ratios, axis=-1)], axis=-1)
    return jax.nn.log_softmax(relative, axis=-1)


@eqx.filter_jit  # an eager call compiles once
def _maximum(
    log_ratios: Any,
    leaves: Float[Array, "k p"],
    counts: Float[Array, "k D"],
    is_free: np.ndarray,
) -> Float[Array, "k p"]:
    """The maximum of Σ n(d) log p(d) for each state; leaves as they are where n is zero."""
    longest, log_eps = counts.shape[1], math.log(jnp.finfo(leaves.dtype).eps)
    bounds = [(log_eps, math.log(longest) - log_eps / 2), (log_eps / 2, -log_eps / 2)]
    lower, upper = np.array(bounds[: leaves.shape[1]]).T.astype(leaves.dtype)
    total = jnp.sum(counts, axis=1, keepdims=True)

    def mean_log_prob(theta: Array, shares: Array) -> Array:
        return jnp.sum(shares * _log_prob(log_ratios, theta, longest))

    def one(start: Array, shares: Array, is_free: Array) -> Array:
        begin = lax.stop_gradient(start)
        least, most = jnp.minimum(lower, begin), jnp.maximum(upper, begin)
        return maximize_by_newton(
            mean_log_prob, start, shares, free=is_free, lower=least, upper=most
        )

    found = jax.vmap(one)(leaves, divide(counts, total), jnp.asarray(is_free))
    return jnp.where(total > 0, found, leaves)
