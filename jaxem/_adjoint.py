"""How derivatives pass through the iterations of a fit: a strategy object given to `fit`."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
from jax import lax
from jaxtyping import Array, Bool, PyTree


class Loop(NamedTuple):
    """A fit as a loop over a carry, each part a pure function of the inputs.

    The inputs are everything that may carry a derivative: model, data, weights and prior.
    """

    start: Callable[[PyTree[Array]], Any]
    unfinished: Callable[[Any], Bool[Array, ""]]
    advance: Callable[[Any, PyTree[Array]], Any]


class AbstractAdjoint(eqx.Module):
    """Runs the loop of a fit, and decides what derivative its outcome has."""

    @abc.abstractmethod
    def __call__(self, loop: Loop, inputs: PyTree[Array]) -> Any:
        """The final carry."""


class Forward(AbstractAdjoint):
    """Derivatives in forward mode, through every step of the loop.

    `jax.jvp` and `jax.jacfwd` of a fit work, at the cost of one tangent for each step; `jax.grad`
    raises JAX's error that a while-loop has no reverse mode.
    """

    def __call__(self, loop: Loop, inputs: PyTree[Array]) -> Any:
        return lax.while_loop(
            loop.unfinished, lambda carry: loop.advance(carry, inputs), loop.start(inputs)
        )
