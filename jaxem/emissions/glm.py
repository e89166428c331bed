"""Regressions of bits and counts on inputs: logistic and Poisson regression (see `_glm.py`)."""

import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_continuous, check_counts
from jaxem._emission import finite
from jaxem.emissions._common import factorial_remainder, is_count
from jaxem.emissions._glm import GeneralizedLinear
from jaxem.emissions._inputs import check_regression, given_inputs
from jaxem.emissions.poisson import half_deviance


class LogisticRegression(GeneralizedLinear):
    """Logistic regressions of bits, P(y_d = 1 | u, z = k) = 1 / (1 + exp(−W_kd·u − b_kd)).

    Its M-step maximises the quadratic lower bound of Jaakkola & Jordan, w = tanh(η/2) / 2η, so
    that the objective rises at every step; steps are short, and `SQUAREM` pays. Where inputs
    separate the bits there is no maximum, and weights grow for ever: give a prior.

    **Arguments:** `weights` (k, d, p); `bias` (k, d), the logit at u = 0. Data: inputs u (n, p)
    and outputs y (n, d) of 0 and 1, a tuple.

    **Raises:** `ValueError` for other shapes or values.

    Jaakkola & Jordan (2000), Statistics and Computing 10.
    """

    max_step: ClassVar[float] = 1e9

    def __init__(self, weights: ArrayLike, bias: ArrayLike):
        super().__init__(weights, bias)

    def check(self, x: Any) -> None:
        who = type(self).__name__
        check_regression(x, self.weights, who)
        check_counts(x[1], self.bias.shape[1], self.bias.dtype, f"{who} (outputs)")

    def in_support(self, x: Any) -> Bool[Array, " n"]:
        u, y = x
        return finite(u) & jnp.all((y == 0) | (y == 1), axis=1)

    def _log_prob(self, eta: Array, y: Array) -> Array:
        return jax.nn.log_sigmoid((2 * y - 1) * eta)

    def _curvature(self, eta: Array) -> Array:
        near = jnp.abs(eta) < 1e-2
        far = jnp.where(near, 1, eta)
        series = 0.25 - eta**2 / 48 + eta**4 / 480
        return jnp.where(near, series, jnp.tanh(0.5 * far) / (2 * far))

    def _unit(self) -> Float[Array, "k d"]:
        return jnp.full_like(self.bias, 0.5)

    @classmethod
    def _link(cls, mean: Array) -> Array:
        return jax.scipy.special.logit(mean)

    @classmethod
    def _mean(cls, eta: Array) -> Array:
        return jax.nn.sigmoid(eta)

    def sample(
        self, key: Array, z: Int[Array, " n"], inputs: Float[Array, "n p"] | None = None
    ) -> tuple[Array, Array]:
        """Bits drawn from component z at the given `inputs`, and the inputs with them."""
        bits = jax.random.bernoulli(key, self._mean_of(z, inputs))
        return given_inputs(inputs), bits.astype(int)


class PoissonRegression(GeneralizedLinear):
    """Poisson regressions of counts, y_d ~ Poisson(e_d exp(W_kd·u + b_kd)), e an exposure.

    Its M-step is a Newton step (IRLS), of limited length. No bound holds for it everywhere: the
    step is halved where the objective would fall.

    **Arguments:** `weights` (k, d, p); `bias` (k, d), the log-rate at u = 0. Data: inputs u (n, p)
    and counts y (n, d), and perhaps exposures e > 0 (n, d), a tuple.

    **Raises:** `ValueError` for other shapes or values.
    """

    max_step: ClassVar[float] = 1.0

    def __init__(self, weights: ArrayLike, bias: ArrayLike):
        super().__init__(weights, bias)

    def check(self, x: Any) -> None:
        who, d = type(self).__name__, self.bias.shape[1]
        check_regression(x, self.weights, who, most=3)
        check_counts(x[1], d, self.bias.dtype, f"{who} (counts)")
        if len(x) == 3:
            check_continuous(x[2], d, self.bias.dtype, f"{who} (exposures)")

    def in_support(self, x: Any) -> Bool[Array, " n"]:
        u, y, *exposure = x
        counts = jnp.all(is_count(y), axis=1)
        positive = [jnp.all((e > 0) & jnp.isfinite(e), axis=1) for e in exposure]
        return jnp.all(jnp.stack([finite(u), counts, *positive]), axis=0)

    def _log_prob(self, eta: Array, y: Array) -> Array:
        return -half_deviance(y, _bounded(eta)) - factorial_remainder(y)

    def _curvature(self, eta: Array) -> Array:
        return jnp.exp(_bounded(eta))

    def _unit(self) -> Float[Array, "k d"]:
        return jnp.exp(0.5 * _bounded(self._coefficients()[:, :, 0]))

    @classmethod
    def _link(cls, mean: Array) -> Array:
        return la.floored_log(mean)

    @classmethod
    def _mean(cls, eta: Array) -> Array:
        return jnp.exp(eta)

    def sample(
        self,
        key: Array,
        z: Int[Array, " n"],
        inputs: Float[Array, "n p"] | None = None,
    ) -> tuple[Array, Array]:
        """Counts drawn from component z at the given `inputs`, exposures of 1; and the inputs."""
        return given_inputs(inputs), jax.random.poisson(key, self._mean_of(z, inputs))


def _bounded(eta: Array) -> Array:
    """η within the range in which rates, and their squares in sums, can be represented."""
    most = 0.45 * math.log(jnp.finfo(eta.dtype).max)
    return jnp.clip(eta, -most, most)
