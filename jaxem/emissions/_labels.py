"""Known components of some observations: what semi-supervised fits add to their data."""

from typing import Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxem._core.checks import check_count, check_shape
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractNested, AbstractStarting


class Labels(AbstractNested, AbstractStarting):
    """The component itself, observed: p(label | z = k) is 1 if label = k, and else 0.

    A label of −1 says nothing. As a part of `Independent` it makes a fit semi-supervised:
    observations whose label is known count for their component alone, the others as ever. In an HMM
    it tells the states of some steps. It has no parameters.

    **Arguments:** `num_components`. Data: labels (n, 1), integers from −1 to k − 1.

    Labels name the components, which a start must have in their order:
    `Mixture.from_responsibilities`, with uniform rows where no label is known, gives one.

    **Raises:** `ValueError` for less than one component.
    """

    size: int = eqx.field(static=True)

    def __init__(self, num_components: int):
        check_count("num_components", num_components)
        self.size = num_components

    @property
    def num_components(self) -> int:
        return self.size

    def check(self, x: Int[Array, "n 1"]) -> None:
        check_shape("labels", x, ("n", 1))
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"labels are integers, −1 where none is known; got {x.dtype}.")

    def in_support(self, x: Int[Array, "n 1"]) -> Bool[Array, " n"]:
        return (x[:, 0] >= -1) & (x[:, 0] < self.size)

    def log_prob(self, x: Int[Array, "n 1"], tilt: tuple[()]) -> Float[Array, "n k"]:
        possible = (x < 0) | (x == jnp.arange(self.size))
        return jnp.where(possible, 0.0, -jnp.inf)

    def prior(self) -> Framed:
        """Labels have no parameters, and so an empty prior."""
        return Framed((), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Int[Array, "n 1"]:
        return z[:, None]

    @classmethod
    def pooled(cls, x, num_components, sample_weight):
        return cls(num_components)

    def located_at(self, x: Int[Array, "k 1"], spread: Float[Array, ""]) -> Self:
        raise ValueError(
            "labels name the components, and observations drawn at random come in no such order: "
            "start from Mixture.from_responsibilities, with uniform rows where no label is known."
        )
