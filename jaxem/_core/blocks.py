"""Sums and maps over observations, in blocks, so that no array of N × K ever exists.

Blocks are slices of the data as they lie: nothing is padded or copied. The last block overlaps
the one before it, and the observations it repeats get weight zero. Sums over blocks are
compensated (Neumaier), so float32 loses no digits however many observations there are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

# Numbers held at once for one block. On CPU it keeps a block in cache (2¹⁹ … 2²¹ were within a
# third of each other, 2²² twice as slow); on accelerators it fills the device (256 MiB of float32).
_BUDGET = {"cpu": 2**21}
_ACCELERATOR_BUDGET = 2**26


def num_observations(data: PyTree[Array]) -> int:
    """Length of the leading axis, which every leaf of the data must share.

    **Raises:** `ValueError` if there is no array, no observation, or the lengths differ.
    """
    leaves = jax.tree.leaves(data)
    if not leaves or any(not eqx.is_array(leaf) or leaf.ndim == 0 for leaf in leaves):
        wrong = [leaf for leaf in leaves if not eqx.is_array(leaf) or leaf.ndim == 0]
        given = type(wrong[0]).__name__ if wrong else "nothing"
        raise ValueError(
            "data must be an array, or a PyTree of arrays, with one leading axis of observations; "
            f"got {given}. Lists become arrays by jnp.asarray; columns of mixed types go one by "
            "one."
        )
    lengths = {leaf.shape[0] for leaf in leaves}
    if len(lengths) > 1:
        raise ValueError(
            f"the leaves of data disagree on the number of observations: {sorted(lengths)}."
        )
    (length,) = lengths
    if length == 0:
        raise ValueError("data hold no observation: the leading axis has length 0.")
    return length


def total_weight(data: PyTree[Array], sample_weight: Float[Array, " n"] | None) -> Any:
    """How many observations there are, each as often as its weight says."""
    return num_observations(data) if sample_weight is None else jnp.sum(sample_weight)


def _blocking(n: int, width: int) -> tuple[int, int]:
    """Number and size of the blocks: equal ones where a nearby number divides n."""
    least = max(1, min(-(-n * max(width, 1) // _budget()), n))
    equal = (count for count in range(least, least + least // 4 + 1) if n % count == 0)
    size = -(-n // next(equal, least))
    return -(-n // size), size


def fits_one_block(n: int, width: int) -> bool:
    """Whether a sum over n observations is done at once."""
    return _blocking(n, width)[0] == 1


def _budget() -> int:
    return _BUDGET.get(jax.default_backend(), _ACCELERATOR_BUDGET)


def lanes_at_once(num_lanes: int, numbers_per_lane: int) -> int:
    """How many fits to run side by side: what one block may hold, in equal batches if possible."""
    most = max(1, min(num_lanes, _budget() // max(numbers_per_lane, 1)))
    return next((size for size in range(most, most // 2, -1) if num_lanes % size == 0), most)


def _take(data: PyTree[Array], start: Array, size: int) -> PyTree[Array]:
    return jax.tree.map(lambda leaf: lax.dynamic_slice_in_dim(leaf, start, size), data)


def sum_over_observations(
    block_sums: Callable[[PyTree[Array], Any, Any], PyTree[Array]],
    data: PyTree[Array],
    sample_weight: Float[Array, " n"] | None = None,
    *,
    width: int,
    key: Array | None = None,
) -> PyTree[Array]:
    """The sum over blocks of `block_sums(data_block, weights_block, key_block)`.

    `block_sums` must be linear in `sample_weight`; it is handed `None` where every observation of
    the block counts once, and booleans where some only do not count. `width` is how many numbers it
    holds per observation: it decides the block size.
    Derivatives recompute each block instead of remembering it.
    """
    n = num_observations(data)
    num_blocks, size = _blocking(n, width)
    if num_blocks == 1:
        return block_sums(data, sample_weight, key)
    overlaps = num_blocks * size != n

    @jax.checkpoint  # pyright: ignore[reportPrivateImportUsage]
    def block(index: Array) -> PyTree[Array]:
        start = jnp.minimum(index * size, n - size)
        part = (
            None if sample_weight is None else lax.dynamic_slice_in_dim(sample_weight, start, size)
        )
        if overlaps:
            fresh = start + jnp.arange(size) >= index * size
            part = fresh if part is None else jnp.where(fresh, part, 0)
        block_key = None if key is None else jax.random.fold_in(key, index)
        return block_sums(_take(data, start, size), part, block_key)

    def add(carry: PyTree[Array], index: Array) -> tuple[PyTree[Array], None]:
        total, lost = carry
        new = block(index)
        grown = jax.tree.map(jnp.add, total, new)
        lost = jax.tree.map(lambda c, t, g, v: c + _rounding(t, g, v), lost, total, grown, new)
        return (grown, lost), None

    indices = jnp.arange(num_blocks, dtype=jnp.int32)
    shapes = jax.eval_shape(block, indices[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    (total, lost), _ = lax.scan(add, (zeros, zeros), indices)
    return jax.tree.map(jnp.add, total, lost)


def _rounding(total: Array, grown: Array, new: Array) -> Array:
    """What `grown = total + new` rounded away (two-sum; Knuth, TAOCP vol. 2, 4.2.2)."""
    part = grown - total
    return (total - (grown - part)) + (new - part)


def map_over_observations(
    block_map: Callable[[PyTree[Array]], PyTree[Array]], data: PyTree[Array], *, width: int
) -> PyTree[Array]:
    """`block_map(data)` for a map that treats observations one by one, computed in blocks."""
    n = num_observations(data)
    num_blocks, size = _blocking(n, width)
    if num_blocks == 1:
        return block_map(data)
    starts = jnp.minimum(jnp.arange(num_blocks) * size, n - size)
    blocks = lax.map(lambda start: block_map(_take(data, start, size)), starts)
    tail = n - (num_blocks - 1) * size

    def join(leaf: Array) -> Array:
        head = leaf[:-1].reshape((-1, *leaf.shape[2:]))
        return jnp.concatenate([head, leaf[-1, size - tail :]])

    return jax.tree.map(join, blocks)


def substitute(data: PyTree[Array], keep: Array) -> PyTree[Array]:
    """Data whose observations outside `keep` are replaced by one inside it, before any arithmetic.

    What such observations hold, NaN included, then reaches neither a value nor a derivative.
    """
    first = jnp.argmax(keep)
    found = jnp.any(keep)

    def one(leaf: Array) -> Array:
        typical = jnp.where(found, leaf[first], jnp.zeros((), leaf.dtype))
        return jnp.where(keep.reshape((-1,) + (1,) * (leaf.ndim - 1)), leaf, typical)

    return jax.tree.map(one, data)


@jax.jit
def weighted_mean(x: Float[Array, "n d"], sample_weight: Float[Array, " n"]) -> Float[Array, " d"]:
    """Σ w x / Σ w, summed about the first observation that has weight."""
    origin = x[jnp.argmax(sample_weight > 0)]

    def block(part: Any, w: Any, _: Any) -> tuple[Array, Array]:
        return _weigh(w, part - origin), jnp.sum(w)

    total, count = sum_over_observations(block, x, sample_weight, width=2 * x.shape[1])
    return origin + total / count


@functools.partial(jax.jit, static_argnames="diagonal")
def weighted_second_moments(
    x: Float[Array, "n d"],
    mean: Float[Array, " d"],
    sample_weight: Float[Array, " n"],
    diagonal: bool = False,
) -> tuple[Float[Array, " d"], Array]:
    """Units u and a matrix C of order one such that u C u is the covariance about `mean`.

    With `diagonal` it is the diagonal of C alone. The units keep squares of very large and very
    small data within the floating range.
    """
    present = (sample_weight > 0)[:, None]
    unit = jnp.max(jnp.where(present, jnp.abs(x - mean), 0), axis=0)
    unit = jnp.where(unit > 0, unit, jnp.finfo(x.dtype).tiny)

    def block(part: Any, w: Any, _: Any) -> tuple[Array, Array]:
        scaled = (part - mean) / unit
        if diagonal:
            return _weigh(w, scaled**2), jnp.sum(w)
        product = jnp.matmul((w[:, None] * scaled).T, scaled, precision=lax.Precision.HIGHEST)
        return product, jnp.sum(w)

    total, count = sum_over_observations(block, x, sample_weight, width=2 * x.shape[1])
    return unit, total / count


def _weigh(sample_weight: Array, x: Array) -> Array:
    return jnp.matmul(sample_weight.astype(x.dtype), x, precision=lax.Precision.HIGHEST)
