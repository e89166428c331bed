"""Declared supports: which data a family takes, at trace time and in the compiled program.

`counts("n d")` checks shape and dtype where data are traced, and says of each observation whether
its values are possible. Letters are the sizes of the family's parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool

from jaxem._core.checks import check_codes, check_continuous, check_counts, num_features
from jaxem._core.numerics import finite, is_count


@dataclasses.dataclass(frozen=True)
class Support:
    """Data (n, d) of one kind.

    - `columns`: the letter of the second axis.
    - `kind(x, num_features, dtype, who)`: raises `ValueError` for another shape or dtype.
    - `possible(x, sizes)`: whether each number, or each observation, is a possible one.
    - `continuous`: whether values are measurements, which have a unit.
    - `categories`: the letter of the number of categories, if there are some.
    """

    columns: str
    kind: Callable[[Any, int, Any, str], None]
    possible: Callable[[Array, Mapping[str, int]], Array]
    continuous: bool = False
    categories: str = ""

    def check(self, x: Any, sizes: Mapping[str, int], dtype: Any, who: str) -> None:
        """Raises `ValueError` for data of another shape or dtype; any size where none is known."""
        self.kind(x, sizes.get(self.columns, num_features(x)), dtype, who)

    def contains(self, x: Any, sizes: Mapping[str, int]) -> Bool[Array, " n"]:
        """Whether each observation is a possible one."""
        flags = self.possible(x, sizes)
        return jnp.all(flags.reshape(flags.shape[0], -1), axis=1)

    def counted(self, x: Any, options: Mapping[str, Any]) -> dict[str, int]:
        """The number of categories, if it is not given and data say it that are not traced."""
        counts = self.categories and "num_categories" not in options and eqx.is_array(x)
        if not counts or isinstance(x, Tracer) or not jnp.issubdtype(x.dtype, jnp.integer):
            return {}
        return {"num_categories": int(np.max(np.asarray(x))) + 1}

    def sizes_in(self, x: Array, options: Mapping[str, Any]) -> tuple[dict[str, int], Any]:
        """The sizes that data say, and those options of a start that are none of them.

        **Raises:** `ValueError` where categories can be counted in traced data only.
        """
        sizes, left = {self.columns: x.shape[1]}, dict(options)
        if self.categories:
            given = left.pop("num_categories", None)
            if given is None:
                raise ValueError(
                    "the categories of traced data cannot be counted: pass "
                    "functools.partial(Categorical, num_categories=m) as the family."
                )
            sizes[self.categories] = given
        return sizes, left


@dataclasses.dataclass(frozen=True)
class Regressed:
    """Data (u, y) of inputs (n, p) and outputs (n, d), or (u, y, e) with exposures (n, d)."""

    outputs: Support
    exposures: bool = False

    @property
    def continuous(self) -> bool:
        return self.outputs.continuous

    def counted(self, x: Any, options: Mapping[str, Any]) -> dict[str, int]:
        """Nothing: outputs have no categories."""
        return {}

    def check(self, x: Any, sizes: Mapping[str, int], dtype: Any, who: str) -> None:
        """Raises `ValueError` for data of another kind; any size where none is known."""
        if not isinstance(x, tuple) or not 2 <= len(x) <= 2 + self.exposures:
            given = f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
            more = " and perhaps exposures (n, d)" if self.exposures else ""
            raise ValueError(
                f"{who} expects a tuple of inputs (n, p) and outputs (n, d){more}; got {given}."
            )
        u, y, *exposure = x
        check_continuous(u, sizes.get("p", num_features(u)), dtype, f"{who} (inputs)")
        self.outputs.check(y, sizes, dtype, f"{who} (outputs)")
        for e in exposure:
            check_continuous(e, num_features(y), dtype, f"{who} (exposures)")

    def contains(self, x: Any, sizes: Mapping[str, int]) -> Bool[Array, " n"]:
        """Whether each observation is a possible one."""
        u, y, *exposure = x
        flags = [finite(u), self.outputs.contains(y, sizes)]
        flags += [positives("n d").contains(e, sizes) for e in exposure]
        return jnp.all(jnp.stack(flags), axis=0)


def _second(shape: str) -> str:
    return shape.split()[1]


def trees() -> Support:
    """Any PyTrees of arrays, with finite numbers."""
    return Support("", lambda x, *_: None, lambda x, _: finite(x))


def reals(shape: str) -> Support:
    """Finite numbers, in the floating dtype of the parameters."""
    return Support(_second(shape), check_continuous, lambda x, _: jnp.isfinite(x), continuous=True)


def positives(shape: str, *, zero: bool = False) -> Support:
    """Finite positive numbers; `zero` is one of them, or not."""

    def possible(x: Array, _: Any) -> Array:
        return ((x >= 0) if zero else (x > 0)) & jnp.isfinite(x)

    return Support(_second(shape), check_continuous, possible, continuous=True)


def counts(shape: str) -> Support:
    """Whole numbers from 0 on, integers or floating."""
    return Support(_second(shape), check_counts, lambda x, _: is_count(x))


def bits(shape: str) -> Support:
    """0 and 1: integers, booleans or floating."""
    return Support(_second(shape), check_counts, lambda x, _: (x == 0) | (x == 1))


def codes(shape: str, categories: str) -> Support:
    """Integers from 0 to m − 1, with m the size of the letter `categories`."""

    def possible(x: Array, sizes: Mapping[str, int]) -> Array:
        return (x >= 0) & (x < sizes[categories])

    return Support(_second(shape), check_codes, possible, categories=categories)


def directions(shape: str, tolerance: float) -> Support:
    """Vectors of norm 1, to a relative tolerance."""

    def possible(x: Array, _: Any) -> Array:
        return jnp.abs(jnp.sum(x**2, axis=1) - 1) < 2 * tolerance

    return Support(_second(shape), check_continuous, possible, continuous=True)
