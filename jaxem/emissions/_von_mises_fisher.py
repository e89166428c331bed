"""Von Mises–Fisher components: directions, unit vectors in R^d, d ≥ 2.

E-step. For unit vectors x and μ, κ μᵀx = κ − ½ κ ‖x − μ‖², so that

    log p = c(κ) − ½ κ ‖x − μ‖²,    c(κ) = ν log κ − ½ d log 2π − log(e^−κ I_ν(κ)),  ν = d/2 − 1,

keeps its digits where κ is large and all x are near μ. Statistics are Σr, Σr (x − μ) and
Σr ½‖x − μ‖². Reframing: ½‖x − μ′‖² = ½‖x − μ‖² + (x − μ)ᵀ(μ − μ′) + ½‖μ − μ′‖².

M-step. μ ∝ Σr x, then κ maximises c(κ) − κ Σr ½‖x − μ‖²/Σr by Newton's method in log κ: where
1 − I_{ν+1}/I_ν is one minus the mean resultant length.

Banerjee, Dhillon, Ghosh & Sra (2005), J. Mach. Learn. Res. 6; Mardia & Jupp (2000), *Directional
Statistics*, 10.3. Samples: Wood (1994), Commun. Stat. Simul. 23.
"""

import functools
from typing import Any, ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import direction, leaves_of, positive, resolved_concentrations
from jaxem._core.newton import maximize_each
from jaxem._core.numerics import divide
from jaxem._core.parameters import Frozen, update
from jaxem._core.scales import MIN_SPREAD, check_min_spread
from jaxem._core.special import vmf_dispersion, vmf_log_norm
from jaxem._core.supports import directions
from jaxem.emissions._family import AbstractSpread

UNIT_TOLERANCE = 1e-4  # of the norm of an observation


class Directions(NamedTuple):
    count: Float[Array, " k"]  # Σ r
    first: Float[Array, "k d"]  # Σ r (x − μ)
    second: Float[Array, " k"]  # Σ r ½‖x − μ‖²


class VonMisesFisher(AbstractSpread):
    """Unit vectors around a direction, with density proportional to exp(κ μᵀx) on the sphere.

    **Arguments:** `direction` (k, d), not zero, of any length, d ≥ 2; `concentration` (k,) or (),
    positive; `min_spread` in [0, 1). Data: floating (n, d), each observation of norm 1 to four
    digits. `prior(count, direction=…, concentration=…)` is the conjugate prior.

    Estimated concentrations lie between 10⁻³, which is uniform, and what the rounding of unit
    vectors resolves. A component at the upper end, with fewer observations than dimensions, or
    with 1/κ below `min_spread` of the average, is `degenerate`.

    **Raises:** `ValueError` for other shapes, a zero direction, or a κ that is not positive.
    """

    parameters: ClassVar = {
        "direction": direction("axis", "k d"),
        "concentration": positive(
            "log_concentration",
            "k",
            bounds=resolved_concentrations,
            collapsed="upper",
            role="spread",
            inverse_spread=True,
            least_count="d",
            broadcasts=True,
        ),
    }
    support: ClassVar = directions("n d", UNIT_TOLERANCE)
    axis: Float[Array, "k d"]  # of any length
    log_concentration: Float[Array, " k"]
    frozen: Frozen = eqx.field(static=True)
    min_spread: float = eqx.field(static=True)

    def __init__(
        self, direction: ArrayLike, concentration: ArrayLike, *, min_spread: float = MIN_SPREAD
    ):
        leaves = leaves_of(self.parameters, direction=direction, concentration=concentration)
        self.axis, self.log_concentration = leaves["axis"], leaves["log_concentration"]
        if self.axis.shape[1] < 2:
            raise ValueError("VonMisesFisher needs directions in two dimensions or more, got one.")
        self.frozen, self.min_spread = (), check_min_spread(min_spread)

    @property
    def direction(self) -> Float[Array, "k d"]:
        """Unit vectors."""
        return la.unit(self.axis)

    @property
    def concentration(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_concentration)

    def log_prob(self, x: Float[Array, "n d"], tilt: Directions) -> Float[Array, "n k"]:
        at = self.canonical()
        away = x.T - self.direction[:, :, None]
        half_square = 0.5 * jnp.sum(away**2, axis=1)
        own = la.matmul(tilt.first[:, None, :], away)[:, 0]
        own = own + (at.second + tilt.second)[:, None] * half_square
        return (la.repeat(at.count + tilt.count, len(x)) + own).T

    def canonical(self):
        log_norm = vmf_log_norm(self.concentration, self.axis.shape[1])
        return Directions(log_norm, jnp.zeros_like(self.axis), -self.concentration)

    def expected(self):
        second = vmf_dispersion(self.concentration, self.axis.shape[1])
        return Directions(jnp.ones_like(second), -second[:, None] * self.direction, second)

    def maximize(self, sums):
        mean = self.direction + divide(sums.first, sums.count[:, None])
        known = jnp.any(mean != 0, axis=1, keepdims=True)
        axis = jnp.where(known, la.unit(jnp.where(known, mean, self.direction)), self.axis)
        moved = update(self, axis=axis)
        if not np.any(self.free("concentration")):
            return {"axis": axis}
        spread = _moved(sums, self.direction - moved.direction).second
        average = jnp.maximum(divide(spread, sums.count), jnp.finfo(spread.dtype).tiny)
        log_concentration = maximize_each(
            functools.partial(_mean_log_prob, num_features=self.axis.shape[1]),
            self.log_concentration,
            average,
            free=(sums.count > 0) & self.free("concentration"),
            bounds=resolved_concentrations(average.dtype),
        )
        return {"axis": axis, "log_concentration": log_concentration}

    def reframe(self, sums, old):
        return _moved(sums, old.direction - self.direction)

    def sample(self, key, z):
        height_key, key = jax.random.split(key)
        direction, d = self.direction[z], self.axis.shape[1]
        below = _heights(height_key, self.concentration[z], d)[:, None]  # 1 − μᵀx
        noise = jax.random.normal(key, direction.shape, direction.dtype)
        across = la.unit(noise - jnp.sum(noise * direction, axis=1, keepdims=True) * direction)
        return (1 - below) * direction + jnp.sqrt(below * (2 - below)) * across


def _mean_log_prob(log_concentration: Array, average: Array, num_features: int) -> Float[Array, ""]:
    """Q of one observation, for ½‖x − μ‖² on average."""
    concentration = jnp.exp(log_concentration)
    return vmf_log_norm(concentration, num_features) - concentration * average


def _moved(sums: Directions, shift: Float[Array, "k d"]) -> Directions:
    """Sums about μ, about μ − shift instead."""
    half_square = 0.5 * jnp.sum(shift**2, axis=1)
    return Directions(
        sums.count,
        sums.first + sums.count[:, None] * shift,
        sums.second + jnp.sum(sums.first * shift, axis=1) + sums.count * half_square,
    )


def _heights(key: Array, concentration: Float[Array, " n"], d: int) -> Float[Array, " n"]:
    """Draws of 1 − μᵀx by rejection from a transformed Beta law (Wood 1994)."""
    n, half = concentration.shape[0], 0.5 * (d - 1)
    b = half / (concentration + jnp.hypot(concentration, half))
    most = 2 * b / (1 + b)  # 1 − x₀, the height where the envelope touches

    def draw(carry: Any) -> Any:
        count, accepted, kept = carry
        beta_key, uniform_key = jax.random.split(jax.random.fold_in(key, count))
        share = jax.random.beta(beta_key, half, half, (n,), concentration.dtype)
        below = 2 * b * share / (1 - (1 - b) * share)
        # κ(w − x₀) + (d − 1) log[(1 − x₀ w)/(1 − x₀²)], in w = 1 − below and x₀ = 1 − most
        product = below + most - below * most
        ratio = product / (most * (2 - most))
        log_accept = concentration * (most - below) + 2 * half * jnp.log(ratio)
        accept = jnp.log1p(-jax.random.uniform(uniform_key, (n,), b.dtype)) <= log_accept
        kept = jnp.where(accept & ~accepted, below, kept)
        return count + 1, accepted | accept, kept

    begin = (jnp.int32(0), jnp.zeros(n, bool), b)
    return lax.while_loop(lambda carry: ~jnp.all(carry[1]), draw, begin)[2]
