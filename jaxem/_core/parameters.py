"""Modules whose parameters have names, and what follows from that for every one of them.

A module declares in the class variable `parameters` which leaves stand behind each name. The
parameters that are frozen stand in its static field `frozen`, as pairs (name, mask or None):
static, so that two models of different structure are different types for JAX. A mask has one entry
for each component, or the shape of the leaf where single elements are frozen.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jax.flatten_util import ravel_pytree

Frozen = tuple[tuple[str, tuple[Any, ...] | None], ...]
_T = TypeVar("_T")


class Parametrized(eqx.Module):
    """A module with named parameters, and perhaps with other such modules in its fields."""

    parameters: eqx.AbstractClassVar[Mapping[str, Any]]
    frozen: eqx.AbstractVar[Frozen]


def build(cls: type[_T], **fields: Any) -> _T:
    """An Equinox module of its fields, without its constructor.

    Constructors here take parameters, while the fields are the unconstrained ones.
    """
    new = object.__new__(cls)
    for field in dataclasses.fields(cls):  # pyright: ignore[reportArgumentType]
        object.__setattr__(new, field.name, fields.pop(field.name))
    if fields:
        raise TypeError(f"{cls.__name__} has no field {sorted(fields)}.")
    return new


def replace(module: _T, **changes: Any) -> _T:
    """A copy of an Equinox module with some fields changed; it does not call `__init__`."""
    fields = dataclasses.fields(module)  # pyright: ignore[reportArgumentType]
    return build(type(module), **{f.name: getattr(module, f.name) for f in fields} | changes)


def frozen_mask(module: Any, name: str) -> bool | np.ndarray:
    """Whether a parameter is frozen: True, False, or a mask over components or elements."""
    for frozen, mask in module.frozen:
        if frozen == name:
            return True if mask is None else np.asarray(mask)
    return False


def update(module: _T, **leaves: Any) -> _T:
    """The module with new leaves, except in what is frozen, which stays as it is."""
    owner = {p.leaf: name for name, p in module.parameters.items()}  # pyright: ignore[reportAttributeAccessIssue]
    masks = {leaf: frozen_mask(module, owner[leaf]) for leaf in leaves if leaf in owner}
    return replace(
        module,
        **{
            leaf: where_rows(masks.get(leaf, False), getattr(module, leaf), new)
            for leaf, new in leaves.items()
        },
    )


def where_rows(mask: Any, chosen: Any, other: Any) -> Any:
    """Every leaf: `chosen` where the mask over its leading axes is True, else `other`."""
    if mask is False or mask is True:
        return chosen if mask else other

    def one(a: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.where(jnp.reshape(mask, mask.shape + (1,) * (b.ndim - mask.ndim)), a, b)

    return jax.tree.map(one, chosen, other)


def with_rows(module: _T, order: Any) -> _T:
    """A factor with its rows, one for each component, in another order; what is shared has one."""
    size = len(order)

    def rows(leaf: jax.Array) -> jax.Array:
        return leaf[order] if leaf.shape[0] == size else leaf

    moved: Any = jax.tree.map(rows, module)
    masks = reordered_masks(module, order)
    return moved if masks == moved.frozen else replace(moved, frozen=masks)


def reordered_masks(module: Any, order: Any) -> Frozen:
    """What is frozen, with masks in another order of components, which must be known."""
    if all(mask is None for _, mask in module.frozen):
        return module.frozen
    if isinstance(order, Tracer):
        raise ValueError("a traced order cannot reorder masks of what is frozen: leave jit.")
    places = np.asarray(order)
    return tuple(
        (name, mask if mask is None or len(mask) == 1 else tuple(mask[i] for i in places))
        for name, mask in module.frozen
    )


def free(module: Any, name: str) -> np.ndarray:
    """Which entries of a parameter are free, along its leading axis: a NumPy mask.

    It has the shape of the leaf where single elements are frozen.
    """
    is_free = np.logical_not(frozen_mask(module, name))
    return is_free if is_free.ndim > 1 else np.broadcast_to(is_free, leading_size(module, name))


def free_elements(module: Any, name: str) -> np.ndarray:
    """Which elements of the leaf behind a parameter are free."""
    is_free, leaf = free(module, name), getattr(module, module.parameters[name].leaf)
    each = is_free.reshape(is_free.shape + (1,) * (leaf.ndim - is_free.ndim))
    return np.broadcast_to(each, leaf.shape)


def leading_size(module: Any, name: str) -> int:
    """The length of the leading axis of the leaves behind a parameter."""
    behind = getattr(module, module.parameters[name].leaf)
    return jax.tree.leaves(behind)[0].shape[0]


def with_frozen(frame: _T, model: _T) -> _T:
    """`frame`, with what is frozen taken from `model`: equal values, another derivative."""

    def one(frame: Any, model: Any) -> Any:
        for name, mask in frame.frozen:
            leaf = frame.parameters[name].leaf
            chosen = True if mask is None else np.asarray(mask)
            kept = where_rows(chosen, getattr(model, leaf), getattr(frame, leaf))
            frame = replace(frame, **{leaf: kept})
        return frame

    return _map_modules(one, frame, model)


def _map_modules(change: Callable[..., Any], module: Any, *others: Any) -> Any:
    """`change(module, *others)` of every module with named parameters, the inner ones first."""
    if isinstance(module, tuple):
        together = zip(module, *others, strict=True)
        return tuple(_map_modules(change, *parts) for parts in together)
    if not isinstance(module, Parametrized):
        return module
    inner = {
        field: _map_modules(change, value, *(getattr(other, field) for other in others))
        for field, value in _inner(module)
    }
    return change(replace(module, **inner), *others)


def _inner(module: Any) -> Iterator[tuple[str, Any]]:
    """Fields that hold parameters of their own: a module, or a tuple of modules."""
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(part, Parametrized) for part in parts):
            yield field.name, value


def log_leaves(module: Any) -> Iterator[jax.Array]:
    """Leaves that hold logarithms or log-odds, which have no units."""
    return (leaf for _, leaf in _all_logs(module))


def log_odds(module: Any) -> jax.Array:
    """Of all probabilities, against the likeliest: at most 0, and far below near a bound."""
    found = [
        parameter.constraint.log_odds(leaf).reshape(-1)
        for parameter, leaf in _all_logs(module)
        if parameter.constraint.log_odds is not None
    ]
    return jnp.concatenate(found) if found else jnp.zeros(1)


def _all_logs(module: Any) -> Iterator[tuple[Any, jax.Array]]:
    if isinstance(module, Parametrized):
        yield from _logs(module)
        for _, value in _inner(module):
            for part in value if isinstance(value, tuple) else (value,):
                yield from _all_logs(part)


def _logs(module: Any) -> Iterator[tuple[Any, jax.Array]]:
    for parameter in module.parameters.values():
        if parameter.is_log:
            yield parameter, getattr(module, parameter.leaf)


def inline(module: Any) -> dict[str, Any]:
    """The factors that each stand behind one parameter of a module, by its name.

    They are the fields whose names begin with an underscore: `_weights` is behind `weights`. One
    without parameters gives values that follow from other parameters, and cannot be frozen.
    """
    return {field[1:]: value for field, value in _inner(module) if field.startswith("_")}


def named_parameters(module: Any) -> dict[str, Any]:
    """Parameters by name, nested as the modules are."""
    named = {name: getattr(module, name) for name in module.parameters}
    for field, value in _inner(module):
        if field.startswith("_"):
            named[field[1:]] = getattr(module, field[1:])
        elif isinstance(value, tuple):
            named[field] = {str(i): named_parameters(part) for i, part in enumerate(value)}
        else:
            named[field] = named_parameters(value)
    return named


def parameter_names(module: Any) -> list[str]:
    """Paths to all parameters, as `freeze` takes them."""
    names = list(module.parameters)
    for field, value in _inner(module):
        if field.startswith("_"):
            names += [field[1:]] if value.parameters else []
        elif isinstance(value, tuple):
            names += [f"{field}.{i}.{n}" for i, p in enumerate(value) for n in parameter_names(p)]
        else:
            names += [f"{field}.{name}" for name in parameter_names(value)]
    return names


def free_numbers(model: _T) -> tuple[jax.Array, Callable[[jax.Array], _T]]:
    """Unconstrained numbers of a model, and the way back, on which all else stays.

    All else is what is frozen, and leaves behind no parameter, such as frames of inputs.
    """
    flat, unravel = ravel_pytree(model)
    ones, zeros = (unravel(jnp.full_like(flat, value)) for value in (1.0, 0.0))
    free, _ = ravel_pytree(with_frozen(_without_frames(ones), zeros))
    return flat, lambda numbers: unravel(jnp.where(free > 0, numbers, flat))


def log_numbers(model: Any) -> jax.Array:
    """Which of the unconstrained numbers of a model are logarithms or log-odds."""

    def one(module: Any) -> Any:
        logs = {p.leaf: jnp.ones_like(module_leaf) for p, module_leaf in _logs(module)}
        return replace(module, **logs)

    flat, unravel = ravel_pytree(model)
    return ravel_pytree(_map_modules(one, unravel(jnp.zeros_like(flat))))[0] > 0


def _without_frames(module: _T) -> _T:
    """The module with zeros in leaves behind no parameter; one without names has none."""

    def one(module: Any) -> Any:
        behind = {p.leaf for p in module.parameters.values()} | {f for f, _ in _inner(module)}
        others = {
            field.name: jax.tree.map(jnp.zeros_like, getattr(module, field.name))
            for field in dataclasses.fields(module)
            if field.name not in behind and not field.metadata.get("static", False)
        }
        return replace(module, **others)

    return _map_modules(one, module)


def within_bounds(module: _T) -> _T:
    """The module with parameters moved to where estimates lie, such as degrees of freedom."""

    def one(module: Any) -> Any:
        leaves = {p.leaf: p.within(getattr(module, p.leaf)) for p in module.parameters.values()}
        return update(module, **leaves)

    return _map_modules(one, module)


def estimates(model: Any) -> Any:
    """What a fit estimates: parameters by name, or a model's own `params`."""
    return named_parameters(model) if isinstance(model, Parametrized) else model.params
