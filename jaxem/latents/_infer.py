"""Posteriors as values, latents as structures, and `infer`, the one place where they meet.

For a finite latent the variant of EM *is* the posterior. Expected statistics are the derivative of
the value that it gives to the data: log Σ exp of the log-joint gives EM, its maximum hard EM.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, PyTree

from jaxem._core.checks import check_number, check_values


class AbstractPosterior(eqx.Module):
    """A distribution over the latent given the data."""


class AbstractCustomPosterior(AbstractPosterior):
    """A posterior that says by itself what it means for a latent."""

    @abc.abstractmethod
    def infer(self, latent: Any, key: Array | None) -> tuple[Array, Any]:
        """The value of the data, and the marginals of the latent (an `AbstractLatent`)."""


class Exact(AbstractPosterior):
    """The exact posterior p(z | x): expectation–maximisation proper.

    Dempster, Laird & Rubin (1977), JRSS B 39.
    """


class Hard(AbstractPosterior):
    """All mass on the most probable latent, the first one among equals.

    Classification EM (Celeux & Govaert 1992); on spheres of one frozen scale it is Lloyd's
    k-means. The objective is the classification log-likelihood Σᵢ maxₖ log p(xᵢ, z = k).
    """


class Tempered(AbstractPosterior):
    """The posterior at a temperature T, p(z | x)^(1/T): flatter where T > 1, sharper below.

    Its objective is the free energy T Σ log Σₖ p(x, z = k)^(1/T).

    **Arguments:** `temperature`, positive.

    **Raises:** `ValueError` for one that is not.
    """

    temperature: Float[Array, ""] | float

    def __check_init__(self):
        check_number("temperature", self.temperature)
        check_values(jnp.asarray(self.temperature) > 0, "a temperature must be positive.")


class Drawn(AbstractPosterior):
    """All mass on one latent that is drawn from the exact posterior; it needs a key."""


class AbstractLatent(eqx.Module):
    """A latent structure, filled with the log-potentials of its factors.

    Each method returns the value that the posterior gives to the data, and marginals of the
    latent: what the log-potentials are weighted with in expected statistics.
    """

    @abc.abstractmethod
    def exact(self) -> tuple[Array, PyTree[Array]]:
        """log p(x), and the marginals of p(z | x)."""

    @abc.abstractmethod
    def mode(self) -> tuple[Array, PyTree[Array]]:
        """max log p(x, z), and the z that has it, as marginals."""

    @abc.abstractmethod
    def draw(self, key: Array) -> tuple[Array, PyTree[Array]]:
        """log p(x), and one z drawn from p(z | x), as marginals."""

    @abc.abstractmethod
    def tempered(self, temperature: Array | float) -> tuple[Array, PyTree[Array]]:
        """The free energy at a temperature, and the marginals of p(z | x)^(1/T)."""


class AbstractSequenceLatent(AbstractLatent):
    """The hidden states z₁ … z_T of one sequence."""

    @abc.abstractmethod
    def log_likelihood(self) -> Float[Array, ""]:
        """log p(x)."""

    @abc.abstractmethod
    def log_increments(self) -> Float[Array, " t"]:
        """log p(xₜ | x₁ … xₜ₋₁) of each step, −∞ for one that no state can have produced."""

    @abc.abstractmethod
    def filtered(self) -> Float[Array, "t k"]:
        """P(zₜ | x₁ … xₜ)."""

    @abc.abstractmethod
    def smoothed(self) -> Float[Array, "t k"]:
        """P(zₜ | x)."""

    @abc.abstractmethod
    def best_path(self) -> tuple[Int[Array, " t"], Float[Array, ""]]:
        """The most probable path, and log p(x, path)."""

    @abc.abstractmethod
    def sample_path(self, key: Array) -> Int[Array, " t"]:
        """A path drawn from p(z | x)."""


def infer(
    latent: AbstractLatent, posterior: AbstractPosterior, key: Array | None
) -> tuple[Array, Any]:
    """The value of the data under a posterior, and the marginals of the latent.

    **Raises:** `ValueError` for a posterior that the structure does not have, or draws without a
    key.
    """
    if isinstance(posterior, Exact):
        return latent.exact()
    if isinstance(posterior, Hard):
        return latent.mode()
    if isinstance(posterior, Tempered):
        return latent.tempered(posterior.temperature)
    if isinstance(posterior, Drawn):
        if key is None:
            raise ValueError("a latent is drawn at random: give e_step (or fit) a key.")
        return latent.draw(key)
    if isinstance(posterior, AbstractCustomPosterior):
        return posterior.infer(latent, key)
    raise ValueError(
        f"a posterior is one such as Exact() or Hard(), got {type(posterior).__name__}."
    )
