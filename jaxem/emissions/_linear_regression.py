"""Linear regressions with Gaussian residuals: y | u, z = k ~ N(Wₖ u + bₖ, Σₖ).

E-step. With Σ = L Lᵀ, v the inputs about their own mean and scale (`_core/inputs.py`) and
t = (1, v, z) of whitened residuals z = L⁻¹(y − W u − b),

    log p = −½‖z‖² − log|L| − ½ d log 2π.

Statistics are Σ r t tᵀ, moments of inputs and residuals about the component's own regression. In
another frame t′ = R t: reframing is a congruence.

M-step. With M = Σr ṽ ṽᵀ, G = Σr z ṽᵀ and S = Σr z zᵀ the blocks of the moments, ṽ = (1, v):

    δ = G M⁻¹,    (b + W c, W s) ← (b + W c, W s) + L δ,    Σ ← L (S − Gδᵀ − δGᵀ + δMδᵀ) Lᵀ / n.

Where elements of W and b are frozen, each output of independent residuals is a regression on its
own free inputs. With correlated residuals the rows would be one linear system: they take the same
free inputs for all outputs.

Collinear inputs, and inputs that do not vary in a component, are no error: the coefficients of
those that the intercept and the inputs before them explain stay where they are.

DeSarbo & Cron (1988), J. Classification 5; for HMMs, Hamilton (1990), J. Econometrics 45.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.causes import caused, either
from jaxem._core.constraints import leaves_of
from jaxem._core.full_scales import FullScale, full_scale, pooled_full_scale
from jaxem._core.inputs import InputFrame
from jaxem._core.numerics import ROUNDINGS, centroid, pseudo_count, resolves
from jaxem._core.parameters import Frozen, free_elements, replace, update
from jaxem._core.quadratic import solve_free, square_tilt
from jaxem._core.scales import MIN_SPREAD, ScaleParameter
from jaxem._core.statistics import Framed
from jaxem._core.supports import Regressed, reals
from jaxem.emissions._regression_base import COEFFICIENTS, INTERCEPT, AbstractRegression, Link

_COUNTED = ("intercept", "covariance")  # what a prior counts observations of
_INDEPENDENT = "need independent residuals: make it LinearRegression(…, diagonal=True)"


class JointMoments(NamedTuple):
    """Moments of t; c is k, or 1 where the covariance of residuals is shared."""

    scale_count: Float[Array, " c"]  # how many log-scales count
    joint: Float[Array, "k t t"]  # Σ r t tᵀ

    def turned(self, turn: Float[Array, "k t t"]) -> Self:
        """Moments of R t."""
        joint = la.matmul(la.matmul(turn, self.joint), la.transpose(turn))
        return self._replace(joint=joint)

    def maximum(
        self, directions: Float[Array, "k *d q q"], unresolved: Float[Array, "k q"]
    ) -> tuple[Float[Array, "k d q"], Float[Array, "c d d"]]:
        """The step δ within the span of the rows of `directions`, perhaps those of each output.

        And squares about its end. It does not go along inputs of which no more is left than what is
        `unresolved`.
        """
        q = directions.shape[-1]
        moments, cross = self.joint[:, :q, :q], self.joint[:, q:, :q]
        least = unresolved * moments[:, 0, :1]
        if directions.ndim == 4:
            each = solve_free(moments[:, None], cross[:, :, None], directions, least[:, None])
            step = each[:, :, 0]
        else:
            step = solve_free(moments, cross, directions, least)
        # Also where the step leads to no free maximum; what is below the rounding of the squares
        # before it counts as scatter.
        moved = la.matmul(2 * cross - la.matmul(step, moments), la.transpose(step))
        moved = self._of_scales(0.5 * (moved + la.transpose(moved)))
        eye = jnp.eye(step.shape[1], dtype=step.dtype)
        trace = jnp.abs(jnp.trace(moved, axis1=1, axis2=2))
        unknown = 4 * ROUNDINGS * jnp.finfo(step.dtype).eps * trace
        squares = self._of_scales(self.joint[:, q:, q:])
        return step, squares - moved + unknown[:, None, None] * eye

    def _of_scales(self, per_component: Array) -> Array:
        """Sums over the components that share one covariance."""
        if len(self.scale_count) == len(per_component):
            return per_component
        return jnp.sum(per_component, axis=0, keepdims=True)


def _coupled(module: Any, mask: np.ndarray) -> str:
    """Why coefficients cannot be frozen so: those of correlated outputs are one linear system."""
    if module.structure.below is None or np.all(mask == mask[:, :1]):
        return ""
    return f"{_INDEPENDENT}, or freeze them alike for all outputs."


def _correlated(module: Any, mask: np.ndarray) -> str:
    return "" if module.structure.below is None else f"{_INDEPENDENT}."


class LinearRegression(AbstractRegression):
    """Regressions of outputs on inputs, with Gaussian residuals. Data: a tuple (u, y).

    With lagged outputs as inputs (`Sequences.lagged`) an HMM of it is an autoregressive HMM.
    The density is that of y given u: it says nothing of u.

    **Arguments:** `coefficients` (k, d, p); `intercept` (k, d), the value at u = 0; `covariance`
    (k, d, d) of the residuals, or (d, d) shared by all components; `diagonal`: whether residuals of
    different outputs are independent, and the covariance stays diagonal; `min_spread`: a component
    whose residual variance along some direction is below this fraction of the average is
    degenerate. A variance of 0 is one of an output without residuals, to be frozen. Data: inputs u
    (n, p), outputs y (n, d). As a `family`, `functools.partial(LinearRegression, tied=True)` shares
    the covariance.

    **Raises:** `ValueError` for other shapes, or values that are not a covariance.

    ```python
    LinearRegression([[[1.0]], [[-1.0]]], [[0.0], [2.0]], np.ones((2, 1, 1)))  # two lines
    ```
    """

    parameters: ClassVar = {
        "coefficients": dataclasses.replace(COEFFICIENTS, elements=_coupled),
        "intercept": dataclasses.replace(INTERCEPT, elements=_coupled),
        "covariance": ScaleParameter("structure", pooled_full_scale, elements=_correlated),
    }
    support: ClassVar = Regressed(reals("n d"))
    link: ClassVar = Link(of=lambda mean: mean, inverse=lambda eta: eta, share=1.0)
    pooled_steps: ClassVar = 2  # the second time about the line itself
    coefficients: Float[Array, "k d p"]
    intercept: Float[Array, "k d"]
    structure: FullScale
    inputs: InputFrame
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self,
        coefficients: ArrayLike,
        intercept: ArrayLike,
        covariance: ArrayLike,
        *,
        diagonal: bool = False,
        min_spread: float = MIN_SPREAD,
    ):
        given = leaves_of(self.parameters, coefficients=coefficients, intercept=intercept)
        self.coefficients, self.intercept = given["coefficients"], given["intercept"]
        self.structure = full_scale(
            "covariance",
            covariance,
            self.intercept,
            shared=None,
            diagonal=diagonal,
            singular=True,
            min_spread=min_spread,
        )
        self.inputs, self.frozen = InputFrame.at_zero(self.coefficients), ()

    @property
    def covariance(self) -> Array:
        """Covariance matrices of the residuals, in the shape that the constructor takes."""
        return self.structure.covariance

    def canonical(self) -> JointMoments:
        (k, d, p), log_norm = self.coefficients.shape, self.structure.log_norm()
        half = jnp.full(d, -0.5, log_norm.dtype)
        joint = jnp.broadcast_to(jnp.diag(jnp.pad(half, (1 + p, 0))), (k, 1 + p + d, 1 + p + d))
        return JointMoments(log_norm, joint)

    def log_prob(self, x: Any, tilt: JointMoments) -> Float[Array, "n k"]:
        u, y = x
        k, d, p = self.coefficients.shape
        centred = self.centred()
        origin = centroid(centred[:, :, 0])
        centred = centred - jnp.pad(origin[:, None], ((0, 0), (0, p)))
        whitener = jnp.broadcast_to(self.structure.whitener(), (k, d, d))
        outputs = la.matmul(whitener.reshape(k * d, d), (y - origin).T).reshape(k, d, -1)
        v = self.inputs.standardized(u)
        z = outputs - la.matmul(la.matmul(whitener, centred), v)
        constant = jnp.broadcast_to(self.structure.log_norm() + tilt.scale_count, (k,))
        own = la.repeat(constant, len(y)) - 0.5 * jnp.sum(z**2, axis=1)
        return (own + square_tilt(tilt.joint, jnp.concatenate([v, z], axis=1))).T

    def reframe(self, sums: JointMoments, old: Self) -> JointMoments:
        k, d, _ = self.coefficients.shape
        turn = self.structure.whitener()
        turn = jnp.broadcast_to(la.matmul(turn, old.structure.factor()), (k, d, d))
        change = old.inputs.centred(
            old.coefficients - self.coefficients, old.intercept - self.intercept
        )
        top = jnp.pad(self.inputs.turn_from(old.inputs), ((0, 0), (0, 0), (0, d)))
        bottom = jnp.concatenate([self.structure.whitened_shift(change), turn], axis=2)
        turn = jnp.concatenate([top, bottom], axis=1)
        return sums.turned(turn)

    def _maximum(self, sums: JointMoments) -> tuple[Array, Array]:
        masks = [mask for name, mask in self.frozen if name != "covariance" and mask is not None]
        if any(np.ndim(mask) > 1 for mask in masks):
            directions = self.inputs.directions_of_elements(self)
        else:
            directions = self.inputs.free_directions(self)
        return sums.maximum(directions, self.inputs.unresolved())

    def m_step(self, sums: JointMoments) -> Self:
        step, scatter = self._maximum(sums)
        step = la.matmul(self.structure.factor(), step)
        coefficients, intercept = self.inputs.uncentred(step)
        new = update(
            self,
            coefficients=self.coefficients + coefficients,
            intercept=self.intercept + intercept,
            structure=self.structure.best(scatter, sums.scale_count),
        )
        q = step.shape[2]
        return replace(new, inputs=self.inputs.moved(sums.joint[:, :q, :q]))

    def prior(
        self,
        count: ArrayLike | Mapping[str, ArrayLike] = 0.0,
        *,
        precision: ArrayLike = 0.0,
        coefficients: ArrayLike = 0.0,
        intercept: ArrayLike | None = None,
        covariance: ArrayLike | None = None,
    ) -> Framed:
        """The matrix-normal-inverse-Wishart prior, as pseudo-observations; a ridge by default.

        As if each component had `count` observations at u = 0, of a law with this intercept and
        this covariance, and others that give the coefficients of input j a precision: they are
        N(coefficients_j, Σ/precision_j). Its mode is the law. With
        `count={"intercept": κ, "covariance": ν + d + p + 2}` and `covariance=Ψ / (ν + d + p + 2)`
        the intercept is N(intercept, Σ/κ), and Σ inverse Wishart of scale Ψ and ν degrees of
        freedom.

        **Arguments:** `count` ≥ 0, a number, one for each component, or a mapping from
        "intercept" and "covariance" to such; `precision` ≥ 0, scalar, (p,) or (k, p), in units of
        1/u²; parameters of the law, which broadcast to the present ones. An intercept or a
        covariance that is not given is the present one.

        **Raises:** `ValueError` for a negative count or precision, or what is no covariance.
        """
        k, d, p = self.coefficients.shape
        precision = pseudo_count("precision", precision, self.coefficients[:, 0])
        counts = dict(count) if isinstance(count, Mapping) else dict.fromkeys(_COUNTED, count)
        if unknown := counts.keys() - set(_COUNTED):
            raise ValueError(
                'LinearRegression counts observations of "intercept" and "covariance", not of '
                f"{sorted(unknown)[0]!r}: coefficients have a precision."
            )
        levels, squares = (
            pseudo_count(f"count of {name}", counts.get(name, 0.0), self.intercept[:, 0])
            for name in _COUNTED
        )
        law = {"coefficients": coefficients, "intercept": intercept, "covariance": covariance}
        frame = self.with_parameters(**{name: v for name, v in law.items() if v is not None})
        frame = replace(frame, inputs=InputFrame.at_zero(self.coefficients))
        each = jnp.broadcast_to(squares[:, None], (k, d))
        diagonal = jnp.concatenate([levels[:, None], precision, each], axis=1)
        joint = diagonal[:, :, None] * np.eye(1 + p + d, dtype=diagonal.dtype)
        if self.structure.shared:
            squares = jnp.sum(squares, keepdims=True)
        return Framed(JointMoments(squares, joint), frame)

    def draw(self, key, mean, z):
        return mean + self.structure.noise(key, z, mean.shape[1])

    def degenerate(self, sums: JointMoments) -> Int[Array, " k"]:
        _, scatter = self._maximum(sums)
        within = self.structure.best_covariance(scatter, sums.scale_count)
        centred, structure = self.centred(), self.structure
        level = centred[:, :, 0]
        offset, reach = level - centroid(level), jnp.sum(jnp.abs(centred[:, :, 1:]), axis=2)
        is_free = self.free("covariance")
        if is_free.ndim > 1:  # variances that are frozen are not judged
            offset, reach = jnp.where(is_free, offset, 0), jnp.where(is_free, reach, 0)
            within = jnp.where(is_free[:, :, None], within, jnp.eye(len(is_free[0])))
            structure = replace(structure, log_scale=jnp.where(is_free, structure.log_scale, 0))
            is_free = np.any(is_free, axis=1)
        of_scale = structure.has_collapsed(within, sums.scale_count, offset)
        # Residuals below the rounding of the slopes that they are differences from
        root = la.matmul(structure.factor(), la.cholesky(within))
        thin = ~resolves(jnp.sqrt(jnp.sum(root**2, axis=2)), reach)
        few = jnp.zeros_like(sums.joint[:, 0, 0], bool)
        if not self.structure.shared:
            few = sums.scale_count < self.intercept.shape[1] + self.num_fitted()
        few = (sums.joint[:, 0, 0] < 1) | (few & is_free)
        of_scale = either(of_scale, caused(no_variance=thin)) * is_free
        fitted = free_elements(self, "coefficients").any(axis=2) | free_elements(self, "intercept")
        stays = jnp.any(self.structure.without_variance() & fitted, axis=1)
        return either(caused(few_observations=few), either(of_scale, caused(no_variance=stays)))
