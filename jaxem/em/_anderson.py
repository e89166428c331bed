"""Anderson acceleration, damped, restarted and monotone."""

import math
from typing import Any, Self

import equinox as eqx
import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array

from jaxem._core import linalg as la
from jaxem._core.checks import check_count
from jaxem._core.parameters import free_numbers, replace, within_bounds
from jaxem.em._acceleration import (
    AbstractAccelerated,
    check_em,
    is_as_good,
    length_of,
    measured,
    or_else,
)
from jaxem.em._em import EM


class Anderson(AbstractAccelerated):
    """Anderson acceleration, damped, restarted and monotone (DAAREM).

    The next point is where a linear model of the residuals f = M(θ) − θ of the last steps
    vanishes, as far as damping allows. Each step costs one E-step, or two where the point is no
    better than the last one and EM's own step is taken instead.

    **Arguments:** `em`, the algorithm to accelerate; `order`, how many steps are remembered; the
    memory is emptied when it is full.

    **Raises:** `ValueError` if EM is stochastic, annealed, or not over all the data; for an order
    below 1.

    Henderson & Varadhan (2019), J. Comp. Graph. Stat. 28.
    """

    em: EM = EM()
    order: int = eqx.field(static=True, default=10)

    def __check_init__(self):
        check_em(self.em, "Anderson")
        check_count("order", self.order)

    def _start(self, model):
        numbers, own = free_numbers(model)[0], measured(model)
        rows = min(self.order, numbers.size)
        count = jnp.zeros((), jnp.int32)
        return _Memory(
            images=jnp.zeros((rows, numbers.size), numbers.dtype),
            residuals=jnp.zeros((rows, own.size), own.dtype),
            image=jnp.zeros_like(numbers),
            residual=jnp.zeros_like(own),
            count=count,
            accepted=count,
        )

    def _step(self, state, own, problem, key):
        em = self.em
        model, memory = self._em_point(state, problem, key)
        (image, rebuild), now = free_numbers(model), measured(state.model)
        residual = measured(model) - now
        own = own.remember(image, residual)
        proposed = within_bounds(rebuild(image - own.correction(residual)))
        # EM's steps are never too long: a shorter one is rounding, and would count as convergence.
        longer = length_of(measured(proposed) - now) >= length_of(residual)
        proposed = jax.tree.map(lambda a, b: jnp.where(longer, a, b), proposed, model)
        bold = em.expect(proposed, replace(state, maximization=memory), problem, key)
        good = is_as_good(bold, state)
        new = or_else(good, bold, lambda: em.step(state, problem, key=key))
        return new, replace(own, accepted=own.accepted + good)


class _Memory(eqx.Module):
    """Differences since the last restart, of EM's images and of residuals; how bold to be.

    Images are in leaf space, residuals on the scales of `measured`: else one number that grows
    without end would outweigh all others.
    """

    images: Array  # (m, p), rows used from the first on
    residuals: Array  # (m, q)
    image: Array  # the last ones, (p,)
    residual: Array  # (q,)
    count: Array  # points seen since the restart
    accepted: Array  # all steps that were

    def remember(self, image: Array, residual: Array) -> Self:
        fresh = self.emptied(self.count > len(self.images))
        seen, place = fresh.count > 0, jnp.maximum(fresh.count - 1, 0)
        moved = fresh.images.at[place].set(image - self.image)
        images = jnp.where(seen, moved, fresh.images)
        moved = fresh.residuals.at[place].set(residual - self.residual)
        residuals = jnp.where(seen, moved, fresh.residuals)
        return type(self)(images, residuals, image, residual, fresh.count + 1, self.accepted)

    def emptied(self, now: Array) -> Self:
        def zero(leaf: Array) -> Array:
            return jnp.where(now, jnp.zeros_like(leaf), leaf)

        return eqx.tree_at(lambda m: (m.images, m.residuals, m.count), self, replace_fn=zero)

    def correction(self, residual: Array) -> Array:
        """ΔG γ, with γ the damped least-squares solution of ΔF γ = f."""
        rows = self.residuals
        gram, aim = la.matmul(rows, rows.T), la.apply(rows, residual)
        eps = float(jnp.finfo(gram.dtype).eps)
        size = jnp.trace(gram)
        size = jnp.where(size > 0, size, 1)
        used = jnp.diagonal(gram) > 0
        eye = jnp.eye(len(gram), dtype=gram.dtype)

        def solution(ridge: Array) -> Array:
            """The γ of (G + ridge) γ = ΔFᵀ f; zero for what is not yet remembered."""
            damped = jnp.where(used, ridge + 100 * eps * size, 1) * eye + gram
            inverse = la.inverse_of_lower(la.cholesky(damped))
            return la.apply(inverse.T, la.apply(inverse, aim))

        # ‖γ‖² is a share of its undamped value, which grows with the steps accepted; the ridge is
        # found by bisection.
        share = 1 / (1 + 1.2 ** (25.0 - self.accepted))
        target = share * jnp.sum(solution(jnp.zeros_like(size)) ** 2)

        def excess(log_ridge: Array) -> Array:
            return jnp.sum(solution(jnp.exp(log_ridge)) ** 2) - target

        def halve(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
            low, high = ends
            middle = 0.5 * (low + high)
            over = excess(middle) > 0
            return jnp.where(over, middle, low), jnp.where(over, high, middle)

        top, span = lax.stop_gradient(jnp.log(size)), -math.log(eps)
        low, high = lax.fori_loop(0, 40, halve, (top - 2 * span, top + span))
        found = lax.stop_gradient(0.5 * (low + high))
        # The loop has no derivative of the root; a step of Newton's from there has.
        left, slope = jax.jvp(excess, (found,), (jnp.ones_like(found),))
        slope = lax.stop_gradient(slope)
        newton = jnp.where(slope < 0, left / jnp.where(slope < 0, slope, 1), 0)
        gamma = solution(jnp.exp(found - jnp.clip(newton, -1e-3, 1e-3)))
        return la.matmul(gamma, self.images)
