"""A latent of K values, one for each observation by itself."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxem.latents._infer import AbstractLatent


class Finite(AbstractLatent):
    """Independent z ∈ 1 … K. Its marginals are responsibilities (n, k)."""

    log_joint: Float[Array, "n k"]

    def exact(self):
        # Components lead inside: reductions then run along observations, which vectorises.
        log_joint = self.log_joint.T
        top = jax.lax.stop_gradient(jnp.max(log_joint, axis=0))
        top = jnp.where(jnp.isfinite(top), top, 0)
        scaled = jnp.exp(log_joint - top)
        total = jnp.sum(scaled, axis=0)
        return top + jnp.log(total), (scaled / total).T

    def mode(self):
        log_joint = self.log_joint.T
        first = jnp.argmax(log_joint, axis=0)
        components = jnp.arange(log_joint.shape[0], dtype=first.dtype)[:, None]
        return jnp.max(log_joint, axis=0), (components == first).astype(log_joint.dtype).T

    def draw(self, key):
        log_prob, _ = self.exact()
        drawn = jax.random.categorical(key, jax.lax.stop_gradient(self.log_joint), axis=1)
        one_hot = jax.nn.one_hot(drawn, self.log_joint.shape[1], dtype=self.log_joint.dtype)
        return log_prob, one_hot

    def tempered(self, temperature):
        temperature = jnp.asarray(temperature, self.log_joint.dtype)
        log_prob, responsibilities = Finite(self.log_joint / temperature).exact()
        return temperature * log_prob, responsibilities
