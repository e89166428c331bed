"""Steps of a linear-Gaussian state-space model: what was seen of them, and sums of its factors."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import equinox as eqx
import equinox.internal as eqxi
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from jaxem._core import linalg as la
from jaxem._core.blocks import map_over_observations
from jaxem._core.scales import HALF_LOG_2PI
from jaxem._core.sequences import Sequences
from jaxem.emissions._linear_regression import JointMoments, LinearRegression
from jaxem.latents import kalman


class States(NamedTuple):
    """States given all the data: `mean` (b, t, n), `covariance` (b, t, n, n)."""

    mean: Float[Array, "b t n"]
    covariance: Float[Array, "b t n n"]


class Forecast(NamedTuple):
    """Outputs to come: `mean` (b, t, p), `covariance` (b, t, p, p) with the noise of outputs."""

    mean: Float[Array, "b t p"]
    covariance: Float[Array, "b t p p"]


class Residuals(NamedTuple):
    """How complete-data residuals follow from what was seen of a step, whitened by all of R.

    Of complete sequences, one matrix stands for those of all steps.
    """

    outputs: kalman.Outputs
    turn: Float[Array, "c s p p"]  # of seen residuals, 0 in columns of what was not
    unseen: Float[Array, "c s p p"]  # the variance of what was not seen, given the rest
    seen: Float[Array, "b t p"]  # seen outputs less those of z = 0
    log_norm: Float[Array, "b t"]


def by_pattern(function: Callable[..., Any], complete: Bool[Array, ""], *args: Any) -> Any:
    """`function(complete, *args)`, where that is a Python boolean."""
    of_all, of_some = (functools.partial(function, whole) for whole in (True, False))
    return lax.cond(eqxi.unvmap_all(complete), of_all, of_some, *args)


@eqx.filter_jit  # an eager call compiles once
def answers(model: Any, sequences: Sequences, run: Callable[..., Any]) -> Any:
    """log p(yₜ | y₁ … yₜ₋₁) of each step from the filter, or the states from the smoother."""

    def answer(complete: bool, sequences: Sequences) -> Any:
        found, residuals = model.inferred(complete, sequences, run)
        if run is kalman.filtered:
            return found.log_increments + residuals.log_norm
        shape = (*found.mean.shape, model.num_states)
        return States(found.mean, jnp.broadcast_to(found.covariance, shape))

    def block(sequences: Sequences) -> Any:
        return by_pattern(answer, jnp.all(all_seen(sequences)), sequences)

    return map_over_observations(block, sequences, width=model.width(sequences))


def all_seen(sequences: Sequences) -> Bool[Array, " b"]:
    """Which sequences are of full length, and observed in every entry of every step."""
    return jnp.all(seen_entries(sequences), axis=(1, 2))


def residuals_of(
    emission: LinearRegression, num_states: int, sequences: Sequences, complete: bool
) -> Residuals:
    """What was seen of each step, whitened."""
    n, factor = num_states, emission.structure.factor()[0]
    controls, y = parts_of(sequences)
    seen = seen_entries(sequences)
    share = jnp.ones((1, 1, y.shape[2]), y.dtype) if complete else seen.astype(y.dtype)
    level = emission.intercept[0]
    if controls is not None:
        level = level + applied(emission.coefficients[0, :, n:], finite_values(controls))
    values = jnp.where(seen, y - level, 0)
    # R of what was seen, and 1 in place of the variance of what was not
    eye = jnp.eye(len(factor), dtype=y.dtype)
    both = share[..., :, None] * share[..., None, :]
    covariance = both * la.matmul(factor, factor.T) + (1 - share)[..., None] * eye
    root = la.cholesky(covariance)
    whitener = la.inverse_of_lower(root) * share[..., None, :]
    rows = la.matmul(whitener, emission.coefficients[0, :, :n])
    turn = la.matmul(factor.T, la.matmul(la.transpose(whitener), whitener))
    log_scale = jnp.log(jnp.diagonal(root, axis1=-2, axis2=-1))
    log_norm = -jnp.sum(share * (log_scale + HALF_LOG_2PI), axis=-1)
    outputs = kalman.Outputs(rows, applied(whitener, values))
    return Residuals(outputs, turn, eye - la.matmul(turn, factor), values, log_norm)


def joint_moments(
    factor: LinearRegression,
    weight: Float[Array, "b t"],
    inputs: tuple[Float[Array, "b t n"], Float[Array, "b t q"] | None],
    covariance: Float[Array, "c t n n"],
    residual: Float[Array, "b t d"],
    cross: Float[Array, "c t d n"],
    spread: Float[Array, "c t d d"],
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
    turn = factor.inputs.whitener()[0, :, :n]
    moved = la.matmul(la.matmul(turn, total_of(weight, covariance)), turn.T)
    side = la.matmul(total_of(weight, cross), turn.T)
    own = total_of(weight, spread)
    of_inputs, of_residuals = slice(1, 1 + p), slice(1 + p, 1 + p + d)
    joint = joint.at[of_inputs, of_inputs].add(moved).at[of_residuals, of_residuals].add(own)
    joint = joint.at[of_residuals, of_inputs].add(side).at[of_inputs, of_residuals].add(side.T)
    return JointMoments(jnp.sum(flat)[None], joint[None])


def total_of(weight: Float[Array, "*b"], matrices: Float[Array, "*c i j"]) -> Float[Array, "i j"]:
    """The weighted sum of matrices, of which one can stand for those of all sequences, or steps."""
    for axis in range(weight.ndim):
        if matrices.shape[axis] < weight.shape[axis]:
            weight = jnp.sum(weight, axis=axis, keepdims=True)
    return jnp.tensordot(weight, matrices, weight.ndim)


def applied(a: Float[Array, "*c i j"], v: Float[Array, "b t j"]) -> Float[Array, "b t i"]:
    """A product with a vector of each step; one matrix for all of them is one product."""
    return (
        la.apply(a, v)
        if a.size > a.shape[-2] * a.shape[-1]
        else la.matmul(v, a.reshape(a.shape[-2:]).T)
    )


def parts_of(sequences: Sequences) -> tuple[Array | None, Array]:
    """Inputs beside the outputs, or None, and the outputs."""
    if isinstance(sequences.values, tuple):
        if len(sequences.values) != 2:
            raise ValueError(
                f"LinearGaussianSSM expects outputs, or a tuple (inputs, outputs), got "
                f"{len(sequences.values)} arrays."
            )
        return sequences.values
    return None, sequences.values


def seen_entries(sequences: Sequences) -> Bool[Array, "b t p"]:
    """Which entries of the outputs were observed."""
    return sequences.present[:, :, None] & ~jnp.isnan(parts_of(sequences)[1])


def finite_values(values: Any) -> Any:
    """The values, 0 in place of what is not finite; None stays."""
    return None if values is None else jnp.where(jnp.isfinite(values), values, 0)


def unobserved_outside(sequences: Sequences, keep: Bool[Array, " b"]) -> Sequences:
    """The sequences, of which those outside `keep` were not observed."""
    observed = sequences.present & keep[:, None]
    inputs = sequences.inputs
    if inputs is not None:
        inputs = jnp.where(keep[:, None, None], inputs, 0)
    return Sequences(sequences.values, sequences.lengths, observed=observed, inputs=inputs)
