"""Posteriors over a latent, as values: `infer` says what each means for a structure.

For a finite latent the variant of EM *is* the posterior. Expected statistics are the derivative of
the value that it gives to the data: log Σ exp of the log-joint gives EM, its maximum hard EM.
"""

import abc
from typing import Any

import equinox as eqx
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxem._core.checks import check_values


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
        check_values(jnp.asarray(self.temperature) > 0, "a temperature must be positive.")


class Drawn(AbstractPosterior):
    """All mass on one latent that is drawn from the exact posterior; it needs a key."""
