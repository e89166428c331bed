"""What a family of distributions must provide to be the components of a mixture or an HMM."""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Self, TypeVar

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._hold import Held, free, update
from jaxem._repr import describe
from jaxem._statistics import Framed
from jaxem._units import fits_one_block, sum_over_units


class AbstractEmission(eqx.Module):
    """K conditional distributions p(x | z = k) of one family.

    The E-step is a gradient: the expected statistics are the derivative of the marginal
    log-likelihood with respect to `coordinates`, taken by `jax.vjp` of `log_prob_at`
    (Fisher's identity). An emission therefore says at which point of which coordinates its
    log-density is differentiated, and how the cotangents finish into statistics.

    Fields are the *unconstrained* leaves, each with the components as leading axis (or 1 where
    they share it), so that any linear combination of two emissions is one. `natural` names, for
    each natural parameter, the leaves behind it.

    `has_sufficient_statistics` is False where the sums know Q only near the model they were taken
    about (regressions with a link function): steps are then guarded by the objective.
    `has_curvature` is False where they know no more than the slope there.
    """

    natural: eqx.AbstractClassVar[dict[str, tuple[str, ...]]]
    has_sufficient_statistics: ClassVar[bool] = True
    has_curvature: ClassVar[bool] = True
    held: eqx.AbstractVar[Held]

    def __repr__(self) -> str:
        return describe(self)

    def free(self, name: str) -> np.ndarray:
        """Which components' natural parameter `name` is not held; length 1 if it is shared."""
        return free(self, name)

    def update(self, **leaves: Array) -> Self:
        """These leaves instead, except in what is held: how `maximize` ends."""
        return update(self, **leaves)

    @property
    @abc.abstractmethod
    def num_components(self) -> int: ...

    @property
    @abc.abstractmethod
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves."""

    @abc.abstractmethod
    def check(self, x: PyTree[Array]) -> None:
        """Raises `ValueError` at trace time for data of the wrong shape or dtype."""

    @abc.abstractmethod
    def in_support(self, x: PyTree[Array]) -> Bool[Array, " n"]:
        """Whether each unit is a possible observation (finite, a count, a category, …)."""

    @abc.abstractmethod
    def coordinates(self) -> PyTree[Array]:
        """The point at which the log-density is differentiated."""

    @abc.abstractmethod
    def log_prob_at(self, coordinates: PyTree[Array], x: PyTree[Array]) -> Float[Array, "n k"]:
        """log p(x | z = k) at given coordinates."""

    @abc.abstractmethod
    def statistics(self, cotangents: PyTree[Array]) -> PyTree[Array]:
        """Sums about self from the cotangents of the coordinates; linear."""

    @abc.abstractmethod
    def reframe(self, sums: PyTree[Array], old: Any) -> PyTree[Array]:
        """Sums taken about `old`, taken about self instead; exact, linear in the sums."""

    @abc.abstractmethod
    def maximize(self, sums: PyTree[Array]) -> Self:
        """The maximiser of `expected_log_prob` over what is free; sums are about self.

        A component without weight stays where it is.
        """

    @abc.abstractmethod
    def expected_log_prob(self, sums: PyTree[Array]) -> Float[Array, ""]:
        """Q(self; sums) = Σ r log p(x | z; self), up to a term in the data alone."""

    @abc.abstractmethod
    def prior(self, *args: Any, **kwargs: Any) -> Framed:
        """The conjugate prior as pseudo-statistics; without arguments it is flat."""

    @abc.abstractmethod
    def sample(self, key: Array, z: Int[Array, " n"]) -> PyTree[Array]:
        """One draw from component z for each entry of `z`."""

    @abc.abstractmethod
    def degenerate(self, sums: PyTree[Array], min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        """Components that rest on too few units, or on hardly any variance.

        Both are judged at the maximum that the sums ask for; where self is one already, that
        is self.
        """

    @classmethod
    @abc.abstractmethod
    def pooled(
        cls, x: PyTree[Array], num_components: int, weights: Float[Array, " n"], **options: Any
    ) -> Self:
        """Components that are all alike: the maximum-likelihood fit of one to all the data."""

    @abc.abstractmethod
    def located_at(self, x: PyTree[Array], spread: Float[Array, ""]) -> Self:
        """One component at each unit of `x`, possible for every other unit.

        Scales are those of self, variances multiplied by `spread`. A family without a scale
        mixes the unit with self instead.
        """

    @abc.abstractmethod
    def shortcut(self) -> tuple[Bool[Array, ""], Self] | None:
        """A cheaper form of the same density and whether rounding allows it now, or None."""


Emission = TypeVar("Emission", bound=AbstractEmission)


def log_prob(emission: AbstractEmission, x: PyTree[Array]) -> Float[Array, "n k"]:
    """log p(x | z = k) of an emission at its own parameters."""
    return emission.log_prob_at(emission.coordinates(), x)


def width(emission: AbstractEmission, x: PyTree[Array]) -> int:
    """Numbers held for each unit: one for each component and feature."""
    if isinstance(inner := getattr(emission, "components", None), AbstractEmission):
        return width(inner, x)  # a mixture of them
    features = sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(x))
    return features * emission.num_components


def pull_back(
    emission: AbstractEmission, at: Any, x: PyTree[Array], responsibilities: Float[Array, "n k"]
) -> PyTree[Array]:
    """Cotangents of the coordinates `at`, Σ r ∂ log p(x | z = k): finished by `statistics`."""

    def block(part: Any, w: Any, key: Any) -> PyTree[Array]:
        units, r = part
        pullback = jax.vjp(lambda c: emission.log_prob_at(c, units), at)[1]
        return pullback(r)[0]

    return sum_over_units(block, (x, responsibilities), width=width(emission, x))


def with_shortcut(
    emission: AbstractEmission, total: Callable[[Any], PyTree[Array]], n: int, width: int
) -> PyTree[Array]:
    """`total(emission)`, by the cheaper form of the emission where rounding allows it.

    Not where `n` units of `width` numbers are one block: what is small compiles faster without a
    choice.
    """
    shortcut = None if fits_one_block(n, width) else emission.shortcut()
    if shortcut is None:
        return total(emission)
    safe, cheaper = shortcut
    # All lanes of a vmap take one branch; else every lane would compute both.
    return lax.cond(eqxi.unvmap_all(safe), lambda: total(cheaper), lambda: total(emission))


def build(family: Any) -> tuple[Any, dict[str, Any]]:
    """The class and the keywords behind a `family` argument: a class or a partial of one."""
    cls, keywords = getattr(family, "func", family), getattr(family, "keywords", {})
    if not (isinstance(cls, type) and issubclass(cls, AbstractEmission)):
        raise ValueError(
            f"a family is an emission class, or functools.partial of one; got {family!r}."
        )
    return cls, dict(keywords)


def finite(x: PyTree[Array]) -> Bool[Array, " n"]:
    """Units all of whose numbers are finite."""
    flags = [
        jnp.isfinite(leaf).reshape(leaf.shape[0], -1).all(axis=1) for leaf in jax.tree.leaves(x)
    ]
    return jnp.stack(flags).all(axis=0)


def float_dtype(module: Any) -> Any:
    """The floating dtype of a module's parameters."""
    return jnp.result_type(*(leaf.dtype for leaf in jax.tree.leaves(module)))
