"""Mixtures whose weights depend on covariates: p(x | v) = Σₖ πₖ(v) p(x | z = k).

With regressions as components it is a mixture of experts, with categories a latent class model with
covariates. E-step: that of a mixture, with log πₖ(v) a function of the gate's coefficients. M-step:
a Newton step of the gate's multinomial logistic regression, and the emission's `maximize`. The
gate's sums are about the mean and scale of the covariates, ṽ = (1, (v − c)/s), as those of
regressions are (`emissions/_inputs.py`).

Jacobs, Jordan, Nowlan & Hinton (1991), Neural Computation 3; Jordan & Jacobs (1994), Neural
Computation 6; Bandeen-Roche, Miglioretti, Zeger & Rathouz (1997), JASA 92 (latent classes).
"""

from __future__ import annotations

from typing import Any, ClassVar, Generic, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree
from numpy.typing import ArrayLike

from jaxem import _linalg as la
from jaxem._checks import check_continuous, check_shape, check_values
from jaxem._emission import AbstractEmission, Emission, finite, log_prob, width
from jaxem._hold import Held, free, natural_parameters, replace, update
from jaxem._joint import AbstractJointModel, sums_of_joint
from jaxem._model import all_finite
from jaxem._posterior import AbstractPosterior
from jaxem._repr import describe
from jaxem._statistics import Framed
from jaxem._units import num_units
from jaxem.emissions._common import as_float, pseudo_count
from jaxem.emissions._inputs import InputFrame, along, share_within, solve_free
from jaxem.models.mixture import Mixture, check_start


class GateSums(NamedTuple):
    """Q of a gate about its frame θ₀: value + score·δ − ½ δᵀ H δ with δ = θ − θ₀, θ those of ṽ."""

    value: Float[Array, ""]
    units: Float[Array, ""]
    score: Float[Array, "k q"]
    curvature: Float[Array, "kq kq"]
    moments: Float[Array, "q q"]  # Σ ṽ ṽᵀ


class LogisticGate(eqx.Module):
    """Weights from covariates, P(z = k | v) ∝ exp(bₖ + Wₖ·v).

    What all components have in common does nothing: `weights` and `bias` are those of the last
    component taken off, whose own are zero.

    Where covariates separate the components there is no maximum, and coefficients grow for
    ever: give a prior.

    **Arguments:** `weights` (k, p), `bias` (k,).

    **Raises:** `ValueError` for other shapes, or for values that are not finite.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {
        "weights": ("slopes",),
        "bias": ("intercepts",),
    }
    has_sufficient_statistics: ClassVar[bool] = False
    slopes: Float[Array, "k p"]
    intercepts: Float[Array, " k"]
    inputs: InputFrame  # one for all components
    held: Held = eqx.field(static=True)

    def __init__(self, weights: ArrayLike, bias: ArrayLike):
        self.slopes = as_float(weights)
        check_shape("weights", self.slopes, ("k", "p"))
        self.intercepts = jnp.asarray(bias, self.slopes.dtype)
        check_shape("bias", self.intercepts, self.slopes.shape[:1])
        check_values(jnp.isfinite(self.slopes), "weights hold a NaN or an infinity.")
        check_values(jnp.isfinite(self.intercepts), "bias holds a NaN or an infinity.")
        self.inputs = InputFrame.at_zero(self.slopes[None])
        self.held = ()

    def __repr__(self) -> str:
        return describe(self)

    @property
    def weights(self) -> Float[Array, "k p"]:
        """What a covariate adds to the log-odds of each component against the last one."""
        return self.slopes - self.slopes[-1]

    @property
    def bias(self) -> Float[Array, " k"]:
        """The log-odds of each component against the last one at v = 0."""
        return self.intercepts - self.intercepts[-1]

    @property
    def num_components(self) -> int:
        return self.intercepts.shape[0]

    @property
    def num_free_parameters(self) -> int:
        def count(name: str) -> int:
            is_free = free(self, name)
            return int(np.sum(is_free)) - bool(np.all(is_free))

        return count("bias") + self.slopes.shape[1] * count("weights")

    def check(self, v: Float[Array, "n p"]) -> None:
        check_continuous(v, self.slopes.shape[1], self.slopes.dtype, "LogisticGate (covariates)")

    def log_weights(self, v: Float[Array, "n p"]) -> Float[Array, "n k"]:
        """log P(z = k | v)."""
        return self.log_weights_at(self.coordinates(), v)

    def _coefficients(self, slopes: Array, intercepts: Array) -> Float[Array, "k q"]:
        """Those of ṽ."""
        return self.inputs.coefficients(slopes[None], intercepts[None])[0]

    def coordinates(self) -> tuple[Array, Array, Array, Array]:
        theta = self._coefficients(self.slopes, self.intercepts)
        zeros = jnp.zeros((theta.size, theta.size), theta.dtype)
        q = theta.shape[1]
        return theta, zeros[0, 0], zeros, zeros[:q, :q]

    def log_weights_at(self, coordinates: Any, v: Float[Array, "n p"]) -> Float[Array, "n k"]:
        theta, constant, quadratic, moments = coordinates
        k, q = theta.shape
        u = self.inputs.standardized(v)[0]
        log_weights = jax.nn.log_softmax(la.matmul(u.T, theta.T), axis=1)
        # zero; its cotangents are ½ Σ r (diag π − π πᵀ) ⊗ ṽ ṽᵀ and ½ Σ ṽ ṽᵀ, as `along` says
        pi = jnp.exp(log_weights).T
        own = jnp.einsum("kikj->kij", quadratic.reshape(k, q, k, q))
        square = jnp.sum(pi * along(own, u), axis=0)
        mean = (pi[:, None] * u).reshape(k * q, -1)
        zero = square - along(quadratic, mean) + along(moments, u) + constant
        return log_weights + zero[:, None]

    def statistics(self, cotangents: Any) -> GateSums:
        score, units, quadratic, moments = cotangents
        zero = jnp.zeros((), score.dtype)
        return GateSums(zero, units, score, quadratic + quadratic.T, moments + moments.T)

    def reframe(self, sums: GateSums, old: Self) -> GateSums:
        turn = self.inputs.turn_from(old.inputs)[0]
        turns = jnp.kron(jnp.eye(self.num_components, dtype=turn.dtype), turn)
        score = la.matmul(sums.score, turn.T)
        curvature = la.matmul(la.matmul(turns, sums.curvature), turns.T)
        moments = la.matmul(la.matmul(turn, sums.moments), turn.T)
        step = self._coefficients(self.slopes - old.slopes, self.intercepts - old.intercepts)
        pull = la.apply(curvature, step.reshape(-1)).reshape(step.shape)
        value = sums.value + jnp.sum(step * (score - 0.5 * pull))
        return GateSums(value, sums.units, score - pull, curvature, moments)

    def maximize(self, sums: GateSums) -> Self:
        """A Newton step within what is free, no longer than the quadratic can be trusted."""
        (k, q), eye = sums.score.shape, jnp.eye(self.num_components, dtype=sums.score.dtype)
        directions = jnp.einsum("kij,kl->kilj", self.inputs.directions(self), eye).reshape(
            k * q, k * q
        )
        step = solve_free(sums.curvature, sums.score.reshape(1, -1), directions)[0]
        reach = jnp.sum(step * la.apply(sums.curvature, step))
        share = share_within(reach, _LONGEST**2 * sums.units)
        slopes, intercepts = self.inputs.uncentred((share * step).reshape(1, k, q))
        new = update(
            self, slopes=self.slopes + slopes[0], intercepts=self.intercepts + intercepts[0]
        )
        return replace(new, inputs=self.inputs.moved(sums.moments[None]))

    def expected_log_prob(self, sums: GateSums) -> Float[Array, ""]:
        return sums.value

    def prior(self, precision: ArrayLike = 0.0, bias_precision: ArrayLike = 0.0) -> Framed:
        """Normal priors of the coefficients about zero, as pseudo-statistics; flat by default.

        **Arguments:** precisions ≥ 0: `precision`, broadcasting to (k, p), and `bias_precision`,
        to (k,).

        **Raises:** `ValueError` for a negative precision.
        """
        own = pseudo_count("bias_precision", bias_precision, self.intercepts)
        others = pseudo_count("precision", precision, self.slopes)
        diagonal = jnp.concatenate([own[:, None], others], axis=1)
        zero = jax.tree.map(jnp.zeros_like, (self.slopes, self.intercepts))
        inputs = InputFrame.at_zero(self.slopes[None])
        frame = replace(self, slopes=zero[0], intercepts=zero[1], inputs=inputs)
        score, curvature = jnp.zeros_like(diagonal), jnp.diag(diagonal.reshape(-1))
        zeros, q = jnp.zeros_like(curvature), score.shape[1]
        sums = GateSums(zeros[0, 0], zeros[0, 0], score, curvature, zeros[:q, :q])
        return Framed(sums, frame)


_LONGEST = 1.0  # root mean square of a step's change of the log-odds


class MixtureOfExperts(AbstractJointModel, Generic[Emission]):
    """A mixture whose weights depend on covariates. Data: a tuple of covariates v (n, p) and x.

    **Arguments:** `gate`, a `LogisticGate`; `components`, any emission. Regressions, whose data
    are a tuple of inputs and outputs themselves, make it a mixture of experts: data (v, (u, y)).

    `MixtureOfExperts.from_mixture(mixture, num_covariates)` is a start.

    **Raises:** `ValueError` for something else, or for numbers of components that differ.
    """

    natural: ClassVar[dict[str, tuple[str, ...]]] = {}
    gate: LogisticGate
    components: Emission
    held: Held = eqx.field(static=True)

    def __init__(self, gate: LogisticGate, components: Emission):
        if not isinstance(gate, LogisticGate):
            raise ValueError(f"gate must be a LogisticGate, got {type(gate).__name__}.")
        if not isinstance(components, AbstractEmission):
            raise ValueError(f"components must be an emission, got {type(components).__name__}.")
        if gate.num_components != components.num_components:
            raise ValueError(
                f"the gate has {gate.num_components} components, the emission "
                f"{components.num_components}."
            )
        self.gate, self.components, self.held = gate, components, ()

    @classmethod
    def from_mixture(cls, mixture: Mixture, num_covariates: int) -> Self:
        """A start from a mixture: its weights, whatever the covariates."""
        check_start(mixture)
        logits = la.floored_log(mixture.weights)
        slopes = jnp.zeros((len(logits), num_covariates), logits.dtype)
        return cls(LogisticGate(slopes, logits - logits[-1]), mixture.components)

    @property
    def num_components(self) -> int:
        return self.components.num_components

    @property
    def num_free_parameters(self) -> int:
        """Number of parameters that the M-step moves, as AIC and BIC count them."""
        return self.gate.num_free_parameters + self.components.num_free_parameters

    def expected_sums(
        self, data: Any, weights: Any, posterior: AbstractPosterior, key: Any
    ) -> tuple[Any, Float[Array, ""]]:
        """Sums about self, of gate and components, and Σ w log p(x | v)."""

        def log_joint(coordinates: Any, units: Any) -> Float[Array, "n k"]:
            (v, x), (gate, emission) = units, coordinates
            own = self.gate.log_weights_at(gate, v)
            return own + self.components.log_prob_at(emission, x)

        at = (self.gate.coordinates(), self.components.coordinates())
        (gated, emitted), value = sums_of_joint(self, log_joint, at, data, weights, posterior, key)
        return (self.gate.statistics(gated), self.components.statistics(emitted)), value

    def reframe(self, sums: Any, old: Self) -> Any:
        gated, emitted = sums
        return (
            self.gate.reframe(gated, old.gate),
            self.components.reframe(emitted, old.components),
        )

    def m_step(self, statistics: Framed) -> Self:
        """A Newton step of the gate, and the components' own maximum."""
        gated, emitted = statistics.at(self).sums
        gate, components = self.gate.maximize(gated), self.components.maximize(emitted)
        return replace(self, gate=gate, components=components)

    def expected_log_prob(self, statistics: Framed) -> Float[Array, ""]:
        """Q(self; statistics), of the gate to second order about the frame."""
        gated, emitted = statistics.at(self).sums
        return self.gate.expected_log_prob(gated) + self.components.expected_log_prob(emitted)

    def prior(self, gate: Framed | None = None, components: Framed | None = None) -> Framed:
        """The priors `self.gate.prior(…)` and `self.components.prior(…)`; `None` is flat."""
        gated = self.gate.prior() if gate is None else gate
        emitted = self.components.prior() if components is None else components
        frame = replace(self, gate=gated.frame, components=emitted.frame)
        return Framed((gated.sums, emitted.sums), frame)

    def check(self, data: Any) -> None:
        if self.gate.intercepts.ndim != 1:
            raise ValueError(
                f"a gate has a bias of shape (k,), this one {self.gate.intercepts.shape}: fit "
                "takes one model; fit_restarts and jax.vmap take models stacked along an axis."
            )
        if not isinstance(data, tuple) or len(data) != 2:
            given = f"a tuple of {len(data)}" if isinstance(data, tuple) else type(data).__name__
            raise ValueError(
                "MixtureOfExperts expects a tuple (v, x) of covariates v (n, p) and the data x of "
                f"its components, (v, (u, y)) if those are regressions; got {given}."
            )
        self.gate.check(data[0])
        self.components.check(data[1])
        num_units(data)

    def in_support(self, data: Any) -> Bool[Array, " n"]:
        v, x = data
        return finite(v) & self.components.in_support(x)

    def width(self, data: Any) -> int:
        """Numbers an E-step holds for each unit: those of the gate and of the components."""
        return width(self.components, data[1]) + 3 * self.gate.slopes.size

    def log_joint(self, data: Any) -> Float[Array, "n k"]:
        """log πₖ(v) + log p(x | z = k) of each unit."""
        v, x = data
        return self.gate.log_weights(v) + log_prob(self.components, x)

    def sample(
        self, key: Array, covariates: Float[Array, "n p"], **options: Any
    ) -> tuple[PyTree[Array], Int[Array, " n"]]:
        """A draw of x at each row of `covariates`, and the components z that they come from.

        `options` go to the emission: `inputs`, if it is a regression.
        """
        z_key, x_key = jax.random.split(key)
        z = jax.random.categorical(z_key, self.gate.log_weights(covariates), axis=1)
        return self.components.sample(x_key, z, **options), z

    def degenerate(self, statistics: Framed, min_variance: Any) -> Bool[Array, " k"]:
        _, emitted = statistics.at(self).sums
        return self.components.degenerate(emitted, min_variance)

    def representable(self) -> Bool[Array, ""]:
        return all_finite(natural_parameters(self))
