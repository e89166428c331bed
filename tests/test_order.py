"""Components in another order are the same model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES

import jaxem
from jaxem.models import align, reorder

NAMED = [
    name for name in CASES if name not in {"from_functions", "log-joint", "labels", "state-space"}
]


@pytest.mark.parametrize("name", NAMED)
def test_another_order_is_the_same_model(name):
    model, data, *_ = CASES[name]()
    k = model.responsibilities(data).shape[-1]
    order = np.roll(np.arange(k), 1)
    moved = reorder(model, order)
    np.testing.assert_allclose(moved.log_prob(data), model.log_prob(data), rtol=1e-12)
    np.testing.assert_allclose(
        moved.responsibilities(data), model.responsibilities(data)[..., order], atol=1e-12
    )
    assert moved.num_free_parameters == model.num_free_parameters
    back = reorder(moved, np.argsort(order))
    assert jax.tree.structure(back) == jax.tree.structure(model)
    jax.tree.map(np.testing.assert_array_equal, back, model)


def test_rows_and_columns_of_transitions_go_together():
    hmm = jaxem.HMM([0.2, 0.8], [[0.9, 0.1], [0.3, 0.7]], jaxem.emissions.Poisson([[9.0], [2.0]]))
    moved = reorder(hmm, jnp.argsort(hmm.emission.rate[:, 0]))
    np.testing.assert_allclose(moved.transition.matrix, [[0.7, 0.3], [0.1, 0.9]])
    np.testing.assert_allclose(moved.initial, [0.8, 0.2])


def test_structural_zeros_and_ties_go_with_their_states():
    matrix = [[0.5, 0.5, 0.0], [0.0, 0.6, 0.4], [0.5, 0.5, 0.0]]
    moves = jaxem.factors.Transition(matrix, tied=[0, 1, 0])
    rates = jaxem.emissions.Poisson([[9.0], [2.0], [5.0]])
    hmm = jaxem.HMM([0.2, 0.3, 0.5], moves, rates)
    order = np.array([2, 0, 1])
    moved = reorder(hmm, order)
    np.testing.assert_allclose(
        moved.transition.matrix, np.asarray(matrix)[order][:, order], atol=1e-15
    )
    assert moved.num_free_parameters == hmm.num_free_parameters
    with pytest.raises(ValueError, match="traced order"):
        jax.jit(lambda order: reorder(hmm, order))(order)


def test_masks_of_what_is_frozen_go_with_their_components():
    model = jaxem.Mixture([0.5, 0.5], jaxem.emissions.Poisson([[9.0], [2.0]]))
    model = jaxem.freeze(model, "components.rate", mask=[True, False])
    assert reorder(model, [1, 0]).components.frozen == (("rate", (False, True)),)


def test_standard_errors_follow():
    model, data, *_ = CASES["gaussian"]()
    fitted = jaxem.fit(model, data).model
    errors = jaxem.inference.standard_errors(fitted, data)
    moved = jaxem.inference.standard_errors(reorder(fitted, [1, 0]), data)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[::-1], b, rtol=1e-6), errors, moved)


def test_runs_are_aligned_with_a_reference():
    truth = jaxem.HMM(
        [0.3, 0.3, 0.4],
        [[0.8, 0.1, 0.1], [0.2, 0.7, 0.1], [0.1, 0.2, 0.7]],
        jaxem.emissions.Poisson([[1.0], [6.0], [15.0]]),
    )
    counts, _ = truth.sample(jax.random.key(0), 4, 50)
    moved = reorder(truth, [2, 0, 1])
    np.testing.assert_allclose(align(moved, truth, counts).emission.rate, truth.emission.rate)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: reorder(CASES["gaussian"]()[0], [0, 0]), "permutation"),
        (lambda: reorder(CASES["gaussian"]()[0], [0, 1, 2]), r"shape \(3,\)"),
        (lambda: reorder(CASES["labels"]()[0], [1, 0]), "one order"),
        (lambda: reorder(CASES["log-joint"]()[0], [1, 0]), "with components"),
    ],
)
def test_what_has_no_order_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
