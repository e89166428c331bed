"""The steps of all sequences along one axis, as an emission takes them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core.blocks import map_over_observations, num_observations, substitute
from jaxem._core.sequences import Sequences
from jaxem.emissions._base import AbstractEmission, cheapest, sums_of, width


def usable_steps(
    emission: AbstractEmission, sequences: Sequences, w: Any
) -> tuple[Bool[Array, "b t"], PyTree[Array]]:
    """Which steps count, and the steps in one row, with others in place of those that do not.

    A sequence of weight 0 still counts where it is possible: its weight has a derivative.
    """
    present, x = sequences.present, sequences.steps()
    if w is not None:
        possible = emission.in_support(x).reshape(present.shape)
        present = present & ((w != 0)[:, None] | possible)
    return present, substitute(x, present.reshape(-1))


def log_prob_of_steps(
    emission: AbstractEmission, x: PyTree[Array], present: Bool[Array, "b t"]
) -> Float[Array, "b t k"]:
    size = width(emission, x)

    def log_prob_of(emission: AbstractEmission) -> Float[Array, "n k"]:
        at = emission.tilt()
        return map_over_observations(lambda part: emission.log_prob(part, at), x, width=size)

    log_b = cheapest(emission, log_prob_of, num_observations(x), size).reshape(*present.shape, -1)
    return jnp.where(present[:, :, None], log_b, 0)


def emitted_sums(
    emission: AbstractEmission, x: PyTree[Array], responsibilities: Float[Array, "n k"]
) -> PyTree[Array]:
    """The emission's sums for given responsibilities."""

    def sums(emission: AbstractEmission) -> PyTree[Array]:
        return sums_of(emission, x, responsibilities)

    return cheapest(emission, sums, num_observations(x), width(emission, x))
