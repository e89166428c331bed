"""What an author of a family gets wrong first, said before any law is tested.

Shapes alone are looked at, by `jax.eval_shape`, so that it costs nothing.
"""

from collections.abc import Callable
from typing import Any

import jax
from jaxtyping import Array, PyTree

from jaxem._core.blocks import num_observations
from jaxem.emissions._family import AbstractConjugateFamily
from jaxem.models._base import AbstractModel
from jaxem.models._mixture import Mixture


def check_slips(model: AbstractModel, data: PyTree[Array]) -> None:
    """Raises `ValueError` for a family whose methods return what they should not."""
    for part in jax.tree.leaves(model, is_leaf=_is_family):
        if _is_family(part):
            _check_family(part)
    if isinstance(model, Mixture) and _is_family(model.components):
        family, n = model.components, num_observations(data)
        shape = jax.eval_shape(family.log_prob, data, family.tilt()).shape
        if shape != (n, family.num_components):
            raise ValueError(
                f"{_at(family, 'log_prob')} returns {shape}; expected (n, k), "
                f"{(n, family.num_components)}, summed over the features."
            )


def _is_family(node: Any) -> bool:
    return isinstance(node, AbstractConjugateFamily)


def _check_family(family: AbstractConjugateFamily) -> None:
    sums = _shapes(family, "canonical", family.canonical)
    if type(sums) is tuple or "count" not in vars(type(sums)):
        raise ValueError(
            f"{_at(family, 'canonical')} returns {_described(sums)}; expected a NamedTuple with "
            "the fields of the sums, one of them called count."
        )
    own = _described(sums)
    _same(family, "expected", own, _shapes(family, "expected", family.expected, own=own))
    moved = _shapes(family, "reframe", family.reframe, sums, family, own=own)
    _same(family, "reframe", own, moved)
    new = _shapes(family, "maximize", family.maximize, sums, own=own)
    leaves = {parameter.leaf: family.leaf(name) for name, parameter in family.parameters.items()}
    named = ", ".join(f"{name} {_described(leaf)}" for name, leaf in leaves.items())
    if not (isinstance(new, dict) and new.keys() <= leaves.keys()):
        got = list(new) if isinstance(new, dict) else _described(new)
        raise ValueError(
            f"{_at(family, 'maximize')} returns {got}; expected a dict of leaves by field: {named}."
        )
    for name, leaf in new.items():
        _same(family, f"maximize, {name},", _described(leaves[name]), leaf)


def _shapes(
    family: Any, method: str, function: Callable[..., Any], *given: Any, own: str = ""
) -> Any:
    """The shapes of what a method returns."""
    try:
        return jax.eval_shape(function, *given)
    except AttributeError as error:
        advice = f" Sums have the structure of canonical(), {own}." if own else ""
        raise ValueError(f"{_at(family, method)}: {error}.{advice}") from error


def _same(family: Any, method: str, expected: str, got: Any) -> None:
    if _described(got) != expected:
        raise ValueError(
            f"{_at(family, method)} returns {_described(got)}; expected {expected}, as "
            f"{'canonical() has' if 'maximize' not in method else 'the leaf is'}."
        )


def _at(family: Any, method: str) -> str:
    return f"{type(family).__name__}.{method}"


def _described(value: Any) -> str:
    """The type of sums, with the shape of each field; the shape of an array."""
    fields = vars(type(value)).get("_fields")
    if fields is not None:
        each = (f"{name} {_described(own)}" for name, own in zip(fields, value, strict=True))
        return f"{type(value).__name__}({', '.join(each)})"
    is_array = isinstance(value, jax.Array | jax.ShapeDtypeStruct)
    return str(value.shape) if is_array else type(value).__name__
