"""Covariance structures, and the whitened moments that Gaussians of every structure share.

About components with means μₖ and covariances Σₖ = Lₖ Lₖᵀ an observation is y = Lₖ⁻¹ (x − μₖ). The
sums are moments of y about each component's *own* mean, without units and free of cancellation:
moments in the data's frame would lose every digit in float32 once (mean/σ)² ≈ 1/eps. Reframing is
the affine congruence y′ = L′⁻¹ L y + L′⁻¹ (μ − μ′), which never visits the data's frame.

M-step. With s = Σ r y and S = Σ r y yᵀ:  μ ← μ + L s/n,  and the scale's own maximum of
−n log|L| − ½ tr Σ⁻¹ L (S − s sᵀ/n) Lᵀ.
"""

from __future__ import annotations

import abc
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import equinox as eqx
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem._core.checks import keywords
from jaxem._core.numerics import filled

MIN_SPREAD = 1e-3
HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


class Moments(NamedTuple):
    """Whitened moments about each component's mean; c is k, or 1 where a scale is shared.

    The two counts agree for data and differ for a prior: one counts log-scales, the other the mean.
    """

    scale_count: Array  # Σ r, (c,) or (c, e)
    mean_count: Float[Array, " k"]  # Σ r
    first: Float[Array, "k d"]  # Σ r y
    second: Array  # Σ r y yᵀ, (c, d, d), or Σ r y², (c, e)

    @property
    def count(self) -> Float[Array, " k"]:
        """How many observations each component has."""
        return self.mean_count

    @property
    def combined(self) -> Moments:
        """Moments of data and prior, which mean and scale are maximised by."""
        return self


class AbstractScale(eqx.Module):
    """K covariances of D features of one structure, or one that all components share.

    Leaves are unconstrained, with the components (or 1) as leading axis.
    """

    shared: eqx.AbstractVar[bool]
    min_spread: eqx.AbstractVar[float]

    @abc.abstractmethod
    def expansion_is_safe(self, mean: Float[Array, "k d"]) -> Bool[Array, ""]:
        """Whether the expanded form keeps its digits, and the squares of features fit."""

    @property
    @abc.abstractmethod
    def covariance(self) -> Array:
        """Covariances, in the shape that the constructor takes."""

    @abc.abstractmethod
    def num_free_parameters(self, free: np.ndarray) -> int:
        """How many numbers move of the covariances, or single variances, with these flags."""

    @abc.abstractmethod
    def log_norm(self) -> Float[Array, " c"]:
        """−log|L| − ½ d log 2π."""

    @abc.abstractmethod
    def log_prob(self, x: Float[Array, "n d"], mean: Array, tilt: Moments) -> Float[Array, "n k"]:
        """log N(x; μ, Σ) + ⟨tilt, (1, 1, y, y yᵀ)⟩, to first order at tilt = 0."""

    @abc.abstractmethod
    def canonical(self, mean: Array) -> Moments:
        """η with Q(self; sums) = ⟨η, sums⟩, sums about self."""

    @abc.abstractmethod
    def expected(self, mean: Array) -> Moments:
        """The moments of one observation of each component's own law."""

    @abc.abstractmethod
    def reframe(self, sums: Moments, mean: Array, old: Self, old_mean: Array) -> Moments:
        """Moments about `old`, about self instead; exact, linear in the sums."""

    @abc.abstractmethod
    def maximum(self, sums: Moments, moves: Any) -> tuple[Float[Array, "k d"], Self]:
        """The whitened step of the means, zero where they do not move, and the best scale."""

    @abc.abstractmethod
    def apply(self, y: Float[Array, "k d"]) -> Float[Array, "k d"]:
        """L y of each component."""

    @abc.abstractmethod
    def noise(self, key: Array, z: Array, num_features: int) -> Float[Array, "n d"]:
        """A draw of N(0, Σ) for each component in `z`."""

    @abc.abstractmethod
    def with_covariance(self, name: str, value: Array) -> Self:
        """The same structure with other covariances, in the shape of `covariance`.

        **Raises:** `ValueError` for what is no covariance; `name` is what it says.
        """

    @abc.abstractmethod
    def scaled(self, spread: Array, num_components: int) -> Self:
        """The first component's covariance, times `spread`, for each of so many components."""

    @abc.abstractmethod
    def degenerate(self, sums: Moments, mean: Array, moves: Any) -> Int[Array, " c"]:
        """Why covariances, at the maximum of the sums, rest on hardly any variance.

        That is less than `min_spread` of the average within components along some direction, less
        than its own rounding, or too few observations for any.
        """


def check_min_spread(min_spread: Any) -> float:
    """The setting as a number. Raises `ValueError` unless it is one, not negative and below 1."""
    if isinstance(min_spread, bool) or not isinstance(min_spread, int | float):
        raise ValueError(f"min_spread must be a number, got {min_spread!r}.")
    if not 0 <= min_spread < 1:
        raise ValueError(f"min_spread must lie between 0 and 1, got {min_spread!r}.")
    return float(min_spread)


class ScaleParameter(NamedTuple):
    """A covariance, or what a family calls it, with a scale behind it."""

    leaf: str
    pooled: Callable[..., AbstractScale]  # of data, their mean and weights, for one component
    counted: tuple[str, ...] = ()
    collapsed: str = ""
    role: str = "scale"
    is_log: bool = False
    separate: bool = True  # whether components have covariances apart, which a mask may freeze
    elements: Callable[[Any, np.ndarray], str] | None = None  # as of a `Parameter`

    @property
    def options(self) -> set[str]:
        """What a start may set: keywords of `pooled` that are not set already."""
        fixed = self.pooled.keywords if isinstance(self.pooled, functools.partial) else {}
        return keywords(self.pooled) - fixed.keys()

    def is_shared(self, module: Any) -> bool:
        """Whether components share it."""
        return getattr(module, self.leaf).shared or not self.separate

    def num_free_parameters(self, scale: AbstractScale, free: np.ndarray) -> int:
        """How many numbers the M-step moves, with one flag for each covariance."""
        return scale.num_free_parameters(free)

    def sizes(self, scale: AbstractScale) -> dict[str, int]:
        return {}

    def replaced(self, name: str, value: ArrayLike, module: Any) -> AbstractScale:
        """The scale of a value that broadcasts to the present one of a module.

        **Raises:** `ValueError` for another shape, or what is no covariance.
        """
        scale = getattr(module, self.leaf)
        return scale.with_covariance(name, filled(name, value, scale.covariance))

    def within(self, scale: AbstractScale) -> AbstractScale:
        """The scale; its own maximum keeps it in bounds."""
        return scale

    def scaled(self, scale: AbstractScale, spread: Array, num_components: int) -> AbstractScale:
        """The first component's covariance, times `spread`, for each of so many components."""
        return scale.scaled(spread, num_components)
