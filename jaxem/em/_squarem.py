"""SQUAREM: squared extrapolation of two EM steps."""

import jax
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import estimates, free_numbers, within_bounds
from jaxem.em._acceleration import (
    AbstractAccelerated,
    check_em,
    is_as_good,
    length_of,
    magnitude,
    or_else,
)
from jaxem.em._em import EM


class SQUAREM(AbstractAccelerated):
    """Squared extrapolation: θ − 2 α r + α² v, from two EM steps r and r + v.

    α = −‖r‖ / ‖v‖, at most −1, where −1 is EM. The points are extrapolated as unconstrained leaves,
    the lengths taken of parameters, each relative to its root mean square. An EM step from
    there ends it, so that a step costs three E-steps, and a fourth where the objective would
    fall: then r and r + v are taken as they are.

    **Arguments:** `em`, the algorithm to accelerate.

    **Raises:** `ValueError` if that is stochastic, annealed, or not over all the data.

    Varadhan & Roland (2008), Scand. J. Stat. 35, scheme S3 and its step bounds.
    """

    em: EM = EM()

    def __check_init__(self):
        check_em(self.em, "SQUAREM")

    def _start(self, model):
        return jnp.ones((), float_dtype(model))  # the longest step that is tried now

    def _step(self, state, own, problem, key):
        em, longest = self.em, own
        start = ravel_pytree(state.model)[0]
        first = em.step(state, problem, key=key)
        second_model, _ = self._em_point(first, problem, key)
        # A probability that vanishes converges, while its logarithm does not.
        unit = jax.tree.map(magnitude, estimates(state.model))
        points = [
            ravel_pytree(jax.tree.map(jnp.divide, estimates(m), unit))[0]
            for m in (state.model, first.model, second_model)
        ]
        bend = length_of(points[2] - 2 * points[1] + points[0])
        size = length_of(points[1] - points[0])
        length = jnp.clip(jnp.where(bend > 0, size / jnp.where(bend > 0, bend, 1), 1), 1, longest)
        one, (two, rebuild) = ravel_pytree(first.model)[0], free_numbers(second_model)
        r, v = one - start, two - 2 * one + start
        proposed = within_bounds(rebuild(start + 2 * length * r + length**2 * v))

        bold = em.step(em.expect(proposed, first, problem, key), problem, key=key)
        good = is_as_good(bold, state)
        new = or_else(good, bold, lambda: em.step(first, problem, key=key))
        at_bound = length == longest
        longest = jnp.where(at_bound & good, 4 * longest, longest)
        longest = jnp.where(at_bound & ~good, jnp.maximum(1, longest / 4), longest)
        return new, longest
