"""Factor analysers: x = μ + Λ z + ε with unobserved factors z ~ N(0, I) and noise ε ~ N(0, Ψ).

E-step. About self, with ρ = Ψ^{-½}(x − μ), W = Ψ^{-½} Λ and P = I + Wᵀ W, factors given x are
N(m, P⁻¹) with m = P⁻¹ Wᵀ ρ, and with r = ρ − W m

    log p(x) = −½ log|2πΨ| − ½ log|P| − ½ ‖m‖² − ½ ‖r‖²,

a sum of squares in O(dq), in which nothing cancels and no d × d matrix appears. Statistics are
those of the regression of x on z: with z̃ = (1, z) and the residual e = Ψ^{-½}(x − μ − Λ z),

    Σ r E z̃ z̃ᵀ,   Σ r E e z̃ᵀ,   Σ r E e²,   E e = r,   Cov(z, e) = −P⁻¹ Wᵀ,   Var e = diag W P⁻¹ Wᵀ.

M-step. With M, G and S these sums, δ = G M⁻¹:

    (μ, Λ) ← (μ, Λ) + Ψ^½ δ,    Ψ ← Ψ (S − 2 δ∘G + δ M∘δ)/n, summed over what shares a variance.

Then the law of the factors is free as well, z ~ N(α, Φ), and goes into the parameters, μ ← μ + Λ α
and Λ ← Λ Φ^½ (parameter expansion). α = 0 and Φ = I at a fixed point. Where a prior counts the step
is plain EM's, whose α and Φ would have to take account of it.

Loadings are found up to a rotation, Λ Λᵀ + Ψ is not.

Rubin & Thayer (1982), Psychometrika 47; Ghahramani & Hinton (1996), mixtures of factor analysers;
Tipping & Bishop (1999), JRSS B 61 (PPCA); Liu, Rubin & Wu (1998), Biometrika 85 (PX-EM).
"""

from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxem._core import linalg as la
from jaxem._core.axis_scales import AxisScale
from jaxem._core.causes import caused, either
from jaxem._core.numerics import ROUNDINGS, centroid, divide, least_log_scale, resolves
from jaxem._core.quadratic import product_tilt, solve_free, square_tilt
from jaxem._core.supports import reals
from jaxem.emissions._family import AbstractConjugateFamily


class FactorMoments(NamedTuple):
    """Moments of the regression of x on z; c × e as the noise variances are shared."""

    scale_count: Float[Array, "c e"]  # how many log-scales count
    inputs: Float[Array, "k q q"]  # Σ r E z̃ z̃ᵀ
    cross: Float[Array, "k d q"]  # Σ r E e z̃ᵀ
    square: Float[Array, "c e"]  # Σ r E e²


class FactorSums(NamedTuple):
    """Sums of data, and apart from them those of a prior."""

    scale_count: Float[Array, "c e"]
    inputs: Float[Array, "k q q"]
    cross: Float[Array, "k d q"]
    square: Float[Array, "c e"]
    prior_scale_count: Float[Array, "c e"]
    prior_inputs: Float[Array, "k q q"]
    prior_cross: Float[Array, "k d q"]
    prior_square: Float[Array, "c e"]

    @property
    def data(self) -> FactorMoments:
        return FactorMoments(*self[:4])

    @property
    def prior(self) -> FactorMoments:
        return FactorMoments(*self[4:])

    @property
    def combined(self) -> FactorMoments:
        return jax.tree.map(jnp.add, self.data, self.prior)

    @property
    def count(self) -> Float[Array, " k"]:
        """How many observations each component has, those of a prior included."""
        return self.combined.inputs[:, 0, 0]


class AbstractFactorModel(AbstractConjugateFamily):
    """Factor analysers: the E-step and the M-step."""

    support: ClassVar = reals("n d")
    mean: eqx.AbstractVar[Float[Array, "k d"]]
    loadings: eqx.AbstractVar[Float[Array, "k d q"]]
    structure: eqx.AbstractVar[AxisScale]

    @property
    def num_factors(self) -> int:
        return self.loadings.shape[2]

    @property
    def noise_variance(self) -> Array:
        """Variances of the noise, in the shape that the constructor takes."""
        return self.structure.covariance

    def _whitened(self, x: Float[Array, "n d"]) -> Float[Array, "k d n"]:
        """ρ = Ψ^{-½}(x − μ)."""
        inverse = jnp.exp(-self.structure.cells(self.mean))
        return inverse[:, :, None] * (x.T - self.mean[:, :, None])

    def _precision(self) -> tuple[Float[Array, "k d q"], Float[Array, "k q q"], Float[Array, " k"]]:
        """W, P = I + Wᵀ W and ½ log|P|."""
        whitened = jnp.exp(-self.structure.cells(self.mean))[:, :, None] * self.loadings
        eye = jnp.eye(self.num_factors, dtype=whitened.dtype)
        precision = eye + la.matmul(la.transpose(whitened), whitened)
        diagonal = jnp.diagonal(la.cholesky(precision), axis1=1, axis2=2)
        return whitened, precision, jnp.sum(jnp.log(diagonal), axis=1)

    def log_prob(self, x: Float[Array, "n d"], tilt: FactorSums) -> Float[Array, "n k"]:
        whitened, precision, half_log_det = self._precision()
        covariance = inverse_of_positive(precision)
        rho = self._whitened(x)
        factors = la.matmul(covariance, la.matmul(la.transpose(whitened), rho))
        residual = rho - la.matmul(whitened, factors)
        inputs = jnp.pad(factors, ((0, 0), (1, 0), (0, 0)), constant_values=1)

        turn = jnp.broadcast_to(tilt.square, self.mean.shape)
        squares = la.matmul((turn - 0.5)[:, None, :], residual**2)[:, 0]
        tilted = square_tilt(tilt.inputs, inputs) + product_tilt(tilt.cross, residual, inputs)
        # What the covariance of factors given x adds, the same for each observation
        moved = la.matmul(whitened, covariance)
        spread = jnp.sum(tilt.inputs[:, 1:, 1:] * covariance, axis=(1, 2))
        spread = spread - jnp.sum(tilt.cross[:, :, 1:] * moved, axis=(1, 2))
        spread = spread + jnp.sum(turn * jnp.sum(moved * whitened, axis=2), axis=1)
        norm = self.structure.log_norm() + tilt.scale_count
        norm = jnp.sum(jnp.broadcast_to(norm, self.mean.shape), axis=1)
        constant = la.repeat(norm - half_log_det + spread, len(x))
        return (constant - 0.5 * jnp.sum(factors**2, axis=1) + squares + tilted).T

    def canonical(self) -> FactorSums:
        k, d, q = self.loadings.shape
        inputs = jnp.zeros((k, 1 + q, 1 + q), self.mean.dtype)
        log_norm, cross = self.structure.log_norm(), jnp.zeros((k, d, 1 + q), self.mean.dtype)
        own = FactorMoments(log_norm, inputs, cross, jnp.full_like(log_norm, -0.5))
        return FactorSums(*own, *own)

    def expected(self) -> FactorSums:
        k, d, q = self.loadings.shape
        count = self.structure.total(jnp.ones_like(self.mean))
        inputs = jnp.broadcast_to(jnp.eye(1 + q, dtype=count.dtype), (k, 1 + q, 1 + q))
        own = FactorMoments(count, inputs, jnp.zeros((k, d, 1 + q), count.dtype), count)
        none: FactorMoments = jax.tree.map(jnp.zeros_like, own)
        return FactorSums(*none, *own)

    def reframe(self, sums: FactorSums, old: Self) -> FactorSums:
        turn = jnp.exp(old.structure.log_scale - self.structure.log_scale)
        shift = jnp.concatenate(
            [(old.mean - self.mean)[:, :, None], old.loadings - self.loadings], axis=2
        )
        shift = jnp.exp(-self.structure.cells(self.mean))[:, :, None] * shift
        rows = jnp.broadcast_to(turn, self.mean.shape)[:, :, None]

        def moved(sums: FactorMoments) -> FactorMoments:
            cross, rise = rows * sums.cross, la.matmul(shift, sums.inputs)
            more = self.structure.total(jnp.sum(shift * (2 * cross + rise), axis=2))
            square = turn**2 * sums.square + more
            return sums._replace(cross=cross + rise, square=square)

        return FactorSums(*moved(sums.data), *moved(sums.prior))

    def maximize(self, sums: FactorSums) -> dict[str, Any]:
        step, structure = self._regression(sums)
        step = jnp.exp(self.structure.cells(self.mean))[:, :, None] * step
        mean, loadings = self.mean + step[:, :, 0], self.loadings + step[:, :, 1:]
        level, root = self._expansion(sums)
        return {
            "mean": mean + la.apply(loadings, level),
            "loadings": la.matmul(loadings, root),
            "structure": structure,
        }

    def _regression(self, sums: FactorSums) -> tuple[Float[Array, "k d q"], AxisScale]:
        """The whitened step of (μ, Λ), and the scale of the noise about its end."""
        both, q = sums.combined, self.num_factors
        rows = [self.free("mean")[:, None], np.repeat(self.free("loadings")[:, None], q, axis=1)]
        directions = np.concatenate(rows, axis=1)[:, :, None] * np.eye(1 + q)
        step = solve_free(both.inputs, both.cross, jnp.asarray(directions, both.cross.dtype))
        moved = jnp.sum(step * (2 * both.cross - la.matmul(step, both.inputs)), axis=2)
        # What is below the rounding of the difference counts as scatter
        exact = 1 - ROUNDINGS * jnp.finfo(moved.dtype).eps
        scatter = both.square - exact * self.structure.total(moved)
        return step, self.structure.best(scatter, both.scale_count)

    def _expansion(self, sums: FactorSums) -> tuple[Float[Array, "k q"], Float[Array, "k q q"]]:
        """α and Φ^½, where mean and loadings are free and no prior counts."""
        data, prior = sums.data, sums.prior
        count = data.inputs[:, 0, 0]
        level = divide(data.inputs[:, 0, 1:], count[:, None])
        spread = divide(data.inputs[:, 1:, 1:], count[:, None, None]) - la.outer(level, level)
        # α and Φ move with a prior even where there is none, as derivatives by it show
        score = la.matmul(la.transpose(self._precision()[0]), prior.cross)
        slope = 0.5 * (score[:, :, 1:] + la.transpose(score[:, :, 1:]))
        level = level + divide(score[:, :, 0], count[:, None])
        spread = spread + divide(slope, count[:, None, None])
        free = jnp.asarray(self.free("mean") & self.free("loadings"))
        alone = jnp.all(prior.inputs == 0, axis=(1, 2)) & jnp.all(prior.scale_count == 0)
        chosen = free & alone & (count > 0)
        eye = jnp.eye(self.num_factors, dtype=spread.dtype)
        root = la.cholesky(jnp.where(chosen[:, None, None], spread, eye))
        return jnp.where(chosen[:, None], level, 0), root

    def sample(self, key: Array, z: Array) -> Float[Array, "n d"]:
        key, factor_key = jax.random.split(key)
        factors = jax.random.normal(factor_key, (len(z), self.num_factors), self.mean.dtype)
        noise = self.structure.noise(key, z, self.mean.shape[1])
        return self.mean[z] + la.apply(self.loadings[z], factors) + noise

    def degenerate(self, sums: FactorSums) -> Int[Array, " k"]:
        """Also where a feature has hardly any noise of its own, a Heywood case."""
        found, structure = self.maximize(sums), self._regression(sums)[1]
        log_noise = 2 * structure.cells(self.mean)
        noise, explained = jnp.exp(log_noise), jnp.sum(found["loadings"] ** 2, axis=2)
        total, count, spread = noise + explained, sums.count, self.structure.min_spread
        within = divide(jnp.sum(count[:, None] * total, axis=0), jnp.sum(count))
        heywood = jnp.any(noise < spread * total, axis=1)
        thin = jnp.any(total < spread * within, axis=1)
        thin = thin | jnp.any(log_noise <= 2 * least_log_scale(self.mean), axis=1)
        thin = thin | ~resolves(jnp.sqrt(noise), self.mean - centroid(self.mean))
        least = 0 if structure.shared else self.num_factors + 2
        of_noise = caused(few_observations=count < least, no_variance=thin, heywood=heywood)
        return either(caused(few_observations=count < 1), of_noise * self.free("noise_variance"))


def inverse_of_positive(precision: Float[Array, "k q q"]) -> Float[Array, "k q q"]:
    root = la.inverse_of_lower(la.cholesky(precision))
    return la.matmul(la.transpose(root), root)
