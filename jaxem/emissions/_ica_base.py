"""Independent components: x = c + A s, where sources sⱼ are independent mixtures of m Gaussians.

With y = W (x − c), W = A⁻¹, and the laws fⱼ of the sources,

    log p(x) = log|det W| + Σⱼ log fⱼ(yⱼ),    fⱼ(y) = Σₘ πⱼₘ N(y; μⱼₘ, σ²ⱼₘ).

E-step. Sums of the sources are those of their parts, (1, e, e²) with e = (y − μⱼₘ)/σⱼₘ. Of W
they are a quadratic in the relative step δ, y′ = y + δ ỹ with ỹ = (1, y): with ψⱼ = d log fⱼ/dy
and its slope

    gᵢⱼ = Σ r ψᵢ ỹⱼ,    Hᵢⱼ = −Σ r ψᵢ′ ỹⱼ²,

of each row, without products of different ỹ, whose mean is 0 where sources are independent. The log
of the determinant is kept as it is.

M-step. That of the sources, which also finds their scales; and for each pair of rows the Newton
step

    Hᵢⱼ δᵢⱼ + n δⱼᵢ = gᵢⱼ,    Hⱼᵢ δⱼᵢ + n δᵢⱼ = gⱼᵢ,    W ← (I + δ) W.

Hᵢⱼ is at least what a Gaussian source of that variance has, n vⱼ/vᵢ, which an independent source
exceeds; so steps ascend where they are short, and are halved where they are not. Steps are
relative: fits of A x + b are those of x.

Pham & Garat (1997), IEEE Trans. Signal Processing 45; Palmer, Kreutz-Delgado & Makeig (2012),
AMICA; Ablin, Cardoso & Gramfort (2018), IEEE Trans. Signal Processing 66 (Picard).
"""

from typing import ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.causes import caused
from jaxem._core.constraints import positive, real, simplex
from jaxem._core.numerics import divide, pseudo_count
from jaxem._core.parameters import update
from jaxem._core.quadratic import AbstractLocal, Blocks, LocalQuadratic, linear_tilt, shortened
from jaxem._core.scales import HALF_LOG_2PI
from jaxem._core.statistics import Framed
from jaxem._core.supports import reals
from jaxem.emissions._base import AbstractWide
from jaxem.emissions._family import AbstractFamily

_EXCESS = 1.1  # curvature of a row, over that of a Gaussian source
_LONGEST = 0.5  # root mean square of a row's relative step


class PartSums(NamedTuple):
    """Sums over the parts of each source, whitened by them."""

    count: Float[Array, "k d m"]
    first: Float[Array, "k d m"]
    second: Float[Array, "k d m"]


class UnmixingSums(NamedTuple):
    unmixing: LocalQuadratic  # in δ, without the determinant: score (k, d, q), curvature in rows
    sources: PartSums


class AbstractUnmixing(AbstractFamily, AbstractWide, AbstractLocal):
    """Independent sources behind a regular matrix: the E-step and the M-step."""

    has_curvature: ClassVar = True
    support: ClassVar = reals("n d")
    parameters: ClassVar = {
        "unmixing": real("unmixing", "k d d"),
        "source_weights": simplex("log_weights", "k d m"),
        "source_mean": real("source_mean", "k d m"),
        "source_variance": positive("log_variance", "k d m"),
    }
    unmixing: eqx.AbstractVar[Float[Array, "k d d"]]
    log_weights: eqx.AbstractVar[Float[Array, "k d m"]]
    source_mean: eqx.AbstractVar[Float[Array, "k d m"]]
    log_variance: eqx.AbstractVar[Float[Array, "k d m"]]
    origin: eqx.AbstractVar[Float[Array, "k d"]]
    min_spread: eqx.AbstractVar[float]

    @property
    def num_densities(self) -> int:
        k, _, m = self.log_weights.shape
        return k * m

    @property
    def source_weights(self) -> Float[Array, "k d m"]:
        return jax.nn.softmax(self.log_weights, axis=2)

    @property
    def source_variance(self) -> Float[Array, "k d m"]:
        return jnp.exp(self.log_variance)

    def _sources(self, x: Float[Array, "n d"]) -> Float[Array, "k d n"]:
        return la.matmul(self.unmixing, x.T - self.origin[:, :, None])

    def _moments(self) -> tuple[Float[Array, "k d"], Float[Array, "k d"]]:
        """Mean and variance of the sources."""
        weights, mean = self.source_weights, jnp.sum(self.source_weights * self.source_mean, axis=2)
        apart = self.source_mean - mean[:, :, None]
        return mean, jnp.sum(weights * (self.source_variance + apart**2), axis=2)

    def log_prob(self, x: Float[Array, "n d"], tilt: UnmixingSums) -> Float[Array, "n k"]:
        quadratic, parts = tilt
        y = self._sources(x)
        inputs = jnp.pad(y, ((0, 0), (1, 0), (0, 0)), constant_values=1)
        y = y + linear_tilt(quadratic.score, inputs)
        inverse = jnp.exp(-0.5 * self.log_variance)[..., None]
        gap = inverse * (y[:, :, None] - self.source_mean[..., None])
        log_norm = self._log_norm() + parts.count
        linear, square = parts.first[..., None], parts.second[..., None] - 0.5
        joint = log_norm[..., None] + gap * (linear + gap * square)
        log_source = jax.nn.logsumexp(joint, axis=2)
        share = jnp.exp(joint - log_source[:, :, None])
        score = jnp.sum(share * inverse * gap, axis=2)
        bend = jnp.sum(share * inverse**2 * (1 - gap**2), axis=2) + score**2
        rows = jnp.diagonal(quadratic.curvature.matrix, axis1=2, axis2=3)
        tilted = bend * linear_tilt(rows, inputs**2)
        constant = la.inverse_and_log_det(self.unmixing)[1] + quadratic.count
        return (la.repeat(constant, len(x)) + jnp.sum(log_source + tilted, axis=1)).T

    def _log_norm(self) -> Float[Array, "k d m"]:
        return jax.nn.log_softmax(self.log_weights) - 0.5 * self.log_variance - HALF_LOG_2PI

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        part_key, key = jax.random.split(key)
        part = jax.random.categorical(part_key, self.log_weights[z])[..., None]
        mean, variance = (
            jnp.take_along_axis(leaf[z], part, axis=2)[..., 0]
            for leaf in (self.source_mean, self.source_variance)
        )
        s = mean + jnp.sqrt(variance) * jax.random.normal(key, mean.shape, mean.dtype)
        return self.origin[z] + la.apply(la.inverse_and_log_det(self.unmixing)[0][z], s)

    # EM

    def canonical(self) -> UnmixingSums:
        k, d, _ = self.unmixing.shape
        zeros = jnp.zeros((k, d, 1 + d, 1 + d), self.unmixing.dtype)
        log_det = la.inverse_and_log_det(self.unmixing)[1]
        quadratic = LocalQuadratic(
            jnp.ones((), zeros.dtype), log_det, zeros[:, :, 0], Blocks(zeros)
        )
        none = jnp.zeros_like(self.log_variance)
        return UnmixingSums(quadratic, PartSums(self._log_norm(), none, none - 0.5))

    def reframe(self, sums: UnmixingSums, old: Self) -> UnmixingSums:
        step = la.matmul(self.unmixing - old.unmixing, la.inverse_and_log_det(old.unmixing)[0])
        shift = la.apply(self.unmixing, old.origin - self.origin)
        step = jnp.concatenate([shift[:, :, None], step], axis=2)
        turn = jnp.eye(step.shape[2], dtype=step.dtype) + jnp.pad(step, ((0, 0), (1, 0), (0, 0)))
        quadratic = sums.unmixing.moved(step).turned(turn[:, None])
        count, first, second = sums.sources
        ratio = jnp.exp(0.5 * (old.log_variance - self.log_variance))
        move = (old.source_mean - self.source_mean) * jnp.exp(-0.5 * self.log_variance)
        turned = ratio * first
        second = ratio**2 * second + move * (2 * turned + move * count)
        return UnmixingSums(quadratic, PartSums(count, turned + move * count, second))

    def m_step(self, sums: UnmixingSums) -> Self:
        count, first, second = sums.sources
        seen, scale = count > 0, jnp.exp(0.5 * self.log_variance)
        move = divide(first, count) * self.free("source_mean")[:, None, None]
        spread = divide(second, count) + move * (move - 2 * divide(first, count))
        log_variance = self.log_variance + la.floored_log(jnp.where(seen, spread, 1))
        whole = jnp.sum(count, axis=2, keepdims=True)
        log_weights = jnp.where(whole > 0, la.floored_log(divide(count, whole)), self.log_weights)
        step = self._step(sums.unmixing)
        return update(
            self,
            unmixing=self.unmixing + la.matmul(step, self.unmixing),
            log_weights=log_weights,
            source_mean=self.source_mean + scale * move,
            log_variance=self.parameters["source_variance"].within(log_variance),
        )

    def _step(self, quadratic: LocalQuadratic) -> Float[Array, "k d d"]:
        """δ; on its diagonal only where variances of sources are frozen."""
        n = quadratic.count[:, None, None]
        score = quadratic.score[:, :, 1:]
        bend = jnp.diagonal(quadratic.curvature.matrix, axis1=2, axis2=3)[:, :, 1:]
        variance = self._moments()[1]
        gaussian = n * variance[:, None, :] / variance[:, :, None]
        bend = jnp.maximum(bend, _EXCESS * gaussian)
        other = la.transpose(bend)
        step = divide(other * score - n * la.transpose(score), bend * other - n**2)
        scales = divide(score + n, bend + n) * ~self.free("source_variance")[:, None, None]
        step = jnp.where(np.eye(step.shape[1], dtype=bool), scales, step)
        reach = jnp.mean(jnp.sum(step**2 * gaussian, axis=2), axis=1)[:, None, None]
        return shortened(step, reach, _LONGEST**2 * n)

    def prior(self, count: ArrayLike = 0.0, **law: ArrayLike) -> Framed:
        """As if `count` values of each source, of the law given, had been seen; W has none.

        It keeps parts from narrowing without end, as those of a source with few values do.

        **Arguments:** `count` ≥ 0, one or (k,); `source_weights`, `source_mean`,
        `source_variance`, the present ones by default.

        **Raises:** `ValueError` for a negative count, or values that are no such parameter.
        """
        own = self.with_parameters(**law)
        each = pseudo_count("count", count, self.log_weights[:, 0, 0])[:, None, None]
        share = each * own.source_weights
        tilt = self.tilt()
        return Framed(tilt._replace(sources=PartSums(share, jnp.zeros_like(share), share)), own)

    def degenerate(self, sums: UnmixingSums) -> Int[Array, " k"]:
        new, few = self.m_step(sums), sums.unmixing.count < self.unmixing.shape[1] + 1
        share = divide(new.source_variance, new._moments()[1][:, :, None])
        thin = jnp.any((share < self.min_spread) & (sums.sources.count > 0), axis=(1, 2))
        return caused(few_observations=few, no_variance=thin & self.free("source_variance"))
