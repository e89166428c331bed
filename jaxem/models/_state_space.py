"""Linear-Gaussian state-space models.

    z₁ ~ N(m₀, P₀),    zₜ = A zₜ₋₁ + B uₜ + b + L εₜ,    yₜ = C zₜ + D vₜ + d + R^½ rₜ.

The factors are a Gaussian and two regressions whose inputs are, or contain, the unobserved states.
E-step: moments of states and noise from the smoother of `latents/kalman.py`, in the form and frame
of each factor's sums. M-step: that of each factor.

Entries that were not observed are integrated out. Of a step with some entries r given the others is
a regression of the complete-data residual; a step without any adds nothing to the emission.

Shumway & Stoffer (1982), J. Time Ser. Anal. 3; Ghahramani & Hinton (1996), CRG-TR-96-2;
Holmes (2013), arXiv:1302.3919 (MARSS).
"""

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core import linalg as la
from jaxem._core.blocks import map_over_observations, num_observations, sum_over_observations
from jaxem._core.checks import checked_key, name_of
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import float_dtype
from jaxem._core.scales import HALF_LOG_2PI, Moments
from jaxem._core.sequences import Sequences, as_sequences
from jaxem._core.statistics import Framed
from jaxem.emissions._gaussian import Gaussian
from jaxem.emissions._linear_regression import JointMoments, LinearRegression
from jaxem.latents import Exact, kalman
from jaxem.models._composite import AbstractSeparable


class States(NamedTuple):
    """States given all the data: `mean` (b, t, n), `covariance` (b, t, n, n)."""

    mean: Float[Array, "b t n"]
    covariance: Float[Array, "b t n n"]


class Forecast(NamedTuple):
    """Outputs to come: `mean` (b, t, p), `covariance` (b, t, p, p) with the noise of outputs."""

    mean: Float[Array, "b t p"]
    covariance: Float[Array, "b t p p"]


class _Residuals(NamedTuple):
    """How complete-data residuals follow from what was seen of a step, whitened by all of R."""

    outputs: kalman.Outputs
    turn: Float[Array, "b t p p"]  # of seen residuals, 0 in columns of what was not
    unseen: Float[Array, "b t p p"]  # the variance of what was not seen, given the rest
    seen: Float[Array, "b t p"]  # seen outputs less those of z = 0
    log_norm: Float[Array, "b t"]


class LinearGaussianSSM(AbstractSeparable):
    """A linear-Gaussian state-space model (Kalman filter and smoother, fitted by EM).

    Data: outputs (b, t, p) of b sequences, or `Sequences` of different lengths; an entry that is
    NaN was not observed, nor is a step where `observed` is False. Inputs of the dynamics are
    `Sequences(…, inputs=u)`, u[t] moving into step t; inputs of the outputs come with them, as
    `Sequences((v, y))`.

    **Arguments:** `initial`, a `Gaussian` of one component: the first state. `dynamics`, a
    `LinearRegression` of one component: of n outputs on n states, and perhaps inputs behind them.
    `emission`, another, of the p outputs on the n states, and perhaps inputs behind them.

    `freeze(model, "initial.covariance")` and other names fix what is known. With one sequence the
    variance of its first state cannot be estimated: freeze it. The scale of the states is not
    determined either unless something fixes it, such as frozen `emission.coefficients`.

    **Raises:** `ValueError` for factors of other kinds or sizes.

    ```python
    model = LinearGaussianSSM(
        Gaussian([[0.0]], [[[1.0]]]),
        LinearRegression([[[0.9]]], [[0.0]], [[[0.1]]]),
        LinearRegression([[[1.0]]], [[0.0]], [[[0.5]]]),
    )
    ```
    """

    factors: ClassVar[tuple[str, ...]] = ("initial", "dynamics", "emission")
    initial: Gaussian
    dynamics: LinearRegression
    emission: LinearRegression

    def __init__(self, initial: Gaussian, dynamics: LinearRegression, emission: LinearRegression):
        for name, factor, kind in (
            ("initial", initial, Gaussian),
            ("dynamics", dynamics, LinearRegression),
            ("emission", emission, LinearRegression),
        ):
            if not isinstance(factor, kind) or factor.num_components != 1:
                raise ValueError(
                    f"{name} must be a {kind.__name__} of one component, got {name_of(factor)}."
                )
        n = initial.mean.shape[1]
        moved, read = dynamics.coefficients.shape, emission.coefficients.shape
        if moved[1] != n or moved[2] < n:
            raise ValueError(
                f"dynamics has coefficients of shape {moved}; a state of {n} numbers (those of "
                f"initial.mean) needs (1, {n}, {n}), or more columns for inputs."
            )
        if read[2] < n:
            raise ValueError(
                f"emission has coefficients of shape {read}; a state of {n} numbers needs "
                f"(1, p, {n}), or more columns for inputs."
            )
        self.initial, self.dynamics, self.emission = initial, dynamics, emission

    @property
    def num_states(self) -> int:
        """How many numbers a state holds."""
        return self.initial.mean.shape[1]

    # What the model says of data

    def check(self, data: PyTree[Array]) -> None:
        sequences = as_sequences(data)
        n, dtype = self.num_states, float_dtype(self)
        controls, y = _parts(sequences)
        for name, given, factor in (
            ("inputs", sequences.inputs, self.dynamics),
            ("inputs beside the outputs", controls, self.emission),
        ):
            wanted = factor.coefficients.shape[2] - n
            found = 0 if given is None else given.shape[2]
            if found != wanted:
                raise ValueError(
                    f"LinearGaussianSSM: the {type(factor).__name__} of "
                    f"{'the states' if factor is self.dynamics else 'the outputs'} has "
                    f"coefficients for {wanted} {name}, the sequences hold {found}."
                )
        p = self.emission.coefficients.shape[1]
        if y.ndim != 3 or y.shape[2] != p:
            raise ValueError(
                f"LinearGaussianSSM expects outputs of shape (b, t, {p}), got {y.shape}."
            )
        if y.dtype != dtype:
            raise ValueError(
                f"LinearGaussianSSM has parameters of {dtype}, the data are {y.dtype}: convert "
                "one of them."
            )

    def in_support(self, data: PyTree[Array]) -> Bool[Array, " b"]:
        """Whether outputs are finite or NaN, and inputs finite, within each sequence."""
        sequences = as_sequences(data)
        controls, y = _parts(sequences)
        fine = jnp.all(~jnp.isinf(y), axis=2) | ~sequences.present
        if controls is not None:
            fine &= jnp.all(jnp.isfinite(controls), axis=2) | ~sequences.present
        if (inputs := sequences.driving()) is not None:
            fine &= jnp.all(jnp.isfinite(inputs), axis=2)
        return jnp.all(fine, axis=1) & sequences.within[:, 0]

    def width(self, data: PyTree[Array]) -> int:
        n, p = self.num_states, self.emission.coefficients.shape[1]
        return as_sequences(data).within.shape[1] * (6 * n**2 + 3 * p**2 + 2 * n * p)

    def num_observed(self, data: PyTree[Array]) -> Array:
        """How many steps of each sequence were observed, in some entry."""
        sequences = as_sequences(as_arrays(data))
        return jnp.sum(jnp.any(_seen(sequences), axis=2), axis=1)

    def serial_steps(self, data: PyTree[Array]) -> int:
        return as_sequences(data).within.shape[1]

    def log_prob(self, data: PyTree[Array]) -> Float[Array, " b"]:
        """log p(y) of each sequence."""
        return jnp.sum(self.one_step_log_prob(data), axis=1)

    def one_step_log_prob(self, data: PyTree[Array]) -> Float[Array, "b t"]:
        """log p(yₜ | y₁ … yₜ₋₁) of each step; 0 where nothing was observed."""
        return self._answer(data, lambda found, residuals: found.log_increments + residuals)

    def states(self, data: PyTree[Array]) -> States:
        """Means and covariances of the states given all the data (the Kalman smoother)."""
        return self._answer(data, lambda found, _: States(found.mean, found.covariance))

    def forecast(self, data: PyTree[Array], num_steps: int) -> Forecast:
        """The outputs of the `num_steps` steps behind the end of each sequence.

        **Raises:** `ValueError` for a model with inputs, whose future is not known.
        """
        sequences = as_sequences(as_arrays(data))
        self.check(sequences)
        n = self.num_states
        if {f.coefficients.shape[2] for f in (self.dynamics, self.emission)} != {n}:
            raise ValueError(
                "forecast does not know the inputs to come: append unobserved steps with their "
                "inputs to the sequences, and ask states(…)."
            )
        longer = [(0, 0), (0, num_steps), (0, 0)]
        values = jnp.pad(sequences.values, longer, constant_values=jnp.nan)
        lengths = jnp.sum(sequences.within, axis=1)
        y = jnp.where(sequences.present[:, :, None], sequences.values, jnp.nan)
        values = values.at[:, : y.shape[1]].set(y)
        mean, covariance = self.states(Sequences(values, lengths + num_steps))
        places = lengths[:, None] + jnp.arange(num_steps)
        mean = jnp.take_along_axis(mean, places[:, :, None], axis=1)
        covariance = jnp.take_along_axis(covariance, places[:, :, None, None], axis=1)
        c, noise = self.emission.coefficients[0], jnp.atleast_3d(self._output_covariance())
        spread = la.matmul(la.matmul(c, covariance), c.T) + noise
        return Forecast(la.apply(c, mean) + self.emission.intercept[0], spread)

    def sample(
        self, key: Array, num_sequences: int, num_steps: int
    ) -> tuple[Float[Array, "b t p"], Float[Array, "b t n"]]:
        """Draws of outputs, and of the states behind them.

        **Raises:** `ValueError` for a model with inputs.
        """
        n = self.num_states
        if {f.coefficients.shape[2] for f in (self.dynamics, self.emission)} != {n}:
            raise ValueError("LinearGaussianSSM with inputs cannot be sampled without them.")
        first_key, key, output_key = jax.random.split(checked_key(key), 3)
        zero = jnp.zeros(num_sequences, jnp.int32)
        first = self.initial.sample(first_key, zero)

        def move(z: Array, key: Array) -> tuple[Array, Array]:
            new = self.dynamics.sample(key, zero, inputs=z)[1]
            return new, new

        later = jax.lax.scan(move, first, jax.random.split(key, num_steps - 1))[1]
        z = jnp.moveaxis(jnp.concatenate([first[None], later]), 0, 1)
        flat = z.reshape(-1, n)
        y = self.emission.sample(output_key, jnp.zeros(len(flat), jnp.int32), inputs=flat)[1]
        return y.reshape(num_sequences, num_steps, -1), z

    def degenerate(self, statistics: Framed) -> Bool[Array, " 1"]:
        sums = statistics.at(self).sums
        flags = (
            getattr(self, name).degenerate(own)
            for name, own in zip(self.factors, sums, strict=True)
        )
        return jnp.any(jnp.stack(list(flags)), axis=0)

    # E-step

    def expected_sums(self, data, sample_weight, posterior, key):
        if not isinstance(posterior, Exact):
            raise ValueError(
                f"states of a LinearGaussianSSM have the posterior Exact() alone, got "
                f"{type(posterior).__name__}."
            )
        sequences = as_sequences(data)
        width = self.width(sequences)
        return sum_over_observations(self._sums_of_block, sequences, sample_weight, width=width)

    def _sums_of_block(self, sequences: Sequences, w: Any, _: Any) -> Any:
        if w is not None:
            # one of weight 0 counts where it is possible: its weight has a derivative
            sequences = _without(sequences, (w != 0) | self.in_support(sequences))
        b, t = sequences.within.shape
        weight = jnp.ones(b, float_dtype(self)) if w is None else w.astype(float_dtype(self))
        found, residuals = self._smoothed(sequences)
        value = jnp.sum(weight @ (found.log_increments + residuals.log_norm))

        start = jnp.sum(weight)[None]
        noise = found.noise_mean[:, 0]
        second = la.matmul(noise.T * weight, noise)
        second = second + jnp.tensordot(weight, found.noise_covariance[:, 0], 1)
        initial = Moments(start, start, (weight @ noise)[None], second[None])

        steps = jnp.where(sequences.within, weight[:, None], 0)
        moved = _joint(
            self.dynamics,
            steps[:, 1:],
            (found.mean[:, :-1], None if (u := sequences.driving()) is None else u[:, 1:]),
            found.covariance[:, :-1],
            found.noise_mean[:, 1:],
            found.noise_cross[:, 1:],
            found.noise_covariance[:, 1:],
        )

        c = self.emission.coefficients[0, :, : self.num_states]
        rows = la.matmul(residuals.turn, c)
        mean = la.apply(residuals.turn, residuals.seen - la.apply(c, found.mean))
        cross = -la.matmul(rows, found.covariance)
        spread = residuals.unseen - la.matmul(cross, la.transpose(rows))
        counted = jnp.any(_seen(sequences), axis=2)
        read = _joint(
            self.emission,
            jnp.where(counted, steps, 0),
            (found.mean, _finite(_parts(sequences)[0])),
            found.covariance,
            mean,
            cross,
            spread,
        )
        return (initial, moved, read), value

    def _answer(self, data: PyTree[Array], answer: Any) -> Any:
        data = as_arrays(data)
        self.check(data)
        sequences = as_sequences(data)
        num_observations(sequences)

        def block(sequences: Sequences) -> Any:
            found, residuals = self._smoothed(sequences)
            return answer(found, residuals.log_norm)

        return map_over_observations(jax.jit(block), sequences, width=self.width(sequences))

    def _smoothed(self, sequences: Sequences) -> tuple[kalman.Smoothed, _Residuals]:
        n = self.num_states
        residuals = self._residuals(sequences)
        matrix, intercept = self.dynamics.coefficients[0], self.dynamics.intercept[0]
        drift = jnp.broadcast_to(intercept, (*sequences.within.shape, n))
        inputs = sequences.driving()
        if inputs is not None:
            drift = drift + la.apply(matrix[:, n:], inputs)
        dynamics = kalman.Dynamics(
            self.initial.mean[0],
            self.initial.structure.factor()[0],
            matrix[:, :n],
            drift,
            self.dynamics.structure.factor()[0],
        )
        axes = kalman.Dynamics(None, None, None, 0, None)  # pyright: ignore[reportArgumentType]
        found = jax.vmap(kalman.smoothed, in_axes=(axes, 0))(dynamics, residuals.outputs)
        return found, residuals

    def _output_covariance(self) -> Float[Array, "p p"]:
        factor = self.emission.structure.factor()[0]
        return la.matmul(factor, factor.T)

    def _residuals(self, sequences: Sequences) -> _Residuals:
        n, factor = self.num_states, self.emission.structure.factor()[0]
        controls, y = _parts(sequences)
        seen = _seen(sequences)
        share = seen.astype(y.dtype)
        level = self.emission.intercept[0]
        if controls is not None:
            level = level + la.apply(self.emission.coefficients[0, :, n:], _finite(controls))
        values = jnp.where(seen, y - level, 0)
        # R of what was seen, and 1 in place of the variance of what was not
        eye = jnp.eye(len(factor), dtype=y.dtype)
        both = share[..., :, None] * share[..., None, :]
        covariance = both * la.matmul(factor, factor.T) + (1 - share)[..., None] * eye
        root = la.cholesky(covariance)
        whitener = la.inverse_of_lower(root) * share[..., None, :]
        rows = la.matmul(whitener, self.emission.coefficients[0, :, :n])
        turn = la.matmul(factor.T, la.matmul(la.transpose(whitener), whitener))
        log_scale = jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1))
        log_norm = -jnp.sum(jnp.where(seen, log_scale + HALF_LOG_2PI, 0), axis=-1)
        outputs = kalman.Outputs(rows, la.apply(whitener, values))
        return _Residuals(outputs, turn, eye - la.matmul(turn, factor), values, log_norm)


def _joint(
    factor: LinearRegression,
    weight: Float[Array, "b t"],
    inputs: tuple[Float[Array, "b t n"], Float[Array, "b t q"] | None],
    covariance: Float[Array, "b t n n"],
    residual: Float[Array, "b t d"],
    cross: Float[Array, "b t d n"],
    spread: Float[Array, "b t d d"],
) -> JointMoments:
    """Sums of a regression whose first inputs, and residuals, are known by moments."""
    state, known = inputs
    n, d = state.shape[-1], residual.shape[-1]
    given = state if known is None else jnp.concatenate([state, known], axis=-1)
    p = given.shape[-1]
    v = factor.inputs.standardized(given.reshape(-1, p))[0]  # (1 + p, b t)
    t = jnp.concatenate([v, residual.reshape(-1, d).T])
    flat = weight.reshape(-1)
    joint = la.matmul(t * flat, t.T)
    unit = jnp.exp(factor.inputs.log_scale[0, :n])
    moved = jnp.tensordot(weight, covariance, 2) / (unit[:, None] * unit)
    side = jnp.tensordot(weight, cross, 2) / unit
    own = jnp.tensordot(weight, spread, 2)
    states, residuals = slice(1, 1 + n), slice(1 + p, 1 + p + d)
    joint = joint.at[states, states].add(moved).at[residuals, residuals].add(own)
    joint = joint.at[residuals, states].add(side).at[states, residuals].add(side.T)
    return JointMoments(jnp.sum(flat)[None], joint[None])


def _parts(sequences: Sequences) -> tuple[Array | None, Array]:
    """Inputs beside the outputs, or None, and the outputs."""
    if isinstance(sequences.values, tuple):
        if len(sequences.values) != 2:
            raise ValueError(
                f"LinearGaussianSSM expects outputs, or a tuple (inputs, outputs), got "
                f"{len(sequences.values)} arrays."
            )
        return sequences.values
    return None, sequences.values


def _seen(sequences: Sequences) -> Bool[Array, "b t p"]:
    return sequences.present[:, :, None] & ~jnp.isnan(_parts(sequences)[1])


def _finite(values: Any) -> Any:
    return None if values is None else jnp.where(jnp.isfinite(values), values, 0)


def _without(sequences: Sequences, keep: Bool[Array, " b"]) -> Sequences:
    """The sequences, of which those outside `keep` were not observed."""
    observed = sequences.present & keep[:, None]
    inputs = sequences.inputs
    if inputs is not None:
        inputs = jnp.where(keep[:, None, None], inputs, 0)
    return Sequences(sequences.values, sequences.lengths, observed=observed, inputs=inputs)
