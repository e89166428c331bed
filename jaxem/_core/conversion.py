"""What users hand over, as JAX arrays of the same values, or an error with the line to write.

Arrays of JAX pass as they are; numbers of half precision become float32, which holds them all.
Arrays of other libraries are taken in JAX's dtypes; where those cannot hold the values, where
entries are masked, and where there are no numbers, `ValueError` is raised.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, PyTree

# Rounding of a column, relative to its standard deviation, beyond which it is refused.
_COARSE = 1e-3

HALF_PRECISION = (jnp.float16, jnp.bfloat16)


@runtime_checkable
class _SupportsArray(Protocol):
    """An array of another library."""

    def __array__(self) -> Any: ...


@runtime_checkable
class _Sparse(Protocol):
    """A sparse matrix."""

    def toarray(self) -> Any: ...


@runtime_checkable
class _JAXSparse(Protocol):
    """A sparse matrix of JAX, whose module takes long to import."""

    def todense(self) -> Any: ...


def as_arrays(data: PyTree[Any]) -> PyTree[Array]:
    """Arrays of other libraries (NumPy, PyTorch, pandas, polars) as JAX's; the rest as it is.

    **Raises:** `ValueError` for masked entries, sparse matrices, text, dates, objects that are no
    numbers, and numbers that JAX's dtype does not hold.
    """
    return jax.tree.map(_as_array, data, is_leaf=lambda leaf: isinstance(leaf, _JAXSparse))


def _as_array(leaf: Any) -> Any:
    if isinstance(leaf, jax.Array):
        return widened(leaf)
    if not isinstance(leaf, _SupportsArray):
        if isinstance(leaf, _Sparse | _JAXSparse):
            dense = "toarray" if isinstance(leaf, _Sparse) else "todense"
            raise ValueError(f"data are sparse ({type(leaf).__name__}): write data.{dense}().")
        return leaf
    if isinstance(leaf, np.ma.MaskedArray):
        if np.ma.is_masked(leaf):
            raise ValueError(
                f"data hold {int(np.ma.getmaskarray(leaf).sum())} masked entries, which a mask "
                "alone does not take out: leave such observations away, as in "
                "x[~np.ma.getmaskarray(x).any(axis=1)].data; sequences take masked steps as "
                "unobserved, as jaxem.Sequences(x)."
            )
        leaf = leaf.data
    array = widened(np.asarray(leaf))
    if array.dtype == object:
        array = _numbers(array)
    if array.dtype.kind not in "biufc":
        what = {"U": "text", "S": "text", "T": "text", "M": "dates", "m": "durations"}
        advice = (
            "numbers stand in x.astype(float), codes of categories in "
            "np.unique(x, return_inverse=True)[1]"
            if array.dtype.kind in "UST"
            else "write what they are as numbers, as in x.astype(float)"
        )
        raise ValueError(
            f"data are {what.get(array.dtype.kind, 'no numbers')} (dtype {array.dtype}): {advice}."
        )
    return jax.device_put(_held(array))  # `jnp.asarray` would compile a program for it


def widened(array: Any) -> Any:
    """Numbers of half precision as float32, in which their sums keep their digits."""
    return array.astype(np.float32) if array.dtype in HALF_PRECISION else array


def without_masks(values: PyTree[Any]) -> tuple[PyTree[Any], np.ndarray | None]:
    """Values (b, t, …) without masks, and the steps (b, t) that were not masked, if some were.

    **Raises:** `ValueError` for a step that is masked in part.
    """
    leaves = jax.tree.leaves(values)
    if not any(np.ma.is_masked(leaf) for leaf in leaves):
        return values, None
    masks = [np.ma.getmaskarray(leaf) for leaf in leaves]
    flat = np.concatenate([mask.reshape(*mask.shape[:2], -1) for mask in masks], axis=2)
    unobserved = np.asarray(flat.all(axis=2))
    if np.any(flat.any(axis=2) & ~unobserved):
        raise ValueError(
            "values hold steps that are masked in part: mask all of a step, or nothing of it."
        )

    def one(leaf: Any) -> Any:
        """Masked steps hold another step's values, which are possible ones."""
        if not isinstance(leaf, np.ma.MaskedArray):
            return leaf
        mask = np.ma.getmaskarray(leaf)
        typical = leaf.data[~mask][0] if not mask.all() else np.zeros((), leaf.dtype)
        return np.where(mask, typical, leaf.data)

    return jax.tree.map(one, values), ~unobserved


def _numbers(array: np.ndarray) -> np.ndarray:
    """The numbers in an array of objects, as columns of mixed or nullable types give one."""
    kinds = (bool, int, float, np.bool_, np.integer, np.floating)
    others = [entry for entry in array.flat if not isinstance(entry, kinds)]
    if others:
        raise ValueError(
            f"data hold an entry that is no number, {others[0]!r} (dtype object): fill or drop "
            "missing entries, and write codes for categories, as pandas.factorize gives; numbers "
            "stand in x.astype(float)."
        )
    return np.array(array.tolist())


def _held(array: np.ndarray) -> np.ndarray:
    """An array in JAX's dtype for it.

    **Raises:** `ValueError` where it does not hold the values.
    """
    given = array.dtype.newbyteorder("=")
    if array.dtype.kind == "f" and given.itemsize > 8:
        given = np.dtype(float)
    dtype = np.dtype(jax.dtypes.canonicalize_dtype(given))
    if dtype == array.dtype or not array.size:
        return array.astype(dtype, copy=False)
    wider = "" if jax.config.read("jax_enable_x64") else " (float64 may: jax_enable_x64)"
    if array.dtype.kind in "iu":
        least, most = array.min(), array.max()
        limits = np.iinfo(dtype)
        if least < limits.min or most > limits.max:
            raise ValueError(
                f"data hold integers from {least} to {most}, which {dtype} does not hold{wider}."
            )
    with np.errstate(over="ignore"):  # what overflows is refused below
        held = array.astype(dtype)
    if array.dtype.kind == "f":
        _check_rounding(array, held, wider)
    return held


def _check_rounding(array: np.ndarray, held: np.ndarray, wider: str) -> None:
    """Raises `ValueError` where a floating dtype overflows, or rounds what makes a column vary."""
    shape, dtype = (-1, array.shape[-1] if array.ndim > 1 else 1), held.dtype
    columns, rounded = array.reshape(shape), held.reshape(shape)
    finite = np.isfinite(columns)
    columns, rounded = np.where(finite, columns, 0), np.where(finite, rounded, 0)
    if not np.all(np.isfinite(rounded)):
        raise ValueError(
            f"data hold numbers up to {np.abs(columns).max():.3g}, which {dtype} does not "
            f"hold{wider}."
        )
    count = np.maximum(np.sum(finite, axis=0), 1)
    deviations = np.where(finite, columns - np.sum(columns, axis=0) / count, 0)
    spread = np.sqrt(np.sum(deviations**2, axis=0) / count)
    lost = np.max(np.abs(rounded - columns), axis=0)
    coarse = np.flatnonzero((lost > _COARSE * spread) & (spread > 0))
    if len(coarse):
        column = coarse[0]
        raise ValueError(
            f"column {column} of the data varies by {spread[column]:.3g}, and {dtype} rounds its "
            f"numbers by up to {lost[column]:.3g}: subtract a typical value first{wider}."
        )
