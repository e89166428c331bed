"""Linear-Gaussian chains as pure functions: filter, and smoother by adjoints.

    z₁ = m₀ + L₀ ε₁,    zₜ = A zₜ₋₁ + bₜ + L εₜ,    eₜ = Hₜ zₜ + noise of variance I.

Forward, about the predicted (m, P), with J = Hᵀ H and h = Hᵀ e,

    K = (I + P J)⁻¹,    P_f = K P Kᵀ + K P J P Kᵀ,    m_f = K (m + P h),

which is Joseph's form, a sum of squares. Backward, score r and information N of all that comes,
with respect to the predicted state:

    r = h − J m_f + Kᵀ Aᵀ r₊,    N = Kᵀ (J + J P J + Aᵀ N₊ A) K.

They are the derivative of the filter, so that this E-step is a gradient too (tests hold it to
that). No covariance of states or of their noise is inverted: a start without variance, the
companion form of an autoregression and other singular noise need no special case.

    E ε = Lᵀ r,    Var ε = I − Lᵀ N L,    Cov(εₜ₊₁, zₜ) = −Lᵀ N₊ A P_f,
    E zₜ = m_f + P_f Aᵀ r₊,    Var zₜ = P_f − P_f Aᵀ N₊ A P_f.

Bryson & Frazier (1963), Proc. Optimum System Synthesis; de Jong (1989), JASA 84; Koopman (1993),
Biometrika 80; Durbin & Koopman (2012), *Time Series Analysis by State Space Methods*.
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxem._core import linalg as la


class Dynamics(NamedTuple):
    """How states start and move; what of `drift` belongs to the first step does not matter."""

    mean: Float[Array, " n"]  # m₀
    start: Float[Array, "n n"]  # L₀
    matrix: Float[Array, "n n"]  # A
    drift: Float[Array, "t n"]  # bₜ, into each step
    noise: Float[Array, "n n"]  # L


class Outputs(NamedTuple):
    """Outputs whitened by their noise; what was not seen has rows of zeros."""

    rows: Float[Array, "t p n"]  # Hₜ
    values: Float[Array, "t p"]  # eₜ


class Filtered(NamedTuple):
    """Predicted and filtered states, and log N(e; H m, I + H P Hᵀ) + ½ p log 2π of each step."""

    predicted_mean: Float[Array, "t n"]
    predicted_covariance: Float[Array, "t n n"]
    mean: Float[Array, "t n"]
    covariance: Float[Array, "t n n"]
    kept: Float[Array, "t n n"]  # K
    log_increments: Float[Array, " t"]


class Smoothed(NamedTuple):
    """States and noise given all outputs.

    `noise` are ε₁ … ε_T: their means, covariances, and Cov(εₜ, zₜ₋₁), 0 for the first.
    """

    mean: Float[Array, "t n"]
    covariance: Float[Array, "t n n"]
    noise_mean: Float[Array, "t n"]
    noise_covariance: Float[Array, "t n n"]
    noise_cross: Float[Array, "t n n"]
    log_increments: Float[Array, " t"]


def filtered(dynamics: Dynamics, outputs: Outputs) -> Filtered:
    """The states given the outputs so far."""
    rows, values = outputs
    information = la.matmul(la.transpose(rows), rows)
    score = la.apply(la.transpose(rows), values)
    start, a, q = (
        la.matmul(dynamics.start, dynamics.start.T),
        dynamics.matrix,
        la.matmul(dynamics.noise, dynamics.noise.T),
    )
    eye = jnp.eye(len(start), dtype=start.dtype)

    def vary(p: Array, j: Array) -> tuple[Array, Any]:
        kept = la.inverse(eye + la.matmul(p, j))
        inner = p + la.matmul(la.matmul(p, j), p)
        found = la.matmul(la.matmul(kept, inner), kept.T)
        found = 0.5 * (found + found.T)
        return la.matmul(la.matmul(a, found), a.T) + q, (p, found, kept)

    _, (predicted, covariance, kept) = lax.scan(vary, start, information)

    def move(m: Array, step: Any) -> tuple[Array, Any]:
        kept, p, h, drift = step
        found = la.apply(kept, m + la.apply(p, h))
        return la.apply(a, found) + drift, (m, found)

    later = jnp.roll(dynamics.drift, -1, axis=0)
    steps = kept, predicted, score, later
    _, (predicted_mean, mean) = lax.scan(move, dynamics.mean, steps)

    before = values - la.apply(rows, predicted_mean)
    after = values - la.apply(rows, mean)
    spread = la.matmul(la.matmul(rows, predicted), la.transpose(rows))
    factor = la.cholesky(spread + jnp.eye(rows.shape[1], dtype=spread.dtype))
    half_log_det = jnp.sum(jnp.log(jnp.diagonal(factor, axis1=1, axis2=2)), axis=1)
    increments = -0.5 * jnp.sum(before * after, axis=1) - half_log_det
    return Filtered(predicted_mean, predicted, mean, covariance, kept, increments)


def smoothed(dynamics: Dynamics, outputs: Outputs) -> Smoothed:
    """The states and their noise given all outputs."""
    rows, values = outputs
    forward = filtered(dynamics, outputs)
    information = la.matmul(la.transpose(rows), rows)
    score = la.apply(la.transpose(rows), values - la.apply(rows, forward.mean))
    a, eye = dynamics.matrix, jnp.eye(dynamics.matrix.shape[0], dtype=score.dtype)
    p = forward.predicted_covariance
    inner = information + la.matmul(la.matmul(information, p), information)

    def back(carry: tuple[Array, Array], step: Any) -> tuple[Any, Any]:
        r, n = carry  # of the next step, seen from this one: Aᵀ r₊ and Aᵀ N₊ A
        score, inner, kept = step
        r_here = score + la.apply(kept.T, r)
        n_here = la.matmul(la.matmul(kept.T, inner + n), kept)
        n_here = 0.5 * (n_here + n_here.T)
        earlier = la.apply(a.T, r_here), la.matmul(la.matmul(a.T, n_here), a)
        return earlier, (r_here, n_here, r, n)

    none = jnp.zeros_like(dynamics.mean), jnp.zeros_like(a)
    steps = score, inner, forward.kept
    _, (r, n, r_later, n_later) = lax.scan(back, none, steps, reverse=True)

    covariance = forward.covariance
    mean = forward.mean + la.apply(covariance, r_later)
    back_and_forth = la.matmul(la.matmul(covariance, n_later), covariance)
    factors = jnp.concatenate(
        [dynamics.start[None], jnp.broadcast_to(dynamics.noise, (len(r) - 1, *a.shape))]
    )
    turned = la.matmul(la.transpose(factors), n)
    cross = -la.matmul(la.matmul(turned[1:], a), covariance[:-1])
    return Smoothed(
        mean,
        covariance - back_and_forth,
        la.apply(la.transpose(factors), r),
        eye - la.matmul(turned, factors),
        jnp.concatenate([jnp.zeros_like(turned[:1]), cross]),
        forward.log_increments,
    )
