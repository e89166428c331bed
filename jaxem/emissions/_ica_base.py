"""Independent components: x = μ + A s, where sources sⱼ are independent mixtures of m Gaussians.

With y = W (x − μ), W = A⁻¹, and the laws fⱼ of the sources,

    log p(x) = log|det W| + Σⱼ log fⱼ(yⱼ),    fⱼ(y) = Σₘ πⱼₘ N(y; μⱼₘ, σ²ⱼₘ).

E-step. Sums of the sources are those of their parts, (1, e, e²) with e = (y − μⱼₘ)/σⱼₘ. Of W and μ
they are a quadratic in the relative step δ, y′ = y + δ ỹ, ỹ = (1, y): with ψⱼ = d log fⱼ/dy, its
slope, and variances v of the sources,

    gᵢⱼ = Σ r (ψᵢ ỹⱼ + [i = j]),    Hᵢⱼ = Σ r (0.1/vᵢ − ψᵢ′) ỹⱼ²,

of each row, without products of different ỹ, whose mean is 0 where sources are independent. What
the determinant adds to that, −n tr δ²/2, is kept as it is.

M-step. That of the sources, whose mean and variance stay as they are: a source and its row of W can
be scaled and shifted together, which changes no density. And for each pair of rows the Newton step

    Hᵢⱼ δᵢⱼ + n δⱼᵢ = gᵢⱼ,    Hⱼᵢ δⱼᵢ + n δᵢⱼ = gⱼᵢ,    W ← (I + δ) W.

Without its first part Hᵢⱼ is n vⱼ/vᵢ where sources are Gaussian, more where they are independent
and are not; of scales and levels, i = j and ỹ = 1, it is that of the parts, Σ r y²/σ². Steps ascend
where they are short, and are halved where they are not. They are relative: fits of B x + b are
those of x.

Pham & Garat (1997), IEEE Trans. Signal Processing 45; Palmer, Kreutz-Delgado & Makeig (2012),
AMICA; Ablin, Cardoso & Gramfort (2018), IEEE Trans. Signal Processing 66 (Picard).
"""

import dataclasses
import functools
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.causes import caused
from jaxem._core.constraints import Parameter, positive, real, simplex
from jaxem._core.newton import maximize_by_newton
from jaxem._core.numerics import divide, pseudo_count
from jaxem._core.parameters import update
from jaxem._core.quadratic import AbstractLocal, Blocks, LocalQuadratic, linear_tilt, shortened
from jaxem._core.statistics import Framed
from jaxem._core.supports import reals
from jaxem.emissions._base import AbstractWide
from jaxem.emissions._family import AbstractFamily
from jaxem.emissions._ica_sources import Laws, PartSums, mean_log_prob, shares

# Curvature of a row, as shares of that of a Gaussian source: what is added, and the least there is
_ADDED, _LEAST = 0.1, 1.02
_LONGEST = 0.5  # root mean square of a row's relative step


class UnmixingSums(NamedTuple):
    unmixing: LocalQuadratic  # in δ: score (k, d, q); curvature in rows, without the determinant's
    sources: PartSums
    pseudo: PartSums  # of the prior, whose values have mean and variance of the source


def _of_each_source(parameter: Parameter) -> Parameter:
    """A parameter of which each source has one number less: its mean or variance is held."""
    lost = parameter.constraint._replace(lost=lambda shape: shape[0])
    return dataclasses.replace(parameter, constraint=lost)


class AbstractUnmixing(AbstractFamily, AbstractWide, AbstractLocal):
    """Independent sources behind a regular matrix: the E-step and the M-step."""

    has_curvature: ClassVar = True
    support: ClassVar = reals("n d")
    parameters: ClassVar = {
        "mean": real("mean", "k d"),
        "unmixing": real("unmixing", "k d d"),
        "source_weights": simplex("log_weights", "k d m"),
        "source_mean": _of_each_source(real("source_mean", "k d m")),
        "source_variance": _of_each_source(positive("log_variance", "k d m")),
    }
    mean: eqx.AbstractVar[Float[Array, "k d"]]
    unmixing: eqx.AbstractVar[Float[Array, "k d d"]]
    log_weights: eqx.AbstractVar[Float[Array, "k d m"]]
    source_mean: eqx.AbstractVar[Float[Array, "k d m"]]
    log_variance: eqx.AbstractVar[Float[Array, "k d m"]]
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
        return la.matmul(self.unmixing, x.T - self.mean[:, :, None])

    def _laws(self) -> Laws:
        """The laws of the sources."""
        return Laws(self.log_weights, self.source_mean, self.log_variance)

    def log_prob(self, x: Float[Array, "n d"], tilt: UnmixingSums) -> Float[Array, "n k"]:
        quadratic, parts, _ = tilt
        y, laws = self._sources(x), self._laws()
        inputs = jnp.pad(y, ((0, 0), (1, 0), (0, 0)), constant_values=1)
        log_source = shares(y + linear_tilt(quadratic.score, inputs), laws, parts).log_prob
        # Apart, so that no derivative by the tilt passes through them
        bend, of_parts = shares(y, laws).slopes()
        bend = bend + (_ADDED / laws.moments()[1])[:, :, None]
        rows = jnp.diagonal(quadratic.curvature.matrix, axis1=2, axis2=3)
        own, square_of = _scale_or_level(rows.shape[1]), inputs**2
        tilted = bend * linear_tilt(jnp.where(own, 0, rows), square_of)
        tilted = tilted + of_parts * linear_tilt(jnp.where(own, rows, 0), square_of)
        trace = jnp.trace(quadratic.score[:, :, 1:], axis1=1, axis2=2)
        constant = la.inverse_and_log_det(self.unmixing)[1] + quadratic.count + trace
        return (la.repeat(constant, len(x)) + jnp.sum(log_source + tilted, axis=1)).T

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        part_key, key = jax.random.split(key)
        part = jax.random.categorical(part_key, self.log_weights[z])[..., None]
        mean, variance = (
            jnp.take_along_axis(leaf[z], part, axis=2)[..., 0]
            for leaf in (self.source_mean, self.source_variance)
        )
        s = mean + jnp.sqrt(variance) * jax.random.normal(key, mean.shape, mean.dtype)
        return self.mean[z] + la.apply(la.inverse_and_log_det(self.unmixing)[0][z], s)

    # EM

    def canonical(self) -> UnmixingSums:
        k, d, _ = self.unmixing.shape
        zeros = jnp.zeros((k, d, 1 + d, 1 + d), self.unmixing.dtype)
        one, rows = jnp.ones((), zeros.dtype), zeros[:, :, 0]
        none = jnp.zeros_like(self.log_variance)
        parts = PartSums(self._laws().log_norm(), none, none - 0.5)
        return UnmixingSums(LocalQuadratic(one, rows[:, 0, 0], rows, Blocks(zeros)), parts, parts)

    def reframe(self, sums: UnmixingSums, old: Self) -> UnmixingSums:
        step = la.matmul(self.unmixing - old.unmixing, la.inverse_and_log_det(old.unmixing)[0])
        count = sums.unmixing.count
        rise = jnp.sum(count * _log_det_beyond_trace(step))
        shift = la.apply(self.unmixing, old.mean - self.mean)
        step = jnp.concatenate([shift[:, :, None], step], axis=2)
        change = jnp.pad(step, ((0, 0), (1, 0), (0, 0)))
        turn = jnp.eye(change.shape[1], dtype=change.dtype) + change
        moved = sums.unmixing.moved(step).turned(turn[:, None])
        # The determinant's part of the score, n I, is that of the frame
        rows, columns = step.shape[1:]
        own = count[:, None, None] * jnp.eye(rows, columns, 1, step.dtype)
        score = moved.score - la.apply(change[:, None], own)
        new, before = self._laws(), old._laws()
        unit, origin = new.units_of(before)
        pseudo = sums.pseudo.reframed(new, before.scaled(unit, origin))
        rise = rise + jnp.sum(pseudo.count * jnp.log(unit)[:, :, None])
        moved = moved._replace(value=moved.value + rise, score=score)
        return UnmixingSums(moved, sums.sources.reframed(new, before), pseudo)

    def m_step(self, sums: UnmixingSums) -> Self:
        step = self._step(sums.unmixing)
        unmixing = self.unmixing + la.matmul(step[:, :, 1:], self.unmixing)
        shift = la.apply(la.inverse_and_log_det(unmixing)[0], step[:, :, 0])
        new = self._with_sources(sums)
        return update(new, unmixing=unmixing, mean=self.mean - shift)

    def _with_sources(self, sums: UnmixingSums) -> Self:
        """The M-step of the sources; scale and level are those of W and μ where these move."""
        old, free = self._laws(), {name: self.free(name)[:, None, None] for name in self.parameters}
        both = jax.tree.map(jnp.add, sums.sources, sums.pseudo)
        start, seen = self._closed_form(both, free), both.count > 0
        moves = [free[name] & seen for name in ("source_weights", "source_mean", "source_variance")]
        total = jnp.sum(both.count, axis=2)
        args = old, sums.sources, sums.pseudo, jnp.where(total > 0, total, 1)
        theta, moves = (jnp.concatenate(list(parts), axis=2) for parts in (start, moves))

        def best(theta: Array, args: Any, moves: Array) -> Array:
            return maximize_by_newton(mean_log_prob, theta, args, free=moves)

        theta = jax.vmap(jax.vmap(best))(theta, args, moves)
        found = Laws(*jnp.split(theta, 3, axis=2))
        (mean, variance), (now, spread) = old.moments(), found.moments()
        scales = (free["source_mean"] & free["source_variance"] & free["unmixing"])[:, 0]
        unit = jnp.where(scales, jnp.sqrt(variance / spread), 1)
        origin = jnp.where((free["source_mean"] & free["mean"])[:, 0], mean - unit * now, 0)
        new = found.scaled(unit, origin)
        return update(
            self,
            log_weights=new.log_weights,
            source_mean=new.mean,
            log_variance=self.parameters["source_variance"].within(new.log_variance),
        )

    def _closed_form(self, sums: PartSums, free: dict[str, np.ndarray]) -> Laws:
        """The laws of sums that are not scaled with them, where they are free."""
        (count, first, second), old = sums, self._laws()
        move = divide(first, count) * free["source_mean"]
        spread = divide(second, count) + move * (move - 2 * divide(first, count))
        growth = la.floored_log(jnp.where(count > 0, spread, 1)) * free["source_variance"]
        whole = jnp.sum(count, axis=2, keepdims=True)
        shares = la.floored_log(divide(count, whole))
        log_weights = jnp.where(free["source_weights"] & (whole > 0), shares, old.log_weights)
        mean = old.mean + jnp.exp(0.5 * old.log_variance) * move
        return Laws(log_weights, mean, old.log_variance + growth)

    def _step(self, quadratic: LocalQuadratic) -> Float[Array, "k d q"]:
        """δ, within what is free."""
        n, variance = quadratic.count[:, None, None], self._laws().moments()[1]
        inputs = jnp.pad(variance, ((0, 0), (1, 0)), constant_values=1)
        gaussian = n * inputs[:, None, :] / variance[:, :, None]
        bend = jnp.diagonal(quadratic.curvature.matrix, axis1=2, axis2=3)
        bend = jnp.where(_scale_or_level(bend.shape[1]), bend, jnp.maximum(bend, _LEAST * gaussian))
        level = divide(quadratic.score[:, :, :1], bend[:, :, :1])
        score, bend, gaussian = quadratic.score[:, :, 1:], bend[:, :, 1:], gaussian[:, :, 1:]
        other = la.transpose(bend)
        pairs = divide(other * score - n * la.transpose(score), bend * other - n**2)
        own = np.eye(score.shape[1], dtype=bool)
        step = jnp.where(own, divide(score, bend + n), pairs)
        reach = jnp.mean(jnp.sum(step**2 * gaussian, axis=2), axis=1)[:, None, None]
        step = shortened(step, reach, _LONGEST**2 * n) * self.free("unmixing")[:, None, None]
        return jnp.concatenate([level * self.free("mean")[:, None, None], step], axis=2)

    def prior(self, count: ArrayLike = 0.0, **law: ArrayLike) -> Framed:
        """As if `count` values of each source, of the law given, had been seen; W and μ have none.

        They are scaled and shifted to the mean and the variance of the source, so that the prior is
        one of its shape. It keeps parts from narrowing without end, as those of a source with few
        different values do.

        **Arguments:** `count` ≥ 0, one or (k,); `source_weights`, `source_mean`,
        `source_variance`, the present ones by default.

        **Raises:** `ValueError` for a negative count, or values that are no such parameter.
        """
        own = self.with_parameters(**law)
        each = pseudo_count("count", count, self.log_weights[:, 0, 0])[:, None, None]
        share = each * own.source_weights
        seen = PartSums(share, jnp.zeros_like(share), share)
        return Framed(self.tilt()._replace(pseudo=seen), own)

    def degenerate(self, sums: UnmixingSums) -> Int[Array, " k"]:
        new, few = self.m_step(sums), sums.unmixing.count < self.unmixing.shape[1] + 1
        share = divide(new.source_variance, new._laws().moments()[1][:, :, None])
        thin = jnp.any((share < self.min_spread) & (sums.sources.count > 0), axis=(1, 2))
        return caused(few_observations=few, no_variance=thin & self.free("source_variance"))


def _scale_or_level(d: int) -> np.ndarray:
    """Which entries of (d, 1 + d) relative steps scale or shift a source, and mix none."""
    return np.concatenate([np.ones((d, 1), bool), np.eye(d, dtype=bool)], axis=1)


def _log_det_beyond_trace(step: Float[Array, "k d d"]) -> Float[Array, " k"]:
    """log|det(I + δ)| − tr δ, which is of second order, to its own precision."""
    eye = jnp.eye(step.shape[1], dtype=step.dtype)
    trace = functools.partial(jnp.trace, axis1=1, axis2=2)
    whole = la.inverse_and_log_det(eye + step)[1] - trace(step)
    square = la.matmul(step, step)
    series = trace(-square / 2 + la.matmul(square, step / 3 - square / 4))
    return jnp.where(jnp.sum(jnp.abs(step), axis=(1, 2)) < 1e-3, series, whole)
