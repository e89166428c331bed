"""A family of one's own: half-normal components, the absolute values of centred Gaussians.

log p(x | z = k) = Σ_d ½ log 2/π − log σ − ½ (x/σ)². A family declares its parameters and its
support, and writes its density, the law's own sums, its M-step and how sums move to another frame;
checks, priors, starts and degeneracy follow from those. Sums are Σr and Σr (x/σ)², of which the
unit σ is that of the frame. docs/authors.md explains each method. Run
`python examples/custom_emission.py`.
"""

import math
from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

import jaxem
from jaxem import authoring as au


class Squares(NamedTuple):
    count: jax.Array  # Σ r, (k, d)
    square: jax.Array  # Σ r (x/σ)²


class HalfNormal(au.AbstractExponentialFamily):
    """p(x) = √(2/π)/σ exp(−½ (x/σ)²) for x ≥ 0, independently in each feature."""

    parameters: ClassVar = {"scale": au.positive("log_scale", "k d")}
    support: ClassVar = au.positives("n d", zero=True)
    log_scale: jax.Array
    frozen: au.Frozen = eqx.field(static=True)

    def __init__(self, scale):
        self.log_scale = au.leaves_of(self.parameters, scale=scale)["log_scale"]
        self.frozen = ()

    @property
    def scale(self):
        return jnp.exp(self.log_scale)

    def log_prob(self, x, tilt):
        square = (x[:, None] / self.scale) ** 2  # (n, k, d)
        law = 0.5 * math.log(2 / math.pi) - self.log_scale - 0.5 * square
        return jnp.sum(law + tilt.count + tilt.square * square, axis=2)

    def canonical(self):  # what multiplies the sums in Q
        return Squares(-self.log_scale, jnp.full_like(self.log_scale, -0.5))

    def expected(self):  # the sums of one observation
        return Squares(jnp.ones_like(self.log_scale), jnp.ones_like(self.log_scale))

    def maximize(self, sums):  # σ² is the mean square
        change = au.floored_log(sums.square) - au.floored_log(sums.count)
        return {"log_scale": self.log_scale + 0.5 * change}

    def reframe(self, sums, old):
        return sums._replace(square=sums.square * (old.scale / self.scale) ** 2)

    def sample(self, key, z):
        return jnp.abs(self.scale[z] * jax.random.normal(key, self.scale[z].shape))


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    truth = jaxem.Mixture([0.3, 0.7], HalfNormal([[0.5], [5.0]]))
    x, z = truth.sample(jax.random.key(0), 2000)
    model = jaxem.Mixture.init(jax.random.key(1), x, 2, HalfNormal)
    print(jaxem.testing.check_model(model, x), end="\n\n")
    prior = model.prior(components=model.components.prior(1.0, scale=1.0))
    print(jaxem.fit(model, x, prior=prior))
