"""Generalised EM: an M-step by gradients of Q."""

from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core.checks import check_count
from jaxem._core.parameters import free_numbers
from jaxem.em._maximization import AbstractMaximization
from jaxem.em._traits import Traits
from jaxem.models._base import local_part


class Gradient(AbstractMaximization):
    """Generalised EM: a few steps of an Optax optimiser up Q, from the present model.

    If Q ends lower than it began, the whole step is halved until it does not; the optimiser's
    state is then reset, and the updates that follow are a quarter as long, growing again while Q
    rises. A step that was halved never counts as converged. Q is a sum over observations: the
    scale of a learning rate is that of one over their number, unless the optimiser adapts.

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
        return Traits(stationary=False, uses_objective=self.objective)

    def init(self, model):
        numbers = free_numbers(model)[0]
        own = _strongly_typed(self.optimiser.init(numbers))
        return _Climb(own, jnp.ones((), numbers.dtype), jnp.asarray(True))

    def conclusive(self, memory, step):
        return memory.whole

    def __call__(self, statistics, memory, evaluate):
        start, rebuild = free_numbers(statistics.frame)
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
            change, own = update(slope, own, numbers, **extra)
            return ((numbers + memory.scale * change).astype(start.dtype), own), None

        (end, own), _ = lax.scan(ascend, (start, memory.optimiser), length=self.num_steps)
        share, end = _not_worse(loss, start, end)
        whole = share == 1
        fresh = self.init(statistics.frame).optimiser
        own = jax.tree.map(lambda a, b: jnp.where(whole, a, b), _strongly_typed(own), fresh)
        scale = jnp.where(whole, jnp.minimum(2 * memory.scale, 1), memory.scale / 4)
        return rebuild(end), _Climb(own, scale, whole)


class _Climb(eqx.Module):
    """What `Gradient` remembers."""

    optimiser: PyTree[Array]
    scale: Float[Array, ""]  # of its updates
    whole: Bool[Array, ""]  # whether the last M-step was not halved


def _strongly_typed(tree: PyTree[Array]) -> PyTree[Array]:
    """Arrays that keep their dtype, so that the next step is the same program."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)


def _not_worse(loss: Any, start: Array, end: Array) -> tuple[Array, Array]:
    """A share of the way, and the point there, whose loss is no larger than the start's."""
    bound = loss(start)

    def worse(share: Array) -> Array:
        return ~(loss(start + share * (end - start)) <= bound) & (share > 1e-9)

    share = lax.while_loop(worse, lambda share: share / 2, jnp.ones((), start.dtype))
    share = jnp.where(share > 1e-9, share, 0)
    way = share * jnp.where(share > 0, end - start, 0)
    return share, jnp.where(share == 1, end, start + way)
