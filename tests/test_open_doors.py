"""Models from a log-joint, components from modules, and labels that are known."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from models import CASES, COUNTS, MEAN, POINTS, SmoothStudent

import jaxem
from jaxem import EM, SQUAREM, Mixture
from jaxem.em import Gradient
from jaxem.emissions import GradientEmission, Labels

X = jnp.asarray(COUNTS, float)
LBFGS = EM(maximization=Gradient(optax.lbfgs(), 10))


# A log-joint


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param(EM(), id="em"),
        pytest.param(LBFGS, id="lbfgs"),
        pytest.param(SQUAREM(), id="squarem"),
        pytest.param(EM(maximization=Gradient(optax.adam(3e-2), 5)), id="adam"),
    ],
)
def test_a_log_joint_has_the_maximum_of_the_model_it_describes(algorithm):
    case = CASES["log-joint"]()
    rates = jnp.exp(case.model.params["log_rate"])
    wanted = jaxem.fit(Mixture([0.5, 0.5], jaxem.emissions.Poisson(rates)), case.data, tol=1e-12)
    solution = jaxem.fit(case.model, case.data, algorithm, max_steps=5000, throw=False)
    np.testing.assert_allclose(solution.objective, wanted.objective, rtol=1e-8)
    fitted = jnp.exp(solution.model.params["log_rate"])
    np.testing.assert_allclose(fitted, wanted.model.components.rate, rtol=1e-3)
    z = solution.model.responsibilities(case.data)
    np.testing.assert_allclose(z, wanted.model.responsibilities(case.data), atol=1e-3)


def test_the_statistics_of_a_log_joint_are_its_score():
    case = CASES["log-joint"]()
    statistics, value = case.model.e_step(case.data)
    log_prob = lambda p: jnp.sum(jax.nn.logsumexp(case.model.function(p, case.data), axis=1))  # noqa: E731
    np.testing.assert_allclose(value, log_prob(case.model.params), rtol=1e-12)
    score = jax.grad(log_prob)(case.model.params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-10), statistics.sums.score, score
    )
    per_unit = case.model.log_prob(case.data)
    np.testing.assert_allclose(jnp.sum(per_unit), value, rtol=1e-12)


def test_the_fit_of_a_log_joint_is_differentiable():
    case = CASES["log-joint"]()

    def fitted(shift):
        sample_weight = jnp.ones(len(X)).at[0].add(shift)
        options = dict(sample_weight=sample_weight, tol=1e-13, max_steps=5000, throw=False)
        return jaxem.fit(case.model, case.data, **options).model.params["log_rate"]

    exact = jax.jacobian(jax.jit(fitted))(0.0)
    difference = (fitted(1e-4) - fitted(-1e-4)) / 2e-4
    np.testing.assert_allclose(exact, difference, rtol=1e-5, atol=1e-8)


def hard_to_scale(params, x):
    return jax.nn.log_softmax(params["logits"]) - 0.5 * 1e6 * (x - params["mean"]) ** 2


def test_steps_of_a_log_joint_shrink_to_its_scale():
    """A curvature of 10⁶ an observation: a whole step along the score would leave for good."""
    x = jnp.asarray(np.repeat([-0.01, 0.02], 20))[:, None]
    start = {"logits": jnp.zeros(2), "mean": jnp.array([-0.012, 0.015])}
    solution = jaxem.fit(jaxem.from_log_joint(hard_to_scale, start), x)
    np.testing.assert_allclose(solution.model.params["mean"], [-0.01, 0.02], atol=1e-6)
    assert bool(jnp.all(jnp.diff(solution.history[: solution.num_steps + 1]) >= -1e-9))


def scalar_joint(params, x):
    return jnp.sum(x) * params


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: jaxem.from_log_joint(3, {}), "must be a function"),
        (lambda: jaxem.from_log_joint(scalar_joint, {"f": jnp.sin}), "must be arrays"),
        (lambda: jaxem.from_log_joint(scalar_joint, 1.0).e_step(X), r"\(n, k\)"),
        (
            lambda: jaxem.fit(CASES["log-joint"]().model, X, EM(accumulation=jaxem.em.Online())),
            "use Full",
        ),
        (lambda: GradientEmission([]), "one or more"),
        (lambda: GradientEmission([3.0]), "log_prob"),
        (lambda: GradientEmission([module(0.0), Bent(jnp.zeros(2))]), "alike"),
        (lambda: GradientEmission([Counted(jnp.arange(2), jnp.zeros(2))]), "no other arrays"),
        (lambda: Mixture.init(jax.random.key(0), X, 2, GradientEmission), "start of its own"),
        (lambda: GradientEmission([module(0.0)]).sample(jax.random.key(0), X), "sample"),
        (
            lambda: Mixture([1.0], GradientEmission([Vague(jnp.zeros(2))])).e_step(X),
            "for one observation",
        ),
        (lambda: Labels(0), "num_components must be an integer ≥ 1"),
        (lambda: Mixture([0.5, 0.5], Labels(2)).e_step(X[:, :1]), "integers"),
        (lambda: Mixture([0.5, 0.5], Labels(2)).e_step(jnp.arange(4)), r"\(n, 1\)"),
        (lambda: Mixture.init(jax.random.key(0), jnp.arange(4), 2, lambda: 0), "family"),
        (lambda: start_of_labels(), "from_responsibilities"),
    ],
)
def test_what_does_not_fit_is_refused(build, message):
    with pytest.raises(ValueError, match=message):
        build()


# Components that are modules


class Bent(eqx.Module):
    centre: jax.Array

    def log_prob(self, x):
        return -jnp.sum((x - self.centre) ** 4)


class Vague(eqx.Module):
    centre: jax.Array

    def log_prob(self, x):
        return x - self.centre


class Counted(eqx.Module):
    number: jax.Array
    centre: jax.Array

    def log_prob(self, x):
        return -jnp.sum((x - self.centre) ** 2)


class Normal(eqx.Module):
    """A unit normal law, as the closed-form family has it."""

    centre: jax.Array
    name: str = eqx.field(static=True, default="normal")

    def log_prob(self, x):
        return jnp.sum(jax.scipy.stats.norm.logpdf(x, self.centre))

    def sample(self, key):
        return self.centre + jax.random.normal(key, self.centre.shape)


def module(shift):
    return SmoothStudent(jnp.full(2, shift), jnp.zeros(2))


def test_modules_fit_as_the_family_that_they_are():
    points = jnp.asarray(POINTS)
    own = Mixture([0.4, 0.6], GradientEmission([Normal(jnp.asarray(m)) for m in MEAN]))
    family = jaxem.freeze(jaxem.emissions.SphericalGaussian(MEAN, [1.0, 1.0]), "variance")
    wanted = jaxem.fit(Mixture([0.4, 0.6], family), points, tol=1e-12)
    solution = jaxem.fit(own, points, tol=1e-12)
    np.testing.assert_allclose(solution.objective, wanted.objective, rtol=1e-10)
    centres = jnp.stack([m.centre for m in solution.model.components.modules])
    np.testing.assert_allclose(centres, wanted.model.components.mean, atol=1e-6)
    # a step along the mean score of a unit normal law is its M-step
    assert abs(int(solution.num_steps) - int(wanted.num_steps)) <= 3
    x, z = solution.model.sample(jax.random.key(0), 2000)
    np.testing.assert_allclose(x[z == 0].mean(0), centres[0], atol=0.15)


def test_a_network_is_a_component_of_a_hidden_markov_model():
    """States told apart by the shape of their noise, through an autoregressive network."""

    class Network(eqx.Module):
        mean: eqx.nn.MLP
        log_scale: jax.Array

        def log_prob(self, x):
            now, before = x
            gap = (now - self.mean(before)) / jnp.exp(self.log_scale)
            return jnp.sum(-0.5 * gap**2 - self.log_scale - 0.5 * jnp.log(2 * jnp.pi))

    def network(key, scale):
        return Network(eqx.nn.MLP(1, 1, 4, 1, key=key), jnp.log(jnp.full(1, scale)))

    rng = np.random.default_rng(0)
    z = np.repeat([0, 1, 0, 1], 50)
    y = np.zeros(201)
    for t in range(200):
        y[t + 1] = (np.sin(2 * y[t]) if z[t] else -0.8 * y[t]) + (0.2 + 0.5 * z[t]) * rng.normal()
    data = (jnp.asarray(y[None, 1:, None]), jnp.asarray(y[None, :-1, None]))
    keys = jax.random.split(jax.random.key(0))
    emission = GradientEmission([network(keys[0], 0.3), network(keys[1], 0.8)])
    start = jaxem.HMM([0.5, 0.5], [[0.95, 0.05], [0.05, 0.95]], emission)
    algorithm = EM(maximization=Gradient(optax.lbfgs(), 10))
    solution = jaxem.fit(start, data, algorithm, max_steps=20, throw=False)
    assert bool(jnp.all(jnp.diff(solution.history[: solution.num_steps + 1]) >= -1e-8))
    assert float(jnp.mean(solution.model.predict(data)[0] == z)) > 0.9


def test_held_modules_stay():
    case = CASES["gradient-emission"]()
    model = jaxem.freeze(case.model, "components.params", mask=[True, False])
    fitted = jaxem.fit(model, case.data).model.components
    assert bool(jnp.all(fitted.params[0] == model.components.params[0]))
    assert bool(jnp.any(fitted.params[1] != model.components.params[1]))


# Labels


def start_of_labels():
    family = functools.partial(
        jaxem.emissions.Independent, families=(jaxem.emissions.SphericalGaussian, Labels)
    )
    return Mixture.init(jax.random.key(0), CASES["labels"]().data, 2, family)


def test_labelled_units_count_for_their_component_alone():
    model, (points, labels), *_ = CASES["labels"]()
    r = model.responsibilities((points, labels))
    labels = labels[:, 0]
    known = labels >= 0
    np.testing.assert_array_equal(r[known], jax.nn.one_hot(labels[known], 2))
    plain = Mixture(model.weights, model.components.parts[0])
    np.testing.assert_allclose(r[~known], plain.responsibilities(points[~known]), rtol=1e-12)
    # log p(x, z) of what is labelled, log p(x) of the rest
    joint = plain.log_joint(points)
    wanted = jnp.where(known, joint[jnp.arange(len(labels)), labels], plain.log_prob(points))
    np.testing.assert_allclose(model.log_prob((points, labels[:, None])), wanted, rtol=1e-12)


def test_all_labels_known_are_the_fit_of_each_group():
    points, labels = jnp.asarray(POINTS), jnp.arange(len(POINTS)) % 3 == 0
    start = jaxem.emissions.Independent(
        [jaxem.emissions.SphericalGaussian(MEAN, [1.0, 0.7]), Labels(2)]
    )
    data = (points, labels[:, None].astype(int))
    solution = jaxem.fit(Mixture([0.5, 0.5], start), data)
    assert int(solution.num_steps) <= 2
    wanted = [points[~labels].mean(0), points[labels].mean(0)]
    np.testing.assert_allclose(solution.model.components.parts[0].mean, wanted, rtol=1e-10)
    np.testing.assert_allclose(solution.model.weights[1], 1 / 3, rtol=1e-10)


def test_a_few_labels_name_the_components():
    """They break the symmetry of a start in which all components are alike."""
    _, (points, labels), *_ = CASES["labels"]()
    family = functools.partial(
        jaxem.emissions.Independent, families=(jaxem.emissions.SphericalGaussian, Labels)
    )
    known = jax.nn.one_hot(labels[:, 0], 2) + 0.5 * (labels < 0)
    start = Mixture.from_responsibilities((points, labels), known, family)
    solution = jaxem.fit(start, (points, labels))
    truth = jnp.arange(len(points)) % 2
    found = solution.model.predict((points, jnp.full_like(labels, -1)))
    assert float(jnp.mean(found == truth)) > 0.9


def test_states_of_some_steps_are_told():
    emission = jaxem.emissions.Independent([jaxem.emissions.Poisson([[1.0], [6.0]]), Labels(2)])
    model = jaxem.HMM([0.5, 0.5], [[0.8, 0.2], [0.2, 0.8]], emission)
    counts = jnp.asarray([[[3], [3], [3], [3]]])
    labels = jnp.asarray([[[0], [-1], [-1], [1]]])
    smoothed = model.responsibilities((counts, labels))[0]
    np.testing.assert_allclose(smoothed[jnp.array([0, 3])], [[1, 0], [0, 1]], atol=1e-12)
    assert bool(jnp.all((smoothed[1:3] > 0.05) & (smoothed[1:3] < 0.95)))


def test_a_label_that_names_no_component_is_reported():
    model, (points, labels), *_ = CASES["labels"]()
    for wrong in (2, -2):
        solution = jaxem.fit(model, (points, labels.at[5].set(wrong)), throw=False)
        assert solution.status == "invalid_data"
