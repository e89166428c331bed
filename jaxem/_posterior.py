"""The expectation slot: which posterior of the latent the E-step uses.

For a finite latent the variant of EM *is* the marginaliser of the log-joint: with
log p(x) = M(log p(x, z=1), …, log p(x, z=K)) the responsibilities are the gradient of M.
logsumexp gives EM, the maximum gives hard (classification) EM.
"""

import abc
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxem import chain
from jaxem._statistics import Framed


class AbstractExpectation(eqx.Module):
    """The E-step of an algorithm.

    `ascends` says whether, with full data and a maximising M-step, its objective never falls;
    `deterministic`, whether statistics and objective are functions of model and data alone.
    """

    ascends: eqx.AbstractVar[bool]
    deterministic: eqx.AbstractVar[bool]

    @abc.abstractmethod
    def __call__(
        self, model: Any, data: PyTree[Array], weights: Any, step: Int[Array, ""], key: Any
    ) -> tuple[Framed, Float[Array, ""]]:
        """Statistics of the data about `model`, and the objective they belong to."""


class AbstractPosterior(AbstractExpectation):
    """An expectation given by a posterior over a finite latent."""

    @abc.abstractmethod
    def marginalize(
        self, log_joint: Float[Array, "n k"], key: Any
    ) -> tuple[Float[Array, " n"], Float[Array, "n k"]]:
        """Log-probability and responsibilities of each unit from log p(x, z)."""

    @abc.abstractmethod
    def marginalize_chain(
        self,
        initial: Float[Array, " k"],
        transition: Array,
        log_prob: Float[Array, "t k"],
        length: Int[Array, ""] | None,
        key: Any,
    ) -> chain.Smoothed:
        """Log-probability and responsibilities of the states of one chain, as in `jaxem.chain`."""


class Exact(AbstractPosterior):
    """The exact posterior p(z | x): expectation–maximisation proper.

    Dempster, Laird & Rubin (1977), JRSS B 39.
    """

    ascends: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def marginalize(self, log_joint, key=None):
        # Components lead inside: reductions then run along units, which vectorises.
        log_joint = log_joint.T
        top = jax.lax.stop_gradient(jnp.max(log_joint, axis=0))
        top = jnp.where(jnp.isfinite(top), top, 0)
        scaled = jnp.exp(log_joint - top)
        total = jnp.sum(scaled, axis=0)
        return top + jnp.log(total), (scaled / total).T

    def marginalize_chain(self, initial, transition, log_prob, length, key):
        return chain.smoothing(initial, transition, log_prob)


class Hard(AbstractPosterior):
    """All mass on the most probable latent, the first one among equals.

    Classification EM (Celeux & Govaert 1992) and, on spheres of one held scale, Lloyd's
    k-means. The objective is the classification log-likelihood Σᵢ maxₖ log p(xᵢ, z=k).
    """

    ascends: ClassVar[bool] = True
    deterministic: ClassVar[bool] = True

    def __call__(self, model, data, weights, step, key):
        return model.e_step(data, weights, posterior=self, key=key)

    def marginalize(self, log_joint, key=None):
        log_joint = log_joint.T
        first = jnp.argmax(log_joint, axis=0)
        components = jnp.arange(log_joint.shape[0], dtype=first.dtype)[:, None]
        return jnp.max(log_joint, axis=0), (components == first).astype(log_joint.dtype).T

    def marginalize_chain(self, initial, transition, log_prob, length, key):
        paths, value = chain.viterbi(initial, transition, log_prob, length=length)
        return chain.along(paths[0], value[0], transition)
