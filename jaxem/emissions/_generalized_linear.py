"""What regressions with a link function share: generalised linear models.

With η = W u + b, log p = Σ_d [y η − A(η)] up to a term in y. There are no sufficient statistics:
sums are a quadratic about the frame θ₀, in steps δ = θ − θ₀ of the coefficients of ṽ = (1, v), the
inputs about their own mean and scale (`_core/inputs.py`),

    Q ≈ value + g·δ − ½ δᵀ H δ,    g = Σ r (y − A′(η)) ṽ,    H = Σ r w(η) ṽ ṽᵀ.

A tilt adds to the coefficients, and w(η) ṽᵀ T ṽ, which is zero, to the density. Reframing moves the
point of expansion, exactly. M-step: δ = H⁻¹ g. At a fixed point g = 0 whatever H is, so that
implicit derivatives are exact.

Wedel & DeSarbo (1995), J. Classification 12; Green (1984), JRSS B 46 (IRLS).
"""

import abc
from typing import Any, ClassVar, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.causes import caused
from jaxem._core.inputs import InputFrame, LinearSums, runs_away
from jaxem._core.numerics import divide, pseudo_count
from jaxem._core.parameters import replace, update
from jaxem._core.quadratic import AbstractLocal, Blocks, LocalQuadratic, shortened, square_tilt
from jaxem._core.statistics import Framed
from jaxem.emissions._regression_base import COEFFICIENTS, INTERCEPT, AbstractRegression


class AbstractGeneralizedLinear(AbstractRegression, AbstractLocal):
    """Regressions with a link; a family adds its density, its curvature and its unit.

    Sums are a `LocalQuadratic` in the coefficients of ṽ times the unit, which makes it
    dimensionless: score (k, d, q), curvature in blocks (k, d, q, q); and moments of ṽ, by which the
    M-step moves its frame.
    """

    parameters: ClassVar = {"coefficients": COEFFICIENTS, "intercept": INTERCEPT}
    has_curvature: ClassVar[bool] = True
    pooled_steps: ClassVar[int] = 25
    max_step: eqx.AbstractClassVar[float]  # root mean square of a step's change of η

    @abc.abstractmethod
    def log_prob_of(self, eta: Float[Array, "k d n"], y: Float[Array, "d n"]) -> Array:
        """log p(y | η), each feature by itself."""

    @abc.abstractmethod
    def weight_of(self, eta: Float[Array, "k d n"]) -> Array:
        """w(η)."""

    @abc.abstractmethod
    def unit(self) -> Float[Array, "k d"]:
        """The square root of w at the mean of the inputs."""

    def canonical(self) -> LinearSums:
        (k, d, p), dtype = self.coefficients.shape, self.intercept.dtype
        zeros, one = jnp.zeros((k, d, 1 + p, 1 + p), dtype), jnp.ones((), dtype)
        quadratic = LocalQuadratic(one, zeros[:, 0, 0, 0], zeros[:, :, 0], Blocks(zeros))
        return LinearSums(quadratic, zeros[:, 0])

    def log_prob(self, x: Any, tilt: LinearSums) -> Float[Array, "n k"]:
        unit, (quadratic, moments) = self.unit()[:, :, None], tilt
        y = x[1].astype(self.intercept.dtype).T
        eta = self.eta(self.centred() + quadratic.score / unit, x)
        v = self.inputs.standardized(x[0])
        square = square_tilt(quadratic.curvature.matrix / unit[..., None] ** 2, v[:, None])
        log_prob = self.log_prob_of(eta, y) + self.weight_of(eta) * square
        counts = la.repeat(quadratic.count, y.shape[1]) + square_tilt(moments, v)
        return (counts + jnp.sum(log_prob, axis=1)).T

    def reframe(self, sums: LinearSums, old: Self) -> LinearSums:
        unit = old.unit()[:, :, None]
        step = old.inputs.centred(
            self.coefficients - old.coefficients, self.intercept - old.intercept
        )
        turn = self.inputs.turn_from(old.inputs)
        moments = la.matmul(la.matmul(turn, sums.moments), la.transpose(turn))
        turn = turn[:, None] * (unit / self.unit()[:, :, None])[..., None]
        return LinearSums(sums.quadratic.moved(unit * step).turned(turn), moments)

    def m_step(self, sums: LinearSums) -> Self:
        quadratic = sums.quadratic
        step = self._newton(quadratic)
        # A change of η by more than this, in the mean over observations, is beyond the quadratic.
        # With collinear inputs it is less than their coefficients say, with a prior less than H
        # says.
        unit = self.unit()[:, :, None]
        level = quadratic.curvature.matrix[:, :, :1, 0]
        by_curvature = divide(quadratic.square(step)[:, :, None], level)
        reach = jnp.minimum(jnp.sum(step**2, axis=2, keepdims=True), by_curvature)
        step = shortened(step, reach, self.max_step**2 * unit**2)
        coefficients, intercept = self.inputs.uncentred(step / unit)
        new = update(
            self,
            coefficients=self.coefficients + coefficients,
            intercept=self.intercept + intercept,
        )
        return replace(new, inputs=self.inputs.moved(sums.moments))

    def _newton(self, quadratic: LocalQuadratic) -> Float[Array, "k d q"]:
        """The step to the maximum of the quadratic, within what is free and what data resolve."""
        least = self.inputs.unresolved()[:, None] * quadratic.curvature.matrix[:, :, 0, :1]
        return quadratic.maximum(self.inputs.free_directions(self)[:, None], least)

    def prior(
        self,
        *,
        precision: ArrayLike = 0.0,
        intercept_precision: ArrayLike = 0.0,
        coefficients: ArrayLike = 0.0,
        intercept: ArrayLike = 0.0,
    ) -> Framed:
        """Normal priors of the coefficients, as pseudo-statistics; a ridge by default.

        **Arguments:** the means `coefficients`, broadcasting to (k, d, p), and `intercept`, to
        (k, d); their precisions ≥ 0, which broadcast likewise.

        **Raises:** `ValueError` for a negative precision, or means that are not finite.
        """
        frame = self.with_parameters(coefficients=coefficients, intercept=intercept)
        frame = replace(frame, inputs=InputFrame.at_zero(self.coefficients))
        own = pseudo_count("intercept_precision", intercept_precision, self.intercept)
        others = pseudo_count("precision", precision, self.coefficients)
        diagonal = jnp.concatenate([own[:, :, None], others], axis=2)
        diagonal = diagonal / frame.unit()[:, :, None] ** 2
        blocks = Blocks(diagonal[..., None] * np.eye(diagonal.shape[2], dtype=diagonal.dtype))
        quadratic, moments = self.tilt()
        return Framed(LinearSums(quadratic._replace(curvature=blocks), moments), frame)

    def degenerate(self, sums: LinearSums) -> Int[Array, " k"]:
        quadratic, moments = sums
        unit = self.unit()[:, :, None]
        endless = runs_away(
            self._newton(quadratic) / unit,
            quadratic.curvature.matrix * unit[..., None] ** 2,
            moments[:, None],
            self.inputs.free_directions(self)[:, None],
            quadratic.count[:, None],
            self.inputs.unresolved()[:, None],
        )
        few = quadratic.count < np.maximum(self.num_fitted(), 1)
        return caused(few_observations=few, separation=jnp.any(endless, axis=(1, 2)))
