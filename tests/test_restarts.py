"""Many starts: lane by lane the same as single fits, and the best of them told honestly."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from models import COUNTED, COUNTS, GATES, POINTS, N

import jaxem
from jaxem import RESULTS

X = jnp.asarray(COUNTS)
P = jnp.asarray(POINTS)
WEIGHTS = jnp.linspace(0.5, 1.5, N)


def models(count, family=jaxem.emissions.Poisson, data=X):
    keys = jax.random.split(jax.random.key(0), count)
    return jax.vmap(lambda key: jaxem.Mixture.init(key, data, 2, family, method="random"))(keys)


def lane(tree, index):
    return jax.tree.map(lambda leaf: jax.device_put(np.asarray(leaf)[index]), tree)


def close(a, b, tol=1e-10):
    for left, right in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(left, right, rtol=tol, atol=tol)


@pytest.mark.parametrize("at_once", [None, 2])
def test_lanes_are_single_fits(at_once, monkeypatch):
    starts = models(5)
    first = lane(starts, 0)
    prior = first.prior(weights=2.0, components=first.components.prior(0.5, rate=2.0))
    if at_once:
        monkeypatch.setattr(jaxem._core.blocks, "_BUDGET", {jax.default_backend(): at_once * N * 4})
        assert jaxem._core.blocks.lanes_at_once(5, N * 4) == at_once
        monkeypatch.setattr(jaxem.em._restarts, "_side_by_side", lambda *_: at_once)
    options = dict(sample_weight=WEIGHTS, prior=prior, tol=1e-6, max_steps=60 + bool(at_once))
    batch = jaxem.fit_restarts(starts, X, **options)
    for i in range(5):
        close(lane(batch, i), jaxem.fit(lane(starts, i), X, throw=False, **options))
    assert len(set(np.asarray(batch.num_steps).tolist())) > 1


def test_best_is_the_lane_of_highest_objective():
    batch = jaxem.fit_restarts(models(5), X)
    best = jaxem.best(batch)
    np.testing.assert_allclose(best.objective, np.max(batch.objective), rtol=1e-14)
    assert int(best.set_aside) == 0
    assert best.model.weights.shape == (2,)


def test_of_lanes_that_differ_by_rounding_the_first_is_best():
    around = faked(["converged"] * 3, [-5.0, -1.0 - 1e-15, -1.0])
    best = jaxem.best(around)
    assert best.objective == -1.0 - 1e-15 and int(best.set_aside) == 0
    apart = jaxem.best(faked(["converged"] * 3, [-5.0, -1.0 - 1e-10, -1.0]))
    assert apart.objective == -1.0


def faked(results, objectives):
    """A batch of fits that ended as told."""
    batch = jaxem.fit_restarts(models(len(results)), X, max_steps=1)
    members = [getattr(RESULTS, name) for name in results]
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *members)
    batch = eqx.tree_at(lambda s: s.result, batch, stacked)
    return eqx.tree_at(lambda s: s.objective, batch, jnp.asarray(objectives))


@pytest.mark.parametrize(
    ("results", "objectives", "winner", "aside"),
    [
        (["converged", "degenerate", "converged"], [1.0, 9.0, 2.0], 2, 1),
        (["converged", "degenerate", "decreased"], [1.0, 9.0, 5.0], 0, 2),
        (["max_steps_reached", "converged", "degenerate"], [3.0, 2.0, 9.0], 0, 1),
        (["degenerate", "decreased", "degenerate"], [1.0, 9.0, 2.0], 2, 1),
        (["nonfinite", "invalid_data", "decreased"], [np.nan, np.nan, -5.0], 2, 0),
        (["nonfinite", "converged", "nonfinite"], [np.inf, -9.0, np.nan], 1, 0),
        (["nonfinite", "nonfinite", "nonfinite"], [np.nan, np.nan, np.nan], 0, 0),
        (["converged", "converged", "converged"], [2.0, 2.0, 1.0], 0, 0),
    ],
)
def test_best_ranks_sound_lanes_first_and_counts_those_set_aside(
    results, objectives, winner, aside
):
    batch = faked(results, objectives)
    best = eqx.filter_jit(jaxem.best)(batch)
    assert int(best.set_aside) == aside
    close(best.model, lane(batch, winner).model)
    assert best.result == lane(batch, winner).result


def test_a_lane_that_fails_spoils_no_other():
    starts = models(3, jaxem.emissions.Gaussian, P)
    starts = eqx.tree_at(
        lambda m: m.components.mean, starts, starts.components.mean.at[1].set(jnp.nan)
    )
    batch = jaxem.fit_restarts(starts, P, max_steps=40)
    assert lane(batch, 1).result == RESULTS.nonfinite
    for i in (0, 2):
        close(lane(batch, i), jaxem.fit(lane(starts, i), P, max_steps=40, throw=False))
    assert jnp.isfinite(jaxem.best(batch).objective)


def test_short_runs_then_polish():
    starts = models(6)
    short = jaxem.fit_restarts(starts, X, max_steps=3)
    polished = jaxem.fit_restarts(starts, X, short_steps=3, num_polished=2)
    assert polished.objective.shape == (2,)
    chosen = np.argsort(-np.asarray(short.objective))[:2]
    for i, j in enumerate(chosen):
        np.testing.assert_allclose(polished.history[i, 0], short.objective[j], rtol=1e-12)
        close(lane(polished, i), jaxem.fit(lane(short.model, int(j)), X, throw=False))


def test_the_best_of_many_starts_in_one_call():
    key = jax.random.key(7)
    found = jaxem.fit_best(jaxem.Mixture.init, key, X, 2, jaxem.emissions.Poisson, num_starts=6)
    start_key, _ = jax.random.split(key)
    starts = jax.vmap(lambda k: jaxem.Mixture.init(k, X, 2, jaxem.emissions.Poisson))(
        jax.random.split(start_key, 6)
    )
    close(found, jaxem.best(jaxem.fit_restarts(starts, X)))
    assert found.converged and found.status == "converged"


SEQUENCES = jnp.asarray(COUNTED)
FIRST_FITS = {
    "hmm": lambda fit: fit(jaxem.HMM.init, SEQUENCES, 2, jaxem.emissions.Poisson, stay=0.8),
    "hsmm": lambda fit: fit(
        jaxem.HSMM.init,
        SEQUENCES,
        2,
        jaxem.emissions.Poisson,
        duration=jaxem.factors.PoissonDuration([1.0, 2.0], 5),
    ),
    "experts": lambda fit: fit(
        jaxem.MixtureOfExperts.init,
        (jnp.asarray(GATES), X),
        2,
        jaxem.emissions.Poisson,
        sample_weight=WEIGHTS,
    ),
    "short runs first": lambda fit: fit(
        jaxem.Mixture.init, X, 2, jaxem.emissions.Poisson, short_steps=2, num_polished=2
    ),
    "hard": lambda fit: fit(
        jaxem.Mixture.init,
        X,
        2,
        jaxem.emissions.Poisson,
        algorithm=jaxem.EM(jaxem.em.Hard()),
        method="random",
    ),
    "a function of one's own": lambda fit: fit(
        lambda key, x: jaxem.from_log_joint(
            two_laws, jax.random.normal(key, (2, 1)) + jnp.log(jnp.mean(x))
        ),
        X[:, :1].astype(float),
        max_steps=40,
    ),
}


def two_laws(log_rate, x):
    return x * log_rate[:, 0] - jnp.exp(log_rate[:, 0]) - jnp.log(2)


@pytest.mark.parametrize("name", FIRST_FITS)
def test_every_model_starts_from_its_init(name):
    def fit(init, data, *args, **options):
        return jaxem.fit_best(init, jax.random.key(1), data, *args, num_starts=3, **options)

    found = FIRST_FITS[name](fit)
    assert found.objective.shape == () and jnp.isfinite(found.objective)
    assert found.status in ("converged", "max_steps_reached")


def test_hard_em_restarts():
    batch = jaxem.fit_restarts(models(3), X, jaxem.EM(jaxem.em.Hard()))
    single = jaxem.fit(lane(models(3), 2), X, jaxem.EM(jaxem.em.Hard()))
    close(lane(batch, 2), single)


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: jaxem.fit_restarts(lane(models(2), 0), X), "leading axis"),
        (lambda: jaxem.fit_restarts([lane(models(2), 0)], X), "stacked"),
        (lambda: jaxem.fit_restarts(models(2), X, short_steps=2, num_polished=3), "num_polished"),
        (lambda: jaxem.fit_restarts(models(2), X, short_steps=2, num_polished=0), "num_polished"),
        (lambda: jaxem.best(jaxem.fit(lane(models(2), 0), X)), "leading axis"),
        (lambda: jaxem.fit_restarts(models(2), P.astype(jnp.float32)), "dtype"),
        (lambda: jaxem.fit_restarts(models(2), X, tol=-1.0), "tol"),
        (lambda: jaxem.fit_best(jaxem.Mixture, jax.random.key(0), X, 2), "Mixture.init"),
        (lambda: jaxem.fit_best(two_laws, jax.random.key(0), X, num_starts=0), "num_starts"),
    ],
)
def test_errors_are_clear(call, says):
    with pytest.raises(ValueError, match=says):
        call()
