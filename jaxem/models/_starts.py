"""Starts: observations that are far from each other, in the deviance of the family at hand.

The deviance of observation i from observation j is log p(xᵢ | located at xᵢ) − log p(xᵢ | located
at xⱼ): half the squared Mahalanobis distance for Gaussians, and the like for counts, categories and
mixed data. All of it is pure JAX: it may be jitted, and vmapped over keys.
"""

from __future__ import annotations

import math
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxem._core.blocks import map_over_observations, num_observations, substitute
from jaxem._core.checks import check_sample_weight, check_values, checked_key, is_integer, or_absent
from jaxem._core.numerics import float_dtype
from jaxem.emissions._base import AbstractEmission, AbstractStarting, build, log_prob
from jaxem.emissions._mixture_emission import MixtureEmission


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
        sample_weight = jnp.ones(n, floating(data))
    else:
        if not jnp.issubdtype(sample_weight.dtype, jnp.floating):
            sample_weight = sample_weight.astype(floating(data))
        data = substitute(data, sample_weight > 0)
    components = cls.pooled(data, num_components, sample_weight, **keywords)
    components.check(data)
    return components


def check_support(components: AbstractEmission, data: PyTree[Array], sample_weight: Any) -> None:
    """Raises `ValueError` if an observation that counts is known to be impossible."""
    check_values(
        or_absent(components.in_support(data), sample_weight),
        "the data hold a NaN, an infinity or a value outside the support of "
        f"{type(components).__name__}; give such observations weight 0, or remove them.",
    )


def floating(data: PyTree[Array]) -> Any:
    """The dtype of the floating data, or JAX's default where there are none."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(data)]
    dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)


def seed(
    key: Array,
    data: PyTree[Array],
    num_components: int,
    family: Any,
    sample_weight: Float[Array, " n"] | None,
    method: str,
) -> Any:
    """Components located at `num_components` observations, with the scale of what is around."""
    n, key = num_observations(data), checked_key(key)
    if not is_integer(num_components):
        raise ValueError(f"the number of components must be an integer, got {num_components!r}.")
    num_components = int(num_components)
    if not 1 <= num_components <= n:
        raise ValueError(f"{num_components} components cannot start from {n} observations.")
    if method not in ("k-means++", "random"):
        raise ValueError(f'method must be "k-means++" or "random", got {method!r}.')
    whole: Any = pooled(data, 1, family, sample_weight)
    if not jax.tree.leaves(whole):
        raise ValueError(
            f"{type(whole).__name__} has no parameters that a start could find: it is a part of "
            "Independent."
        )
    if not isinstance(whole, MixtureEmission):
        components = _seed(key, data, whole, num_components, sample_weight, method)
        check_support(components, data, sample_weight)
        return components
    parts = whole.components
    size = parts.num_components  # each part of a mixture starts around an observation of its own
    if num_components * size > n:
        raise ValueError(f"{num_components} × {size} parts cannot start from {n} observations.")
    alone = jax.tree.map(lambda leaf: leaf[:1], parts)
    located = _seed(key, data, alone, num_components * size, sample_weight, method, size)
    check_support(located, data, sample_weight)
    shares = jnp.full((num_components, size), 1 / size, float_dtype(located))
    return MixtureEmission(shares, located)


@eqx.filter_jit
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
    mass = jnp.ones(n, dtype) if sample_weight is None else sample_weight.astype(dtype)
    if method == "k-means++":
        indices, closest = kmeans_plus_plus(key, whole, data, num_components, sample_weight)
    else:
        gumbel = jax.random.gumbel(key, (n,)) + jnp.log(mass)
        indices = lax.top_k(gumbel, num_components)[1]
        closest = jnp.min(deviance(whole, data, indices), axis=1)
    around_all = saturated(whole, data) - map_over_observations(
        lambda x: log_prob(whole, x)[:, 0], data, width=_width(data)
    )
    # Variances shrink by what the seeds explain, as within-group variances do.
    # Where every observation is a seed nothing is left but rounding.
    total = jnp.sum(mass * around_all)
    spread = jnp.sum(mass * closest) / jnp.where(total > 0, total, 1)
    spread = jnp.clip(spread, jnp.finfo(dtype).eps, 1)
    observations = _take(data, indices)
    if group_size > 1:
        gaps = deviance(whole, observations, jnp.arange(num_components))
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


def kmeans_plus_plus(
    key: Array,
    whole: AbstractStarting,
    data: PyTree[Array],
    num_seeds: int,
    sample_weight: Float[Array, " n"] | None = None,
) -> tuple[Int[Array, " k"], Float[Array, " n"]]:
    """Indices of seeds, and each observation's deviance from the closest one.

    The first seed is drawn by weight. Each later one is the best of 2 + log k candidates drawn
    by weight × deviance from the seeds so far; where all of that is zero (fewer distinct
    observations than seeds), by weight alone.

    Arthur & Vassilvitskii (2007), SODA; greedy as in scikit-learn. For other deviances than the
    squared distance, Nock, Luosto & Kivinen (2008), ECML.
    """
    n = num_observations(data)
    best = saturated(whole, data)
    mass = jnp.ones(n, best.dtype) if sample_weight is None else sample_weight.astype(best.dtype)
    num_candidates = 2 + int(math.log(num_seeds))

    def draw(draw_key: Array, chance: Array, count: int) -> Array:
        chance = jnp.where(jnp.sum(chance) > 0, chance, mass)
        ladder = jnp.cumsum(chance)
        rungs = jax.random.uniform(draw_key, (count,), best.dtype) * ladder[-1]
        return jnp.clip(jnp.searchsorted(ladder, rungs, side="right"), 0, n - 1)

    def grow(j: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        indices, closest = carry
        candidates = draw(jax.random.fold_in(key, j), mass * closest, num_candidates)
        if_taken = jnp.minimum(closest[:, None], deviance(whole, data, candidates, best))
        winner = jnp.argmin(jnp.matmul(mass, if_taken, precision=lax.Precision.HIGHEST))
        return indices.at[j].set(candidates[winner]), if_taken[:, winner]

    first = draw(jax.random.fold_in(key, 0), mass, 1)
    indices = jnp.zeros(num_seeds, first.dtype).at[0].set(first[0])
    closest = deviance(whole, data, first, best)[:, 0]
    return lax.fori_loop(1, num_seeds, grow, (indices, closest))


def saturated(whole: AbstractStarting, data: PyTree[Array]) -> Float[Array, " n"]:
    """log p of each observation under a component located at itself."""

    def one(observation: PyTree[Array]) -> Array:
        alone = jax.tree.map(lambda leaf: leaf[None], observation)
        return log_prob(whole.located_at(alone, jnp.ones((), float_dtype(whole))), alone)[0, 0]

    return map_over_observations(jax.vmap(one), data, width=2 * _width(data))


def deviance(
    whole: AbstractStarting,
    data: PyTree[Array],
    indices: Int[Array, " k"],
    best: Float[Array, " n"] | None = None,
) -> Float[Array, "n k"]:
    """Deviance of every observation from the observations at `indices`; not negative."""
    best = saturated(whole, data) if best is None else best
    located = whole.located_at(_take(data, indices), jnp.ones((), float_dtype(whole)))
    width = _width(data) * indices.shape[0]
    reached = map_over_observations(lambda x: log_prob(located, x), data, width=width)
    return jnp.maximum(best[:, None] - reached, 0)


def _take(data: PyTree[Array], indices: Array) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: leaf[indices], data)


def _width(data: PyTree[Array]) -> int:
    return sum(leaf.size // leaf.shape[0] for leaf in jax.tree.leaves(data))
