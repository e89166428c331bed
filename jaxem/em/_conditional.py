"""ECM: an M-step for one block of parameters after another."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxem._core.freezing import freeze
from jaxem._core.parameters import parameter_names
from jaxem.em._maximization import AbstractMaximization
from jaxem.em._traits import Traits
from jaxem.models._base import AbstractNamelessModel


class Conditional(AbstractMaximization):
    """ECM: one block of parameters after another is maximised, the others frozen.

    **Arguments:** `blocks`, pairs of names and the M-step for them, as in
    `Conditional((("weights", "components.covariance"), ClosedForm()), (("components.mean",),
    Gradient(optax.lbfgs())))`. A block whose M-step climbs the objective makes it ECME.

    **Raises:** `ValueError` for something else than such pairs, or, at the first step, for a
    name that is not a parameter of the model, or a parameter that is free and in no block.

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
    def traits(self) -> Traits:
        product = Traits()
        for _, step in self.blocks:
            product = product * step.traits
        return product

    def init(self, model):
        if isinstance(model, AbstractNamelessModel):
            raise ValueError(
                f"Conditional moves parameters by name, and {type(model).__name__} has "
                "none; use Gradient(…) for all of them."
            )
        blocks = tuple(step.init(_only(model, names)) for names, step in self.blocks)
        covered = [name for names, _ in self.blocks for name in names]
        kind = jax.tree.structure(model)
        for name in parameter_names(model):
            if name not in covered and jax.tree.structure(freeze(model, name)) != kind:
                raise ValueError(
                    f"no block of Conditional moves {name!r}, which is free: add it to one, or "
                    f"freeze it by freeze(model, {name!r})."
                )
        return blocks

    def __call__(self, statistics, memory, evaluate, total):
        model, remembered = statistics.frame, []
        for (names, step), own in zip(self.blocks, memory, strict=True):
            found, own = step(statistics.at(_only(model, names)), own, evaluate, total)
            # the leaves that were found, and what was frozen before
            model = jax.tree.unflatten(jax.tree.structure(model), jax.tree.leaves(found))
            remembered.append(own)
        return model, tuple(remembered)

    def conclusive(self, memory, step):
        pairs = zip(self.blocks, memory, strict=True)
        each = [jnp.asarray(inner.conclusive(own, step)) for (_, inner), own in pairs]
        return jnp.all(jnp.stack(each))


def _only(model: Any, names: tuple[str, ...]) -> Any:
    """The model with everything frozen but these parameters."""
    known = parameter_names(model)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise ValueError(f"{unknown[0]!r} is not a parameter; the model has {known}.")
    return freeze(model, *(name for name in known if name not in names))
