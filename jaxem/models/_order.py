"""The components of a model in another order, and that which is closest to another model's."""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core.checks import check_shape, check_values
from jaxem._core.parameters import replace, with_rows
from jaxem.emissions._base import AbstractEmission, AbstractNested
from jaxem.emissions._labels import Labels
from jaxem.factors._transition import AbstractTransition
from jaxem.models._alone import Alone
from jaxem.models._composite import AbstractComposite

_Model = TypeVar("_Model", bound=AbstractComposite)


def reorder(model: _Model, order: ArrayLike) -> _Model:
    """The same model with its components or states in another order.

    Component i of the result is component `order[i]` of the model: its weight, its parameters in
    the emission, rows and columns of the transitions, its duration, masks of what is frozen.

        fitted = reorder(fitted, jnp.argsort(fitted.components.mean[:, 0]))

    **Arguments:** `model`, made of factors, such as a `Mixture` or an `HMM`; `order` (k,), a
    permutation of 0 … k − 1. It may be traced if the model has no masks and no structural zeros.

    **Raises:** `ValueError` for a model without components, for `Labels`, which name them, or for
    an order that is no permutation.
    """
    if not isinstance(model, AbstractComposite) or isinstance(model, Alone):
        raise ValueError(f"reorder takes a model with components, got {type(model).__name__}.")
    size = _emission(model).num_components
    order = np.asarray(order) if not isinstance(order, jax.Array) else order
    if not jnp.issubdtype(order.dtype, jnp.integer):
        raise ValueError(f"order must hold integers, got {order.dtype}.")
    order = jnp.asarray(order)
    check_shape("order", order, (size,))
    check_values(
        jnp.sort(order) == jnp.arange(size), f"order must be a permutation of 0 … {size - 1}."
    )
    factors = {name: reordered(getattr(model, name), order) for name in model.factors}
    return replace(model, **factors)


def align(model: _Model, reference: Any, data: PyTree[Array]) -> _Model:
    """The model with its components in the order in which they are closest to a reference's.

    Closest are the components that the same observations belong to: the order maximises
    Σ r r′, of responsibilities under the two models, by the Hungarian method.

    **Arguments:** `model`, `reference`, with as many components; `data` that both take. Not under
    `jit`.

    **Raises:** `ValueError` for models of different numbers of components.
    """
    from scipy.optimize import linear_sum_assignment  # takes a fifth of the time of `import jaxem`

    models: tuple[Any, Any] = model, reference
    own, others = (_flat(each.responsibilities(data)) for each in models)
    if own.shape != others.shape:
        raise ValueError(
            f"align takes models of as many components, got {own.shape[1]} and {others.shape[1]}."
        )
    shared = jnp.matmul(others.T, own, precision=jax.lax.Precision.HIGHEST)
    _, order = linear_sum_assignment(np.asarray(shared), maximize=True)
    return reorder(model, order)


def _emission(model: AbstractComposite) -> AbstractEmission:
    return getattr(model, model.factors[-1])


def _flat(responsibilities: Array) -> Array:
    flat = responsibilities.reshape(-1, responsibilities.shape[-1])
    return jnp.where(jnp.isfinite(flat), flat, 0)


def reordered(factor: Any, order: Int[Array, " k"]) -> Any:
    """A factor with its components in another order."""
    if isinstance(factor, AbstractTransition):
        return factor.reordered(order)
    if isinstance(factor, Labels):
        raise ValueError("labels name the components: a model with Labels has one order.")
    if isinstance(factor, AbstractNested):
        return factor.with_inner(_part(part, order) for part in factor.inner())
    return with_rows(factor, order)


def _part(part: AbstractEmission, order: Int[Array, " k"]) -> Any:
    """A part of an emission, with one component or several for each of the emission's."""
    each = part.num_components // len(order)
    return reordered(part, (order[:, None] * each + jnp.arange(each)).reshape(-1))
