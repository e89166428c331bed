"""What models share whose latent z is one of K: all is said by log p(x, z = k).

E-step. Expected statistics are Σ r ∂ log p(x, z; θ) / ∂θ, the derivative of the log-joint along the
responsibilities r, block by block of observations. N × K numbers never exist.
"""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxem._core.blocks import (
    map_over_observations,
    num_observations,
    substitute,
    sum_over_observations,
)
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import outside_support
from jaxem._core.parameters import replace
from jaxem.emissions._base import AbstractEmission, cheapest
from jaxem.latents import AbstractPosterior, Finite, infer
from jaxem.models._base import AbstractModel
from jaxem.models._composite import AbstractSeparable


class AbstractJointModel(AbstractModel):
    """A model that says log p(x, z = k) of each observation, and what follows from Bayes' rule."""

    @abc.abstractmethod
    def log_joint(self, data: PyTree[Array]) -> Float[Array, "n k"]:
        """log p(x, z = k) of each observation."""

    def num_observed(self, data: PyTree[Array]) -> Int[Array, " n"]:
        return jnp.ones(num_observations(data), int)

    def serial_steps(self, data: PyTree[Array]) -> int:
        return 1

    def log_prob(self, data: PyTree[Array]) -> Float[Array, " n"]:
        """log p(x) of each observation: −∞ outside the support, NaN where data hold NaN."""
        return self._map(_log_prob, data)

    def responsibilities(self, data: PyTree[Array]) -> Float[Array, "n k"]:
        """P(z = k | x) of each observation; NaN where no component can have produced it."""
        return self._map(_responsibilities, data)

    def predict(self, data: PyTree[Array]) -> Int[Array, " n"]:
        """The most probable z of each observation, the first among equals; −1 if it has none."""
        return self._map(_most_probable, data)

    def _map(self, function: Any, data: PyTree[Array]) -> Any:
        data = as_arrays(data)
        self.check(data)
        return _map_joint(self, function, data)


class AbstractMixture(AbstractJointModel, AbstractSeparable):
    """A model of which component of its last factor, an emission, each observation comes from."""

    @abc.abstractmethod
    def tilted(self, tilt: tuple[Any, ...], data: PyTree[Array]) -> Float[Array, "n k"]:
        """log p(x, z = k) + ⟨tilt, t(x, z)⟩ near tilt = 0, with a tilt for each factor."""

    @property
    def num_components(self) -> int:
        return self._emission().num_components

    def _emission(self) -> AbstractEmission:
        return getattr(self, self.factors[-1])

    def log_joint(self, data: PyTree[Array]) -> Float[Array, "n k"]:
        """log p(x, z = k) of each observation."""
        return self.tilted(self.tilt(), data)

    def expected_sums(self, data, sample_weight, posterior, key):
        """Sums about self and Σ w log p(x), by the cheaper form of the emission if it will do."""

        def total(emission: AbstractEmission) -> Any:
            model, at = replace(self, **{self.factors[-1]: emission}), self.tilt()
            return sums_of_joint(model, model.tilted, at, data, sample_weight, posterior, key)

        return cheapest(self._emission(), total, num_observations(data), self.width(data))


def _log_prob(joint: Float[Array, "n k"]) -> Float[Array, " n"]:
    return Finite(joint).exact()[0]


def _responsibilities(joint: Float[Array, "n k"]) -> Float[Array, "n k"]:
    return Finite(joint).exact()[1]


def _most_probable(joint: Float[Array, "n k"]) -> Int[Array, " n"]:
    return jnp.where(jnp.any(joint > -jnp.inf, axis=1), jnp.argmax(joint, axis=1), -1)


@eqx.filter_jit  # so that an eager call compiles once
def _map_joint(model: AbstractJointModel, function: Any, data: PyTree[Array]) -> Any:
    def block(x: PyTree[Array]) -> Any:
        possible = model.in_support(x)
        joint = model.log_joint(substitute(x, possible))
        outside = outside_support(x, joint)
        return function(jnp.where(possible[:, None], joint, outside[:, None]))

    return map_over_observations(block, data, width=model.width(data))


def sums_of_joint(
    model: AbstractJointModel,
    log_joint: Callable[[PyTree[Array], PyTree[Array]], Float[Array, "n k"]],
    at: PyTree[Array],
    data: PyTree[Array],
    sample_weight: Float[Array, " n"] | None,
    posterior: AbstractPosterior,
    key: Array | None,
) -> tuple[PyTree[Array], Float[Array, ""]]:
    """Cotangents Σ w r ∂ log_joint(at, x) of `at`, and Σ w log p(x)."""

    def block(x: Any, w: Any, block_key: Any) -> tuple[PyTree[Array], Array]:
        if sample_weight is not None:
            x = substitute(x, (w != 0) | model.in_support(x))
        joint, pullback = jax.vjp(lambda at: log_joint(at, x), at)
        log_prob, r = infer(Finite(joint), posterior, block_key)
        if w is not None:
            w = w.astype(joint.dtype)
            r = w[:, None] * r
            log_prob = w * jnp.where((w != 0) | jnp.isfinite(log_prob), log_prob, 0)
        return pullback(r.astype(joint.dtype))[0], jnp.sum(log_prob)

    width = model.width(data)
    return sum_over_observations(block, data, sample_weight, width=width, key=key)
