"""A product of families over groups of features: mixed continuous, count and category columns.

The data are a tuple with one array for each part, so that each keeps its own dtype. Everything
is the sum, or the tuple, of what the parts say.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxem._core.parameters import replace
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, AbstractNested, AbstractStarting, build


class Independent(AbstractNested, AbstractStarting):
    """Feature groups that are independent given the component, each with a family of its own.

    **Arguments:** `parts`, emissions with the same number of components. Data: a tuple of
    arrays, one for each part. As a `family`,
    `functools.partial(Independent, families=(Gaussian, Poisson))`. A part's parameters are
    frozen by paths such as `"components.parts.0.mean"`.

    **Raises:** `ValueError` if there is no part or their numbers of components differ.
    """

    parts: tuple[AbstractEmission, ...]

    def __init__(self, parts: Sequence[AbstractEmission], *others: Any):
        if others or not isinstance(parts, list | tuple):
            raise ValueError("Independent takes one list of emissions: Independent([a, b]).")
        wrong = [part for part in parts if not isinstance(part, AbstractEmission)]
        if wrong:
            raise ValueError(
                "Independent takes a list of emissions, such as Poisson([[1.0], [2.0]]); got "
                f"{wrong[0]!r}. Families go into functools.partial(Independent, families=…)."
            )
        sizes = {part.num_components for part in parts}
        if len(sizes) != 1:
            raise ValueError(
                f"Independent needs parts with one number of components; got {sorted(sizes)}."
            )
        self.parts = tuple(parts)

    @property
    def num_components(self) -> int:
        return self.parts[0].num_components

    def check(self, x: Any) -> None:
        _check_tuple(x, len(self.parts))
        for part, column in zip(self.parts, x, strict=True):
            part.check(column)

    def in_support(self, x: Any) -> Bool[Array, " n"]:
        flags = [part.in_support(column) for part, column in zip(self.parts, x, strict=True)]
        return jnp.all(jnp.stack(flags), axis=0)

    def log_prob(self, x: Any, tilt: Any) -> Float[Array, "n k"]:
        triples = zip(self.parts, x, tilt, strict=True)
        return functools.reduce(operator.add, (part.log_prob(c, t) for part, c, t in triples))

    def prior(self, *parts: Framed | None) -> Framed:
        """The product of the parts' priors; `None`, or none given, is flat.

        **Raises:** `ValueError` for more priors than parts.
        """
        if len(parts) > len(self.parts):
            raise ValueError(f"{len(parts)} priors for {len(self.parts)} parts.")
        given = (*parts, *(None,) * (len(self.parts) - len(parts)))
        priors = [
            p if p is not None else own.prior() for own, p in zip(self.parts, given, strict=True)
        ]
        frame = replace(self, parts=tuple(prior.frame for prior in priors))
        return Framed(tuple(prior.sums for prior in priors), frame)

    def sample(self, key: Array, z: Int[Array, " n"]) -> tuple[Any, ...]:
        keys = jax.random.split(key, len(self.parts))
        return tuple(part.sample(k, z) for part, k in zip(self.parts, keys, strict=True))

    @classmethod
    def pooled(cls, x, num_components, sample_weight, families: Sequence[Any] = ()):
        if not families:
            raise ValueError(
                "Independent needs its families: pass "
                "functools.partial(Independent, families=(Gaussian, Poisson)), say."
            )
        _check_tuple(x, len(families))
        parts = []
        for family, column in zip(families, x, strict=True):
            part, keywords = build(family)
            parts.append(part.pooled(column, num_components, sample_weight, **keywords))
        return cls(parts)

    def located_at(self, x: Any, spread: Float[Array, ""]) -> Self:
        parts: Any = self.parts
        pairs = zip(parts, x, strict=True)
        return replace(self, parts=tuple(part.located_at(column, spread) for part, column in pairs))


def _check_tuple(x: Any, num_parts: int) -> None:
    if not isinstance(x, tuple) or len(x) != num_parts:
        given = f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
        raise ValueError(
            f"Independent expects a tuple of {num_parts} arrays, one for each part; got {given}."
        )
