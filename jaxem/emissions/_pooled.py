"""Components that are each the fit of one to all the data, and one compiled program for a start."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, PyTree

from jaxem._core.blocks import num_observations, substitute
from jaxem._core.checks import check_sample_weight, check_values
from jaxem._core.compilation import filter_jit
from jaxem.emissions._base import AbstractStarting, build


def compiled(make: Callable[..., tuple[Any, Array]], family: Any, *args: Any) -> Any:
    """The model that `make` returns beside which observations are possible, by one program.

    **Raises:** `ValueError` if an observation that counts is known to be impossible.
    """
    model, possible = _compiled(make, args)
    check_values(
        possible,
        "the data hold a NaN, an infinity or a value outside the support of "
        f"{build(family)[0].__name__}; give such observations weight 0, or remove them.",
    )
    return model


@filter_jit(optimized=False)
def _compiled(make: Callable[..., tuple[Any, Array]], args: Any) -> tuple[Any, Array]:
    model, possible = make(*args)
    return model, jnp.all(possible)


def pooled(
    data: PyTree[Array], num_components: int, family: Any, sample_weight: Float[Array, " n"] | None
) -> AbstractStarting:
    """`num_components` components that are each the fit of one to all the data.

    Integer data of continuous families are refused by the emission's own check.
    """
    n = num_observations(data)
    check_sample_weight(sample_weight, n)
    cls, keywords = build(family)
    if sample_weight is None:
        sample_weight = ones(n, floating(data))
    else:
        if not jnp.issubdtype(sample_weight.dtype, jnp.floating):
            sample_weight = sample_weight.astype(floating(data))
        data = substitute(data, sample_weight > 0)
    components = cls.pooled(data, num_components, sample_weight, **keywords)
    components.check(data)
    return components


def ones(n: int, dtype: Any) -> Float[Array, " n"]:
    """Equal weights, of which the compiler does not know that they are constant: it adds slowly."""
    return lax.optimization_barrier(jnp.ones(n, dtype))


def floating(data: PyTree[Array]) -> Any:
    """The dtype of the floating data, or JAX's default where there are none."""
    dtypes = [leaf.dtype for leaf in jax.tree.leaves(data)]
    dtypes = [dtype for dtype in dtypes if jnp.issubdtype(dtype, jnp.floating)]
    return jnp.result_type(*dtypes) if dtypes else jnp.result_type(float)
