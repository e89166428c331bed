"""Linear-Gaussian chains as pure functions: filter, and smoother by the information to come.

    z₁ = m₀ + L₀ ε₁,    zₜ = A zₜ₋₁ + bₜ + L εₜ,    eₜ = Hₜ zₜ + noise of variance I.

Forward, about the predicted (m, P), with J = Hᵀ H and h = Hᵀ e,

    K = (I + P J)⁻¹,    P_f = K P Kᵀ + K P J P Kᵀ,    m_f = m + P_f Hᵀ (e − H m),

which is Joseph's form, a sum of squares, about K P: where a start is wide, P J P would leave no
digits. Backward, of all that comes after a step as a function of its state, the information Λf,
with that of the step itself Λ = J + Λf, and the score ρ at the predicted state,

    E = (I + Lᵀ Λ₊ L)⁻¹,    B = −E Lᵀ Λ₊ A,    A* = A + L B,
    Λf = A*ᵀ Λ₊ A* + Bᵀ B,    ρ = (I + Λf P_f) (h − J m) + A*ᵀ ρ₊.

Λ does not depend on the start, so that nothing cancels where that is wide. With σ = A*ᵀ ρ₊,

    Var zₜ = V = (I + P_f Λf)⁻¹ P_f,    E zₜ = m_f + V σ,
    E εₜ₊₁ = E Lᵀ ρ₊ + B V σ,    Var εₜ₊₁ = E + B V Bᵀ,    Cov(εₜ₊₁, zₜ) = B V,

the derivative of the filter, so that this E-step is a gradient too (tests hold it to that). No
covariance of states or of their noise is inverted: a start without variance, the companion form of
an autoregression and other singular noise need no special case.

Covariances depend on which outputs were observed, not on their values. Where all sequences share
what was observed they are found once; where every step shares it they settle, and what repeats
itself to rounding is not computed again.

Fraser & Potter (1969), IEEE Trans. Automatic Control 14; Durbin & Koopman (2012), *Time Series
Analysis by State Space Methods*.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core import linalg as la

_BLOCK = 16  # steps after which covariances may have settled


class Dynamics(NamedTuple):
    """How states start and move; what of `drift` belongs to the first step does not matter."""

    mean: Float[Array, " n"]  # m₀
    start: Float[Array, "n n"]  # L₀
    matrix: Float[Array, "n n"]  # A
    drift: Float[Array, "b t n"]  # bₜ, into each step
    noise: Float[Array, "n n"]  # L


class Outputs(NamedTuple):
    """Outputs whitened by their noise; what was not seen has rows of zeros.

    Rows are those of every sequence where c = 1, and of every step as well where s = 1.
    """

    rows: Float[Array, "c s p n"]  # Hₜ
    values: Float[Array, "b t p"]  # eₜ

    @property
    def information(self) -> Float[Array, "c s n n"]:
        """J."""
        return la.matmul(la.transpose(self.rows), self.rows)

    def score(self, residual: Float[Array, "b t p"]) -> Float[Array, "b t n"]:
        """Hᵀ r."""
        return _times(la.transpose(self.rows), residual)


class Covariances(NamedTuple):
    """Of predicted and filtered states; `repeats` in blocks of steps that are like the last."""

    predicted: Float[Array, "c t n n"]
    filtered: Float[Array, "c t n n"]
    log_det: Float[Array, "c t"]  # of I + P J, which is that of I + H P Hᵀ
    repeats: Bool[Array, " blocks"]


class Filtered(NamedTuple):
    """Predicted and filtered states, and log N(e; H m, I + H P Hᵀ) + ½ p log 2π of each step."""

    predicted_mean: Float[Array, "b t n"]
    mean: Float[Array, "b t n"]
    covariances: Covariances
    log_increments: Float[Array, "b t"]


class Smoothed(NamedTuple):
    """States and noise given all outputs.

    `noise` are ε₁ … ε_T: their means, covariances, and Cov(εₜ, zₜ₋₁), 0 for the first.
    """

    mean: Float[Array, "b t n"]
    covariance: Float[Array, "c t n n"]
    noise_mean: Float[Array, "b t n"]
    noise_covariance: Float[Array, "c t n n"]
    noise_cross: Float[Array, "c t n n"]
    log_increments: Float[Array, "b t"]


def filtered(dynamics: Dynamics, outputs: Outputs) -> Filtered:
    """The states given the outputs so far."""
    rows, values = outputs
    covariances = _forward(dynamics, outputs.information, values.shape[1])
    predicted_mean, mean = _means(dynamics, outputs, covariances.filtered)

    before = values - _times(rows, predicted_mean)
    after = values - _times(rows, mean)
    increments = -0.5 * (jnp.sum(before * after, axis=2) + covariances.log_det)
    return Filtered(predicted_mean, mean, covariances, increments)


def smoothed(dynamics: Dynamics, outputs: Outputs) -> Smoothed:
    """The states and their noise given all outputs."""
    forward = filtered(dynamics, outputs)
    back = _backward(dynamics, outputs.information, forward.covariances)
    score = outputs.score(outputs.values - _times(outputs.rows, forward.predicted_mean))
    score = score + _times(back.later, _times(forward.covariances.filtered, score))
    to_come = _summed_back(la.transpose(back.moved), score)
    behind = jnp.pad(to_come, ((0, 0), (0, 1), (0, 0)))[:, 1:]
    change = _times(back.states, _times(la.transpose(back.moved), behind))
    noise = _times(back.alone, _times(dynamics.noise.T, behind)) + _times(back.slope, change)

    eye = jnp.eye(len(dynamics.mean), dtype=noise.dtype)
    known = la.matmul(la.matmul(dynamics.start.T, back.information[:, 0]), dynamics.start)
    first, _ = la.inverse_and_log_det(eye + known)
    first_noise = _times(first, _times(dynamics.start.T, to_come[:, 0]))

    def from_first(first: Array, later: Array) -> Array:
        return jnp.concatenate([first[:, None], later[:, :-1]], axis=1)

    return Smoothed(
        forward.mean + change,
        back.states,
        from_first(first_noise, noise),
        from_first(first, back.noise),
        from_first(jnp.zeros_like(first), back.cross),
        forward.log_increments,
    )


def _means(
    dynamics: Dynamics, outputs: Outputs, filtered: Float[Array, "c t n n"]
) -> tuple[Float[Array, "b t n"], Float[Array, "b t n"]]:
    """m and m_f of each step, by what outputs differ from their predictions."""
    rows, values = outputs
    drift = jnp.broadcast_to(
        jnp.roll(dynamics.drift, -1, axis=1), (*values.shape[:2], len(dynamics.mean))
    )
    fixed = rows.shape[1] == 1

    def move(m: Array, step: Any) -> tuple[Array, tuple[Array, Array]]:
        value, spread, b, *each = step
        h = rows[:, 0] if fixed else each[0]
        found = m + _times(spread, _times(la.transpose(h), value - _times(h, m)))
        return _times(dynamics.matrix, found) + b, (m, found)

    start = jnp.broadcast_to(dynamics.mean, drift[:, 0].shape)
    steps = (values, filtered, drift) if fixed else (values, filtered, drift, rows)
    return _by_time(lax.scan(move, start, _by_time(steps))[1])


def _forward(
    dynamics: Dynamics, information: Float[Array, "c s n n"], num_steps: int
) -> Covariances:
    """P and P_f of each step."""
    a, q = dynamics.matrix, la.matmul(dynamics.noise, dynamics.noise.T)
    eye = jnp.eye(len(a), dtype=a.dtype)

    def vary(p: Array, j: Array) -> tuple[Array, Any]:
        kept, log_det = la.inverse_and_log_det(eye + la.matmul(p, j))
        left = la.matmul(kept, p)
        found = la.matmul(left, la.transpose(kept))
        found = found + la.matmul(la.matmul(left, j), la.transpose(left))
        found = 0.5 * (found + la.transpose(found))
        new = la.matmul(la.matmul(a, found), a.T) + q
        return new, (p, found, log_det)

    start = la.matmul(dynamics.start, dynamics.start.T)
    start = jnp.broadcast_to(start, information[:, 0].shape)
    if information.shape[1] == 1 < num_steps:
        found, repeats = _repeated(lambda p: vary(p, information[:, 0]), start, num_steps)
    else:
        found = lax.scan(vary, start, _by_time(information))[1]
        repeats = jnp.zeros(_num_blocks(num_steps), bool)
    predicted, filtered, log_det = _by_time(found)
    return Covariances(predicted, filtered, log_det, repeats)


class _Back(NamedTuple):
    """Of each step; of noise that of the next one."""

    information: Float[Array, "c t n n"]  # Λ
    later: Float[Array, "c t n n"]  # Λf
    moved: Float[Array, "c t n n"]  # A*
    slope: Float[Array, "c t n n"]  # B
    alone: Float[Array, "c t n n"]  # E
    states: Float[Array, "c t n n"]  # V
    noise: Float[Array, "c t n n"]  # Var ε
    cross: Float[Array, "c t n n"]  # Cov(ε, z)


def _backward(
    dynamics: Dynamics, information: Float[Array, "c s n n"], covariances: Covariances
) -> _Back:
    """What is known of states and noise from what comes after them."""
    a, factor, filtered = dynamics.matrix, dynamics.noise, covariances.filtered
    eye = jnp.eye(len(a), dtype=a.dtype)

    def back(behind: Array, step: Any) -> tuple[Array, _Back]:
        spread, j = step
        known = la.matmul(behind, factor)
        alone, _ = la.inverse_and_log_det(eye + la.matmul(factor.T, known))
        slope = -la.matmul(alone, la.matmul(la.transpose(known), a))
        moved = a + la.matmul(factor, slope)
        later = la.matmul(la.matmul(la.transpose(moved), behind), moved)
        later = later + la.matmul(la.transpose(slope), slope)
        later = 0.5 * (later + la.transpose(later))
        share, _ = la.inverse_and_log_det(eye + la.matmul(spread, later))
        states = la.matmul(share, spread)
        states = 0.5 * (states + la.transpose(states))
        cross = la.matmul(slope, states)
        noise = alone + la.matmul(cross, la.transpose(slope))
        here = j + later
        return here, _Back(here, later, moved, slope, alone, states, noise, cross)

    none = jnp.zeros_like(filtered[:, 0])
    shared = information.shape[1] == 1 < filtered.shape[1]
    of_steps = jnp.broadcast_to(information, filtered.shape) if shared else information
    steps = _by_time((filtered, of_steps))
    if shared:
        return _by_time(_repeated_back(back, none, steps, covariances.repeats))
    return _by_time(lax.scan(back, none, steps, reverse=True)[1])


def _times(a: Float[Array, "*c m n"], v: Float[Array, "*b n"]) -> Float[Array, "*b m"]:
    """A product with many small vectors, as sums that are faster than calls of a library."""
    return jnp.sum(a * v[..., None, :], axis=-1)


def _summed_back(
    matrices: Float[Array, "c t n n"], shifts: Float[Array, "b t n"]
) -> Float[Array, "b t n"]:
    """xₜ = sₜ + Mₜ xₜ₊₁ of each step, with 0 behind the last."""

    def move(behind: Array, step: Any) -> tuple[Array, Array]:
        matrix, shift = step
        here = _times(matrix, behind) + shift
        return here, here

    none = jnp.zeros_like(shifts[:, 0])
    return _by_time(lax.scan(move, none, _by_time((matrices, shifts)), reverse=True)[1])


def _by_time(tree: PyTree[Array]) -> Any:
    """Time in front of sequences, or behind them again."""
    return jax.tree.map(lambda leaf: jnp.swapaxes(leaf, 0, 1), tree)


def _num_blocks(num_steps: int) -> int:
    return -(-num_steps // _BLOCK)


def _settled(new: Array, old: Array) -> Bool[Array, ""]:
    """Whether two matrices differ by rounding alone, in all lanes of a vmap."""
    gap = jnp.max(jnp.abs(new - old)) <= 2 * jnp.finfo(new.dtype).eps * jnp.max(jnp.abs(new))
    return eqxi.unvmap_all(gap)


def _repeated(
    step: Callable[[Array], tuple[Array, Any]], start: Array, num_steps: int
) -> tuple[Any, Bool[Array, " blocks"]]:
    """What a step finds, one after the other, and which blocks repeat the end of the last one."""

    def block(carry: Any, _: None) -> tuple[Any, Any]:
        p, last, settled = carry

        def run() -> Any:
            new, found = lax.scan(lambda p, _: step(p), p, length=_BLOCK)
            last = jax.tree.map(lambda leaf: leaf[-1], found)
            return (new, last, _settled(new, last[0])), found

        def repeat() -> Any:
            found = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (_BLOCK, *leaf.shape)), last)
            return carry, found

        new, found = lax.cond(settled, repeat, run)
        return new, (found, settled)

    nothing = jax.tree.map(
        lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(step, start)[1]
    )
    carry = start, nothing, jnp.zeros((), bool)
    _, (found, repeats) = lax.scan(block, carry, length=_num_blocks(num_steps))
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_steps], found), repeats


def _repeated_back(
    step: Callable[[Array, Any], tuple[Array, _Back]],
    end: Array,
    steps: Any,
    repeats: Bool[Array, " blocks"],
) -> _Back:
    """`lax.scan(step, end, steps, reverse=True)[1]`, of which blocks that repeat are not run."""
    num_steps = len(steps[0])
    missing = len(repeats) * _BLOCK - num_steps

    def blocks(leaf: Array) -> Array:
        # a step of zeros is one behind the end, where nothing is known
        padded = jnp.pad(leaf, [(0, missing)] + (leaf.ndim - 1) * [(0, 0)])
        return padded.reshape(-1, _BLOCK, *leaf.shape[1:])

    def block(carry: Any, part: Any) -> tuple[Any, Any]:
        n, first, settled = carry
        steps, repeats = part

        def run() -> Any:
            new, found = lax.scan(step, n, steps, reverse=True)
            first = jax.tree.map(lambda leaf: leaf[0], found)
            return (new, first, _settled(new, found.information[1])), found

        def repeat() -> Any:
            found = jax.tree.map(lambda leaf: jnp.broadcast_to(leaf, (_BLOCK, *leaf.shape)), first)
            return carry, found

        return lax.cond(eqxi.unvmap_all(settled & repeats), repeat, run)

    one = jax.eval_shape(step, end, jax.tree.map(lambda leaf: leaf[0], steps))[1]
    nothing = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), one)
    carry = end, nothing, jnp.zeros((), bool)
    parts = jax.tree.map(blocks, steps), repeats
    _, found = lax.scan(block, carry, parts, reverse=True)
    return jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:])[:num_steps], found)
