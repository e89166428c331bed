"""What families with a mean and a covariance structure share: starts and degeneracy."""

import abc
from typing import Any, ClassVar, Self

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core.blocks import weighted_mean
from jaxem._core.parameters import replace
from jaxem._core.scales import AbstractScale, Moments
from jaxem._core.supports import reals
from jaxem.emissions._family import AbstractFamily


class AbstractLocationScale(AbstractFamily):
    """Families of points around a mean, with a scale; `scale_name` is what users call that."""

    support: ClassVar = reals("n d")
    scale_name: eqx.AbstractClassVar[str]
    mean: eqx.AbstractVar[Float[Array, "k d"]]
    structure: eqx.AbstractVar[AbstractScale]

    @abc.abstractmethod
    def moments(self, sums: PyTree[Array]) -> Moments:
        """The whitened moments, of data and prior, that mean and scale are maximised by."""

    @classmethod
    @abc.abstractmethod
    def around(cls, x: Array, mean: Array, sample_weight: Array, **options: Any) -> Self:
        """One component with this mean, (d,), and the covariance of the data about it."""

    def degenerate(self, sums: PyTree[Array]) -> Bool[Array, " k"]:
        moments = self.moments(sums)
        thin = self.structure.degenerate(moments, self.mean, self.free("mean"))
        flags = (thin & self.free(self.scale_name)) | (moments.mean_count < 1)
        others = {n: p for n, p in self.parameters.items() if p.collapsed}
        if others:
            new = self.m_step(sums)
            for name, parameter in others.items():
                flags = flags | (parameter.has_collapsed(new.leaf(name)) & self.free(name))
        return flags

    @classmethod
    def pooled(cls, x, num_components, sample_weight, **options):
        cls.support.check(x, {}, x.dtype, cls.__name__)
        one = cls.around(x, weighted_mean(x, sample_weight), sample_weight, **options)
        means = jnp.broadcast_to(one.mean, (num_components, x.shape[1]))
        return one.located_at(means, jnp.ones((), x.dtype))

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        k, fixed = x.shape[0], ("mean", self.scale_name)
        others = {
            p.leaf: p.scaled(self.leaf(n), spread, k)
            for n, p in self.parameters.items()
            if n not in fixed
        }
        return replace(self, mean=x, structure=self.structure.scaled(spread, k), **others)
