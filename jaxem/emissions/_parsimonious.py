"""Gaussian components whose covariances share volume, shape or orientation, or have their own."""

from typing import ClassVar

import equinox as eqx
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core.constraints import leaves_of
from jaxem._core.full_scales import pooled_full_scale
from jaxem._core.numerics import as_float
from jaxem._core.parameters import Frozen
from jaxem._core.parsimonious import Parsimonious
from jaxem._core.scales import MIN_SPREAD
from jaxem.emissions._gaussian import MEAN, AbstractGaussian, scale


def _pooled(
    x, mean, sample_weight, *, structure: str = "VVV", min_spread: float = MIN_SPREAD
) -> Parsimonious:
    full = pooled_full_scale(x, mean, sample_weight, min_spread=min_spread)
    return Parsimonious.from_factor(structure, full.factor(), full.min_spread)


class ParsimoniousGaussian(AbstractGaussian):
    """Gaussians N(μₖ, λₖ Qₖ Bₖ Qₖᵀ) in one of fourteen structures.

    The volume λ, the shape B (diagonal, of determinant 1) and the orientation Q (orthogonal) are
    equal (E) for all components, variable (V), or the identity (I): EII, VII, EEI, VEI, EVI, VVI,
    EEE, VEE, EVE, VVE, EEV, VEV, EVV, VVV. In EVE, VVE, EEV and VEV the leaf behind Q is not
    free: half-way between two rotations there may be none, and standard errors are NaN.

    **Arguments:** `mean` (k, d); `covariance` (k, d, d), of which the structure's closest is
    taken: its maximum-likelihood fit to components of equal counts with these covariances;
    `structure`; `min_spread`, as for `Gaussian`. As a `family`,
    `functools.partial(ParsimoniousGaussian, structure="VEV")`.

    **Raises:** `ValueError` for other shapes, values that are not covariances, or a name that is
    no structure.

    Celeux & Govaert (1995), Pattern Recognition 28; Scrucca et al. (2016), The R Journal 8.

    ```python
    model = jaxem.Mixture([0.5, 0.5], ParsimoniousGaussian(mean, covariance, structure="VEV"))
    ```
    """

    parameters: ClassVar = {"mean": MEAN, "covariance": scale(_pooled, separate=False)}
    mean: Float[Array, "k d"]
    structure: Parsimonious
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self,
        mean: ArrayLike,
        covariance: ArrayLike,
        structure: str,
        *,
        min_spread: float = MIN_SPREAD,
    ):
        self.mean, self.frozen = leaves_of(self.parameters, mean=mean)["mean"], ()
        covariance = as_float(covariance, "covariance", self.mean.dtype)
        self.structure = Parsimonious.from_covariance(structure, covariance, min_spread)

    @property
    def covariance(self) -> Float[Array, "k d d"]:
        return self.structure.covariance
