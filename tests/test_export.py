"""Every program lowers for CPU, CUDA and TPU, whatever is on this machine: nothing is run.

A law that `check_model` cannot test where it runs: platforms differ in the branches of
`lax.platform_dependent`, and in what they have no lowering for.
"""

import equinox as eqx
import jax
import jax.export
import jax.numpy as jnp
import optax
import pytest
from models import CASES

import jaxem
from jaxem.em import Gradient, Hard

PLATFORMS = ["cpu", "cuda", "tpu"]
ALGORITHMS = {
    "hard": jaxem.EM(Hard()),
    "SQUAREM": jaxem.SQUAREM(),
    "gradient": jaxem.EM(maximization=Gradient(optax.sgd(0.01))),
}
# functions that are given make the posterior, and know no Q; continuous states have no mode
NOT_APPLICABLE = {
    ("from_functions", "hard"),
    ("from_functions", "gradient"),
    ("state-space", "hard"),
}


def lowered(function, *arguments):
    """A function of PyTrees, exported as one of flat arrays."""
    arrays, rest = eqx.partition(arguments, eqx.is_array)
    leaves, structure = jax.tree.flatten(arrays)

    def flat(*leaves):
        out = function(*eqx.combine(jax.tree.unflatten(structure, leaves), rest))
        return jax.tree.leaves(eqx.filter(out, eqx.is_array))

    shapes = [jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for leaf in leaves]
    return jax.export.export(jax.jit(flat), platforms=PLATFORMS)(*shapes)


@pytest.mark.parametrize("name", CASES)
def test_fits_lower_for_every_platform(name):
    """A fit by EM, and a step of every other algorithm, around which a fit is the same."""
    case = CASES[name]()
    others = [ALGORITHMS[key] for key in ALGORITHMS if (name, key) not in NOT_APPLICABLE]

    def programs(model, data):
        problem = jaxem.em.Problem(data)
        steps = [other.step(other.init(model, problem), problem) for other in others]
        return jaxem.fit(model, data, max_steps=3, throw=False), steps

    exported = lowered(programs, case.model, case.data)
    assert exported.platforms == tuple(PLATFORMS)
    assert len(exported.out_avals) > 10


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_fits_by_every_algorithm_lower_for_every_platform(algorithm):
    def fit(model, data):
        return jaxem.fit(model, data, ALGORITHMS[algorithm], max_steps=3, throw=False)

    case = CASES["poisson"]()
    assert lowered(fit, case.model, case.data).out_avals


@pytest.mark.parametrize("name", ["gaussian", "student-t", "hmm-gaussian", "hsmm", "experts"])
def test_derivatives_lower_for_every_platform(monkeypatch, name):
    case = CASES[name]()

    def objective(arrays, rest):
        model, data = eqx.combine(arrays, rest)
        return jaxem.fit(model, data, max_steps=3, throw=False).objective

    def gradient(model, data):
        return jax.grad(objective)(*eqx.partition((model, data), eqx.is_inexact_array))

    # An implicit derivative that fails raises through a callback, which JAX lowers only for the
    # platform at hand.
    monkeypatch.setattr(eqx.internal, "branched_error_if", lambda x, *_: x)
    assert lowered(gradient, case.model, case.data).out_avals


def test_what_a_platform_cannot_do_is_found():
    with pytest.raises(NotImplementedError, match="schur.*tpu"):
        lowered(lambda x: jax.lax.linalg.schur(x)[0], jnp.eye(2))

    def apart(x):
        return jax.lax.platform_dependent(
            x, cpu=jnp.sin, default=lambda x: jax.lax.linalg.schur(x)[0]
        )

    with pytest.raises(NotImplementedError, match="schur"):
        lowered(apart, jnp.eye(2))
