"""Gaussian components, one class for covariances of every structure (`_core/scales.py`).

E-step. With y = L⁻¹ (x − μ) for Σ = L Lᵀ, log p = −log|L| − ½ d log 2π − ½ ‖y‖²; statistics are
the moments (Σr, Σr, Σr y, Σr y yᵀ) about each component's own mean. M-step: those of the mean and
of the structure.
"""

import functools
from typing import Any, ClassVar, Self

import equinox as eqx
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core.constraints import leaves_of, real
from jaxem._core.full_scales import FullScale, full_scale, pooled_full_scale
from jaxem._core.parameters import Frozen, replace
from jaxem._core.scales import MIN_SPREAD, Moments, ScaleParameter
from jaxem.emissions._base import AbstractExpandable
from jaxem.emissions._location_scale import AbstractLocationScale

MEAN = real("mean", "k d", role="location", counted=("mean_count", "first"))


def scale(pooled: Any, separate: bool = True, **settings: Any) -> ScaleParameter:
    """A covariance, its start by `pooled` with these settings; its own sums are second moments."""
    start = functools.partial(pooled, **settings)
    return ScaleParameter("structure", start, ("scale_count", "second"), separate=separate)


class AbstractGaussian(AbstractLocationScale, AbstractExpandable):
    """Gaussians N(μₖ, Σₖ) with a scale of any structure."""

    def log_prob(self, x: Float[Array, "n d"], tilt: Moments) -> Float[Array, "n k"]:
        return self.structure.log_prob(x, self.mean, tilt)

    def canonical(self) -> Moments:
        return self.structure.canonical(self.mean)

    def expected(self) -> Moments:
        return self.structure.expected(self.mean)

    def reframe(self, sums: Moments, old: Self) -> Moments:
        return self.structure.reframe(sums, self.mean, old.structure, old.mean)

    def maximize(self, sums: Moments) -> dict[str, Any]:
        step, scale = self.structure.maximum(sums, self.free("mean"))
        return {"mean": self.mean + self.structure.apply(step), "structure": scale}

    def sample(self, key: Array, z: Array) -> Float[Array, "n d"]:
        return self.mean[z] + self.structure.noise(key, z, self.mean.shape[1])

    def expanded(self):
        cheaper = replace(self, structure=replace(self.structure, expanded=True))
        return self.structure.expansion_is_safe(self.mean), cheaper


class Gaussian(AbstractGaussian):
    """Gaussians N(μₖ, Σₖ), each with a full covariance matrix of its own.

    **Arguments:** `mean` (k, d); `covariance` (k, d, d), positive definite, or with rows of zeros
    for what is known, to be frozen; `min_spread`: a component whose variance along some direction
    is below this fraction of the average within components is degenerate. A normal-inverse-Wishart
    prior with κ₀, ν₀ and Ψ is
    `prior({"mean": κ₀, "covariance": ν₀ + d + 2}, mean=…, covariance=Ψ / (ν₀ + d + 2))`.

    **Raises:** `ValueError` for other shapes, or values that are not a covariance.

    McLachlan & Peel (2000), *Finite Mixture Models*, section 3.2.
    """

    parameters: ClassVar = {"mean": MEAN, "covariance": scale(pooled_full_scale, tied=False)}
    mean: Float[Array, "k d"]
    structure: FullScale
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, covariance: ArrayLike, *, min_spread: float = MIN_SPREAD):
        self.mean, self.frozen = leaves_of(self.parameters, mean=mean)["mean"], ()
        self.structure = full_scale(
            "covariance", covariance, self.mean, singular=True, min_spread=min_spread
        )

    @property
    def covariance(self) -> Float[Array, "k d d"]:
        return self.structure.covariance


class TiedGaussian(AbstractGaussian):
    """Gaussians N(μₖ, Σ) that share one full covariance matrix.

    **Arguments:** `mean` (k, d); `covariance` (d, d), positive definite; `min_spread`, as for
    `Gaussian`.

    **Raises:** `ValueError` for other shapes, or values that are not a covariance.
    """

    parameters: ClassVar = {
        "mean": MEAN,
        "covariance": scale(pooled_full_scale, tied=True),
    }
    mean: Float[Array, "k d"]
    structure: FullScale
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, covariance: ArrayLike, *, min_spread: float = MIN_SPREAD):
        self.mean, self.frozen = leaves_of(self.parameters, mean=mean)["mean"], ()
        self.structure = full_scale(
            "covariance", covariance, self.mean, shared=True, min_spread=min_spread
        )

    @property
    def covariance(self) -> Float[Array, "d d"]:
        return self.structure.covariance
