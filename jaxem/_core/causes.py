"""Why components are degenerate: numbers, which pass through `jax.jit` and `jax.vmap`."""

import enum

import jax.numpy as jnp
from jaxtyping import Array, Bool, Int


class CAUSES(enum.IntEnum):
    """Why a component is degenerate; 0 where it is not.

    - `few_observations`: it rests on less than one observation, or on fewer than its spread or
      its coefficients need.
    - `small_weights`: likewise, where observations weigh less than one each: too little for its
      parameters, however many they are.
    - `no_variance`: its variance along some direction is hardly any.
    - `bound`: a parameter is at the bound where the likelihood is unbounded.
    - `heywood`: factors leave hardly any noise to some feature, see `uniqueness`.
    - `separation`: inputs tell outcomes apart without error, so that coefficients grow for ever.
    """

    none = 0
    few_observations = 1
    small_weights = 2
    no_variance = 3
    bound = 4
    separation = 5
    heywood = 6


def caused(**flags: Bool[Array, " k"]) -> Int[Array, " k"]:
    """The first of some causes, in the order given, that holds for each component."""
    found = jnp.zeros((), jnp.int32)
    for name, flag in reversed(flags.items()):
        found = jnp.where(flag, CAUSES[name].value, found)
    return found


def either(cause: Int[Array, " k"], other: Int[Array, " k"]) -> Int[Array, " k"]:
    """A cause, or another one where there is none."""
    return jnp.where(cause == 0, other, cause)
