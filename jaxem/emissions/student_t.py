"""Multivariate Student t components: Gaussians whose precision varies from unit to unit.

With latent u ~ Gamma(ν/2, ν/2) and x | u ~ N(μ, Σ/u), y = L⁻¹(x − μ) for Σ = L Lᵀ, δ = ‖y‖²:

    log p(x) = a + cᵥ − ½(ν + d) log(1 + δ/ν),    a = −Σ log diag L − ½ d log 2π,

E-step. w = E u = (ν + d)/(ν + δ), and E log u = log w + ψ(h) − log h with h = (ν + d)/2. The
derivative of log p in a Gaussian's coordinates weighs its moments by w; in a constant added to δ
it gives Σ r w; a direction added at 0 gives Σ r (E log u − w + 1). Statistics are the Gaussian
moments (Σr, Σrw, Σrw y, Σrw y yᵀ), which reframe as a Gaussian's do, and that last sum.

M-step. First ν maximises Σr (h log h − h − log Γ(h)) + h Σr (E log u − u + 1) in h = ν/2. Mean and
scale are a Gaussian's, and the scale is divided by α more, the best scale of u in a model where
that is free (parameter expansion: α = Σrw/Σr, so that Σrw divides the scatter where Σr did). α is 1
at a fixed point; steps ascend the likelihood, with a prior too, whose moments are therefore kept
apart. All is a function of the sums, with the new ν where a prior makes α depend on it.

Kent, Tyler & Vardi (1994), Commun. Stat. Simul. 23; Liu & Rubin (1995), Statistica Sinica 5;
Meng & van Dyk (1997), JRSS B 59; Liu, Rubin & Wu (1998), Biometrika 85 (PX-EM);
Peel & McLachlan (2000), Stat. Comput. 10 (mixtures).
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_continuous, check_shape, check_values
from jaxem._emission import AbstractEmission, finite
from jaxem._hold import Held, replace
from jaxem._newton import maximize_by_newton
from jaxem._statistics import Framed
from jaxem.emissions._common import as_float, divide, filled, pseudo_count
from jaxem.emissions._special import binet, binet_slope, gamma_log_norm, log1p_minus
from jaxem.emissions.gaussian import Gaussian, Moments, factored

# Where estimated degrees of freedom end: below, the likelihood is unbounded at a unit of its own
# (d = 1: ν < 1/(n − 1), Fernández & Steel 1999); above, no data tell a t from a Gaussian.
LEAST_DOF, MOST_DOF = 0.1, 1000.0
_BOUNDS = math.log(LEAST_DOF), math.log(MOST_DOF)


class ScaledMoments(NamedTuple):
    """Sums of data, and apart from them those of a prior."""

    data: Moments  # Σ r, Σ r w, Σ r w y, Σ r w y yᵀ
    log_scale: Float[Array, " k"]  # Σ r (E log u − w + 1)
    prior: Moments
    prior_dof_count: Float[Array, " k"]
    prior_log_scale: Float[Array, " k"]


class StudentT(AbstractEmission):
    """Multivariate t distributions, each with its own full scale matrix and degrees of freedom.

    **Arguments:** `mean` (k, d), for ν ≤ 1 the location; `scale` (k, d, d), positive definite: the
    covariance is ν/(ν − 2) times it; `dof` (k,) or (), positive. Starts have ν = 2: tails so heavy
    that units far out seem no place for a component. As a `family`, `functools.partial(StudentT,
    dof=4.0)` starts there, and `freeze(model, "components.dof")` keeps it.

    Estimated `dof` lie in [0.1, 1000], and a start outside goes to the bound. 1000 says that a
    Gaussian does; a component at 0.1 is `degenerate`: no likelihood is bounded much below it.

    **Raises:** `ValueError` for other shapes, or values that are not a scale or positive.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "mean": ("mean",),
        "scale": ("log_scale", "below"),
        "dof": ("log_dof",),
    }
    mean: Float[Array, "k d"]
    log_scale: Float[Array, "k d"]
    below: Float[Array, "k d d"]
    log_dof: Float[Array, " k"]
    held: Held = eqx.field(static=True)

    def __init__(self, mean: ArrayLike, scale: ArrayLike, dof: ArrayLike):
        self.mean = as_float(mean)
        check_shape("mean", self.mean, ("k", "d"))
        check_values(jnp.isfinite(self.mean), "mean holds a NaN or an infinity.")
        k, d = self.mean.shape
        scale = jnp.asarray(scale, self.mean.dtype)
        check_shape("scale", scale, (k, d, d))
        self.log_scale, self.below = factored("scale", scale)
        dof = filled("dof", dof, self.mean[:, 0])
        check_values((dof > 0) & jnp.isfinite(dof), "dof must be positive and finite.")
        self.log_dof = jnp.log(dof)
        self.held = ()

    @property
    def scale(self) -> Float[Array, "k d d"]:
        """Scale matrices; the covariances are dof/(dof − 2) times these."""
        return self._gaussian().covariance

    @property
    def dof(self) -> Float[Array, " k"]:
        """Degrees of freedom."""
        return jnp.exp(self.log_dof)

    @property
    def num_components(self) -> int:
        return self.mean.shape[0]

    @property
    def num_free_parameters(self) -> int:
        return self._gaussian().num_free_parameters + int(np.sum(self.free("dof")))

    def _gaussian(self) -> Gaussian:
        """Gaussians with this mean and scale, and the same of it held."""
        names = {"mean": "mean", "scale": "covariance"}
        held = ((names[name], mask) for name, mask in self.held if name in names)
        return replace(
            object.__new__(Gaussian),
            mean=self.mean,
            log_scale=self.log_scale,
            below=self.below,
            held=tuple(sorted(held)),
            expanded=False,
        )

    def check(self, x: Array) -> None:
        check_continuous(x, self.mean.shape[1], self.mean.dtype, "StudentT")

    def in_support(self, x: Float[Array, "n d"]) -> Bool[Array, " n"]:
        return finite(x)

    def coordinates(self) -> tuple[Array, ...]:
        log_norm, offset, whitener = self._gaussian().coordinates()
        zero = jnp.zeros_like(self.log_dof)
        return log_norm + self._log_norm(), offset, whitener, zero, zero

    def _log_norm(self) -> Float[Array, " k"]:
        """log Γ((ν + d)/2) − log Γ(ν/2) − ½ d log(ν/2): it vanishes as ν grows."""
        half, rise = 0.5 * self.dof, 0.5 * self.mean.shape[1]
        stirling = (half + rise - 0.5) * jnp.log1p(rise / half) - rise
        return stirling + binet(half + rise) - binet(half)

    def log_prob_at(self, coordinates: Any, x: Float[Array, "n d"]) -> Float[Array, "n k"]:
        log_norm, offset, whitener, added, log_scale = coordinates
        n, (k, d) = x.shape[0], self.mean.shape
        centred = (x - self._gaussian()._centroid()).T
        residual = la.matmul(whitener.reshape(k * d, d), centred)
        residual = (residual - la.repeat(offset.reshape(-1), n)).reshape(k, d, n)
        distance = jnp.sum(residual * residual, axis=1)
        dof = self.dof[:, None]
        tail = -0.5 * (dof + d) * jnp.log1p((distance + la.repeat(added, n)) / dof)
        half = 0.5 * (dof + d)
        constant = binet_slope(half) - 0.5 / half
        distance = jnp.minimum(distance, jnp.finfo(x.dtype).max ** 0.5)  # no ∞/∞ below
        log_weight = -jnp.log1p((distance - d) / (dof + d))
        scale = log1p_minus((d - distance) / (dof + distance), log_weight) + constant
        return (la.repeat(log_norm, n) + tail + la.repeat(log_scale, n) * scale).T

    def statistics(self, cotangents: Any) -> ScaledMoments:
        *gaussian, added, log_scale = cotangents
        data = self._gaussian()._residual_statistics(gaussian)
        data = data._replace(mean_count=-2 * added)
        none = jax.tree.map(jnp.zeros_like, data)
        zero = jnp.zeros_like(log_scale)
        return ScaledMoments(data, log_scale, none, zero, zero)

    def reframe(self, sums: ScaledMoments, old: Self) -> ScaledMoments:
        new, before = self._gaussian(), old._gaussian()
        return sums._replace(
            data=new.reframe(sums.data, before), prior=new.reframe(sums.prior, before)
        )

    def maximize(self, sums: ScaledMoments) -> Self:
        log_dof = self._best_log_dof(sums)
        expansion = self._expansion(sums, jnp.exp(log_dof))
        gaussian = self._gaussian().maximize(_expanded(sums, expansion))
        return self.update(
            mean=gaussian.mean,
            log_scale=gaussian.log_scale,
            below=gaussian.below,
            log_dof=log_dof,
        )

    def _expansion(self, sums: ScaledMoments, dof: Float[Array, " k"]) -> Float[Array, " k"]:
        """α: the scale of u that is best along with a scale matrix divided by it.

        It maximises ½ d p log α − ½ t α − ½ν (Σrw/α + Σr log α), where the prior has count p and
        trace t about the new mean and in the scale that α = 1 would have.
        """
        d = self.mean.shape[1]
        step, scatter = self._gaussian()._whitened_maximum(_expanded(sums, 1))
        prior = sums.prior
        cross = la.outer(prior.first, step)
        about = prior.second - cross - la.transpose(cross)
        about = about + prior.mean_count[:, None, None] * la.outer(step, step)
        whitener = la.inverse_of_lower(la.cholesky(scatter))
        about = la.matmul(la.matmul(whitener, about), la.transpose(whitener))
        trace = jnp.trace(about, axis1=1, axis2=2)
        # t α² + b α = c
        b = dof * sums.data.scale_count - d * prior.scale_count
        c = dof * sums.data.mean_count
        some = c > 0
        root = jnp.sqrt(jnp.where(some, b**2 + 4 * trace * c, 1))
        expansion = jnp.where(b > 0, divide(2 * c, root + b), divide(root - b, 2 * trace))
        return jnp.where(some & self.free("scale"), expansion, 1)

    def _best_log_dof(self, sums: ScaledMoments) -> Float[Array, " k"]:
        count = sums.data.scale_count + sums.prior_dof_count
        slope = sums.log_scale + sums.prior_log_scale
        is_free = (count > 0) & self.free("dof")
        if not np.any(self.free("dof")):
            return self.log_dof

        def climb(log_dof: Array, average: Array, free: Array) -> Array:
            least, most = _BOUNDS
            start = jnp.clip(log_dof, least, most)[None]
            found = maximize_by_newton(
                _dof_log_prob, start, average, free=free, lower=least, upper=most
            )
            return jnp.where(free, found[0], log_dof)

        return jax.vmap(climb)(self.log_dof, divide(slope, count), is_free)

    def bounded(self) -> Self:
        """Self with degrees of freedom where estimates lie."""
        return self.update(log_dof=jnp.clip(self.log_dof, *_BOUNDS))

    def expected_log_prob(self, sums: ScaledMoments) -> Float[Array, ""]:
        half, units = 0.5 * self.dof, sums.data.scale_count + sums.prior_dof_count
        of_scales = units * gamma_log_norm(half)
        of_scales = of_scales + half * (sums.log_scale + sums.prior_log_scale)
        return self._gaussian().expected_log_prob(_expanded(sums, 1)) + jnp.sum(of_scales)

    def prior(
        self,
        mean: ArrayLike | None = None,
        mean_count: ArrayLike = 0.0,
        scale: ArrayLike | None = None,
        scale_count: ArrayLike = 0.0,
        dof: ArrayLike | None = None,
        dof_count: ArrayLike = 0.0,
    ) -> Framed:
        """Pseudo-observations: `Gaussian.prior` for mean and scale, and one for `dof`.

        The latter is as if the latent u of `dof_count` units with `dof` degrees of freedom had
        been seen; its mode is `dof`.

        **Arguments:** as for `Gaussian.prior`; `dof` (k,) or (), default the present ones.

        **Raises:** `ValueError` for a negative count, or values that are no scale or not positive.
        """
        own = self._gaussian().prior(mean, mean_count, scale, scale_count)
        dof = filled("dof", self.dof if dof is None else dof, self.log_dof)
        check_values((dof > 0) & jnp.isfinite(dof), "the prior's dof must be positive and finite.")
        count = pseudo_count("dof_count", dof_count, self.log_dof)
        frame = replace(
            self, mean=own.frame.mean, log_scale=own.frame.log_scale, below=own.frame.below
        )
        none = jax.tree.map(jnp.zeros_like, own.sums)
        log_scale = count * (binet_slope(0.5 * dof) - 1 / dof)
        zero = jnp.zeros_like(count)
        return Framed(ScaledMoments(none, zero, own.sums, count, log_scale), frame)

    def sample(self, key: Array, z: Int[Array, " n"]) -> Float[Array, "n d"]:
        scale_key, key = jax.random.split(key)
        half = 0.5 * self.dof[z]
        log_u = jax.random.loggamma(scale_key, half) - jnp.log(half)
        centred = self._gaussian().sample(key, z) - self.mean[z]
        return self.mean[z] + jnp.exp(-0.5 * log_u)[:, None] * centred

    def degenerate(self, sums: ScaledMoments, min_variance: Float[Array, ""]) -> Bool[Array, " k"]:
        thin = self._gaussian().degenerate(_expanded(sums, 1), min_variance)
        heavy = self._best_log_dof(sums) <= _BOUNDS[0]
        return thin | (heavy & self.free("dof"))

    @classmethod
    def pooled(cls, x, num_components, weights, dof: ArrayLike = 2.0):
        gaussian = Gaussian.pooled(x, num_components, weights)
        dof = filled("dof", dof, gaussian.mean[:, 0])
        check_values((dof > 0) & jnp.isfinite(dof), "dof must be positive and finite.")
        return replace(
            object.__new__(cls),
            mean=gaussian.mean,
            log_scale=gaussian.log_scale,
            below=gaussian.below,
            log_dof=jnp.log(dof),
            held=(),
        )

    def located_at(self, x: Float[Array, "k d"], spread: Float[Array, ""]) -> Self:
        gaussian = self._gaussian().located_at(x, spread)
        return replace(
            self,
            mean=x,
            log_scale=gaussian.log_scale,
            below=gaussian.below,
            log_dof=jnp.broadcast_to(self.log_dof[:1], x.shape[:1]),
        )

    def shortcut(self) -> None:
        return None


def _expanded(sums: ScaledMoments, expansion: ArrayLike) -> Moments:
    """Moments of data and prior; a scale matrix is divided by α where more of it count."""
    both = jax.tree.map(jnp.add, sums.data, sums.prior)
    return both._replace(scale_count=expansion * both.scale_count)


def _dof_log_prob(log_dof: Float[Array, " 1"], average: Array) -> Float[Array, ""]:
    half = 0.5 * jnp.exp(log_dof[0])
    return gamma_log_norm(half) + half * average
