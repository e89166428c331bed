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
from jaxem import EM
from jaxem.em import Annealed, Gradient, Hard, Incremental, Online, Overrelaxed, Sampled, Tempered

PLATFORMS = ["cpu", "cuda", "tpu"]
ALGORITHMS = {
    "EM": EM(),
    "hard": EM(Hard()),
    "SQUAREM": jaxem.SQUAREM(),
    "gradient": EM(maximization=Gradient(optax.sgd(0.01))),
}
OTHERS = {
    "Anderson": jaxem.Anderson(),
    "over-relaxed": Overrelaxed(),
    "annealed": EM(Annealed()),
    "sampled": EM(Sampled()),
    "tempered": EM(Tempered(2.0)),
    "incremental": EM(accumulation=Incremental(2)),
    "online": EM(accumulation=Online(batch_size=4)),
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


def fits_by(algorithms):
    """Fits by each of them, one after the other in one program."""

    def fits(model, data):
        options = dict(key=jax.random.key(0), max_steps=3, throw=False)
        return [jaxem.fit(model, data, algorithm, **options) for algorithm in algorithms]

    return fits


@pytest.mark.parametrize("name", CASES)
def test_fits_lower_for_every_platform(name):
    case = CASES[name]()
    algorithms = [ALGORITHMS[key] for key in ALGORITHMS if (name, key) not in NOT_APPLICABLE]
    exported = lowered(fits_by(algorithms), case.model, case.data)
    assert exported.platforms == tuple(PLATFORMS)
    assert len(exported.out_avals) > 10 * len(algorithms)


@pytest.mark.parametrize("name", ["poisson", "hmm-categorical"])
def test_fits_by_every_other_algorithm_lower_for_every_platform(name):
    case = CASES[name]()
    assert lowered(fits_by(OTHERS.values()), case.model, case.data).out_avals


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
