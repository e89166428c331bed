"""Finite mixtures of any emission: p(x) = Σₖ πₖ p(x | z = k).

E-step. The log-joint is log πₖ + log p(x | z = k); one `jax.vjp` of it at the emission's
coordinates, pulled back along the responsibilities, gives the expected counts nₖ = Σ r and the
emission's sums, block by block of units. M-step: πₖ ← nₖ / Σ n and the emission's `maximize`.

McLachlan & Peel (2000), *Finite Mixture Models*; Dempster, Laird & Rubin (1977), section 4.3.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem import _init
from jaxem import _linalg as la
from jaxem._checks import check_shape, check_values
from jaxem._emission import AbstractEmission, Emission, float_dtype, log_prob, width, with_shortcut
from jaxem._hold import Held, free, held_mask, natural_parameters, replace
from jaxem._joint import AbstractJointModel, sums_of_joint
from jaxem._model import all_finite
from jaxem._posterior import AbstractPosterior, Exact
from jaxem._statistics import Framed
from jaxem._units import as_arrays, num_units
from jaxem.emissions._common import as_float, pseudo_count
from jaxem.emissions.categorical import check_simplex, free_log_shares


class Mixture(AbstractJointModel, Generic[Emission]):
    """A finite mixture.

    **Arguments:** `weights` (k,), in the simplex; `components`, an emission with k components.

    **Raises:** `ValueError` if the weights are not probabilities or not one per component.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"weights": ("logits",)}
    logits: Float[Array, " k"]
    components: Emission
    held: Held = eqx.field(static=True)

    def __init__(self, weights: ArrayLike, components: Emission):
        if not isinstance(components, AbstractEmission):
            raise ValueError(
                "Mixture takes weights, then its components, an emission such as "
                f"Poisson([[1.0], [2.0]]); got {type(components).__name__}."
            )
        weights = as_float(weights)
        check_shape("weights", weights, (components.num_components,))
        check_simplex("weights", weights)
        self.logits = la.floored_log(weights)
        self.components = components
        self.held = ()

    @property
    def weights(self) -> Float[Array, " k"]:
        """Mixing proportions."""
        return jax.nn.softmax(self.logits)

    @property
    def num_components(self) -> int:
        return self.components.num_components

    @property
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves, as AIC and BIC count them."""
        weights = max(int(np.sum(free(self, "weights"))) - 1, 0)
        return weights + self.components.num_free_parameters

    # E-step

    def expected_sums(
        self, data: Any, weights: Any, posterior: AbstractPosterior, key: Any
    ) -> tuple[Any, Float[Array, ""]]:
        """Sums about self and Σ w log p(x), by the cheaper form of the components if it will do."""

        def total(components: AbstractEmission) -> Any:
            return replace(self, components=components)._sums(data, weights, posterior, key)

        return with_shortcut(self.components, total, num_units(data), self.width(data))

    def _sums(
        self, data: Any, weights: Any, posterior: AbstractPosterior, key: Any, given: Any = None
    ) -> Any:
        """Sums about self and Σ w log p(x); `given` responsibilities replace the posterior's."""
        at = (jax.nn.log_softmax(self.logits), self.components.coordinates())

        def log_joint(coordinates: Any, x: Any) -> Float[Array, "n k"]:
            log_weights, emission_coordinates = coordinates
            log_prob = self.components.log_prob_at(emission_coordinates, x)
            return la.repeat(log_weights, log_prob.shape[0]).T + log_prob

        (counts, cotangents), value = sums_of_joint(
            self, log_joint, at, data, weights, posterior, key, given
        )
        return (counts, self.components.statistics(cotangents)), value

    def width(self, data: PyTree[Array]) -> int:
        """Numbers an E-step holds for each unit: one for each component and feature."""
        return width(self.components, data)

    def reframe(self, sums: Any, old: Self) -> Any:
        counts, component_sums = sums
        return counts, self.components.reframe(component_sums, old.components)

    # M-step

    def m_step(self, statistics: Framed) -> Self:
        """The constrained maximum: free weights share what held ones leave."""
        counts, sums = statistics.at(self).sums
        logits = free_log_shares(counts, self.logits, held_mask(self, "weights"))
        return replace(self, logits=logits, components=self.components.maximize(sums))

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics) = Σ r (log π + log p(x | z)), up to a term in the data alone."""
        counts, sums = statistics.at(self).sums
        own = jnp.sum(counts * jax.nn.log_softmax(self.logits))
        return own + self.components.expected_log_prob(sums)

    def prior(self, weights: ArrayLike | None = None, components: Framed | None = None) -> Framed:
        """The conjugate prior as pseudo-statistics; `None` leaves a part flat.

        **Arguments:** `weights`, concentrations (≥ 1, scalar or (k,)) of a Dirichlet;
        `components`, from `self.components.prior(…)`.

        **Raises:** `ValueError` for a concentration below 1.
        """
        concentration = jnp.asarray(1.0 if weights is None else weights)
        counts = pseudo_count("weights − 1", concentration - 1, self.logits)
        own = self.components.prior() if components is None else components
        return Framed((counts, own.sums), replace(self, components=own.frame))

    # What a mixture says of data

    def check(self, data: PyTree[Array]) -> None:
        if self.logits.ndim != 1:
            raise ValueError(
                f"a mixture has weights of shape (k,), these have {self.logits.shape}: fit takes "
                "one model; fit_restarts and jax.vmap take models stacked along a leading axis, "
                "as jax.vmap over init gives."
            )
        self.components.check(data)
        num_units(data)

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        return self.components.in_support(data)

    def log_joint(self, data: PyTree[Array]) -> Float[Array, "n k"]:
        """log πₖ + log p(x | z = k) of each unit."""
        return jax.nn.log_softmax(self.logits) + log_prob(self.components, data)

    def sample(self, key: Array, n: int) -> tuple[PyTree[Array], Int[Array, " n"]]:
        """n draws of x, and the components z that they come from."""
        z_key, x_key = jax.random.split(key)
        z = jax.random.categorical(z_key, self.logits, shape=(n,))
        return self.components.sample(x_key, z), z

    def degenerate(self, statistics: Framed, min_variance: Any) -> Bool[Array, " k"]:
        counts, sums = statistics.at(self).sums
        flags = self.components.degenerate(sums, min_variance)
        return flags | ((counts < 1) & free(self, "weights"))

    def representable(self) -> Bool[Array, ""]:
        return all_finite(natural_parameters(self))

    # Starts

    @classmethod
    def init(
        cls,
        key: Array,
        data: PyTree[Array],
        num_components: int,
        family: Any,
        *,
        weights: Float[Array, " n"] | None = None,
        method: str = "k-means++",
    ) -> Self:
        """A start for a fit: one component around each of `num_components` units.

        **Arguments:**

        - `family`: an emission class, or `functools.partial` of one.
        - `method`: `"k-means++"` draws units far from each other in the family's own deviance;
          `"random"` draws them by weight alone.

        Pure, so that restarts are a `jax.vmap` over keys.

        **Raises:** `ValueError` for more components than units, an unknown method, or a unit that
        is known to lie outside the family's support.
        """
        data, weights = as_arrays(data), as_arrays(weights)
        return cls._uniform(_init.seed(key, data, num_components, family, weights, method))

    @classmethod
    def from_responsibilities(
        cls,
        data: PyTree[Array],
        responsibilities: Float[Array, "n k"],
        family: Any,
        *,
        weights: Float[Array, " n"] | None = None,
    ) -> Self:
        """The M-step from given responsibilities, rows that sum to one.

        Labels are the case of one-hot rows, `jax.nn.one_hot(labels, num_components)`.

        **Raises:** `ValueError` if there is not one such row for each unit.
        """
        data, weights = as_arrays(data), as_arrays(weights)
        responsibilities = jnp.asarray(responsibilities)
        check_shape("responsibilities", responsibilities, (num_units(data), "k"))
        total = jnp.sum(responsibilities, axis=1)
        counted = jnp.ones_like(total) if weights is None else weights
        check_values(
            (counted == 0) | ((jnp.abs(total - 1) < 1e-3) & jnp.all(responsibilities >= 0, axis=1)),
            "responsibilities: each row holds probabilities that sum to 1, as those of "
            "jax.nn.one_hot(labels, num_components).",
        )
        k = responsibilities.shape[1]
        pooled = cls._uniform(_init.pooled(data, k, family, weights))
        _init.check_support(pooled.components, data, weights)
        # About the pooled mean and scale, the moments of tight clusters cancel: move the means
        # first, then the scales, then both about components that are in place.
        moved = pooled._m_step_from(data, weights, responsibilities)
        model = jax.tree_util.tree_map_with_path(
            lambda path, new, old: new if getattr(path[-1], "name", "") == "mean" else old,
            moved,
            pooled,
        )
        for _ in range(2):
            model = model._m_step_from(data, weights, responsibilities)
        return model

    @eqx.filter_jit  # so that an eager call compiles once
    def _m_step_from(self, data: Any, weights: Any, responsibilities: Any) -> Self:
        sums, _ = self._sums(data, weights, Exact(), None, given=responsibilities)
        return self.m_step(Framed(sums, self))

    @classmethod
    def _uniform(cls, components: Any) -> Self:
        k = components.num_components
        return cls(jnp.full(k, 1 / k, float_dtype(components)), components)


def check_start(mixture: Any) -> None:
    """Raises `ValueError` unless a model without its weights can start from this mixture."""
    if not isinstance(mixture, Mixture):
        raise ValueError(f"from_mixture expects a Mixture, got {type(mixture).__name__}.")
    if held_mask(mixture, "weights") is not False:
        raise ValueError(
            "the weights of this mixture are frozen, and the model that starts from it has no "
            "such weights: unfreeze them, and freeze what should stay in that model."
        )
