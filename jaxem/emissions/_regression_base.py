"""What regressions of outputs on inputs share: predictions, draws and starts."""

import abc
from collections.abc import Callable
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int, PyTree

from jaxem._core import linalg as la
from jaxem._core.blocks import weighted_mean
from jaxem._core.checks import check_options
from jaxem._core.constraints import real
from jaxem._core.inputs import InputFrame
from jaxem._core.parameters import build, free_elements, replace
from jaxem._core.scales import ScaleParameter
from jaxem._core.supports import Regressed
from jaxem.emissions._base import AbstractStarting, sums_of
from jaxem.emissions._family import AbstractFamily

COEFFICIENTS = real("coefficients", "k d p")
INTERCEPT = real("intercept", "k d")


class Link(NamedTuple):
    """η as a function of the mean of an output."""

    of: Callable[[Array], Array]
    inverse: Callable[[Array], Array]
    share: float  # how far a start goes towards an output: at a bit, say, no logit is finite


class AbstractRegression(AbstractFamily, AbstractStarting):
    """Regressions of outputs on inputs u, in η = W u + b, one for each component.

    Data are a tuple (u, y), perhaps with exposures (u, y, e), whose log is added to η. Options of
    a start are those of the scale, where there is one.
    """

    support: eqx.AbstractClassVar[Regressed]
    link: eqx.AbstractClassVar[Link]
    pooled_steps: eqx.AbstractClassVar[int]
    coefficients: eqx.AbstractVar[Float[Array, "k d p"]]
    intercept: eqx.AbstractVar[Float[Array, "k d"]]
    inputs: eqx.AbstractVar[InputFrame]

    @abc.abstractmethod
    def draw(self, key: Array, mean: Float[Array, "n d"], z: Int[Array, " n"]) -> Array:
        """Outputs with these means, of component z each."""

    def num_fitted(self) -> np.ndarray:
        """How many coefficients of an output are free at most, the intercept among them, (k,)."""
        of_inputs = np.sum(free_elements(self, "coefficients"), axis=2)
        return np.max(of_inputs + free_elements(self, "intercept"), axis=1)

    def centred(self) -> Float[Array, "k d q"]:
        """The coefficients of ṽ."""
        return self.inputs.centred(self.coefficients, self.intercept)

    def eta(self, centred: Float[Array, "k d q"], x: Any) -> Float[Array, "k d n"]:
        """η of each observation, from coefficients of ṽ."""
        u, _, *exposure = x
        eta = la.matmul(centred, self.inputs.standardized(u))
        return eta + jnp.log(exposure[0]).T if exposure else eta

    def predict(self, u: Float[Array, "n p"]) -> Float[Array, "n k d"]:
        """The mean of the outputs under each component, at an exposure of 1."""
        return jnp.moveaxis(self.link.inverse(self.eta(self.centred(), (u, None))), 2, 0)

    def sample(
        self, key: Array, z: Int[Array, " n"], inputs: Float[Array, "n p"] | None = None
    ) -> tuple[Array, Array]:
        """The given `inputs`, and outputs drawn from component z at them, with exposures of 1.

        **Raises:** `ValueError` without inputs: a regression has no distribution of them.
        """
        if inputs is None:
            raise ValueError(
                "a regression has no distribution of its inputs: draw from the emission itself, "
                "emission.sample(key, z, inputs=u), with a component z for each row of u."
            )
        mean = jnp.take_along_axis(self.predict(inputs), z[:, None, None], axis=1)[:, 0]
        return inputs, self.draw(key, mean, z)

    @classmethod
    def pooled(cls, x, num_components, sample_weight, **options):
        """The regression of one component, by steps from the mean of the outputs."""
        cls.support.check(x, {}, sample_weight.dtype, cls.__name__)

        def again(_: Any, one: Self) -> Self:
            return one.m_step(sums_of(one, x, sample_weight[:, None]))

        one = lax.fori_loop(0, cls.pooled_steps, again, cls._level(x, sample_weight, options))
        return one._each(num_components, jnp.ones((), sample_weight.dtype))

    @classmethod
    def _level(cls, x: Any, sample_weight: Float[Array, " n"], options: Any) -> Self:
        """One component at the mean of the outputs; counts get half an observation of ½."""
        (u, y, *exposure), dtype = x, sample_weight.dtype
        mean = level = weighted_mean(y.astype(dtype), sample_weight)
        if not cls.support.continuous:
            n = jnp.sum(sample_weight)
            level = (n * mean + 0.5) / (n + 1)
        offset = jnp.log(weighted_mean(exposure[0], sample_weight)) if exposure else 0
        of_residuals = [p for p in cls.parameters.values() if isinstance(p, ScaleParameter)]
        check_options(cls.__name__, options, set().union(*(p.options for p in of_residuals)))
        scales = {p.leaf: p.pooled(y, mean, sample_weight, **options) for p in of_residuals}
        return build(
            cls,
            coefficients=jnp.zeros((1, y.shape[1], u.shape[1]), dtype),
            intercept=(cls.link.of(level) - offset)[None],
            inputs=InputFrame.pooled(u, sample_weight),
            frozen=(),
            **scales,
        )

    def located_at(self, x: PyTree[Array], spread: Float[Array, ""]) -> Self:
        """The regression, shifted towards each observation."""
        each = self._each(x[1].shape[0], spread)
        eta = self.eta(self.centred(), x)[0].T
        share, y = self.link.share, x[1].astype(eta.dtype)
        target = share * y + (1 - share) * self.link.inverse(eta)
        return replace(each, intercept=each.intercept + self.link.of(target) - eta)

    def _each(self, num_components: int, spread: Float[Array, ""]) -> Self:
        """The first component, for each of so many, with its frame of inputs."""
        inputs = self.inputs.repeated(num_components)
        return replace(self.repeated(num_components, spread), inputs=inputs)
