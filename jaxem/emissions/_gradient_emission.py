"""Components that are any modules with a log-density: networks, flows, distributions.

Statistics are the score of each component, gₖ = Σ r ∂ log p(x; θₖ) at the present θ, and nₖ = Σ r.
They give the slope of Q alone; its curvature is taken for nₖ I, so that the M-step is one along
the mean score, δ = gₖ/nₖ, halved where that is too far (`em/_guard.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Protocol, Self, runtime_checkable

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from jaxem._core.blocks import num_observations
from jaxem._core.causes import caused
from jaxem._core.constraints import real
from jaxem._core.parameters import Frozen, update
from jaxem._core.quadratic import AbstractLocal, Identity, LocalQuadratic
from jaxem._core.statistics import Framed
from jaxem._core.supports import trees
from jaxem.emissions._family import AbstractFamily


@runtime_checkable
class _Density(Protocol):
    """What a module of the user's must have."""

    def log_prob(self, x: Any) -> Any: ...


@runtime_checkable
class _Sampler(Protocol):
    """What it must have to be drawn from."""

    def sample(self, key: Any) -> Any: ...


class _Structure(NamedTuple):
    """A module without its floating arrays; hashable."""

    rest: tuple[Any, ...]
    whole: Any  # tree structures
    arrays: Any
    shapes: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, module: Any) -> tuple[Float[Array, " p"], _Structure]:
        arrays, rest = eqx.partition(module, eqx.is_inexact_array)
        numbers, form = jax.tree.flatten(arrays)
        if not numbers or any(eqx.is_array(leaf) for leaf in jax.tree.leaves(rest)):
            raise ValueError(
                f"{type(module).__name__} must hold floating arrays, which are its parameters, "
                "and no other arrays: make what is fixed a static field."
            )
        others, whole = jax.tree.flatten(rest, is_leaf=lambda leaf: leaf is None)
        flat = jnp.concatenate([jnp.ravel(leaf) for leaf in numbers])
        return flat, cls(tuple(others), whole, form, tuple(leaf.shape for leaf in numbers))

    def __deepcopy__(self, memo: Any) -> Self:
        return self  # immutable; tree structures do not survive a copy

    def module(self, numbers: Float[Array, " p"]) -> Any:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        parts = zip(jnp.split(numbers, ends[:-1]), self.shapes, strict=True)
        arrays = jax.tree.unflatten(self.arrays, [part.reshape(shape) for part, shape in parts])
        return eqx.combine(arrays, jax.tree.unflatten(self.whole, self.rest))


class GradientEmission(AbstractFamily, AbstractLocal):
    """Components given by modules of one structure, each with a method `log_prob`.

    A module is any PyTree, such as an Equinox network or a distribution, whose
    `log_prob(x)` gives the log-density of one observation. Its floating arrays are its parameters.
    If it has a method `sample(key)`, draws of an observation, so has the emission.

    Its own M-step is one along the mean score of each component. Optimisers climb faster:
    `EM(maximization=Gradient(optax.adam(1e-2)))` moves all parameters of the model at once.

    **Arguments:** `modules`, k of them, alike but for the numbers in their arrays.

    Data: whatever `log_prob` takes, with observations along the leading axis of every leaf.
    Starts are the modules as they are given: `Mixture(weights, GradientEmission(modules))`.

    **Raises:** `ValueError` for no module, one without `log_prob`, or modules that differ in more
    than numbers.
    """

    parameters: ClassVar = {"params": real("params", "k p")}
    support: ClassVar = trees()
    has_curvature: ClassVar[bool] = False
    params: Float[Array, "k p"]  # the floating arrays of each module, end to end
    structure: _Structure = eqx.field(static=True)
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, modules: Sequence[Any]):
        if not isinstance(modules, list | tuple) or not modules:
            raise ValueError("GradientEmission takes a list of modules, one or more.")
        for module in modules:
            if not isinstance(module, _Density):
                raise ValueError(f"{type(module).__name__} has no method log_prob(x).")
        parted = [_Structure.of(module) for module in modules]
        self.structure = parted[0][1]
        if any(structure != self.structure for _, structure in parted):
            raise ValueError("the modules must be alike but for the numbers in their arrays.")
        self.params = jnp.stack([numbers for numbers, _ in parted])
        self.frozen = ()

    @property
    def modules(self) -> list[Any]:
        """The modules, with their present parameters."""
        return [self.structure.module(numbers) for numbers in self.params]

    def canonical(self) -> LocalQuadratic:
        zeros = jnp.zeros_like(self.params)
        one = jnp.ones((), zeros.dtype)
        return LocalQuadratic(one, zeros[:, 0], zeros, Identity(zeros[:, 0]))

    def log_prob(self, x: PyTree[Array], tilt: LocalQuadratic) -> Float[Array, "n k"]:
        n = num_observations(x)

        def component(numbers: Float[Array, " p"]) -> Float[Array, " n"]:
            own = jax.vmap(self.structure.module(numbers).log_prob)(x)
            if jnp.shape(own) != (n,):
                raise ValueError(
                    "log_prob(x) of a module must return a number for one observation; for "
                    f"{n} observations it gave shape {jnp.shape(own)}."
                )
            return own

        own = jax.vmap(component)(self.params + tilt.score).T
        return own + (tilt.count + tilt.curvature.count)

    def reframe(self, sums: LocalQuadratic, old: Self) -> LocalQuadratic:
        return sums.moved(self.params - old.params)

    def m_step(self, sums: LocalQuadratic) -> Self:
        """A step along the mean score of each component."""
        return update(self, params=self.params + sums.maximum())

    def prior(self) -> Framed:
        """Flat: any other one goes into `log_prob` itself."""
        return Framed(self.tilt(), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> PyTree[Array]:
        if not isinstance(self.structure.module(self.params[0]), _Sampler):
            raise ValueError("the modules have no method sample(key), a draw of one observation.")
        keys = jax.random.split(key, len(z))
        draw = lambda key, numbers: self.structure.module(numbers).sample(key)  # noqa: E731
        return jax.vmap(draw)(keys, self.params[z])

    def degenerate(self, sums: LocalQuadratic) -> Int[Array, " k"]:
        return caused(few_observations=(sums.count < 1) & self.free("params"))
