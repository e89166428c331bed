"""Over-relaxation: EM's step made longer while that pays."""

import equinox as eqx
import jax.numpy as jnp
from jax.flatten_util import ravel_pytree

from jaxem._core.numerics import float_dtype
from jaxem._core.parameters import free_numbers, within_bounds
from jaxem.em._acceleration import AbstractAccelerated, check_em, is_as_good, or_else
from jaxem.em._em import EM, with_memory


class Overrelaxed(AbstractAccelerated):
    """EM's step, made longer by a factor that grows as long as the objective does not fall.

    Each step costs one E-step, or two where it would fall: EM's own step is taken then, and the
    factor starts again from 1.

    **Arguments:** `em`, the algorithm to accelerate; `growth`, of the factor in each step.

    **Raises:** `ValueError` if EM is stochastic, annealed, or not over all the data; for a growth
    that is not above 1.

    Salakhutdinov & Roweis (2003), ICML 20.
    """

    em: EM = EM()
    growth: float = eqx.field(static=True, default=1.1)

    def __check_init__(self):
        check_em(self.em, "Overrelaxed")
        if not self.growth > 1:
            raise ValueError(f"the factor of Overrelaxed must grow: growth > 1, got {self.growth}.")

    def _start(self, model):
        return jnp.ones((), float_dtype(model))

    def _step(self, state, own, problem, key):
        model, memory = self._em_point(state, problem, key)
        start, (end, rebuild) = ravel_pytree(state.model)[0], free_numbers(model)
        longer = within_bounds(rebuild(start + own * (end - start)))
        bold = self.em.expect(longer, with_memory(state, memory), problem, key)
        good = is_as_good(bold, state)
        new = or_else(good, bold, lambda: self.em.step(state, problem, key=key))
        return new, jnp.where(good, self.growth * own, 1)
