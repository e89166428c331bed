"""What the M-step may move and what it must leave alone.

A module with parameters says, in the class variable `natural`, which leaves stand behind each
natural parameter. `freeze` notes the natural parameters that are held in the static field
`held`, as pairs (name, mask over components or None); static, so that structure is never an
array leaf and two models of different structure are different types for JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

Held = tuple[tuple[str, tuple[bool, ...] | None], ...]
_T = TypeVar("_T")


def replace(module: _T, **changes: Any) -> _T:
    """A copy of an Equinox module with some fields changed.

    Unlike `dataclasses.replace` it does not call `__init__`: constructors here take natural
    parameters, while the fields are the unconstrained ones.
    """
    new = object.__new__(type(module))
    for field in dataclasses.fields(module):  # pyright: ignore[reportArgumentType]
        value = changes.pop(field.name) if field.name in changes else getattr(module, field.name)
        object.__setattr__(new, field.name, value)
    if changes:
        raise TypeError(f"{type(module).__name__} has no field {sorted(changes)}.")
    return new


def held_mask(module: Any, name: str) -> bool | np.ndarray:
    """Whether a natural parameter is held: True, False, or a mask over components."""
    for held, mask in module.held:
        if held == name:
            return True if mask is None else np.asarray(mask)
    return False


def update(module: _T, **leaves: jax.Array) -> _T:
    """The module with new leaves, except in what is held, which stays as it is."""
    owner = {leaf: name for name, behind in module.natural.items() for leaf in behind}  # pyright: ignore[reportAttributeAccessIssue]
    return replace(
        module,
        **{
            leaf: _keep(module, owner[leaf], getattr(module, leaf), new)
            for leaf, new in leaves.items()
        },
    )


def _keep(module: Any, name: str, old: jax.Array, new: jax.Array) -> jax.Array:
    mask = held_mask(module, name)
    if mask is False:
        return new
    if mask is True:
        return old
    return jnp.where(np.reshape(mask, (-1,) + (1,) * (old.ndim - 1)), old, new)


def free(module: Any, name: str) -> np.ndarray:
    """Which entries of a natural parameter are free, along its leading axis: a NumPy mask."""
    size = getattr(module, module.natural[name][0]).shape[0]
    return np.broadcast_to(np.logical_not(held_mask(module, name)), (size,))


def with_held(frame: _T, model: _T) -> _T:
    """`frame`, with what is held taken from `model`: equal values, another derivative."""
    for name, mask in getattr(frame, "held", ()):
        for leaf in frame.natural[name]:  # pyright: ignore[reportAttributeAccessIssue]
            own, held = getattr(frame, leaf), getattr(model, leaf)
            if mask is not None:
                held = jnp.where(np.reshape(mask, (-1,) + (1,) * (own.ndim - 1)), held, own)
            frame = replace(frame, **{leaf: held})
    for field, own in _inner(frame):
        other = getattr(model, field)
        if isinstance(own, tuple):
            merged: Any = tuple(with_held(a, b) for a, b in zip(own, other, strict=True))
        else:
            merged = with_held(own, other)
        frame = replace(frame, **{field: merged})
    return frame


def _inner(module: Any) -> Iterator[tuple[str, Any]]:
    """Fields that hold parameters of their own: a module, or a tuple of modules."""
    for field in dataclasses.fields(module):
        value = getattr(module, field.name)
        parts = value if isinstance(value, tuple) else (value,)
        if any(hasattr(part, "natural") for part in parts):
            yield field.name, value


def natural_parameters(module: Any) -> dict[str, Any]:
    """Natural parameters by name, nested as the modules are."""
    named = {name: getattr(module, name) for name in module.natural}
    for field, value in _inner(module):
        if isinstance(value, tuple):
            named[field] = {str(i): natural_parameters(part) for i, part in enumerate(value)}
        else:
            named[field] = natural_parameters(value)
    return named


def natural_names(module: Any) -> list[str]:
    """Paths to all natural parameters, as `freeze` takes them."""

    def paths(tree: dict[str, Any], before: str) -> Iterator[str]:
        for name, value in tree.items():
            here = before + name
            yield from paths(value, here + ".") if isinstance(value, dict) else (here,)

    return list(paths(natural_parameters(module), ""))


def free_numbers(model: _T) -> tuple[jax.Array, Callable[[jax.Array], _T]]:
    """Unconstrained numbers of a model, and the way back, on which all else stays.

    All else is what is held, and leaves behind no natural parameter, such as frames of inputs.
    """
    flat, unravel = ravel_pytree(model)
    ones, zeros = (unravel(jnp.full_like(flat, value)) for value in (1.0, 0.0))
    free, _ = ravel_pytree(with_held(_without_frames(ones), zeros))
    return flat, lambda numbers: unravel(jnp.where(free > 0, numbers, flat))


def _without_frames(module: _T) -> _T:
    """The module with zeros in leaves behind no natural parameter; one without names has none."""
    if isinstance(module, tuple):
        return tuple(map(_without_frames, module))  # pyright: ignore[reportReturnType]
    if not hasattr(module, "natural"):
        return module
    behind = {leaf for leaves in module.natural.values() for leaf in leaves}  # pyright: ignore[reportAttributeAccessIssue]
    changes = {field: _without_frames(value) for field, value in _inner(module)}
    for field in dataclasses.fields(module):  # pyright: ignore[reportArgumentType]
        others = behind | changes.keys()
        if field.name not in others and not field.metadata.get("static", False):
            changes[field.name] = jax.tree.map(jnp.zeros_like, getattr(module, field.name))
    return replace(module, **changes)


def estimates(model: Any) -> Any:
    """What a fit estimates: natural parameters by name, or a model's own `params`."""
    return natural_parameters(model) if hasattr(model, "natural") else model.params


def freeze(model: _T, *names: str, mask: Sequence[bool] | np.ndarray | None = None) -> _T:
    """Hold natural parameters at their present values in every later M-step.

    The M-step then gives the *constrained* maximum: a covariance is taken about the mean that
    is held, and free weights share what held ones leave.

    **Arguments:**

    - `names`: paths to natural parameters, such as `"weights"`, `"components.mean"` or
      `"components.parts.0.rate"`.
    - `mask`: one boolean per component, to hold only some of them. Default: all.

    **Raises:** `ValueError` for a name that is not a natural parameter, or a mask that does
    not have one entry per component.
    """
    for name in names:
        model = _hold(model, name.split("."), name, mask)
    return model


def unfreeze(model: _T, *names: str) -> _T:
    """Let natural parameters move again; the inverse of `freeze`."""
    for name in names:
        model = _hold(model, name.split("."), name, None, release=True)
    return model


def _hold(module: Any, path: list[str], name: str, mask: Any, release: bool = False) -> Any:
    if len(path) > 1:
        here, rest = path[0], path[1:]
        if isinstance(module, tuple) and here.isdigit() and int(here) < len(module):
            i = int(here)
            return (*module[:i], _hold(module[i], rest, name, mask, release), *module[i + 1 :])
        if not hasattr(module, "natural") or not hasattr(module, here):
            raise ValueError(f"freeze: {name!r} leads nowhere: no {here!r} in {_kind(module)}.")
        return replace(module, **{here: _hold(getattr(module, here), rest, name, mask, release)})
    (last,) = path
    natural = getattr(module, "natural", {})
    if last not in natural:
        raise ValueError(
            f"freeze: {name!r} is not a natural parameter; {_kind(module)} has "
            f"{natural_names(module) if natural or hasattr(module, 'held') else []}."
        )
    if mask is not None:
        mask = tuple(bool(entry) for entry in np.asarray(mask).reshape(-1))
        size = getattr(module, natural[last][0]).shape[0]
        states = hasattr(module, "num_states")
        if len(mask) != size or size != (module.num_states if states else module.num_components):
            raise ValueError(
                f"freeze: the mask for {name!r} has {len(mask)} entries; expected one for each "
                f"{'state' if states else 'component'}, and what is shared takes no mask."
            )
    others = tuple(entry for entry in module.held if entry[0] != last)
    return replace(module, held=others if release else tuple(sorted((*others, (last, mask)))))


def _kind(module: Any) -> str:
    return type(module).__name__
