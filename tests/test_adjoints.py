"""Derivatives through a fit against central finite differences of fits, by adjoint and by input."""

import functools

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import CASES, cases

import jaxem

CONVERGED = dict(tol=1e-13, max_steps=20_000, throw=False)


def objective_of(solution, data):
    """Something smooth that sees every part of a fitted model."""
    model = solution.model
    parameters = jax.tree.leaves(jaxem._core.parameters.named_parameters(model))
    spread = sum(jnp.sum(jnp.cos(leaf)) for leaf in parameters)
    return jnp.sum(jnp.sin(model.log_prob(data))) + spread + 0.1 * solution.objective


def perturbed_fit(case, adjoint, t, **options):
    """A fit whose data, weights and prior all move with the scalars t."""
    rng = np.random.default_rng(1)
    n = len(jax.tree.leaves(case.data)[0])

    def shift(leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return leaf
        return leaf * (1 + t[0] * rng.normal(size=leaf.shape))

    data = jax.tree.map(shift, case.data)
    sample_weight = 1 + t[1] * rng.normal(size=n)
    prior = (1 + t[2]) * case.model.prior(weights=1.0, components=case.prior)
    solution = jaxem.fit(
        case.model,
        data,
        sample_weight=sample_weight,
        prior=prior,
        adjoint=adjoint,
        **(CONVERGED | options),
    )
    return objective_of(solution, case.data)


def central(function, t, step=1e-5):
    units = np.eye(len(t))
    return np.array([(function(t + step * e) - function(t - step * e)) / (2 * step) for e in units])


def gradient_and_difference(function, t=None, step=1e-5):
    """Both at t, from one program that runs all the points side by side."""
    t = jnp.zeros(3) if t is None else t
    moves = step * jnp.concatenate([jnp.eye(len(t)), -jnp.eye(len(t))])
    points = jnp.concatenate([t[None], t + moves])
    values, gradients = jax.jit(jax.vmap(jax.value_and_grad(function)))(points)
    ahead, behind = jnp.split(values[1:], 2)
    return gradients[0], (ahead - behind) / (2 * step)


def agree(a, b, tol):
    np.testing.assert_allclose(a, b, rtol=0, atol=tol * np.max(np.abs(b)))


ZERO = jnp.zeros(3)


@functools.cache
def implicit(name):
    """Data, weights and prior move; compiled, and side by side with other lanes."""
    case = CASES[name]()
    return gradient_and_difference(lambda t: perturbed_fit(case, jaxem.em.Implicit(), t))


@pytest.mark.parametrize("name", cases("mixture", "mechanism"))
def test_implicit_gradient(name):
    agree(*implicit(name), 1e-6)


@pytest.mark.parametrize("name", ["independent", "poisson-regression"])
def test_gradients_through_the_steps(name):
    """Three steps, unconverged: backwards, in lanes, and forwards."""
    case = CASES[name]()

    def value(t, adjoint):
        return perturbed_fit(case, adjoint, t, tol=0.0, max_steps=3)

    unrolled = functools.partial(value, adjoint=jaxem.em.Unrolled())
    backwards, differences = gradient_and_difference(unrolled)
    agree(backwards, differences, 1e-6)
    if name == "independent":  # steps that are guarded have the same two modes
        forwards = jax.jit(jax.jacfwd(functools.partial(value, adjoint=jaxem.em.Forward())))(ZERO)
        agree(forwards, differences, 1e-6)


def test_every_adjoint_and_both_modes_agree():
    case = CASES["gaussian"]()
    expected, _ = implicit("gaussian")
    assert np.all(expected != 0)
    for adjoint, transform in [
        (jaxem.em.Implicit(), jax.jacfwd),
        (jaxem.em.Forward(), jax.jacfwd),
        (jaxem.em.Unrolled(), jax.grad),
    ]:
        fast = {} if adjoint == jaxem.em.Implicit() else {"max_steps": 2000}
        other = jax.jit(transform(lambda t: perturbed_fit(case, adjoint, t, **fast)))  # noqa: B023
        agree(other(ZERO), expected, 1e-6)


def test_gradient_with_respect_to_what_is_held():
    case = CASES["gaussian"]()
    model = jaxem.freeze(case.model, "components.mean", mask=[True, False])
    model = jaxem.freeze(model, "weights")

    def value(t, adjoint=jaxem.em.Implicit()):
        moved = eqx.tree_at(
            lambda m: (m.components.mean, m._weights.logits),
            model,
            (model.components.mean.at[0].add(t[:2]), model._weights.logits.at[1].add(t[2])),
        )
        solution = jaxem.fit(moved, case.data, adjoint=adjoint, **CONVERGED)
        return objective_of(solution, case.data)

    gradient = jax.jit(jax.grad(value))(ZERO)
    agree(gradient, central(jax.jit(value), ZERO), 1e-6)


def test_start_has_no_derivative_under_implicit_and_one_under_unrolled():
    case = CASES["exponential"]()

    def value(t, adjoint):
        start = eqx.tree_at(
            lambda m: m.components.log_rate, case.model, case.model.components.log_rate + t
        )
        solution = jaxem.fit(start, case.data, adjoint=adjoint, tol=0.0, max_steps=3)
        return objective_of(solution, case.data)

    def gradient(adjoint):
        return jax.jit(jax.grad(lambda t: value(t[0], adjoint)))(jnp.zeros(1))

    difference = central(jax.jit(lambda t: value(t[0], jaxem.em.Unrolled())), jnp.zeros(1))
    assert abs(difference[0]) > 1e-3
    agree(gradient(jaxem.em.Unrolled()), difference, 1e-6)
    assert gradient(jaxem.em.Implicit())[0] == 0


def test_truncation_error_shrinks_at_the_rate_of_convergence():
    case = CASES["poisson"]()
    exact = jax.jit(jax.grad(lambda t: perturbed_fit(case, jaxem.em.Implicit(), t)))(ZERO)[1:]
    errors = []
    for k in (2, 4, 8, 16):
        grad = jax.grad(lambda t: perturbed_fit(case, jaxem.em.Truncated(k), t))  # noqa: B023
        errors.append(float(jnp.max(jnp.abs(jax.jit(grad)(ZERO)[1:] - exact))))
    rates = [(b / a) ** (1 / k) for a, b, k in zip(errors, errors[1:], (2, 4, 8), strict=False)]
    solution = jaxem.fit(
        case.model, case.data, prior=case.model.prior(weights=1.0, components=case.prior), tol=1e-6
    )
    history = solution.history[: solution.num_steps + 1]
    slowest = float(np.sqrt((history[-1] - history[-2]) / (history[-2] - history[-3])))
    assert all(abs(rate - slowest) < 0.15 for rate in rates[1:]), (rates, slowest)


def test_second_derivatives():
    case = CASES["diagonal-tied"]()
    slope = jax.grad(lambda t: perturbed_fit(case, jaxem.em.Implicit(), t))
    hessian = jax.jit(jax.hessian(lambda t: perturbed_fit(case, jaxem.em.Implicit(), t)))(ZERO)
    agree(hessian, central(jax.jit(slope), ZERO, 1e-4), 1e-5)


def test_no_nan_at_absent_units_nor_at_an_empty_component():
    case = CASES["gaussian"]()
    spoilt = case.data.at[0].set(jnp.nan)
    sample_weight = jnp.ones(len(spoilt)).at[0].set(0)
    far = eqx.tree_at(
        lambda m: m.components.mean, case.model, case.model.components.mean.at[1].set(1e3)
    )

    def value(sample_weight, model, data):
        solution = jaxem.fit(model, data, sample_weight=sample_weight, max_steps=500, throw=False)
        return jnp.sum(solution.model.log_prob(case.data))

    gradient = jax.jit(jax.grad(value, argnums=(0, 2)))
    for model, data in [(case.model, spoilt), (far, case.data)]:
        by_weight, by_data = gradient(sample_weight, model, data)
        assert jnp.all(jnp.isfinite(by_weight)) and jnp.all(jnp.isfinite(by_data))
    assert jnp.all(by_data[0] == 0)


def test_a_stochastic_algorithm_has_no_implicit_derivative():
    case = CASES["poisson"]()

    def value(w):
        options = dict(key=jax.random.key(0), sample_weight=w, max_steps=3)
        return jaxem.fit(case.model, case.data, jaxem.EM(jaxem.em.Sampled()), **options).objective

    assert jnp.isfinite(value(jnp.ones(48)))
    with pytest.raises(ValueError, match="deterministic algorithm"):
        jax.grad(value)(jnp.ones(48))


def test_what_is_not_finite_is_no_derivative_of_zero():
    """A cotangent that is NaN gives NaN; 0 of a fit that has none gives 0."""
    model, data, *_ = CASES["poisson"]()
    weight = jnp.ones(len(data))

    def fitted(weight):
        return jaxem.fit(model, data, sample_weight=weight, max_steps=20).model.weights[0]

    pull = jax.jit(lambda g: jax.vjp(fitted, weight)[1](g)[0])
    assert np.all(np.isnan(pull(jnp.nan)))
    assert np.all(np.asarray(pull(0.0)) == 0) and np.all(np.isfinite(pull(1.0)))
