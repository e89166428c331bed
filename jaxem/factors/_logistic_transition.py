"""Transitions of a Markov chain that inputs drive: a softmax regression for each state.

For state i, with θᵢⱼ = (bᵢⱼ, Wᵢⱼ) and ũ = (1, u), log Aᵢⱼ(u) = θᵢⱼ·ũ − log Σₘ exp(θᵢₘ·ũ). Sums are
Böhning's quadratic about the frame, a lower bound of Q everywhere,

    g = Σ (P(zₜ₋₁ = i, zₜ = j) − P(zₜ₋₁ = i) Aᵢⱼ) ũ,    H = ½ (I − 11ᵀ/k) ⊗ S,
    S = Σ P(zₜ₋₁ = i) ũ ũᵀ,

so that the M-step to its maximum, δ = 2 g S⁻¹, raises the objective: it needs no guard.

Böhning (1992), Ann. Inst. Stat. Math. 44; Bengio & Frasconi (1995), NIPS 7.
"""

from typing import Any, ClassVar, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from numpy.typing import ArrayLike

from jaxem._core import linalg as la
from jaxem._core.checks import check_shape
from jaxem._core.constraints import leaves_of, real, simplex
from jaxem._core.numerics import as_float, pseudo_count
from jaxem._core.parameters import Frozen, free, replace, update, with_rows
from jaxem._core.quadratic import Kronecker, LocalQuadratic
from jaxem._core.statistics import Framed
from jaxem.factors._transition import AbstractTransition


class LogisticTransition(AbstractTransition):
    """Transitions driven by inputs: P(zₜ = j | zₜ₋₁ = i, u) ∝ exp(bᵢⱼ + Wᵢⱼ·uₜ).

    Its M-step maximises Böhning's quadratic lower bound of Q, so that the objective rises at
    every step; there is no closed form.

    **Arguments:** `baseline` (k, k), the transition matrix at u = 0; `coefficients` (k, k, p), or
    an integer p for coefficients of zero. The inputs are those of `Sequences(…, inputs=…)`. What
    coefficients have in common over all targets j does nothing, and is taken off them.

    **Raises:** `ValueError` for another shape, or a baseline that is not stochastic.

    ```python
    LogisticTransition([[0.8, 0.2], [0.3, 0.7]], 1)  # one input, which drives nothing yet
    ```
    """

    parameters: ClassVar = {
        "baseline": simplex("logits", "k k"),
        "coefficients": real("slopes", "k k p"),
    }
    logits: Float[Array, "k k"]
    slopes: Float[Array, "k k p"]
    frozen: Frozen = eqx.field(static=True)

    def __init__(self, baseline: ArrayLike, coefficients: ArrayLike | int):
        baseline = as_float(baseline, "baseline")
        size = max(baseline.shape[0], 1) if baseline.ndim else 1
        check_shape("baseline", baseline, (size, size))
        if isinstance(coefficients, int) and coefficients > 0:
            coefficients = jnp.zeros((size, size, coefficients), baseline.dtype)
        given = leaves_of(self.parameters, baseline=baseline, coefficients=coefficients)
        self.logits, self.slopes, self.frozen = given["logits"], given["slopes"], ()

    @property
    def baseline(self) -> Float[Array, "k k"]:
        return jax.nn.softmax(self.logits, axis=1)

    @property
    def coefficients(self) -> Float[Array, "k k p"]:
        return self.slopes - jnp.mean(self.slopes, axis=1, keepdims=True)

    @property
    def num_states(self) -> int:
        return self.logits.shape[0]

    @property
    def num_free_parameters(self) -> int:
        k, _, p = self.slopes.shape
        rows = np.sum(free(self, "baseline")) + p * np.sum(free(self, "coefficients"))
        return int(rows) * (k - 1)

    def reordered(self, order: Int[Array, " k"]) -> Self:
        rows = with_rows(self, order)
        return replace(rows, logits=rows.logits[:, order], slopes=rows.slopes[:, order])

    def check(self, inputs: Array | None) -> None:
        p = self.slopes.shape[2]
        if inputs is None or inputs.shape[-1] != p:
            got = "none" if inputs is None else f"shape {inputs.shape}"
            raise ValueError(
                f"a LogisticTransition needs inputs of shape (b, t, {p}), got {got}; they go in "
                "as Sequences(values, inputs=…)."
            )

    def _theta(self) -> Float[Array, "k k q"]:
        return jnp.concatenate([self.logits[:, :, None], self.slopes], axis=2)

    def tilt(self) -> LocalQuadratic:
        k, _, p = self.slopes.shape
        zeros = jnp.zeros((k, k, 1 + p), self.logits.dtype)
        moments = jnp.zeros((k, 1 + p, 1 + p), self.logits.dtype)
        return LocalQuadratic(zeros[0, 0, 0], zeros[:, 0, 0], zeros, Kronecker(moments))

    def matrix_at(self, tilt: LocalQuadratic, inputs: Any) -> Float[Array, "t k k"]:
        theta = self._theta() + tilt.score
        ones = jnp.ones((inputs.shape[0], 1), theta.dtype)
        u = jnp.concatenate([ones, inputs.astype(theta.dtype)], axis=1)
        u = jnp.roll(u, -1, axis=0)  # what drives the transition into the next step
        k, _, q = theta.shape
        logits = la.matmul(u, theta.reshape(k * k, q).T).reshape(-1, k, k)
        # zero; cotangents are sums over P(zₜ₋₁ = i)
        moments = tilt.curvature.moments.reshape(k, q * q)
        rows = la.matmul(la.outer(u, u).reshape(-1, q * q), moments.T) + tilt.count
        return jax.nn.softmax(logits, axis=2) * jnp.exp(rows)[:, :, None]

    def reframe(self, sums: LocalQuadratic, old: Self) -> LocalQuadratic:
        return sums.moved(self._theta() - old._theta())

    def m_step(self, sums: LocalQuadratic) -> Self:
        p = self.slopes.shape[2]
        level, inputs = free(self, "baseline")[:, None], free(self, "coefficients")[:, None]
        rows = np.concatenate([level, np.repeat(inputs, p, axis=1)], axis=1)
        directions = rows[:, :, None] * np.eye(1 + p)
        theta = self._theta() + sums.maximum(jnp.asarray(directions, self.logits.dtype))
        return update(self, logits=theta[:, :, 0], slopes=theta[:, :, 1:])

    def expected_log_prob(self, sums: LocalQuadratic) -> Float[Array, ""]:
        return sums.value

    def prior(
        self,
        *,
        precision: ArrayLike = 0.0,
        baseline_precision: ArrayLike = 0.0,
        coefficients: ArrayLike = 0.0,
        baseline: ArrayLike | None = None,
    ) -> Framed:
        """Normal priors of the coefficients, as pseudo-statistics; a ridge by default.

        Of each state's coefficients of an input over the targets, and of the logarithms of its row
        of the baseline, less what they have in common.

        **Arguments:** the means `coefficients`, broadcasting to (k, k, p), and `baseline`, (k, k),
        default: the present one; their precisions ≥ 0: `precision`, broadcasting to (k, p), and
        `baseline_precision`, to (k,).

        **Raises:** `ValueError` for a negative precision, or means that are no such parameters.
        """
        law = {} if baseline is None else {"baseline": baseline}
        frame = self.with_parameters(coefficients=coefficients, **law)
        own = pseudo_count("baseline_precision", baseline_precision, self.logits[:, 0])
        others = pseudo_count("precision", precision, self.slopes[:, 0])
        diagonal = 2 * jnp.concatenate([own[:, None], others], axis=1)
        moments = diagonal[:, :, None] * np.eye(diagonal.shape[1], dtype=diagonal.dtype)
        return Framed(self.tilt()._replace(curvature=Kronecker(moments)), frame)
