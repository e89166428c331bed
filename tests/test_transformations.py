"""jit, vmap, derivatives, sharding, blocks, and how often XLA compiles."""

import functools
import re

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compilations import compilations
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from models import CASES, CODES, COUNTS, POINTS, N, cases

import jaxem
from jaxem import RESULTS

X = jnp.asarray(COUNTS)
P = jnp.asarray(POINTS)


def poissons():
    return CASES["poisson"]().model


def gaussians():
    return CASES["gaussian"]().model


def close(a, b, tol=1e-11):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tol, atol=tol)


def lane(tree, index):
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[index]), tree)


def lanes(count):
    """Starts from close to the optimum to far away, so that lanes stop at different steps."""
    rates = jnp.stack([jnp.array([[1.0 + i, 3.0], [5.0 + i, 4.0]]) for i in range(count)])
    return jax.vmap(
        lambda rate: jaxem.Mixture(jnp.array([0.4, 0.6]), jaxem.emissions.Poisson(rate))
    )(rates)


# jit and vmap


@pytest.mark.parametrize("name", ["poisson", "gaussian", "from_functions"])
def test_fit_under_jit_is_fit(name):
    case = CASES[name]()
    inside = eqx.filter_jit(lambda m, x: jaxem.fit(m, x, tol=1e-6, max_steps=50))(
        case.model, case.data
    )
    outside = jaxem.fit(case.model, case.data, tol=1e-6, max_steps=50)
    close(inside, outside)
    assert inside.result == RESULTS.converged


def test_vmap_over_models_freezes_each_lane_by_itself():
    models = lanes(3)
    batch = jax.vmap(lambda m: jaxem.fit(m, X, throw=False))(models)
    singles = [jaxem.fit(lane(models, i), X) for i in range(3)]
    for i, single in enumerate(singles):
        close(lane(batch, i), single, 1e-10)
    assert len({int(s.num_steps) for s in singles}) > 1
    assert np.all(np.isnan(batch.history) == (np.arange(1001) > batch.num_steps[:, None]))


def test_vmap_over_data_and_weights():
    data = jnp.stack([X, X[::-1] + 1])
    sample_weight = jnp.stack([jnp.ones(N), jnp.linspace(0.5, 2, N)])
    batch = jax.vmap(lambda x, w: jaxem.fit(poissons(), x, sample_weight=w, throw=False))(
        data, sample_weight
    )
    for i in range(2):
        close(lane(batch, i), jaxem.fit(poissons(), data[i], sample_weight=sample_weight[i]), 1e-10)


def test_vmap_over_tol_and_prior():
    tols = jnp.array([1e-2, 1e-8])
    batch = jax.vmap(lambda t: jaxem.fit(poissons(), X, tol=t, throw=False))(tols)
    for i in range(2):
        close(lane(batch, i), jaxem.fit(poissons(), X, tol=float(tols[i])), 1e-10)
    assert batch.num_steps[0] < batch.num_steps[1]

    def mode(strength):
        model = poissons()
        own = model.components.prior(strength, rate=1.0)
        prior = model.prior(weights=2 * strength, components=own)
        return jaxem.fit(model, X, prior=prior, throw=False)

    close(lane(jax.vmap(mode)(jnp.array([0.5, 4.0])), 1), mode(4.0), 1e-10)


def test_a_failing_lane_spoils_no_other():
    bad = jnp.where(jnp.arange(2)[:, None, None] == 1, P.at[3, 0].set(jnp.nan), P)
    batch = jax.vmap(lambda x: jaxem.fit(gaussians(), x, throw=False, max_steps=30))(bad)
    assert lane(batch, 1).result == RESULTS.invalid_data
    close(lane(batch, 0), jaxem.fit(gaussians(), P, throw=False, max_steps=30), 1e-10)


# Derivatives


@eqx.filter_jit
def value_and_gradients(model, data, sample_weight):
    def total(model, sample_weight):
        return model.e_step(data, sample_weight)[1]

    def after_a_step(model):
        return total(model.m_step(model.e_step(data, sample_weight)[0]), sample_weight)

    value, slopes = jax.value_and_grad(total, argnums=(0, 1))(model, sample_weight)
    return value, slopes, jax.grad(after_a_step)(model)


@eqx.filter_jit
def log_likelihood(model, data, sample_weight):
    return jnp.sum(sample_weight * model.log_prob(data))


def directional(function, at, direction, h=1e-3):
    """The derivative along a direction by central differences of fourth order."""

    def moved(size):
        return function(jax.tree.map(lambda a, d: a + size * d, at, direction))

    return (8 * (moved(h) - moved(-h)) - (moved(2 * h) - moved(-2 * h))) / (12 * h)


def inner(a, b):
    return sum(jnp.vdot(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def wiggle(tree, seed=0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape)), tree)


SIMPLE = cases("closed") + cases("regression") + cases("nested")


@pytest.mark.parametrize("name", SIMPLE)
def test_gradients_of_e_step_and_log_prob(name):
    case = CASES[name]()
    sample_weight = jnp.linspace(0.5, 1.5, N)
    _, (of_model, of_weights), _ = value_and_gradients(case.model, case.data, sample_weight)
    way = wiggle(case.model)
    by_difference = directional(
        lambda m: log_likelihood(m, case.data, sample_weight), case.model, way
    )
    np.testing.assert_allclose(inner(of_model, way), by_difference, rtol=1e-6)
    close(of_weights, case.model.log_prob(case.data), 1e-10)
    direct = eqx.filter_jit(eqx.filter_grad(lambda m: log_likelihood(m, case.data, sample_weight)))
    close(direct(case.model), of_model, 1e-9)


@pytest.mark.parametrize("name", SIMPLE)
def test_no_nan_gradient_with_padded_units_and_an_empty_component(name):
    case = CASES[name]()
    sample_weight = jnp.ones(N).at[:4].set(0)

    def spoil(leaf):
        bad = jnp.nan if jnp.issubdtype(leaf.dtype, jnp.inexact) else -(2**31)
        return leaf.at[:4].set(bad)

    data = jax.tree.map(spoil, case.data)
    # Weight e^−800 underflows: no observation has any responsibility of the second component.
    model = eqx.tree_at(lambda m: m._weights.logits, case.model, jnp.array([0.0, -800.0]))
    value, (of_model, of_weights), stepped = value_and_gradients(model, data, sample_weight)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves((of_model, of_weights, stepped)):
        assert np.all(np.isfinite(leaf))
    assert np.any(np.abs(jax.tree.leaves(of_model.components)[0][0]) > 1e-3)


@pytest.mark.parametrize("of", ["data", "weights", "start", "prior"])
def test_forward_derivatives_through_the_fit(of):
    case = CASES["gaussian"]()
    model, sample_weight = case.model, jnp.linspace(0.5, 1.5, N)

    def outcome(value):
        given = {"data": P, "weights": sample_weight, "start": model, "prior": jnp.array(1.5)}
        given[of] = value
        prior = model.prior(components=model.components.prior({"covariance": given["prior"]}))
        solution = jaxem.fit(
            given["start"],
            given["data"],
            sample_weight=given["weights"],
            prior=prior,
            tol=0.0,
            max_steps=6,
            adjoint=jaxem.em.Forward(),
            throw=False,
        )
        return solution.objective + jnp.sum(jnp.sin(solution.model.components.mean))

    at = {"data": P, "weights": sample_weight, "start": model, "prior": jnp.array(1.5)}[of]
    way = wiggle(at)
    compiled = eqx.filter_jit(outcome)
    _, slope = eqx.filter_jit(lambda a, t: jax.jvp(outcome, (a,), (t,)))(at, way)
    np.testing.assert_allclose(slope, directional(compiled, at, way), rtol=1e-6)


def test_derivatives_of_a_converged_fit_and_the_error_in_reverse_mode():
    def mean(shift):
        adjoint = jaxem.em.Forward()
        solution = jaxem.fit(gaussians(), P + shift, tol=1e-13, adjoint=adjoint, throw=False)
        return solution.model.components.mean

    tangent = jax.jvp(mean, (jnp.zeros(2),), (jnp.array([1.0, 0.0]),))[1]
    close(tangent, jnp.array([[1.0, 0.0], [1.0, 0.0]]), 1e-7)
    with pytest.raises(RuntimeError, match="forward mode only"):
        jax.grad(lambda s: mean(s).sum())(jnp.zeros(2))


# Compile once


def independent():
    gaussian = functools.partial(jaxem.emissions.DiagonalGaussian, tied=True)
    categorical = functools.partial(jaxem.emissions.Categorical, num_categories=3)
    return functools.partial(jaxem.emissions.Independent, families=(gaussian, categorical))


def start(seed, family, data, **options):
    return jaxem.Mixture.init(jax.random.key(seed), data, 2, family, **options)


OTHER = jnp.asarray(np.random.default_rng(9).normal(size=(N, 2)) + P)
MIXED = (P, jnp.asarray(CODES))


@pytest.mark.parametrize(
    "call",
    {
        "fit": lambda i: jaxem.fit(gaussians(), (P, OTHER)[i], tol=10.0**-i),
        "fit, weights": lambda i: jaxem.fit(poissons(), X + i, sample_weight=jnp.ones(N) + i),
        "fit, prior": lambda i: jaxem.fit(
            poissons(),
            X + i,
            prior=poissons().prior(
                weights=2.0 * (1 + i), components=poissons().components.prior(1.0 + i, rate=0.5)
            ),
        ),
        "fit, algorithm": lambda i: jaxem.fit(poissons(), X + i, jaxem.EM(jaxem.em.Hard())),
        "fit, frozen": lambda i: jaxem.fit(
            jaxem.freeze(poissons(), "components.rate", mask=[True, False]), X + i
        ),
        "fit, progress": lambda i: jaxem.fit(
            poissons(), X + i, progress=jaxem.em.Progress(100), max_steps=20
        ),
        "init": lambda i: start(i, jaxem.emissions.Gaussian, (P, OTHER)[i]),
        "init, partial made anew": lambda i: start(i, independent(), MIXED),
        "init, weights": lambda i: start(
            i, jaxem.emissions.Poisson, X + i, sample_weight=jnp.ones(N) + i
        ),
        "init, random": lambda i: start(i, jaxem.emissions.Poisson, X + i, method="random"),
        "constructor": lambda i: jaxem.Mixture(
            [0.4, 0.6], jaxem.emissions.Poisson([[1.0, 3.0], [5.0 + i, 4]])
        ),
        "fit_restarts": lambda i: jaxem.fit_restarts(
            lanes(3), X + i, short_steps=5, num_polished=2
        ),
        "kmeans": lambda i: jaxem.kmeans(jax.random.key(i), (P, OTHER)[i], 3, num_restarts=2),
        "predict": lambda i: gaussians().predict((P, OTHER)[i]),
        "from_functions": lambda i: jaxem.fit(CASES["from_functions"]().model, X + float(i)),
    }.items(),
    ids=lambda item: item[0],
)
def test_a_second_call_compiles_nothing(call):
    _, function = call
    function(0)
    assert compilations(lambda: function(1)) == 0


def test_shapes_and_settings_do_compile():
    compilations(lambda: jaxem.fit(poissons(), X))
    assert compilations(lambda: jaxem.fit(poissons(), X[:-1])) > 0
    assert compilations(lambda: jaxem.fit(poissons(), X, max_steps=999)) > 0


# Sharded data, and blocks


@pytest.fixture
def small_blocks(monkeypatch):
    """A budget of so many rows a block; it is no part of JAX's cache keys, so those are cleared."""

    def shrink(rows, model, data):
        jax.clear_caches()
        budget = {jax.default_backend(): rows * model.width(data)}
        monkeypatch.setattr(jaxem._core.blocks, "_BUDGET", budget)
        return jaxem._core.blocks._blocking(jax.tree.leaves(data)[0].shape[0], model.width(data))

    yield shrink
    jax.clear_caches()


def mesh(kind=AxisType.Auto):
    return jax.make_mesh((2,), ("observations",), axis_types=(kind,))


def spread(tree):
    return jax.device_put(tree, NamedSharding(mesh(), PartitionSpec("observations")))


@pytest.mark.parametrize("name", ["tied", "independent"])
def test_sharded_fit_is_the_fit(name):
    case = CASES[name]()
    sample_weight = jnp.linspace(0, 2, N)
    sharded = jaxem.fit(
        case.model, spread(case.data), sample_weight=spread(sample_weight), tol=1e-8, max_steps=60
    )
    plain = jaxem.fit(case.model, case.data, sample_weight=sample_weight, tol=1e-8, max_steps=60)
    assert int(sharded.num_steps) == int(plain.num_steps)
    close(sharded, plain, 1e-9)
    assert sharded.objective.sharding.is_fully_replicated


@pytest.mark.parametrize("blocks", [1, 3])
def test_a_sharded_step_is_one_all_reduce_and_gathers_nothing(blocks, small_blocks):
    model = gaussians()
    data = spread(P)
    small_blocks(24 // blocks, model, P)  # of the 24 observations on each device
    algorithm, problem = jaxem.EM(), jaxem.em.Problem(data, shards=(mesh(), "observations"))
    state = algorithm.init(model, problem)
    step = jax.jit(lambda s, problem: algorithm.step(s, problem))
    compiled = step.lower(state, problem).compile().as_text()
    assert len(re.findall(r"= .*\ball-reduce(?:-start)?\(", compiled)) == 1
    for other in ("all-gather", "all-to-all", "collective-permute", "reduce-scatter"):
        assert other not in compiled
    close(
        step(state, problem).statistics.sums,
        jaxem.EM().step(jaxem.EM().init(model, P), P).statistics.sums,
    )


@pytest.mark.parametrize(
    "algorithm",
    [
        jaxem.SQUAREM(),
        jaxem.Anderson(),
        jaxem.EM(jaxem.em.Annealed()),
        jaxem.EM(jaxem.em.Sampled()),
    ],
    ids=["SQUAREM", "Anderson", "annealed", "sampled"],
)
def test_every_algorithm_works_where_the_data_lie(algorithm, small_blocks):
    model, data = gaussians(), spread(P)
    small_blocks(8, model, P)
    options = dict(key=jax.random.key(0), max_steps=4, throw=False)
    run = jax.jit(lambda m: jaxem.fit(m, data, algorithm, **options))
    compiled = run.lower(model).compile().as_text()
    assert "all-reduce" in compiled and "all-gather" not in compiled
    if algorithm != jaxem.EM(jaxem.em.Sampled()):
        close(run(model).model, jaxem.fit(model, P, algorithm, **options).model, 1e-8)


def test_sharding_errors_are_clear():
    with pytest.raises(ValueError, match="sharded differently"):
        other = NamedSharding(
            jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,)), PartitionSpec("rows")
        )
        case = CASES["independent"]()
        data = (spread(case.data[0]), jax.device_put(case.data[1], other))
        jaxem.fit(case.model, data)
    problem = jaxem.em.Problem(X[:-1], shards=(mesh(), "observations"))
    with pytest.raises(ValueError, match="cannot be spread evenly over 2 devices"):
        jaxem.EM().init(poissons(), problem)


def test_explicit_axes_do_as_well():
    axes = NamedSharding(mesh(AxisType.Explicit), PartitionSpec("observations"))
    sharded = jaxem.fit(gaussians(), jax.device_put(P, axes), tol=1e-8, max_steps=60)
    close(sharded, jaxem.fit(gaussians(), P, tol=1e-8, max_steps=60), 1e-9)


@pytest.mark.parametrize(
    ("name", "n", "rows"),
    [
        ("gaussian", 48, 16),
        *[(name, 47, 7) for name in cases("closed", "mechanism")],  # the last block overlaps
        *[(name, 47, 7) for name in cases("regression", "mechanism") + cases("nested")],
    ],
)
def test_blocks_give_what_one_block_gives(name, n, rows, small_blocks):
    model, data, *_ = CASES[name]()
    data = jax.tree.map(lambda leaf: leaf[:n], data)
    sample_weight = jnp.linspace(0, 2, n)

    def everything(model, data, sample_weight):
        def total(model, sample_weight):
            return model.e_step(data, sample_weight)[1]

        weighted, plain = model.e_step(data, sample_weight), model.e_step(data)
        slopes = jax.grad(total, argnums=(0, 1))(model, sample_weight)
        sums = weighted[0].sums, plain[0].sums, weighted[1], plain[1]
        return sums, slopes, (model.log_prob(data), model.responsibilities(data))

    whole = jax.jit(lambda *args: everything(*args))(model, data, sample_weight)
    count, size = small_blocks(rows, model, data)
    assert count >= 3 and (count * size != n) == (n == 47)
    blocked = jax.jit(lambda *args: everything(*args))(model, data, sample_weight)
    close(blocked, whole, 1e-9)


def test_eager_calls_on_many_blocks_compile_once(small_blocks):
    model = gaussians()
    assert small_blocks(16, model, P)[0] == 3
    for call in (model.e_step, model.log_prob, model.predict):
        call(P)
        assert compilations(lambda call=call: call(OTHER)) == 0
