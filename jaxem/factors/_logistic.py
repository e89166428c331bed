"""A gate: mixing weights that depend on covariates, a multinomial logistic regression.

With θₖ the coefficients of ṽ = (1, (v − c)/s), covariates about their mean and scale as inputs of
regressions are (`_core/inputs.py`), log πₖ = θₖ·ṽ − log Σⱼ exp(θⱼ·ṽ). Sums are a quadratic about
the frame θ₀, of all θ end to end,

    g = Σ (r − π) ⊗ ṽ,    H = Σ w (diag π − π πᵀ) ⊗ ṽ ṽᵀ,    w = Σₖ rₖ,

and the moments Σ w ṽ ṽᵀ, by which the M-step moves c and s. M-step: δ = H⁻¹ g, of limited length.

Jacobs, Jordan, Nowlan & Hinton (1991), Neural Computation 3.
"""

from typing import ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.causes import caused
from jaxem._core.checks import check_continuous
from jaxem._core.constraints import leaves_of, real
from jaxem._core.inputs import InputFrame, LinearSums, runs_away
from jaxem._core.numerics import ROUNDINGS, pseudo_count
from jaxem._core.parameters import Frozen, free, replace, update
from jaxem._core.quadratic import AbstractLocal, Blocks, LocalQuadratic, shortened, square_tilt
from jaxem._core.statistics import Framed
from jaxem.factors._base import AbstractFactor

_LONGEST = 1.0  # root mean square of a step's change of the log-odds


class LogisticGate(AbstractFactor, AbstractLocal):
    """Weights from covariates, P(z = k | v) ∝ exp(bₖ + Wₖ·v).

    What all components have in common does nothing: `coefficients` and `intercept` are those of the
    last component taken off, whose own are zero.

    Where covariates separate the components there is no maximum, and coefficients grow for
    ever: give a prior.

    **Arguments:** `coefficients` (k, p), `intercept` (k,).

    **Raises:** `ValueError` for other shapes, or for values that are not finite.
    """

    parameters: ClassVar = {
        "coefficients": real("slopes", "k p"),
        "intercept": real("intercepts", "k"),
    }
    has_curvature: ClassVar[bool] = True
    slopes: Float[Array, "k p"]
    intercepts: Float[Array, " k"]
    inputs: InputFrame  # one for all components
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, coefficients: ArrayLike, intercept: ArrayLike):
        given = leaves_of(self.parameters, coefficients=coefficients, intercept=intercept)
        self.slopes, self.intercepts = given["slopes"], given["intercepts"]
        self.inputs, self.frozen = InputFrame.at_zero(self.slopes[None]), ()

    @property
    def coefficients(self) -> Float[Array, "k p"]:
        """What a covariate adds to the log-odds of each component against the last one."""
        return self.slopes - self.slopes[-1]

    @property
    def intercept(self) -> Float[Array, " k"]:
        """The log-odds of each component against the last one at v = 0."""
        return self.intercepts - self.intercepts[-1]

    @property
    def num_components(self) -> int:
        return self.intercepts.shape[0]

    @property
    def num_free_parameters(self) -> int:
        def count(name: str) -> int:
            is_free = free(self, name)
            return int(np.sum(is_free)) - bool(np.all(is_free))

        return count("intercept") + self.slopes.shape[1] * count("coefficients")

    def check(self, v: Float[Array, "n p"]) -> None:
        """Raises `ValueError` at trace time for covariates of the wrong shape or dtype."""
        check_continuous(v, self.slopes.shape[1], self.slopes.dtype, "LogisticGate (covariates)")

    def _centred(self, slopes: Array, intercepts: Array) -> Float[Array, "k q"]:
        """The coefficients of ṽ."""
        return self.inputs.centred(slopes[None], intercepts[None])[0]

    def tilt(self) -> LinearSums:
        """Zeros like the sums: the point at which `log_weights` is differentiated."""
        k, p = self.slopes.shape
        zeros = jnp.zeros((k * (1 + p),) * 2, self.slopes.dtype)
        zero = zeros[0, 0]
        return LinearSums(
            LocalQuadratic(zero, zero, zeros[0], Blocks(zeros)), zeros[: 1 + p, : 1 + p]
        )

    def log_weights(
        self, v: Float[Array, "n p"], tilt: LinearSums | None = None
    ) -> Float[Array, "n k"]:
        """log P(z = k | v); a tilt adds its product with the statistics about self."""
        quadratic, moments = self.tilt() if tilt is None else tilt
        theta = self._centred(self.slopes, self.intercepts)
        k, q = theta.shape
        theta = theta + quadratic.score.reshape(k, q)
        u = self.inputs.standardized(v)[0]
        log_weights = jax.nn.log_softmax(la.matmul(u.T, theta.T), axis=1)
        # π ⊗ ṽ ṽᵀ of each component by itself, less π πᵀ ⊗ ṽ ṽᵀ
        pi = jnp.exp(log_weights).T
        curvature = quadratic.curvature.matrix
        own = jnp.einsum("kikj->kij", curvature.reshape(k, q, k, q))
        square = jnp.sum(pi * square_tilt(own, u), axis=0)
        mean = (pi[:, None] * u).reshape(k * q, -1)
        zero = square - square_tilt(curvature, mean) + square_tilt(moments, u) + quadratic.count
        return log_weights + zero[:, None]

    def reframe(self, sums: LinearSums, old: Self) -> LinearSums:
        turn = self.inputs.turn_from(old.inputs)[0]
        turns = jnp.kron(jnp.eye(self.num_components, dtype=turn.dtype), turn)
        step = self._centred(self.slopes - old.slopes, self.intercepts - old.intercepts)
        moments = la.matmul(la.matmul(turn, sums.moments), turn.T)
        return LinearSums(sums.quadratic.turned(turns).moved(step.reshape(-1)), moments)

    def m_step(self, sums: LinearSums) -> Self:
        """A Newton step within what is free, no longer than the quadratic holds."""
        (k, p), quadratic = self.slopes.shape, sums.quadratic
        step = self._newton(quadratic)
        step = shortened(step, quadratic.square(step), _LONGEST**2 * quadratic.count)
        slopes, intercepts = self.inputs.uncentred(step.reshape(1, k, 1 + p))
        new = update(
            self, slopes=self.slopes + slopes[0], intercepts=self.intercepts + intercepts[0]
        )
        return replace(new, inputs=self.inputs.moved(sums.moments[None]))

    def _common(self) -> Bool[np.ndarray, "k q"]:
        """Of the last component what all can share: the law does not depend on it."""
        k, p = self.slopes.shape
        is_free = np.stack([free(self, "intercept")] + p * [free(self, "coefficients")], axis=1)
        return is_free.all(axis=0) & (np.arange(k) == k - 1)[:, None]

    def _contrasts(self) -> Float[Array, "q q"]:
        """Rows that span what is free, but for what is common."""
        rows = self.inputs.free_directions(self) * ~self._common()[:, :, None]
        return _end_to_end(jnp.einsum("kij,kl->kilj", rows, jnp.eye(len(rows), dtype=rows.dtype)))

    def _unresolved(self, level: Float[Array, "k 1"]) -> Float[Array, "k q"]:
        """What the square of ṽ has where v is off by its own rounding, of so many observations."""
        return self.inputs.unresolved() * level

    def _newton(self, quadratic: LocalQuadratic) -> Float[Array, " q"]:
        """The step to the maximum; along what is common a prior alone has a curvature."""
        common, shared = self._common(), jnp.sum(self.inputs.free_directions(self), axis=0)
        k, contrasts = self.num_components, self._contrasts()
        rows = jnp.broadcast_to(shared[:, None], (k, len(shared), k, len(shared)))
        directions = jnp.where(common.reshape(-1, 1), _end_to_end(rows), contrasts)
        curvature = jnp.diagonal(quadratic.curvature.matrix).reshape(common.shape)
        reach = la.apply(jnp.abs(shared), jnp.sqrt(jnp.max(curvature, axis=0)))
        rounding = ROUNDINGS * jnp.finfo(reach.dtype).eps * reach**2
        least = jnp.where(common, rounding, self._unresolved(curvature[:, :1]))
        return quadratic.maximum(directions, least.reshape(-1))

    def degenerate(self, sums: LinearSums) -> Int[Array, " k"]:
        """Why a component's coefficients have no maximum, a member of `CAUSES`."""
        quadratic, k = sums.quadratic, self.num_components
        contrasts = self._contrasts()
        level = jnp.diagonal(quadratic.curvature.matrix).reshape(k, -1)[:, :1]
        endless = runs_away(
            quadratic.maximum(contrasts, self._unresolved(level).reshape(-1)),
            quadratic.curvature.matrix,
            jnp.kron(jnp.eye(k, dtype=level.dtype), sums.moments),
            contrasts,
            quadratic.count,
            self._unresolved(jnp.ones_like(level)).reshape(-1),
        )
        return caused(separation=jnp.any(endless.reshape(k, -1), axis=1))

    def expected_log_prob(self, sums: LinearSums) -> Float[Array, ""]:
        return sums.quadratic.value

    def prior(
        self,
        *,
        precision: ArrayLike = 0.0,
        intercept_precision: ArrayLike = 0.0,
        coefficients: ArrayLike = 0.0,
        intercept: ArrayLike = 0.0,
    ) -> Framed:
        """Normal priors of the coefficients, as pseudo-statistics; a ridge by default.

        **Arguments:** the means `coefficients`, broadcasting to (k, p), and `intercept`, to (k,);
        their precisions ≥ 0, which broadcast likewise.

        **Raises:** `ValueError` for a negative precision, or means that are not finite.
        """
        frame = self.with_parameters(coefficients=coefficients, intercept=intercept)
        frame = replace(frame, inputs=InputFrame.at_zero(self.slopes[None]))
        own = pseudo_count("intercept_precision", intercept_precision, self.intercepts)
        others = pseudo_count("precision", precision, self.slopes)
        diagonal = jnp.concatenate([own[:, None], others], axis=1).reshape(-1)
        flat, moments = self.tilt()
        return Framed(
            LinearSums(flat._replace(curvature=Blocks(jnp.diag(diagonal))), moments), frame
        )


def _end_to_end(blocks: Float[Array, "k i k j"]) -> Float[Array, "m m"]:
    k, i, _, _ = blocks.shape
    return blocks.reshape(k * i, k * i)
