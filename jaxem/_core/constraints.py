"""Declared parameters: what users name, which leaf stands behind it, which values it may take.

A factor declares `parameters: ClassVar = {"rate": positive("log_rate", "k d")}`. The constraint,
the shape, the way to the unconstrained leaf, the bounds of estimates and the message for what is
no such parameter then stand in one place. Letters of shapes are sizes: the components `k` come
first, and one letter is one size within a factor.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_shape, check_values
from jaxem._core.numerics import ROUNDINGS, as_float, filled, log_tiny


class Constraint(NamedTuple):
    """Which values a parameter may take, and how a leaf without constraints stands for them."""

    requirement: str  # what an error says of other values
    valid: Callable[[Array], Array]
    inverse: Callable[[Array], Array]  # the leaf of a value
    is_log: bool  # whether leaves are logarithms or log-odds, which have no units
    # The log-odds of each probability against the likeliest
    log_odds: Callable[[Array], Array] | None = None
    # How many numbers of one component follow from the others, by their shape
    lost: Callable[[tuple[int, ...]], int] = lambda shape: 0


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One parameter of a factor, with a leaf of its own.

    - `leaf`: the field behind it.
    - `shape`: letters for the axes of its values.
    - `reference`: its value in a law that is typical before data are seen; None spreads
      probabilities evenly.
    - `bounds(dtype)`: where estimates of the leaf end.
    - `collapsed`: at which of these ends a component is degenerate, "lower", "upper" or "both".
    - `role`: "location", where observations of a component lie; "spread", a variance relative to
      the mean or, with `inverse_spread`, the inverse of one; "shape", what a start takes over
      from all the data; "" for all else.
    - `least_count`: how many observations a component needs to have one of its own; a letter
      stands for its size.
    - `counted`: the fields of sums that are about this parameter alone, so that a prior may
      count them apart.
    - `broadcasts`: whether one value for all components will do.
    - `elements(module, mask)`: why a mask of the leaf's shape cannot be frozen, or ""; None where
      none can.
    """

    leaf: str
    shape: tuple[str, ...]
    constraint: Constraint
    reference: float | None = 0.0
    bounds: Callable[[Any], tuple[float, float]] | None = None
    collapsed: str = ""
    role: str = ""
    inverse_spread: bool = False
    least_count: int | str = 0
    counted: tuple[str, ...] = ()
    broadcasts: bool = False
    elements: Callable[[Any, np.ndarray], str] | None = None

    @property
    def is_log(self) -> bool:
        """Whether the leaf holds logarithms or log-odds."""
        return self.constraint.is_log

    def is_shared(self, module: Any) -> bool:
        """Whether components share it, or some of them do, as states of tied rows."""
        sizes = zip(self.shape, getattr(module, self.leaf).shape, strict=False)
        return len({size for letter, size in sizes if letter == "k"}) != 1 or self.shape[0] != "k"

    def num_free_parameters(self, leaf: Array, free: np.ndarray) -> int:
        """How many numbers the M-step moves, with one flag for each component, or each number."""
        shape = leaf.shape[free.ndim :]
        return int(np.sum(free)) * (math.prod(shape) - self.constraint.lost(shape))

    def checked(self, name: str, value: Array, sizes: dict[str, int]) -> Array:
        """The leaf of a value; `sizes` learns what its letters stand for.

        **Raises:** `ValueError` for another shape, or a value that is no such parameter.
        """
        expected = tuple(sizes.get(letter, letter) for letter in self.shape)
        if self.broadcasts and value.shape in ((), expected[1:]):
            value = jnp.broadcast_to(value, [s for s in expected if isinstance(s, int)])
        check_shape(name, value, expected)
        first = dict(reversed(list(zip(self.shape, value.shape, strict=True))))
        check_shape(name, value, tuple(first[letter] for letter in self.shape))
        sizes.update(zip(self.shape, value.shape, strict=True))
        valid, leaf = _leaf(self.constraint, value)
        check_values(valid, f"{name}{self.constraint.requirement}")
        return leaf

    def sizes(self, leaf: Array) -> dict[str, int]:
        """What the letters of the shape stand for."""
        return dict(zip(self.shape, leaf.shape, strict=True))

    def replaced(self, name: str, value: ArrayLike, module: Any) -> Array:
        """The leaf of a value that broadcasts to the present one of a module.

        **Raises:** `ValueError` for another shape, or a value that is no such parameter.
        """
        return self.checked(name, filled(name, value, getattr(module, name)), {})

    def typical(self, sizes: Mapping[str, int], dtype: Any) -> Array:
        """The value in a law that is typical before data are seen."""
        shape = [sizes[letter] for letter in self.shape]
        even = 1 / shape[-1] if self.reference is None else self.reference
        return jnp.full(shape, even, dtype)

    def spread(self, leaf: Array) -> Array:
        """The relative variance that a spread stands for."""
        return jnp.exp(-leaf if self.inverse_spread else leaf)

    def within(self, leaf: Array) -> Array:
        """The leaf, moved to where estimates lie."""
        return leaf if self.bounds is None else jnp.clip(leaf, *self.bounds(leaf.dtype))

    def has_collapsed(self, leaf: Array) -> Bool[Array, " k"]:
        """Components of which some estimate is at an end that means collapse."""
        if self.bounds is None or not self.collapsed:
            return jnp.zeros(leaf.shape[0], bool)
        least, most = self.bounds(leaf.dtype)
        low = (leaf <= least) & (self.collapsed in ("lower", "both"))
        high = (leaf >= most) & (self.collapsed in ("upper", "both"))
        return jnp.any((low | high).reshape(leaf.shape[0], -1), axis=1)

    def scaled(self, leaf: Array, spread: Array, num_components: int) -> Array:
        """The first component's leaf for each of so many, a spread multiplied by `spread`."""
        if self.role == "spread":
            change = jnp.log(jnp.maximum(spread, jnp.finfo(leaf.dtype).tiny))
            leaf = self.within(leaf - change if self.inverse_spread else leaf + change)
        return jnp.broadcast_to(leaf[:1], (num_components, *leaf.shape[1:]))


@functools.partial(jax.jit, static_argnums=0, inline=True)  # an eager call is one program
def _leaf(constraint: Constraint, value: Array) -> tuple[Bool[Array, ""], Array]:
    return jnp.all(constraint.valid(value)), constraint.inverse(value)


def real(leaf: str, shape: str, **settings: Any) -> Parameter:
    """Any finite numbers; the leaf is the value."""
    constraint = Constraint(
        " holds a NaN or an infinity.", jnp.isfinite, lambda value: value, False
    )
    return Parameter(leaf, tuple(shape.split()), constraint, **settings)


def positive(leaf: str, shape: str, *, zero: bool = False, **settings: Any) -> Parameter:
    """Finite positive numbers, by their logarithms; a 0, where allowed, is floored."""

    def valid(value: Array) -> Array:
        return ((value >= 0) if zero else (value > 0)) & jnp.isfinite(value)

    requirement = "finite and not negative" if zero else "positive and finite"
    inverse = la.floored_log if zero else jnp.log
    settings = {"reference": 1.0, "bounds": logs_that_fit, **settings}
    constraint = Constraint(f" must be {requirement}.", valid, inverse, True)
    return Parameter(leaf, tuple(shape.split()), constraint, **settings)


def probability(leaf: str, shape: str, **settings: Any) -> Parameter:
    """Numbers in [0, 1], by their log-odds; 0 and 1 are floored."""
    constraint = Constraint(
        " must be in [0, 1].",
        valid=lambda value: (value >= 0) & (value <= 1),
        inverse=lambda value: la.floored_log(value) - la.floored_log(1 - value),
        is_log=True,
        log_odds=lambda leaf: -jnp.abs(leaf),
    )
    return Parameter(leaf, tuple(shape.split()), constraint, **{"reference": 0.5, **settings})


def simplex(leaf: str, shape: str, **settings: Any) -> Parameter:
    """Probabilities that sum to 1 along the last axis, by their logarithms; a 0 is floored."""
    requirement = ": probabilities must be non-negative and sum to 1 along the last axis."
    constraint = Constraint(
        requirement,
        is_simplex,
        la.floored_log,
        is_log=True,
        log_odds=lambda leaf: leaf - jnp.max(leaf, axis=-1, keepdims=True),
        lost=_one_of_each_row,
    )
    return Parameter(leaf, tuple(shape.split()), constraint, **{"reference": None, **settings})


def direction(leaf: str, shape: str, **settings: Any) -> Parameter:
    """Finite vectors along the last axis that are not zero; the leaf is of any length."""

    def valid(value: Array) -> Array:
        return jnp.isfinite(value).all(axis=-1) & jnp.any(value != 0, axis=-1)

    constraint = Constraint(
        " must be finite and not zero.", valid, la.unit, False, lost=_one_of_each_row
    )
    return Parameter(leaf, tuple(shape.split()), constraint, **{"reference": 1.0, **settings})


def _one_of_each_row(shape: tuple[int, ...]) -> int:
    return math.prod(shape[:-1])


def leaves_of(parameters: Mapping[str, Any], /, **values: ArrayLike) -> dict[str, Array]:
    """The leaves behind values of parameters, by field, in the dtype of the first value.

    **Raises:** `ValueError` for another shape, or a value that is no such parameter.
    """
    sizes: dict[str, int] = {}
    dtype, leaves = None, {}
    for name, value in values.items():
        value = as_float(value, name, dtype)
        dtype = value.dtype
        leaves[parameters[name].leaf] = parameters[name].checked(name, value, sizes)
    return leaves


def logs_that_fit(dtype: Any) -> tuple[float, float]:
    """Logarithms of normal numbers whose inverses are normal too."""
    return log_tiny(dtype), -log_tiny(dtype)


def resolved_concentrations(dtype: Any) -> tuple[float, float]:
    """Logarithms of concentrations from 10⁻³ to where deviations are rounding of the mean."""
    return math.log(1e-3), -2 * math.log(ROUNDINGS * jnp.finfo(dtype).eps)


def is_simplex(value: Array) -> Bool[Array, "*b 1"]:
    """Whether the last axis holds probabilities that sum to 1."""
    slack = 100 * float(jnp.finfo(value.dtype).eps) * value.shape[-1]
    total = jnp.sum(value, axis=-1, keepdims=True)
    return (value >= 0) & (jnp.abs(total - 1) <= slack)
