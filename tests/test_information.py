"""Information, standard errors, rates and influence against what they must equal."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.flatten_util import ravel_pytree
from models import CASES

import jaxem
from jaxem import Mixture
from jaxem._core.parameters import estimates, named_parameters


@functools.cache
def fitted(name):
    """A case at its posterior mode (its likelihood alone, for plain functions)."""
    case = CASES[name]()
    prior = None
    if case.prior is not None:
        prior = case.model.prior(weights=1.0, components=case.prior)
    solution = jaxem.fit(case.model, case.data, prior=prior, tol=1e-13, max_steps=20_000)
    assert float(solution.error) < 1e-9
    return solution, case.data, prior


def flat(named):
    return ravel_pytree(named)[0]


@pytest.mark.parametrize(
    "name", ["gaussian", "student-t", "poisson-regression", "experts", "hmm-stationary", "hsmm"]
)
def test_information_is_minus_the_derivative_of_the_score(name):
    solution, data, prior = fitted(name)
    information = jaxem.inference.observed_information(solution, data, prior=prior)
    numbers, unravel = ravel_pytree(solution.model)

    @jax.jit
    def score(numbers):
        def objective(numbers):
            model = unravel(numbers)
            value = model.e_step(data)[1]
            return value if prior is None else value + model.expected_log_prob(prior)

        return jax.grad(objective)(numbers)

    differences = jnp.stack(
        [(score(numbers - h) - score(numbers + h)) / 2e-5 for h in 1e-5 * np.eye(len(numbers))]
    )
    size = float(jnp.max(jnp.abs(information.matrix)))
    np.testing.assert_allclose(information.matrix, differences, atol=1e-7 * size)
    np.testing.assert_allclose(information.score, score(numbers), atol=1e-9 * size)
    covariance = information.covariance()
    assert bool(covariance.proper) and float(covariance.distance) < 1e-6
    # of a user's logits one in two is no parameter of its own
    redundant = {"log-joint": 2}.get(name, 0)
    # the last coefficients of a gate are 0, and two states of an HSMM take turns
    known = {"experts": 3, "hsmm": 4}.get(name, 0)
    marked = ravel_pytree(covariance.undetermined)[0]
    assert int(jnp.sum(marked)) == redundant
    assert not bool(jnp.any(ravel_pytree(covariance.frozen)[0]))
    errors = ravel_pytree(covariance.standard_errors)[0]
    assert int(jnp.sum((errors == 0) & ~marked)) == known


@pytest.mark.parametrize("name", ["independent", "from_functions"])
def test_the_sandwich_is_the_infinitesimal_jackknife(name):
    """Two routes to one matrix: Hessian and scores, and derivatives of the fit itself."""
    solution, data, prior = fitted(name)
    n = len(jax.tree.leaves(data)[0])
    sample_weight = jnp.ones(n)
    influence = jaxem.inference.influence(
        lambda model: flat(estimates(model)),
        solution,
        data,
        sample_weight=sample_weight,
        prior=prior,
    )
    robust = jaxem.inference.sandwich(solution, data, sample_weight=sample_weight, prior=prior)
    np.testing.assert_allclose(robust.matrix, influence @ influence.T, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("name", ["gaussian"])
def test_influence_is_the_derivative_of_refits(name):
    solution, data, prior = fitted(name)
    n = len(jax.tree.leaves(data)[0])

    @jax.jit
    def refit(sample_weight):
        options = dict(
            sample_weight=sample_weight, prior=prior, tol=1e-13, max_steps=20_000, throw=False
        )
        return flat(named_parameters(jaxem.fit(solution.model, data, **options).model))

    influence = jaxem.inference.influence(
        lambda model: flat(named_parameters(model)), solution, data, prior=prior
    )
    for observation in (0, 7):
        step = jnp.zeros(n).at[observation].set(1e-4)
        difference = (refit(1 + step) - refit(1 - step)) / 2e-4
        size = float(jnp.max(jnp.abs(influence)))
        np.testing.assert_allclose(influence[:, observation], difference, atol=1e-6 * size)


def test_influence_predicts_what_leaving_out_does():
    """To first order: of a tenth of an observation, the prediction errs by a hundredth."""
    x = jnp.asarray(CASES["exponential"]().data)
    start = CASES["exponential"]().model
    solution = jaxem.fit(start, x, tol=1e-12)
    influence = jaxem.inference.influence(lambda m: m.components.rate, solution, x)[..., 0]

    def moved(share):
        sample_weight = jnp.ones(len(x)).at[0].set(1 - share)
        refit = jaxem.fit(solution.model, x, sample_weight=sample_weight, tol=1e-12).model
        return refit.components.rate - solution.model.components.rate

    errors = [float(jnp.max(jnp.abs(moved(s) + s * influence))) for s in (1.0, 0.1)]
    assert errors[0] < 0.5 * float(jnp.max(jnp.abs(influence)))
    assert errors[1] < errors[0] / 50


def test_an_impossible_unit_of_weight_0_has_no_influence():
    solution, data, prior = fitted("gaussian")
    spoilt = jnp.concatenate([jnp.full((1, 2), jnp.nan), data])
    sample_weight = jnp.ones(len(spoilt)).at[0].set(0)
    influence = jaxem.inference.influence(
        lambda m: m.components.mean, solution, spoilt, sample_weight=sample_weight, prior=prior
    )
    plain = jaxem.inference.influence(lambda m: m.components.mean, solution, data, prior=prior)
    assert jnp.all(influence[..., 0] == 0)
    np.testing.assert_allclose(influence[..., 1:], plain, rtol=1e-6, atol=1e-9)


def test_weights_count_units():
    solution, data, prior = fitted("categorical")
    sample_weight = jnp.ones(len(data)).at[:5].set(2.0)
    twice = jnp.concatenate([data, data[:5]])
    for robust in (False, True):
        weighted = jaxem.inference.standard_errors(
            solution, data, sample_weight=sample_weight, prior=prior, robust=robust
        )
        repeated = jaxem.inference.standard_errors(solution, twice, prior=prior, robust=robust)
        np.testing.assert_allclose(flat(weighted), flat(repeated), rtol=1e-10)


def test_louis_identity():
    """Observed information = complete information − variance of the complete score."""
    x = jnp.asarray(CASES["poisson"]().data[:, :1])
    start = Mixture([0.4, 0.6], jaxem.emissions.Poisson([[1.0], [5.0]]))
    model = jaxem.fit(start, x, tol=1e-13, max_steps=20_000).model
    covariance = jaxem.inference.observed_information(model, x).covariance().matrix
    share, rate, r = model.weights[0], model.components.rate[:, 0], model.responsibilities(x)

    def complete(numbers, observation, z):
        share, rate = numbers[0], numbers[1:]
        log_weight = jnp.log(jnp.stack([share, 1 - share]))
        return log_weight[z] + observation * jnp.log(rate[z]) - rate[z]

    numbers = jnp.concatenate([share[None], rate])
    observations, latent = x[:, 0].astype(float), jnp.arange(2)
    each = jax.vmap(jax.vmap(jax.grad(complete), (None, None, 0)), (None, 0, None))
    hess = jax.vmap(jax.vmap(jax.hessian(complete), (None, None, 0)), (None, 0, None))
    scores, curved = each(numbers, observations, latent), hess(numbers, observations, latent)
    mean = jnp.einsum("nk,nkp->np", r, scores)
    missing = jnp.einsum("nk,nkp,nkq->pq", r, scores, scores) - mean.T @ mean
    louis = -jnp.einsum("nk,nkpq->pq", r, curved) - missing
    order = jnp.array([2, 0, 1])  # by name: the rates, then the weights
    np.testing.assert_allclose(jnp.linalg.inv(louis), covariance[order][:, order], rtol=1e-8)


@pytest.mark.slow
def test_standard_errors_agree_with_a_parametric_bootstrap():
    n, lanes = 2_500, 600
    truth = Mixture(
        [0.4, 0.6], jaxem.emissions.Gaussian([[0.0], [3.0]], jnp.array([[[1.0]], [[0.5]]]))
    )
    x, _ = truth.sample(jax.random.key(0), n)
    model = jaxem.fit(truth, x, tol=1e-10).model

    @jax.jit
    def again(key):
        sample, _ = model.sample(key, n)
        refit = jaxem.fit(model, sample, tol=1e-7, throw=False).model
        return flat(named_parameters(refit))  # labels stay: every start is the truth

    refits = jax.lax.map(again, jax.random.split(jax.random.key(1), lanes), batch_size=100)
    ours = flat(jaxem.inference.standard_errors(model, x))
    gaps = jnp.abs(ours / jnp.std(refits, axis=0) - 1)
    assert float(jnp.median(gaps)) <= 0.05, gaps
    assert float(jnp.max(gaps)) <= 0.15, gaps


def test_what_is_not_determined_is_held_and_said():
    """An empty component, a probability of 0: the others keep their errors."""
    bits = jnp.asarray(CASES["bernoulli"]().data).at[:, 2].set(0)
    start = Mixture([1.0, 0.0], jaxem.emissions.Bernoulli([[0.4, 0.5, 0.3], [0.2, 0.6, 0.5]]))
    solution = jaxem.fit(start, bits, tol=1e-13, throw=False)
    covariance = jaxem.inference.observed_information(solution, bits).covariance()
    undetermined = covariance.undetermined["components"]["probability"]
    assert undetermined.tolist() == [[False, False, True], [True, True, True]]
    assert not bool(jnp.any(covariance.frozen["components"]["probability"]))
    assert bool(jnp.all(jnp.isfinite(covariance.matrix))) and bool(covariance.proper)
    errors = covariance.standard_errors["components"]["probability"]
    share = jnp.mean(bits[:, :2], axis=0)
    np.testing.assert_allclose(errors[0, :2], jnp.sqrt(share * (1 - share) / len(bits)), rtol=1e-6)
    assert "undetermined" in repr(covariance) and "frozen" not in repr(covariance)


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.float32])
def test_a_probability_that_vanishes_spoils_no_other_standard_error(dtype):
    """The first state of a single sequence is one state: its log-odds have no end."""
    emission = jaxem.emissions.Poisson(jnp.asarray([[2.0], [8.0]], dtype))
    model = jaxem.HMM(
        jnp.full(2, 0.5, dtype), jnp.asarray([[0.9, 0.1], [0.2, 0.8]], dtype), emission
    )
    x = model.sample(jax.random.key(0), 1, 200)[0]
    solution = jaxem.fit(model, x)
    covariance = jaxem.inference.observed_information(solution, x).covariance()
    assert bool(covariance.proper) and float(covariance.distance) < 0.1
    assert bool(covariance.undetermined["initial"].all())
    found = covariance.standard_errors
    fixed = jaxem.freeze(solution.model, "initial")
    known = jaxem.inference.observed_information(fixed, x).covariance()
    assert bool(known.frozen["initial"].all())
    for name in ("transition", "emission"):
        np.testing.assert_allclose(flat(found[name]), flat(known.standard_errors[name]), rtol=1e-3)
        assert not bool(flat(covariance.undetermined[name]).any())


def test_the_weight_of_a_single_component_is_known():
    x = jax.random.poisson(jax.random.key(0), 3.0, (100, 1))
    model = Mixture([1.0], jaxem.emissions.Poisson([[2.0]]))
    covariance = jaxem.inference.observed_information(jaxem.fit(model, x), x).covariance()
    assert float(covariance.standard_errors["weights"][0]) == 0
    assert not bool(flat(covariance.undetermined).any())


def test_what_is_frozen_is_known():
    """With the variance known, the mean of one Gaussian has the error σ/√n."""
    x = CASES["gaussian"]().data
    start = Mixture([1.0], jaxem.emissions.DiagonalGaussian([[0.0, 0.0]], [[2.0, 3.0]]))
    start = jaxem.freeze(start, "components.variance")
    covariance = jaxem.inference.observed_information(jaxem.fit(start, x), x).covariance()
    errors = covariance.standard_errors["components"]
    np.testing.assert_allclose(errors["mean"][0], jnp.sqrt(jnp.array([2.0, 3.0]) / len(x)))
    assert bool(jnp.all(covariance.frozen["components"]["variance"]))
    assert not bool(jnp.any(covariance.undetermined["components"]["variance"]))
    assert "   frozen" in repr(covariance)
    np.testing.assert_array_equal(errors["variance"], 0)


def test_no_maximum_has_no_standard_errors():
    """Two components that are alike: EM stays there, on a saddle."""
    x = CASES["poisson"]().data
    alike = jnp.broadcast_to(jnp.mean(x, axis=0), (2, 2))
    solution = jaxem.fit(Mixture([0.5, 0.5], jaxem.emissions.Poisson(alike)), x)
    assert solution.status == "converged"
    covariance = jaxem.inference.observed_information(solution, x).covariance()
    assert not bool(covariance.proper) and "indefinite" in repr(covariance)
    assert bool(jnp.all(jnp.isnan(covariance.matrix)))
    rate = jaxem.inference.convergence_rate(solution, x)
    assert bool(rate.saddle) and "saddle" in repr(rate)
    left = jaxem.fit(rate.away(), x)
    assert float(left.log_likelihood) > float(solution.log_likelihood) + 1
    assert not bool(jaxem.inference.convergence_rate(left, x).saddle)


def test_a_fit_that_is_not_done_says_how_far_it_is():
    case = CASES["gaussian"]()
    early = jaxem.fit(case.model, case.data, max_steps=3)
    covariance = jaxem.inference.observed_information(early, case.data).covariance()
    assert float(covariance.distance) > 0.01
    late = jaxem.fit(early.model, case.data, tol=1e-12)
    gap = flat(estimates(late.model)) - covariance_flat(covariance)
    errors = flat(covariance.standard_errors)
    assert float(covariance.distance) > 0.3 * float(jnp.max(jnp.abs(gap / errors)))


def covariance_flat(covariance):
    return flat(covariance.estimates)


def test_intervals():
    solution, data, prior = fitted("categorical")
    lower, upper = jaxem.inference.confidence_interval(solution, data, level=0.9, prior=prior)
    errors = jaxem.inference.standard_errors(solution, data, prior=prior)
    reach = jax.tree.map(lambda a, b: (b - a) / 2, lower, upper)
    np.testing.assert_allclose(flat(reach), 1.6448536269514722 * flat(errors), rtol=1e-10)
    for level in (0.0, 1.0, 95):
        with pytest.raises(ValueError, match="between 0 and 1"):
            jaxem.inference.confidence_interval(solution, data, level=level)


def test_all_of_it_under_jit_and_vmap():
    solution, data, prior = fitted("categorical")

    def both(sample_weight):
        fit = jaxem.fit(solution.model, data, sample_weight=sample_weight, prior=prior, throw=False)
        rate = jaxem.inference.convergence_rate(fit, data, sample_weight=sample_weight, prior=prior)
        errors = jaxem.inference.standard_errors(
            fit, data, sample_weight=sample_weight, prior=prior
        )
        return rate.eigenvalues, flat(errors)

    lanes = jnp.stack([jnp.ones(len(data)), jnp.ones(len(data)).at[:9].set(0.5)])
    together = jax.jit(jax.vmap(both))(lanes)
    for i in range(2):
        for a, b in zip(both(lanes[i]), together, strict=True):
            np.testing.assert_allclose(a, b[i], rtol=1e-6)


# Rates


RATED = ["gaussian", "independent", "from_functions"]


@pytest.mark.parametrize("name", RATED)
def test_rates_are_the_eigenvalues_of_the_map(name):
    solution, data, prior = fitted(name)
    size = flat(solution.statistics.sums).size
    many = min(size, 4)
    rate = jaxem.inference.convergence_rate(
        solution, data, prior=prior, num_eigenvalues=many, krylov_steps=size
    )
    frame = solution.model
    numbers, unravel = ravel_pytree(solution.statistics.sums)
    state = jaxem.EM().init(frame, jaxem.em.Problem(data, prior=prior))

    def em_map(numbers):
        statistics = jaxem.authoring.Framed(unravel(numbers), frame)
        there = eqx.tree_at(lambda s: s.statistics, state, statistics)
        new = jaxem.EM().step(there, jaxem.em.Problem(data, prior=prior))
        return flat(new.statistics.at(frame).sums)

    dense = np.sort(np.linalg.eigvals(jax.jit(jax.jacfwd(em_map))(numbers)).real)[::-1]
    np.testing.assert_allclose(rate.eigenvalues, dense[:many], atol=1e-8)
    assert 0 < float(rate.eigenvalues[0]) < 1 and float(rate.change) < 1e-8
    # The slowest direction is where EM comes from, in the end.
    early = jaxem.fit(rate.away(1e-3), data, prior=prior, tol=0.0, max_steps=12).model
    gap = flat(estimates(early)) - flat(estimates(frame))
    if dense[1] < 0.7 * dense[0]:
        along = flat(rate.direction)
        cosine = jnp.dot(gap, along) / jnp.linalg.norm(gap) / jnp.linalg.norm(along)
        assert abs(float(cosine)) > 0.95


# Bad use


def test_reverse_mode_of_a_forward_adjoint():
    case = CASES["poisson"]()

    def value(sample_weight):
        adjoint = jaxem.em.Forward()
        return jaxem.fit(
            case.model, case.data, sample_weight=sample_weight, adjoint=adjoint
        ).objective

    sample_weight = jnp.ones(len(case.data))
    assert jnp.isfinite(jax.jvp(value, (sample_weight,), (sample_weight,))[1])
    with pytest.raises(Exception, match=r"forward mode only .* adjoint=jaxem.em.Implicit\(\)"):
        jax.grad(value)(sample_weight)


def test_integer_data_have_no_gradient():
    case = CASES["poisson"]()
    with pytest.raises(TypeError, match="real- or complex-valued inputs"):
        jax.grad(lambda x: jaxem.fit(case.model, x).objective)(case.data)


def test_a_linear_solve_that_fails_says_how_far_it_got():
    case = CASES["poisson"]()

    def value(sample_weight, adjoint):
        fit = jaxem.fit(
            case.model, case.data, sample_weight=sample_weight, adjoint=adjoint, tol=1e-10
        )
        return jnp.sum(fit.model.components.rate)

    sample_weight = jnp.ones(len(case.data))
    short = jaxem.em.Neumann(max_steps=3)
    for transform in (jax.grad, jax.jacfwd):
        with pytest.raises(Exception, match="relative residual of about 1e-[0-5]"):
            jax.jit(transform(value), static_argnums=1)(sample_weight, jaxem.em.Implicit(short))
    inexact = jax.grad(value)(sample_weight, jaxem.em.Implicit(short, throw=False))
    assert jnp.all(jnp.isfinite(inexact))


def test_every_linear_solver_gives_the_same():
    import lineax as lx

    solution, data, prior = fitted("gaussian")

    def influence(solver):
        return jaxem.inference.influence(
            lambda m: m.components.mean,
            solution,
            data,
            prior=prior,
            adjoint=jaxem.em.Implicit(solver),
        )

    expected = influence(jaxem.em.GCR())
    for solver in (jaxem.em.Neumann(), lx.LU(), lx.GMRES(rtol=1e-10, atol=1e-10)):
        np.testing.assert_allclose(influence(solver), expected, rtol=1e-7, atol=1e-10)


def test_bad_arguments():
    solution, data, _ = fitted("categorical")
    with pytest.raises(ValueError, match="a Solution, a model or an emission, got list"):
        jaxem.inference.standard_errors([solution], data)
    with pytest.raises(ValueError, match=r"\(n, 2\)"):
        jaxem.inference.sandwich(solution, data[:, :1])
    with pytest.raises(ValueError, match="between 1 and krylov_steps"):
        jaxem.inference.convergence_rate(solution, data, num_eigenvalues=31)
    with pytest.raises(ValueError, match="deterministic"):
        jaxem.inference.convergence_rate(solution, data, jaxem.EM(jaxem.em.Drawn()))
