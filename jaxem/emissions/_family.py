"""Families with declared parameters and supports: what follows from a few equations.

A family declares `parameters` and `support`, and writes `log_prob(x, tilt)`, `canonical()`,
`expected()`, `maximize(sums)`, `reframe(sums, old)` and `sample(key, z)`. The rest follows, once
for all: checks, counts of parameters, Q, priors, degeneracy and starts.
"""

import abc
from collections.abc import Mapping
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core.blocks import weighted_mean
from jaxem._core.causes import caused, either
from jaxem._core.checks import check_options, keywords
from jaxem._core.freezing import freeze
from jaxem._core.numerics import as_float, divide, float_dtype, pseudo_count
from jaxem._core.parameters import free, replace, update, where_rows, within_bounds
from jaxem._core.statistics import Framed
from jaxem._core.supports import Support
from jaxem.emissions._base import AbstractEmission, AbstractStarting, build, sums_of

_ROUNDS = 6


class AbstractFamily(AbstractEmission):
    """An emission that declares its parameters and its support.

    The first declared parameter has one entry for each component.
    """

    parameters: eqx.AbstractClassVar[Mapping[str, Any]]
    support: eqx.AbstractClassVar[Support]

    @abc.abstractmethod
    def canonical(self) -> PyTree[Array]:
        """η with Q(self; sums) = ⟨η, sums⟩, for sums about self."""

    def free(self, name: str) -> np.ndarray:
        """Which components' parameter `name` is free; of length 1 if they share it."""
        return free(self, name)

    def leaf(self, name: str) -> Any:
        """The leaf behind a parameter."""
        return getattr(self, self.parameters[name].leaf)

    @property
    def num_components(self) -> int:
        return self.leaf(next(iter(self.parameters))).shape[0]

    @property
    def num_free_parameters(self) -> int:
        return sum(
            parameter.num_free_parameters(self.leaf(name), self.free(name))
            for name, parameter in self.parameters.items()
        )

    def _sizes(self) -> dict[str, int]:
        sizes: dict[str, int] = {}
        for name, parameter in self.parameters.items():
            sizes |= parameter.sizes(self.leaf(name))
        return sizes

    def check(self, x: Array) -> None:
        self.support.check(x, self._sizes(), float_dtype(self), type(self).__name__)

    def in_support(self, x: Array) -> Bool[Array, " n"]:
        return self.support.contains(x, self._sizes())

    def tilt(self) -> PyTree[Array]:
        shapes = jax.eval_shape(lambda: self.canonical())
        return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def expected_log_prob(self, sums: PyTree[Array]) -> Float[Array, ""]:
        products = jax.tree.map(lambda a, b: jnp.sum(a * b), self.canonical(), sums)
        return sum(jax.tree.leaves(products), jnp.zeros((), float_dtype(self)))

    def repeated(self, num_components: int, spread: Float[Array, ""]) -> Self:
        """The first component, for each of so many, with variances multiplied by `spread`."""
        leaves = {
            p.leaf: p.scaled(self.leaf(name), spread, num_components)
            for name, p in self.parameters.items()
        }
        return replace(self, **leaves)


class AbstractConjugateFamily(AbstractFamily):
    """A family whose statistics are sums of functions t(x) of the data.

    Sums are a NamedTuple with a field or property `count`, how many observations each component
    has, (k,) or (k, d). The constructor takes the parameters by name.
    """

    @abc.abstractmethod
    def expected(self) -> PyTree[Array]:
        """E t(x) about self: the sums of one observation of each component's own law."""

    @abc.abstractmethod
    def maximize(self, sums: PyTree[Array]) -> dict[str, Any]:
        """The leaves of the maximiser of Q, by field, with what is frozen taken into account.

        What is returned for frozen parameters, and for components without observations, is not
        used.
        """

    def m_step(self, sums: PyTree[Array]) -> Self:
        present = _observations(sums) > 0
        leaves = self.maximize(sums)
        for parameter in self.parameters.values():
            if parameter.leaf in leaves:
                old = getattr(self, parameter.leaf)
                new = parameter.within(leaves[parameter.leaf])
                leaves[parameter.leaf] = jax.tree.map(
                    lambda new, old: where_rows(_rows(present, old), new, old), new, old
                )
        return update(self, **leaves)

    def prior(self, count: ArrayLike | Mapping[str, ArrayLike] = 0.0, **law: ArrayLike) -> Framed:
        """A conjugate prior, as if `count` observations of a law had been seen.

        Its mode is the law.

        **Arguments:** `count` ≥ 0, a number, one for each component, or a mapping from parameters
        to such, where sums are about one parameter alone (the mean of a Gaussian, say, and its
        covariance); parameters of the law by name, broadcasting to the present ones, which are
        the default.

        **Raises:** `ValueError` for a negative count, or values that are no such parameter.
        """
        own = self.with_parameters(**law)
        sums = own.expected()
        if not isinstance(count, Mapping):
            times = jax.tree.map(lambda leaf: self._times("count", count, leaf), sums)
            return Framed(times, own)
        owner = {field: name for name, p in self.parameters.items() for field in p.counted}
        if unknown := count.keys() - set(owner.values()):
            apart = ", ".join(dict.fromkeys(owner.values())) or "none"
            raise ValueError(
                f"count: {sorted(unknown)[0]!r} is no parameter that {type(self).__name__} counts "
                f"apart; those are: {apart}."
            )
        scaled = {
            field: self._times(f"the count of {owner[field]}", count.get(owner[field], 0.0), leaf)
            for field, leaf in sums._asdict().items()
        }
        return Framed(type(sums)(**scaled), own)

    def _times(self, name: str, count: ArrayLike, leaf: Array) -> Array:
        """The leaf of sums of one observation, for so many of each component, or each entry."""
        count, k = as_float(count, name, leaf.dtype), self.num_components
        if count.ndim > 1:
            return pseudo_count(name, count, leaf) * leaf
        count = pseudo_count(name, count, jnp.zeros(k, leaf.dtype))
        # What components share sums over them
        count = count if leaf.shape[0] == k else jnp.mean(count, keepdims=True)
        return count.reshape(-1, *(1,) * (leaf.ndim - 1)) * leaf

    def collapsed(self, sums: PyTree[Array]) -> Int[Array, " k"]:
        """Why an estimate means collapse, at the maximum that the sums ask for."""
        cause = jnp.zeros(self.num_components, jnp.int32)
        collapsible = {
            n: p for n, p in self.parameters.items() if p.collapsed or p.role == "spread"
        }
        if not collapsible:
            return cause
        new, sizes = self.m_step(sums), self._sizes()
        for name, parameter in collapsible.items():
            is_free = self.free(name)
            at_bound = parameter.has_collapsed(new.leaf(name))
            cause = either(cause, caused(bound=at_bound & is_free))
            if parameter.role == "spread":
                needed = parameter.least_count
                least = sizes[needed] if isinstance(needed, str) else needed
                few = _observations(sums) < least
                cause = either(caused(few_observations=few & is_free), cause)
            if isinstance(self, AbstractSpread) and parameter.role == "spread":
                relative = parameter.spread(new.leaf(name))
                average = divide(
                    jnp.sum(sums.count * relative, axis=0), jnp.sum(sums.count, axis=0)
                )
                narrow = relative < self.min_spread * average
                thin = jnp.any(narrow.reshape(len(narrow), -1), axis=1)
                cause = either(cause, caused(no_variance=thin & is_free))
        return cause


class AbstractExponentialFamily(AbstractConjugateFamily, AbstractStarting):
    """Families whose starts and degeneracy follow from a few M-steps."""

    def degenerate(self, sums: PyTree[Array]) -> Int[Array, " k"]:
        return either(caused(few_observations=_observations(sums) < 1), self.collapsed(sums))

    @classmethod
    def pooled(cls, x, num_components, sample_weight, **options):
        """The fit of one component; counts get half an observation of a typical law.

        Measurements have a unit: their start is a typical law located at their mean.
        """
        dtype = x.dtype if cls.support.continuous else sample_weight.dtype
        cls.support.check(x, {}, dtype, cls.__name__)
        sizes, options = cls.support.sizes_in(x, options)
        typical = {
            name: parameter.typical({"k": 1} | sizes, dtype)
            for name, parameter in cls.parameters.items()
        }
        check_options(cls.__name__, options, keywords(cls))
        start, sample_weight = cls(**typical, **options), sample_weight.astype(dtype)
        if cls.support.continuous:
            start = start.located_at(weighted_mean(x, sample_weight)[None], jnp.ones((), dtype))
        one = _climbed(start, x, sample_weight, 0.0 if cls.support.continuous else 0.5)
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf, (num_components, *leaf.shape[1:])), one
        )

    def located_at(self, x: Array, spread: Float[Array, ""]) -> Self:
        """The M-step from each observation; a family without a spread adds one of self's own."""
        located = replace(self.repeated(len(x), spread), frozen=())
        kept = [name for name, p in self.parameters.items() if p.role in ("spread", "shape")]
        sums = sums_of(located, x, jnp.eye(len(x), dtype=float_dtype(self)))
        if not any(p.role == "spread" for p in self.parameters.values()):
            sums = jax.tree.map(jnp.add, sums, located.expected())
        moved = freeze(located, *kept).m_step(sums)
        return replace(moved, frozen=self.frozen)


class AbstractSpread(AbstractExponentialFamily):
    """Families with a parameter that is a variance relative to the mean, or its inverse.

    A component in which it is below `min_spread` of the average one is degenerate.
    """

    min_spread: eqx.AbstractVar[float]


def settled(family: Any, x: PyTree[Array]) -> Partial:
    """A family with all options of a start from `x`; it compares by their values.

    Where a start is compiled its data are traced: here, before, values of options are checked and
    categories counted, in the families within a family too.
    """
    cls, options = build(family)
    if issubclass(cls, AbstractFamily):
        options = cls.support.counted(x, options) | options
        for name, parameter in cls.parameters.items():
            if name in options and parameter.role not in ("location", "scale"):
                parameter.checked(name, as_float(options[name]), {"k": 1})
    if "family" in options:
        options["family"] = settled(options["family"], x)
    families = options.get("families", ())
    if isinstance(x, tuple) and len(x) == len(families):
        options["families"] = tuple(map(settled, families, x))
    # NumPy's scalars would be traced; settings are static
    plain = {n: v.item() if isinstance(v, np.generic) else v for n, v in options.items()}
    return Partial(cls, **plain)


def _climbed(start: Any, x: Array, sample_weight: Float[Array, " n"], share: float) -> Any:
    """The maximum from `start`, with `share` observations of its law added to the data.

    One M-step is enough unless a shape is latent, which is extrapolated at every other step.
    """
    added = jax.tree.map(lambda leaf: share * leaf, start.expected())

    def step(now: Any) -> Any:
        sums = sums_of(now, x, sample_weight[:, None])
        return now.m_step(jax.tree.map(jnp.add, sums, now.reframe(added, start)))

    def again(i: Array, carry: Any) -> Any:
        before, now = carry
        change = jax.tree.map(jnp.subtract, step(now), now)
        jump = jax.tree.map(
            lambda a, b: a * jnp.where(i % 2 == 1, _beyond(a, b), 1), change, before
        )
        return change, within_bounds(jax.tree.map(jnp.add, now, jump))

    if not any(p.role == "shape" for p in start.parameters.values()):
        return step(start)
    return lax.fori_loop(0, _ROUNDS, again, (start, start))[1]


def _beyond(change: Array, before: Array) -> Array:
    """Aitken's factor from a change to the sum of all that follow it, up to 10."""
    ratio = jnp.where(before == 0, 0, change / jnp.where(before == 0, 1, before))
    return 1 / (1 - jnp.clip(ratio, 0, 0.9))


def _observations(sums: Any) -> Float[Array, " k"]:
    """How many observations each component has, of whichever feature has most."""
    return jnp.max(sums.count.reshape(sums.count.shape[0], -1), axis=1)


def _rows(present: Bool[Array, " k"], leaf: Array) -> Bool[Array, " c"]:
    """Whether there are observations behind each entry of the leading axis of a leaf."""
    return present if len(leaf) == len(present) else jnp.any(present, keepdims=True)
