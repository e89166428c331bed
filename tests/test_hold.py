"""freeze and unfreeze; with something frozen, the M-step is the constrained maximum."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, MEAN, POINTS

import jaxem

P = jnp.asarray(POINTS)


def three():
    """Three components, so that frozen weights leave something to share."""
    mean = np.concatenate([MEAN, [[1.0, 1.0]]])
    return jaxem.Mixture([0.3, 0.3, 0.4], jaxem.emissions.Gaussian(mean, np.stack([np.eye(2)] * 3)))


@eqx.filter_jit
def e_step(model, data):
    return model.e_step(data)[0]


@eqx.filter_jit
def m_step(model, statistics):
    return model.m_step(statistics)


@eqx.filter_jit
def q(model, statistics):
    return model.expected_log_prob(statistics)


@eqx.filter_jit
def slope(model, statistics):
    return jax.grad(lambda m: m.expected_log_prob(statistics))(model)


def lookup(module, path):
    for part in path.split("."):
        module = module[int(part)] if part.isdigit() else getattr(module, part)
    return module


@pytest.mark.parametrize(
    ("name", "path"),
    [
        ("gaussian", "weights"),
        *[
            (name, f"components.{parameter}")
            for name, scale in [
                ("gaussian", "covariance"),
                ("tied", "covariance"),
                ("diagonal", "variance"),
                ("diagonal-tied", "variance"),
                ("spherical", "variance"),
                ("spherical-tied", "variance"),
            ]
            for parameter in ("mean", scale)
        ],
        *[(name, "components.probability") for name in ("bernoulli", "categorical")],
        *[(name, "components.rate") for name in ("poisson", "exponential")],
        ("multinomial", "components.probability"),
        ("independent", "components.parts.0.mean"),
        ("independent", "components.parts.1.rate"),
    ],
)
def test_holding_one_parameter_leaves_a_true_maximum_over_the_others(name, path):
    model, data, *_ = CASES[name]()
    frozen = jaxem.freeze(model, path)
    statistics = e_step(frozen, data)
    after = m_step(frozen, statistics)
    np.testing.assert_array_equal(lookup(after, path), lookup(model, path))
    free, *_ = CASES[name]()
    assert q(after, statistics) > q(frozen, statistics)
    assert q(after, statistics) < q(m_step(free, e_step(free, data)), statistics)
    # Stationary in every leaf that is not behind the frozen parameter …
    owner = lookup(after, path.rpartition(".")[0]) if "." in path else after
    last = path.rpartition(".")[2]
    leaves = owner._weights if path == "weights" else getattr(owner, owner.parameters[last].leaf)
    behind = set(map(id, jax.tree.leaves(leaves)))
    gradient = slope(after, statistics)
    for leaf, rise in zip(jax.tree.leaves(after), jax.tree.leaves(gradient), strict=True):
        if id(leaf) not in behind:
            np.testing.assert_allclose(rise, 0, atol=1e-9)
    # … and a maximum, not a saddle.
    rng = np.random.default_rng(0)
    for _ in range(5):
        moved = jax.tree.map(
            lambda a: a if id(a) in behind else a + 0.03 * rng.normal(size=a.shape), after
        )
        assert q(moved, statistics) < q(after, statistics)


def test_a_covariance_is_taken_about_the_mean_that_is_held():
    model = jaxem.freeze(
        jaxem.Mixture([1.0], jaxem.emissions.Gaussian([[9.0, -9.0]], np.eye(2)[None])),
        "components.mean",
    )
    fitted = m_step(model, e_step(model, P)).components
    gaps = POINTS - np.array([9.0, -9.0])
    np.testing.assert_allclose(fitted.covariance[0], gaps.T @ gaps / len(POINTS), rtol=1e-12)
    np.testing.assert_array_equal(fitted.mean, [[9.0, -9.0]])


def test_free_weights_share_what_held_ones_leave():
    model = jaxem.freeze(three(), "weights", mask=[True, False, False])
    statistics = e_step(model, P)
    counts = np.asarray(statistics.sums[0])
    weights = m_step(model, statistics).weights
    np.testing.assert_allclose(weights[0], 0.3, rtol=1e-14)
    np.testing.assert_allclose(weights[1:], 0.7 * counts[1:] / counts[1:].sum(), rtol=1e-12)
    assert model.num_free_parameters == 1 + 3 * 5


def test_a_mask_holds_some_components_and_frees_the_others():
    model = three()
    frozen = jaxem.freeze(model, "components.mean", mask=[True, False, True])
    statistics = e_step(frozen, P)
    after, free = m_step(frozen, statistics), m_step(model, e_step(model, P))
    for j in (0, 2):
        np.testing.assert_array_equal(after.components.mean[j], model.components.mean[j])
        assert q(after, statistics) < q(free, statistics)
    np.testing.assert_allclose(after.components.mean[1], free.components.mean[1], rtol=1e-12)
    np.testing.assert_allclose(
        after.components.covariance[1], free.components.covariance[1], rtol=1e-10
    )
    r = np.asarray(model.responsibilities(P))
    gaps = POINTS - np.asarray(model.components.mean[0])
    about = (r[:, :1] * gaps).T @ gaps / r[:, 0].sum()
    np.testing.assert_allclose(after.components.covariance[0], about, rtol=1e-10)
    assert frozen.num_free_parameters == 2 + 1 * 2 + 3 * 3


def test_a_mask_with_a_tied_covariance_pools_about_each_mean():
    model = jaxem.freeze(
        jaxem.Mixture([0.5, 0.5], jaxem.emissions.TiedGaussian(MEAN, np.eye(2))),
        "components.mean",
        mask=[True, False],
    )
    r = np.asarray(model.responsibilities(P))
    after = m_step(model, e_step(model, P)).components
    mean = r[:, 1] @ POINTS / r[:, 1].sum()
    np.testing.assert_allclose(after.mean, [MEAN[0], mean], rtol=1e-12)
    about = [(r[:, j : j + 1] * (POINTS - c)).T @ (POINTS - c) for j, c in enumerate(after.mean)]
    np.testing.assert_allclose(after.covariance, sum(about) / len(POINTS), rtol=1e-10)


def test_fits_climb_and_keep_what_is_held():
    start = jaxem.freeze(three(), "components.mean", mask=[True, False, False])
    start = jaxem.freeze(start, "weights", "components.covariance", mask=[False, True, False])
    solution = jaxem.fit(start, P, tol=0.0, max_steps=20)
    assert np.all(np.diff(solution.history) > -1e-10)
    np.testing.assert_array_equal(solution.model.components.mean[0], start.components.mean[0])
    np.testing.assert_array_equal(
        solution.model.components.covariance[1], start.components.covariance[1]
    )
    np.testing.assert_allclose(solution.model.weights[1], 0.3, rtol=1e-12)
    assert solution.history[-1] > solution.history[0] + 1


def test_all_held_is_a_fixed_point():
    model = jaxem.freeze(three(), "weights", "components.mean", "components.covariance")
    solution = jaxem.fit(model, P)
    assert int(solution.num_steps) == 1
    assert model.num_free_parameters == 0
    for left, right in zip(jax.tree.leaves(solution.model), jax.tree.leaves(model), strict=True):
        np.testing.assert_array_equal(left, right)


def test_unfreeze_is_the_inverse():
    model = three()
    frozen = jaxem.freeze(model, "weights", "components.mean")
    assert jax.tree.structure(frozen) != jax.tree.structure(model)
    assert jax.tree.structure(jaxem.unfreeze(frozen, "weights", "components.mean")) == (
        jax.tree.structure(model)
    )
    partly = jaxem.unfreeze(frozen, "weights")
    assert jax.tree.structure(partly) == jax.tree.structure(jaxem.freeze(model, "components.mean"))
    again = jaxem.freeze(jaxem.freeze(model, "components.mean"), "weights")
    assert jax.tree.structure(again) == jax.tree.structure(frozen)  # order does not matter


@pytest.mark.parametrize(
    ("name", "mask", "says"),
    [
        ("components.means", None, "covariance"),
        ("component.mean", None, "leads nowhere"),
        ("components.parts.0.mean", None, "leads nowhere"),
        ("component", None, "not a parameter"),
        ("logits", None, "not a parameter"),
        ("components.mean", [True, False], "one for each"),
        ("weights", [True] * 4, "one for each"),
    ],
)
def test_freeze_says_what_it_does_not_know(name, mask, says):
    with pytest.raises(ValueError, match=says):
        jaxem.freeze(three(), name, mask=mask)


def test_a_part_stands_for_all_its_parameters():
    part = jaxem.freeze(three(), "components")
    each = jaxem.freeze(three(), "components.mean", "components.covariance")
    assert jax.tree.structure(part) == jax.tree.structure(each)
    assert jax.tree.structure(jaxem.unfreeze(part, "components")) == jax.tree.structure(three())


def test_unfreeze_knows_names_as_well():
    with pytest.raises(ValueError, match="not a parameter"):
        jaxem.unfreeze(three(), "components.means")


def test_a_shared_parameter_takes_no_mask():
    model = jaxem.Mixture([0.5, 0.5], jaxem.emissions.TiedGaussian(MEAN, np.eye(2)))
    with pytest.raises(ValueError, match="takes no mask"):
        jaxem.freeze(model, "components.covariance", mask=[True, False])
