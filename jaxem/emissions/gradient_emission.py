"""Components that are any modules with a log-density: networks, flows, distributions.

Statistics are the score of each component, gₖ = Σ r ∂ log p(x; θₖ) at the present θ, and nₖ = Σ r.
They know Q near θ alone, cautiously gₖ·δ − ½ nₖ ‖δ‖². M-step: δ = gₖ/nₖ, the mean score, halved
where that is too far (`_guard.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._emission import AbstractEmission, finite
from jaxem._hold import Held
from jaxem._statistics import Framed
from jaxem._units import num_units
from jaxem.emissions._common import divide

_NO_START = (
    "GradientEmission cannot make a start of its own: give it modules, as in "
    "Mixture(weights, GradientEmission(modules))."
)


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

    def module(self, numbers: Float[Array, " p"]) -> Any:
        ends = np.cumsum([int(np.prod(shape)) for shape in self.shapes])
        parts = zip(jnp.split(numbers, ends[:-1]), self.shapes, strict=True)
        arrays = jax.tree.unflatten(self.arrays, [part.reshape(shape) for part, shape in parts])
        return eqx.combine(arrays, jax.tree.unflatten(self.whole, self.rest))


class Slopes(NamedTuple):
    """Q near the frame: value + Σ gₖ·δₖ − ½ nₖ ‖δₖ‖²."""

    units: Float[Array, " k"]
    value: Float[Array, ""]
    score: Float[Array, "k p"]


class GradientEmission(AbstractEmission):
    """Components given by modules of one structure, each with a method `log_prob`.

    A module is any PyTree, such as an Equinox network or a distribution, whose
    `log_prob(x)` gives the log-density of one unit. Its floating arrays are its parameters. If it
    has a method `sample(key)`, draws of a unit, so has the emission.

    Its own M-step is one along the mean score of each component. Optimisers climb faster:
    `EM(maximization=Gradient(optax.adam(1e-2)))` moves all parameters of the model at once.

    **Arguments:** `modules`, k of them, alike but for the numbers in their arrays.

    Data: whatever `log_prob` takes, with units along the leading axis of every leaf.
    Starts are the modules as they are given: `Mixture(weights, GradientEmission(modules))`.

    **Raises:** `ValueError` for no module, one without `log_prob`, or modules that differ in more
    than numbers.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"params": ("params",)}
    has_sufficient_statistics: ClassVar[bool] = False
    has_curvature: ClassVar[bool] = False
    params: Float[Array, "k p"]  # the floating arrays of each module, end to end
    structure: _Structure = eqx.field(static=True)
    held: Held = eqx.field(static=True)

    def __init__(self, modules: Sequence[Any]):
        modules = list(modules)
        if not modules:
            raise ValueError("GradientEmission needs one module or more.")
        for module in modules:
            if not callable(getattr(module, "log_prob", None)):
                raise ValueError(f"{type(module).__name__} has no method log_prob(x).")
        parted = [_Structure.of(module) for module in modules]
        self.structure = parted[0][1]
        if any(structure != self.structure for _, structure in parted):
            raise ValueError("the modules must be alike but for the numbers in their arrays.")
        self.params = jnp.stack([numbers for numbers, _ in parted])
        self.held = ()

    @property
    def modules(self) -> list[Any]:
        """The modules, with their present parameters."""
        return [self.structure.module(numbers) for numbers in self.params]

    @property
    def num_components(self) -> int:
        return self.params.shape[0]

    @property
    def num_free_parameters(self) -> int:
        return int(np.sum(self.free("params"))) * self.params.shape[1]

    def check(self, x: PyTree[Array]) -> None:
        n = num_units(x)
        shape = jax.eval_shape(self.log_prob_at, self.coordinates(), x).shape
        if shape != (n, self.num_components):
            raise ValueError(
                "log_prob(x) of a module must return a number for one unit; for "
                f"{n} units of {self.num_components} components it gave shape {shape}."
            )

    def in_support(self, x: PyTree[Array]) -> Bool[Array, " n"]:
        return finite(x)

    def coordinates(self) -> tuple[Array, Array]:
        return jnp.zeros_like(self.params[:, 0]), self.params

    def log_prob_at(self, coordinates: tuple[Array, Array], x: Any) -> Float[Array, "n k"]:
        constant, params = coordinates

        def component(numbers: Float[Array, " p"]) -> Float[Array, " n"]:
            return jax.vmap(self.structure.module(numbers).log_prob)(x)

        return jax.vmap(component)(params).T + constant

    def statistics(self, cotangents: tuple[Array, Array]) -> Slopes:
        units, score = cotangents
        return Slopes(units, jnp.zeros((), units.dtype), score)

    def reframe(self, sums: Slopes, old: Self) -> Slopes:
        step = self.params - old.params
        score = sums.score - sums.units[:, None] * step
        return sums._replace(
            value=sums.value + 0.5 * jnp.sum((sums.score + score) * step), score=score
        )

    def maximize(self, sums: Slopes) -> Self:
        """A step along the mean score of each component."""
        return self.update(params=self.params + divide(sums.score, sums.units[:, None]))

    def expected_log_prob(self, sums: Slopes) -> Float[Array, ""]:
        """Q near the model that the statistics were taken at, to first order."""
        return sums.value

    def prior(self) -> Framed:
        """Flat: any other one goes into `log_prob` itself."""
        zeros = jnp.zeros_like(self.params)
        return Framed(Slopes(zeros[:, 0], zeros[0, 0], zeros), self)

    def sample(self, key: Array, z: Int[Array, " n"]) -> PyTree[Array]:
        if not callable(getattr(self.structure.module(self.params[0]), "sample", None)):
            raise ValueError("the modules have no method sample(key), a draw of one unit.")
        keys = jax.random.split(key, len(z))
        draw = lambda key, numbers: self.structure.module(numbers).sample(key)  # noqa: E731
        return jax.vmap(draw)(keys, self.params[z])

    def degenerate(self, sums: Slopes, min_variance: Any) -> Bool[Array, " k"]:
        return (sums.units < 1) & self.free("params")

    @classmethod
    def pooled(cls, x, num_components, weights):
        raise ValueError(_NO_START)

    def located_at(self, x: PyTree[Array], spread: Float[Array, ""]) -> Self:
        raise ValueError(_NO_START)

    def shortcut(self) -> None:
        return None
