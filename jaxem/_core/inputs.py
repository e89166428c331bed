"""Where the inputs of a regression lie, so that its statistics keep their digits at any offset.

A regression has no distribution of its inputs u: b + W u is the same plane about any origin and
along any axes. Its statistics are moments of ṽ = (1, v), where v are the inputs that a component
has seen, about their mean c, each less what those before it explain, in units of what is left,

    v = S⁻¹ (I − B) (u − c),    u = c + L v,    L = (I − B)⁻¹ S,

so that their moments are those of the identity: normal equations square the condition of inputs,
which in float32 leaves nothing of columns that differ by a thousandth. c, B and S are part of the
frame, and no parameters: the density does not depend on them. The M-step moves them, and reframing
is the affine ṽ′ = R ṽ, which is exact because there is an intercept. Of b + W u the coefficients of
ṽ are (b + W c, W L).

What moments in the present frame cannot tell from nothing is looked at in units of the data's own
rounding in the next one, as a Cholesky factor that is found twice or thrice (Yamamoto, Nakatsukasa,
Yanagisawa & Fukaya 2015, Electron. Trans. Numer. Anal. 44). A column that is no more than that
rounding has coefficients that stay.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxem._core import linalg as la
from jaxem._core.blocks import weighted_mean, weighted_second_moments
from jaxem._core.numerics import ROUNDINGS, divide
from jaxem._core.parameters import free, free_elements
from jaxem._core.quadratic import LocalQuadratic, eliminated

_PASSES = 2
_COARSE = 0.1  # of the deviation of an input, that is rounding


class LinearSums(NamedTuple):
    """Sums of a function of linear predictors of ṽ."""

    quadratic: LocalQuadratic  # in the coefficients of ṽ
    moments: Float[Array, "*b q q"]  # Σ r ṽ ṽᵀ


class InputFrame(eqx.Module):
    """Mean c, B and log S of each component's inputs; held fixed in every derivative."""

    mean: Float[Array, "k p"]
    log_scale: Float[Array, "k p"]
    slopes: Float[Array, "k p p"]  # B, strictly lower

    @classmethod
    def at_zero(cls, coefficients: Float[Array, "k d p"]) -> InputFrame:
        zero = jnp.zeros_like(coefficients[:, 0])
        return cls(zero, zero, zero[:, :, None] * zero[:, None])

    @classmethod
    def pooled(cls, u: Float[Array, "n p"], sample_weight: Float[Array, " n"]) -> InputFrame:
        """The frame of all inputs, for one component."""
        mean = weighted_mean(u, sample_weight)
        size, second = weighted_second_moments(u, mean, sample_weight)
        deviation = size * jnp.sqrt(jnp.diagonal(second))
        varies = deviation > _rounding(mean)
        log_scale = jnp.log(jnp.where(varies, deviation, 1))[None]
        frame = cls(mean[None], log_scale, jnp.zeros_like(second)[None])

        def again(_: Any, frame: InputFrame) -> InputFrame:
            v = frame.standardized(jnp.where(sample_weight[:, None] > 0, u, mean))
            return frame.moved(la.matmul(sample_weight * v, la.transpose(v)))

        return lax.fori_loop(0, _PASSES if u.shape[1] > 1 else 0, again, frame)

    def repeated(self, num_components: int) -> InputFrame:
        """The first component's, for each."""
        return jax.tree.map(
            lambda leaf: jnp.broadcast_to(leaf[:1], (num_components, *leaf.shape[1:])), self
        )

    @property
    def _scale(self) -> Float[Array, "k p"]:
        return lax.stop_gradient(jnp.exp(self.log_scale))

    @property
    def _origin(self) -> Float[Array, "k p"]:
        return lax.stop_gradient(self.mean)

    @property
    def _residual(self) -> Float[Array, "k p p"]:
        """I − B."""
        slopes = jnp.tril(lax.stop_gradient(self.slopes), -1)
        return jnp.eye(slopes.shape[-1], dtype=slopes.dtype) - slopes

    def _factor(self) -> Float[Array, "k p p"]:
        """L."""
        return la.inverse_of_lower(self._residual) * self._scale[:, None]

    def whitener(self) -> Float[Array, "k p p"]:
        """L⁻¹."""
        return self._residual / self._scale[:, :, None]

    def standardized(self, u: Float[Array, "n p"]) -> Float[Array, "k q n"]:
        """ṽ of each observation about each component's own inputs; q = 1 + p."""
        v = u.T - self._origin[:, :, None]
        v = v / self._scale[:, :, None] if v.shape[1] == 1 else la.matmul(self.whitener(), v)
        return jnp.pad(v, ((0, 0), (1, 0), (0, 0)), constant_values=1)

    def centred(self, coefficients: Array, intercept: Array) -> Float[Array, "k d q"]:
        """(b + W c, W L), the coefficients of ṽ."""
        level = intercept + la.apply(coefficients, self._origin)
        return jnp.concatenate([level[:, :, None], la.matmul(coefficients, self._factor())], axis=2)

    def uncentred(self, centred: Float[Array, "k d q"]) -> tuple[Array, Array]:
        """The coefficients and the intercept behind the coefficients of ṽ."""
        coefficients = la.matmul(centred[:, :, 1:], self.whitener())
        return coefficients, centred[:, :, 0] - la.apply(coefficients, self._origin)

    def turn_from(self, old: InputFrame) -> Float[Array, "k q q"]:
        """R with ṽ = R ṽ_old."""
        change = la.matmul(self._residual - old._residual, la.inverse_of_lower(old._residual))
        turn = jnp.eye(change.shape[-1], dtype=change.dtype) + change  # exact where B is the same
        turn = turn * old._scale[:, None] / self._scale[:, :, None]
        shift = la.apply(self.whitener(), old._origin - self._origin)
        below = jnp.concatenate([shift[:, :, None], turn], axis=2)
        top = jnp.zeros_like(below[:, :1]).at[:, :, 0].set(1)
        return jnp.concatenate([top, below], axis=1)

    def moved(self, moments: Float[Array, "k q q"]) -> InputFrame:
        """The frame of inputs with moments Σ r ṽ ṽᵀ about self."""
        count = moments[:, :1, :1]
        matrix = divide(moments, count)
        first, factor = matrix[:, 1:, 0], self._factor()
        mean = self.mean + la.apply(factor, first)
        spread = la.matmul(factor, matrix[:, 1:, 1:] - la.outer(first, first))
        square = jnp.maximum(jnp.sum(spread * factor, axis=2), 0)
        lower, left, found = eliminated(matrix)
        residual = la.inverse_of_lower(lower)[:, 1:, 1:]
        scale = self._scale
        change = (residual - jnp.eye(scale.shape[1], dtype=scale.dtype)) * scale[:, :, None]
        slopes = self.slopes - la.matmul(change / scale[:, None], self._residual)
        deviation = scale * jnp.sqrt(jnp.where(found, left, 0)[:, 1:])
        deviation = jnp.maximum(deviation, _rounding(jnp.maximum(jnp.abs(mean), jnp.sqrt(square))))
        scale = jnp.where(deviation > 0, deviation, scale)
        scale = jnp.maximum(scale, jnp.finfo(scale.dtype).tiny)
        new = InputFrame(mean, jnp.log(scale), slopes)
        seen = count[:, 0] > 0
        return lax.stop_gradient(
            jax.tree.map(
                lambda a, b: jnp.where(seen.reshape(-1, *(1,) * (a.ndim - 1)), a, b), new, self
            )
        )

    def unresolved(self) -> Float[Array, "k q"]:
        """What the square of ṽ has, of one observation, where u is off by its own rounding."""
        factor = self._factor()
        deviation = jnp.sqrt(jnp.sum(factor**2, axis=2))
        off = _rounding(jnp.maximum(jnp.abs(self._origin), deviation)) / self._scale
        return jnp.pad(off**2, ((0, 0), (1, 0)))

    def roundings(self) -> InputFrame:
        """Which of its numbers make sums coarse: B, in rows of inputs that are not all rounding.

        Differences from c are exact.
        """
        zero = jnp.zeros_like(self.mean)
        coarse = (self.unresolved()[:, 1:] < _COARSE**2)[:, :, None]
        return InputFrame(
            zero, zero, jnp.broadcast_to(coarse, self.slopes.shape).astype(zero.dtype)
        )

    def free_directions(self, module: Any) -> Float[Array, "k q q"]:
        """Rows that span the coefficients that are free; zero rows for what is frozen.

        Where the intercept is frozen, and with it the value at u = 0, a coefficient also moves the
        level.
        """
        p = self.mean.shape[1]
        intercept, coefficients = free(module, "intercept"), free(module, "coefficients")
        rows = np.concatenate([intercept[:, None], np.repeat(coefficients[:, None], p, 1)], axis=1)
        level = la.apply(self.whitener(), self._origin)
        level = jnp.where((~intercept & coefficients)[:, None], level, 0)
        own = jnp.asarray(rows[:, :, None] * np.eye(1 + p), level.dtype)
        return own + jnp.pad(level[:, :, None], ((0, 0), (1, 0), (0, p)))

    def directions_of_elements(self, module: Any) -> Float[Array, "k d q q"]:
        """Rows that span the coefficients that are free, where outputs differ in what is frozen.

        Each is a coefficient of u, in units of what is left of the input, as `unresolved` is.
        """
        coefficients = free_elements(module, "coefficients")
        intercept = free_elements(module, "intercept")[:, :, None]
        rows = jnp.asarray(np.concatenate([intercept, coefficients], axis=2))
        level = jnp.where(intercept, 0, (self._origin / self._scale)[:, None])
        level = jnp.pad(level, ((0, 0), (0, 0), (1, 0)), constant_values=1)[..., None]
        slopes = jnp.pad(self._factor() / self._scale[:, :, None], ((0, 0), (1, 0), (0, 0)))
        slopes = jnp.broadcast_to(slopes[:, None], (*rows.shape, slopes.shape[2]))
        return rows[..., None] * jnp.concatenate([level, slopes], axis=3)


def _rounding(size: Array) -> Array:
    """Deviations that are no more than the rounding of the numbers they are measured at."""
    return ROUNDINGS * jnp.finfo(size.dtype).eps * jnp.abs(size)


def runs_away(
    step: Float[Array, "*b q"],
    curvature: Float[Array, "*b q q"],
    moments: Float[Array, "*b q q"],
    directions: Float[Array, "*b q q"],
    count: Float[Array, "*b"],
    least: Float[Array, "*b q"],
) -> Bool[Array, "*b q"]:
    """Which coefficients of ṽ grow for ever: a Newton step changes η much, and log p hardly.

    Where inputs separate outcomes, each step is as long as the last one (in the mean square over
    observations, by their `moments`), while `curvature` and gain vanish. What has inputs, and no
    curvature at all, has run as far as the dtype goes.
    """

    def square(matrix: Array) -> Array:
        return divide(jnp.sum(step * la.apply(matrix, step), axis=-1), count)

    change, gain = square(moments), square(curvature)
    goes_on = (change >= 1e-2) & (gain <= 1e-3 * change) & (gain <= 1e-3)
    own = (divide(step**2, count[..., None]) * jnp.diagonal(moments, axis1=-2, axis2=-1)) >= 1e-3
    known, there = (
        eliminated(la.matmul(la.matmul(directions, matrix), la.transpose(directions)))[1:]
        for matrix in (curvature, moments)
    )
    varies = there[1] & (there[0] > least * count[..., None])
    vanished = ~known[1] | (known[0] < jnp.minimum(0.1, 1e-6 * there[0]))
    return (goes_on[..., None] & own) | (varies & vanished)
