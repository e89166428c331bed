"""Numbers that change from step to step: rates, temperatures, numbers of draws.

Modules, so that they compare by value: two algorithms of equal settings share one program.
"""

from __future__ import annotations

import abc

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxem._core.checks import check_count, check_number


class AbstractSchedule(eqx.Module):
    """A number for each step."""

    @abc.abstractmethod
    def __call__(self, step: Int[Array, ""]) -> Float[Array, ""]: ...

    def known_at(self, step: int) -> float:
        """The number at this step, while a program is being traced too."""
        with jax.ensure_compile_time_eval():
            return float(self(jnp.asarray(step)))


class Constant(AbstractSchedule):
    """The same number at every step.

    **Arguments:** `value`, any number; what takes a schedule says which make sense.
    """

    value: float = eqx.field(static=True)

    def __check_init__(self):
        check_number("value", self.value)

    def __call__(self, step):
        return jnp.asarray(self.value, float)


class Power(AbstractSchedule):
    """(t + offset)^−exponent: the learning rates of stochastic approximation.

    Σ γₜ = ∞ and Σ γₜ² < ∞ (Robbins & Monro) where ½ < exponent ≤ 1. During the first `burn_in`
    steps the rate is 1, and t counts from their end: what was averaged far from the end is
    forgotten. It is never more than 1, where an offset below 1 begins.

    **Raises:** `ValueError` for an exponent or an offset that is not positive, or a burn-in that
    is no number of steps.
    """

    exponent: float = eqx.field(static=True, default=0.6)
    offset: float = eqx.field(static=True, default=1.0)
    burn_in: int = eqx.field(static=True, default=0)

    def __check_init__(self):
        check_count("burn_in", self.burn_in, 0)
        check_number("exponent", self.exponent)
        check_number("offset", self.offset)
        if not (self.exponent > 0 and self.offset > 0):
            raise ValueError(f"Power needs a positive exponent and offset, got {self}.")

    def __call__(self, step):
        counted = jnp.maximum(step - self.burn_in, 0)
        rate = (counted + self.offset) ** -jnp.asarray(self.exponent, float)
        return jnp.where(step < self.burn_in, 1, jnp.minimum(rate, 1))


class Geometric(AbstractSchedule):
    """start · factorᵗ until it reaches `end`, then `end`: temperatures, falling or rising.

    **Raises:** `ValueError` for numbers that are not positive or a factor that leads away.
    """

    start: float = eqx.field(static=True)
    factor: float = eqx.field(static=True)
    end: float = eqx.field(static=True, default=1.0)

    def __check_init__(self):
        for name, value in vars(self).items():
            check_number(name, value)
        if not (self.start > 0 and self.factor > 0 and self.end > 0):
            raise ValueError(f"Geometric needs positive numbers, got {self}.")
        away = self.factor >= 1 if self.start > self.end else self.factor <= 1
        if self.start != self.end and away:
            raise ValueError(f"{self} never reaches its end.")

    def __call__(self, step):
        value = self.start * jnp.asarray(self.factor, float) ** step
        bound = jnp.maximum if self.start >= self.end else jnp.minimum
        return bound(value, self.end)


class Linear(AbstractSchedule):
    """start + slope · t: numbers of draws that grow.

    **Raises:** `ValueError` for a start that is not positive or a slope that is negative.
    """

    start: float = eqx.field(static=True)
    slope: float = eqx.field(static=True)

    def __check_init__(self):
        check_number("start", self.start)
        check_number("slope", self.slope)
        if not (self.start > 0 and self.slope >= 0):
            raise ValueError(f"Linear needs a positive start and no negative slope, got {self}.")

    def __call__(self, step):
        return self.start + jnp.asarray(self.slope, float) * step
