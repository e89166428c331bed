"""Checks at call time: what was given, what was expected, what to do."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, TypeGuard

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array
from numpy.typing import ArrayLike


def check_shape(name: str, value: Array, expected: tuple[int | str, ...]) -> None:
    """Raises unless `value` has the shape `expected`; letters stand for any size but 0."""
    fits = value.ndim == len(expected) and all(
        size > 0 if isinstance(wanted, str) else size == wanted
        for size, wanted in zip(value.shape, expected, strict=True)
    )
    if not fits:
        shape = "(" + ", ".join(str(size) for size in expected) + ("," * (len(expected) == 1)) + ")"
        per_component = value.ndim == 1 and len(expected) == 2 and expected[0] == "k"
        advice = ": one row for each component, as in [[2.0], [6.0]]" if per_component else ""
        raise ValueError(f"{name} has shape {value.shape}; expected {shape}{advice}.")


def check_observations(x: Any, num_features: int, who: str) -> None:
    """Raises unless `x` is an array of shape (n, num_features) with n ≥ 1."""
    if not eqx.is_array(x):
        raise ValueError(f"{who} expects an array of observations, got {type(x).__name__}.")
    if x.ndim == 1:
        one = num_features > 1 and x.shape[0] == num_features
        advice = "x[None] for one observation" if one else "x[:, None] for one feature"
        raise ValueError(
            f"{who} expects data of shape (n, {num_features}), got {x.shape}; write {advice}."
        )
    if x.ndim != 2 or x.shape[1] != num_features:
        raise ValueError(f"{who} expects data of shape (n, {num_features}), got {x.shape}.")
    if x.shape[0] == 0:
        raise ValueError(f"{who}: data hold no observation (shape {x.shape}).")


def num_features(x: Any) -> int:
    """Columns of `x`, or 1 where it has none; `check_observations` then says what is wrong."""
    return x.shape[1] if eqx.is_array(x) and x.ndim == 2 else 1


def check_continuous(x: Any, num_features: int, dtype: Any, who: str) -> None:
    """`check_observations`, and that the data have the floating dtype of the parameters."""
    check_observations(x, num_features, who)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(
            f"{who} is a continuous family but the data have dtype {x.dtype}; "
            "convert them, as in x.astype(float)."
        )
    if x.dtype != dtype:
        raise ValueError(
            f"{who} has parameters of dtype {dtype} but the data have {x.dtype}; "
            f"convert one, as in x.astype({dtype})."
        )


def check_counts(x: Any, num_features: int, dtype: Any, who: str) -> None:
    """`check_observations`, for integers or for whole numbers in the dtype of the parameters."""
    check_observations(x, num_features, who)
    integral = jnp.issubdtype(x.dtype, jnp.integer) or x.dtype == jnp.bool_
    if not integral and x.dtype != dtype:
        raise ValueError(
            f"{who} has parameters of dtype {dtype} but the data have {x.dtype}; "
            f"convert them to integers or to {dtype}."
        )


def check_codes(x: Any, num_features: int, dtype: Any, who: str) -> None:
    """`check_observations`, for integer codes of categories."""
    check_observations(x, num_features, who)
    if not jnp.issubdtype(x.dtype, jnp.integer):
        raise ValueError(f"{who} expects integer codes 0 … m − 1, got {x.dtype}; use .astype(int).")


def check_sample_weight(sample_weight: Any, n: int) -> None:
    """Raises unless `sample_weight` is None or real numbers or booleans of shape (n,)."""
    if sample_weight is None:
        return
    if not eqx.is_array(sample_weight) or sample_weight.shape != (n,):
        shape = sample_weight.shape if eqx.is_array(sample_weight) else name_of(sample_weight)
        advice = "" if eqx.is_array(sample_weight) else "; write np.asarray(sample_weight)"
        raise ValueError(
            f"sample_weight needs one entry per observation, shape ({n},); got {shape}{advice}."
        )
    if sample_weight.dtype.kind == "c":
        raise ValueError(f"sample_weight must be real, got {sample_weight.dtype}.")


def check_values(ok: ArrayLike, message: str) -> None:
    """Raises `ValueError` if `ok` is known to be false somewhere; says nothing about tracers.

    Under a transformation the outcome of a fit is judged by its `RESULTS` instead.
    """
    if isinstance(ok, Tracer):
        return
    if not np.all(np.asarray(ok)):
        raise ValueError(message)


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raises unless `value` is an integer, Python's or NumPy's, at least `least`."""
    if not is_integer(value) or value < least:
        raise ValueError(f"{name} must be an integer ≥ {least}, got {value!r}.")


def is_integer(value: Any) -> TypeGuard[int]:
    """Whether `value` is an integer, Python's or NumPy's, and no boolean."""
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def checked_key(key: Any) -> Array:
    """One random key, or `ValueError` for anything else."""
    typed = eqx.is_array(key) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    raw = eqx.is_array(key) and key.dtype == jnp.uint32 and key.shape == (2,)
    if not (raw or (typed and key.shape == ())):
        got = f"an array of shape {key.shape}" if eqx.is_array(key) else repr(key)[:60]
        raise ValueError(f"key must be one random key, such as jax.random.key(0); got {got}.")
    return key


def or_absent(fits: Array, sample_weight: Any) -> Array:
    """Whether each observation fits, or counts for nothing."""
    return fits if sample_weight is None else fits | (sample_weight == 0)


def keywords(function: Callable[..., Any]) -> set[str]:
    """The names of a function's keyword-only arguments."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_options(who: str, given: Iterable[str], known: set[str]) -> None:
    """Raises for an option that a family does not have."""
    if unknown := sorted(set(given) - known):
        has = ", ".join(sorted(known)) or "none"
        raise ValueError(f"{who} has no option {unknown[0]!r} of a start; it has {has}.")


def name_of(value: Any) -> str:
    """The name of a class, or of the class of anything else."""
    return value.__name__ if isinstance(value, type) else type(value).__name__


def check_number(name: str, value: Any, which: str = "") -> None:
    """Raises unless `value` is one real number; `which` says what else it must be."""
    number = isinstance(value, int | float | np.integer | np.floating) or (
        eqx.is_array(value) and value.shape == () and not jnp.issubdtype(value.dtype, complex)
    )
    if not number:
        got = f"an array of shape {jnp.shape(value)}" if eqx.is_array(value) else repr(value)
        raise ValueError(f"{name} must be one number{which}; got {got}.")


def check_nonnegative(name: str, value: Any) -> None:
    """Raises unless `value` is one number, and not negative where that is known."""
    check_number(name, value, ", not negative")
    if not isinstance(value, Tracer) and not value >= 0:
        raise ValueError(f"{name} must not be negative, got {value}.")


def concrete(value: Any) -> np.ndarray | None:
    """The value as a NumPy array, or None for a tracer."""
    return None if isinstance(value, Tracer) else np.asarray(value)
