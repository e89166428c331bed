"""What families with a mean and a covariance structure share: starts and degeneracy."""

from typing import ClassVar, Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxem._core.blocks import weighted_mean
from jaxem._core.causes import caused, either
from jaxem._core.checks import check_options
from jaxem._core.parameters import build, replace
from jaxem._core.scales import AbstractScale
from jaxem._core.supports import reals
from jaxem.emissions._base import AbstractStarting
from jaxem.emissions._family import AbstractConjugateFamily


class AbstractLocationScale(AbstractConjugateFamily, AbstractStarting):
    """Families of points around a mean, with a scale.

    Of their sums `combined` gives the whitened moments of data and prior. Options of a start are
    those of the scale, and values of the other parameters by name.
    """

    support: ClassVar = reals("n d")
    mean: eqx.AbstractVar[Float[Array, "k d"]]
    structure: eqx.AbstractVar[AbstractScale]

    def degenerate(self, sums: PyTree[Array]) -> Int[Array, " k"]:
        moments = sums.combined
        of_scale = self.structure.degenerate(moments, self.mean, self.free("mean"))
        (name,) = (n for n, p in self.parameters.items() if p.role == "scale")
        few = caused(few_observations=moments.mean_count < 1)
        return either(either(few, of_scale * self.free(name)), self.collapsed(sums))

    @classmethod
    def pooled(cls, x, num_components, sample_weight, **options):
        cls.support.check(x, {}, x.dtype, cls.__name__)
        mean = weighted_mean(x, sample_weight)
        others = {n: p for n, p in cls.parameters.items() if p.role not in ("location", "scale")}
        leaves = {
            p.leaf: p.checked(n, jnp.asarray(options.pop(n, p.reference), x.dtype), {"k": 1})
            for n, p in others.items()
        }
        (scale,) = (p for p in cls.parameters.values() if p.role == "scale")
        check_options(cls.__name__, options, scale.options)
        structure = scale.pooled(x, mean, sample_weight, **options)
        one = build(cls, mean=mean[None], structure=structure, **leaves, frozen=())
        means = jnp.broadcast_to(one.mean, (num_components, x.shape[1]))
        return one.located_at(means, jnp.ones((), x.dtype))

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        return replace(self.repeated(x.shape[0], spread), mean=x)
