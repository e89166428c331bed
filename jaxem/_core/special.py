"""Special functions that keep their digits in float32, with derivatives of every order.

All that concerns Γ rests on Binet's function μ, log Γ(x) = (x − ½) log x − x + ½ log 2π + μ(x), by
its series for x > 8 and below by μ(x) − μ(x + 1) = (x + ½) log(1 + 1/x) − 1. An M-step with
derivatives of `jax.scipy.special.gammaln` instead takes three times as long to compile.

Whittaker & Watson (1927), *A Course of Modern Analysis*, section 12.33.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

# B₂ⱼ / (2j (2j − 1))
_SERIES = (1 / 12, -1 / 360, 1 / 1260, -1 / 1680, 1 / 1188, -691 / 360360, 1 / 156, -3617 / 122400)
_SHIFT = 8
_DEBYE_ORDER = 24


@jax.custom_jvp
def binet(x: Array) -> Array:
    """μ(x) = log Γ(x) − (x − ½) log x + x − ½ log 2π for x > 0, about 1/(12x)."""

    def series(inverse: Array) -> Array:
        return inverse * _polynomial(_SERIES, inverse**2)

    return _shifted(x, series, lambda y: (y + 0.5) * jnp.log1p(1 / y) - 1)


@binet.defjvp
def _binet_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return binet(*primals), binet_slope(*primals) * tangents[0]


@jax.custom_jvp
def binet_slope(x: Array) -> Array:
    """μ′(x) = ψ(x) − log x + 1/(2x), about −1/(12x²)."""

    def series(inverse: Array) -> Array:
        terms = [-(2 * j + 1) * c for j, c in enumerate(_SERIES)]
        return inverse**2 * _polynomial(terms, inverse**2)

    return _shifted(x, series, lambda y: jnp.log1p(1 / y) - 0.5 / y - 0.5 / (y + 1))


@binet_slope.defjvp
def _binet_slope_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return binet_slope(*primals), _binet_curvature(*primals) * tangents[0]


def _binet_curvature(x: Array) -> Array:
    def series(inverse: Array) -> Array:
        terms = [(2 * j + 1) * (2 * j + 2) * c for j, c in enumerate(_SERIES)]
        return inverse**3 * _polynomial(terms, inverse**2)

    return _shifted(x, series, lambda y: 0.5 / (y * (y + 1)) ** 2)


def _shifted(
    x: Array, series: Callable[[Array], Array], difference: Callable[[Array], Array]
) -> Array:
    large = x > _SHIFT
    small = jnp.where(large, 1, x)[..., None]
    below = jnp.sum(difference(small + jnp.arange(_SHIFT, dtype=x.dtype)), axis=-1)
    return series(1 / jnp.where(large, x, x + _SHIFT)) + jnp.where(large, 0, below)


def _polynomial(coefficients: Any, x: Array) -> Array:
    total = jnp.zeros_like(x)
    for c in reversed(coefficients):
        total = total * x + c
    return total


def gamma_log_norm(shape: Array) -> Array:
    """a log a − a − log Γ(a), about ½ log(a/2π)."""
    return 0.5 * jnp.log(shape / (2 * math.pi)) - binet(shape)


def log1p_minus(x: Array, log1p: Array) -> Array:
    """log(1 + x) − x, which is −x²/2 + x³/3 − … near 0; elsewhere by the `log1p` that is given.

    What is near −1 has a logarithm that it no longer knows.
    """
    near = jnp.abs(x) < 0.04
    small = jnp.where(near, x, 0)
    series = _polynomial([(-1) ** (power + 1) / power for power in range(2, 12)], small)
    return jnp.where(near, small**2 * series, log1p - x)


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def vmf_log_norm(concentration: Array, num_features: int) -> Array:
    """log of the density that Fisher's distribution on the sphere in R^d has at its direction.

    That is ν log κ − ½ d log 2π − log(e^−κ I_ν(κ)) with ν = d/2 − 1. An order N ≥ 24 has Debye's
    uniform expansion; from it I_{j−1} = I_j (2j/κ + I_{j+1}/I_j) leads down. All is written in
    1 − I_{j+1}/I_j, which is small for large κ: so nothing cancels, and derivatives do not either.

    NIST Digital Library of Mathematical Functions, 10.41 and 10.29.
    """
    log_bessel = _bessel(concentration, num_features)[0]
    order = num_features / 2 - 1
    return order * jnp.log(concentration) - 0.5 * num_features * math.log(2 * math.pi) - log_bessel


@vmf_log_norm.defjvp
def _vmf_log_norm_jvp(num_features: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    value = vmf_log_norm(*primals, num_features)
    return value, vmf_dispersion(*primals, num_features) * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def vmf_dispersion(concentration: Array, num_features: int) -> Array:
    """1 − I_{d/2}(κ) / I_{d/2−1}(κ), the mean of 1 − μᵀx, and the derivative of the log-norm."""
    return _bessel(concentration, num_features)[1]


@vmf_dispersion.defjvp
def _vmf_dispersion_jvp(num_features: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    value = vmf_dispersion(*primals, num_features)
    return value, _dispersion_slope(*primals, num_features) * tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _dispersion_slope(concentration: Array, num_features: int) -> Array:
    return _bessel(concentration, num_features)[2]


@_dispersion_slope.defjvp
def _dispersion_slope_jvp(num_features: int, primals: Any, tangents: Any) -> tuple[Array, Array]:
    """From the derivative of Riccati's equation, D′ = (d − 1)(1 − D)/κ − (2 − D) D."""
    (kappa,) = primals
    value, slope = vmf_dispersion(kappa, num_features), _dispersion_slope(kappa, num_features)
    turn = (num_features - 1) * ((1 - value) / kappa + slope) / kappa
    return slope, -(turn + 2 * (1 - value) * slope) * tangents[0]


def _bessel(x: Array, num_features: int) -> tuple[Array, Array, Array]:
    """log(e^−x I_ν(x)), D = 1 − I_{ν+1}(x)/I_ν(x) and its derivative, for ν = d/2 − 1."""
    steps = max(0, math.ceil(_DEBYE_ORDER + 1 - num_features / 2))
    top = num_features / 2 - 1 + steps

    def down(carry: tuple[Array, Array, Array], j: Array) -> tuple[Any, None]:
        log_bessel, deficit, slope = carry
        rise = 2 * j / x - deficit
        log_bessel, deficit = log_bessel + jnp.log1p(rise), rise / (1 + rise)
        return (log_bessel, deficit, -(2 * j / x**2 + slope) / (1 + rise) ** 2), None

    orders = jnp.asarray([top - j for j in range(steps)], x.dtype)
    return jax.lax.scan(down, _debye(x, top), orders)[0]


def _debye(x: Array, order: float) -> tuple[Array, Array, Array]:
    """`_bessel` where ν is large.

    log(e^−x I_ν(x)) = r − x − ν asinh(ν/x) − ½ log 2πr + log Σ uⱼ(p)/νʲ with r² = x² + ν², p = ν/r.
    """
    radius = jnp.hypot(x, order)
    p = order / radius
    # derivatives of p; in (x/r)² and p², which cannot overflow
    slope = -p * (x / radius) / radius
    bend = p * (2 * (x / radius) ** 2 - p**2) / radius**2
    polynomial = np.polynomial.Polynomial(_debye_coefficients(order))
    powers = p[..., None] ** np.arange(len(polynomial.coef), dtype=x.dtype)

    def at_p(derivative: int) -> Array:
        coefficients = polynomial.deriv(derivative).coef if derivative else polynomial.coef
        return jnp.sum(powers[..., : len(coefficients)] * coefficients.astype(x.dtype), axis=-1)

    series = at_p(0)
    rise, curve = at_p(1) / series, at_p(2) / series
    value = order**2 / (radius + x) - order * jnp.arcsinh(order / x)
    value = value - 0.5 * jnp.log(2 * math.pi * radius) + jnp.log(series)
    sides = order + x + radius
    deficit = 2 * order / sides + 0.5 * (x / radius) / radius - rise * slope
    change = -2 * order / sides * (1 + x / radius) / sides
    change = change + 0.5 * (p**2 - (x / radius) ** 2) / radius**2
    return value, deficit, change - (curve - rise**2) * slope**2 - rise * bend


@functools.lru_cache
def _debye_coefficients(order: float, num_terms: int = 9) -> tuple[float, ...]:
    """Σⱼ uⱼ(p)/orderʲ as a polynomial in p.

    uⱼ₊₁ = ½ p² (1 − p²) uⱼ′ + ⅛ ∫₀ᵖ (1 − 5t²) uⱼ dt.
    """
    polynomial, total = np.polynomial.Polynomial([1.0]), np.polynomial.Polynomial([1.0])
    for j in range(1, num_terms + 1):
        risen = np.polynomial.Polynomial([0, 0, 0.5, 0, -0.5]) * polynomial.deriv()
        polynomial = risen + (np.polynomial.Polynomial([0.125, 0, -0.625]) * polynomial).integ()
        total = total + polynomial / order**j
    return tuple(float(c) for c in total.coef)
