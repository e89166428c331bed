"""The laws of independent sources: mixtures of Gaussians, their densities and their sums."""

import functools
from collections.abc import Iterable
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

    count: Float[Array, "*b m"]
    first: Float[Array, "*b m"]
    second: Float[Array, "*b m"]

    def reframed(self, new: Laws, old: Laws) -> Self:
        """Sums about new laws in place of old ones."""
        inverse = jnp.exp(-0.5 * new.log_variance)
        ratio = jnp.exp(0.5 * old.log_variance) * inverse
        shift = (old.mean - new.mean) * inverse
        first, second = ratio * self.first, ratio**2 * self.second
        second = second + shift * (2 * first + shift * self.count)
        return self._replace(first=first + shift * self.count, second=second)


class Shares(NamedTuple):
    """log f of values y under each source's law, and of each part its share, e and 1/σ.

    One part after the other: sums along an axis of three are slower than all the rest.
    """

    log_prob: Float[Array, "k d n"]
    share: list[Float[Array, "k d n"]]
    gap: list[Float[Array, "k d n"]]
    inverse: list[Float[Array, "k d 1"]]

    def slopes(self) -> tuple[Float[Array, "k d n"], Float[Array, "k d n"]]:
        """−d² log f/dy², and Σ share/σ²."""
        each = list(zip(self.share, self.gap, self.inverse, strict=True))
        of_parts = _total(share * inverse**2 for share, _, inverse in each)
        score = _total(share * inverse * gap for share, gap, inverse in each)
        spread = _total(share * (inverse * gap) ** 2 for share, gap, inverse in each)
        return of_parts - spread + score**2, of_parts


def shares(y: Float[Array, "k d n"], laws: Laws, tilt: PartSums | None = None) -> Shares:
    """The parts of each value, tilted."""
    inverse, log_norm = jnp.exp(-0.5 * laws.log_variance), laws.log_norm()
    linear, square = jnp.zeros_like(inverse), jnp.full_like(inverse, -0.5)
    if tilt is not None:
        log_norm, linear, square = log_norm + tilt.count, tilt.first, tilt.second - 0.5
    joint, gaps, inverses = [], [], []
    for part in range(inverse.shape[2]):
        inverses.append(inverse[:, :, part, None])
        gap = inverses[-1] * (y - laws.mean[:, :, part, None])
        polynomial = linear[:, :, part, None] + gap * square[:, :, part, None]
        joint.append(log_norm[:, :, part, None] + gap * polynomial)
        gaps.append(gap)
    top = lax.stop_gradient(functools.reduce(jnp.maximum, joint))
    powers = [jnp.exp(each - top) for each in joint]
    total = _total(powers)
    return Shares(top + jnp.log(total), [power / total for power in powers], gaps, inverses)


def _total(terms: Iterable[Array]) -> Array:
    return functools.reduce(jnp.add, terms)


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
