"""What regressions of outputs on inputs share: data, predictions, draws and starts."""

import abc
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core import linalg as la
from jaxem._core.checks import check_continuous, num_features
from jaxem._core.constraints import real
from jaxem._core.inputs import InputFrame
from jaxem._core.numerics import finite
from jaxem._core.parameters import free, replace
from jaxem._core.supports import Support, positives
from jaxem.emissions._base import AbstractEmission, sums_of

COEFFICIENTS = real("coefficients", "k d p")
INTERCEPT = real("intercept", "k d")
_EXPOSURES = positives("n d")


class AbstractRegression(AbstractEmission):
    """Regressions of outputs on inputs u, in η = W u + b, one for each component.

    Data are a tuple (u, y) of inputs (n, p) and outputs (n, d), of the declared kind `outputs`;
    with `has_exposures` perhaps (u, y, e), whose log is added to η.
    """

    outputs: eqx.AbstractClassVar[Support]
    has_exposures: eqx.AbstractClassVar[bool]
    pooled_steps: eqx.AbstractClassVar[int]
    coefficients: eqx.AbstractVar[Float[Array, "k d p"]]
    intercept: eqx.AbstractVar[Float[Array, "k d"]]
    inputs: eqx.AbstractVar[InputFrame]

    @classmethod
    @abc.abstractmethod
    def mean_of(cls, eta: Array) -> Array:
        """The mean of an output at η."""

    @abc.abstractmethod
    def draw(self, key: Array, mean: Float[Array, "n d"], z: Int[Array, " n"]) -> Array:
        """Outputs with these means, of component z each."""

    @classmethod
    @abc.abstractmethod
    def level(cls, x: Any, sample_weight: Float[Array, " n"], **options: Any) -> Self:
        """One component at the mean of the outputs, without coefficients."""

    @abc.abstractmethod
    def shift_to(self, x: Any) -> Float[Array, "n d"]:
        """What takes the first component's intercept towards each observation."""

    @abc.abstractmethod
    def repeated(self, num_components: int, spread: Array) -> Self:
        """The first component, for each of so many, with variances multiplied by `spread`."""

    @property
    def num_components(self) -> int:
        return self.intercept.shape[0]

    @property
    def num_free_parameters(self) -> int:
        return sum(
            parameter.num_free_parameters(getattr(self, parameter.leaf), free(self, name))
            for name, parameter in self.parameters.items()
        )

    def num_fitted(self) -> Any:
        """How many coefficients of each output are free, the intercept among them, (k,)."""
        of_inputs = self.coefficients.shape[2] * free(self, "coefficients")
        return of_inputs + free(self, "intercept")

    def check(self, x: Any) -> None:
        _, d, p = self.coefficients.shape
        _check(type(self), x, p, d, self.intercept.dtype)

    def in_support(self, x: Any) -> Bool[Array, " n"]:
        u, y, *exposure = x
        flags = [finite(u), self.outputs.contains(y, {})]
        flags += [_EXPOSURES.contains(e, {}) for e in exposure]
        return jnp.all(jnp.stack(flags), axis=0)

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
        return jnp.moveaxis(self.mean_of(self.eta(self.centred(), (u, None))), 2, 0)

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
        u, y, *_ = inputs_and_outputs(x, cls.__name__, cls.has_exposures)
        _check(cls, x, num_features(u), num_features(y), sample_weight.dtype)

        def again(_: Any, one: Self) -> Self:
            return one.m_step(sums_of(one, x, sample_weight[:, None]))

        one = lax.fori_loop(0, cls.pooled_steps, again, cls.level(x, sample_weight, **options))
        return one.repeated(num_components, jnp.ones((), sample_weight.dtype))

    def located_at(self, x: PyTree[Array], spread: Float[Array, ""]) -> Self:
        """The regression, shifted towards each observation."""
        each = self.repeated(x[1].shape[0], spread)
        return replace(each, intercept=each.intercept + self.shift_to(x))


def repeat_coefficients(regression: AbstractRegression, num_components: int) -> dict[str, Any]:
    """The first component's coefficients, intercept and frame of inputs, for each of so many."""
    own = {name: getattr(regression, name) for name in ("coefficients", "intercept", "inputs")}
    return jax.tree.map(
        lambda leaf: jnp.broadcast_to(leaf[:1], (num_components, *leaf.shape[1:])), own
    )


def inputs_and_outputs(x: Any, who: str, has_exposures: bool = False) -> tuple[Any, ...]:
    """`x` if it is a tuple of inputs, outputs and perhaps exposures. Raises `ValueError` if not."""
    if not isinstance(x, tuple) or not 2 <= len(x) <= 2 + has_exposures:
        given = f"a tuple of {len(x)}" if isinstance(x, tuple) else type(x).__name__
        exposures = " and perhaps exposures (n, d)" if has_exposures else ""
        raise ValueError(
            f"{who} expects a tuple of inputs (n, p) and outputs (n, d){exposures}; got {given}."
        )
    return x


def _check(
    family: type[AbstractRegression], x: Any, num_inputs: int, num_outputs: int, dtype: Any
) -> None:
    who = family.__name__
    u, y, *exposure = inputs_and_outputs(x, who, family.has_exposures)
    check_continuous(u, num_inputs, dtype, f"{who} (inputs)")
    family.outputs.check(y, {"d": num_outputs}, dtype, f"{who} (outputs)")
    if exposure:
        check_continuous(exposure[0], num_outputs, dtype, f"{who} (exposures)")
