"""What regressions with a link function share: generalised linear models.

With η = W u + b, log p = Σ_d [y η − A(η)] up to a term in y. There are no sufficient statistics:
coordinates are the coefficients θ of ṽ = (1, v), the inputs about their own mean and scale (see
`_inputs.py`), and statistics are a quadratic about the frame θ₀, in steps δ = θ − θ₀,

    Q ≈ value + g·δ − ½ δᵀ H δ,    g = Σ r (y − A′(η)) ṽ,    H = Σ r w(η) ṽ ṽᵀ.

The cotangents of θ and of a quadratic form that is zero are g and H. Reframing shifts the point
of expansion, which is exact for the quadratic. M-step: δ = H⁻¹ g. At a fixed point g = 0
whatever H is, so that implicit derivatives are exact.

Wedel & DeSarbo (1995), J. Classification 12; Green (1984), JRSS B 46 (IRLS).
"""

import abc
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_continuous, check_counts, check_shape, check_values, num_features
from jaxem._emission import AbstractEmission, pull_back
from jaxem._hold import Held, replace
from jaxem._statistics import Framed
from jaxem._units import weighted_mean
from jaxem.emissions._common import as_float, divide, filled, pseudo_count
from jaxem.emissions._inputs import (
    InputFrame,
    along,
    given_inputs,
    inputs_and_outputs,
    share_within,
    solve_free,
)

_POOLED_STEPS = 25


class Quadratic(NamedTuple):
    """Q about the frame, in coefficients of ṽ times a unit that makes it dimensionless."""

    value: Float[Array, ""]
    units: Float[Array, " k"]  # Σ r
    score: Float[Array, "k d q"]
    curvature: Float[Array, "k d q q"]


class GeneralizedLinear(AbstractEmission):
    """What the families share; each says its density, its curvature and its unit."""

    natural: ClassVar[dict[str, tuple[str, ...]]] = {"weights": ("weights",), "bias": ("bias",)}
    has_sufficient_statistics: ClassVar[bool] = False
    max_step: eqx.AbstractClassVar[float]  # root mean square of a step's change of η
    weights: Float[Array, "k d p"]
    bias: Float[Array, "k d"]
    inputs: InputFrame
    held: Held = eqx.field(static=True)

    def __init__(self, weights: ArrayLike, bias: ArrayLike):
        self.weights = as_float(weights)
        check_shape("weights", self.weights, ("k", "d", "p"))
        self.bias = jnp.asarray(bias, self.weights.dtype)
        check_shape("bias", self.bias, self.weights.shape[:2])
        check_values(jnp.isfinite(self.weights), "weights hold a NaN or an infinity.")
        check_values(jnp.isfinite(self.bias), "bias holds a NaN or an infinity.")
        self.inputs = InputFrame.at_zero(self.weights)
        self.held = ()

    @abc.abstractmethod
    def _log_prob(self, eta: Float[Array, "k d n"], y: Float[Array, "d n"]) -> Array:
        """log p(y | η), each feature by itself."""

    @abc.abstractmethod
    def _curvature(self, eta: Float[Array, "k d n"]) -> Array:
        """w(η)."""

    @abc.abstractmethod
    def _unit(self) -> Float[Array, "k d"]:
        """The square root of w at the mean of the inputs."""

    @classmethod
    @abc.abstractmethod
    def _link(cls, mean: Array) -> Array:
        """The η at which the mean of y is this."""

    @classmethod
    @abc.abstractmethod
    def _mean(cls, eta: Array) -> Array:
        """The mean of y at η."""

    @property
    def num_components(self) -> int:
        return self.bias.shape[0]

    @property
    def num_free_parameters(self) -> int:
        _, d, p = self.weights.shape
        return int(d * (p * np.sum(self.free("weights")) + np.sum(self.free("bias"))))

    def predict(self, u: Float[Array, "n p"]) -> Float[Array, "n k d"]:
        """The mean of the outputs under each component (at an exposure of 1)."""
        return jnp.moveaxis(self._mean(self._eta(self._coefficients(), (u, None))), 2, 0)

    def _coefficients(self) -> Float[Array, "k d q"]:
        return self.inputs.coefficients(self.weights, self.bias)

    def _eta(self, coefficients: Array, x: Any) -> Float[Array, "k d n"]:
        u, _, *exposure = x
        eta = la.matmul(coefficients, self.inputs.standardized(u))
        return eta + jnp.log(exposure[0]).T if exposure else eta

    def coordinates(self) -> tuple[Array, Array, Array]:
        coefficients = self._coefficients()
        k, d, q = coefficients.shape
        zeros = jnp.zeros((k, d, q, q), coefficients.dtype)
        return zeros[:, 0, 0, 0], coefficients, zeros

    def log_prob_at(self, coordinates: Any, x: Any) -> Float[Array, "n k"]:
        constant, coefficients, quadratic = coordinates
        y = x[1].astype(coefficients.dtype).T
        eta = self._eta(coefficients, x)
        square = along(quadratic, self.inputs.standardized(x[0])[:, None])
        log_prob = self._log_prob(eta, y) + self._curvature(eta) * square
        return (constant[:, None] + jnp.sum(log_prob, axis=1)).T

    def statistics(self, cotangents: Any) -> Quadratic:
        units, score, quadratic = cotangents
        unit = self._unit()[:, :, None]
        curvature = (quadratic + la.transpose(quadratic)) / unit[..., None] ** 2
        return Quadratic(jnp.zeros((), units.dtype), units, score / unit, curvature)

    def reframe(self, sums: Quadratic, old: Self) -> Quadratic:
        unit = old._unit()[:, :, None]
        step = unit * old.inputs.coefficients(self.weights - old.weights, self.bias - old.bias)
        pull = la.apply(sums.curvature, step)
        value = sums.value + jnp.sum(step * (sums.score - 0.5 * pull))
        turn = (
            self.inputs.turn_from(old.inputs)[:, None]
            * (unit / self._unit()[:, :, None])[..., None]
        )
        curvature = la.matmul(la.matmul(turn, sums.curvature), la.transpose(turn))
        return Quadratic(value, sums.units, la.apply(turn, sums.score - pull), curvature)

    def maximize(self, sums: Quadratic) -> Self:
        directions = self.inputs.directions(self)[:, None]
        step = solve_free(sums.curvature, sums.score[:, :, None], directions)[:, :, 0]
        # A change of η by more than this, in the mean over units, is beyond the quadratic. With
        # collinear inputs it is less than their coefficients say, with a prior less than H says.
        unit = self._unit()[:, :, None]
        limit = self.max_step**2 * unit**2
        by_curvature = jnp.sum(step * la.apply(sums.curvature, step), axis=2, keepdims=True)
        by_curvature = divide(by_curvature, sums.curvature[:, :, :1, 0])
        reach = jnp.minimum(jnp.sum(step**2, axis=2, keepdims=True), by_curvature)
        share = share_within(reach, limit)
        weights, bias = self.inputs.uncentred(share * step / unit)
        new = self.update(weights=self.weights + weights, bias=self.bias + bias)
        return replace(new, inputs=self.inputs.moved(jnp.sum(sums.curvature, axis=1)))

    def _mean_of(self, z: Array, inputs: Array | None) -> Float[Array, "n d"]:
        """The mean under component z. Raises `ValueError` without inputs."""
        mean = self.predict(given_inputs(inputs))
        return jnp.take_along_axis(mean, z[:, None, None], axis=1)[:, 0]

    def expected_log_prob(self, sums: Quadratic) -> Float[Array, ""]:
        return sums.value

    def prior(
        self,
        weights: ArrayLike = 0.0,
        precision: ArrayLike = 0.0,
        bias: ArrayLike = 0.0,
        bias_precision: ArrayLike = 0.0,
    ) -> Framed:
        """Normal priors of the coefficients, as pseudo-statistics; a ridge by default.

        **Arguments:** means `weights`, broadcasting to (k, d, p), and `bias`, to (k, d); and their
        precisions ≥ 0, broadcasting likewise.

        **Raises:** `ValueError` for a negative precision.
        """
        frame = replace(
            self,
            weights=filled("weights", weights, self.weights),
            bias=filled("bias", bias, self.bias),
            inputs=InputFrame.at_zero(self.weights),
        )
        own = pseudo_count("bias_precision", bias_precision, self.bias)
        others = pseudo_count("precision", precision, self.weights)
        diagonal = jnp.concatenate([own[:, :, None], others], axis=2)
        diagonal = diagonal / frame._unit()[:, :, None] ** 2
        zeros = jnp.zeros_like(diagonal)
        curvature = diagonal[..., None] * np.eye(diagonal.shape[2], dtype=diagonal.dtype)
        return Framed(Quadratic(zeros[0, 0, 0], zeros[:, 0, 0], zeros, curvature), frame)

    def degenerate(self, sums: Quadratic, min_variance: Any) -> Bool[Array, " k"]:
        fitted = self.weights.shape[2] * self.free("weights") + self.free("bias")
        return sums.units < np.maximum(fitted, 1)

    @classmethod
    def pooled(cls, x, num_components, weights):
        u, y, *exposure = inputs_and_outputs(x, cls.__name__, most=3)
        check_continuous(u, num_features(u), weights.dtype, f"{cls.__name__} (inputs)")
        check_counts(y, num_features(y), weights.dtype, f"{cls.__name__} (outputs)")
        if exposure:
            check_continuous(exposure[0], y.shape[1], weights.dtype, f"{cls.__name__} (exposures)")
        n = jnp.sum(weights)
        mean = (n * weighted_mean(y.astype(weights.dtype), weights) + 0.5) / (n + 1)
        offset = jnp.log(weighted_mean(exposure[0], weights)) if exposure else 0
        line = replace(
            object.__new__(cls),
            weights=jnp.zeros((1, y.shape[1], u.shape[1]), weights.dtype),
            bias=(cls._link(mean) - offset)[None],
            inputs=InputFrame.pooled(u, weights),
            held=(),
        )

        def again(_: Any, line: Self) -> Self:
            cotangents = pull_back(line, line.coordinates(), x, weights[:, None])
            return line.maximize(line.statistics(cotangents))

        line = lax.fori_loop(0, _POOLED_STEPS, again, line)
        return line._repeated(num_components)

    def _repeated(self, num_components: int) -> Self:
        def rows(leaf: Array) -> Array:
            return jnp.broadcast_to(leaf[:1], (num_components, *leaf.shape[1:]))

        inputs = self.inputs.repeated(num_components)
        return replace(self, weights=rows(self.weights), bias=rows(self.bias), inputs=inputs)

    def located_at(self, x: Any, spread: Any) -> Self:
        """The pooled regression shifted half-way to each unit."""
        y = x[1].astype(self.bias.dtype)
        eta = self._eta(self._coefficients(), x)[0].T
        shift = self._link(0.5 * (y + self._mean(eta))) - eta
        lines = self._repeated(y.shape[0])
        return replace(lines, bias=lines.bias + shift)

    def shortcut(self) -> None:
        return None
