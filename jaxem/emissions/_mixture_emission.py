"""Components that are mixtures themselves: p(x | z = k) = Σⱼ ωₖⱼ p(x | z = k, part j).

E-step: log p = logsumexp over the parts of log ωₖⱼ + log p(x | k, j). Its derivative makes the
responsibilities of the parts by itself, so that the sums are those of all k·m parts, each within
its component. M-step: ωₖⱼ ← nₖⱼ / Σⱼ nₖⱼ, and that of the parts.

As the emission of an HMM this is the GMM-HMM of speech. Juang, Levinson & Sondhi (1986), IEEE
Trans. Information Theory 32.
"""

from __future__ import annotations

from typing import Any, Generic, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem._core.constraints import simplex
from jaxem._core.numerics import as_float, pseudo_count
from jaxem._core.parameters import build as construct
from jaxem._core.parameters import replace
from jaxem._core.statistics import Framed
from jaxem.emissions._base import AbstractNested, AbstractStarting, Emission, build
from jaxem.emissions._categorical import Categorical, CategoryCounts

_WEIGHTS = simplex("logits", "k m")


class MixtureEmission(AbstractNested, AbstractStarting, Generic[Emission]):
    """Components that are mixtures of m parts of any family.

    **Arguments:** `weights` (k, m), rows in the simplex; `components`, an emission with k·m
    components: those of the first component's parts, then those of the second's, and so on. As a
    `family`, `functools.partial(MixtureEmission, family=Gaussian, num_parts=m)`. Parameters of the
    parts are frozen by paths such as `"components.components.mean"`, with masks over all k·m.

    Parts that are alike stay so: start from `init`, not from responsibilities.

    **Raises:** `ValueError` if the weights are not probabilities or not one for each part.
    """

    _weights: Categorical  # of one feature, the part
    components: Emission

    def __init__(self, weights: ArrayLike, components: Emission):
        weights = as_float(weights, "weights")
        logits = _WEIGHTS.checked("weights", weights, {})
        if components.num_components != weights.size:
            raise ValueError(
                f"weights of shape {weights.shape} need {weights.size} parts, one behind the "
                f"other; components has {components.num_components}."
            )
        self._weights = construct(Categorical, logits=logits[:, None], frozen=())
        self.components = components

    @property
    def weights(self) -> Float[Array, "k m"]:
        """Shares of the parts within each component."""
        return self._weights.probability[:, 0]

    @property
    def num_components(self) -> int:
        return self._weights.num_components

    def check(self, x: PyTree[Array]) -> None:
        self.components.check(x)

    def in_support(self, x: PyTree[Array]) -> Bool[Array, " n"]:
        return self.components.in_support(x)

    def log_prob(self, x: PyTree[Array], tilt: Any) -> Float[Array, "n k"]:
        counts, parts = tilt
        log_weights = (self._weights.canonical().counts + counts.counts)[:, 0]
        joint = self.components.log_prob(x, parts).T.reshape(*log_weights.shape, -1)
        joint = log_weights[:, :, None] + joint
        top = lax.stop_gradient(jnp.max(joint, axis=1, keepdims=True))
        possible = jnp.isfinite(top)  # else no part is, whose derivative would be NaN
        total = jnp.sum(jnp.exp(joint - jnp.where(possible, top, 0)), axis=1)
        log_total = jnp.log(jnp.where(possible[:, 0], total, 1))
        return (top[:, 0] + log_total).T

    def prior(self, weights: ArrayLike = 0.0, components: Framed | None = None) -> Framed:
        """Dirichlet priors of the weights and a prior of the parts; flat by default.

        **Arguments:** `weights`, pseudo-observations of each component: a number, spread evenly
        over its parts, or an array that broadcasts to (k, m), those of each part (one less than
        the concentration of a Dirichlet); `components`, from `self.components.prior(…)`.

        **Raises:** `ValueError` for a negative count.
        """
        like = self.weights
        weights = jnp.asarray(weights, like.dtype)
        each = weights / like.shape[1] if weights.ndim == 0 else weights
        counts = CategoryCounts(pseudo_count("weights", each, like)[:, None])
        own = self.components.prior() if components is None else components
        return Framed((counts, own.sums), replace(self, components=own.frame))

    def sample(self, key: Array, z: Int[Array, " n"]) -> PyTree[Array]:
        part_key, x_key = jax.random.split(key)
        part = self._weights.sample(part_key, z)[:, 0]
        return self.components.sample(x_key, z * self._weights.logits.shape[2] + part)

    @classmethod
    def pooled(cls, x, num_components, sample_weight, family: Any = None, num_parts: int = 2):
        if family is None:
            raise ValueError(
                "MixtureEmission needs the family of its parts: pass "
                "functools.partial(MixtureEmission, family=Gaussian, num_parts=3), say."
            )
        part, keywords = build(family)
        parts = part.pooled(x, num_components * num_parts, sample_weight, **keywords)
        return cls(jnp.full((num_components, num_parts), 1 / num_parts, sample_weight.dtype), parts)

    def located_at(self, x: PyTree[Array], spread: Float[Array, ""]) -> Self:
        """The first part of each component at its observation, the others on the way to another.

        With one observation they are on the way to self. Starts of a mixture give each part an
        observation of its own.
        """
        k, m = jax.tree.leaves(x)[0].shape[0], self._weights.logits.shape[2]
        components: Any = self.components
        observation, part = np.repeat(np.arange(k), m), np.tile(np.arange(m), k)

        def take(rows: np.ndarray) -> PyTree[Array]:
            return jax.tree.map(lambda leaf: leaf[rows], x)

        near = components.located_at(take(observation), spread)
        away = jax.tree.map(lambda leaf: leaf[:m], self.components)
        if k > 1:
            other = (observation + 1 + np.maximum(part - 1, 0) % (k - 1)) % k
            away = components.located_at(take(other), spread)

        def between(a: Array, b: Array) -> Array:
            share = (0.5 * part / m).astype(a.dtype)
            alike = a.shape[0] != k * m  # what the parts share
            return a if alike else a + share.reshape(-1, *(1,) * (a.ndim - 1)) * (b - a)

        weights = self._weights.repeated(k, spread)
        return replace(self, _weights=weights, components=jax.tree.map(between, near, away))
