"""The one place where a posterior meets a structure."""

import abc
from typing import Any

import equinox as eqx
from jaxtyping import Array, Float, Int, PyTree

from jaxem.latents._posteriors import (
    AbstractCustomPosterior,
    AbstractPosterior,
    Drawn,
    Exact,
    Hard,
    Tempered,
)


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
