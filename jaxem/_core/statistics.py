"""Expected sufficient statistics that know the model they were taken about."""

from __future__ import annotations

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree
from numpy.typing import ArrayLike


class Framed(eqx.Module):
    """Sums over observations of expected sufficient statistics, taken about `frame`.

    The frame is the model (or emission) at which the E-step was done. Within one frame
    statistics add leaf by leaf; `+` first rewrites its right operand in the frame of its left
    one. So blocks of data, remembered averages and conjugate priors (pseudo-observations in a
    frame of their own) all combine by the same `a + b` and `c * a`.
    """

    sums: PyTree[Array]
    frame: Any

    def at(self, frame: Any) -> Framed:
        """The same statistics, taken about another model of the same structure."""
        if frame is self.frame:
            return self
        return Framed(frame.reframe(self.sums, self.frame), frame)

    def __add__(self, other: Framed) -> Framed:
        return Framed(jax.tree.map(jnp.add, self.sums, other.at(self.frame).sums), self.frame)

    def __mul__(self, scale: ArrayLike) -> Framed:
        return Framed(jax.tree.map(lambda leaf: scale * leaf, self.sums), self.frame)

    __rmul__ = __mul__


def distance(new: Framed, old: Framed) -> Float[Array, ""]:
    """Largest absolute difference between two statistics, in the frame of `old`."""
    gaps = jax.tree.map(lambda a, b: jnp.max(jnp.abs(a - b)), new.at(old.frame).sums, old.sums)
    return jnp.max(jnp.stack(jax.tree.leaves(gaps)))
