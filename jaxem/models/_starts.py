"""Starts: observations that are far from each other, in the deviance of the family at hand.

The deviance of observation i from observation j is log p(xᵢ | located at xᵢ) − log p(xᵢ | located
at xⱼ): half the squared Mahalanobis distance for Gaussians, and the like for counts, categories and
mixed data. All of it is pure JAX: it may be jitted, and vmapped over keys.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jax.tree_util import Partial
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core.blocks import map_over_observations, num_observations, substitute
from jaxem._core.checks import check_sample_weight, check_values, checked_key, is_integer, or_absent
from jaxem._core.compilation import filter_jit
from jaxem._core.numerics import float_dtype
from jaxem.emissions._base import AbstractStarting, build, log_prob
from jaxem.emissions._family import settled
from jaxem.emissions._mixture_emission import MixtureEmission


class Seeds(eqx.Module):
    """So many components of a family, each located at an observation.

    What a call needs to know of the arguments is checked before: calls are compiled, together with
    what is made of the components, by `compiled`.
    """

    family: Partial
    num_components: int = eqx.field(static=True)
    method: str = eqx.field(static=True)

    def __call__(
        self, key: Array, data: PyTree[Array], sample_weight: Float[Array, " n"] | None
    ) -> tuple[Any, Bool[Array, " n"]]:
        """Components with the scale of what is around, and which observations are possible."""
        k = self.num_components
        whole: Any = pooled(data, 1, self.family, sample_weight)
        if not jax.tree.leaves(whole):
            raise ValueError(
                f"{type(whole).__name__} has no parameters that a start could find: it is a part "
                "of Independent."
            )
        if not isinstance(whole, MixtureEmission):
            components = _seed(key, data, whole, k, sample_weight, self.method)
            return components, or_absent(components.in_support(data), sample_weight)
        parts, n = whole.components, num_observations(data)
        size = parts.num_components  # each part of a mixture starts around its own observation
        if k * size > n:
            raise ValueError(f"{k} × {size} parts cannot start from {n} observations.")
        alone = jax.tree.map(lambda leaf: leaf[:1], parts)
        located = _seed(key, data, alone, k * size, sample_weight, self.method, size)
        shares = jnp.full((k, size), 1 / size, float_dtype(located))
        possible = or_absent(located.in_support(data), sample_weight)
        return MixtureEmission(shares, located), possible


def seeds(
    key: Array, data: PyTree[Array], n: int, num_components: Any, family: Any, method: Any
) -> Seeds:
    """The arguments of a start from n observations, checked."""
    checked_key(key)
    if not is_integer(num_components):
        raise ValueError(f"the number of components must be an integer, got {num_components!r}.")
    if not 1 <= num_components <= n:
        raise ValueError(f"{num_components} components cannot start from {n} observations.")
    if method not in ("k-means++", "random"):
        raise ValueError(f'method must be "k-means++" or "random", got {method!r}.')
    return Seeds(settled(family, data), int(num_components), method)


def compiled(make: Callable[..., tuple[Any, Array]], family: Any, *args: Any) -> Any:
    """The model that `make` returns beside which observations are possible, by one program.

    **Raises:** `ValueError` if an observation that counts is known to be impossible.
    """
    model, possible = _compiled(make, args)
    check_values(
        possible,
        "the data hold a NaN, an infinity or a value outside the support of "
        f"{build(family)[0].__name__}; give such observations weight 0, or remove them.",
    )
    return model


@filter_jit(optimized=False)
def _compiled(make: Callable[..., tuple[Any, Array]], args: Any) -> tuple[Any, Array]:
    model, possible = make(*args)
    return model, jnp.all(possible)


def pooled(
    data: PyTree[Array], num_components: int, family: Any, sample_weight: Float[Array, " n"] | None
) -> AbstractStarting:
    """`num_components` components that are each the fit of one to all the data.

    Integer data of continuous families are refused by the emission's own check.
    """
    n = num_observations(data)
    check_sample_weight(sample_weight, n)
    cls, keywords = build(family)
    if sample_weight is None:
        sample_weight = _ones(n, floating(data))
    else:
        if not jnp.issubdtype(sample_weight.dtype, jnp.floating):
            sample_weight = sample_weight.astype(floating(data))
        data = substitute(data, sample_weight > 0)
    components = cls.pooled(data, num_components, sample_weight, **keywords)
    components.check(data)
    return components


def _ones(n: int, dtype: Any) -> Float[Array, " n"]:
    """Equal weights, of which the compiler does not know that they are constant: it adds slowly."""
    return lax.optimization_barrier(jnp.ones(n, dtype))


def floating(data: PyTree[Array]) -> Any:
    """The dtype of the floating data, or JAX's default where there are none."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(data)]
    dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)


def _seed(
    key: Array,
    data: PyTree[Array],
    whole: AbstractStarting,
    num_components: int,
    sample_weight: Float[Array, " n"] | None,
    method: str,
    group_size: int = 1,
) -> AbstractStarting:
    n = num_observations(data)
    if sample_weight is not None:
        data = substitute(data, sample_weight > 0)
    dtype = float_dtype(whole)
    mass = _ones(n, dtype) if sample_weight is None else sample_weight.astype(dtype)
    best = _saturated(whole, data)
    if method == "k-means++":
        indices, closest = _kmeans_plus_plus(key, whole, data, best, mass, num_components)
    else:
        gumbel = jax.random.gumbel(key, (n,)) + jnp.log(mass)
        indices = lax.top_k(gumbel, num_components)[1]
        closest = jnp.min(_deviance(whole, data, indices, best), axis=1)
    around_all = best - map_over_observations(
        lambda x: log_prob(whole, x)[:, 0], data, width=_width(data)
    )
    # Variances shrink by what the seeds explain, as within-group variances do.
    # Where every observation is a seed nothing is left but rounding.
    total = jnp.sum(mass * around_all)
    spread = jnp.sum(mass * closest) / jnp.where(total > 0, total, 1)
    spread = jnp.clip(spread, jnp.finfo(dtype).eps, 1)
    observations = _take(data, indices)
    if group_size > 1:
        places = jnp.arange(num_components)
        gaps = _deviance(whole, observations, places, _saturated(whole, observations))
        observations = _take(observations, _grouped(gaps, group_size))
    return whole.located_at(observations, spread)


def _grouped(gaps: Float[Array, "s s"], size: int) -> Int[Array, " s"]:
    """An order of the seeds in groups: each joins the closest of the first ones that has room."""
    num_seeds = gaps.shape[0]
    num_groups = num_seeds // size

    def join(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        group, room = carry
        closest = jnp.argmin(jnp.where(room > 0, gaps[j, :num_groups], jnp.inf))
        return group.at[j].set(closest), room.at[closest].add(-1)

    group = jnp.arange(num_seeds) % num_groups
    start = (group, jnp.full(num_groups, size - 1))
    return jnp.argsort(lax.fori_loop(num_groups, num_seeds, join, start)[0])


def _kmeans_plus_plus(
    key: Array,
    whole: AbstractStarting,
    data: PyTree[Array],
    best: Float[Array, " n"],
    mass: Float[Array, " n"],
    num_seeds: int,
) -> tuple[Int[Array, " k"], Float[Array, " n"]]:
    """Indices of seeds, and each observation's deviance from the closest one.

    The first seed is drawn by weight. Each later one is the best of 2 + log k candidates drawn
    by weight × deviance from the seeds so far; where all of that is zero (fewer distinct
    observations than seeds), by weight alone.

    Arthur & Vassilvitskii (2007), SODA; greedy as in scikit-learn. For other deviances than the
    squared distance, Nock, Luosto & Kivinen (2008), ECML.
    """
    num_candidates = 2 + int(math.log(num_seeds))

    def draw(key: Array) -> Float[Array, " candidates"]:
        return jax.random.uniform(key, (num_candidates,), best.dtype)

    places = jnp.arange(num_seeds)
    draws = jax.vmap(draw)(jax.vmap(lambda j: jax.random.fold_in(key, j))(places))

    def grow(closest: Float[Array, " n"], now: Any) -> tuple[Array, Array]:
        j, drawn = now
        # One loop for the first seed and the others: a program of half the size
        chance = jnp.where(j == 0, mass, mass * closest)
        ladder = jnp.cumsum(jnp.where(jnp.sum(chance) > 0, chance, mass))
        rungs = drawn * ladder[-1]
        reached = jnp.sum(ladder[:, None] <= rungs, axis=0)
        candidates = jnp.minimum(reached, len(mass) - 1)
        if_taken = jnp.minimum(closest[:, None], _deviance(whole, data, candidates, best))
        total = jnp.matmul(mass, if_taken, precision=lax.Precision.HIGHEST)
        winner = jnp.where(j == 0, 0, jnp.argmin(total))
        return if_taken[:, winner], candidates[winner]

    closest, indices = lax.scan(grow, jnp.full_like(mass, jnp.inf), (places, draws))
    return indices, closest


def _saturated(whole: AbstractStarting, data: PyTree[Array]) -> Float[Array, " n"]:
    """log p of each observation under a component located at itself."""

    def one(observation: PyTree[Array]) -> Array:
        alone = jax.tree.map(lambda leaf: leaf[None], observation)
        return log_prob(whole.located_at(alone, jnp.ones((), float_dtype(whole))), alone)[0, 0]

    return map_over_observations(jax.vmap(one), data, width=2 * _width(data))


def _deviance(
    whole: AbstractStarting,
    data: PyTree[Array],
    indices: Int[Array, " k"],
    best: Float[Array, " n"],
) -> Float[Array, "n k"]:
    """Deviance of every observation from the observations at `indices`; not negative.

    `best` is log p of each observation under a component located at itself.
    """
    located = whole.located_at(_take(data, indices), jnp.ones((), float_dtype(whole)))
    width = _width(data) * indices.shape[0]
    reached = map_over_observations(lambda x: log_prob(located, x), data, width=width)
    return jnp.maximum(best[:, None] - reached, 0)


def _take(data: PyTree[Array], indices: Array) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: leaf[indices], data)


def _width(data: PyTree[Array]) -> int:
    return sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(data))
