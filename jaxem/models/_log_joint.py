"""Models of which only log p(x, z = k; θ) is written down.

E-step. Responsibilities are the derivative of the marginaliser of the log-joint; the statistics
are the score Σ w r ∂ log p(x, z; θ) / ∂θ at the present θ₀: additive over observations, as large as
θ. They give the slope of Q at θ₀ alone; its curvature is taken for n I, and steps are halved until
they are not too long (`em/_guard.py`). `Gradient` climbs the objective itself.

Fisher's identity: at θ₀ the score of Q is that of the log-likelihood (Dempster, Laird & Rubin
1977, JRSS B 39).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, PyTree

from jaxem._core.blocks import num_observations, total_weight
from jaxem._core.parameters import replace
from jaxem._core.quadratic import AbstractLocal, Identity, LocalQuadratic
from jaxem._core.statistics import Framed
from jaxem.models._base import AbstractNamelessModel, as_float_array
from jaxem.models._finite import AbstractJointModel, sums_of_joint


class LogJointModel(AbstractJointModel, AbstractNamelessModel, AbstractLocal):
    """A model made of a log-joint and its parameters; see `from_log_joint`."""

    has_curvature: ClassVar[bool] = False
    params: PyTree
    function: Callable[..., Any] = eqx.field(static=True)

    def expected_sums(self, data, sample_weight, posterior, key):
        score, value = sums_of_joint(
            self, self.function, self.params, data, sample_weight, posterior, key
        )
        count = jnp.asarray(total_weight(data, sample_weight), value.dtype)
        return LocalQuadratic(jnp.zeros_like(count), count, score, Identity(count)), value

    def reframe(self, sums: LocalQuadratic, old: Self) -> LocalQuadratic:
        return sums.moved(jax.tree.map(jnp.subtract, self.params, old.params))

    def m_step(self, statistics: Framed) -> Self:
        """One step along the score of an observation; there is no closed form.

        In `fit` it is halved until the objective does not fall. `Gradient` climbs faster.
        """
        sums = statistics.at(self).sums
        return replace(self, params=jax.tree.map(jnp.add, self.params, sums.maximum()))

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q near the model that the statistics were taken at, to first order."""
        return statistics.at(self).sums.value

    def prior(self, *args: Any, **kwargs: Any) -> Framed:
        """Not available.

        **Raises:** `NotImplementedError`: a log-joint of any form has no conjugate prior.
        """
        raise NotImplementedError(
            "a model from a log-joint has no prior of its own: give the log-prior as the log-joint "
            "of one more observation."
        )

    def check(self, data: PyTree[Array]) -> None:
        n = num_observations(data)
        shape = jax.eval_shape(self.function, self.params, data)
        whole = isinstance(shape, jax.ShapeDtypeStruct)
        if not whole or shape.ndim != 2 or shape.shape[0] != n:
            got = shape.shape if whole else type(shape).__name__
            raise ValueError(
                "log_joint must return log p(x, z = k) as an array of shape (n, k), here "
                f"({n}, k); got {got}."
            )

    def width(self, data: PyTree[Array]) -> int:
        n = num_observations(data)
        joint = jax.eval_shape(self.function, self.params, data)
        features = sum(leaf.size for leaf in jax.tree.leaves(data)) // n
        return joint.shape[1] * features

    def log_joint(self, data: PyTree[Array]) -> Float[Array, "n k"]:
        """log p(x, z = k) of each observation."""
        return self.function(self.params, data)


def from_log_joint(
    log_joint: Callable[[PyTree, PyTree[Array]], Float[Array, "n k"]], params: PyTree
) -> LogJointModel:
    """A model of a latent z of K values, from log p(x, z = k; params) alone.

    The E-step is exact; the M-step climbs. Plain `EM()` takes one guarded step along the score at
    a time; an optimiser that remembers is faster, and so is an accelerator:

        fit(from_log_joint(log_joint, params), data, EM(maximization=Gradient(optax.lbfgs())))

    **Arguments:**

    - `log_joint(params, data)` returns log p(x, z = k) as an array (n, k), one row for each
      observation of `data` by itself: `fit` calls it on blocks of observations. It must be
      differentiable, and may be −inf where a z is impossible whatever the parameters.
    - `params`: the start, any PyTree of arrays, without constraints: write a variance as the
      exponential of a parameter, weights as a softmax.

    The function must be module-level, or kept, for a second fit to reuse the compiled one:
    functions are compared by identity.
    """
    if not callable(log_joint):
        raise ValueError(f"log_joint must be a function of params and data, got {log_joint!r}.")
    if not jax.tree.leaves(params):
        raise ValueError(f"params must hold one array or more, got {params!r}.")
    return LogJointModel(jax.tree.map(as_float_array, params), log_joint)
