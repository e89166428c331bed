"""Statistics that describe Q near a model only: value, score and curvature about it.

In steps δ = θ − θ₀ away from the frame θ₀, of n observations,

    Q ≈ value + g·δ − ½ δ·H δ.

Regressions with a link, gates, transitions driven by inputs and models of which only a density is
known differ in H alone, an operator. Sums are additive, and the quadratic moves and turns exactly.
An M-step goes to the maximum, or towards it: Q itself is not this quadratic (`em/_guard.py`).
"""

from __future__ import annotations

import abc
from typing import Any, NamedTuple, Self

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Float, PyTree

from jaxem._core import linalg as la
from jaxem._core.numerics import divide

# Relative to the square of an input, in roundings: variation that is less counts as none.
RIDGE = 100


class AbstractLocal(eqx.Module):
    """A part of a model whose sums are no sums of fixed functions of the data.

    They describe Q near the parameters that they were taken about, so that steps are guarded by
    the objective. `has_curvature` is False where they hold no more than the slope there.
    """

    has_curvature: eqx.AbstractClassVar[bool]


class AbstractCurvature(eqx.Module):
    """H, a symmetric operator on steps; sums of them add leaf by leaf."""

    @abc.abstractmethod
    def apply(self, step: PyTree[Array]) -> PyTree[Array]:
        """H δ."""

    @abc.abstractmethod
    def solve(
        self, score: PyTree[Array], directions: Float[Array, "*b q q"] | None, least: Any
    ) -> Any:
        """H⁻¹ g within the span of the rows of `directions`; None is any direction.

        Along rows that have no more than `least` of H, once those before them are accounted for,
        it does not go.
        """


class Identity(AbstractCurvature):
    """n I: where the slope alone is known, a step along the mean score is as far as one goes."""

    count: Float[Array, "*b"]

    def _over(self, function: Any, tree: PyTree[Array]) -> PyTree[Array]:
        def one(leaf: Array) -> Array:
            return function(
                leaf, self.count.reshape(self.count.shape + (1,) * (leaf.ndim - self.count.ndim))
            )

        return jax.tree.map(one, tree)

    def apply(self, step: PyTree[Array]) -> PyTree[Array]:
        return self._over(jnp.multiply, step)

    def solve(self, score: PyTree[Array], directions: Any, least: Any) -> PyTree[Array]:
        return self._over(divide, score)


class Blocks(AbstractCurvature):
    """A matrix for each of several blocks of coefficients, which do not act on each other."""

    matrix: Float[Array, "*b q q"]

    def apply(self, step: Float[Array, "*b q"]) -> Float[Array, "*b q"]:
        return la.apply(self.matrix, step)

    def solve(
        self, score: Float[Array, "*b q"], directions: Any, least: Any
    ) -> Float[Array, "*b q"]:
        return solve_free(self.matrix, score[..., None, :], directions, least)[..., 0, :]


class Kronecker(AbstractCurvature):
    """½ (I − 11ᵀ/m) ⊗ S for m targets: no softmax of linear functions of u has more, S = Σ u uᵀ.

    What is common to all targets moves nothing, and has no score.

    Böhning (1992), Ann. Inst. Stat. Math. 44.
    """

    moments: Float[Array, "*b q q"]

    def apply(self, step: Float[Array, "*b m q"]) -> Float[Array, "*b m q"]:
        return 0.5 * la.matmul(step - jnp.mean(step, axis=-2, keepdims=True), self.moments)

    def solve(
        self, score: Float[Array, "*b m q"], directions: Any, least: Any
    ) -> Float[Array, "*b m q"]:
        return 2 * solve_free(self.moments, score, directions, least)


class LocalQuadratic(NamedTuple):
    """Q about a frame, up to a constant: value + g·δ − ½ δ·H δ."""

    value: Float[Array, ""]
    count: Array  # Σ r, how many observations there are behind each component, or behind all
    score: PyTree[Array]
    curvature: Any  # an AbstractCurvature, of the kind that its maker chose

    def moved(self, step: PyTree[Array]) -> Self:
        """The same function, about θ₀ + step."""
        pull = self.curvature.apply(step)
        rises = jax.tree.map(lambda d, g, h: jnp.sum(d * (g - 0.5 * h)), step, self.score, pull)
        value = self.value + sum(jax.tree.leaves(rises))
        return self._replace(value=value, score=jax.tree.map(jnp.subtract, self.score, pull))

    def turned(self, turn: Float[Array, "*b q q"]) -> Self:
        """The same function of the coefficients of R u in place of those of u; H in blocks."""
        assert isinstance(self.curvature, Blocks)
        matrix = la.matmul(la.matmul(turn, self.curvature.matrix), la.transpose(turn))
        return self._replace(score=la.apply(turn, self.score), curvature=Blocks(matrix))

    def maximum(
        self, directions: Float[Array, "*b q q"] | None = None, least: Any = 0.0
    ) -> PyTree[Array]:
        """The step to the maximum within the span of the rows of `directions`."""
        return self.curvature.solve(self.score, directions, least)

    def square(self, step: Float[Array, "*b q"]) -> Float[Array, "*b"]:
        """δ·H δ of each block: twice what going past the maximum by this step costs."""
        return jnp.sum(step * self.curvature.apply(step), axis=-1)


def shortened(step: Array, reach: Array, limit: Array) -> Array:
    """As much of a step whose squared length is `reach` as has no more than `limit`."""
    beyond = reach > limit
    return step * jnp.sqrt(jnp.where(beyond, limit / jnp.where(beyond, reach, 1), 1))


@jax.custom_jvp
def linear_tilt(tilt: Float[Array, "*b k t"], t: Float[Array, "*b t n"]) -> Float[Array, "*b k n"]:
    """T t at T = 0: the value costs nothing, and its derivative by T is t."""
    return jnp.zeros((*tilt.shape[:-1], t.shape[-1]), t.dtype)


@linear_tilt.defjvp
def _linear_tilt_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    return linear_tilt(*primals), la.matmul(tangents[0], primals[1])


def square_tilt(tilt: Float[Array, "*b t t"], t: Float[Array, "*b t n"]) -> Float[Array, "*b n"]:
    """tᵀ T t at T = 0: the value costs nothing, and its derivative by T is t tᵀ."""
    return product_tilt(0.5 * (tilt + la.transpose(tilt)), t, t)


@jax.custom_jvp
def product_tilt(
    tilt: Float[Array, "*b s t"], s: Float[Array, "*b s n"], t: Float[Array, "*b t n"]
) -> Float[Array, "*b n"]:
    """sᵀ T t at T = 0: the value costs nothing, and its derivative by T is s tᵀ."""
    shape = jnp.broadcast_shapes(tilt.shape[:-2], s.shape[:-2], t.shape[:-2])
    return jnp.zeros((*shape, t.shape[-1]), t.dtype)


@product_tilt.defjvp
def _product_tilt_jvp(primals: Any, tangents: Any) -> tuple[Array, Array]:
    _, s, t = primals
    return product_tilt(*primals), jnp.sum(s * la.matmul(tangents[0], t), axis=-2)


def solve_free(
    moments: Float[Array, "*b q q"],
    gradient: Float[Array, "*b r q"],
    directions: Float[Array, "*b q q"],
    least: Float[Array, "*b q"] | float = 0.0,
) -> Float[Array, "*b r q"]:
    """The step gradient · moments⁻¹ within the span of the rows of `directions`.

    A direction along which inputs do not vary, to rounding, moves nothing. Nor does one that
    those before it explain, the intercept first: of collinear inputs the last ones stay. That is,
    one of which no more than `least` is left.
    """
    matrix = la.matmul(la.matmul(directions, moments), la.transpose(directions))
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    size = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    _, _, determined = eliminated(lax.stop_gradient(matrix), least)
    inverse = la.inverse_of_lower(
        la.cholesky(_restricted(matrix / la.outer(size, size), determined))
    )
    share = jnp.where(determined, 1 / size, 0)[..., None, :]
    right = la.matmul(gradient, la.transpose(directions)) * share
    step = la.matmul(la.matmul(right, la.transpose(inverse)), inverse) * share
    return la.matmul(step, directions)


def eliminated(
    matrix: Float[Array, "*b q q"],
    least: Float[Array, "*b q"] | float = 0.0,
) -> tuple[Float[Array, "*b q q"], Float[Array, "*b q"], Bool[Array, "*b q"]]:
    """Λ, what is left of the diagonal D, and which rows count, of a matrix Λ D Λᵀ.

    Rows that those before them explain, to rounding or to what is `least`, do not count and explain
    nothing.
    """
    diagonal = jnp.diagonal(matrix, axis1=-2, axis2=-1)
    size = jnp.sqrt(jnp.where(diagonal > 0, diagonal, 1))
    ridge = jnp.maximum(RIDGE * jnp.finfo(matrix.dtype).eps, lax.stop_gradient(least) / size**2)
    ridge = jnp.broadcast_to(ridge, size.shape)

    def sweep(j: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        rest, lower, left, found = carry
        row = lax.dynamic_index_in_dim(rest, j, -1, keepdims=False)
        pivot = lax.dynamic_index_in_dim(row, j, -1)
        bound = lax.dynamic_index_in_dim(ridge, j, -1)
        counts = ~(pivot <= bound)  # NaN is no reason to leave one out
        here = jnp.arange(left.shape[-1]) == j
        share = jnp.where(counts, row / jnp.where(counts, pivot, 1), here)
        rest = rest - jnp.where(counts[..., None], la.outer(row, share), 0)
        lower = jnp.where(here, share[..., None], lower)
        return rest, lower, jnp.where(here, pivot, left), found | (counts & here)

    start = matrix / la.outer(size, size)
    nothing = jnp.zeros_like(diagonal)
    carry = start, jnp.zeros_like(matrix), nothing, jnp.zeros(nothing.shape, bool)
    _, lower, left, found = lax.fori_loop(0, matrix.shape[-1], sweep, carry)
    lower = jnp.tril(lower) * size[..., :, None] / size[..., None, :]
    return lower, left * size**2, found & (diagonal > 0)


def _restricted(
    matrix: Float[Array, "*b q q"], chosen: Bool[Array, "*b q"]
) -> Float[Array, "*b q q"]:
    """The matrix in rows and columns that are chosen, the identity in others."""
    eye = np.eye(matrix.shape[-1], dtype=matrix.dtype)
    both = chosen[..., :, None] & chosen[..., None, :]
    return jnp.where(both, matrix, jnp.where(chosen[..., None], 0, eye))
