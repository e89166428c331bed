"""Multivariate Student t components: Gaussians whose precision varies between observations.

With latent u ~ Gamma(ν/2, ν/2) and x | u ~ N(μ, Σ/u), y = L⁻¹(x − μ) for Σ = L Lᵀ, δ = ‖y‖²:

    log p(x) = a + cᵥ − ½(ν + d) log(1 + δ/ν),    a = −log|L| − ½ d log 2π.

E-step. w = E u = (ν + d)/(ν + δ), and E log u = log w + ψ(h) − log h with h = (ν + d)/2.
Statistics are the Gaussian moments (Σr, Σrw, Σrw y, Σrw y yᵀ), which reframe as a Gaussian's do,
and Σ r (E log u − w + 1).

M-step. First ν maximises Σr (h log h − h − log Γ(h)) + h Σr (E log u − u + 1) in h = ν/2. Mean and
scale are a Gaussian's, and the scale is divided by α more, the best scale of u in a model where
that is free (parameter expansion: α = Σrw/Σr, so that Σrw divides the scatter where Σr did). α is 1
at a fixed point; steps ascend the likelihood, with a prior too, whose moments are therefore kept
apart. All is a function of the sums, with the new ν where a prior makes α depend on it.

Kent, Tyler & Vardi (1994), Commun. Stat. Simul. 23; Liu & Rubin (1995), Statistica Sinica 5;
Meng & van Dyk (1997), JRSS B 59; Liu, Rubin & Wu (1998), Biometrika 85 (PX-EM);
Peel & McLachlan (2000), Stat. Comput. 10 (mixtures).
"""

import functools
import math
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.constraints import leaves_of, positive, real
from jaxem._core.full_scales import FullScale, full_scale, pooled_full_scale
from jaxem._core.newton import maximize_by_newton
from jaxem._core.numerics import divide
from jaxem._core.parameters import Frozen
from jaxem._core.scales import MIN_SPREAD, Moments, ScaleParameter
from jaxem._core.special import binet, binet_slope, gamma_log_norm, log1p_minus
from jaxem.emissions._location_scale import AbstractLocationScale

# Where estimated degrees of freedom end: below, the likelihood is unbounded at a single observation
# (d = 1: ν < 1/(n − 1), Fernández & Steel 1999); above, no data tell a t from a Gaussian.
LEAST_DOF, MOST_DOF = 0.1, 1000.0


def _bounds(dtype: Any) -> tuple[float, float]:
    return math.log(LEAST_DOF), math.log(MOST_DOF)


class ScaledMoments(NamedTuple):
    """Sums of data, and apart from them those of a prior."""

    scale_count: Float[Array, " k"]  # Σ r
    mean_count: Float[Array, " k"]  # Σ r w
    first: Float[Array, "k d"]  # Σ r w y
    second: Float[Array, "k d d"]  # Σ r w y yᵀ
    log_weight: Float[Array, " k"]  # Σ r (E log u − w + 1)
    prior_scale_count: Float[Array, " k"]
    prior_mean_count: Float[Array, " k"]
    prior_first: Float[Array, "k d"]
    prior_second: Float[Array, "k d d"]
    dof_count: Float[Array, " k"]
    prior_log_weight: Float[Array, " k"]

    @property
    def count(self) -> Float[Array, " k"]:
        """How many observations each component has, those of a prior included."""
        return self.scale_count + self.prior_mean_count + self.prior_scale_count

    @property
    def data(self) -> Moments:
        return Moments(*self[:4])

    @property
    def prior(self) -> Moments:
        return Moments(*self[5:9])

    @property
    def combined(self) -> Moments:
        return jax.tree.map(jnp.add, self.data, self.prior)


class StudentT(AbstractLocationScale):
    """Multivariate t distributions, each with its own full scale matrix and degrees of freedom.

    **Arguments:** `mean` (k, d), for ν ≤ 1 the location; `scale` (k, d, d), positive definite: the
    covariance is ν/(ν − 2) times it; `dof` (k,) or (), positive; `min_spread`, as for `Gaussian`.
    Starts have ν = 2, tails heavy enough to leave outliers to no component of their own. As a
    `family`, `functools.partial(StudentT, dof=4.0)` starts there, and
    `freeze(model, "components.dof")` keeps it.

    Estimated `dof` lie in [0.1, 1000], and a start outside goes to the bound. At 1000 the data are
    indistinguishable from Gaussian ones; a component at 0.1 is `degenerate`: no likelihood is
    bounded much below it.

    **Raises:** `ValueError` for other shapes, or values that are not a scale or positive.
    """

    parameters: ClassVar = {
        "mean": real(
            "mean",
            "k d",
            role="location",
            counted=(*ScaledMoments._fields[:5], "prior_mean_count", "prior_first"),
        ),
        "scale": ScaleParameter(
            "structure",
            functools.partial(pooled_full_scale, tied=False),
            counted=("prior_scale_count", "prior_second"),
        ),
        "dof": positive(
            "log_dof",
            "k",
            reference=2.0,
            bounds=_bounds,
            collapsed="lower",
            role="shape",
            broadcasts=True,
            counted=("dof_count", "prior_log_weight"),
        ),
    }
    mean: Float[Array, "k d"]
    structure: FullScale
    log_dof: Float[Array, " k"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(
        self,
        mean: ArrayLike,
        scale: ArrayLike,
        dof: ArrayLike,
        *,
        min_spread: float = MIN_SPREAD,
    ):
        leaves = leaves_of(self.parameters, mean=mean, dof=dof)
        self.mean, self.log_dof, self.frozen = leaves["mean"], leaves["log_dof"], ()
        self.structure = full_scale("scale", scale, self.mean, min_spread=min_spread)

    @property
    def scale(self) -> Float[Array, "k d d"]:
        """Scale matrices; the covariances are dof/(dof − 2) times these."""
        return self.structure.covariance

    @property
    def dof(self) -> Float[Array, " k"]:
        """Degrees of freedom."""
        return jnp.exp(self.log_dof)

    def log_prob(self, x: Float[Array, "n d"], tilt: ScaledMoments) -> Float[Array, "n k"]:
        n, d = x.shape
        moments = tilt.data._replace(mean_count=jnp.zeros_like(tilt.mean_count))
        log_norm, y = self.structure.whitened(x, self.mean, moments)
        distance = jnp.sum(y * y, axis=1)
        dof = self.dof[:, None]
        added = la.repeat(-2 * tilt.mean_count, n)  # d log p / dδ = −½ w
        tail = -0.5 * (dof + d) * jnp.log1p((distance + added) / dof)
        half = 0.5 * (dof + d)
        constant = binet_slope(half) - 0.5 / half
        distance = jnp.minimum(distance, jnp.finfo(x.dtype).max ** 0.5)  # no ∞/∞ below
        log_weight = -jnp.log1p((distance - d) / (dof + d))
        own = log1p_minus((d - distance) / (dof + distance), log_weight) + constant
        constant = la.repeat(log_norm + self._log_norm(), n)
        return (constant + tail + la.repeat(tilt.log_weight, n) * own).T

    def _log_norm(self) -> Float[Array, " k"]:
        """log Γ((ν + d)/2) − log Γ(ν/2) − ½ d log(ν/2): it vanishes as ν grows."""
        half, rise = 0.5 * self.dof, 0.5 * self.mean.shape[1]
        stirling = (half + rise - 0.5) * jnp.log1p(rise / half) - rise
        return stirling + binet(half + rise) - binet(half)

    def canonical(self) -> ScaledMoments:
        half = 0.5 * self.dof
        norm, gaussian = gamma_log_norm(half), self.structure.canonical(self.mean)
        data = gaussian._replace(scale_count=gaussian.scale_count + norm)
        return ScaledMoments(*data, half, *gaussian, norm, half)

    def expected(self) -> ScaledMoments:
        moments = self.structure.expected(self.mean)
        none = jax.tree.map(jnp.zeros_like, moments)
        half = 0.5 * self.dof
        log_weight = binet_slope(half) - 0.5 / half
        sums = (*none, none.mean_count, *moments, jnp.ones_like(half), log_weight)
        return ScaledMoments(*sums)

    def reframe(self, sums: ScaledMoments, old: Self) -> ScaledMoments:
        data, prior = (
            self.structure.reframe(moments, self.mean, old.structure, old.mean)
            for moments in (sums.data, sums.prior)
        )
        return ScaledMoments(*data, sums.log_weight, *prior, *sums[9:])

    def maximize(self, sums: ScaledMoments) -> dict[str, Any]:
        log_dof = self._best_log_dof(sums)
        both, expansion = sums.combined, self._expansion(sums, jnp.exp(log_dof))
        # A scale is divided by α where more observations count
        both = both._replace(scale_count=expansion * both.scale_count)
        step, structure = self.structure.maximum(both, self.free("mean"))
        mean = self.mean + self.structure.apply(step)
        return {"mean": mean, "structure": structure, "log_dof": log_dof}

    def _expansion(self, sums: ScaledMoments, dof: Float[Array, " k"]) -> Float[Array, " k"]:
        """α: the scale of u that is best along with a scale matrix divided by it.

        It maximises ½ d p log α − ½ t α − ½ν (Σrw/α + Σr log α), where the prior has count p and
        trace t about the new mean and in the scale that α = 1 would have.
        """
        d, prior = self.mean.shape[1], sums.prior
        both = sums.combined
        step, scatter = self.structure.scatter(both, self.free("mean"))
        scatter = self.structure.best_covariance(scatter, both.scale_count)
        cross = la.outer(prior.first, step)
        about = prior.second - cross - la.transpose(cross)
        about = about + prior.mean_count[:, None, None] * la.outer(step, step)
        whitener = la.inverse_of_lower(la.cholesky(scatter))
        about = la.matmul(la.matmul(whitener, about), la.transpose(whitener))
        trace = jnp.trace(about, axis1=1, axis2=2)
        # t α² + b α = c
        b = dof * sums.scale_count - d * prior.scale_count
        c = dof * sums.mean_count
        some = c > 0
        root = jnp.sqrt(jnp.where(some, b**2 + 4 * trace * c, 1))
        expansion = jnp.where(b > 0, divide(2 * c, root + b), divide(root - b, 2 * trace))
        return jnp.where(some & self.free("scale"), expansion, 1)

    def _best_log_dof(self, sums: ScaledMoments) -> Float[Array, " k"]:
        if not np.any(self.free("dof")):
            return self.log_dof
        count = sums.scale_count + sums.dof_count
        average = divide(sums.log_weight + sums.prior_log_weight, count)
        least, most = _bounds(average.dtype)

        def climb(log_dof: Array, average: Array, free: Array) -> Array:
            start = jnp.clip(log_dof, least, most)[None]
            found = maximize_by_newton(
                _dof_log_prob, start, average, free=free, lower=least, upper=most
            )
            return jnp.where(free, found[0], log_dof)

        return jax.vmap(climb)(self.log_dof, average, (count > 0) & self.free("dof"))

    def sample(self, key: Array, z: Array) -> Float[Array, "n d"]:
        scale_key, key = jax.random.split(key)
        half = 0.5 * self.dof[z]
        log_u = jax.random.loggamma(scale_key, half) - jnp.log(half)
        noise = self.structure.noise(key, z, self.mean.shape[1])
        return self.mean[z] + jnp.exp(-0.5 * log_u)[:, None] * noise


def _dof_log_prob(log_dof: Float[Array, " 1"], average: Array) -> Float[Array, ""]:
    half = 0.5 * jnp.exp(log_dof[0])
    return gamma_log_norm(half) + half * average
