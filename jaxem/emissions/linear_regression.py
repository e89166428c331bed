"""Linear regressions with Gaussian residuals: y | u, z = k ~ N(Wₖ u + bₖ, Σₖ).

E-step. With L the Cholesky factor of Σ, v the inputs about their own mean and scale (see
`_inputs.py`) and t = (1, v, z), z = L⁻¹(y − W u − b),

    log p = −½‖z‖² − Σ log diag L − ½ d log 2π + ½ tᵀ C t,    C = 0.

C is a direction in which the density is differentiated; its cotangent is half of Σ r t tᵀ,
moments of inputs and of whitened residuals about the component's own regression. In another frame
t′ = R t: reframing is a congruence.

M-step. With M = Σr ṽ ṽᵀ, G = Σr z ṽᵀ and S = Σr z zᵀ the blocks of the moments, ṽ = (1, v):

    δ = G M⁻¹,    (b + W c, W s) ← (b + W c, W s) + L δ,    Σ ← L (S − Gδᵀ − δGᵀ + δMδᵀ) Lᵀ / n.

Collinear inputs, and inputs that do not vary in a component, are no error: the weights of those
that the intercept and the inputs before them explain stay where they are.

DeSarbo & Cron (1988), J. Classification 5; for HMMs, Hamilton (1990), J. Econometrics 45.
"""

from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_continuous, check_shape, check_values, num_features
from jaxem._emission import AbstractEmission, finite, pull_back
from jaxem._hold import Held, held_mask, replace
from jaxem._statistics import Framed
from jaxem.emissions._common import (
    ROUNDINGS,
    as_float,
    centroid,
    divide,
    filled,
    pseudo_count,
    resolved,
)
from jaxem.emissions._inputs import (
    InputFrame,
    along,
    check_regression,
    given_inputs,
    inputs_and_outputs,
    solve_free,
)
from jaxem.emissions.gaussian import Gaussian, Moments, TiedGaussian, factored


class JointMoments(NamedTuple):
    """Moments of t = (1, v, z); c is k, or 1 where the covariance is shared."""

    scale_count: Array  # how many log-scales count, (c,)
    joint: Float[Array, "k t t"]  # Σ r t tᵀ


class LinearRegression(AbstractEmission):
    """Regressions of outputs on inputs, one for each component. Data: a tuple (u, y).

    With lagged outputs as inputs (`Sequences.lagged`) an HMM of it is an autoregressive HMM.
    The density is that of y given u: nothing is said about u.

    **Arguments:** `weights` (k, d, p); `bias` (k, d), the value at u = 0; `covariance` (k, d, d)
    of the residuals, or (d, d) shared by all components. Data: inputs u (n, p), outputs y (n, d).
    As a `family`, `functools.partial(LinearRegression, tied=True)` shares the covariance.

    **Raises:** `ValueError` for other shapes, or values that are not a covariance.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "weights": ("weights",),
        "bias": ("bias",),
        "covariance": ("log_scale", "below"),
    }
    weights: Float[Array, "k d p"]
    bias: Float[Array, "k d"]
    log_scale: Float[Array, "c d"]
    below: Float[Array, "c d d"]
    inputs: InputFrame
    held: Held = eqx.field(static=True)
    tied: bool = eqx.field(static=True)

    def __init__(self, weights: ArrayLike, bias: ArrayLike, covariance: ArrayLike):
        self.weights = as_float(weights)
        check_shape("weights", self.weights, ("k", "d", "p"))
        k, d, _ = self.weights.shape
        self.bias = jnp.asarray(bias, self.weights.dtype)
        check_shape("bias", self.bias, (k, d))
        check_values(jnp.isfinite(self.weights), "weights hold a NaN or an infinity.")
        check_values(jnp.isfinite(self.bias), "bias holds a NaN or an infinity.")
        covariance = jnp.asarray(covariance, self.weights.dtype)
        self.tied = covariance.ndim == 2
        check_shape("covariance", covariance, (d, d) if self.tied else (k, d, d))
        self.log_scale, self.below = factored("covariance", covariance.reshape(-1, d, d))
        self.inputs = InputFrame.at_zero(self.weights)
        self.held = ()

    @property
    def covariance(self) -> Array:
        """Covariance matrices of the residuals, in the shape that the constructor takes."""
        return self._residuals().covariance

    @property
    def num_components(self) -> int:
        return self.bias.shape[0]

    @property
    def num_free_parameters(self) -> int:
        _, d, p = self.weights.shape
        lines = d * (p * np.sum(self.free("weights")) + np.sum(self.free("bias")))
        return int(lines + d * (d + 1) // 2 * np.sum(self.free("covariance")))

    def check(self, x: Any) -> None:
        who = type(self).__name__
        check_regression(x, self.weights, who)
        check_continuous(x[1], self.bias.shape[1], self.bias.dtype, f"{who} (outputs)")

    def in_support(self, x: Any) -> Bool[Array, " n"]:
        return finite(x)

    def predict(self, u: Float[Array, "n p"]) -> Float[Array, "n k d"]:
        """W u + b, the mean of the outputs under each component."""
        coefficients = self.inputs.coefficients(self.weights, self.bias)
        return jnp.moveaxis(la.matmul(coefficients, self.inputs.standardized(u)), 2, 0)

    def _factor(self) -> Float[Array, "c d d"]:
        return la.lower(self.log_scale, self.below)

    def _residuals(self) -> Gaussian | TiedGaussian:
        """Gaussians of the outputs at the mean of each component's inputs."""
        family = TiedGaussian if self.tied else Gaussian
        level = self.inputs.coefficients(self.weights, self.bias)[:, :, 0]
        mask = held_mask(self, "covariance")
        held = () if mask is False else (("covariance", None if mask is True else tuple(mask)),)  # pyright: ignore[reportArgumentType]
        return replace(
            object.__new__(family),
            mean=level,
            log_scale=self.log_scale,
            below=self.below,
            held=held,
            expanded=False,
        )

    def coordinates(self) -> Float[Array, "k t t"]:
        k, d, p = self.weights.shape
        return jnp.zeros((k, 1 + p + d, 1 + p + d), self.bias.dtype)

    def log_prob_at(self, coordinates: Array, x: Any) -> Float[Array, "n k"]:
        u, y = x
        k, d, p = self.weights.shape
        lines = self.inputs.coefficients(self.weights, self.bias)
        origin = centroid(lines[:, :, 0])
        lines = lines - jnp.pad(origin[:, None], ((0, 0), (0, p)))
        whitener = jnp.broadcast_to(la.inverse_of_lower(self._factor()), (k, d, d))
        outputs = la.matmul(whitener.reshape(k * d, d), (y - origin).T).reshape(k, d, -1)
        v = self.inputs.standardized(u)
        z = outputs - la.matmul(la.matmul(whitener, lines), v)
        own = self._residuals()._log_norm()[:, None] - 0.5 * jnp.sum(z**2, axis=1)
        return (own + along(coordinates, jnp.concatenate([v, z], axis=1))).T

    def statistics(self, cotangents: Array) -> JointMoments:
        joint = cotangents + la.transpose(cotangents)
        return JointMoments(self._share(joint[:, 0, 0]), joint)

    def _share(self, per_component: Array) -> Array:
        """Sums over the components that share one covariance."""
        return jnp.sum(per_component, axis=0, keepdims=True) if self.tied else per_component

    def reframe(self, sums: JointMoments, old: Self) -> JointMoments:
        k, d, p = self.weights.shape
        whitener = la.inverse_of_lower(self._factor())
        turn = jnp.broadcast_to(la.matmul(whitener, old._factor()), (k, d, d))
        lines = old.inputs.coefficients(old.weights - self.weights, old.bias - self.bias)
        top = jnp.pad(self.inputs.turn_from(old.inputs), ((0, 0), (0, 0), (0, d)))
        bottom = jnp.concatenate([la.matmul(whitener, lines), turn], axis=2)
        turn = jnp.concatenate([top, bottom], axis=1)
        joint = la.matmul(la.matmul(turn, sums.joint), la.transpose(turn))
        return JointMoments(sums.scale_count, joint)

    def maximize(self, sums: JointMoments) -> Self:
        step, scatter = self._whitened_maximum(sums)
        factor = self._factor()
        weights, bias = self.inputs.uncentred(la.matmul(factor, step))
        log_scale, below = la.parts_of_lower(la.matmul(factor, la.cholesky(scatter)))
        new = self.update(
            weights=self.weights + weights, bias=self.bias + bias, log_scale=log_scale, below=below
        )
        q = step.shape[2]
        return replace(new, inputs=self.inputs.moved(sums.joint[:, :q, :q]))

    def _whitened_maximum(self, sums: JointMoments) -> tuple[Array, Array]:
        """Step of the coefficients, and the covariance about where it leads, whitened by self."""
        q = 1 + self.weights.shape[2]
        moments, cross = sums.joint[:, :q, :q], sums.joint[:, q:, :q]
        step = solve_free(moments, cross, self.inputs.directions(self))
        # Sums of squares about the new lines, also where they are no free maximum; what is below
        # the rounding of those about the old ones is not known to be less.
        moved = la.matmul(2 * cross - la.matmul(step, moments), la.transpose(step))
        moved = self._share(0.5 * (moved + la.transpose(moved)))
        eye = jnp.eye(step.shape[1], dtype=step.dtype)
        trace = jnp.abs(jnp.trace(moved, axis1=1, axis2=2))
        unknown = 4 * ROUNDINGS * jnp.finfo(step.dtype).eps * trace
        scatter = self._share(sums.joint[:, q:, q:]) - moved + unknown[:, None, None] * eye
        count = sums.scale_count[:, None, None]
        return step, jnp.where(count > 0, divide(scatter, count), eye)

    def expected_log_prob(self, sums: JointMoments) -> Float[Array, ""]:
        q = 1 + self.weights.shape[2]
        trace = jnp.trace(sums.joint[:, q:, q:], axis1=1, axis2=2)
        return jnp.sum(sums.scale_count * self._residuals()._log_norm()) - 0.5 * jnp.sum(trace)

    def prior(
        self,
        weights: ArrayLike = 0.0,
        precision: ArrayLike = 0.0,
        bias: ArrayLike | None = None,
        bias_count: ArrayLike = 0.0,
        covariance: ArrayLike | None = None,
        covariance_count: ArrayLike = 0.0,
    ) -> Framed:
        """The matrix-normal-inverse-Wishart prior, as pseudo-observations; a ridge by default.

        The weights of input j are N(weights_j, Σ/precision_j), the bias is N(bias, Σ/bias_count),
        and Σ is as if `covariance_count` residuals had been seen with covariance `covariance`:
        inverse Wishart, ν₀ = covariance_count − d − p − 2 and Ψ = covariance_count · covariance.

        **Arguments:** `weights`, broadcasting to (k, d, p); `precision` ≥ 0, scalar, (p,) or
        (k, p), in units of 1/u²; `bias` (d,) or (k, d) and `covariance` as in the constructor or
        (d, d), defaults the present ones; counts ≥ 0, scalar or one for each bias or covariance.

        **Raises:** `ValueError` for a negative count or precision, or what is no covariance.
        """
        k, d, p = self.weights.shape
        precision = pseudo_count("precision", precision, self.weights[:, 0])
        bias_count = pseudo_count("bias_count", bias_count, self.bias[:, 0])
        covariances = self._residuals().prior(bias, 0.0, covariance, covariance_count)
        residuals, (scale_count, *_) = covariances.frame, covariances.sums
        frame = replace(
            self,
            weights=filled("weights", weights, self.weights),
            bias=self.bias if bias is None else residuals.mean,
            log_scale=residuals.log_scale,
            below=residuals.below,
            inputs=InputFrame.at_zero(self.weights),
        )
        each = jnp.broadcast_to(scale_count / (k if self.tied else 1), (k,))
        squares = jnp.broadcast_to(each[:, None], (k, d))
        diagonal = jnp.concatenate([bias_count[:, None], precision, squares], axis=1)
        joint = diagonal[:, :, None] * np.eye(1 + p + d, dtype=diagonal.dtype)
        return Framed(JointMoments(scale_count, joint), frame)

    def sample(
        self, key: Array, z: Int[Array, " n"], inputs: Float[Array, "n p"] | None = None
    ) -> tuple[Array, Array]:
        """Outputs drawn from component z at the given `inputs`, and the inputs with them.

        **Raises:** `ValueError` without inputs: a regression has no distribution of them.
        """
        inputs = given_inputs(inputs)
        k, d, _ = self.weights.shape
        mean = jnp.take_along_axis(self.predict(inputs), z[:, None, None], axis=1)[:, 0]
        factor = jnp.broadcast_to(self._factor(), (k, d, d))[z]
        noise = jax.random.normal(key, mean.shape, mean.dtype)
        return inputs, mean + la.apply(factor, noise)

    def degenerate(self, sums: JointMoments, min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        _, scatter = self._whitened_maximum(sums)
        about = jnp.zeros_like(self.bias)
        moments = Moments(
            sums.scale_count, sums.joint[:, 0, 0], about, scatter * sums.scale_count[:, None, None]
        )
        thin = self._residuals().degenerate(moments, min_variance)
        # Residuals below the rounding of the slopes that they are differences from
        root = la.matmul(self._factor(), la.cholesky(scatter))
        slopes = self.inputs.coefficients(self.weights, self.bias)[:, :, 1:]
        reach = jnp.sum(jnp.abs(slopes), axis=2)
        exact = ~resolved(reach, jnp.sqrt(jnp.sum(root**2, axis=2)))
        thin = thin | (exact & self.free("covariance"))
        if self.tied:
            return thin
        _, d, p = self.weights.shape
        fitted = p * self.free("weights") + self.free("bias")
        return thin | ((sums.scale_count < d + fitted) & self.free("covariance"))

    @classmethod
    def pooled(cls, x, num_components, weights, tied: bool = False):
        u, y = inputs_and_outputs(x, cls.__name__)
        check_continuous(u, num_features(u), y.dtype, f"{cls.__name__} (inputs)")
        check_continuous(y, num_features(y), u.dtype, f"{cls.__name__} (outputs)")
        outputs = TiedGaussian.pooled(y, 1, weights)
        line = replace(
            object.__new__(cls),
            weights=jnp.zeros((1, y.shape[1], u.shape[1]), y.dtype),
            bias=outputs.mean,
            log_scale=outputs.log_scale,
            below=outputs.below,
            inputs=InputFrame.pooled(u, weights),
            held=(),
            tied=tied,
        )
        for _ in range(2):  # the second time about the line itself
            cotangents = pull_back(line, line.coordinates(), x, weights[:, None])
            line = line.maximize(line.statistics(cotangents))
        return line._repeated(num_components, num_components)

    def _repeated(self, num_components: int, num_covariances: int) -> Self:
        c = 1 if self.tied else num_covariances

        def rows(leaf: Array, size: int) -> Array:
            return jnp.broadcast_to(leaf[:1], (size, *leaf.shape[1:]))

        return replace(
            self,
            weights=rows(self.weights, num_components),
            bias=rows(self.bias, num_components),
            log_scale=rows(self.log_scale, c),
            below=rows(self.below, c),
            inputs=self.inputs.repeated(num_components),
        )

    def located_at(self, x: Any, spread: Float[Array, ""]) -> Self:
        """The pooled regression shifted through each unit: units differ by their residuals."""
        u, y = x
        k = y.shape[0]
        spread = jnp.maximum(spread, jnp.finfo(y.dtype).tiny)
        lines = self._repeated(k, k)
        return replace(
            lines,
            bias=lines.bias + y - self.predict(u)[:, 0],
            log_scale=lines.log_scale + 0.5 * jnp.log(spread),
            below=lines.below * jnp.sqrt(spread),
        )

    def shortcut(self) -> None:
        return None
