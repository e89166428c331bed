"""Readable accounts of models: natural parameters, not leaves."""

from __future__ import annotations

from typing import Any

import numpy as np
from jax.core import Tracer

from jaxem._hold import natural_parameters

_MOST = 24  # numbers that are worth reading; larger arrays show their shape


def describe(module: Any) -> str:
    """`Mixture(weights=[0.36 0.64], components=Gaussian(…))`, one natural parameter a line."""
    return _module(module, natural_parameters(module), "")


def _module(module: Any, natural: dict[str, Any], indent: str) -> str:
    held = {name: mask for name, mask in module.held}
    inner = indent + "  "
    lines = []
    for name, value in natural.items():
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
            if name in held:
                mask = held[name]
                comment = "  # held" + ("" if mask is None else f" where {list(map(int, mask))}")
        comma = "," if len(lines) + 1 < len(natural) else ""
        lines.append(f"{inner}{name}={body}{comma}{comment}\n")
    return f"{type(module).__name__}(\n" + "".join(lines) + f"{indent})"


def numbers(value: Any, column: int) -> str:
    """The numbers of an array that is written from this column on, or its shape."""
    if isinstance(value, Tracer) or not hasattr(value, "dtype") or value.size > _MOST:
        shape = ",".join(str(size) for size in getattr(value, "shape", ()))
        return f"{getattr(value, 'dtype', type(value).__name__)}[{shape}]"
    return np.array2string(np.asarray(value), precision=5, prefix=" " * column)
