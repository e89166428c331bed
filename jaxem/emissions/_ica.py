"""Independent component analysis; the algorithm is in `_ica_base.py`."""

import functools
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.blocks import weighted_mean, weighted_second_moments
from jaxem._core.checks import check_count, check_options, check_values, checked_key, or_absent
from jaxem._core.constraints import leaves_of
from jaxem._core.conversion import as_arrays
from jaxem._core.parameters import Frozen, build, replace
from jaxem._core.scales import MIN_SPREAD
from jaxem.emissions._base import AbstractStarting
from jaxem.emissions._family import settled
from jaxem.emissions._ica_base import AbstractUnmixing
from jaxem.emissions._pooled import compiled, pooled


class ICA(AbstractUnmixing, AbstractStarting):
    """Independent component analysis by maximum likelihood, with sources that are learned.

    As many sources as features, and no noise. Alone it is ICA; in a `Mixture`, several models.

    **Arguments:** `mean` μ (k, d); `unmixing` W (k, d, d), regular; of each source, a mixture of m
    Gaussians: `source_weights` (k, d, m), in the simplex, `source_mean` and `source_variance`
    (k, d, m). `min_spread`, default 1e-3: a part of less than this share of its source's variance
    is degenerate.

    A source is found up to its sign and order, which `standardized` settles; its mean and variance
    stay as they were given, and W and μ are in their units.

    **Raises:** `ValueError` for other shapes or values.

    ```python
    start = ICA.init(jax.random.key(0), x, num_parts=3)
    model = jaxem.fit(start, x).model.standardized()
    y, mixing = model.sources(x), model.mixing
    ```
    """

    mean: Float[Array, "k d"]
    unmixing: Float[Array, "k d d"]
    log_weights: Float[Array, "k d m"]
    source_mean: Float[Array, "k d m"]
    log_variance: Float[Array, "k d m"]
    min_spread: float = eqx.field(static=True)
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self,
        mean: ArrayLike,
        unmixing: ArrayLike,
        source_weights: ArrayLike,
        source_mean: ArrayLike,
        source_variance: ArrayLike,
        *,
        min_spread: float = MIN_SPREAD,
    ):
        given = leaves_of(
            self.parameters,
            mean=mean,
            unmixing=unmixing,
            source_weights=source_weights,
            source_mean=source_mean,
            source_variance=source_variance,
        )
        self.mean, self.unmixing = given["mean"], given["unmixing"]
        self.log_weights = given["log_weights"]
        self.source_mean, self.log_variance = given["source_mean"], given["log_variance"]
        log_det = la.inverse_and_log_det(self.unmixing)[1]
        check_values(jnp.isfinite(log_det), "unmixing must be regular.")
        self.min_spread, self.frozen = min_spread, ()

    @property
    def mixing(self) -> Float[Array, "k d d"]:
        """A, the inverse of W: its columns are what a unit of each source adds to x."""
        return la.inverse_and_log_det(self.unmixing)[0]

    def sources(self, x: Float[Array, "n d"]) -> Float[Array, "n k d"]:
        """The sources of observations under each component, W (x − μ)."""
        x = as_arrays(x)
        self.check(x)
        return jnp.moveaxis(self._sources(x), 2, 0)

    def standardized(self) -> Self:
        """The same law, with sources of mean 0 and variance 1, in order and with signs.

        Sources whose kurtosis is farthest from a Gaussian's come first; a skew one has its long
        tail above.
        """
        mean, variance = self._laws().moments()
        skewness, kurtosis = self._shape()
        order = jnp.argsort(-jnp.abs(kurtosis), axis=1)[:, :, None]
        scale = (jnp.where(skewness < 0, -1, 1) / jnp.sqrt(variance))[:, :, None]

        def ordered(leaf: Array) -> Array:
            return jnp.take_along_axis(leaf, order, axis=1)

        return replace(
            self,
            unmixing=ordered(scale * self.unmixing),
            log_weights=ordered(self.log_weights),
            source_mean=ordered(scale * (self.source_mean - mean[:, :, None])),
            log_variance=ordered(self.log_variance + 2 * jnp.log(jnp.abs(scale))),
            mean=self.mean + la.apply(self.mixing, mean),
        )

    def _shape(self) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
        """Skewness and excess kurtosis of the sources."""
        mean, variance = self._laws().moments()
        apart, v = self.source_mean - mean[:, :, None], self.source_variance
        third = jnp.sum(self.source_weights * (apart**3 + 3 * apart * v), axis=2)
        fourth = jnp.sum(self.source_weights * (apart**4 + 6 * apart**2 * v + 3 * v**2), axis=2)
        return third / variance**1.5, fourth / variance**2 - 3

    # Starts

    @classmethod
    def init(
        cls,
        key: Array,
        x: Float[Array, "n d"],
        *,
        sample_weight: Float[Array, " n"] | None = None,
        **options: Any,
    ) -> Self:
        """A start of one component: white data, turned at random.

        **Arguments:** `options`, as of a family: `num_parts` of each source, 3 by default;
        `min_spread`.

        **Raises:** `ValueError` for another option, data that are not finite, or such as span
        fewer dimensions than they have features.
        """
        x, sample_weight = as_arrays(x), as_arrays(sample_weight)
        family = settled(functools.partial(cls, **options), x)
        start = compiled(_turned, family, family, checked_key(key), x, sample_weight)
        check_values(
            jnp.isfinite(start.unmixing),
            "ICA: the data span fewer dimensions than they have features (a constant column, or "
            "one that follows from others); leave features out, or project them first.",
        )
        return start

    @classmethod
    def pooled(cls, x, num_components, sample_weight, num_parts: int = 3, **options):
        """White data, and parts of each source side by side."""
        cls.support.check(x, {}, x.dtype, cls.__name__)
        check_options(cls.__name__, options, {"min_spread"})
        check_count("num_parts", num_parts)
        d, mean = x.shape[1], weighted_mean(x, sample_weight)
        unit, second = weighted_second_moments(x, mean, sample_weight)
        white = la.inverse_of_lower(la.cholesky(second)) / unit
        place = np.linspace(-0.8, 0.8, num_parts) if num_parts > 1 else np.zeros(1)
        places = jnp.broadcast_to(jnp.asarray(place, x.dtype), (1, d, num_parts))
        one = build(
            cls,
            mean=mean[None],
            unmixing=white[None],
            log_weights=jnp.full_like(places, -np.log(num_parts)),
            source_mean=places,
            log_variance=jnp.full_like(places, np.log(1 - np.mean(place**2))),
            min_spread=options.get("min_spread", MIN_SPREAD),
            frozen=(),
        )
        means = jnp.broadcast_to(mean, (num_components, d))
        return one.located_at(means, jnp.ones((), x.dtype))

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        one = self.repeated(len(x), spread)
        return replace(one, mean=x, unmixing=one.unmixing / jnp.sqrt(spread))


def _turned(
    family: Any, key: Array, x: Array, sample_weight: Array | None
) -> tuple[ICA, Bool[Array, " n"]]:
    whole: Any = pooled(x, 1, family, sample_weight)
    d = x.shape[1]
    turn = jax.random.orthogonal(key, d, dtype=x.dtype)
    possible = or_absent(whole.in_support(x), sample_weight)
    return replace(whole, unmixing=la.matmul(turn, whole.unmixing)), possible
