"""How long a segment of a hidden semi-Markov model lasts: p(d), d = 1 … D, for each state.

The statistics are expected counts n (k, D) of segments by duration, whatever the family: they
depend on the data alone and need no reframing. The M-step maximises Σ n(d) log p(d), with the
truncation to D steps taken into account. The parametric families are written by their ratios,

    p(d + 1) / p(d) = λ / d   (Poisson),    (s + d − 1) / d · μ / (s + μ)   (negative binomial),

whose logs, cumulated and normalised, lose no digits where log-gammas cancel.

Johnson, Kemp & Kotz (2005), *Univariate Discrete Distributions*, sections 4.10 and 5.11.
"""

import abc
import math
from collections.abc import Callable
from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_shape, check_values
from jaxem._hold import Held, free, update
from jaxem._newton import maximize_by_newton
from jaxem._repr import describe
from jaxem._statistics import Framed
from jaxem.emissions._common import as_float, divide, filled, pseudo_count
from jaxem.emissions.categorical import check_simplex, log_shares


class AbstractDuration(eqx.Module):
    """K distributions over durations of 1 … D steps, one for each state.

    Leaves are unconstrained, with the states as leading axis, as in emissions.
    """

    natural: eqx.AbstractClassVar[dict[str, tuple[str, ...]]]
    max_duration: eqx.AbstractVar[int]
    held: eqx.AbstractVar[Held]

    def __repr__(self) -> str:
        return describe(self)

    @property
    @abc.abstractmethod
    def num_states(self) -> int: ...

    @property
    @abc.abstractmethod
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves."""

    @abc.abstractmethod
    def log_prob(self) -> Float[Array, "k D"]:
        """log p(d) of d = 1 … D, the coordinates whose cotangents are expected counts; finite."""

    @abc.abstractmethod
    def maximize(self, counts: Float[Array, "k D"]) -> Self:
        """The maximiser of `expected_log_prob`; a state without counts stays where it is."""

    def expected_log_prob(self, counts: Float[Array, "k D"]) -> Float[Array, ""]:
        """Q(self; counts) = Σ n(d) log p(d)."""
        return jnp.sum(counts * self.log_prob())

    def reframe(self, counts: Float[Array, "k D"], old: Self) -> Float[Array, "k D"]:
        return counts

    def prior(self, counts: ArrayLike = 0.0) -> Framed:
        """A prior as pseudo-observations: `counts` segments that lasted 1 … D steps.

        **Arguments:** `counts` ≥ 0, scalar, (D,) or (k, D). With one number c the shares of a
        `CategoricalDuration` have the Dirichlet prior of concentration c + 1.

        **Raises:** `ValueError` for a negative count, or another shape.
        """
        return Framed(pseudo_count("counts", counts, self.log_prob()), self)

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

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"probability": ("logits",)}
    logits: Float[Array, "k D"]
    held: Held = eqx.field(static=True)

    def __init__(self, probability: ArrayLike):
        probability = as_float(probability)
        check_shape("probability", probability, ("k", "max_duration"))
        check_simplex("probability", probability)
        self.logits = la.floored_log(probability)
        self.held = ()

    @property
    def probability(self) -> Float[Array, "k D"]:
        return jax.nn.softmax(self.logits, axis=1)

    @property
    def num_states(self) -> int:
        return self.logits.shape[0]

    @property
    def max_duration(self) -> int:
        return self.logits.shape[1]

    @property
    def num_free_parameters(self) -> int:
        return int(np.sum(free(self, "probability"))) * (self.logits.shape[1] - 1)

    def log_prob(self) -> Float[Array, "k D"]:
        return jax.nn.log_softmax(self.logits, axis=1)

    def maximize(self, counts: Float[Array, "k D"]) -> Self:
        return update(self, logits=log_shares(counts, self.logits))


class PoissonDuration(AbstractDuration):
    """d − 1 ~ Poisson(λ), truncated to d ≤ D.

    **Arguments:** `rate` (k,), λ, not negative; `max_duration`, D. The M-step keeps rates
    between eps and D/√eps of the dtype, beyond which rounding hides what they do.

    **Raises:** `ValueError` for another shape, a negative rate, or `max_duration` < 1.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"rate": ("log_rate",)}
    log_rate: Float[Array, " k"]
    max_duration: int = eqx.field(static=True)
    held: Held = eqx.field(static=True)

    def __init__(self, rate: ArrayLike, max_duration: int):
        self.log_rate = _log_of_positive("rate", rate)
        self.max_duration = _checked_duration(max_duration)
        self.held = ()

    @property
    def rate(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_rate)

    @property
    def num_states(self) -> int:
        return self.log_rate.shape[0]

    @property
    def num_free_parameters(self) -> int:
        return int(np.sum(free(self, "rate"))) * min(self.max_duration - 1, 1)

    def log_prob(self) -> Float[Array, "k D"]:
        return _poisson(self.log_rate[:, None], self.max_duration)

    def maximize(self, counts: Float[Array, "k D"]) -> Self:
        theta = _maximize(_poisson, self.log_rate[:, None], counts, free(self, "rate")[:, None])
        return update(self, log_rate=theta[:, 0])


class NegativeBinomialDuration(AbstractDuration):
    """d − 1 ~ NB(μ, s), of mean μ and variance μ + μ²/s, truncated to d ≤ D.

    Size 1 gives geometric durations, those of a Markov chain that stays with probability
    μ/(1 + μ); a large size gives a Poisson distribution.

    **Arguments:** `mean` (k,), μ, before truncation; `size` (k,), s > 0; `max_duration`, D. The
    M-step keeps sizes between √eps and 1/√eps of the dtype, means as for `PoissonDuration`.

    **Raises:** `ValueError` for another shape, a negative mean or size, or `max_duration` < 1.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"mean": ("log_mean",), "size": ("log_size",)}
    log_mean: Float[Array, " k"]
    log_size: Float[Array, " k"]
    max_duration: int = eqx.field(static=True)
    held: Held = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, size: ArrayLike, max_duration: int):
        self.log_mean = _log_of_positive("mean", mean)
        self.log_size = filled("size", _log_of_positive("size", size), self.log_mean)
        self.max_duration = _checked_duration(max_duration)
        self.held = ()

    @property
    def mean(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_mean)

    @property
    def size(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_size)

    @property
    def num_states(self) -> int:
        return self.log_mean.shape[0]

    @property
    def num_free_parameters(self) -> int:
        of_each_state = free(self, "mean").astype(int) + free(self, "size")
        return int(np.sum(np.minimum(of_each_state, self.max_duration - 1)))

    def _parameters(self) -> Float[Array, "k 2"]:
        return jnp.stack([self.log_mean, self.log_size], axis=1)

    def log_prob(self) -> Float[Array, "k D"]:
        return _negative_binomial(self._parameters(), self.max_duration)

    def maximize(self, counts: Float[Array, "k D"]) -> Self:
        is_free = np.stack([free(self, "mean"), free(self, "size")], axis=1)
        theta = _maximize(_negative_binomial, self._parameters(), counts, is_free)
        return update(self, log_mean=theta[:, 0], log_size=theta[:, 1])


def _log_of_positive(name: str, value: ArrayLike) -> Float[Array, " k"]:
    value = as_float(value)
    check_shape(name, value, ("k",))
    check_values((value >= 0) & jnp.isfinite(value), f"{name} must be finite and not negative.")
    return la.floored_log(value)


def _checked_duration(max_duration: int) -> int:
    if isinstance(max_duration, bool) or not isinstance(max_duration, int) or max_duration < 1:
        raise ValueError(f"max_duration must be a whole number of steps ≥ 1, got {max_duration!r}.")
    return max_duration


def _poisson(parameters: Float[Array, "*k 1"], longest: int) -> Float[Array, "*k D"]:
    log_rate, step = parameters, jnp.arange(1, longest, dtype=parameters.dtype)
    return _from_log_ratios(log_rate - jnp.log(step))


def _negative_binomial(parameters: Float[Array, "*k 2"], longest: int) -> Float[Array, "*k D"]:
    log_mean, log_size = parameters[..., :1], parameters[..., 1:]
    step = jnp.arange(1, longest, dtype=parameters.dtype)
    # log (s + d − 1) − log (s + μ) about s, which may be large
    grown = jax.nn.softplus(la.floored_log(step - 1) - log_size)
    return _from_log_ratios(log_mean + grown - jax.nn.softplus(log_mean - log_size) - jnp.log(step))


def _from_log_ratios(log_ratios: Float[Array, "*k D-1"]) -> Float[Array, "*k D"]:
    first = jnp.zeros((*log_ratios.shape[:-1], 1), log_ratios.dtype)
    log_prob = jnp.concatenate([first, jnp.cumsum(log_ratios, axis=-1)], axis=-1)
    return jax.nn.log_softmax(log_prob, axis=-1)


@eqx.filter_jit  # so that an eager call compiles once
def _maximize(
    family: Callable[[Array, int], Array],
    parameters: Float[Array, "k p"],
    counts: Float[Array, "k D"],
    is_free: np.ndarray,
) -> Float[Array, "k p"]:
    """The maximum of Σ n(d) log p(d) for each state; parameters as they are where n is zero."""
    longest, log_eps = counts.shape[1], math.log(jnp.finfo(parameters.dtype).eps)
    bounds = [(log_eps, math.log(longest) - log_eps / 2), (log_eps / 2, -log_eps / 2)]
    lower, upper = np.array(bounds[: parameters.shape[1]]).T.astype(parameters.dtype)
    total = jnp.sum(counts, axis=1, keepdims=True)

    def mean_log_prob(theta: Array, shares: Array) -> Array:
        return jnp.sum(shares * family(theta, longest))

    def one(start: Array, shares: Array, is_free: Array) -> Array:
        begin = lax.stop_gradient(start)
        least, most = jnp.minimum(lower, begin), jnp.maximum(upper, begin)
        return maximize_by_newton(
            mean_log_prob, start, shares, free=is_free, lower=least, upper=most
        )

    found = jax.vmap(one)(parameters, divide(counts, total), jnp.asarray(is_free))
    return jnp.where(total > 0, found, parameters)
