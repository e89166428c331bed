"""Readable accounts of models: parameters, not leaves."""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import equinox as eqx
import jax
import numpy as np
from jax.core import Tracer

from jaxem._core.parameters import Parametrized, inline, named_parameters, replace

_MOST = 24  # numbers that are worth reading; larger arrays show their shape


def describe(module: Any) -> str:
    """`Mixture(weights=[0.36 0.64], components=Gaussian(…))`, one parameter a line."""
    if isinstance(module, Parametrized):
        return _module(module, _in_order(module), "")
    params = jax.tree.map(lambda leaf: _Shown(numbers(leaf, 0)), module.params)
    return eqx.tree_pformat(replace(module, params=params))


@eqx.filter_jit  # one program for all parameters
def _in_order(module: Any) -> OrderedDict[str, Any]:
    """Parameters by name; a dictionary would lose its order where it leaves a program."""

    def ordered(named: dict[str, Any]) -> OrderedDict[str, Any]:
        pairs = named.items()
        return OrderedDict((k, ordered(v) if isinstance(v, dict) else v) for k, v in pairs)

    return ordered(named_parameters(module))


class _Shown:
    """What is printed as a text without quotes."""

    def __init__(self, text: str):
        self.text = text

    def __repr__(self) -> str:
        return self.text


def _module(module: Any, parameters: dict[str, Any], indent: str) -> str:
    comments = {name: _frozen(mask) for name, mask in module.frozen}
    for name, factor in inline(module).items():
        for _, mask in factor.frozen:
            comments[name] = _frozen(mask)
        if not factor.parameters:
            comments[name] = f"  # {type(factor).__name__.lower()}"
    inner = indent + "  "
    lines = []
    for name, value in parameters.items():
        comment = ""
        if isinstance(value, dict):
            child = getattr(module, name)
            if isinstance(child, tuple):
                parts = (_module(part, value[str(i)], inner + "  ") for i, part in enumerate(child))
                body = "(" + "".join(f"\n{inner}  {part}," for part in parts) + f"\n{inner})"
            else:
                body = _module(child, value, inner)
        else:
            body = numbers(value, len(inner) + len(name) + 1)
            comment = comments.get(name, "")
        comma = "," if len(lines) + 1 < len(parameters) else ""
        lines.append(f"{inner}{name}={body}{comma}{comment}\n")
    body = "\n" + "".join(lines) + indent if lines else ""
    return f"{type(module).__name__}({body})"


def _frozen(mask: tuple[Any, ...] | None) -> str:
    if mask is None:
        return "  # frozen"
    flags = np.asarray(mask).astype(int)
    if flags.size > _MOST:
        return f"  # frozen in {flags.sum()} of {flags.size}"
    return f"  # frozen where {flags.tolist()}"


def numbers(value: Any, column: int) -> str:
    """The numbers of an array that is written from this column on, or its shape."""
    if not eqx.is_array(value):
        return f"{type(value).__name__}[]"
    if isinstance(value, Tracer) or value.size > _MOST:
        return f"{value.dtype}[{','.join(str(size) for size in value.shape)}]"
    settings: dict[str, Any] = {"precision": 5, "prefix": " " * column}
    text = np.array2string(np.asarray(value), **settings)
    if "e" in text:  # one tiny number would put all of them in exponents
        settings["formatter"] = {"float_kind": "{:.5g}".format}
        text = np.array2string(np.asarray(value), **settings)
    return text
