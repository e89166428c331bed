"""Models of which only log p(x, z = k; θ) is written down.

E-step. Responsibilities are the derivative of the marginaliser of the log-joint; the statistics
are the score Σ w r ∂ log p(x, z; θ) / ∂θ at the present θ₀: additive over units, as large as θ.
They know Q near θ₀ alone, so that steps are halved until they are not too long (`_guard.py`), and
`Gradient` climbs the objective itself.

Fisher's identity: at θ₀ the score of Q is that of the log-likelihood (Dempster, Laird & Rubin
1977, JRSS B 39).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._emission import finite
from jaxem._hold import replace
from jaxem._joint import AbstractJointModel, sums_of_joint
from jaxem._model import all_finite, as_float_array
from jaxem._posterior import AbstractPosterior
from jaxem._statistics import Framed
from jaxem._units import num_units, total_weight
from jaxem.emissions._common import divide


class Slope(NamedTuple):
    """Q near the frame θ₀, cautiously: value + score·δ − ½ n ‖δ‖² with δ = θ − θ₀, of n units.

    The square says no more than that a step along the mean score is as far as one should go.
    """

    units: Float[Array, ""]
    value: Float[Array, ""]
    score: PyTree[Array]

    def moved(self, step: PyTree[Array]) -> Slope:
        """The same, about θ₀ + step."""
        score = jax.tree.map(lambda s, d: s - self.units * d, self.score, step)
        rises = jax.tree.map(lambda a, b, d: jnp.sum(0.5 * (a + b) * d), self.score, score, step)
        return self._replace(value=self.value + sum(jax.tree.leaves(rises)), score=score)


class LogJointModel(AbstractJointModel):
    """A model made of a log-joint and its parameters; see `from_log_joint`."""

    has_sufficient_statistics: ClassVar[bool] = False
    has_curvature: ClassVar[bool] = False
    params: PyTree
    function: Callable[..., Any] = eqx.field(static=True)

    def expected_sums(
        self, data: Any, weights: Any, posterior: AbstractPosterior, key: Any
    ) -> tuple[Slope, Float[Array, ""]]:
        """The score at self, and Σ w log p(x)."""
        score, value = sums_of_joint(
            self, self.function, self.params, data, weights, posterior, key
        )
        units = jnp.asarray(total_weight(data, weights), value.dtype)
        return Slope(units, jnp.zeros_like(units), score), value

    def reframe(self, sums: Slope, old: Self) -> Slope:
        return sums.moved(jax.tree.map(jnp.subtract, self.params, old.params))

    def m_step(self, statistics: Framed) -> Self:
        """One step along the score of a unit; there is no closed form.

        In `fit` it is halved until the objective does not fall. `Gradient` climbs faster.
        """
        sums = statistics.at(self).sums
        params = jax.tree.map(lambda p, s: p + divide(s, sums.units), self.params, sums.score)
        return replace(self, params=params)

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q near the model that the statistics were taken at, to first order."""
        return statistics.at(self).sums.value

    @property
    def num_free_parameters(self) -> int:
        """All numbers in `params`, as AIC and BIC count them."""
        return sum(leaf.size for leaf in jax.tree.leaves(self.params))

    def check(self, data: PyTree[Array]) -> None:
        n = num_units(data)
        shape = jax.eval_shape(self.function, self.params, data)
        if not hasattr(shape, "shape") or shape.ndim != 2 or shape.shape[0] != n:
            got = getattr(shape, "shape", type(shape).__name__)
            raise ValueError(
                "log_joint must return log p(x, z = k) as an array of shape (n, k), here "
                f"({n}, k); got {got}."
            )

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " n"]:
        return finite(data)

    def width(self, data: PyTree[Array]) -> int:
        n = num_units(data)
        joint = jax.eval_shape(self.function, self.params, data)
        features = sum(leaf.size for leaf in jax.tree.leaves(data)) // n
        return joint.shape[1] * features

    def log_joint(self, data: PyTree[Array]) -> Float[Array, "n k"]:
        """log p(x, z = k) of each unit."""
        return self.function(self.params, data)

    def degenerate(self, statistics: Framed, min_variance: Any) -> Bool[Array, " 1"]:
        return jnp.zeros((1,), bool)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(self.params)


def from_log_joint(
    log_joint: Callable[[PyTree, PyTree[Array]], Float[Array, "n k"]], params: PyTree
) -> LogJointModel:
    """A model of a latent z of K values, from log p(x, z = k; params) alone.

    The E-step is exact; the M-step climbs. Plain `EM()` takes one guarded step along the score at
    a time; an optimiser that remembers is faster, and so is an accelerator:

        fit(from_log_joint(log_joint, params), data, EM(maximization=Gradient(optax.lbfgs())))

    **Arguments:**

    - `log_joint(params, data)` returns log p(x, z = k) as an array (n, k), one row for each unit
      of `data` by itself: `fit` calls it on blocks of units. It must be differentiable, and may
      be −inf where a z is impossible whatever the parameters.
    - `params`: the start, any PyTree of arrays, without constraints: write a variance as the
      exponential of a parameter, weights as a softmax.

    The function must be module-level, or kept, for a second fit to reuse the compiled one:
    functions are compared by identity.
    """
    if not callable(log_joint):
        raise ValueError(f"log_joint must be a function of params and data, got {log_joint!r}.")
    return LogJointModel(jax.tree.map(as_float_array, params), log_joint)
