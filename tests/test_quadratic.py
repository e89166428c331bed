"""Local quadratics: one function about any point and in any coordinates, and its maximum."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxem._core.quadratic import (
    Blocks,
    Identity,
    Kronecker,
    LocalQuadratic,
    shortened,
    square_tilt,
)

_rng = np.random.default_rng(0)
K, M, Q = 2, 3, 3


def _positive(*shape):
    root = _rng.normal(size=(*shape, Q, Q))
    return jnp.asarray(root @ np.swapaxes(root, -1, -2) + np.eye(Q))


def _about(score, curvature):
    return LocalQuadratic(jnp.array(0.7), jnp.array([4.0, 9.0]), score, curvature)


def _contrasts():
    score = jnp.asarray(_rng.normal(size=(K, M, Q)))
    return score - jnp.mean(score, axis=1, keepdims=True)


CASES = {
    "identity": _about(jnp.asarray(_rng.normal(size=(K, Q))), Identity(jnp.array([4.0, 9.0]))),
    "blocks": _about(jnp.asarray(_rng.normal(size=(K, Q))), Blocks(_positive(K))),
    "kronecker": _about(_contrasts(), Kronecker(_positive(K))),
}
EYE = jnp.broadcast_to(jnp.eye(Q), (K, Q, Q))


def value(quadratic, step):
    return quadratic.moved(step).value


@pytest.mark.parametrize("name", CASES)
def test_its_value_has_its_score_and_its_curvature(name):
    quadratic = CASES[name]
    zero = jnp.zeros_like(quadratic.score)
    np.testing.assert_allclose(value(quadratic, zero), quadratic.value)
    slope = jax.grad(lambda step: value(quadratic, step))
    np.testing.assert_allclose(slope(zero), quadratic.score)
    direction = jnp.asarray(_rng.normal(size=zero.shape))
    bend = -jax.jvp(slope, (zero,), (direction,))[1]
    np.testing.assert_allclose(quadratic.curvature.apply(direction), bend, atol=1e-12)
    square = jnp.sum(quadratic.square(direction))
    np.testing.assert_allclose(square, jnp.sum(direction * bend))


@pytest.mark.parametrize("name", CASES)
def test_moves_compose(name):
    quadratic = CASES[name]
    a, b = (jnp.asarray(_rng.normal(size=quadratic.score.shape)) for _ in range(2))
    twice, once = quadratic.moved(a).moved(b), quadratic.moved(a + b)
    np.testing.assert_allclose(twice.value, once.value)
    np.testing.assert_allclose(twice.score, once.score, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_at_its_maximum_there_is_no_slope(name):
    quadratic = CASES[name]
    step = quadratic.maximum(EYE)
    np.testing.assert_allclose(quadratic.moved(step).score, 0, atol=1e-12)
    if name != "identity":
        some = EYE.at[0, 1].set(0.0)
        bound = quadratic.maximum(some)
        np.testing.assert_array_equal(bound[0, ..., 1], 0)
        left = quadratic.moved(bound).score
        np.testing.assert_allclose(jnp.delete(left[0], 1, axis=-1), 0, atol=1e-12)
        np.testing.assert_allclose(left[1], 0, atol=1e-12)


def test_it_is_the_same_function_of_other_coefficients():
    """θ·u = θ′·R u for θ = Rᵀ θ′."""
    quadratic = CASES["blocks"]
    turn = jnp.asarray(_rng.normal(size=(K, Q, Q)))
    step = jnp.asarray(_rng.normal(size=(K, Q)))
    behind = jnp.einsum("kij,ki->kj", turn, step)
    np.testing.assert_allclose(value(quadratic.turned(turn), step), value(quadratic, behind))


def test_a_tree_of_scores_moves_leaf_by_leaf():
    count = jnp.array(5.0)
    score = {"a": jnp.array(2.0), "b": jnp.array([1.0, -3.0])}
    quadratic = LocalQuadratic(jnp.array(0.0), count, score, Identity(count))
    step = quadratic.maximum()
    np.testing.assert_allclose(step["b"], score["b"] / 5)
    np.testing.assert_allclose(quadratic.moved(step).value, 0.5 * (4 + 1 + 9) / 5)
    empty = quadratic._replace(curvature=Identity(jnp.zeros(())))
    np.testing.assert_array_equal(empty.maximum()["b"], 0)


def test_steps_are_shortened_where_they_are_too_long():
    step = jnp.array([[3.0, 4.0], [0.3, 0.4]])
    reach = jnp.sum(step**2, axis=1, keepdims=True)
    found = shortened(step, reach, jnp.array(1.0))
    np.testing.assert_allclose(found, [[0.6, 0.8], [0.3, 0.4]])


def test_the_tilt_of_squares_is_zero_and_has_their_derivative():
    t = jnp.asarray(_rng.normal(size=(K, Q, 5)))
    w = jnp.asarray(_rng.uniform(size=(K, 5)))
    zeros = jnp.zeros((K, Q, Q))
    tilted, pullback = jax.vjp(lambda tilt: square_tilt(tilt, t), zeros)
    np.testing.assert_array_equal(tilted, 0)
    found = pullback(w)[0]
    np.testing.assert_allclose(found, jnp.einsum("kin,kjn,kn->kij", t, t, w))
    np.testing.assert_array_equal(found, jnp.swapaxes(found, 1, 2))
