"""Factor analysis and probabilistic principal components; the algorithm is in `_factor_base.py`."""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.axis_scales import AxisScale, axis_scale, pooled_axis_scale
from jaxem._core.blocks import num_observations, substitute, weighted_mean
from jaxem._core.checks import (
    check_options,
    check_sample_weight,
    check_values,
    checked_key,
    is_integer,
    or_absent,
)
from jaxem._core.constraints import Parameter, leaves_of, real
from jaxem._core.conversion import as_arrays
from jaxem._core.leading_axes import leading_axes
from jaxem._core.numerics import least_log_scale
from jaxem._core.parameters import Frozen, build, replace
from jaxem._core.scales import MIN_SPREAD, ScaleParameter
from jaxem.emissions._base import AbstractStarting
from jaxem.emissions._factor_base import AbstractFactorModel, inverse_of_positive

# Of a start: the least share of a feature's variance that is unique, of an axis that is loaded.
_LEAST_UNIQUE, _LEAST_LOADED = 0.05, 0.01

# What a prior counts apart from the noise.
_COUNTED = ("scale_count", "inputs", "cross", "square", "prior_inputs", "prior_cross")


class Scores(NamedTuple):
    """Factors of observations under each component: `mean` (n, k, q), `covariance` (k, q, q)."""

    mean: Float[Array, "n k q"]
    covariance: Float[Array, "k q q"]


class AbstractFactorAnalysis(AbstractFactorModel, AbstractStarting):
    """Factor analysers with noise variances of one shape: starts, and what users ask of them."""

    @property
    def uniqueness(self) -> Float[Array, "k d"]:
        """The variance of each feature that no factor explains, as a share of all of it."""
        noise = jnp.exp(2 * self.structure.cells(self.mean))
        return noise / (noise + jnp.sum(self.loadings**2, axis=2))

    @property
    def covariance(self) -> Float[Array, "k d d"]:
        """Λ Λᵀ + Ψ."""
        noise = jnp.exp(2 * self.structure.cells(self.mean))
        eye = jnp.eye(noise.shape[1], dtype=noise.dtype)
        return la.matmul(self.loadings, la.transpose(self.loadings)) + noise[:, :, None] * eye

    def scores(self, x: Float[Array, "n d"], method: str = "regression") -> Scores:
        """The factors of observations, and their covariance.

        **Arguments:** `method`: "regression", the posterior E[z | x] and Cov[z | x] (Thomson), or
        "bartlett", the unbiased estimates by weighted least squares.

        **Raises:** `ValueError` for another method, or data of another shape.
        """
        if method not in ("regression", "bartlett"):
            raise ValueError(f'method must be "regression" or "bartlett", got {method!r}.')
        self.check(x)
        whitened, precision, _ = self._precision()
        if method == "bartlett":
            precision = precision - jnp.eye(self.num_factors, dtype=precision.dtype)
        covariance = inverse_of_positive(precision)
        residual = self._whitened(x)
        mean = la.matmul(covariance, la.matmul(la.transpose(whitened), residual))
        return Scores(jnp.moveaxis(mean, 2, 0), covariance)

    @classmethod
    def init(
        cls,
        key: Array,
        x: Float[Array, "n d"],
        *,
        sample_weight: Float[Array, " n"] | None = None,
        **options: Any,
    ) -> Self:
        """A start of one component: the leading axes of the data, about one observation.

        **Arguments:** `options`, as of a family: `num_factors`, 1 by default; `min_spread`.

        **Raises:** `ValueError` for another option, or data that are not finite.
        """
        key, x, sample_weight = checked_key(key), as_arrays(x), as_arrays(sample_weight)
        n = num_observations(x)
        check_sample_weight(sample_weight, n)
        weight = jnp.ones(n) if sample_weight is None else sample_weight
        weight = weight.astype(x.dtype)
        whole = cls.pooled(substitute(x, weight > 0), 1, weight, **options)
        check_values(
            or_absent(whole.in_support(x), sample_weight),
            f"the data hold a NaN or an infinity, outside the support of {cls.__name__}; give such "
            "observations weight 0, or remove them.",
        )
        chosen = x[jax.random.categorical(key, jnp.log(weight))]
        return whole.located_at(chosen[None], jnp.ones((), x.dtype))

    @classmethod
    def pooled(cls, x, num_components, sample_weight, **options):
        """The leading axes of all data, in the units of each feature, and what they leave."""
        cls.support.check(x, {}, x.dtype, cls.__name__)
        spherical = cls.parameters["noise_variance"].pooled.keywords["spherical"]
        check_options(cls.__name__, options, {"num_factors", "tied", "min_spread"})
        num_factors = check_num_factors(options.pop("num_factors", 1), x.shape[1])
        mean = weighted_mean(x, sample_weight)
        whole = pooled_axis_scale(x, mean, sample_weight, spherical=spherical, **options)
        unit = jnp.exp(whole.log_scale)
        values, axes, total = leading_axes((x - mean) / unit, sample_weight, num_factors)
        noise = (total - jnp.sum(values)) / (x.shape[1] - num_factors)
        loadings = axes * jnp.sqrt(jnp.maximum(values - noise, _LEAST_LOADED * values))
        unique = jnp.maximum(1 - jnp.sum(loadings**2, axis=1), _LEAST_UNIQUE)
        unique = jnp.maximum(noise, _LEAST_UNIQUE)[None] if spherical else unique
        log_scale = jnp.maximum(whole.log_scale + 0.5 * jnp.log(unique), least_log_scale(x))
        one = build(
            cls,
            mean=mean[None],
            loadings=(unit.T * loadings)[None],
            structure=replace(whole, log_scale=log_scale),
            frozen=(),
        )
        means = jnp.broadcast_to(one.mean, (num_components, x.shape[1]))
        return one.located_at(means, jnp.ones((), x.dtype))

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        one = self.repeated(len(x), spread)
        return replace(one, mean=x, loadings=jnp.sqrt(spread) * one.loadings)


def check_num_factors(num_factors: Any, num_features: int) -> int:
    """Raises `ValueError` unless there is a factor, and fewer than features."""
    if not is_integer(num_factors) or not 1 <= num_factors < num_features:
        raise ValueError(
            f"num_factors must be at least 1 and less than the number of features, "
            f"{num_features}; got {num_factors!r}."
        )
    return int(num_factors)


def _loadings() -> Parameter:
    """Loadings, of which a rotation is not determined."""
    free = real("loadings", "k d q", counted=_COUNTED)
    constraint = free.constraint._replace(lost=lambda shape: shape[1] * (shape[1] - 1) // 2)
    return dataclasses.replace(free, constraint=constraint)


def _noise(spherical: bool) -> ScaleParameter:
    start = functools.partial(pooled_axis_scale, spherical=spherical)
    return ScaleParameter("structure", start, ("prior_scale_count", "prior_square"))


class FactorAnalysis(AbstractFactorAnalysis):
    """Factor analysers: x = μ + Λ z + ε, with noise of its own in each feature.

    By itself a factor analysis, in a `Mixture` a mixture of factor analysers. As a `family`,
    `functools.partial(FactorAnalysis, num_factors=2, tied=True)` shares the noise.

    **Arguments:** `mean` (k, d); `loadings` (k, d, q), q < d; `noise_variance` (k, d), or (d,)
    shared by all components; `min_spread`: a component in which less than this fraction of the
    variance of a feature is noise (a Heywood case), or of the average variance is left, is
    degenerate.

    **Raises:** `ValueError` for other shapes, or variances that are not positive.

    ```python
    start = FactorAnalysis.init(jax.random.key(0), x, num_factors=2)
    fitted = jaxem.fit(start, x).model
    fitted.uniqueness, fitted.scores(x).mean
    ```
    """

    parameters: ClassVar = {
        "mean": real("mean", "k d", role="location"),
        "loadings": _loadings(),
        "noise_variance": _noise(spherical=False),
    }
    mean: Float[Array, "k d"]
    loadings: Float[Array, "k d q"]
    structure: AxisScale
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self,
        mean: ArrayLike,
        loadings: ArrayLike,
        noise_variance: ArrayLike,
        *,
        min_spread: float = MIN_SPREAD,
    ):
        leaves = leaves_of(self.parameters, mean=mean, loadings=loadings)
        self.mean, self.loadings, self.frozen = leaves["mean"], leaves["loadings"], ()
        check_num_factors(self.loadings.shape[2], self.mean.shape[1])
        self.structure = axis_scale(
            "noise_variance", noise_variance, self.mean, spherical=False, min_spread=min_spread
        )


class PPCA(AbstractFactorAnalysis):
    """Probabilistic principal components: x = μ + Λ z + ε, with equal noise in all features.

    The maximum of one component by itself has a closed form: the leading eigenvectors of the
    covariance, with the mean of the other eigenvalues as noise.

    **Arguments:** `mean` (k, d); `loadings` (k, d, q), q < d; `noise_variance` (k,), or () shared
    by all components; `min_spread`, as for `FactorAnalysis`.

    **Raises:** `ValueError` for other shapes, or variances that are not positive.

    Tipping & Bishop (1999), Neural Computation 11 (mixtures), and JRSS B 61.
    """

    parameters: ClassVar = {
        "mean": real("mean", "k d", role="location"),
        "loadings": _loadings(),
        "noise_variance": _noise(spherical=True),
    }
    mean: Float[Array, "k d"]
    loadings: Float[Array, "k d q"]
    structure: AxisScale
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self,
        mean: ArrayLike,
        loadings: ArrayLike,
        noise_variance: ArrayLike,
        *,
        min_spread: float = MIN_SPREAD,
    ):
        leaves = leaves_of(self.parameters, mean=mean, loadings=loadings)
        self.mean, self.loadings, self.frozen = leaves["mean"], leaves["loadings"], ()
        check_num_factors(self.loadings.shape[2], self.mean.shape[1])
        self.structure = axis_scale(
            "noise_variance", noise_variance, self.mean, spherical=True, min_spread=min_spread
        )
