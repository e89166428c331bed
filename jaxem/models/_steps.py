"""The steps of all sequences in one row, as an emission sees them: what chains of states share."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._emission import AbstractEmission, pull_back, width, with_shortcut
from jaxem._sequences import Sequences
from jaxem._units import map_over_units, num_units, substitute


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
        at = emission.coordinates()
        return map_over_units(lambda part: emission.log_prob_at(at, part), x, width=size)

    log_b = with_shortcut(emission, log_prob_of, num_units(x), size).reshape(*present.shape, -1)
    return jnp.where(present[:, :, None], log_b, 0)


def emitted_sums(
    emission: AbstractEmission, x: PyTree[Array], responsibilities: Float[Array, "n k"]
) -> PyTree[Array]:
    """The emission's sums for given responsibilities."""

    def sums(emission: AbstractEmission) -> PyTree[Array]:
        return emission.statistics(pull_back(emission, emission.coordinates(), x, responsibilities))

    return with_shortcut(emission, sums, num_units(x), width(emission, x))
