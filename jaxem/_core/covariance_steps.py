"""M-steps of volumes and shapes that covariances share or have of their own.

All is relative to the present covariances, and for one observation: the scatter of component k is
the matrix Eₖ = Sₖ/nₖ with share πₖ = nₖ/n, or Eₖ = 1 with πₖ = 0 where nothing counts. Two
structures have no closed form. All but a few numbers are maximised out; what is left is concave:

- equal shapes, own volumes: with w the variances along the axes, the logs v of the shape maximise
  −Σₖ πₖ log Σⱼ wₖⱼ exp(−vⱼ) − mean v.
- equal shapes and orientations, own volumes: the logs t of the volumes maximise
  −Σₖ πₖ tₖ − log|Σₖ πₖ exp(−tₖ) Eₖ|/d.

Both leave a constant free, and the square of the mean is taken off.

Celeux & Govaert (1995), Pattern Recognition 28, sections 3 and 4.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.special import logsumexp
from jaxtyping import Array, Float

from jaxem._core import linalg as la
from jaxem._core.ascent import Function, ascend


def centred(x: Float[Array, "c d"]) -> Float[Array, "c d"]:
    return x - jnp.mean(x, axis=1, keepdims=True)


def diagonal(each: Float[Array, "k d d"]) -> Float[Array, "k d"]:
    return jnp.diagonal(each, axis1=1, axis2=2)


def axes(
    pattern: str,
    log_volume: Float[Array, " c"],
    log_shape: Float[Array, "c d"],
    log_variance: Float[Array, "k d"],
    share: Float[Array, " k"],
) -> tuple[Float[Array, " c"], Float[Array, "c d"]]:
    """Volumes and shapes along axes that are known, from the logs of relative variances."""
    growth = 0.5 * log_variance
    match pattern[:2]:
        case "VI":
            return log_volume + 0.5 * log_mean(log_variance, axis=1), log_shape
        case "EI":
            pooled = log_pool(log_variance, share)
            return log_volume + 0.5 * log_mean(pooled[None], axis=1), log_shape
        case "EE":
            growth = 0.5 * log_pool(log_variance, share)[None]
        case "EV":
            logs = centred(log_shape) + growth
            size = jnp.mean(logs, axis=1, keepdims=True)
            return log_volume + 0.5 * log_pool(2 * size, share), logs - size
        case "VE":
            growth = 0.5 * _equal_shape(log_variance, share)[None]
            own = 0.5 * log_mean(log_variance - 2 * growth, axis=1)
            log_volume = log_volume + own
    logs = centred(log_shape) + growth
    return log_volume + jnp.mean(logs, axis=1), centred(logs)


def triangles(
    pattern: str,
    log_volume: Float[Array, " c"],
    lower: Float[Array, "c d d"],
    each: Float[Array, "k d d"],
    share: Float[Array, " k"],
) -> tuple[Float[Array, " c"], Float[Array, "c d"], Float[Array, "c d d"]]:
    """Volumes and triangular factors of determinant one, where shape goes with orientation."""
    if pattern[0] == "E" and pattern[1] == "V":
        step, log_shape, below = _parts(la.matmul(lower, la.cholesky(each)))
        return log_volume + 0.5 * log_pool(2 * step[:, None], share), log_shape, below
    if pattern == "VEE":
        growth = _equal_form(each, share)
        each = jnp.exp(-2 * growth)[:, None, None] * each
        log_volume = log_volume + growth
    if pattern[1] == "E":
        each = mean(each, share)
    step, log_shape, below = _parts(la.matmul(lower, la.cholesky(each)))
    return log_volume + step, log_shape, below


def _equal_shape(log_variance: Float[Array, "k d"], share: Float[Array, " k"]) -> Array:
    """Logs of the one shape, up to a constant; the start is what equal volumes would have."""

    def value(logs: Array, args: Any) -> Array:
        log_variance, share = args
        sizes = logsumexp(log_variance - logs, axis=1)
        return -jnp.sum(share * sizes) - jnp.mean(logs) - jnp.mean(logs) ** 2

    def gradient(logs: Array, args: Any) -> Array:
        log_variance, share = args
        part = jax.nn.softmax(log_variance - logs, axis=1)
        return jnp.sum(share[:, None] * part, axis=0) - (1 + 2 * jnp.mean(logs)) / len(logs)

    def hessian(logs: Array, args: Any) -> Array:
        log_variance, share = args
        part = jax.nn.softmax(log_variance - logs, axis=1)
        weighted = share[:, None] * part
        mixed = la.matmul(weighted.T, part) - 2 / len(logs) ** 2
        return mixed - jnp.diag(jnp.sum(weighted, axis=0))

    log_variance = log_variance - log_mean(log_variance, axis=1)[:, None]
    start = log_pool(log_variance, share)
    start = start - jnp.mean(start)
    return ascend(Function(value, gradient, hessian), start, (log_variance, share))


def _equal_form(each: Float[Array, "k d d"], share: Float[Array, " k"]) -> Float[Array, " k"]:
    """Half the logs of relative volumes, up to a constant."""
    d = each.shape[-1]

    def factored(logs: Array, args: Any) -> tuple[Array, Array]:
        """The terms πₖ exp(−tₖ) Eₖ, and the Cholesky factor of their sum."""
        each, share = args
        terms = (share * jnp.exp(-logs))[:, None, None] * each
        return terms, la.cholesky(jnp.sum(terms, axis=0))

    def value(logs: Array, args: Any) -> Array:
        _, factor = factored(logs, args)
        total = jnp.sum(args[1] * logs)
        return -total - total**2 - (2 / d) * jnp.sum(jnp.log(jnp.diagonal(factor)))

    def whitened(logs: Array, args: Any) -> Array:
        terms, factor = factored(logs, args)
        inverse = la.inverse_of_lower(factor)
        return la.matmul(la.matmul(inverse, terms), inverse.T)

    def gradient(logs: Array, args: Any) -> Array:
        share = args[1]
        parts = jnp.sum(diagonal(whitened(logs, args)), axis=1) / d
        return parts - share * (1 + 2 * jnp.sum(share * logs))

    def hessian(logs: Array, args: Any) -> Array:
        terms = whitened(logs, args)
        flat = terms.reshape(len(terms), -1)
        mixed = la.matmul(flat, flat.T) / d - 2 * la.outer(args[1], args[1])
        return mixed - jnp.diag(jnp.sum(diagonal(terms), axis=1) / d)

    own = la.floored_log(jnp.sum(diagonal(each), axis=1) / d)
    args = jnp.exp(-own)[:, None, None] * each, share
    logs = ascend(Function(value, gradient, hessian), jnp.zeros_like(share), args, share > 0)
    return 0.5 * (own + logs)


def mean(each: Float[Array, "k d d"], share: Float[Array, " k"]) -> Float[Array, "1 d d"]:
    return jnp.sum(share[:, None, None] * each, axis=0, keepdims=True)


def log_mean(logs: Array, axis: int) -> Array:
    return logsumexp(logs, axis=axis) - jnp.log(jnp.asarray(logs.shape[axis], logs.dtype))


def log_pool(logs: Float[Array, "k d"], share: Float[Array, " k"]) -> Float[Array, " d"]:
    """log Σₖ πₖ exp(logsₖ)."""
    top = lax.stop_gradient(jnp.max(jnp.where(share[:, None] > 0, logs, -jnp.inf), axis=0))
    return top + jnp.log(jnp.sum(share[:, None] * jnp.exp(jnp.minimum(logs - top, 80)), axis=0))


def _parts(factor: Float[Array, "c d d"]) -> tuple[Array, Array, Array]:
    """The log of the size of triangular factors, and what is left of determinant one."""
    logs, below = la.parts_of_lower(factor)
    size = jnp.mean(logs, axis=1)
    return size, logs - size[:, None], jnp.exp(-size)[:, None, None] * below
