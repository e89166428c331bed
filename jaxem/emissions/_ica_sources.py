"""The laws of independent sources: mixtures of Gaussians, their densities and their sums."""

import functools
from typing import Any, NamedTuple, Self

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxem._core.scales import HALF_LOG_2PI


class Laws(NamedTuple):
    """Mixtures of Gaussians, those of sources or one."""

    log_weights: Float[Array, "*b m"]
    mean: Float[Array, "*b m"]
    log_variance: Float[Array, "*b m"]

    def log_norm(self) -> Float[Array, "*b m"]:
        """Log-densities at the means, with the weights."""
        return jax.nn.log_softmax(self.log_weights) - 0.5 * self.log_variance - HALF_LOG_2PI

    def moments(self) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """Mean and variance."""
        weights = jax.nn.softmax(self.log_weights)
        mean = jnp.sum(weights * self.mean, axis=-1)
        apart = self.mean - mean[..., None]
        return mean, jnp.sum(weights * (jnp.exp(self.log_variance) + apart**2), axis=-1)

    def units_of(self, old: Self) -> tuple[Float[Array, "*b"], Float[Array, "*b"]]:
        """c and b for which c y + b has mean and variance of self where y has those of old."""
        (mean, variance), (old_mean, old_variance) = self.moments(), old.moments()
        unit = jnp.sqrt(variance / old_variance)
        return unit, mean - unit * old_mean

    def scaled(self, unit: Array, origin: Array) -> Self:
        """The laws of c y + b."""
        mean = unit[..., None] * self.mean + origin[..., None]
        return self._replace(
            mean=mean, log_variance=self.log_variance + 2 * jnp.log(unit)[..., None]
        )


class PartSums(NamedTuple):
    """Sums over the parts of each source, whitened by them."""

    count: Float[Array, "k d m"]
    first: Float[Array, "k d m"]
    second: Float[Array, "k d m"]

    def reframed(self, new: Laws, old: Laws) -> Self:
        """Sums about new laws in place of old ones."""
        inverse = jnp.exp(-0.5 * new.log_variance)
        ratio = jnp.exp(0.5 * old.log_variance) * inverse
        shift = (old.mean - new.mean) * inverse
        first, second = ratio * self.first, ratio**2 * self.second
        second = second + shift * (2 * first + shift * self.count)
        return self._replace(first=first + shift * self.count, second=second)


def densities(
    y: Float[Array, "k d n"], laws: Laws, tilt: PartSums
) -> tuple[Array, Array, Array, Array]:
    """log f, −d log f, its slope beside the square, and Σ share/σ², as sums over few parts."""
    log_norm, square = laws.log_norm() + tilt.count, tilt.second - 0.5
    inverse = jnp.exp(-0.5 * laws.log_variance)
    of_parts = jnp.stack([log_norm, tilt.first, square, inverse, laws.mean])
    # One part after the other: sums along an axis of three are slower than all the rest
    joint, gaps, inverses = [], [], []
    for part in range(log_norm.shape[2]):
        log_norm, linear, square, inverse, mean = of_parts[:, :, :, part, None]
        gap = inverse * (y - mean)
        joint.append(log_norm + gap * (linear + gap * square))
        gaps.append(gap)
        inverses.append(inverse)
    top = lax.stop_gradient(functools.reduce(jnp.maximum, joint))
    powers = [jnp.exp(each - top) for each in joint]
    total = sum(powers[1:], start=powers[0])
    shares = [power / total for power in powers]
    zero = jnp.zeros_like(y)
    score = sum((r * w * e for r, w, e in zip(shares, inverses, gaps, strict=True)), zero)
    curvature = [r * w**2 for r, w in zip(shares, inverses, strict=True)]
    bend = sum((c * (1 - e**2) for c, e in zip(curvature, gaps, strict=True)), zero)
    return top + jnp.log(total), score, bend, sum(curvature, zero)


def mean_log_prob(theta: Float[Array, " p"], args: Any) -> Float[Array, ""]:
    """Of values and pseudo-values, under one law: what the M-step of a source maximises."""
    (old, seen, pseudo, total), (logits, mean, log_variance) = args, jnp.split(theta, 3)
    top = jax.nn.logsumexp(logits)
    new = Laws(logits - top, mean, log_variance)
    unit, origin = new.units_of(old)
    seen = seen.reframed(new, old)
    pseudo = pseudo.reframed(new, old.scaled(unit, origin))
    count, _, second = jax.tree.map(jnp.add, seen, pseudo)
    value = jnp.sum(count * (new.log_weights - 0.5 * log_variance) - 0.5 * second)
    value = value + jnp.sum(pseudo.count) * jnp.log(unit)
    return value / total - 0.5 * top**2
