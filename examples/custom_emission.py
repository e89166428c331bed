"""A family of one's own: geometric components, the number of failures before a success.

log p(x | z = k) = Σ_d log p + x log(1 − p). A family declares its parameters and its support, and
writes its density, the law's own sums, its M-step and how sums move to another frame; checks,
priors, starts and degeneracy follow from those. Sums are the expected successes Σr and failures
Σr x. docs/authors.md explains each method. Run `python examples/custom_emission.py`.
"""

from typing import ClassVar, NamedTuple

import equinox as eqx
import jax
import jax.numpy as jnp

import jaxem
from jaxem import authoring as au


class Trials(NamedTuple):
    count: jax.Array  # Σ r, (k, d): successes
    failures: jax.Array  # Σ r x


class Geometric(au.AbstractExponentialFamily):
    """P(x = j) = p (1 − p)^j. Beta(a, b) is `prior(a − 1, probability=(a − 1) / (a + b − 2))`."""

    parameters: ClassVar = {"probability": au.probability("logits", "k d")}
    support: ClassVar = au.counts("n d")
    logits: jax.Array
    frozen: au.Frozen = eqx.field(static=True)

    def __init__(self, probability):
        self.logits = au.leaves_of(self.parameters, probability=probability)["logits"]
        self.frozen = ()

    @property
    def probability(self):
        return jax.nn.sigmoid(self.logits)

    def log_prob(self, x, tilt):
        success, failure = (own + added for own, added in zip(self.canonical(), tilt, strict=True))
        return success.sum(axis=1) + au.matmul(x.astype(failure.dtype), failure.T)

    def canonical(self):  # what multiplies the sums in Q
        return Trials(jax.nn.log_sigmoid(self.logits), jax.nn.log_sigmoid(-self.logits))

    def expected(self):  # the sums of one observation
        return Trials(jnp.ones_like(self.logits), jnp.exp(-self.logits))

    def maximize(self, sums):
        return {"logits": au.floored_log(sums.count) - au.floored_log(sums.failures)}

    def reframe(self, sums, old):  # they depend on the data alone
        return sums

    def sample(self, key, z):
        return jax.random.geometric(key, self.probability[z]) - 1


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    truth = jaxem.Mixture([0.3, 0.7], Geometric([[0.6], [0.05]]))
    x, z = truth.sample(jax.random.key(0), 2000)
    model = jaxem.Mixture.init(jax.random.key(1), x, 2, Geometric)
    print(jaxem.testing.check_model(model, x), end="\n\n")
    prior = model.prior(components=model.components.prior(1.0, probability=0.5))
    print(jaxem.fit(model, x, prior=prior))
