"""One emission as a model: a single component, without weights.

`fit(emission, x)` puts `Alone` around an emission of one component and takes it off again.
E-step: the emission's sums with responsibility 1. M-step: the emission's own.
"""

from typing import Any, ClassVar, Generic

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.blocks import num_observations
from jaxem._core.checks import check_count, checked_key, name_of
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, Emission, width
from jaxem.models._base import AbstractModel
from jaxem.models._finite import AbstractMixture


class Alone(AbstractMixture, Generic[Emission]):
    """An emission of one component by itself. Data: those of the emission.

    `Alone(emission).log_prob(x)` is its log-density, `Alone(emission).sample(key, n)` draws
    from it.

    **Arguments:** `emission`, with one component.

    **Raises:** `ValueError` for something else, or several components.
    """

    factors: ClassVar[tuple[str, ...]] = ("emission",)
    emission: Emission

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
        self.emission = emission

    def tilted(self, tilt: Any, data: PyTree[Array]) -> Float[Array, "n 1"]:
        return self.emission.log_prob(data, *tilt)

    def sample(self, key: Array, n: int, **options: Any) -> tuple[PyTree[Array], Array]:
        """n draws of x, and the component of each, 0; `options` go to the emission."""
        check_count("n", n, 0)
        z = jnp.zeros(n, jnp.int32)
        return self.emission.sample(checked_key(key), z, **options), z

    def check(self, data: PyTree[Array]) -> None:
        self.emission.check(data)
        num_observations(data)

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        return self.emission.in_support(data)

    def width(self, data: PyTree[Array]) -> int:
        return width(self.emission, data)

    def degenerate(self, statistics: Framed) -> Int[Array, " 1"]:
        return self.emission.degenerate(*statistics.at(self).sums)


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


def shown(given: Any) -> Any:
    """What a user gave as the model, or statistics of that: the emission of one that is alone."""
    if isinstance(given, Framed) and isinstance(given.frame, Alone):
        (sums,) = given.sums
        return Framed(sums, given.frame.emission)
    return given.emission if isinstance(given, Alone) else given


def framed_alone(prior: Framed | None) -> Framed | None:
    """Statistics of an emission as those of the emission alone."""
    if prior is None or isinstance(prior.frame, Alone):
        return prior
    return Framed((prior.sums,), Alone(prior.frame))
