"""What a first user gets wrong, in public functions: a `ValueError` that says what to write."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxem
from jaxem import em, emissions

KEY = jax.random.key(0)
X = np.random.default_rng(0).normal(size=(30, 2)) + np.repeat([[0.0], [4.0]], 15, axis=0)
MODEL = jaxem.Mixture([0.5, 0.5], emissions.Gaussian([[0.0, 0.0], [4.0, 4.0]], [np.eye(2)] * 2))
HMM = jaxem.HMM([0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]], emissions.Poisson([[1.0], [5.0]]))
COUNTS = np.random.default_rng(0).poisson(3, (3, 6, 1))

WRONG = {
    "a key of fit": (lambda: jaxem.fit(MODEL, X, jaxem.EM(em.Sampled()), key=0), "one random key"),
    "a key of init": (lambda: jaxem.Mixture.init(0, X, 2, emissions.Gaussian), "one random key"),
    "a key of kmeans": (lambda: jaxem.kmeans(0, X, 2), "one random key"),
    "a key of sample": (lambda: MODEL.sample(0, 10), "one random key"),
    "keys instead of one": (
        lambda: MODEL.sample(jax.random.split(KEY), 3),
        r"array of shape \(2,\)",
    ),
    "progress by a name": (lambda: jaxem.fit(MODEL, X, progress="tqdm"), "number of steps or"),
    "progress by a function": (lambda: jaxem.fit(MODEL, X, progress=print), "number of steps or"),
    "Progress of text": (lambda: em.Progress("5"), "integer ≥ 1"),
    "text": (lambda: jaxem.fit(MODEL, X.astype(str)), "data are text"),
    "categories as text": (
        lambda: jaxem.Mixture.init(KEY, np.array([["a"], ["b"]]), 2, emissions.Categorical),
        "return_inverse",
    ),
    "freeze a list": (lambda: jaxem.freeze(MODEL, ["weights"]), "one by one"),
    "freeze the other way": (lambda: jaxem.freeze("weights", MODEL), "a model, then names"),
    "freeze a class": (lambda: jaxem.freeze(jaxem.Mixture, "weights"), "a model, then names"),
    "a prior that is an emission": (
        lambda: MODEL.prior(components=MODEL.components),
        r"components.prior\(",
    ),
    "data before the model": (lambda: jaxem.EM().init(X, MODEL), "a model, then the data"),
    "classes as parts": (
        lambda: emissions.Independent([emissions.Gaussian, emissions.Poisson]),
        "list of emissions",
    ),
    "parts one by one": (
        lambda: emissions.Independent(MODEL.components, MODEL.components),
        "one list",
    ),
    "one module": (lambda: emissions.GradientEmission(MODEL), "list of modules"),
    "a negative horizon": (lambda: HMM.forecast(COUNTS, num_steps=-1), "num_steps .* ≥ 1"),
    "labels alone": (
        lambda: jaxem.Mixture.init(KEY, np.zeros((30, 1), int), 2, emissions.Labels),
        "no parameters that a start could find",
    ),
    "an option of another family": (
        lambda: jaxem.Mixture.init(KEY, X, 2, functools.partial(emissions.Gaussian, tied=True)),
        "no option 'tied'",
    ),
    "an option of no family": (
        lambda: jaxem.HMM.init(KEY, COUNTS, 2, functools.partial(emissions.Poisson, shape=2)),
        "Poisson has no option 'shape'",
    ),
    "a population by name": (lambda: em.Online(population="n"), "population must be one number"),
    "too many steps": (lambda: jaxem.fit(MODEL, X, max_steps=10**10), "max_steps must be at most"),
    "no functions": (lambda: jaxem.from_functions(None, None, jnp.ones(2)), "must be a function"),
    "no parameters": (
        lambda: jaxem.from_functions(lambda p, x: (x, x), lambda s: s, None),
        "one array or more",
    ),
    "parameters of one axis": (lambda: emissions.Poisson([2.0, 6.0]), r"\[\[2.0\], \[6.0\]\]"),
    "parameters of text": (lambda: emissions.Gaussian("mean", [np.eye(2)]), "mean must be real"),
    "no parameters at all": (lambda: jaxem.Mixture(None, MODEL.components), "weights must be real"),
    "rows of different lengths": (
        lambda: emissions.Gaussian([[0.0, 0.0], [1.0]], [np.eye(2)] * 2),
        "all rows of one length",
    ),
    "complex parameters": (lambda: emissions.Poisson([[2.0j]]), "rate must be real numbers"),
    "a number as text": (
        lambda: emissions.StudentT([[0.0, 0.0]], [np.eye(2)], "5"),
        "degrees_of_freedom must be real|must be real numbers",
    ),
    "transitions by a name": (
        lambda: jaxem.HMM([0.5, 0.5], "left to right", HMM.emission),
        "transition matrix must be real",
    ),
    "a prior of text": (lambda: MODEL.components.prior("1"), "count must be real numbers"),
    "half a draw": (lambda: MODEL.sample(KEY, 10.5), "n must be an integer ≥ 0"),
    "less than no draw": (lambda: MODEL.sample(KEY, -1), "n must be an integer ≥ 0"),
    "a traced number of draws": (
        lambda: jax.jit(lambda n: MODEL.sample(KEY, n))(3),
        "n must be an integer ≥ 0",
    ),
    "half a step": (lambda: HMM.sample(KEY, 3, 5.5), "num_steps must be an integer ≥ 1"),
    "lengths of text": (lambda: jaxem.Sequences(COUNTS, lengths="abc"), "one integer for each"),
    "traced cuts": (
        lambda: jax.jit(lambda n: jaxem.Sequences.split(COUNTS[0], n).values)(jnp.array([1, 5])),
        "cannot be traced",
    ),
    "weights in a list": (
        lambda: jaxem.fit(MODEL, X, sample_weight=[1.0] * 30),
        r"got list; write np.asarray\(sample_weight\)",
    ),
    "a temperature of text": (lambda: em.Tempered("2"), "temperature must be one number"),
    "a schedule of text": (lambda: em.Geometric("5", 0.9), "start must be one number"),
    "a rate of text": (lambda: em.Power("a"), "exponent must be one number"),
    "a growth of text": (lambda: em.Overrelaxed(growth="2"), "growth must be one number"),
    "truncated by text": (lambda: em.Truncated("5"), "num_steps, of Truncated, must be an integer"),
    "a solver by its name": (lambda: em.Implicit("cg"), "linear_solver must be one such as GCR"),
    "a tolerance of text": (lambda: em.GCR("1e-3"), "rtol, of GCR, must be one number"),
    "no short steps": (
        lambda: jaxem.fit_best(
            jaxem.Mixture.init, KEY, X, 2, emissions.Gaussian, num_starts=2, short_steps=0
        ),
        "short_steps must be an integer ≥ 1",
    ),
    "influence of a name": (
        lambda: jaxem.inference.influence("mean", MODEL, X),
        "a function of the fitted model first",
    ),
    "a log-joint without parameters": (
        lambda: jaxem.from_log_joint(lambda p, x: x, None),
        "one array or more",
    ),
    "an order of floats": (lambda: jaxem.models.reorder(MODEL, [0.0, 1.0]), "must hold integers"),
    "a model in half precision": (
        lambda: jaxem.fit(jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), MODEL), X),
        "astype.jnp.float32",
    ),
    "a traced status": (
        lambda: jax.jit(lambda x: jaxem.fit(MODEL, x, max_steps=1, throw=False).status)(X),
        "inside jit or vmap ask",
    ),
    "one observation": (lambda: MODEL.log_prob(X[0]), r"x\[None\] for one observation"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_argument_is_named(name):
    call, message = WRONG[name]
    with pytest.raises(ValueError, match=message):
        call()


def test_integers_of_numpy_are_integers():
    for k in np.arange(1, 3):
        jaxem.Mixture.init(KEY, X, k, emissions.DiagonalGaussian)
    assert jaxem.fit(MODEL, X, max_steps=np.int64(2), tol=0.0).num_steps == 2


def test_a_result_prints_its_name():
    result = jaxem.fit(MODEL, X).result
    assert "<converged: " in str(result)
    with pytest.raises(ValueError):  # never False, whatever the result
        _ = result == "converged"
