"""Von Mises–Fisher components: directions, unit vectors in R^d, d ≥ 2.

E-step. For unit vectors x and μ, κ μᵀx = κ − ½ κ ‖x − μ‖², so that

    log p = c(κ) − ½ κ ‖x − μ‖²,    c(κ) = ν log κ − ½ d log 2π − log(e^−κ I_ν(κ)),  ν = d/2 − 1,

keeps its digits where κ is large and all x are near μ. It is linear in ½‖x − μ‖², and
differentiated in a constant and in terms linear in x − μ at 0; the cotangents are the statistics
Σr, Σr (x − μ) and Σr ½‖x − μ‖². Reframing: ½‖x − μ′‖² = ½‖x − μ‖² + (x − μ)ᵀ(μ − μ′) + ½‖μ − μ′‖².

M-step. μ ∝ Σr x, then κ maximises c(κ) − κ Σr ½‖x − μ‖²/Σr by Newton's method in log κ: where
1 − I_{ν+1}/I_ν is one minus the mean resultant length.

Banerjee, Dhillon, Ghosh & Sra (2005), J. Mach. Learn. Res. 6; Mardia & Jupp (2000), *Directional
Statistics*, 10.3. Samples: Wood (1994), Commun. Stat. Simul. 23.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_continuous, check_shape, check_values, num_features
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._newton import maximize_by_newton
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import ROUNDINGS, as_float, divide, filled, pseudo_count
from jaxem.emissions._special import vmf_dispersion, vmf_log_norm

LEAST_CONCENTRATION = 1e-3
UNIT_TOLERANCE = 1e-4  # of the norm of a unit


class Directions(NamedTuple):
    units: Float[Array, " k"]  # Σ r
    first: Float[Array, "k d"]  # Σ r (x − μ)
    second: Float[Array, " k"]  # Σ r ½‖x − μ‖²


class VonMisesFisher(AbstractEmission):
    """Unit vectors around a direction, with density proportional to exp(κ μᵀx) on the sphere.

    **Arguments:** `direction` (k, d), not zero, of any length, d ≥ 2; `concentration` (k,) or (),
    positive. Data: floating (n, d), each unit of norm 1 to four digits.

    Estimated concentrations lie between 10⁻³, which is uniform, and what the rounding of unit
    vectors resolves; a component there, or with 1/κ below `min_variance` of the average, is
    `degenerate`.

    **Raises:** `ValueError` for other shapes, a zero direction, or a κ that is not positive.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "direction": ("axis",),
        "concentration": ("log_concentration",),
    }
    axis: Float[Array, "k d"]  # of any length
    log_concentration: Float[Array, " k"]
    held: Held = eqx.field(static=True)

    def __init__(self, direction: ArrayLike, concentration: ArrayLike):
        direction = as_float(direction)
        check_shape("direction", direction, ("k", "d"))
        if direction.shape[1] < 2:
            raise ValueError("VonMisesFisher needs directions in two dimensions or more, got one.")
        self.axis = _unit(_proper("direction", direction))
        concentration = filled("concentration", concentration, direction[:, 0])
        self.log_concentration = _log_of_positive("concentration", concentration)
        self.held = ()

    @property
    def direction(self) -> Float[Array, "k d"]:
        """Unit vectors."""
        return _unit(self.axis)

    @property
    def concentration(self) -> Float[Array, " k"]:
        return jnp.exp(self.log_concentration)

    @property
    def num_components(self) -> int:
        return self.axis.shape[0]

    @property
    def num_free_parameters(self) -> int:
        directions = int(np.sum(self.free("direction"))) * (self.axis.shape[1] - 1)
        return directions + int(np.sum(self.free("concentration")))

    def check(self, x: Array) -> None:
        check_continuous(x, self.axis.shape[1], self.axis.dtype, "VonMisesFisher")

    def in_support(self, x: Float[Array, "n d"]) -> Bool[Array, " n"]:
        return jnp.abs(jnp.sum(x**2, axis=1) - 1) < 2 * UNIT_TOLERANCE

    def coordinates(self) -> tuple[Array, Array, Array]:
        log_norm = vmf_log_norm(self.concentration, self.axis.shape[1])
        return log_norm, jnp.zeros_like(self.axis), -self.concentration

    def log_prob_at(self, coordinates: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        log_norm, linear, quadratic = coordinates
        away = x.T - self.direction[:, :, None]
        half_square = 0.5 * jnp.sum(away**2, axis=1)
        own = la.matmul(linear[:, None, :], away)[:, 0] + quadratic[:, None] * half_square
        return (la.repeat(log_norm, x.shape[0]) + own).T

    def statistics(self, cotangents: Any) -> Directions:
        return Directions(*cotangents)

    def reframe(self, sums: Directions, old: Self) -> Directions:
        return _moved(sums, old.direction - self.direction)

    def maximize(self, sums: Directions) -> Self:
        some = sums.units > 0
        mean = self.direction + divide(sums.first, sums.units[:, None])
        known = some & jnp.any(mean != 0, axis=1)
        unit = _unit(jnp.where(known[:, None], mean, self.direction))
        moved = self.update(axis=jnp.where(known[:, None], unit, self.axis))
        if not np.any(self.free("concentration")):
            return moved
        spread = _moved(sums, self.direction - moved.direction).second
        average = jnp.maximum(divide(spread, sums.units), jnp.finfo(spread.dtype).tiny)
        free = some & self.free("concentration")
        return moved.update(
            log_concentration=jax.vmap(self._best)(free, self.log_concentration, average)
        )

    def _best(self, free: Array, log_concentration: Array, average: Array) -> Float[Array, ""]:
        def log_prob(theta: Array, average: Array) -> Array:
            concentration = jnp.exp(theta[0])
            return vmf_log_norm(concentration, self.axis.shape[1]) - concentration * average

        least, most = math.log(LEAST_CONCENTRATION), _most(average.dtype)
        start = jnp.clip(log_concentration, least, most)[None]
        found = maximize_by_newton(log_prob, start, average, free=free, lower=least, upper=most)
        return jnp.where(free, found[0], log_concentration)

    def bounded(self) -> Self:
        """Self with concentrations where estimates lie."""
        bounds = math.log(LEAST_CONCENTRATION), _most(self.log_concentration.dtype)
        return self.update(log_concentration=jnp.clip(self.log_concentration, *bounds))

    def expected_log_prob(self, sums: Directions) -> Float[Array, ""]:
        log_norm = vmf_log_norm(self.concentration, self.axis.shape[1])
        return jnp.sum(sums.units * log_norm - self.concentration * sums.second)

    def prior(
        self,
        direction: ArrayLike | None = None,
        concentration: ArrayLike | None = None,
        count: ArrayLike = 0.0,
    ) -> Framed:
        """The conjugate prior, as if `count` units of the law (direction, concentration) were seen.

        Its mode is (direction, concentration).

        **Arguments:** `direction` (d,) or (k, d) and `concentration` () or (k,), default the
        present ones; `count` ≥ 0, scalar or (k,).

        **Raises:** `ValueError` for a negative count, a zero direction or κ that is not positive.
        """
        count = pseudo_count("count", count, self.log_concentration)
        frame = self
        if direction is not None:
            direction = _proper("the prior's direction", filled("direction", direction, self.axis))
            frame = replace(frame, axis=_unit(direction))
        if concentration is not None:
            value = filled("concentration", concentration, self.log_concentration)
            logs = _log_of_positive("the prior's concentration", value)
            frame = replace(frame, log_concentration=logs)
        second = count * vmf_dispersion(frame.concentration, self.axis.shape[1])
        return Framed(Directions(count, -second[:, None] * frame.direction, second), frame)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        d = self.axis.shape[1]
        height_key, key = jax.random.split(key)
        below = _heights(height_key, self.concentration[z], d)[:, None]  # 1 − μᵀx
        direction = self.direction[z]
        noise = jax.random.normal(key, direction.shape, direction.dtype)
        along = jnp.sum(noise * direction, axis=1, keepdims=True)
        return (1 - below) * direction + jnp.sqrt(below * (2 - below)) * _unit(
            noise - along * direction
        )

    def degenerate(self, sums: Directions, min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        log_concentration = self.maximize(sums).log_concentration
        spread = jnp.exp(-log_concentration)
        average = divide(jnp.sum(sums.units * spread), jnp.sum(sums.units))
        thin = (spread < min_variance * average) | (log_concentration >= _most(spread.dtype))
        thin = thin | (sums.units < self.axis.shape[1])
        return (thin & self.free("concentration")) | (sums.units < 1)

    @classmethod
    def pooled(cls, x, num_components, weights):
        check_continuous(x, num_features(x), x.dtype, cls.__name__)
        d = x.shape[1]
        mean = weighted_mean(x, weights)
        first = jnp.zeros_like(mean).at[0].set(1)
        axis = _unit(jnp.where(jnp.any(mean != 0), mean, first))[None]
        zero = jnp.zeros_like(axis[:, 0])
        start = replace(object.__new__(cls), axis=axis, log_concentration=zero, held=())
        second = weighted_mean(0.5 * jnp.sum((x - axis) ** 2, axis=1, keepdims=True), weights)
        fitted = start.maximize(Directions(zero + 1, mean - axis, second))
        return replace(
            fitted,
            axis=jnp.broadcast_to(axis, (num_components, d)),
            log_concentration=jnp.broadcast_to(fitted.log_concentration, (num_components,)),
        )

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        spread = jnp.maximum(spread, jnp.finfo(x.dtype).tiny)
        log_concentration = jnp.minimum(
            self.log_concentration[:1] - jnp.log(spread), _most(x.dtype)
        )
        return replace(
            self, axis=x, log_concentration=jnp.broadcast_to(log_concentration, x.shape[:1])
        )

    def shortcut(self) -> None:
        return None


def _unit(v: Float[Array, "k d"]) -> Float[Array, "k d"]:
    v = v / lax.stop_gradient(jnp.max(jnp.abs(v), axis=-1, keepdims=True))  # squares fit
    return v / jnp.sqrt(jnp.sum(v**2, axis=-1, keepdims=True))


def _moved(sums: Directions, shift: Float[Array, "k d"]) -> Directions:
    """Sums about μ, about μ − shift instead."""
    half_square = 0.5 * jnp.sum(shift**2, axis=1)
    return Directions(
        sums.units,
        sums.first + sums.units[:, None] * shift,
        sums.second + jnp.sum(sums.first * shift, axis=1) + sums.units * half_square,
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


def _most(dtype: Any) -> float:
    """The log-concentration whose deviation is the rounding of a unit vector."""
    return -2 * math.log(ROUNDINGS * jnp.finfo(dtype).eps)


def _proper(name: str, direction: Array) -> Array:
    ok = jnp.isfinite(direction).all(axis=-1) & jnp.any(direction != 0, axis=-1)
    check_values(ok, f"{name} must be finite and not zero.")
    return direction


def _log_of_positive(name: str, value: Array) -> Array:
    check_values((value > 0) & jnp.isfinite(value), f"{name} must be positive and finite.")
    return jnp.log(value)
