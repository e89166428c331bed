"""Gamma components: positive numbers, independent given the component.

E-step. With concentration α, rate β, mean m = α/β and e = x/m − 1,

    log p = Σ_d [α log α − α − log Γ(α) + α ℓ − log x],    ℓ = log(x/m) − e,

in which nothing cancels: ℓ is about −e²/2. Statistics are Σr, Σr e and Σr ℓ, which have no unit.
Reframing to the mean m/c: e′ = c e + (c − 1), ℓ′ = ℓ + (1 − c) e + log c − (c − 1).

M-step. Mean and concentration are orthogonal: the mean is that of the data, c = 1/(1 + Σr e/Σr),
and the concentration maximises α log α − α − log Γ(α) + α Σr ℓ′/Σr, by Newton's method in log α.

Minka (2002), *Estimating a Gamma distribution*.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, positive, resolved_concentrations
from jaxem._core.newton import maximize_each
from jaxem._core.numerics import ROUNDINGS, divide
from jaxem._core.parameters import Frozen
from jaxem._core.scales import MIN_SPREAD, check_min_spread
from jaxem._core.special import binet_slope, gamma_log_norm, log1p_minus
from jaxem._core.supports import positives
from jaxem.emissions._family import AbstractSpread


class RelativeTotals(NamedTuple):
    count: Float[Array, "k d"]  # Σ r
    excess: Float[Array, "k d"]  # Σ r (x/m − 1)
    log_excess: Float[Array, "k d"]  # Σ r (log(x/m) − x/m + 1)


class Gamma(AbstractSpread):
    """Independent positive numbers, x_d ~ Gamma(α_kd, β_kd) with mean α/β and variance α/β².

    **Arguments:** `concentration` α (k, d) and `rate` β (k, d), positive; `min_spread` in [0, 1).
    Data: floating, positive, (n, d). `prior(count, concentration=…, rate=…)` is the conjugate
    prior.

    Estimated concentrations end at 10⁻³ and where the standard deviation is 8 roundings of the
    mean; there a component is `degenerate`. It is so, too, if its squared coefficient of variation
    1/α is below `min_spread` of the average one.

    **Raises:** `ValueError` for another shape or values that are not positive.
    """

    parameters: ClassVar = {
        "concentration": positive(
            "log_concentration",
            "k d",
            bounds=resolved_concentrations,
            collapsed="both",
            role="spread",
            inverse_spread=True,
            least_count=2,
        ),
        "rate": positive("log_rate", "k d", bounds=None),
    }
    support: ClassVar = positives("n d")
    log_concentration: Float[Array, "k d"]
    log_rate: Float[Array, "k d"]
    frozen: Frozen = eqx.field(static=True)
    min_spread: float = eqx.field(static=True)

    def __init__(
        self, concentration: ArrayLike, rate: ArrayLike, *, min_spread: float = MIN_SPREAD
    ):
        leaves = leaves_of(self.parameters, concentration=concentration, rate=rate)
        self.log_concentration, self.log_rate = leaves["log_concentration"], leaves["log_rate"]
        self.frozen, self.min_spread = (), check_min_spread(min_spread)

    @property
    def concentration(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_concentration)

    @property
    def rate(self) -> Float[Array, "k d"]:
        return jnp.exp(self.log_rate)

    @property
    def _log_mean(self) -> Float[Array, "k d"]:
        return self.log_concentration - self.log_rate

    def log_prob(self, x: Float[Array, "n d"], tilt: RelativeTotals) -> Float[Array, "n k"]:
        x, concentration = x.T, self.concentration
        log_mean = self._log_mean[:, :, None]
        mean = jnp.exp(log_mean)
        excess = (x - mean) / mean
        log_excess = log1p_minus(excess, jnp.log(x) - log_mean)
        own = la.matmul(tilt.excess[:, None, :], excess)
        own = own + la.matmul((concentration + tilt.log_excess)[:, None, :], log_excess)
        log_norm = jnp.sum(gamma_log_norm(concentration) + tilt.count, axis=1)
        return (la.repeat(log_norm, x.shape[1]) + own[:, 0] - jnp.sum(jnp.log(x), axis=0)).T

    def canonical(self):
        log_norm = gamma_log_norm(self.concentration)
        return RelativeTotals(log_norm, jnp.zeros_like(log_norm), self.concentration)

    def expected(self):
        one = jnp.ones_like(self.log_rate)
        # E log(x/m) = ψ(α) − log α
        log_excess = binet_slope(self.concentration) - 0.5 / self.concentration
        return RelativeTotals(one, jnp.zeros_like(one), log_excess)

    def maximize(self, sums):
        excess, log_excess = (divide(total, sums.count) for total in sums[1:])
        # Near −1 the excess has no digits left: the geometric mean of x/m stands in
        known = 1 + excess > ROUNDINGS * jnp.finfo(excess.dtype).eps
        growth = jnp.where(known, jnp.log1p(jnp.where(known, excess, 0)), excess + log_excess)
        log_concentration, free = self.log_concentration, self.free("concentration")
        if np.any(free):
            log_concentration = maximize_each(
                _mean_log_prob,
                log_concentration,
                excess,
                log_excess,
                growth,
                log_concentration,
                jnp.asarray(self.free("rate"))[:, None],
                free=(sums.count > 0) & free[:, None],
                bounds=resolved_concentrations(growth.dtype),
            )
        log_rate = log_concentration - self._log_mean - growth
        return {"log_concentration": log_concentration, "log_rate": log_rate}

    def reframe(self, sums, old):
        return _rescaled(sums, old._log_mean - self._log_mean)

    def sample(self, key, z):
        return jnp.exp(jax.random.loggamma(key, self.concentration[z]) - self.log_rate[z])


def _rescaled(sums: RelativeTotals, log_ratio: Array) -> RelativeTotals:
    """Sums about the mean m, about m exp(−log_ratio) instead."""
    rise = jnp.expm1(log_ratio)
    log_rise = log1p_minus(rise, log_ratio)
    return RelativeTotals(
        sums.count,
        sums.excess + rise * (sums.excess + sums.count),
        sums.log_excess - rise * sums.excess + sums.count * log_rise,
    )


def _mean_log_prob(
    log_concentration: Array,
    excess: Array,
    log_excess: Array,
    growth: Array,
    old: Array,
    rate_free: Array,
) -> Float[Array, ""]:
    """Q of one observation at the mean of the data, or at the old rate where that is frozen."""
    log_ratio = jnp.where(rate_free, -growth, old - log_concentration)
    about = _rescaled(RelativeTotals(jnp.ones_like(excess), excess, log_excess), log_ratio)
    concentration = jnp.exp(log_concentration)
    return gamma_log_norm(concentration) + concentration * about.log_excess
