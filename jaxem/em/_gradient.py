"""Generalised EM: an M-step by gradients of Q."""

import math
from typing import Any

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.checks import check_count
from jaxem._core.parameters import free_numbers, log_numbers, replace
from jaxem._core.statistics import Framed
from jaxem.em._maximization import AbstractMaximization
from jaxem.em._traits import Traits
from jaxem.models._base import AbstractNamelessModel, local_part, slope_part

_LONGEST = 4.0


class Gradient(AbstractMaximization):
    """Generalised EM: a few steps of an Optax optimiser up Q, from the present model.

    If Q ends lower than it began, the whole step is halved until it does not; the optimiser's
    state is then reset, and the updates that follow are a quarter as long, growing again while Q
    rises. A step that was halved never counts as converged. Q is a sum over observations: the
    scale of a learning rate is that of one over their number, unless the optimiser adapts.

    What the optimiser sees has no units: each free number is measured by the curvature of Q along
    it, so that a step of 0.1 moves a mean by a tenth of a standard deviation. Where that changes by
    more than a factor of 2, units are taken anew and the optimiser's state is reset.

    **Arguments:**

    - `optimiser`, such as `optax.adam(1e-2)` or `optax.lbfgs()`; it compares by identity, so make
      it once. The line search of `optax.lbfgs()` has no reverse mode: `Unrolled()` cannot
      differentiate it, `Implicit()` need not.
    - `num_steps` for each M-step.
    - `objective`: climb the objective itself instead of Q, at the cost of an E-step and its
      derivative each time (ECME). Where statistics hold Q only near the model, as those of
      regressions do, the objective is always climbed; drawn statistics then change nothing.

    **Raises:** `ValueError` for something else than an optimiser, or no step.

    Dempster, Laird & Rubin (1977), section 1; Lange (1995), JRSS B 57; Liu & Rubin (1994),
    Biometrika 81 (ECME).
    """

    optimiser: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True, default=5)
    objective: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if not isinstance(self.optimiser, optax.GradientTransformation):
            raise ValueError(f"Gradient takes an Optax optimiser, got {self.optimiser!r}.")
        check_count("num_steps", self.num_steps)

    @property
    def traits(self) -> Traits:
        return Traits(stationary=False, maximal=False, uses_objective=self.objective)

    def init(self, model):
        numbers = free_numbers(model)[0]
        own = _strongly_typed(self.optimiser.init(numbers))
        count = jnp.zeros((), jnp.int32)
        one = jnp.ones((), numbers.dtype)
        return _Climb(own, one, jnp.asarray(True), count, jnp.ones_like(numbers))

    def conclusive(self, memory, step):
        return memory.whole

    def __call__(self, statistics, memory, evaluate, total):
        memory = self._measured(memory, statistics, total)
        unit = memory.unit
        numbers, with_numbers = free_numbers(statistics.frame)
        start = numbers / unit

        def rebuild(numbers: Array) -> Any:
            return with_numbers(numbers * unit)

        update = optax.with_extra_args_support(self.optimiser).update
        climbs_objective = self.objective or local_part(statistics.frame)

        def loss(numbers: Array) -> Float[Array, ""]:
            model = rebuild(numbers.astype(start.dtype))  # line searches can promote
            return -(
                evaluate(model)[1] if climbs_objective else model.expected_log_prob(statistics)
            )

        def ascend(carry: tuple[Array, Any], _: None) -> tuple[tuple[Array, Any], None]:
            numbers, own = carry
            value, slope = jax.value_and_grad(loss)(numbers)
            extra = {"value": value, "grad": slope, "value_fn": loss}
            change: Any
            change, own = update(slope, own, numbers, **extra)
            return ((numbers + memory.scale * change).astype(start.dtype), own), None

        (end, own), _ = lax.scan(ascend, (start, memory.optimiser), length=self.num_steps)
        share, end = _not_worse(loss, start, end, total)
        whole = share == 1
        fresh = _strongly_typed(self.optimiser.init(start))
        own = jax.tree.map(lambda a, b: jnp.where(whole, a, b), _strongly_typed(own), fresh)
        scale = jnp.where(whole, jnp.minimum(2 * memory.scale, 1), memory.scale / 4)
        model = with_numbers(jnp.where(end == start, numbers, end * unit))
        return model, _Climb(own, scale, whole, memory.count + 1, unit)

    def _measured(self, memory: "_Climb", statistics: Framed, total: Any) -> "_Climb":
        """The memory with units that are about right, looked at after 0, 1, 2, 4, … M-steps."""
        frame = statistics.frame
        if slope_part(frame) or isinstance(frame, AbstractNamelessModel):
            return memory  # the curvature of Q is not known

        def anew() -> _Climb:
            unit = _units(statistics, total)
            change = jnp.abs(jnp.log(unit / memory.unit))
            stale = jnp.any(change > math.log(2))
            fresh = _strongly_typed(self.optimiser.init(free_numbers(frame)[0] / unit))
            own = jax.tree.map(lambda a, b: jnp.where(stale, a, b), fresh, memory.optimiser)
            return replace(memory, optimiser=own, unit=jnp.where(stale, unit, memory.unit))

        due = memory.count & (memory.count - 1) == 0
        return lax.cond(eqxi.unvmap_any(due), anew, lambda: memory)


def _units(statistics: Framed, total: Any) -> Array:
    """For each free number the step at which Q falls by half a nat an observation.

    Of logarithms no more than `_LONGEST`: along those of what vanishes Q is flat.
    """
    numbers, rebuild = free_numbers(statistics.frame)

    def slope(numbers: Array) -> Array:
        return jax.grad(lambda n: rebuild(n).expected_log_prob(statistics))(numbers)

    _, bend = jax.linearize(slope, numbers)
    own = lax.map(lambda i: bend(jnp.zeros_like(numbers).at[i].set(1))[i], jnp.arange(numbers.size))
    curved = jnp.isfinite(own) & (own != 0)
    unit = jnp.where(curved, jnp.sqrt(total / jnp.abs(jnp.where(curved, own, 1))), 1)
    return jnp.where(log_numbers(statistics.frame), jnp.minimum(unit, _LONGEST), unit)


class _Climb(eqx.Module):
    """What `Gradient` remembers."""

    optimiser: PyTree[Array]
    scale: Float[Array, ""]  # of its updates
    whole: Bool[Array, ""]  # whether the last M-step was not halved
    count: Int[Array, ""]  # of M-steps
    unit: Float[Array, " p"]  # of what the optimiser sees


def _strongly_typed(tree: PyTree[Array]) -> PyTree[Array]:
    """Arrays that keep their dtype, so that the next step is the same program."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)


def _not_worse(loss: Any, start: Array, end: Array, total: Any) -> tuple[Array, Array]:
    """A share of the way, and the point there, whose loss is no larger.

    Where losses differ by rounding alone, slopes along the way tell: of a parabola the loss at the
    end is larger by the mean of both.
    """
    reached = jnp.all(jnp.isfinite(end))
    way = lax.stop_gradient(jnp.where(reached, end - start, 0))

    def at(point: Array) -> tuple[Array, Array]:
        value, slope = jax.value_and_grad(loss)(lax.stop_gradient(point))
        return value, jnp.vdot(slope, way)

    before, descent = at(start)
    noise = 10 * jnp.finfo(before.dtype).eps * (jnp.abs(before) + total)

    def worse(share: Array) -> Array:
        after, slope = at(jnp.where(share == 1, end, start + share * way))
        rise = jnp.where(jnp.abs(after - before) <= noise, slope + descent, after - before)
        return ~(rise <= 0) & (share > 1e-9)

    share = lax.while_loop(worse, lambda share: share / 2, reached.astype(start.dtype))
    share = jnp.where(share > 1e-9, share, 0)
    way = share * jnp.where(share > 0, end - start, 0)
    return share, jnp.where(share == 1, end, start + way)
