"""The stationary distribution of a Markov chain, by eliminations that subtract nothing.

States are removed one by one, each leaving to those that remain, and put back in reverse:
1 − Aₙₙ is the sum of what leaves, so that all digits are right even where states are hardly ever
left. Derivatives follow from the visits to other states before the chain is in the likeliest one
again, N = (I − A)⁻¹ without its row and column:

    dN = N dA N,    dδ = y − δ Σ y,  y = δ dA N,    d Σ cⱼ log δⱼ = δ dA v,  v = N (c/δ − Σ c).

Grassmann, Taksar & Heyman (1985), Oper. Res. 33; Kemeny & Snell (1960), *Finite Markov Chains*.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from jaxem._core import linalg as la


def stationary(transition: Float[Array, "k k"]) -> Float[Array, " k"]:
    """The stationary distribution δ = δ A of a chain that has one."""
    return _law(transition)[0]


@jax.custom_jvp
def stationary_log_prob(
    transition: Float[Array, "k k"], counts: Float[Array, " k"]
) -> Float[Array, ""]:
    """Σ c log δ of so many draws of each state, floored where one has no probability."""
    return jnp.sum(counts * la.floored_log(_law(transition)[0]))


@stationary_log_prob.defjvp
def _stationary_log_prob_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    transition, counts = primals
    delta, visits = _law(transition)
    log_delta, found = la.floored_log(delta), delta > jnp.finfo(delta.dtype).tiny
    known = jnp.where(found, counts, 0)
    value = la.apply(visits, known / jnp.where(found, delta, 1) - jnp.sum(known))
    slope = jnp.sum(delta[:, None] * tangents[0] * value) + jnp.sum(tangents[1] * log_delta)
    return jnp.sum(counts * log_delta), slope


@jax.custom_jvp
def _law(transition: Float[Array, "k k"]) -> tuple[Float[Array, " k"], Float[Array, "k k"]]:
    """δ, and N with zeros in the row and the column of the likeliest state."""
    states = jnp.arange(len(transition))
    delta = _restored(transition)
    likeliest = jnp.argmax(delta)
    order = jnp.where(states == 0, likeliest, jnp.where(states == likeliest, 0, states))
    return delta, _visits(transition[order][:, order])[order][:, order]


@_law.defjvp
def _law_jvp(primals: Any, tangents: Any) -> tuple[Any, Any]:
    delta, visits = _law(*primals)
    moved = la.matmul(tangents[0], visits)
    way = jnp.sum(delta[:, None] * moved, axis=0)
    return (delta, visits), (way - jnp.sum(way) * delta, la.matmul(visits, moved))


def _visits(transition: Float[Array, "k k"]) -> Float[Array, "k k"]:
    """N, with zeros in the row and the column of state 0."""
    states = jnp.arange(len(transition))
    inside = (states[:, None] > 0) & (states > 0)
    removed = _removed(transition)

    def forward(right: Array, step: Any) -> tuple[Array, None]:
        n, into, _, _ = step
        return right + into[:, None] * right[n], None

    def back(found: Array, step: Any) -> tuple[Array, None]:
        n, _, out_of, total = step
        row = found[n] + jnp.sum(out_of[:, None] * jnp.where(inside, found, 0), axis=0)
        return jnp.where(states[:, None] == n, row / jnp.where(total > 0, total, 1), found), None

    right, _ = lax.scan(
        forward, jnp.eye(len(states), dtype=transition.dtype), removed, reverse=True
    )
    return jnp.where(inside, lax.scan(back, right, removed)[0], 0)


def _removed(transition: Float[Array, "k k"]) -> tuple[Array, Array, Array, Array]:
    """Of states 1, 2, …: shares that lead to them from those before, to those, and their sum.

    Where the sum is 0 none of those is ever reached again.
    """
    states = jnp.arange(len(transition))

    def remove(matrix: Array, n: Array) -> tuple[Array, tuple[Array, Array, Array, Array]]:
        out_of = jnp.where(states < n, matrix[n], 0)
        total = jnp.sum(out_of)
        into = jnp.where(states < n, matrix[:, n], 0) / jnp.where(total > 0, total, 1)
        return matrix + into[:, None] * out_of, (n, into, out_of, total)

    return lax.scan(remove, transition, states[1:], reverse=True)[1]


def _restored(transition: Float[Array, "k k"]) -> Float[Array, " k"]:
    """δ, whether or not state 0 is one that is left for good."""
    states = jnp.arange(len(transition))

    def restore(delta: Array, removed: tuple[Array, ...]) -> tuple[Array, None]:
        n, into, _, total = removed
        here = jnp.where(total > 0, jnp.sum(delta * into), 1)
        delta = jnp.where(states == n, here, jnp.where(total > 0, delta, 0))
        return delta / jnp.sum(delta), None

    return lax.scan(restore, (states == 0).astype(transition.dtype), _removed(transition))[0]
