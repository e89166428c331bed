"""Sequences of different lengths as arrays of one shape."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core.checks import check_values, is_integer
from jaxem._core.conversion import as_arrays, without_masks


class Sequences(eqx.Module):
    """A batch of sequences; each is one observation: weights, minibatches and shards take it whole.

    **Arguments:**

    - `values`: a PyTree of arrays (b, t, …), as the emission takes them with (b, t) in place of
      its observations.
    - `lengths` (b,): how many steps of each sequence count; default: all t.
    - `observed` (b, t): False where a step was not observed. The state still moves on there, and
      what `values` hold does not matter. Default: the steps that masked arrays do not mask.
    - `inputs` (b, t, p): covariates that drive the transition *into* each step.

    `Sequences.from_list` and `Sequences.split` make them from sequences of different lengths.

    **Raises:** `ValueError` for shapes that do not belong together, or lengths beyond t.

    ```python
    data = Sequences(jnp.zeros((2, 5, 1)), lengths=[5, 3])
    ```
    """

    values: PyTree[Array]
    lengths: Int[Array, " b"] | None
    observed: Bool[Array, "b t"] | None
    inputs: Float[Array, "b t p"] | None

    def __init__(
        self,
        values: PyTree[Array],
        lengths: ArrayLike | None = None,
        *,
        observed: ArrayLike | None = None,
        inputs: ArrayLike | None = None,
    ):
        values, unmasked = without_masks(values)
        self.values = as_arrays(values)
        b, t = _batch_shape(self.values)
        self.lengths = None if lengths is None else _checked_lengths(lengths, b, t)
        observed = unmasked if observed is None else as_arrays(observed)
        self.observed = None if observed is None else jnp.asarray(observed)
        self.inputs = None if inputs is None else jnp.asarray(as_arrays(inputs))
        if self.observed is not None and (
            self.observed.shape != (b, t) or self.observed.dtype != jnp.bool_
        ):
            raise ValueError(
                f"observed must be booleans of shape ({b}, {t}); got shape {self.observed.shape} "
                f"of {self.observed.dtype}."
            )
        if self.inputs is not None and (self.inputs.ndim != 3 or self.inputs.shape[:2] != (b, t)):
            raise ValueError(f"inputs have shape {self.inputs.shape}; expected ({b}, {t}, p).")

    @classmethod
    def from_list(
        cls,
        values: Sequence[PyTree[Any]],
        *,
        observed: Sequence[Any] | None = None,
        inputs: Sequence[Any] | None = None,
        num_steps: int | None = None,
    ) -> Sequences:
        """Sequences of different lengths, filled up behind their ends.

        **Arguments:** `values`, PyTrees of arrays (tᵢ, …); `observed` (tᵢ,) and `inputs`
        (tᵢ, p) for each; `num_steps` to fill up to. By default the longest length is rounded up
        to one of a few sizes, so that new data of similar length do not compile anew.

        **Raises:** `ValueError` for an empty list, an empty sequence, or one that is too long.
        """
        if not isinstance(values, list) or not values:
            raise ValueError(
                "from_list expects a list with one entry for each sequence; for an array "
                "(b, t, …) write Sequences(values)."
            )
        lengths = [_length(sequence) for sequence in values]
        if min(lengths) == 0:
            raise ValueError(f"sequence {lengths.index(0)} is empty: leave it out.")
        steps = _rounded_up(max(lengths)) if num_steps is None else num_steps
        if max(lengths) > steps:
            raise ValueError(f"a sequence has {max(lengths)} steps, more than num_steps={steps}.")

        def batch(parts: Sequence[Any]) -> Any:
            if [_length(part) for part in parts] != lengths:
                raise ValueError(
                    f"observed and inputs need an entry for each step of each sequence; there are "
                    f"{len(lengths)} sequences of lengths {lengths[:8]}…, got "
                    f"{[_length(part) for part in parts][:8]}…"
                )
            return jax.tree.map(lambda *leaves: _filled_up(leaves, steps), *parts)

        return cls(
            batch(values),
            np.asarray(lengths, np.int32),
            observed=None if observed is None else batch(observed),
            inputs=None if inputs is None else batch(inputs),
        )

    @classmethod
    def split(
        cls,
        values: PyTree[Any],
        lengths: Sequence[int] | None = None,
        *,
        starts: ArrayLike | None = None,
        num_steps: int | None = None,
    ) -> Sequences:
        """Sequences that lie one behind the other along the leading axis of `values`.

        **Arguments:** either `lengths` of the sequences, or `starts` (n,), True where a new one
        begins; `num_steps` as in `from_list`.

        **Raises:** `ValueError` for lengths that do not sum to n.
        """
        n = _length(values)
        if isinstance(lengths, Tracer) or isinstance(starts, Tracer):
            raise ValueError("split cuts where lengths or starts say: they cannot be traced.")
        if (lengths is None) == (starts is None):
            raise ValueError("split needs either the lengths of the sequences or their starts.")
        if starts is not None:
            begins = np.flatnonzero(np.asarray(starts))
            if np.shape(starts) != (n,) or not len(begins) or begins[0] != 0:
                raise ValueError(f"starts must hold {n} booleans, the first of them True.")
        else:
            sizes = np.asarray(lengths)
            whole = np.issubdtype(sizes.dtype, np.integer)
            if sizes.ndim != 1 or not whole or np.any(sizes < 1) or sizes.sum() != n:
                raise ValueError(
                    f"lengths must be positive integers that sum to the {n} steps of values."
                )
            begins = np.cumsum(sizes) - sizes
        ends = [*begins[1:], n]
        parts = [
            jax.tree.map(lambda leaf, i=i, j=j: leaf[i:j], values)
            for i, j in zip(begins, ends, strict=True)
        ]
        return cls.from_list(parts, num_steps=num_steps)

    @property
    def within(self) -> Bool[Array, "b t"]:
        """Which steps lie within their sequences."""
        b, t = _batch_shape(self.values)
        if self.lengths is None:
            return jnp.ones((b, t), bool)
        return jnp.arange(t) < self.lengths[:, None]

    @property
    def present(self) -> Bool[Array, "b t"]:
        """Which steps lie within their sequences and were observed."""
        return self.within if self.observed is None else self.within & self.observed

    def driving(
        self, sample_weight: Float[Array, " b"] | None = None
    ) -> Float[Array, "b t p"] | None:
        """The inputs, with zeros in place of those that drive no transition.

        Those are of first steps, beyond the ends, and, where they are not finite, of sequences
        of weight 0.
        """
        if self.inputs is None:
            return None
        drives = self.within & (jnp.arange(self.inputs.shape[1]) > 0)
        if sample_weight is not None:
            drives &= (sample_weight != 0)[:, None] | jnp.all(jnp.isfinite(self.inputs), axis=2)
        return jnp.where(drives[:, :, None], self.inputs, 0)

    def steps(self) -> PyTree[Array]:
        """The values with all steps of all sequences along one axis, (b·t, …)."""
        return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), self.values)

    def lagged(self, order: int) -> Sequences:
        """Each step beside the `order` steps before it: (lags, x), inputs and outputs of an AR-HMM.

        Lags (b, t − order, order · d) hold the step before first, then the one before that. The
        first `order` steps of each sequence only serve as lags: the likelihood is given them. A
        step is observed where it and all its lags are.

        **Arguments:** `order` ≥ 1. The values must be one array (b, t, d).

        **Raises:** `ValueError` for other values, or a sequence of no more than `order` steps.
        """
        if not eqx.is_array(self.values) or self.values.ndim != 3:
            raise ValueError("lagged needs values of one array (b, t, d).")
        t = self.values.shape[1]
        if not is_integer(order) or not 1 <= order < t:
            raise ValueError(f"order must be an integer from 1 to {t - 1}, got {order!r}.")
        if self.lengths is not None:
            longer = self.lengths > order
            check_values(longer, f"a sequence has no more than the {order} steps of its lags.")

        def before(leaf: Array) -> list[Array]:
            return [leaf[:, order - lag : t - lag] for lag in range(1, order + 1)]

        observed = self.observed
        if observed is not None:
            observed = functools.reduce(jnp.logical_and, before(observed), observed[:, order:])
        return Sequences(
            (jnp.concatenate(before(self.values), axis=2), self.values[:, order:]),
            None if self.lengths is None else self.lengths - order,
            observed=observed,
            inputs=None if self.inputs is None else self.inputs[:, order:],
        )


def as_sequences(data: Any) -> Sequences:
    """Arrays (b, t, …) as sequences that all have t steps."""
    return data if isinstance(data, Sequences) else Sequences(data)


def _batch_shape(values: PyTree[Array]) -> tuple[int, int]:
    leaves = jax.tree.leaves(values)
    if isinstance(values, list) or not leaves or any(not eqx.is_array(leaf) for leaf in leaves):
        raise ValueError(
            "sequences are arrays of shape (b, t, …); a list of sequences becomes one by "
            "jaxem.Sequences.from_list."
        )
    if any(leaf.ndim < 3 for leaf in leaves):
        raise ValueError(
            f"sequences have shape (b, t, …), got {leaves[0].shape}: write x[None] for one "
            "sequence of shape (t, d), and x[..., None] where steps are single numbers."
        )
    shapes = {leaf.shape[:2] for leaf in leaves}
    if len(shapes) > 1:
        raise ValueError(f"the leaves of values disagree on (b, t): {sorted(shapes)}.")
    (shape,) = shapes
    if 0 in shape:
        raise ValueError(f"values hold no step: {shape[0]} sequences of {shape[1]} steps.")
    return shape


def _checked_lengths(lengths: ArrayLike, b: int, t: int) -> Int[Array, " b"]:
    lengths = lengths if isinstance(lengths, jax.Array) else np.asarray(lengths)
    if lengths.shape != (b,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(
            f"lengths must be one integer for each of {b} sequences; got shape {lengths.shape} "
            f"of {lengths.dtype}."
        )
    within = (lengths >= 0) & (lengths <= t)
    check_values(within, f"lengths must lie between 0 and the {t} steps that values hold.")
    return jnp.asarray(lengths, jnp.int32)


def _length(sequence: PyTree[Any]) -> int:
    lengths = {np.shape(leaf)[0] for leaf in jax.tree.leaves(sequence) if np.ndim(leaf)}
    if len(lengths) != 1:
        raise ValueError(
            f"a sequence has arrays of shape (t, …) that share t; got lengths {sorted(lengths)}."
        )
    return lengths.pop()


def _filled_up(leaves: Sequence[Any], steps: int) -> np.ma.MaskedArray:
    """Arrays (tᵢ, …) as one (b, steps, …), each repeating its last step behind its end."""
    shapes = {np.shape(leaf)[1:] for leaf in leaves}
    if len(shapes) > 1:
        raise ValueError(f"the steps of all sequences must have one shape, got {sorted(shapes)}.")
    arrays = [np.ma.asanyarray(leaf) for leaf in map(_host, leaves)]
    out = np.ma.empty(
        (len(arrays), steps, *shapes.pop()), np.result_type(*(leaf.dtype for leaf in arrays))
    )
    for i, leaf in enumerate(arrays):
        out[i, : len(leaf)] = leaf
        out[i, len(leaf) :] = leaf[-1]
    return out


def _host(leaf: Any) -> Any:
    """A masked array as it is, all else as NumPy's."""
    return leaf if isinstance(leaf, np.ma.MaskedArray) else np.asarray(leaf)


def _rounded_up(steps: int) -> int:
    """The least of 1, 2, …, 8, 10, 12, 14, 16, 20, … that is no smaller: at most a quarter more."""
    unit = max(1, 2 ** (steps - 1).bit_length() // 8)
    return -(-steps // unit) * unit
