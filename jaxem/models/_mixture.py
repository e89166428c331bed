"""Finite mixtures of any emission: p(x) = Σₖ πₖ p(x | z = k).

E-step. The log-joint is log πₖ + log p(x | z = k); one `jax.vjp` of it in the tilts of both
factors, pulled back along the responsibilities, gives the expected counts nₖ = Σ r and the
emission's sums, block by block of observations. M-step: πₖ ← nₖ / Σ n and the maximum of the
emission.

McLachlan & Peel (2000), *Finite Mixture Models*; Dempster, Laird & Rubin (1977), section 4.3.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.blocks import num_observations, substitute
from jaxem._core.causes import caused, either
from jaxem._core.checks import (
    check_count,
    check_shape,
    check_values,
    checked_key,
    concrete,
    or_absent,
)
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import free, replace
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, Emission, sums_of, width
from jaxem.emissions._family import settled
from jaxem.emissions._location_scale import AbstractLocationScale
from jaxem.emissions._pooled import compiled, pooled
from jaxem.factors._simplex import Simplex
from jaxem.models import _starts
from jaxem.models._composite import check_one_model
from jaxem.models._finite import AbstractMixture


class Mixture(AbstractMixture, Generic[Emission]):
    """A finite mixture.

    **Arguments:** `weights` (k,), in the simplex; `components`, an emission with k components.

    **Raises:** `ValueError` if the weights are not probabilities or not one per component.
    """

    factors: ClassVar[tuple[str, ...]] = ("_weights", "components")
    _weights: Simplex
    components: Emission

    def __init__(self, weights: ArrayLike, components: Emission):
        if not isinstance(components, AbstractEmission):
            raise ValueError(
                "Mixture takes weights, then its components, an emission such as "
                f"Poisson([[1.0], [2.0]]); got {type(components).__name__}."
            )
        self._weights = Simplex(weights, size=components.num_components, name="weights")
        self.components = components

    @property
    def weights(self) -> Float[Array, " k"]:
        """Mixing proportions."""
        return self._weights.probability

    def tilted(self, tilt: Any, data: PyTree[Array]) -> Float[Array, "n k"]:
        own, emitted = tilt
        log_prob = self.components.log_prob(data, emitted)
        return la.repeat(self._weights.canonical() + own, log_prob.shape[0]).T + log_prob

    def width(self, data: PyTree[Array]) -> int:
        """Numbers an E-step holds for each observation: one for each component and feature."""
        return width(self.components, data)

    def check(self, data: PyTree[Array]) -> None:
        check_one_model(self, "weights", self._weights.logits)
        self.components.check(data)
        num_observations(data)

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        return self.components.in_support(data)

    def sample(self, key: Array, n: int) -> tuple[PyTree[Array], Int[Array, " n"]]:
        """n draws of x, and the components z that they come from."""
        check_count("n", n, 0)
        z_key, x_key = jax.random.split(checked_key(key))
        z = jax.random.categorical(z_key, self._weights.logits, shape=(n,))
        return self.components.sample(x_key, z), z

    def degenerate(self, statistics: Framed) -> Int[Array, " k"]:
        counts, sums = statistics.at(self).sums
        few = (counts < 1) & free(self._weights, "probability")
        return either(caused(few_observations=few), self.components.degenerate(sums))

    # Starts

    @classmethod
    def init(
        cls,
        key: Array,
        data: PyTree[Array],
        num_components: int,
        family: Any,
        *,
        sample_weight: Float[Array, " n"] | None = None,
        method: str = "k-means++",
    ) -> Self:
        """A start for a fit: one component around each of `num_components` observations.

        **Arguments:**

        - `family`: an emission class, or `functools.partial` of one.
        - `method`: `"k-means++"` draws observations far from each other in the family's own
          deviance; `"random"` draws them by weight alone.

        Pure, so that restarts are a `jax.vmap` over keys.

        **Raises:** `ValueError` for more components than observations, an unknown method, or an
        observation that is known to lie outside the family's support.
        """
        data, sample_weight = as_arrays(data), as_arrays(sample_weight)
        n = num_observations(data)
        seeds = _starts.seeds(key, data, n, num_components, family, method)
        return compiled(cls._around, family, seeds, key, data, sample_weight)

    @classmethod
    def _around(cls, seeds: Any, key: Array, data: Any, sample_weight: Any) -> tuple[Self, Array]:
        components, possible = seeds(key, data, sample_weight)
        return cls._uniform(components), possible

    @classmethod
    def from_responsibilities(
        cls,
        data: PyTree[Array],
        responsibilities: Float[Array, "n k"],
        family: Any,
        *,
        sample_weight: Float[Array, " n"] | None = None,
    ) -> Self:
        """The M-step from given responsibilities, rows that sum to one.

        Labels are the case of one-hot rows, `jax.nn.one_hot(labels, num_components)`.

        **Raises:** `ValueError` if there is not one such row for each observation.
        """
        data, sample_weight = as_arrays(data), as_arrays(sample_weight)
        responsibilities = jnp.asarray(as_arrays(responsibilities))
        check_shape("responsibilities", responsibilities, (num_observations(data), "k"))
        rows, counted = concrete(responsibilities), concrete(sample_weight)
        if rows is not None and (sample_weight is None or counted is not None):
            proper = (np.abs(rows.sum(axis=1) - 1) < 1e-3) & (rows >= 0).all(axis=1)
            check_values(
                proper if sample_weight is None else proper | (counted == 0),
                "responsibilities: each row holds probabilities that sum to 1, as those of "
                "jax.nn.one_hot(labels, num_components).",
            )
        given = settled(family, data), data, responsibilities, sample_weight
        return compiled(cls._given, family, *given)

    @classmethod
    def _given(
        cls, family: Any, data: Any, responsibilities: Any, sample_weight: Any
    ) -> tuple[Self, Array]:
        k = responsibilities.shape[1]
        alike = cls._uniform(pooled(data, k, family, sample_weight))
        possible = or_absent(alike.components.in_support(data), sample_weight)
        if sample_weight is not None:
            data = substitute(data, sample_weight > 0)
            responsibilities = sample_weight[:, None] * responsibilities
        responsibilities = responsibilities.astype(float_dtype(alike))

        def again(_: Any, model: Self) -> Self:
            sums = sums_of(model.components, data, responsibilities)
            return model.m_step(Framed((jnp.sum(responsibilities, axis=0), sums), model))

        # About the pooled mean and scale, the moments of tight clusters cancel: move the means
        # first, then the scales, then both about components that are in place.
        moved = again(0, alike)
        located = lambda part: isinstance(part, AbstractLocationScale)  # noqa: E731
        model = jax.tree.map(
            lambda new, old: replace(old, mean=new.mean) if located(new) else old,
            moved,
            alike,
            is_leaf=located,
        )
        return lax.fori_loop(0, 2, again, model), possible

    @classmethod
    def _uniform(cls, components: Any) -> Self:
        k = components.num_components
        return cls(jnp.full(k, 1 / k, float_dtype(components)), components)


def check_start(mixture: Any) -> None:
    """Raises `ValueError` unless a model without its weights can start from this mixture."""
    if not isinstance(mixture, Mixture):
        raise ValueError(f"from_mixture expects a Mixture, got {type(mixture).__name__}.")
    if mixture._weights.frozen:
        raise ValueError(
            "the weights of this mixture are frozen, and the model that starts from it has no "
            "such weights: unfreeze them, and freeze what should stay in that model."
        )
