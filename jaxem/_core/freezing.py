"""Freezing: which parameters the M-step leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np

from jaxem._core.checks import name_of
from jaxem._core.parameters import (
    Parametrized,
    inline,
    named_parameters,
    parameter_names,
    replace,
)

_T = TypeVar("_T")


def freeze(model: _T, *names: str, mask: Sequence[bool] | np.ndarray | None = None) -> _T:
    """Keep parameters at their present values in every later M-step.

    The M-step then gives the *constrained* maximum: a covariance is taken about the mean that
    is frozen, and free weights share what frozen ones leave.

    **Arguments:**

    - `names`: paths to parameters, such as `"weights"`, `"components.mean"` or
      `"components.parts.0.rate"`, or to a part, such as `"components"`, for all that it has.
    - `mask`: one boolean per component, to freeze only some of them. Default: all. For
      coefficients, intercepts and diagonal variances of a `LinearRegression`, a mask of their own
      shape freezes single elements; where there is one component its axis may be left out.

    **Raises:** `ValueError` for a name that is not a parameter, a mask of another shape, or
    elements that cannot be frozen apart.

    ```python
    model = jaxem.freeze(model, "components.variance")
    ```
    """
    _check_arguments("freeze", model, names)
    for name in _each(model, names):
        model = _changed(model, name.split("."), name, mask)
    return model


def unfreeze(model: _T, *names: str) -> _T:
    """Let parameters move again; the inverse of `freeze`."""
    _check_arguments("unfreeze", model, names)
    for name in _each(model, names):
        model = _changed(model, name.split("."), name, None, release=True)
    return model


def _each(model: Any, names: tuple[str, ...]) -> list[str]:
    """The names, with those of its parameters in place of a part's."""
    known = parameter_names(model)
    return [
        path
        for name in names
        for path in [own for own in known if own.startswith(f"{name}.")] or [name]
    ]


def _check_arguments(who: str, model: Any, names: tuple[Any, ...]) -> None:
    if isinstance(model, type) or not isinstance(model, Parametrized):
        raise ValueError(f"{who} takes a model, then names of parameters; got {model!r}.")
    wrong = [name for name in names if not isinstance(name, str)]
    if wrong:
        raise ValueError(
            f'{who} takes names one by one, as in {who}(model, "weights", "components.mean"); got '
            f"{wrong[0]!r}."
        )


def _changed(module: Any, path: list[str], name: str, mask: Any, release: bool = False) -> Any:
    if len(path) > 1:
        here, rest = path[0], path[1:]
        if isinstance(module, tuple) and here.isdigit() and int(here) < len(module):
            i = int(here)
            changed = _changed(module[i], rest, name, mask, release)
            return (*module[:i], changed, *module[i + 1 :])
        inner = named_parameters(module) if isinstance(module, Parametrized) else {}
        if not isinstance(inner.get(here), dict):
            raise ValueError(f"freeze: {name!r} leads nowhere: no {here!r} in {name_of(module)}.")
        return replace(module, **{here: _changed(getattr(module, here), rest, name, mask, release)})
    (last,) = path
    parametrized = isinstance(module, Parametrized)
    behind = inline(module).get(last) if parametrized else None
    if behind is not None:
        if not behind.parameters:
            raise ValueError(
                f"freeze: {name!r} is {name_of(behind).lower()}: it follows from other parameters, "
                "and those are what can be frozen."
            )
        (only,) = behind.parameters
        return replace(module, **{f"_{last}": _changed(behind, [only], name, mask, release)})
    if not parametrized or last not in module.parameters:
        raise ValueError(
            f"freeze: {name!r} is not a parameter; {name_of(module)} has "
            f"{parameter_names(module) if parametrized else []}."
        )
    if mask is not None:
        mask = _checked(module, last, name, np.asarray(mask).astype(bool))
    others = tuple(entry for entry in module.frozen if entry[0] != last)
    kept = others if release else sorted((*others, (last, mask)), key=lambda entry: entry[0])
    return replace(module, frozen=tuple(kept))


def _checked(module: Any, last: str, name: str, mask: np.ndarray) -> Any:
    """A mask over components, or over elements of the leaf, as tuples; None if all is frozen."""
    parameter = module.parameters[last]
    leaf = jax.tree.leaves(getattr(module, parameter.leaf))[0]
    expected = "one for each component or state"
    if parameter.elements is not None:
        expected += f", or the shape {leaf.shape} of single elements"
        if mask.shape == leaf.shape[1:] and leaf.shape[0] == 1:
            mask = mask[None]
        if mask.shape == leaf.shape:
            if refusal := parameter.elements(module, mask):
                raise ValueError(f"freeze: elements of {name!r} {refusal}")
            return None if mask.all() else _tuples(mask)
    mask = mask.reshape(-1)
    if len(mask) != leaf.shape[0] or parameter.is_shared(module):
        raise ValueError(
            f"freeze: the mask for {name!r} has {len(mask)} entries; expected {expected}, and what "
            "is shared takes no mask."
        )
    return _tuples(mask)


def _tuples(mask: np.ndarray) -> Any:
    return bool(mask) if mask.ndim == 0 else tuple(map(_tuples, mask))
