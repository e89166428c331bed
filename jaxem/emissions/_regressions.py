"""Regressions of bits and counts on inputs: logistic and Poisson (`_generalized_linear.py`)."""

import math
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of
from jaxem._core.inputs import InputFrame
from jaxem._core.numerics import factorial_remainder, half_deviance
from jaxem._core.parameters import Frozen
from jaxem._core.supports import Regressed, bits, counts
from jaxem.emissions._generalized_linear import AbstractGeneralizedLinear
from jaxem.emissions._regression_base import Link


class LogisticRegression(AbstractGeneralizedLinear):
    """Logistic regressions of bits, P(y_d = 1 | u, z = k) = 1 / (1 + exp(−W_kd·u − b_kd)).

    Its M-step is a Newton step (IRLS), of limited length. Where inputs separate the bits there is
    no maximum, and coefficients grow for ever: such a fit is `degenerate`; give a prior.

    **Arguments:** `coefficients` (k, d, p); `intercept` (k, d), the logit at u = 0. Data: inputs u
    (n, p) and outputs y (n, d) of 0 and 1, a tuple.

    **Raises:** `ValueError` for other shapes or values.
    """

    max_step: ClassVar = 2.0
    support: ClassVar = Regressed(bits("n d"))
    link: ClassVar = Link(of=jax.scipy.special.logit, inverse=jax.nn.sigmoid, share=0.5)
    coefficients: Float[Array, "k d p"]
    intercept: Float[Array, "k d"]
    inputs: InputFrame
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, coefficients: ArrayLike, intercept: ArrayLike):
        given = leaves_of(self.parameters, coefficients=coefficients, intercept=intercept)
        self.coefficients, self.intercept = given["coefficients"], given["intercept"]
        self.inputs, self.frozen = InputFrame.at_zero(self.coefficients), ()

    def log_prob_of(self, eta: Array, y: Array) -> Array:
        return jax.nn.log_sigmoid((2 * y - 1) * eta)

    def weight_of(self, eta: Array) -> Array:
        return jax.nn.sigmoid(eta) * jax.nn.sigmoid(-eta)

    def unit(self) -> Float[Array, "k d"]:
        return jnp.full_like(self.intercept, 0.5)

    def draw(self, key: Any, mean: Array, z: Array) -> Array:
        return jax.random.bernoulli(key, mean).astype(int)


class PoissonRegression(AbstractGeneralizedLinear):
    """Poisson regressions of counts, y_d ~ Poisson(e_d exp(W_kd·u + b_kd)), e an exposure.

    Its M-step is a Newton step (IRLS), of limited length. No bound holds for it everywhere: the
    step is halved where the objective would fall.

    **Arguments:** `coefficients` (k, d, p); `intercept` (k, d), the log-rate at u = 0. Data: inputs
    u (n, p) and counts y (n, d), and perhaps exposures e > 0 (n, d), a tuple.

    **Raises:** `ValueError` for other shapes or values.
    """

    max_step: ClassVar = 1.0
    support: ClassVar = Regressed(counts("n d"), exposures=True)
    link: ClassVar = Link(of=la.floored_log, inverse=jnp.exp, share=0.5)
    coefficients: Float[Array, "k d p"]
    intercept: Float[Array, "k d"]
    inputs: InputFrame
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, coefficients: ArrayLike, intercept: ArrayLike):
        given = leaves_of(self.parameters, coefficients=coefficients, intercept=intercept)
        self.coefficients, self.intercept = given["coefficients"], given["intercept"]
        self.inputs, self.frozen = InputFrame.at_zero(self.coefficients), ()

    def log_prob_of(self, eta: Array, y: Array) -> Array:
        return -half_deviance(y, _bounded(eta)) - factorial_remainder(y)

    def weight_of(self, eta: Array) -> Array:
        return jnp.exp(_bounded(eta))

    def unit(self) -> Float[Array, "k d"]:
        return jnp.exp(0.5 * _bounded(self.centred()[:, :, 0]))

    def draw(self, key: Any, mean: Array, z: Array) -> Array:
        return jax.random.poisson(key, mean)


def _bounded(eta: Array) -> Array:
    """η within the range in which rates, and their squares in sums, can be represented."""
    most = 0.45 * math.log(jnp.finfo(eta.dtype).max)
    return jnp.clip(eta, -most, most)
