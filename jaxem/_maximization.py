"""Other M-steps than the model's own: gradients of Q, and one block of parameters after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import optax
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._checks import check_count
from jaxem._em import AbstractMaximization
from jaxem._guard import is_local
from jaxem._hold import free_numbers, freeze, natural_names


class Gradient(AbstractMaximization):
    """Generalised EM: a few steps of an Optax optimiser up Q, from where the model stands.

    If Q ends lower than it began, the whole step is halved until it does not; the optimiser then
    forgets, and the updates that follow are a quarter as long, growing again while Q rises. A
    step that was halved never counts as converged. Q is a sum over units: the scale of a learning
    rate is that of one over their number, unless the optimiser adapts.

    **Arguments:** `optimiser`, such as `optax.adam(1e-2)` or `optax.lbfgs()`; it compares by
    identity, so make it once. `num_steps` for each M-step. `objective`: climb the objective
    itself instead of Q, at the cost of an E-step and its derivative each time (ECME). That is done
    whatever is asked where statistics know Q only near the model, as those of regressions do; drawn
    statistics then change nothing. The line search of `optax.lbfgs()` has no reverse mode:
    `Unrolled()` cannot differentiate it, `Implicit()` need not.

    **Raises:** `ValueError` for something else than an optimiser, or no step.

    Dempster, Laird & Rubin (1977), section 1; Lange (1995), JRSS B 57; Liu & Rubin (1994),
    Biometrika 81 (ECME).
    """

    ascends: ClassVar[bool] = True
    steady: ClassVar[bool] = False
    optimiser: optax.GradientTransformation = eqx.field(static=True)
    num_steps: int = eqx.field(static=True, default=5)
    objective: bool = eqx.field(static=True, default=False)

    def __check_init__(self):
        if not (hasattr(self.optimiser, "init") and hasattr(self.optimiser, "update")):
            raise ValueError(f"Gradient takes an Optax optimiser, got {self.optimiser!r}.")
        check_count("num_steps", self.num_steps)

    def init(self, model):
        numbers = free_numbers(model)[0]
        own = _strongly_typed(self.optimiser.init(numbers))
        return _Climb(own, jnp.ones((), numbers.dtype), jnp.asarray(True))

    def settles(self, memory):
        return memory.whole

    def __call__(self, statistics, memory, evaluate):
        start, rebuild = free_numbers(statistics.frame)
        update = optax.with_extra_args_support(self.optimiser).update
        climbs_objective = self.objective or is_local(statistics.frame)

        def loss(numbers: Array) -> Float[Array, ""]:
            model = rebuild(numbers.astype(start.dtype))  # line searches may promote
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
    whole: Bool[Array, ""]  # whether the last M-step was taken as it came


def _strongly_typed(tree: PyTree[Array]) -> PyTree[Array]:
    """Arrays that keep their dtype, so that the next step is the same program."""
    return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), tree)


def _not_worse(loss: Any, start: Array, end: Array) -> tuple[Array, Array]:
    """A point on the way to the end whose loss is no larger than the start's; how far it is."""
    bound = loss(start)

    def worse(share: Array) -> Array:
        return ~(loss(start + share * (end - start)) <= bound) & (share > 1e-9)

    share = lax.while_loop(worse, lambda share: share / 2, jnp.ones((), start.dtype))
    share = jnp.where(share > 1e-9, share, 0)
    way = share * jnp.where(share > 0, end - start, 0)
    return share, jnp.where(share == 1, end, start + way)


class Conditional(AbstractMaximization):
    """ECM: one block of parameters after another is maximised, the others held.

    **Arguments:** `blocks`, pairs of names and the M-step for them, as in
    `Conditional((("weights", "components.covariance"), ClosedForm()), (("components.mean",),
    Gradient(optax.lbfgs())))`. A block whose M-step climbs the objective makes it ECME.

    **Raises:** `ValueError` for something else than such pairs, or, at the first step, for a
    name that is not a natural parameter of the model, or a parameter that is free and in no block.

    Meng & Rubin (1993), Biometrika 80; Liu & Rubin (1994), Biometrika 81.
    """

    blocks: tuple[tuple[tuple[str, ...], AbstractMaximization], ...]

    def __init__(self, *blocks: tuple[str | Sequence[str], AbstractMaximization]):
        if not blocks or not all(
            isinstance(block, tuple)
            and len(block) == 2
            and isinstance(block[1], AbstractMaximization)
            for block in blocks
        ):
            raise ValueError(
                "Conditional takes pairs of parameter names and an M-step, such as "
                '("components.mean", ClosedForm()).'
            )
        self.blocks = tuple(
            ((names,) if isinstance(names, str) else tuple(names), step) for names, step in blocks
        )

    @property
    def ascends(self) -> bool:
        return all(step.ascends for _, step in self.blocks)

    @property
    def objective(self) -> bool:
        return any(step.objective for _, step in self.blocks)

    @property
    def steady(self) -> bool:
        return all(step.steady for _, step in self.blocks)

    def settles(self, memory):
        settled = [step.settles(own) for (_, step), own in zip(self.blocks, memory, strict=True)]
        return jnp.all(jnp.stack([jnp.asarray(one) for one in settled]))

    def init(self, model):
        if not hasattr(model, "natural"):
            raise ValueError(
                f"Conditional moves natural parameters by name, and {type(model).__name__} has "
                "none; use Gradient(…) for all of them."
            )
        blocks = tuple(step.init(_only(model, names)) for names, step in self.blocks)
        covered = [name for names, _ in self.blocks for name in names]
        kind = jax.tree.structure(model)
        for name in natural_names(model):
            if name not in covered and jax.tree.structure(freeze(model, name)) != kind:
                raise ValueError(
                    f"no block of Conditional moves {name!r}, which is free: add it to one, or say "
                    f"that it stays by freeze(model, {name!r})."
                )
        return blocks

    def __call__(self, statistics, memory, evaluate):
        model, remembered = statistics.frame, []
        for (names, step), own in zip(self.blocks, memory, strict=True):
            found, own = step(statistics.at(_only(model, names)), own, evaluate)
            # the leaves that were found, and what was held before
            model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(found))
            remembered.append(own)
        return model, tuple(remembered)


def _only(model: Any, names: tuple[str, ...]) -> Any:
    """The model with everything held but these natural parameters."""
    known = natural_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a natural parameter; the model has {known}.")
    return freeze(model, *(name for name in known if name not in names))
