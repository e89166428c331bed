"""Negative binomial components: overdispersed counts, independent given the component.

With mean μ and concentration s (variance μ + μ²/s) a count is a sum of N logarithmic variables,
where N ~ Poisson(s log(1 + μ/s)): groups of sizes x₁ + … + x_N = x. With q = (x − μ)/(s + μ) and
p = s (x − μ)/(μ (x + s)),

    log p = Σ_d s log(1 + q) − x log(1 + p) + what x and s add,

where the linear terms of the logarithms are taken together when x is near μ. The complete-data
log-density, up to terms in the data and N alone, is

    N log s − s log(1 + μ/s) − x log(1 + s/μ).

E-step. E N = s (ψ(x + s) − ψ(s)). Statistics are Σr, Σr (x − μ)/σ with σ² = μ + μ²/s, and Σr g with
g = E N − s log(1 + μ/s) − (x − μ) s/(s + μ), which is small both for s ≫ μ (N is near x) and for
s ≪ μ (N is near its mean).

M-step. μ ← Σr x / Σr, whatever s is: the rate at which μ converges is that of the mixture alone,
unlike with the Poisson–gamma augmentation. Then s maximises the above by Newton's method in log s.

Adamidis (1999), Aust. N. Z. J. Stat. 41; Quenouille (1949), Biometrics 5.
"""

import math
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import softplus
from jaxtyping import Array, Float, Num
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, positive
from jaxem._core.newton import maximize_each
from jaxem._core.numerics import divide, factorial_remainder
from jaxem._core.parameters import Frozen, update
from jaxem._core.special import binet, binet_slope, log1p_minus
from jaxem._core.supports import counts
from jaxem.emissions._family import AbstractExponentialFamily

_BOUNDS = math.log(1e-4), math.log(1e6)


class GroupTotals(NamedTuple):
    count: Float[Array, "k d"]  # Σ r
    excess: Float[Array, "k d"]  # Σ r (x − μ) / σ
    groups: Float[Array, "k d"]  # Σ r g, the groups beyond what μ and x − μ foretell


class NegativeBinomial(AbstractExponentialFamily):
    """Independent counts with variance mean + mean²/concentration.

    **Arguments:** `mean` (k, d), not negative (0 is floored at the smallest normal number);
    `concentration` (k, d), positive. Data: counts (n, d), integers or whole floating numbers.
    `prior(count, mean=…, concentration=…)` counts observations and their groups.

    Estimated concentrations lie in [10⁻⁴, 10⁶]. 10⁶ is the Poisson law to six digits: counts that
    are not overdispersed have no finite estimate, and in float32 a fit can stop on the way there,
    where the likelihood is flat. A component at 10⁻⁴ is `degenerate`.

    **Raises:** `ValueError` for another shape, a negative mean or a concentration that is
    not positive.
    """

    parameters: ClassVar = {
        "mean": positive("log_mean", "k d", zero=True),
        "concentration": positive(
            "log_concentration",
            "k d",
            bounds=lambda dtype: _BOUNDS,
            collapsed="lower",
            role="shape",
        ),
    }
    support: ClassVar = counts("n d")
    log_mean: Float[Array, "k d"]
    log_concentration: Float[Array, "k d"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, concentration: ArrayLike):
        leaves = leaves_of(self.parameters, mean=mean, concentration=concentration)
        self.log_mean, self.log_concentration = leaves["log_mean"], leaves["log_concentration"]
        self.frozen = ()

    @property
    def mean(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_mean)

    @property
    def concentration(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_concentration)

    @property
    def _deviation(self) -> Float[Array, "k d"]:
        """√(μ + μ²/s)."""
        return jnp.exp(0.5 * (self.log_mean + softplus(self.log_mean - self.log_concentration)))

    @property
    def _mean_groups(self) -> Float[Array, "k d"]:
        """s log(1 + μ/s), the mean of N."""
        return self.concentration * softplus(self.log_mean - self.log_concentration)

    @property
    def _share(self) -> Float[Array, "k d"]:
        """s/(s + μ)."""
        return jax.nn.sigmoid(self.log_concentration - self.log_mean)

    def log_prob(self, x: Num[Array, "n d"], tilt: GroupTotals) -> Float[Array, "n k"]:
        x = x.astype(self.log_mean.dtype).T
        mean, concentration = self.mean[:, :, None], self.concentration[:, :, None]
        log_mean, log_concentration = self.log_mean[:, :, None], self.log_concentration[:, :, None]
        after, total = x + concentration, mean + concentration
        q = (x - mean) / total
        log_q = _log1p(q, jnp.log(after / total))
        p = (x - mean) / after * jnp.exp(jnp.minimum(log_concentration - log_mean, 60))
        log_p = _log1p(p, jnp.log(jnp.where(x > 0, x, 1)) - log_mean - log_q)
        near = (jnp.abs(q) < 0.04) & (jnp.abs(p) < 0.04)
        close_p = jnp.where(near, p, 0)
        q_minus = log1p_minus(q, log_q)
        close = concentration * (q_minus - close_p * q) - x * log1p_minus(close_p, close_p)
        own = jnp.where(near, close, concentration * log_q - x * log_p)
        own = own - 0.5 * jnp.log1p(x / concentration) + binet(after) - binet(concentration)
        groups = (
            concentration * (q_minus + binet_slope(after) - binet_slope(concentration))
            + 0.5 * x / after
        )
        own = own + (tilt.excess / self._deviation)[:, :, None] * (x - mean)
        own = jnp.sum(own + tilt.groups[:, :, None] * groups, axis=1)
        own = own + la.repeat(jnp.sum(tilt.count, axis=1), x.shape[1])
        return (own - jnp.sum(factorial_remainder(x), axis=0)).T

    def canonical(self):
        log_s, per_x = self.log_concentration, softplus(self.log_concentration - self.log_mean)
        return GroupTotals(
            self._mean_groups * (log_s - 1) - self.mean * per_x,
            self._deviation * (self._share * log_s - per_x),
            log_s,
        )

    def expected(self):
        one, zero = jnp.ones_like(self.log_mean), jnp.zeros_like(self.log_mean)
        return GroupTotals(one, zero, zero)

    def maximize(self, sums):
        excess, groups = self._totals(sums)
        mean = jnp.maximum(self.mean + divide(excess, sums.count), 0)
        moved = update(self, log_mean=la.floored_log(mean))
        if not np.any(self.free("concentration")):
            return {"log_mean": moved.log_mean}
        log_concentration = maximize_each(
            _mean_log_prob,
            self.log_concentration,
            divide(groups, sums.count),
            mean,
            moved.log_mean,
            free=(sums.count > 0) & self.free("concentration")[:, None],
            bounds=_BOUNDS,
        )
        return {"log_mean": moved.log_mean, "log_concentration": log_concentration}

    def _totals(self, sums: GroupTotals) -> tuple[Array, Array]:
        """Σ r (x − μ) and Σ r E N."""
        excess = sums.excess * self._deviation
        return excess, sums.count * self._mean_groups + excess * self._share + sums.groups

    def reframe(self, sums, old):
        excess, groups = old._totals(sums)
        excess = excess + sums.count * (old.mean - self.mean)
        groups = groups - sums.count * self._mean_groups - excess * self._share
        return GroupTotals(sums.count, excess / self._deviation, groups)

    def sample(self, key, z):
        rate_key, key = jax.random.split(key)
        log_share = (self.log_mean - self.log_concentration)[z]
        log_rate = jax.random.loggamma(rate_key, self.concentration[z]) + log_share
        return jax.random.poisson(key, jnp.exp(log_rate))


def _log1p(x: Array, log1p: Array) -> Array:
    """log(1 + x), by the `log1p` that is given where x is large or near −1."""
    small = jnp.abs(x) < 0.5
    return jnp.where(small, jnp.log1p(jnp.where(small, x, 0)), log1p)


def _mean_log_prob(
    log_concentration: Array, groups: Array, average: Array, log_mean: Array
) -> Float[Array, ""]:
    """Q of one observation at a mean, for E N and x on average."""
    gap = log_concentration - log_mean
    own = groups * log_concentration - jnp.exp(log_concentration) * softplus(-gap)
    return own - average * softplus(gap)
