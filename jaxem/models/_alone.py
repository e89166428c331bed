"""One emission as a model: a single component, without weights.

`fit(emission, x)` puts `Alone` around an emission of one component and takes it off again.
E-step: the emission's sums with responsibility 1. M-step: the emission's own.
"""

from typing import Any, ClassVar, Generic, Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core.blocks import num_observations
from jaxem._core.checks import name_of
from jaxem._core.parameters import Frozen, Parametrized, named_parameters, replace
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, Emission, cheapest, log_prob, width
from jaxem.latents import AbstractPosterior
from jaxem.models._base import AbstractModel, all_finite
from jaxem.models._finite import AbstractJointModel, sums_of_joint


class Alone(AbstractJointModel, Parametrized, Generic[Emission]):
    """An emission of one component by itself. Data: those of the emission.

    `Alone(emission).log_prob(x)` is its log-density, `Alone(emission).sample(key, n)` draws
    from it.

    **Arguments:** `emission`, with one component.

    **Raises:** `ValueError` for something else, or several components.
    """

    parameters: ClassVar = {}
    emission: Emission
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, emission: Emission):
        if not isinstance(emission, AbstractEmission):
            raise ValueError(f"Alone takes an emission, got {name_of(emission)}.")
        if emission.num_components != 1:
            kind = type(emission).__name__
            raise ValueError(
                f"an emission of one component is a model by itself, this {kind} has "
                f"{emission.num_components}: several need weights, write "
                f"jaxem.Mixture(weights, {kind}(…))."
            )
        self.emission, self.frozen = emission, ()

    @property
    def num_components(self) -> int:
        return 1

    @property
    def num_free_parameters(self) -> int:
        return self.emission.num_free_parameters

    def expected_sums(
        self, data: Any, sample_weight: Any, posterior: AbstractPosterior, key: Any
    ) -> tuple[Any, Float[Array, ""]]:
        """The emission's sums about self, and Σ w log p(x)."""

        def total(emission: AbstractEmission) -> tuple[Any, Array]:
            def log_joint(tilt: Any, x: Any) -> Float[Array, "n 1"]:
                return emission.log_prob(x, tilt)

            tilt = emission.tilt()
            return sums_of_joint(self, log_joint, tilt, data, sample_weight, posterior, key)

        return cheapest(self.emission, total, num_observations(data), self.width(data))

    def m_step(self, statistics: Framed) -> Self:
        """The emission's constrained maximum."""
        return replace(self, emission=self.emission.m_step(statistics.at(self).sums))

    def reframe(self, sums: Any, old: Self) -> Any:
        return self.emission.reframe(sums, old.emission)

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), up to a term in the data alone."""
        return self.emission.expected_log_prob(statistics.at(self).sums)

    def prior(self, *args: Any, **kwargs: Any) -> Framed:
        """The emission's prior."""
        return _framed(self.emission.prior(*args, **kwargs))

    def log_joint(self, data: PyTree[Array]) -> Float[Array, "n 1"]:
        return log_prob(self.emission, data)

    def sample(self, key: Array, n: int, **options: Any) -> tuple[PyTree[Array], Array]:
        """n draws of x, and the component of each, 0; `options` go to the emission."""
        z = jnp.zeros(n, jnp.int32)
        return self.emission.sample(key, z, **options), z

    def check(self, data: PyTree[Array]) -> None:
        self.emission.check(data)
        num_observations(data)

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        return self.emission.in_support(data)

    def width(self, data: PyTree[Array]) -> int:
        return width(self.emission, data)

    def degenerate(self, statistics: Framed) -> Bool[Array, " 1"]:
        return self.emission.degenerate(statistics.at(self).sums)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(named_parameters(self))


def as_model(given: Any, who: str) -> AbstractModel:
    """A model as it is, an emission of one component as a model.

    **Raises:** `ValueError` for something else; the message names `who` expects a model.
    """
    if isinstance(given, AbstractModel):
        return given
    if isinstance(given, AbstractEmission):
        return Alone(given)
    kind = name_of(given)
    if isinstance(given, type):
        advice = f"that is a class: {kind}.init(key, data, …) or {kind}(…) makes one"
    elif eqx.is_array_like(given):
        advice = "the model comes first, then the data"
    else:
        advice = "two plain functions become one by jaxem.from_functions"
    raise ValueError(f"{who} expects a model such as jaxem.Mixture, got {kind}; {advice}.")


def shown(model: AbstractModel) -> Any:
    """What a user gave as the model: the emission of one that is alone."""
    return model.emission if isinstance(model, Alone) else model


def framed_alone(prior: Framed | None) -> Framed | None:
    """Statistics of an emission as those of the emission alone."""
    return None if prior is None else _framed(prior)


def _framed(prior: Framed) -> Framed:
    return prior if isinstance(prior.frame, Alone) else Framed(prior.sums, Alone(prior.frame))
