"""Linear-Gaussian state-space models: published results, dense normal laws, missing entries."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gold import match, table
from jax.scipy.stats import multivariate_normal
from models import CASES

import jaxem
from jaxem import LinearGaussianSSM, Sequences, models
from jaxem.emissions import Gaussian, LinearRegression
from jaxem.latents import kalman

# Annual flow of the Nile at Aswan, 1871–1970, in 10⁸ m³; Cobb (1978), Biometrika 65.
NILE = """
1120 1160 963 1210 1160 1160 813 1230 1370 1140 995 935 1110 994 1020 960 1180 799 958 1140 1100
1210 1150 1250 1260 1220 1030 1100 774 840 874 694 940 833 701 916 692 1020 1050 969 831 726 456
824 702 1120 1100 832 764 821 768 845 864 862 698 845 744 796 1040 759 781 865 845 944 984 897 822
1010 771 676 649 846 812 742 801 1040 860 874 848 890 744 749 838 1050 918 986 797 923 975 815 1020
906 901 1170 912 746 919 718 714 740
"""
FLOW = jnp.array([float(year) for year in NILE.split()])[None, :, None]


def local_level(noise, drift):
    """A random walk from N(1000, 10000), seen with noise; two variances are free."""
    one, zero = [[[1.0]]], [[0.0]]
    model = LinearGaussianSSM(
        Gaussian([[1000.0]], [[[10000.0]]]),
        LinearRegression(one, zero, [[[drift]]]),
        LinearRegression(one, zero, [[[noise]]]),
    )
    known = ("initial", "dynamics.coefficients", "dynamics.intercept")
    return jaxem.freeze(model, *known, "emission.coefficients", "emission.intercept")


def log_variances(model):
    return jnp.log(jnp.stack([model.emission.covariance, model.dynamics.covariance]).ravel())


def fit_nile(flow):
    return jaxem.fit(local_level(10_000.0, 1000.0), flow, jaxem.SQUAREM(), tol=1e-11)


def test_nile_at_given_variances():
    model = local_level(15099.0, 1469.1)
    match("ssm_nile_proper", "loglik_at_15099_1469.1", model.log_prob(FLOW)[0])
    states = model.states(FLOW)
    match("ssm_nile_proper", "smoothed_first5_at_15099_1469.1", states.mean[0, :5, 0])
    match("ssm_nile_proper", "smoothed_var_first5", states.covariance[0, :5, 0, 0])


def test_nile_fitted():
    solution = fit_nile(FLOW)
    assert solution.converged
    match("ssm_nile_proper", "H_Q", jnp.exp(log_variances(solution.model)))
    match("ssm_nile_proper", "loglik", solution.objective)
    slopes = jax.jacrev(lambda flow: log_variances(fit_nile(flow).model))(FLOW)
    match("ssm_nile_proper", "dlogHQ_dy_first5", slopes[:, 0, :5, 0])
    information = jaxem.inference.observed_information(solution, FLOW)
    match("ssm_nile_proper", "se_logH_logQ", information.covariance(log_variances).standard_errors)


def test_blood_as_shumway_and_stoffer():
    """Five steps of R astsa, in whose M-step the noise of days without data counts as before."""
    y = jnp.asarray(table("blood").to_numpy(float))[None]
    small = np.diag([0.01, 0.01, 1.0])
    first = jnp.full((1, 1, 3), jnp.nan)  # the state at t = 0 is not observed
    y = jnp.concatenate([first, y], axis=1)
    missing = jnp.sum(jnp.all(jnp.isnan(y), axis=2)) - 1
    model = LinearGaussianSSM(
        Gaussian(np.zeros((1, 3)), [np.diag([0.1, 0.1, 1.0])]),
        LinearRegression([np.eye(3)], np.zeros((1, 3)), [small]),
        LinearRegression([np.eye(3)], np.zeros((1, 3)), [small], diagonal=True),
    )
    model = jaxem.freeze(model, "dynamics.intercept", "emission.coefficients", "emission.intercept")
    values = []
    for _ in range(5):
        statistics, value = model.e_step(y)
        initial, moved, read = statistics.sums
        residuals = read.joint.at[:, 4:, 4:].add(missing * jnp.eye(3))
        read = read._replace(scale_count=read.scale_count + missing, joint=residuals)
        model = model.m_step(jaxem.authoring.Framed((initial, moved, read), model))
        values.append(-value - 0.5 * jnp.log(2 * jnp.pi) * jnp.sum(~jnp.isnan(y)))
    case = "ssm_blood_em"
    match(case, "true_innovation_negloglik_no2pi_before_steps_1_5", jnp.stack(values))
    match(case, "Phi_after_5", model.dynamics.coefficients[0])
    match(case, "Q_after_5", model.dynamics.covariance[0])
    match(case, "R_diag_after_5", jnp.diagonal(model.emission.covariance[0]))
    match(case, "mu0_after_5", model.initial.mean[0])


def dense(model, y):
    """Mean and covariance of all states and outputs of one sequence."""
    t, n = len(y), model.num_states
    a, c = model.dynamics.coefficients[0], model.emission.coefficients[0]
    mean, covariance = [model.initial.mean[0]], [model.initial.covariance[0]]
    for _ in range(t - 1):
        mean.append(a @ mean[-1] + model.dynamics.intercept[0])
        covariance.append(a @ covariance[-1] @ a.T + model.dynamics.covariance[0])
    states = np.zeros((t * n, t * n))
    for i in range(t):
        block = covariance[i]
        for j in range(i, t):
            states[j * n : j * n + n, i * n : i * n + n] = block
            states[i * n : i * n + n, j * n : j * n + n] = block.T
            block = a @ block
    turn = np.kron(np.eye(t), c)
    level = turn @ np.concatenate(mean) + np.tile(model.emission.intercept[0], t)
    spread = turn @ states @ turn.T + np.kron(np.eye(t), model.emission.covariance[0])
    return np.concatenate(mean), states, turn, level, spread


def test_likelihood_and_states_are_those_of_a_dense_normal_law():
    case = CASES["state-space"]()
    model, data = case.model, case.data
    found, log_prob = model.states(data), model.log_prob(data)
    for i in range(4):
        length = int(jnp.sum(data.within[i]))
        y = np.where(data.present[i][:, None], data.values[i], np.nan)[:length]
        seen = ~np.isnan(y).ravel()
        mean, states, turn, level, spread = dense(model, y)
        spread, turn = spread[np.ix_(seen, seen)], turn[seen]
        given = y.ravel()[seen]
        own = multivariate_normal.logpdf(given, level[seen], spread)
        np.testing.assert_allclose(log_prob[i], own, rtol=1e-10)
        gain = np.linalg.solve(spread, turn @ states).T
        np.testing.assert_allclose(
            found.mean[i, :length].ravel(), mean + gain @ (given - level[seen]), atol=1e-10
        )
        left = states - gain @ turn @ states
        for step in range(length):
            block = slice(step * model.num_states, (step + 1) * model.num_states)
            np.testing.assert_allclose(found.covariance[i, step], left[block, block], atol=1e-10)


def test_forecasts_are_states_of_steps_without_outputs():
    model = local_level(15099.0, 1469.1)
    mean, covariance = model.forecast(FLOW, 3)
    longer = jnp.concatenate([FLOW, jnp.full((1, 3, 1), jnp.nan)], axis=1)
    states = model.states(longer)
    np.testing.assert_allclose(mean[0], states.mean[0, -3:])
    np.testing.assert_allclose(covariance[0], states.covariance[0, -3:] + 15099.0)
    assert jnp.all(jnp.diff(covariance[0, :, 0, 0]) > 1000)


def test_the_smoother_is_the_gradient_of_the_filter():
    """Fisher's identity: ∂ log p / ∂bₜ is the score of what comes, E ε = Lᵀ r."""
    rng = np.random.default_rng(0)
    noise = jnp.tril(jnp.asarray(rng.normal(size=(2, 2))))
    matrix = jnp.array([[0.8, 0.3], [-0.2, 0.7]])
    drift = jnp.asarray(rng.normal(size=(2, 6, 2)))
    outputs = kalman.Outputs(
        jnp.asarray(rng.normal(size=(2, 6, 3, 2))), jnp.asarray(rng.normal(size=(2, 6, 3)))
    )

    def log_prob(drift):
        dynamics = kalman.Dynamics(jnp.zeros(2), jnp.eye(2), matrix, drift, noise)
        return jnp.sum(kalman.filtered(dynamics, outputs).log_increments)

    found = kalman.smoothed(
        kalman.Dynamics(jnp.zeros(2), jnp.eye(2), matrix, drift, noise), outputs
    )
    np.testing.assert_allclose(
        jax.grad(log_prob)(drift)[:, 1:] @ noise, found.noise_mean[:, 1:], atol=1e-12
    )


def test_singular_noise_and_a_known_start_need_no_special_case():
    """An autoregression of order 2 in companion form, from a known state."""
    rng = np.random.default_rng(1)
    y = jnp.asarray(rng.normal(size=(3, 5)))
    a = jnp.array([[0.5, -0.3], [1.0, 0.0]])
    dynamics = kalman.Dynamics(
        jnp.zeros(2), jnp.zeros((2, 2)), a, jnp.zeros((1, 1, 2)), jnp.diag(jnp.array([1.0, 0.0]))
    )
    y = y.at[:, 0].set(0.0)
    rows = jnp.array([[[[1e4, 0.0]]]])  # noise of variance 10⁻⁸
    found = kalman.filtered(dynamics, kalman.Outputs(rows, 1e4 * y[:, :, None])).log_increments
    past = jnp.concatenate([jnp.zeros((3, 2)), y], axis=1)
    errors = y[:, 1:] - 0.5 * past[:, 2:-1] + 0.3 * past[:, 1:-2]
    own = -0.5 * jnp.sum(errors**2, axis=1) - 4 * np.log(1e4)
    np.testing.assert_allclose(jnp.sum(found, axis=1), own, rtol=1e-6)


def seen_autoregression(below=1.0):
    """An autoregression of order 2 in companion form, from a known state, seen with noise."""
    model = LinearGaussianSSM(
        Gaussian([[0.0, 0.0]], np.zeros((1, 2, 2))),
        LinearRegression(
            jnp.array([[[0.5, -0.3], [below, 0.0]]]),
            [[0.0, 0.0]],
            [np.diag([1.0, 0.0])],
            diagonal=True,
        ),
        LinearRegression([[[1.0, 0.0]]], [[0.0]], [[[0.5]]]),
    )
    known = ("initial", "dynamics.intercept", "emission.coefficients", "emission.intercept")
    model = jaxem.freeze(model, *known)
    model = jaxem.freeze(model, "dynamics.coefficients", mask=[[False, False], [True, True]])
    return jaxem.freeze(model, "dynamics.covariance", mask=[False, True])


def test_known_elements_and_states_without_noise():
    y, _ = seen_autoregression().sample(jax.random.key(0), 5, 60)

    def fitted(below):
        return jaxem.fit(seen_autoregression(below), y, jaxem.SQUAREM(), tol=1e-12)

    def numbers(below):
        model = fitted(below).model
        variances = model.dynamics.covariance[0, 0, 0], model.emission.covariance[0, 0, 0]
        return jnp.append(model.dynamics.coefficients[0, 0], jnp.stack(variances))

    solution = fitted(1.0)
    assert solution.converged and solution.model.num_free_parameters == 4
    score = jax.grad(lambda model: jnp.sum(model.log_prob(y)))(solution.model)
    np.testing.assert_allclose(score.dynamics.coefficients[0, 0], 0, atol=1e-8)
    np.testing.assert_allclose(score.dynamics.structure.log_scale, 0, atol=1e-8)
    between = (numbers(1.0 + 1e-4) - numbers(1.0 - 1e-4)) / 2e-4
    slopes = jax.jacrev(numbers)(1.0)
    np.testing.assert_allclose(slopes, between, atol=1e-6)
    covariance = jaxem.inference.observed_information(solution, y).covariance()
    frozen = covariance.frozen["dynamics"]
    np.testing.assert_array_equal(frozen["coefficients"][0], [[False, False], [True, True]])
    np.testing.assert_array_equal(jnp.diagonal(frozen["covariance"][0]), [False, True])
    assert covariance.proper and jnp.all(covariance.standard_errors["dynamics"]["coefficients"] < 1)


def test_what_cannot_move_without_variance_is_degenerate():
    model = seen_autoregression()
    y, _ = model.sample(jax.random.key(0), 5, 60)
    statistics, _ = model.e_step(y)
    causes = jaxem.em.CAUSES
    assert model.degenerate(statistics) == causes.none
    for name in ("initial.mean", "dynamics.coefficients", "initial.covariance"):
        assert jaxem.unfreeze(model, name).degenerate(statistics) == causes.no_variance
    with pytest.raises(ValueError, match="an output without noise takes a small one"):
        LinearGaussianSSM(
            model.initial, model.dynamics, LinearRegression([[[1.0, 0.0]]], [[0.0]], [[[0.0]]])
        )


def test_covariances_that_settle_are_those_of_every_step():
    """Of complete sequences they are found once, and no more where they repeat themselves."""
    rng = np.random.default_rng(3)
    a = jnp.array([[0.8, 0.3], [-0.2, 0.7]])
    dynamics = kalman.Dynamics(
        jnp.ones(2), 3 * jnp.eye(2), a, jnp.ones((1, 1, 2)), jnp.array([[0.5, 0.0], [0.2, 0.3]])
    )
    row, values = rng.normal(size=(3, 2)), jnp.asarray(rng.normal(size=(2, 150, 3)))

    def value(row, shape):
        rows = jnp.broadcast_to(row, (*shape, 3, 2))
        found = kalman.smoothed(dynamics, kalman.Outputs(rows, values))
        return jnp.sum(found.log_increments) + jnp.sum(jnp.sin(found.mean)), found

    (shared, short), slope = jax.value_and_grad(value, has_aux=True)(row, (1, 1))
    (each, long), other = jax.value_and_grad(value, has_aux=True)(row, (2, 150))
    np.testing.assert_allclose(shared, each, rtol=1e-12)
    np.testing.assert_allclose(slope, other, rtol=1e-9)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(*np.broadcast_arrays(a, b), atol=1e-12), short, long
    )
    forward = kalman.filtered(dynamics, kalman.Outputs(jnp.asarray(row)[None, None], values))
    assert np.sum(forward.covariances.repeats) >= 6


def test_a_regression_with_independent_residuals():
    rng = np.random.default_rng(2)
    u = rng.normal(size=(200, 1))
    y = u @ [[1.0, -1.0]] + rng.normal(size=(200, 2)) @ [[1.0, 0.9], [0.0, 0.5]]
    start = LinearRegression(np.zeros((1, 2, 1)), np.zeros((1, 2)), [np.eye(2)], diagonal=True)
    model = jaxem.fit(start, (u, y)).model
    left = (
        y
        - np.column_stack([u, np.ones(200)])
        @ np.linalg.lstsq(np.column_stack([u, np.ones(200)]), y, rcond=None)[0]
    )
    np.testing.assert_allclose(model.covariance[0], np.diag(np.mean(left**2, axis=0)), rtol=1e-8)
    assert model.num_free_parameters == 6
    with pytest.raises(ValueError, match="covariance is not diagonal"):
        LinearRegression(np.zeros((1, 2, 1)), np.zeros((1, 2)), np.ones((1, 2, 2)), diagonal=True)


def test_inputs_of_both_equations():
    """What inputs add to states and outputs can be taken off beforehand."""
    rng = np.random.default_rng(3)
    y, u, v = (jnp.asarray(rng.normal(size=(2, 7, 1))) for _ in range(3))
    with_inputs = LinearGaussianSSM(
        Gaussian([[0.0]], [[[1.0]]]),
        LinearRegression([[[0.7, 0.4]]], [[0.1]], [[[0.5]]]),
        LinearRegression([[[1.0, -0.6]]], [[0.2]], [[[0.3]]]),
    )
    plain = LinearGaussianSSM(
        Gaussian([[0.0]], [[[1.0]]]),
        LinearRegression([[[0.7]]], [[0.1]], [[[0.5]]]),
        LinearRegression([[[1.0]]], [[0.2]], [[[0.3]]]),
    )
    added = [jnp.zeros((2, 1))]
    for step in range(1, 7):
        added.append(0.7 * added[-1] + 0.4 * u[:, step])
    own = plain.log_prob(y + 0.6 * v - jnp.stack(added, axis=1))
    data = Sequences((v, y), inputs=u)
    np.testing.assert_allclose(with_inputs.log_prob(data), own, rtol=1e-10)
    free = jaxem.freeze(with_inputs, "initial", "emission.coefficients")
    solution = jaxem.fit(free, data, max_steps=20)
    assert jnp.all(jnp.diff(solution.history[: solution.num_steps]) > -1e-9)


def test_a_draw_is_fitted():
    truth = CASES["state-space"]().model
    y, z = truth.sample(jax.random.key(0), 200, 30)
    assert y.shape == (200, 30, 3) and z.shape == (200, 30, 2)
    states = truth.states(y)
    error = z - states.mean
    scaled = jnp.linalg.solve(states.covariance, error[..., None])[..., 0] * error
    np.testing.assert_allclose(jnp.mean(jnp.sum(scaled, axis=2)), 2.0, rtol=0.05)


WALKS = np.cumsum(np.random.default_rng(4).normal(size=(2, 16, 3)), axis=1) + 5
WALK = WALKS[:, :, :1]
NAMED = {
    "level": (lambda: models.local_level(WALK), 2),
    "trend": (lambda: models.local_linear_trend(WALK), 3),
    "seasonal": (lambda: models.seasonal(4, WALK), 3),
    "autoregressive": (lambda: models.autoregressive(3, WALK), 6),
    "without noise": (lambda: models.autoregressive(2, WALK, noise=False), 4),
    "factors": (lambda: models.dynamic_factors(3, 2, 2, WALKS), 19),
    "of no data": (lambda: models.dynamic_factors(3, 2), 15),
    "sum": (
        lambda: models.sum_of(
            models.local_level(WALK), models.seasonal(4), models.autoregressive(1)
        ),
        5,
    ),
}


@pytest.mark.parametrize("name", NAMED)
def test_models_by_name_are_dense_normal_laws(name):
    """From a start of variance 1: a dense law has no digits for a diffuse one."""
    make, free = NAMED[name]
    model = make()
    assert model.num_free_parameters == free
    start = model.initial.with_parameters(covariance=np.eye(model.num_states))
    model = eqx.tree_at(lambda m: m.initial, model, start)
    y = jnp.asarray(WALKS[:, :, : model.emission.intercept.shape[1]])
    for one, found in zip(y, model.log_prob(y), strict=True):
        *_, level, spread = dense(model, one)
        own = multivariate_normal.logpdf(one.ravel(), level, spread)
        np.testing.assert_allclose(found, own, rtol=1e-6 if name == "without noise" else 1e-10)


@pytest.mark.parametrize("dtype", [np.float64, np.float32])
def test_nile_from_a_diffuse_start(dtype):
    """The exact diffuse maximum of KFAS; of float32, with a start that is less wide."""
    y = FLOW.astype(dtype)
    solution = jaxem.fit(models.local_level(y), y, jaxem.SQUAREM())
    assert solution.converged and solution.objective.dtype == dtype
    model, close = solution.model, dtype == np.float64
    np.testing.assert_allclose(
        jnp.sum(model.one_step_log_prob(y)[:, 1:]), -632.54563, atol=1e-5 if close else 5e-3
    )
    variances = jnp.exp(log_variances(model))
    np.testing.assert_allclose(variances, [15098.65, 1469.163], rtol=2e-5 if close else 1e-3)


def test_an_unknown_first_level_is_an_intercept():
    """As MARSS estimates it, which reports −637.609 where its EM stops."""
    walk = models.local_level(FLOW)
    model = LinearGaussianSSM(Gaussian([[0.0]], [[[0.0]]]), walk.dynamics, walk.emission)
    model = jaxem.unfreeze(jaxem.freeze(model, "initial"), "emission.intercept")
    solution = jaxem.fit(model, FLOW, jaxem.SQUAREM())
    assert solution.converged
    np.testing.assert_allclose(solution.objective, -637.603, atol=1e-3)


def test_components_sum_to_the_outputs_without_noise():
    """Also at first, where a wide start leaves open what is level and what is season."""
    parts = models.local_linear_trend(WALK), models.seasonal(4, WALK)
    model = models.sum_of(*parts)
    trend, season = models.components(model, WALK, parts)
    states, c = model.states(WALK), model.emission.coefficients[0]
    np.testing.assert_allclose(trend.mean + season.mean, states.mean @ c.T, rtol=1e-10)
    assert jnp.all(trend.covariance > 0) and jnp.all(season.covariance[:, 0] < 100)
    with pytest.raises(ValueError, match=r"parts have \[2\] states, and the model 5"):
        models.components(model, WALK, parts[:1])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.seasonal(1), "period, of seasonal, must be an integer ≥ 2"),
        (lambda: models.dynamic_factors(2, 3), "3 factors need as many outputs, got 2"),
        (lambda: models.local_level(WALKS), r"y must have shape \(b, t, 1\)"),
        (lambda: models.local_level(np.ones((1, 9, 1))), "each output must vary"),
        (lambda: models.sum_of(), "one model at least"),
        (lambda: models.sum_of(models.local_level(), models.dynamic_factors(2, 1)), "same outputs"),
        (lambda: models.sum_of(CASES["state-space"]().model), "first state of each component"),
    ],
)
def test_wrong_arguments_of_models_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda m: LinearGaussianSSM(m.initial, m.initial, m.emission),
            "dynamics must be a LinearRegression",
        ),
        (
            lambda m: LinearGaussianSSM(
                m.initial,
                LinearRegression(np.ones((1, 3, 3)), np.zeros((1, 3)), [np.eye(3)]),
                m.emission,
            ),
            r"dynamics has coefficients of shape \(1, 3, 3\)",
        ),
        (
            lambda m: m.log_prob(jnp.zeros((2, 4, 5))),
            r"outputs of shape \(b, t, 3\), got \(2, 4, 5\)",
        ),
        (lambda m: m.log_prob(jnp.zeros((2, 4, 3), jnp.float32)), "data are float32"),
        (
            lambda m: m.log_prob(Sequences(jnp.zeros((2, 4, 3)), inputs=jnp.zeros((2, 4, 1)))),
            "coefficients for 0 inputs",
        ),
        (
            lambda m: jaxem.fit(m, jnp.zeros((2, 4, 3)), jaxem.EM(jaxem.latents.Hard())),
            "posterior Exact",
        ),
    ],
)
def test_wrong_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(CASES["state-space"]().model)
