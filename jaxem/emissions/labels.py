"""Known components of some units: what semi-supervised fits add to their data."""

from typing import ClassVar, Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxem._checks import check_count, check_shape
from jaxem._emission import AbstractEmission
from jaxem._hold import Held, replace
from jaxem._statistics import Framed


class Labels(AbstractEmission):
    """The component itself, observed: p(label | z = k) is 1 if label = k, and else 0.

    A label of −1 says nothing. As a part of `Independent` it makes a fit semi-supervised: units
    whose label is known count for their component alone, the others as ever. In an HMM it tells
    the states of some steps. It has no parameters.

    **Arguments:** `num_components`. Data: labels (n, 1), integers from −1 to k − 1.

    Labels name the components, which a start must have in their order:
    `Mixture.from_responsibilities`, with uniform rows where no label is known, gives one.

    **Raises:** `ValueError` for less than one component.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {}
    size: int = eqx.field(static=True)
    held: Held = eqx.field(static=True)

    def __init__(self, num_components: int):
        check_count("num_components", num_components)
        self.size, self.held = num_components, ()

    @property
    def num_components(self) -> int:
        return self.size

    @property
    def num_free_parameters(self) -> int:
        return 0

    def check(self, x: Int[Array, "n 1"]) -> None:
        check_shape("labels", x, ("n", 1))
        if not jnp.issubdtype(x.dtype, jnp.integer):
            raise ValueError(f"labels are integers, −1 where none is known; got {x.dtype}.")

    def in_support(self, x: Int[Array, "n 1"]) -> Bool[Array, " n"]:
        return (x[:, 0] >= -1) & (x[:, 0] < self.size)

    def coordinates(self) -> tuple[()]:
        return ()

    def log_prob_at(self, coordinates: tuple[()], x: Int[Array, "n 1"]) -> Float[Array, "n k"]:
        possible = (x < 0) | (x == jnp.arange(self.size))
        return jnp.where(possible, 0.0, -jnp.inf)

    def statistics(self, cotangents: tuple[()]) -> tuple[()]:
        return ()

    def reframe(self, sums: tuple[()], old: Self) -> tuple[()]:
        return ()

    def maximize(self, sums: tuple[()]) -> Self:
        return self

    def expected_log_prob(self, sums: tuple[()]) -> Float[Array, ""]:
        return jnp.asarray(0.0)

    def prior(self) -> Framed:
        """There is nothing to have a prior of."""
        return Framed((), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Int[Array, "n 1"]:
        return z[:, None]

    def degenerate(self, sums: tuple[()], min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        return jnp.zeros(self.size, bool)

    @classmethod
    def pooled(cls, x, num_components, weights):
        return replace(object.__new__(cls), size=num_components, held=())

    def located_at(self, x: Int[Array, "k 1"], spread: Float[Array, ""]) -> Self:
        raise ValueError(
            "labels name the components, and units drawn at random come in no such order: start "
            "from Mixture.from_responsibilities, with uniform rows where no label is known."
        )

    def shortcut(self) -> None:
        return None
