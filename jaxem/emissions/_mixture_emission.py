"""Components that are mixtures themselves: p(x | z = k) = Σⱼ ωₖⱼ p(x | z = k, part j).

E-step: log p = logsumexp over the parts of log ωₖⱼ + log p(x | k, j). Its derivative makes the
responsibilities of the parts by itself, so that the sums are those of all k·m parts, each within
its component. M-step: ωₖⱼ ← nₖⱼ / Σⱼ nₖⱼ, and that of the parts.

As the emission of an HMM this is the GMM-HMM of speech. Juang, Levinson & Sondhi (1986), IEEE
Trans. Information Theory 32.
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_shape
from jaxem._core.constraints import simplex
from jaxem._core.numerics import as_float, pseudo_count
from jaxem._core.parameters import Frozen, free, replace, update
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractEmission, AbstractNested, Emission, build
from jaxem.factors._simplex import check_simplex, log_shares


class MixtureEmission(AbstractNested, Generic[Emission]):
    """Components that are mixtures of m parts of any family.

    **Arguments:** `weights` (k, m), rows in the simplex; `components`, an emission with k·m
    components: those of the first component's parts, then those of the second's, and so on. As a
    `family`, `functools.partial(MixtureEmission, family=Gaussian, num_parts=m)`. Parameters of the
    parts are frozen by paths such as `"components.components.mean"`, with masks over all k·m.

    Parts that are alike stay so: start from `init`, not from responsibilities.

    **Raises:** `ValueError` if the weights are not probabilities or not one for each part.
    """

    parameters: ClassVar = {"weights": simplex("logits", "k m")}
    logits: Float[Array, "k m"]
    components: Emission
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, weights: ArrayLike, components: Emission):
        weights = as_float(weights)
        check_shape("weights", weights, ("k", "m"))
        check_simplex("weights", weights)
        if components.num_components != weights.size:
            raise ValueError(
                f"weights of shape {weights.shape} need {weights.size} parts, one behind the "
                f"other; components has {components.num_components}."
            )
        self.logits = la.floored_log(weights)
        self.components = components
        self.frozen = ()

    @property
    def weights(self) -> Float[Array, "k m"]:
        """Shares of the parts within each component."""
        return jax.nn.softmax(self.logits, axis=1)

    @property
    def num_components(self) -> int:
        return self.logits.shape[0]

    @property
    def num_free_parameters(self) -> int:
        shares = int(np.sum(free(self, "weights"))) * (self.logits.shape[1] - 1)
        return shares + self.components.num_free_parameters

    def check(self, x: PyTree[Array]) -> None:
        self.components.check(x)

    def in_support(self, x: PyTree[Array]) -> Bool[Array, " n"]:
        return self.components.in_support(x)

    def inner(self):
        return (self.components,)

    def with_inner(self, parts):
        return replace(self, components=parts[0])

    def tilt(self) -> tuple[Array, PyTree[Array]]:
        return jnp.zeros_like(self.logits), self.components.tilt()

    def log_prob(self, x: PyTree[Array], tilt: Any) -> Float[Array, "n k"]:
        counts, parts = tilt
        log_weights = jax.nn.log_softmax(self.logits, axis=1) + counts
        joint = self.components.log_prob(x, parts).T.reshape(*log_weights.shape, -1)
        joint = log_weights[:, :, None] + joint
        top = lax.stop_gradient(jnp.max(joint, axis=1, keepdims=True))
        possible = jnp.isfinite(top)  # else no part is, whose derivative would be NaN
        total = jnp.sum(jnp.exp(joint - jnp.where(possible, top, 0)), axis=1)
        log_total = jnp.log(jnp.where(possible[:, 0], total, 1))
        return (top[:, 0] + log_total).T

    def reframe(self, sums: Any, old: Self) -> tuple[Array, PyTree[Array]]:
        counts, parts = sums
        return counts, self.components.reframe(parts, old.components)

    def m_step(self, sums: Any) -> Self:
        counts, parts = sums
        new = update(self, logits=log_shares(counts, self.logits))
        return replace(new, components=self.components.m_step(parts))

    def expected_log_prob(self, sums: Any) -> Float[Array, ""]:
        """Q with the parts among what is latent, a lower bound of Σ r log p(x | z = k)."""
        counts, parts = sums
        own = jnp.sum(counts * jax.nn.log_softmax(self.logits, axis=1))
        return own + self.components.expected_log_prob(parts)

    def prior(self, weights: ArrayLike = 0.0, components: Framed | None = None) -> Framed:
        """Dirichlet priors of the weights and a prior of the parts; flat by default.

        **Arguments:** `weights`, pseudo-observations of each component: a number, spread evenly
        over its parts, or an array that broadcasts to (k, m), those of each part (one less than
        the concentration of a Dirichlet); `components`, from `self.components.prior(…)`.

        **Raises:** `ValueError` for a negative count.
        """
        weights = jnp.asarray(weights, self.logits.dtype)
        each = weights / self.logits.shape[1] if weights.ndim == 0 else weights
        counts = pseudo_count("weights", each, self.logits)
        own = self.components.prior() if components is None else components
        return Framed((counts, own.sums), replace(self, components=own.frame))

    def sample(self, key: Array, z: Int[Array, " n"]) -> PyTree[Array]:
        part_key, x_key = jax.random.split(key)
        part = jax.random.categorical(part_key, self.logits[z])
        return self.components.sample(x_key, z * self.logits.shape[1] + part)

    def degenerate(self, sums: Any) -> Bool[Array, " k"]:
        """Components any part of which is."""
        flags = self.components.degenerate(sums[1])
        return jnp.any(flags.reshape(self.logits.shape), axis=1)

    @classmethod
    def pooled(cls, x, num_components, sample_weight, family: Any = None, num_parts: int = 2):
        if family is None:
            raise ValueError(
                "MixtureEmission needs the family of its parts: pass "
                "functools.partial(MixtureEmission, family=Gaussian, num_parts=3), say."
            )
        part, keywords = build(family)
        parts = part.pooled(x, num_components * num_parts, sample_weight, **keywords)
        logits = jnp.full((num_components, num_parts), -np.log(num_parts), sample_weight.dtype)
        return cls(jnp.exp(logits), parts)

    def located_at(self, x: PyTree[Array], spread: Float[Array, ""]) -> Self:
        """The first part of each component at its observation, the others on the way to another.

        With one observation they are on the way to self. Starts give each part an observation of
        its own (`of`).
        """
        k, m = jax.tree.leaves(x)[0].shape[0], self.logits.shape[1]
        observation, part = np.repeat(np.arange(k), m), np.tile(np.arange(m), k)

        def take(rows: np.ndarray) -> PyTree[Array]:
            return jax.tree.map(lambda leaf: leaf[rows], x)

        near = self.components.located_at(take(observation), spread)
        away = jax.tree.map(lambda leaf: leaf[:m], self.components)
        if k > 1:
            other = (observation + 1 + np.maximum(part - 1, 0) % (k - 1)) % k
            away = self.components.located_at(take(other), spread)

        def between(a: Array, b: Array) -> Array:
            share = (0.5 * part / m).astype(a.dtype)
            alike = a.shape[0] != k * m  # what the parts share
            return a if alike else a + share.reshape(-1, *(1,) * (a.ndim - 1)) * (b - a)

        logits = jnp.broadcast_to(self.logits[:1], (k, m))
        return replace(self, logits=logits, components=jax.tree.map(between, near, away))

    def of(self, parts: AbstractEmission) -> Self:
        """Components of these parts, in the order of the constructor, with equal shares."""
        m = self.logits.shape[1]
        logits = jnp.full((parts.num_components // m, m), -np.log(m), self.logits.dtype)
        return replace(self, logits=logits, components=parts)
