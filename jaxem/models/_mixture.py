"""Finite mixtures of any emission: p(x) = Σₖ πₖ p(x | z = k).

E-step. The log-joint is log πₖ + log p(x | z = k); one `jax.vjp` of it in the tilts of both
factors, pulled back along the responsibilities, gives the expected counts nₖ = Σ r and the
emission's sums, block by block of observations. M-step: πₖ ← nₖ / Σ n and the maximum of the
emission.

McLachlan & Peel (2000), *Finite Mixture Models*; Dempster, Laird & Rubin (1977), section 4.3.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.blocks import num_observations, substitute
from jaxem._core.checks import check_count, check_shape, check_values, checked_key
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import free, replace
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, Emission, sums_of, width
from jaxem.emissions._location_scale import AbstractLocationScale
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

    def degenerate(self, statistics: Framed) -> Bool[Array, " k"]:
        counts, sums = statistics.at(self).sums
        flags = self.components.degenerate(sums)
        return flags | ((counts < 1) & free(self._weights, "probability"))

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
        return cls._uniform(_starts.seed(key, data, num_components, family, sample_weight, method))

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
        responsibilities = jnp.asarray(responsibilities)
        check_shape("responsibilities", responsibilities, (num_observations(data), "k"))
        total = jnp.sum(responsibilities, axis=1)
        counted = jnp.ones_like(total) if sample_weight is None else sample_weight
        check_values(
            (counted == 0) | ((jnp.abs(total - 1) < 1e-3) & jnp.all(responsibilities >= 0, axis=1)),
            "responsibilities: each row holds probabilities that sum to 1, as those of "
            "jax.nn.one_hot(labels, num_components).",
        )
        k = responsibilities.shape[1]
        pooled = cls._uniform(_starts.pooled(data, k, family, sample_weight))
        _starts.check_support(pooled.components, data, sample_weight)
        if sample_weight is not None:
            data = substitute(data, counted > 0)
        responsibilities = (counted[:, None] * responsibilities).astype(float_dtype(pooled))
        # About the pooled mean and scale, the moments of tight clusters cancel: move the means
        # first, then the scales, then both about components that are in place.
        moved = pooled._m_step_from(data, responsibilities)
        located = lambda part: isinstance(part, AbstractLocationScale)  # noqa: E731
        model = jax.tree.map(
            lambda new, old: replace(old, mean=new.mean) if located(new) else old,
            moved,
            pooled,
            is_leaf=located,
        )
        for _ in range(2):
            model = model._m_step_from(data, responsibilities)
        return model

    @eqx.filter_jit  # so that an eager call compiles once
    def _m_step_from(self, data: Any, responsibilities: Any) -> Self:
        counts = jnp.sum(responsibilities, axis=0)
        emitted = sums_of(self.components, data, responsibilities)
        return self.m_step(Framed((counts, emitted), self))

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
