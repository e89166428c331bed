"""A family of one's own: geometric components, the number of failures before a success.

log p(x | z = k) = Σ_d log p + x log(1 − p). The coordinates are (log p, log(1 − p)), and their
cotangents are the expected numbers of successes Σr and of failures Σr x, so that the M-step is
logit p ← log Σr − log Σr x. Everything that `AbstractEmission` asks for is here; any mixture can
then be made of it. Run `python examples/custom_emission.py`.
"""

from typing import ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.nn import log_sigmoid

import jaxem


class Geometric(jaxem.AbstractEmission):
    natural: ClassVar = {"probability": ("logits",)}
    logits: jax.Array  # (k, d), unconstrained
    held: tuple = eqx.field(static=True)

    def __init__(self, probability):
        self.logits = jax.scipy.special.logit(jnp.asarray(probability))
        self.held = ()

    @property
    def probability(self):
        return jax.nn.sigmoid(self.logits)

    @property
    def num_components(self):
        return self.logits.shape[0]

    @property
    def num_free_parameters(self):
        return int(self.free("probability").sum()) * self.logits.shape[1]

    def check(self, x):  # at trace time: shape and dtype
        if x.ndim != 2 or x.shape[1] != self.logits.shape[1]:
            raise ValueError(f"Geometric expects (n, {self.logits.shape[1]}), got {x.shape}.")

    def in_support(self, x):  # in the compiled program: values
        return jnp.all((x >= 0) & (x == jnp.floor(x)) & jnp.isfinite(x), axis=1)

    def coordinates(self):
        return log_sigmoid(self.logits), log_sigmoid(-self.logits)

    def log_prob_at(self, coordinates, x):
        log_p, log_q = coordinates
        return log_p.sum(1) + jnp.matmul(x.astype(log_q.dtype), log_q.T, precision="highest")

    def statistics(self, cotangents):
        return cotangents

    def reframe(self, sums, old):  # the sums depend on the data alone
        return sums

    def maximize(self, sums):
        log_successes, log_failures = (jnp.log(jnp.maximum(s, 1e-37)) for s in sums)
        logits = jnp.where(sums[0] > 0, log_successes - log_failures, self.logits)
        return self.update(logits=logits)

    def expected_log_prob(self, sums):
        return sum(jnp.sum(s * log_p) for s, log_p in zip(sums, self.coordinates(), strict=True))

    def prior(self, alpha=1.0, beta=1.0):  # Beta(α, β): α − 1 successes and β − 1 failures
        return jaxem.Framed(tuple(jnp.full_like(self.logits, c - 1) for c in (alpha, beta)), self)

    def sample(self, key, z):
        return jax.random.geometric(key, self.probability[z]) - 1

    def degenerate(self, sums, min_variance):
        return sums[0][:, 0] < 1

    @classmethod
    def pooled(cls, x, num_components, weights):
        mean = (weights @ x.astype(weights.dtype) + 0.5) / (jnp.sum(weights) + 0.5)
        return cls(jnp.broadcast_to(1 / (1 + mean), (num_components, x.shape[1])))

    def located_at(self, x, spread):
        return self.update(logits=-jnp.log((x + jnp.exp(-self.logits[0])) / 2))

    def shortcut(self):
        return None


if __name__ == "__main__":
    jax.config.update("jax_enable_x64", True)
    truth = jaxem.Mixture([0.3, 0.7], Geometric([[0.6], [0.05]]))
    x, z = truth.sample(jax.random.key(0), 2000)
    model = jaxem.Mixture.init(jax.random.key(1), x, 2, Geometric)
    print(jaxem.check_model(model, x), end="\n\n")
    solution = jaxem.fit(model, x, prior=model.prior(components=model.components.prior(2.0, 2.0)))
    print(solution)
