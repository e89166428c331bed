"""Mixtures whose weights depend on covariates: p(x | v) = Σₖ πₖ(v) p(x | z = k).

With regressions as components it is a mixture of experts, with categories a latent class model with
covariates. E-step: that of a mixture, with log πₖ(v) a function of the gate's coefficients. M-step:
a Newton step of the gate's multinomial logistic regression, and the emission's own maximum. The
gate's sums are about the mean and scale of the covariates, ṽ = (1, (v − c)/s), as those of
regressions are (`_core/inputs.py`).

Jacobs, Jordan, Nowlan & Hinton (1991), Neural Computation 3; Jordan & Jacobs (1994), Neural
Computation 6; Bandeen-Roche, Miglioretti, Zeger & Rathouz (1997), JASA 92 (latent classes).
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core import linalg as la
from jaxem._core.blocks import num_observations
from jaxem._core.causes import either
from jaxem._core.checks import checked_key
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import finite
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, Emission, width
from jaxem.factors._logistic import LogisticGate
from jaxem.models._composite import check_one_model
from jaxem.models._finite import AbstractMixture
from jaxem.models._mixture import Mixture, check_start


class MixtureOfExperts(AbstractMixture, Generic[Emission]):
    """A mixture whose weights depend on covariates. Data: a tuple of covariates v (n, p) and x.

    **Arguments:** `gate`, a `LogisticGate`; `components`, any emission. Regressions, whose data
    are a tuple of inputs and outputs themselves, make it a mixture of experts: data (v, (u, y)).

    `MixtureOfExperts.from_mixture(mixture, num_covariates)` is a start.

    **Raises:** `ValueError` for something else, or for numbers of components that differ.
    """

    factors: ClassVar[tuple[str, ...]] = ("gate", "components")
    gate: LogisticGate
    components: Emission

    def __init__(self, gate: LogisticGate, components: Emission):
        if not isinstance(gate, LogisticGate):
            raise ValueError(f"gate must be a LogisticGate, got {type(gate).__name__}.")
        if not isinstance(components, AbstractEmission):
            raise ValueError(f"components must be an emission, got {type(components).__name__}.")
        if gate.num_components != components.num_components:
            raise ValueError(
                f"the gate has {gate.num_components} components, the emission "
                f"{components.num_components}."
            )
        self.gate, self.components = gate, components

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
        """A start for a fit: that of a mixture of the components' data, whatever the covariates.

        **Arguments:** as for `Mixture.init`; `data`, the tuple of covariates and the data of the
        components.

        **Raises:** `ValueError` as `Mixture.init` does, or for data that are no such tuple.
        """
        covariates, x = _pair(as_arrays(data))
        mixture = Mixture.init(
            key, x, num_components, family, sample_weight=sample_weight, method=method
        )
        return cls.from_mixture(mixture, covariates.shape[1])

    @classmethod
    def from_mixture(cls, mixture: Mixture, num_covariates: int) -> Self:
        """A start from a mixture: its weights, whatever the covariates."""
        check_start(mixture)
        logits = la.floored_log(mixture.weights)
        slopes = jnp.zeros((len(logits), num_covariates), logits.dtype)
        return cls(LogisticGate(slopes, logits - logits[-1]), mixture.components)

    def tilted(self, tilt: Any, data: Any) -> Float[Array, "n k"]:
        (gate, emitted), (v, x) = tilt, data
        return self.gate.log_weights(v, gate) + self.components.log_prob(x, emitted)

    def check(self, data: Any) -> None:
        check_one_model(self, "a gate with an intercept", self.gate.intercepts)
        covariates, x = _pair(data)
        self.gate.check(covariates)
        self.components.check(x)
        num_observations(data)

    def in_support(self, data: Any) -> Bool[Array, " n"]:
        v, x = data
        return finite(v) & self.components.in_support(x)

    def width(self, data: Any) -> int:
        """Numbers an E-step holds for each observation: those of the gate and of the components."""
        return width(self.components, data[1]) + 3 * self.gate.slopes.size

    def sample(
        self, key: Array, covariates: Float[Array, "n p"], **options: Any
    ) -> tuple[PyTree[Array], Int[Array, " n"]]:
        """A draw of x at each row of `covariates`, and the components z that they come from.

        `options` go to the emission: `inputs`, if it is a regression.
        """
        z_key, x_key = jax.random.split(checked_key(key))
        z = jax.random.categorical(z_key, self.gate.log_weights(covariates), axis=1)
        return self.components.sample(x_key, z, **options), z

    def degenerate(self, statistics: Framed) -> Int[Array, " k"]:
        gated, emitted = statistics.at(self).sums
        return either(self.components.degenerate(emitted), self.gate.degenerate(gated))


def _pair(data: Any) -> tuple[Any, Any]:
    """Covariates and the components' data. Raises `ValueError` for what is no such pair."""
    if not isinstance(data, tuple) or len(data) != 2:
        given = f"a tuple of {len(data)}" if isinstance(data, tuple) else type(data).__name__
        raise ValueError(
            "MixtureOfExperts expects a tuple (v, x) of covariates v (n, p) and the data x of "
            f"its components, (v, (u, y)) if those are regressions; got {given}."
        )
    return data
