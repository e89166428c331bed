"""Faster ways to the same fixed points: extrapolations of EM's steps in parameter space.

Leaves are unconstrained, so that any extrapolation is a model. What it is worth is judged by the
objective, which an E-step there gives anyway: it never falls, or EM's own step is taken instead.
Under `vmap` that step is worked out for all lanes where one needs it.
"""

import abc
import math
from collections.abc import Callable
from typing import Any, Self

import equinox as eqx
import equinox.internal as eqxi
import jax
import jax.numpy as jnp
from jax import lax
from jax.flatten_util import ravel_pytree
from jaxtyping import Array, PyTree

from jaxem import _linalg as la
from jaxem._checks import check_count
from jaxem._em import EM, AbstractAlgorithm, State, with_memory
from jaxem._emission import float_dtype
from jaxem._guard import knows_slope_alone
from jaxem._hold import estimates, free_numbers
from jaxem._posterior import Annealed
from jaxem._units import as_arrays


class _Accelerated(AbstractAlgorithm):
    """An algorithm around EM; its own memory stands beside that of EM's maximization."""

    em: eqx.AbstractVar[EM]

    @property
    def ascends(self) -> bool:
        return True

    @property
    def exact(self) -> bool:
        return True

    @property
    def steady(self) -> bool:
        return False  # extrapolations go where EM would go much later

    @property
    def period(self) -> int:
        return self.em.period

    def settles(self, state):
        return self.em.settles(with_memory(state, state.maximization[0]))

    def em_map(self):
        return self.em.em_map()

    def init(self, model, data, *, weights=None, prior=None, key=None):
        state = self.em.init(model, data, weights=weights, prior=prior, key=key)
        return with_memory(state, (state.maximization, self._start(model)))

    def step(self, state, data, *, weights=None, prior=None, key=None):
        inner, own = state.maximization
        data, weights = as_arrays(data), as_arrays(weights)
        given: dict[str, Any] = {"weights": weights, "prior": prior, "key": key}
        new, own = self._step(with_memory(state, inner), own, data, given)
        new = eqx.tree_at(lambda s: s.step, new, state.step + 1)
        return with_memory(new, (new.maximization, own))

    def finish(self, state, data, *, weights=None, prior=None, key=None):
        return state.model

    @property
    def closing(self):
        return self.em.closing

    def _em_point(self, state: State, data: Any, given: dict[str, Any]) -> tuple[Any, Any]:
        """Where EM would go, and what its maximization remembers.

        A step that only the objective can judge is a whole one, guarded; else an M-step.
        """
        if knows_slope_alone(state.model):
            new = self.em.step(state, data, **given)
            return new.model, new.maximization
        return self.em.maximize(state, data, **given)

    @abc.abstractmethod
    def _start(self, model: Any) -> PyTree[Array]:
        """What is remembered before the first step."""

    @abc.abstractmethod
    def _step(
        self, state: State, own: PyTree[Array], data: Any, given: dict[str, Any]
    ) -> tuple[State, PyTree[Array]]:
        """A state that is no worse, and what is remembered."""


def _check_em(em: Any, name: str) -> None:
    if not isinstance(em, EM):
        raise ValueError(f"{name} accelerates an EM(…), got {em!r}.")
    if not (em.ascends and em.exact):
        reason = (
            "its objective changes with the temperature: anneal first, then accelerate from there"
            if isinstance(em.expectation, Annealed)
            else "extrapolating random steps multiplies their noise: use Full() and Exact()"
        )
        raise ValueError(f"{name} needs a deterministic, monotone EM over all the data; {reason}.")


def _is_as_good(new: State, old: State) -> Array:
    """Whether the objective is finite and did not fall by more than rounding."""
    slack = 10 * jnp.finfo(old.objective.dtype).eps * jnp.abs(old.objective)
    finite = jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(new.model)])
    return (new.objective >= old.objective - slack) & jnp.all(finite)


def _or_else(good: Array, bold: State, careful: Callable[[], State]) -> State:
    """`bold` where it is good, else `careful()`, which is worked out if some lane needs it."""

    def chosen() -> State:
        return jax.tree.map(lambda a, b: jnp.where(good, a, b), bold, careful())

    return lax.cond(eqxi.unvmap_all(good), lambda: bold, chosen)


def _within_bounds(model: Any) -> Any:
    """The model with what its M-step estimates within bounds, such as degrees of freedom, there.

    An extrapolation beyond them may be better than any estimate, but EM cannot stay there.
    """
    has_bounds = lambda node: hasattr(node, "bounded")  # noqa: E731
    return jax.tree.map(
        lambda node: node.bounded() if has_bounds(node) else node, model, is_leaf=has_bounds
    )


def _magnitude(parameter: Array) -> Array:
    """The root mean square of a parameter: its unit, so that none has any."""
    size = _root(jnp.mean(parameter**2))
    return jnp.where(size > 0, size, 1)


def _length(vector: Array) -> Array:
    """The Euclidean norm, with derivative 0 at 0."""
    return _root(jnp.sum(vector**2))


def _root(square: Array) -> Array:
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _measured(model: Any) -> Array:
    """What the M-step estimates, on scales on which lengths mean something.

    Natural parameters, for the logarithm of a probability that vanishes runs away; those far
    from 0 by their logarithm, for degrees of freedom run away too.
    """
    return jnp.arcsinh(ravel_pytree(estimates(model))[0])


class SQUAREM(_Accelerated):
    """Squared extrapolation: θ − 2 α r + α² v, from two EM steps r and r + v.

    α = −‖r‖ / ‖v‖, at most −1, where −1 is EM. The points are extrapolated as unconstrained leaves,
    the lengths taken of natural parameters, each relative to its root mean square. An EM step from
    there ends it, so that a step costs three E-steps, and a fourth where the objective would
    fall: then r and r + v are taken as they are.

    **Arguments:** `em`, the algorithm to accelerate.

    **Raises:** `ValueError` if that is stochastic, annealed, or not over all the data.

    Varadhan & Roland (2008), Scand. J. Stat. 35, scheme S3 and its step bounds.
    """

    em: EM = EM()

    def __check_init__(self):
        _check_em(self.em, "SQUAREM")

    def _start(self, model):
        return jnp.ones((), float_dtype(model))  # the longest step that is tried now

    def _step(self, state, own, data, given):
        em, longest = self.em, own
        start = ravel_pytree(state.model)[0]
        first = em.step(state, data, **given)
        second_model, _ = self._em_point(first, data, given)
        # A probability that vanishes stands still, while its logarithm runs away.
        unit = jax.tree.map(_magnitude, estimates(state.model))
        points = [
            ravel_pytree(jax.tree.map(jnp.divide, estimates(m), unit))[0]
            for m in (state.model, first.model, second_model)
        ]
        bend, size = _length(points[2] - 2 * points[1] + points[0]), _length(points[1] - points[0])
        length = jnp.clip(jnp.where(bend > 0, size / jnp.where(bend > 0, bend, 1), 1), 1, longest)
        one, (two, rebuild) = ravel_pytree(first.model)[0], free_numbers(second_model)
        r, v = one - start, two - 2 * one + start
        proposed = _within_bounds(rebuild(start + 2 * length * r + length**2 * v))

        bold = em.step(em.expect(proposed, first, data, **given), data, **given)
        good = _is_as_good(bold, state)
        new = _or_else(good, bold, lambda: em.step(first, data, **given))
        at_bound = length == longest
        longest = jnp.where(at_bound & good, 4 * longest, longest)
        longest = jnp.where(at_bound & ~good, jnp.maximum(1, longest / 4), longest)
        return new, longest


class Overrelaxed(_Accelerated):
    """EM's step, made longer by a factor that grows as long as the objective does not fall.

    Each step costs one E-step, or two where it would fall: EM's own step is taken then, and the
    factor starts again from 1.

    **Arguments:** `em`, the algorithm to accelerate; `growth`, of the factor in each step.

    **Raises:** `ValueError` if EM is stochastic, annealed, or not over all the data; for a growth
    that is not above 1.

    Salakhutdinov & Roweis (2003), ICML 20.
    """

    em: EM = EM()
    growth: float = eqx.field(static=True, default=1.1)

    def __check_init__(self):
        _check_em(self.em, "Overrelaxed")
        if not self.growth > 1:
            raise ValueError(f"the factor of Overrelaxed must grow, got growth={self.growth}.")

    def _start(self, model):
        return jnp.ones((), float_dtype(model))

    def _step(self, state, own, data, given):
        model, memory = self._em_point(state, data, given)
        start, (end, rebuild) = ravel_pytree(state.model)[0], free_numbers(model)
        longer = _within_bounds(rebuild(start + own * (end - start)))
        bold = self.em.expect(longer, with_memory(state, memory), data, **given)
        good = _is_as_good(bold, state)
        new = _or_else(good, bold, lambda: self.em.step(state, data, **given))
        return new, jnp.where(good, self.growth * own, 1)


class Anderson(_Accelerated):
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
        _check_em(self.em, "Anderson")
        check_count("order", self.order)

    def _start(self, model):
        numbers, measured = free_numbers(model)[0], _measured(model)
        rows = min(self.order, numbers.size)
        count = jnp.zeros((), jnp.int32)
        return _Memory(
            images=jnp.zeros((rows, numbers.size), numbers.dtype),
            residuals=jnp.zeros((rows, measured.size), measured.dtype),
            image=jnp.zeros_like(numbers),
            residual=jnp.zeros_like(measured),
            count=count,
            accepted=count,
        )

    def _step(self, state, own, data, given):
        em = self.em
        model, memory = self._em_point(state, data, given)
        (image, rebuild), now = free_numbers(model), _measured(state.model)
        residual = _measured(model) - now
        own = own.remember(image, residual)
        proposed = _within_bounds(rebuild(image - own.correction(residual)))
        # EM's steps are too short, never too long: what is shorter still is rounding, and would
        # be taken for convergence.
        longer = _length(_measured(proposed) - now) >= _length(residual)
        proposed = jax.tree.map(lambda a, b: jnp.where(longer, a, b), proposed, model)
        bold = em.expect(proposed, with_memory(state, memory), data, **given)
        good = _is_as_good(bold, state)
        new = _or_else(good, bold, lambda: em.step(state, data, **given))
        return new, eqx.tree_at(lambda m: m.accepted, own, own.accepted + good)


class _Memory(eqx.Module):
    """Differences since the last restart, of EM's images and of residuals; how bold to be.

    Images are in leaf space, residuals on the scales of `_measured`: else one number that runs
    away would outweigh all others.
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
        zero = lambda leaf: jnp.where(now, jnp.zeros_like(leaf), leaf)  # noqa: E731
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
        # The loop knows no derivative of the root; a step of Newton's from there does.
        left, slope = jax.jvp(excess, (found,), (jnp.ones_like(found),))
        slope = lax.stop_gradient(slope)
        newton = jnp.where(slope < 0, left / jnp.where(slope < 0, slope, 1), 0)
        gamma = solution(jnp.exp(found - jnp.clip(newton, -1e-3, 1e-3)))
        return la.matmul(gamma, self.images)
