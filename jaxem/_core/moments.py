"""Few observations that have the moments of many: all that one Gaussian family sees of data."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core.blocks import num_observations, weighted_mean, weighted_second_moments
from jaxem._core.checks import check_sample_weight, check_shape, check_values
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import as_float


def from_moments(
    num_observations: ArrayLike, covariance: ArrayLike, mean: ArrayLike = 0.0
) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    """2d observations and their weights, with these moments exactly.

    A Gaussian of any covariance structure, a factor analysis or a PPCA of one component has the
    same likelihood, steps and standard errors on them as on the data that the moments are of. It
    has not in a mixture, nor has the sandwich.

    **Arguments:** `num_observations`, how many observations the moments are of; `covariance`
    (d, d), with divisor n (as `numpy.cov(…, bias=True)`), a correlation matrix for example; it may
    be singular; `mean` (d,) or a number.

    **Returns:** `(x, sample_weight)`, as in `jaxem.fit(start, x, sample_weight=sample_weight)`.

    **Raises:** `ValueError` for what is no covariance, or a count that is not positive.

    ```python
    x, weight = from_moments(112, correlations)
    jaxem.fit(FactorAnalysis.init(key, x, num_factors=2), x, sample_weight=weight)
    ```
    """
    covariance = as_float(as_arrays(covariance))
    check_shape("covariance", covariance, ("d", "d"))
    d = covariance.shape[0]
    check_shape("covariance", covariance, (d, d))
    size = jnp.sqrt(jnp.maximum(jnp.diagonal(covariance), 0))
    unit = jnp.where(size > 0, size, 1)
    scaled = covariance / (unit[:, None] * unit)
    eps = float(jnp.finfo(covariance.dtype).eps) ** 0.5
    check_values(jnp.abs(scaled - scaled.T) <= eps, "covariance is not symmetric.")
    values, vectors = jnp.linalg.eigh(0.5 * (scaled + scaled.T))
    check_values(values >= -d * eps, "covariance has negative eigenvalues: it is no covariance.")
    count = jnp.asarray(num_observations, covariance.dtype)
    check_values(count > 0, "num_observations must be positive.")
    # Rows of R with Rᵀ R the covariance
    rows = jnp.sqrt(d * jnp.maximum(values, 0))[:, None] * vectors.T * unit
    mean = jnp.broadcast_to(jnp.asarray(mean, covariance.dtype), (d,))
    return jnp.concatenate([mean + rows, mean - rows]), jnp.full(2 * d, count / (2 * d))


def compressed(
    x: Float[Array, "n d"], sample_weight: Float[Array, " n"] | None = None
) -> tuple[Float[Array, "m d"], Float[Array, " m"]]:
    """The data as they are where n ≤ 2d, else 2d observations with their moments (`from_moments`).

    A fit of one Gaussian, factor analysis or PPCA then takes steps that do not depend on n.
    """
    x, sample_weight = as_arrays(x), as_arrays(sample_weight)
    n = num_observations(x)
    check_sample_weight(sample_weight, n)
    weight = jnp.ones(n, x.dtype) if sample_weight is None else sample_weight.astype(x.dtype)
    if n <= 2 * x.shape[1]:
        return x, weight
    return _compressed(x, weight)


@jax.jit
def _compressed(x: Array, weight: Array) -> tuple[Array, Array]:
    mean = weighted_mean(x, weight)
    unit, second = weighted_second_moments(x, mean, weight)
    rows, weights = from_moments(jnp.sum(weight), second)
    return mean + unit * rows, weights
