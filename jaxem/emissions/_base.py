"""What an emission is: K conditional densities p(x | z = k) of one family."""

import abc
import functools
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, Self, TypeVar

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.blocks import fits_one_block, sum_over_observations
from jaxem._core.causes import either
from jaxem._core.parameters import Frozen
from jaxem.factors._base import AbstractFactor


class AbstractEmission(AbstractFactor):
    """K conditional distributions p(x | z = k) of one family.

    The E-step is a gradient: expected statistics are the derivative of the marginal log-likelihood
    by a tilt of the log-density, taken at tilt 0 by one `jax.vjp` (Fisher's identity). Its
    cotangents are the sums about self.

    Leaves have the components as leading axis (or 1 where they share a parameter).
    """

    @property
    @abc.abstractmethod
    def num_components(self) -> int: ...

    @abc.abstractmethod
    def check(self, x: PyTree[Array]) -> None:
        """Raises `ValueError` at trace time for data of the wrong shape or dtype."""

    @abc.abstractmethod
    def in_support(self, x: PyTree[Array]) -> Bool[Array, " n"]:
        """Whether each observation is a possible one (finite, a count, a category, …)."""

    @abc.abstractmethod
    def tilt(self) -> PyTree[Array]:
        """Zeros like the sums: the point at which the log-density is differentiated."""

    @abc.abstractmethod
    def log_prob(self, x: PyTree[Array], tilt: PyTree[Array]) -> Float[Array, "n k"]:
        """log p(x | z = k) + ⟨tilt, t(x)⟩ near tilt = 0, with the statistics t about self."""

    @abc.abstractmethod
    def degenerate(self, sums: PyTree[Array]) -> Int[Array, " k"]:
        """Why each component is degenerate, a member of `CAUSES`; 0 where it is not.

        It is judged at the maximum that the sums ask for; where self is one already, that is self.
        """

    @abc.abstractmethod
    def sample(self, key: Array, z: Int[Array, " n"]) -> PyTree[Array]:
        """One draw from component z for each entry of `z`."""


class AbstractStarting(AbstractEmission):
    """An emission that starts can be made of, from data, by one compiled program."""

    @classmethod
    @abc.abstractmethod
    def pooled(
        cls,
        x: PyTree[Array],
        num_components: int,
        sample_weight: Float[Array, " n"],
        **options: Any,
    ) -> Self:
        """Components that are all alike: the fit of one to all the data, which are traced."""

    @abc.abstractmethod
    def located_at(self, x: PyTree[Array], spread: Float[Array, ""]) -> Self:
        """One component at each observation of `x`, possible for every other observation.

        Spreads are those of self, variances multiplied by `spread`. A family without one mixes
        the observation with self instead.
        """


class AbstractExpandable(AbstractEmission):
    """An emission with a cheaper form of the same density, where rounding allows it."""

    @abc.abstractmethod
    def expanded(self) -> tuple[Bool[Array, ""], Self]:
        """Whether rounding allows the cheaper form now, and self in that form."""


class AbstractWide(AbstractEmission):
    """An emission with more densities than components: each of its own parts of a law."""

    @property
    @abc.abstractmethod
    def num_densities(self) -> int:
        """How many numbers an E-step holds for each feature of an observation."""


class AbstractNested(AbstractEmission):
    """An emission that is made of others, none or several, and has no leaves besides theirs.

    Sums are a tuple with those of each part.
    """

    parameters: ClassVar = {}
    frozen: ClassVar[Frozen] = ()

    def inner(self) -> tuple[AbstractEmission, ...]:
        """The emissions that it is made of."""
        return tuple(jax.tree.leaves(self, is_leaf=self._is_part))

    def with_inner(self, parts: Iterable[AbstractEmission]) -> Self:
        """The same, made of these emissions."""
        return jax.tree.unflatten(jax.tree.structure(self, is_leaf=self._is_part), list(parts))

    def _is_part(self, node: Any) -> bool:
        return isinstance(node, AbstractEmission) and node is not self

    @property
    def num_free_parameters(self) -> int:
        return sum(part.num_free_parameters for part in self.inner())

    def tilt(self) -> tuple[Any, ...]:
        return tuple(part.tilt() for part in self.inner())

    def m_step(self, sums: tuple[Any, ...]) -> Self:
        pairs = zip(self.inner(), sums, strict=True)
        return self.with_inner(part.m_step(own) for part, own in pairs)

    def reframe(self, sums: tuple[Any, ...], old: Self) -> tuple[Any, ...]:
        triples = zip(self.inner(), sums, old.inner(), strict=True)
        return tuple(part.reframe(own, before) for part, own, before in triples)

    def expected_log_prob(self, sums: tuple[Any, ...]) -> Float[Array, ""]:
        pairs = zip(self.inner(), sums, strict=True)
        return jnp.asarray(sum((part.expected_log_prob(own) for part, own in pairs), 0.0))

    def degenerate(self, sums: tuple[Any, ...]) -> Int[Array, " k"]:
        """Why some part of a component is."""
        cause = jnp.zeros(self.num_components, jnp.int32)
        for part, own in zip(self.inner(), sums, strict=True):
            each = part.degenerate(own).reshape(self.num_components, -1)
            cause = either(cause, jnp.max(each, axis=1))
        return cause


Emission = TypeVar("Emission", bound=AbstractEmission)


def log_prob(emission: AbstractEmission, x: PyTree[Array]) -> Float[Array, "n k"]:
    """log p(x | z = k)."""
    return emission.log_prob(x, emission.tilt())


def width(emission: AbstractEmission, x: PyTree[Array]) -> int:
    """Numbers that an E-step holds for each observation: one for each component and feature."""
    features = sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(x))
    return features * _num_densities(emission)


def _num_densities(emission: AbstractEmission) -> int:
    if isinstance(emission, AbstractWide):
        return emission.num_densities
    parts = emission.inner() if isinstance(emission, AbstractNested) else ()
    return max([emission.num_components, *map(_num_densities, parts)])


def sums_of(
    emission: AbstractEmission, x: PyTree[Array], responsibilities: Float[Array, "n k"]
) -> PyTree[Array]:
    """Σ r t(x) about the emission."""

    def block(part: Any, w: Any, key: Any) -> PyTree[Array]:
        observations, r = part
        pullback = jax.vjp(lambda tilt: emission.log_prob(observations, tilt), emission.tilt())[1]
        return pullback(r)[0]

    return sum_over_observations(block, (x, responsibilities), width=width(emission, x))


def cheapest(
    emission: AbstractEmission, total: Callable[[Any], PyTree[Array]], n: int, width: int
) -> PyTree[Array]:
    """`total(emission)`, by the cheaper form of the emission where rounding allows it.

    Not where `n` observations of `width` numbers are one block: what is small compiles faster
    without a choice.
    """
    form = None if fits_one_block(n, width) else expanded_form(emission)
    if form is None:
        return total(emission)
    safe, cheaper = form
    # All lanes of a vmap take one branch; else every lane would compute both.
    return lax.cond(eqxi.unvmap_all(safe), lambda: total(cheaper), lambda: total(emission))


def expanded_form(emission: AbstractEmission) -> tuple[Bool[Array, ""], Any] | None:
    """The cheaper form of an emission and whether rounding allows it now, if it has one."""
    if isinstance(emission, AbstractExpandable):
        return emission.expanded()
    if not isinstance(emission, AbstractNested):
        return None
    parts = emission.inner()
    forms = [expanded_form(part) for part in parts]
    found = [form for form in forms if form is not None]
    if not found:
        return None
    safe = jnp.all(jnp.stack([safe for safe, _ in found]))
    cheaper = (p if f is None else f[1] for p, f in zip(parts, forms, strict=True))
    return safe, emission.with_inner(cheaper)


def build(family: Any) -> tuple[Any, dict[str, Any]]:
    """The class and the keywords behind a `family` argument: a class or a partial of one."""
    cls, keywords = family, {}
    if isinstance(family, functools.partial):
        cls, keywords = family.func, dict(family.keywords)
    if not (isinstance(cls, type) and issubclass(cls, AbstractEmission)):
        raise ValueError(
            f"a family is an emission class, or functools.partial of one; got {family!r}."
        )
    if not issubclass(cls, AbstractStarting):
        raise ValueError(
            f"{cls.__name__} cannot make a start of its own: build the components, as in "
            f"Mixture(weights, {cls.__name__}(…))."
        )
    return cls, keywords
