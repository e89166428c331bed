"""Small things that several emission families need."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree
from numpy.typing import ArrayLike

from jaxem._core.checks import check_values
from jaxem._core.conversion import widened

# Expanded quadratics, ‖Wξ‖² − 2 b·Wξ + ‖b‖², cancel: rounding leaves about eps·‖b‖² in each. They
# are used while d·max‖b‖² is below this, so that at most four digits go.
EXPANSION_LIMIT = 5e3

# A quadratic form in all pairs of features is used while the absolute terms of one observation sum
# to less than this, so that it loses no more than three digits.
TERMS_LIMIT = 1e3

# How many units in the last place a sum of squares may be off.
ROUNDINGS = 8


def expansion_is_safe(offset: Float[Array, "k d"]) -> Array:
    """Whether the expanded quadratic form keeps its digits at these offsets b."""
    return offset.shape[1] * jnp.max(jnp.sum(offset**2, axis=1)) < EXPANSION_LIMIT


def as_float(value: ArrayLike, name: str = "a parameter", dtype: Any = None) -> Array:
    """The value as a floating array, float32 at least: integers take JAX's default dtype.

    **Raises:** `ValueError` for what is no array of real numbers, by its name.
    """
    try:
        array = widened(jnp.asarray(value))
    except (TypeError, ValueError):  # text, None, rows of different lengths
        array = None
    if array is None or jnp.issubdtype(array.dtype, jnp.complexfloating):
        raise ValueError(
            f"{name} must be real numbers, all rows of one length; got {repr(value)[:60]}."
        )
    whole = not jnp.issubdtype(array.dtype, jnp.floating)
    return array.astype(dtype or (float if whole else array.dtype))


def centroid(mean: Float[Array, "k d"]) -> Float[Array, " d"]:
    """The mean of the component means, held fixed: any point near the data serves as origin."""
    return jax.lax.stop_gradient(jnp.mean(mean, axis=0))


def divide(a: Array, b: Array) -> Array:
    """a / b, and 0 where b is not positive; with a derivative that is finite there."""
    positive = b > 0
    return jnp.where(positive, a / jnp.where(positive, b, 1), 0)


def pseudo_count(name: str, value: ArrayLike, like: Array) -> Array:
    """A prior's count, broadcast to `like`. Raises `ValueError` if it is negative."""
    count = filled(name, value, like)
    check_values(count >= 0, f"{name} must not be negative: no data could have had it.")
    return count


def filled(name: str, value: ArrayLike, like: Array) -> Array:
    """The value in the shape and dtype of `like`. Raises `ValueError` if it does not broadcast."""
    value = as_float(value, name, like.dtype)
    try:
        return jnp.broadcast_to(value, like.shape)
    except ValueError:
        raise ValueError(
            f"{name} has shape {value.shape}; expected one that broadcasts to {like.shape}."
        ) from None


def resolves(deviation: Array, offset: Float[Array, "k d"]) -> Bool[Array, " k"]:
    """Whether standard deviations exceed the rounding of the distances they are measured at."""
    rounding = ROUNDINGS * jnp.finfo(offset.dtype).eps
    return ~jnp.any(deviation < rounding * jnp.abs(offset), axis=1)


def log_tiny(dtype: Any) -> float:
    """The logarithm of the smallest normal number of a dtype."""
    return math.log(jnp.finfo(dtype).tiny)


def least_log_scale(like: Array) -> float:
    """The log-scale whose variance is the smallest normal number of the dtype of `like`."""
    return 0.5 * log_tiny(like.dtype)


def is_count(x: Array) -> Array:
    """Whether each number is finite, whole and not negative."""
    return (x >= 0) & jnp.isfinite(x) & (x == jnp.floor(x))


def factorial_remainder(x: Array) -> Array:
    """s(x) = log x! − x log x + x, which stays small: ½ log 2πx + 1/(12x) − … for large x."""
    large = x > 16
    small = jnp.where(large | (x <= 0), 1, x)
    direct = jax.scipy.special.gammaln(small + 1) - small * jnp.log(small) + small
    big = jnp.where(large, x, 16)
    inverse = 1 / big
    tail = inverse * (1 / 12 - inverse**2 * (1 / 360 - inverse**2 * (1 / 1260 - inverse**2 / 1680)))
    series = 0.5 * jnp.log(2 * math.pi * big) + tail
    return jnp.where(large, series, jnp.where(x > 0, direct, 0))


def finite(x: PyTree[Array]) -> Bool[Array, " n"]:
    """Observations all of whose numbers are finite."""
    flags = [
        jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1) for leaf in jax.tree.leaves(x)
    ]
    return jnp.stack(flags).all(axis=0)


def outside_support(x: PyTree[Array], like: Array) -> Float[Array, " n"]:
    """log p of observations outside a support: −∞, and NaN where they hold NaN themselves."""
    flags = [jnp.isnan(leaf).reshape(leaf.shape[0], -1).any(axis=1) for leaf in jax.tree.leaves(x)]
    return jnp.where(jnp.stack(flags).any(axis=0), jnp.nan, -jnp.inf).astype(like.dtype)


def float_dtype(module: Any) -> Any:
    """The floating dtype of a module's parameters."""
    return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(module)))


def half_deviance(x: Array, log_rate: Array, rate: Array | None = None) -> Array:
    """x log(x/λ) − (x − λ), to full relative precision where x is near λ; ∞ where x < 0.

    λ is known better than by its logarithm where it is given.
    """
    rate = jnp.exp(log_rate) if rate is None else rate
    positive = ~(x <= 0)  # a NaN stays one
    safe = jnp.where(positive, x, 1)
    excess = (rate - safe) / safe
    near = jnp.abs(excess) < 0.5
    log_ratio = jnp.where(near, jnp.log1p(jnp.where(near, excess, 0)), log_rate - jnp.log(safe))
    at_zero = jnp.where(x < 0, jnp.inf, rate)
    return jnp.where(positive, (rate - x) - x * log_ratio, at_zero)
