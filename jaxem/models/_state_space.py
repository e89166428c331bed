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

from collections.abc import Callable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, PyTree

from jaxem._core import linalg as la
from jaxem._core.blocks import sum_over_observations
from jaxem._core.causes import caused, either
from jaxem._core.checks import check_values, checked_key, name_of
from jaxem._core.conversion import as_arrays
from jaxem._core.numerics import float_dtype
from jaxem._core.scales import Moments
from jaxem._core.sequences import Sequences, as_sequences
from jaxem._core.statistics import Framed
from jaxem.emissions._gaussian import Gaussian
from jaxem.emissions._linear_regression import LinearRegression
from jaxem.latents import Exact, kalman
from jaxem.models._composite import AbstractSeparable
from jaxem.models._state_space_steps import (
    Forecast,
    Residuals,
    States,
    all_seen,
    answers,
    applied,
    by_pattern,
    finite_values,
    joint_moments,
    parts_of,
    residuals_of,
    seen_entries,
    total_of,
    unobserved_outside,
)


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
        check_values(
            ~emission.structure.without_variance(),
            "emission.covariance has a variance of 0: an output without noise takes a small one, "
            "10⁻⁸ of its variance in float64.",
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
        controls, y = parts_of(sequences)
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
        controls, y = parts_of(sequences)
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
        return jnp.sum(jnp.any(seen_entries(sequences), axis=2), axis=1)

    def serial_steps(self, data: PyTree[Array]) -> int:
        return as_sequences(data).within.shape[1]

    def log_prob(self, data: PyTree[Array]) -> Float[Array, " b"]:
        """log p(y) of each sequence."""
        return jnp.sum(self.one_step_log_prob(data), axis=1)

    def one_step_log_prob(self, data: PyTree[Array]) -> Float[Array, "b t"]:
        """log p(yₜ | y₁ … yₜ₋₁) of each step; 0 where nothing was observed."""
        return answers(self, self._checked(data), kalman.filtered)

    def states(self, data: PyTree[Array]) -> States:
        """Means and covariances of the states given all the data (the Kalman smoother)."""
        return answers(self, self._checked(data), kalman.smoothed)

    def forecast(self, data: PyTree[Array], num_steps: int) -> Forecast:
        """The outputs of the `num_steps` steps behind the end of each sequence.

        **Raises:** `ValueError` for a model with inputs, whose future is not known.
        """
        sequences, n = self._checked(data), self.num_states
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
        c, factor = self.emission.coefficients[0], self.emission.structure.factor()[0]
        spread = la.matmul(la.matmul(c, covariance), c.T) + la.matmul(factor, factor.T)
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

    def degenerate(self, statistics: Framed) -> Int[Array, " 1"]:
        cause = jnp.zeros(1, jnp.int32)
        for name, own in zip(self.factors, statistics.at(self).sums, strict=True):
            cause = either(cause, getattr(self, name).degenerate(own))
        still = jnp.any(self.initial.structure.without_variance(), axis=1)
        return either(cause, caused(no_variance=still & self.initial.free("mean")))

    # E-step

    def expected_sums(self, data, sample_weight, posterior, key):
        if not isinstance(posterior, Exact):
            raise ValueError(
                f"states of a LinearGaussianSSM have the posterior Exact() alone, got "
                f"{type(posterior).__name__}."
            )
        sequences = as_sequences(data)
        partial = sum_over_observations(
            lambda block, _w, _key: jnp.sum(~(all_seen(block) & self.in_support(block))),
            sequences,
            width=self._width(True, sequences),
        )
        return by_pattern(self._total, partial == 0, sequences, sample_weight)

    def _width(self, complete: bool, sequences: Sequences) -> int:
        """Numbers of one sequence; complete ones share matrices, and hold vectors alone."""
        n, p = self.num_states, self.emission.coefficients.shape[1]
        return sequences.within.shape[1] * (8 * n + 4 * p) if complete else self.width(sequences)

    def _total(self, complete: bool, sequences: Sequences, sample_weight: Any) -> Any:
        def block(sequences: Sequences, w: Any, _: Any) -> Any:
            if w is not None and not complete:
                # one of weight 0 counts where it is possible: its weight has a derivative
                keep = (w != 0) | self.in_support(sequences)
                sequences = unobserved_outside(sequences, keep)
            b, dtype = len(sequences.within), float_dtype(self)
            weight = jnp.ones(b, dtype) if w is None else w.astype(dtype)
            return self._weighted_sums(complete, sequences, weight)

        width = self._width(complete, sequences)
        return sum_over_observations(block, sequences, sample_weight, width=width)

    def _weighted_sums(self, complete: bool, sequences: Sequences, weight: Array) -> Any:
        found, residuals = self.inferred(complete, sequences, kalman.smoothed)
        value = jnp.sum(weight @ (found.log_increments + residuals.log_norm))

        start = jnp.sum(weight)[None]
        noise = found.noise_mean[:, 0]
        second = la.matmul(noise.T * weight, noise)
        second = second + total_of(weight, found.noise_covariance[:, 0])
        initial = Moments(start, start, (weight @ noise)[None], second[None])

        steps = jnp.where(sequences.within, weight[:, None], 0)
        moved = joint_moments(
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
        mean = applied(residuals.turn, residuals.seen - applied(c, found.mean))
        cross = -la.matmul(rows, found.covariance)
        spread = residuals.unseen - la.matmul(cross, la.transpose(rows))
        counted = jnp.any(seen_entries(sequences), axis=2)
        read = joint_moments(
            self.emission,
            jnp.where(counted, steps, 0),
            (found.mean, finite_values(parts_of(sequences)[0])),
            found.covariance,
            mean,
            cross,
            spread,
        )
        return (initial, moved, read), value

    def _checked(self, data: PyTree[Array]) -> Sequences:
        data = as_arrays(data)
        self.check(data)
        return as_sequences(data)

    def inferred(
        self,
        complete: bool,
        sequences: Sequences,
        run: Callable[[kalman.Dynamics, kalman.Outputs], Any],
    ) -> tuple[Any, Residuals]:
        """What `kalman.filtered` or `kalman.smoothed` finds of sequences, perhaps complete ones."""
        n = self.num_states
        residuals = residuals_of(self.emission, n, sequences, complete)
        matrix, intercept = self.dynamics.coefficients[0], self.dynamics.intercept[0]
        drift, inputs = intercept[None, None], sequences.driving()
        if inputs is not None:
            drift = drift + la.apply(matrix[:, n:], inputs)
        dynamics = kalman.Dynamics(
            self.initial.mean[0],
            self.initial.structure.factor()[0],
            matrix[:, :n],
            drift,
            self.dynamics.structure.factor()[0],
        )
        return run(dynamics, residuals.outputs), residuals
