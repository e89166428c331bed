"""Gaussian components whose covariance lies along the axes of features."""

from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core.axis_scales import AxisScale, axis_scale, pooled_axis_scale
from jaxem._core.constraints import leaves_of
from jaxem._core.parameters import Frozen
from jaxem._core.scales import MIN_SPREAD
from jaxem.emissions._gaussian import MEAN, AbstractGaussian, scale


class DiagonalGaussian(AbstractGaussian):
    """Gaussians with independent features, N(μₖ, diag σ²ₖ).

    **Arguments:** `mean` (k, d); `variance` (k, d), or (d,) shared by all components;
    `min_spread`, as for `Gaussian`. As a `family`, `functools.partial(DiagonalGaussian,
    tied=True)` shares the variance. A normal-inverse-gamma prior N(μ; m, σ²/κ₀) IG(σ²; a, b) is
    `prior({"mean": κ₀, "variance": 2 a + 3}, mean=m, variance=2 b / (2 a + 3))`.

    **Raises:** `ValueError` for other shapes or variances that are not positive.
    """

    parameters: ClassVar = {
        "mean": MEAN,
        "variance": scale(pooled_axis_scale, spherical=False),
    }
    mean: Float[Array, "k d"]
    structure: AxisScale
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, variance: ArrayLike, *, min_spread: float = MIN_SPREAD):
        self.mean, self.frozen = leaves_of(self.parameters, mean=mean)["mean"], ()
        self.structure = axis_scale(
            "variance", variance, self.mean, spherical=False, min_spread=min_spread
        )

    @property
    def variance(self) -> Array:
        """Variances, in the shape that the constructor takes."""
        return self.structure.covariance


class SphericalGaussian(AbstractGaussian):
    """Gaussians with one variance for all features, N(μₖ, σ²ₖ I).

    **Arguments:** `mean` (k, d); `variance` (k,), or () shared by all components; `min_spread`, as
    for `Gaussian`. As a `family`, `functools.partial(SphericalGaussian, tied=True)` shares the
    variance.

    **Raises:** `ValueError` for other shapes or variances that are not positive.
    """

    parameters: ClassVar = {
        "mean": MEAN,
        "variance": scale(pooled_axis_scale, spherical=True),
    }
    mean: Float[Array, "k d"]
    structure: AxisScale
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, variance: ArrayLike, *, min_spread: float = MIN_SPREAD):
        self.mean, self.frozen = leaves_of(self.parameters, mean=mean)["mean"], ()
        self.structure = axis_scale(
            "variance", variance, self.mean, spherical=True, min_spread=min_spread
        )

    @property
    def variance(self) -> Array:
        """Variances, in the shape that the constructor takes."""
        return self.structure.covariance
