"""A latent Markov chain: the pure functions of `chain`, under every posterior."""

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxem.latents import chain
from jaxem.latents._infer import AbstractSequenceLatent


class Chain(AbstractSequenceLatent):
    """The states z₁ … z_T of one chain; arguments as in `jaxem.latents.chain`.

    Its marginals are a `chain.Smoothed`.
    """

    initial: Float[Array, " k"]
    transition: Array
    log_prob: Float[Array, "t k"]
    length: Int[Array, ""] | None
    parallel: bool | None = eqx.field(static=True)

    def exact(self):
        found = self._smoothing()
        return found.log_likelihood, found

    def mode(self):
        path, value = self.best_path()
        return value, chain.of_path(path, value, self.transition)

    def draw(self, key):
        forward = self._filtering()
        path = chain.sample_path(key, jax.lax.stop_gradient(forward.log_filtered), self.transition)
        found = chain.of_path(path, forward.log_likelihood, self.transition)
        return found.log_likelihood, found

    def tempered(self, temperature):
        # Tempered transitions are those of a chain again: their rows are normalised, and what a
        # row summed to goes to the state that is left there.
        temperature = jnp.asarray(temperature, self.log_prob.dtype)
        start, moves = _power(self.initial, temperature), _power(self.transition, temperature)
        total, totals = jnp.sum(start), jnp.sum(moves, axis=-1)
        left = jnp.append(self._within()[1:], False)[:, None]
        tempered = self.log_prob / temperature + jnp.where(left, jnp.log(totals), 0)
        chances = moves / totals[..., None]
        found = chain.smoothing(
            start / total, chances, tempered, length=self.length, parallel=self.parallel
        )
        possible = self.transition > 0
        ratio = jnp.where(possible, chances / jnp.where(possible, self.transition, 1), 0)
        value = temperature * (found.log_likelihood + jnp.log(total))
        return value, found._replace(log_likelihood=value, ratio=ratio)

    def log_likelihood(self):
        return self._filtering().log_likelihood

    def log_increments(self):
        return jnp.where(self._within(), self._filtering().log_increments, 0)

    def filtered(self):
        return jnp.where(self._within()[:, None], self._filtering().filtered, 0)

    def smoothed(self):
        return jnp.where(self._within()[:, None], self._smoothing().smoothed, 0)

    def best_path(self):
        paths, log_prob = self.best_paths(1)
        return paths[0], log_prob[0]

    def best_paths(self, num_paths: int) -> tuple[Int[Array, "paths t"], Float[Array, " paths"]]:
        given = self.initial, self.transition, self.log_prob
        return chain.viterbi(*given, length=self.length, num_paths=num_paths)

    def sample_path(self, key):
        return chain.sample_path(key, self._filtering().log_filtered, self.transition)

    def forecast(self, num_steps: int) -> Float[Array, "h k"]:
        """State probabilities 1 … `num_steps` steps after the last one."""
        last = jnp.maximum(jnp.sum(self._within()) - 1, 0)
        return chain.forecast(self._filtering().filtered[last], self.transition, num_steps)

    def _within(self) -> Bool[Array, " t"]:
        steps = jnp.arange(len(self.log_prob))
        return steps < (len(self.log_prob) if self.length is None else self.length)

    def _filtering(self) -> chain.Filtered:
        given = self.initial, self.transition, self.log_prob
        return chain.filtering(*given, parallel=self.parallel)

    def _smoothing(self) -> chain.Smoothed:
        given = self.initial, self.transition, self.log_prob
        return chain.smoothing(*given, length=self.length, parallel=self.parallel)


def _power(probability: Array, temperature: Array) -> Array:
    """probability^(1/T), with zeros that have a finite derivative."""
    positive = probability > 0
    return jnp.where(positive, jnp.where(positive, probability, 1) ** (1 / temperature), 0)
