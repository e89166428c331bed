"""What surrounds a fit: reading it, saving it, resuming it, comparing models."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, POINTS, N

import jaxem

P = jnp.asarray(POINTS)


def gaussians():
    return CASES["gaussian"]().model


# Reading


def test_a_model_reads_as_its_constructor_call():
    model = jaxem.Mixture([0.25, 0.75], jaxem.emissions.Poisson([[1.0, 2.5], [4.0, 0.5]]))
    assert repr(model) == (
        "Mixture(\n"
        "  weights=[0.25 0.75],\n"
        "  components=Poisson(\n"
        "    rate=[[1.  2.5]\n"
        "          [4.  0.5]]\n"
        "  )\n"
        ")"
    )


# What a log-joint takes has the names that its author gave it
@pytest.mark.parametrize("name", [name for name in CASES if name != "log-joint"])
def test_every_model_names_its_named_parameters(name):
    text = repr(CASES[name]().model)
    assert "logits" not in text and "log_" not in text and "\t" not in text
    assert all(line == line.rstrip() for line in text.splitlines())
    parameters = {
        "gaussian": ("mean", "covariance"),
        "poisson": ("rate",),
        "independent": ("SphericalGaussian", "Poisson", "variance", "rate"),
    }
    for word in parameters.get(name, ()):
        assert word in text


def test_what_is_held_is_marked_after_the_comma():
    model = jaxem.Mixture(
        [0.25, 0.75], jaxem.emissions.SphericalGaussian([[1.0], [2.0]], [1.0, 4.0])
    )
    assert "frozen" not in repr(model)
    model = jaxem.freeze(model, "weights", "components.variance")
    model = jaxem.freeze(model, "components.mean", mask=[True, False])
    assert repr(model) == (
        "Mixture(\n"
        "  weights=[0.25 0.75],  # frozen\n"
        "  components=SphericalGaussian(\n"
        "    mean=[[1.]\n"
        "          [2.]],  # frozen where [1, 0]\n"
        "    variance=[1. 4.]  # frozen\n"
        "  )\n"
        ")"
    )


def test_a_tiny_number_leaves_the_others_readable():
    matrix = [[0.9, 0.1], [1e-30, 1.0]]
    assert repr(jaxem.factors.Transition(matrix)) == (
        "Transition(\n  matrix=[[0.9 0.1]\n          [1e-30 1]]\n)"
    )


def test_models_from_functions_show_their_numbers():
    params = {"mean": jnp.array([1.5, 2.25]), "scale": 1.0}
    for model in (
        jaxem.from_log_joint(lambda params, x: x, params),
        jaxem.from_functions(lambda params, x: x, lambda statistics: statistics, params),
    ):
        assert "{'mean': [1.5  2.25], 'scale': 1.}" in repr(model)


def test_a_family_without_parameters_takes_one_line():
    labels = jaxem.emissions.Labels(2)
    assert repr(labels) == "Labels()"
    both = jaxem.emissions.Independent((jaxem.emissions.Poisson([[1.0], [2.0]]), labels))
    assert "\n    Labels(),\n" in repr(both)


def test_large_and_traced_parameters_show_their_shape():
    large = jaxem.Mixture(np.full(20, 0.05), jaxem.emissions.Poisson(np.ones((20, 3))))
    assert "rate=float64[20,3]" in repr(large)
    seen = []
    jax.eval_shape(lambda m: seen.append(repr(m)), gaussians())
    assert "mean=float64[2,2]" in seen[0]


def test_a_solution_reads_as_a_verdict():
    text = repr(jaxem.fit(gaussians(), P, max_steps=3, tol=0.0))
    assert text.splitlines()[0] == "Solution: max_steps_reached after 3 steps"
    assert "log-likelihood" in text and "estimated error" in text and "Mixture(" in text
    text = repr(jaxem.fit(gaussians(), P))
    assert text.startswith("Solution: converged after")


def test_a_batch_of_solutions_counts_its_results():
    models = jax.tree.map(lambda leaf: jnp.stack([leaf] * 3), gaussians())
    batch = jaxem.fit_restarts(models, P, max_steps=2)
    assert repr(batch) == "Solutions of 3 fits: 3 max_steps_reached"


def test_a_traced_solution_can_be_printed():
    seen = []

    def trace(model):
        solution = jaxem.fit(model, P, max_steps=3, throw=False)
        seen.append(repr(solution))
        return solution.objective

    jax.eval_shape(trace, gaussians())
    assert "traced" in seen[0]


def test_a_prior_and_a_state_can_be_printed():
    model = gaussians()
    assert "Framed" in repr(model.prior())
    assert "State" in repr(jaxem.EM().init(model, P))


# Saving and resuming


@pytest.mark.parametrize("name", ["gaussian", "tied", "independent", "from_functions"])
def test_a_saved_model_comes_back_and_the_fit_goes_on(name, tmp_path):
    case = CASES[name]()
    path = tmp_path / "model.eqx"
    half = jaxem.fit(case.model, case.data, tol=0.0, max_steps=4)
    eqx.tree_serialise_leaves(path, half.model)
    skeleton = jax.tree.map(jnp.zeros_like, CASES[name]().model)
    loaded = eqx.tree_deserialise_leaves(path, skeleton)
    for left, right in zip(jax.tree.leaves(loaded), jax.tree.leaves(half.model), strict=True):
        np.testing.assert_array_equal(left, right)
    resumed = jaxem.fit(loaded, case.data, tol=0.0, max_steps=4)
    whole = jaxem.fit(case.model, case.data, tol=0.0, max_steps=8)
    for left, right in zip(
        jax.tree.leaves(resumed.model), jax.tree.leaves(whole.model), strict=True
    ):
        np.testing.assert_allclose(left, right, rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(resumed.history[0], half.objective, rtol=1e-13)


def test_a_saved_solution_comes_back_with_its_result(tmp_path):
    solution = jaxem.fit(gaussians(), P, max_steps=50)
    eqx.tree_serialise_leaves(tmp_path / "solution.eqx", solution)
    like = eqx.filter_eval_shape(lambda: jaxem.fit(gaussians(), P, max_steps=50, throw=False))
    loaded = eqx.tree_deserialise_leaves(tmp_path / "solution.eqx", like)
    assert loaded.result == solution.result
    np.testing.assert_array_equal(loaded.history, solution.history)
    assert repr(loaded) == repr(solution)


# Criteria


def test_criteria_are_their_formulas():
    sample_weight = jnp.linspace(0, 2, N)
    solution = jaxem.fit(gaussians(), P, sample_weight=sample_weight)
    model = solution.model
    p = 1 + 4 + 6
    total = float(jnp.sum(sample_weight * model.log_prob(P)))
    np.testing.assert_allclose(
        jaxem.inference.aic(model, P, sample_weight=sample_weight), -2 * total + 2 * p
    )
    bic = -2 * total + p * np.log(sample_weight.sum())
    np.testing.assert_allclose(jaxem.inference.bic(model, P, sample_weight=sample_weight), bic)
    r = np.asarray(model.responsibilities(P))
    entropy = -np.sum(np.asarray(sample_weight)[:, None] * r * np.log(r))
    np.testing.assert_allclose(
        jaxem.inference.icl(model, P, sample_weight=sample_weight), bic + 2 * entropy
    )
    for criterion in (jaxem.inference.aic, jaxem.inference.bic, jaxem.inference.icl):
        of_model = criterion(model, P, sample_weight=sample_weight)
        assert criterion(solution, P, sample_weight=sample_weight) == of_model


def test_criteria_leave_the_prior_out_and_count_what_is_free():
    model = gaussians()
    prior = model.prior(
        weights=4.0, components=model.components.prior({"mean": 5.0, "covariance": 9.0})
    )
    solution = jaxem.fit(model, P, prior=prior)
    assert solution.objective < solution.log_likelihood - 1
    likelihood = solution.model.log_prob(P).sum()
    np.testing.assert_allclose(jaxem.inference.aic(solution, P), -2 * likelihood + 22)
    frozen = jaxem.freeze(solution.model, "components.mean")
    np.testing.assert_allclose(jaxem.inference.aic(frozen, P), -2 * likelihood + 14)


def test_criteria_survive_a_unit_of_weight_zero():
    sample_weight = jnp.ones(N).at[0].set(0)
    spoilt = P.at[0].set(jnp.nan)
    for criterion in (jaxem.inference.aic, jaxem.inference.bic, jaxem.inference.icl):
        np.testing.assert_allclose(
            criterion(gaussians(), spoilt, sample_weight=sample_weight),
            criterion(gaussians(), P[1:]),
        )
