"""Freezing: which parameters the M-step leaves alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from jaxem._core.checks import name_of
from jaxem._core.parameters import (
    Parametrized,
    inline,
    leading_size,
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
    - `mask`: one boolean per component, to freeze only some of them. Default: all.

    **Raises:** `ValueError` for a name that is not a parameter, or a mask that does
    not have one entry per component.

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
        mask = tuple(bool(entry) for entry in np.asarray(mask).reshape(-1))
        size = leading_size(module, last)
        shared = module.parameters[last].is_shared(module)
        if len(mask) != size or shared:
            raise ValueError(
                f"freeze: the mask for {name!r} has {len(mask)} entries; expected one for each "
                "component or state, and what is shared takes no mask."
            )
    others = tuple(entry for entry in module.frozen if entry[0] != last)
    return replace(module, frozen=others if release else tuple(sorted((*others, (last, mask)))))
