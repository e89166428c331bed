"""The fourteen parsimonious structures (`parsimonious.py`) as a scale of Gaussians."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxem._core import linalg as la
from jaxem._core.dense_scales import AbstractDense
from jaxem._core.parameters import replace
from jaxem._core.parsimonious import Parsimonious
from jaxem._core.scales import HALF_LOG_2PI


class ParsimoniousScale(AbstractDense):
    """K covariances that share their volume, shape or orientation, or have their own."""

    structure: Parsimonious
    shared: bool = eqx.field(static=True)  # False: moments are those of each component
    min_spread: float = eqx.field(static=True)
    expanded: bool = eqx.field(static=True, default=False)

    @property
    def covariance(self) -> Float[Array, "k d d"]:
        return self.structure.covariance

    def num_free_parameters(self, free: np.ndarray) -> int:
        return self.structure.num_free_parameters if np.all(free) else 0

    @property
    def least_count(self) -> int:
        own = self.structure.name[1:] == "VV"
        return self.structure.num_features + 1 if own else 0

    def _each(self, leaf: Array) -> Array:
        """One of what is shared, for each component."""
        return jnp.broadcast_to(leaf, (self.structure.num_components, *leaf.shape[1:]))

    def log_norm(self) -> Float[Array, " k"]:
        d = self.structure.num_features
        return self._each(-self.structure.log_det()) - d * HALF_LOG_2PI

    def factor(self) -> Float[Array, "k d d"]:
        return self._each(self.structure.factor())

    def whitener(self) -> Float[Array, "k d d"]:
        return self._each(self.structure.whitener())

    def best(self, scatter: Array, count: Array) -> Self:
        return replace(self, structure=self.structure.maximize(scatter, count))

    def best_covariance(self, scatter: Array, count: Array) -> Float[Array, "k d d"]:
        best = self._each(self.structure.maximize(scatter, count).factor())
        relative = la.matmul(self.whitener(), best)
        return la.matmul(relative, la.transpose(relative))

    def with_covariance(self, name: str, value: Array) -> Self:
        return replace(self, structure=Parsimonious.from_covariance(self.structure.name, value))

    def scaled(self, spread: Array, num_components: int) -> Self:
        factor = self.structure.factor()[:1]
        factor = jnp.broadcast_to(factor, (num_components, *factor.shape[1:]))
        structure = Parsimonious.from_factor(self.structure.name, factor)
        return replace(self, structure=structure.scaled(spread))
