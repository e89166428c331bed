"""Hidden Markov models against published values and what reference programs gave when run."""

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gold import CHAINS, expected, match, solve, table

import jaxem
from jaxem import HMM, RESULTS, Sequences

step = eqx.filter_jit(jaxem.EM().step)
init = eqx.filter_jit(jaxem.EM().init)


def states(model, data, num_steps):
    """EM's state after 0, 1, … steps."""
    state = init(model, data)
    yield state
    for _ in range(num_steps):
        state = step(state, data)
        yield state


def best_of(case, models, data):
    """The best of some starts, far enough converged."""
    stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *models)
    rough = jaxem.best(jaxem.fit_restarts(stacked, data, tol=1e-6, max_steps=3000))
    return solve(case, rough.model, data)


def earthquakes():
    return jnp.asarray(table("earthquakes")["count"].to_numpy())[None, :, None]


def poissons(initial, rate, stay=0.9):
    rate = jnp.asarray(rate)[:, None]
    return HMM(
        initial, jaxem.factors.Transition.sticky(len(rate), stay), jaxem.emissions.Poisson(rate)
    )


def described(prefix, solution, names):
    """Rates, transitions and what else is asked for, states in the order of their rates."""
    model = solution.model
    order = jnp.argsort(model.emission.rate[:, 0])
    numbers = {
        "negloglik": -solution.log_likelihood,
        "published": -solution.log_likelihood,
        "lambda": model.emission.rate[order, 0],
        "Gamma": model.transition.matrix[order][:, order],
        "delta": model.initial[order],
    }
    return {f"{prefix}_{name}": numbers[name] for name in names}


BOTH = ("negloglik", "lambda", "Gamma", "published")


def two_states(case):
    x = earthquakes()
    start = poissons([0.5, 0.5], [15.0, 25.0])
    path = list(states(start, x, 10))
    after = path[1].model

    def log_likelihood(rate):
        return jnp.sum(poissons([0.5, 0.5], rate).log_prob(x))

    stationary = solve(case, poissons("stationary", [15.0, 25.0]), x)
    free = solve(case, start, x)
    return {
        **described("stationary", stationary, (*BOTH, "delta")),
        **described("free_initial", free, BOTH),
        "loglik_trajectory": [state.log_likelihood for state in path],
        "after_1_step_A_pi_lambda": [
            after.transition.matrix.ravel(),
            after.initial,
            after.emission.rate[:, 0],
        ],
        "expected_transitions_at_start": path[0].statistics.sums[1],
        "dloglik_dlambda_at_start": jax.jit(jax.grad(log_likelihood))(jnp.array([15.0, 25.0])),
    }


def three_states(case):
    x = earthquakes()
    rates = ([10.0, 20.0, 30.0], [13.0, 20.0, 30.0], [15.0, 19.0, 25.0], [19.0, 20.0, 21.0])
    stationary = best_of(case, [poissons("stationary", rate, 0.8) for rate in rates], x)
    free = best_of(case, [poissons([1 / 3] * 3, rate, 0.8) for rate in rates], x)
    return {
        **described("stationary", stationary, (*BOTH, "delta")),
        **described("free_initial", free, BOTH),
    }


def geyser(case):
    """A maximum on the boundary: one transition has probability 0, one emission 1."""
    long = table("geyser_dichotomised").long.to_numpy()
    start = HMM("stationary", [[0.3, 0.7], [0.6, 0.4]], jaxem.emissions.Bernoulli([[0.3], [0.8]]))
    solution = jaxem.fit(start, jnp.asarray(long)[None, :, None], tol=1e-12, max_steps=20_000)
    model = solution.model
    assert solution.result == RESULTS.converged
    assert all(bool(jnp.all(jnp.isfinite(leaf))) for leaf in jax.tree.leaves(model))
    return {
        "negloglik": -solution.log_likelihood,
        "p_long": model.emission.probability[:, 0],
        "Gamma": model.transition.matrix,
        "n_long": long.sum(),
    }


def speed(case):
    rt = jnp.asarray(table("speed")["rt"].to_numpy())[:, None]
    mean, variance = [[5.5], [6.4]], [0.05, 0.05]
    emission = jaxem.emissions.SphericalGaussian(mean, variance)
    start = HMM([0.5, 0.5], [[0.9, 0.1], [0.1, 0.9]], emission)
    one = solve(case, start, rt[None])
    three = solve(case, start, Sequences.split(rt, [168, 134, 137]))
    starts = np.isin(np.arange(439), [0, 168, 302])
    by_flags = solve(case, start, Sequences.split(rt, starts=starts))
    np.testing.assert_allclose(by_flags.log_likelihood, three.log_likelihood, rtol=1e-12)
    return {
        "loglik_one_sequence": one.log_likelihood,
        "means_one": one.model.emission.mean[:, 0],
        "A_one": one.model.transition.matrix,
        "loglik_three_sequences": three.log_likelihood,
        "means_three": three.model.emission.mean[:, 0],
        "sd_three": jnp.sqrt(three.model.emission.variance),
        "A_three": three.model.transition.matrix,
        "mixture_loglik": solve(case, jaxem.Mixture([0.5, 0.5], emission), rt).log_likelihood,
    }


def ice_cream(case):
    """The end of the season is a third state, which is never left and has a symbol of its own."""
    given = {key: np.array(value) for key, value in CHAINS[case]["data"]["values"].items()}
    matrix = np.eye(3)
    matrix[:2] = np.column_stack([given["A"], given["stop"]])
    shares = np.eye(4)[[0, 1, 3]]
    shares[:2, :3] = given["B"]
    shares[:2, 3] = 0
    start = HMM([*given["pi"], 0.0], matrix, jaxem.emissions.Categorical(shares[:, None]))
    diary = jnp.asarray([*given["cones"] - 1, 3])[None, :, None]
    path = list(states(start, diary, 10))
    model = path[-1].model
    return {
        "log2_prob_before_each_step": [state.log_likelihood / np.log(2) for state in path],
        "A_after_10": model.transition.matrix[:2, :2],
        "B_after_10": model.emission.probability[:2, 0, :3],
        "stop_after_10": model.transition.matrix[:2, 2],
    }


def known(case):
    """A chain of two states with known parameters, and what it was seen to do."""
    given = {key: np.array(value) for key, value in CHAINS[case]["data"]["values"].items()}
    model = HMM(given["pi"], given["A"], jaxem.emissions.Categorical(given["B"][:, None]))
    return model, jnp.asarray(given["obs"])[None, :, None]


def umbrella(case):
    model, x = known(case)
    return {
        "smoothed_rain": model.responsibilities(x)[0, :, 0],
        "loglik": model.log_prob(x)[0],
        "two_day_smoothed": model.responsibilities(x[:, :2])[0, 0, 0],
    }


def fever(case):
    model, x = known(case)
    paths, log_prob = model.viterbi(x)
    return {
        "best_path": paths[0],
        "best_prob": jnp.exp(log_prob[0]),
        "likelihood": jnp.exp(model.log_prob(x)[0]),
    }


RECIPES = {
    "hmm_earthquakes_2": two_states,
    "hmm_earthquakes_3": three_states,
    "hmm_geyser_binary": geyser,
    "hmm_speed_rt": speed,
    "hmm_eisner_icecream": ice_cream,
    "hmm_umbrella": umbrella,
    "viterbi_fever": fever,
}


@pytest.mark.parametrize("case", CHAINS)
def test_reference(case):
    numbers = RECIPES[case](case)
    assert numbers.keys() == CHAINS[case]["expected"].keys()
    for key, value in numbers.items():
        if key == "after_1_step_A_pi_lambda":  # arrays of different lengths
            atol = CHAINS[case]["expected"][key]["atol"]
            for ours, theirs in zip(value, expected(case, key), strict=True):
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=atol)
        else:
            match(case, key, value)


def test_nothing_is_left_out():
    assert RECIPES.keys() == CHAINS.keys()


def test_counting_alone_is_not_the_stationary_maximum():
    """Baum and Welch's M-step ignores that the first state is drawn from δ: 342.3479."""
    x = earthquakes()
    start = poissons([0.5, 0.5], [15.0, 25.0])
    model = start
    for _ in range(60):
        statistics, _ = model.e_step(x)
        after = model.m_step(statistics)
        model = HMM(
            jaxem.latents.chain.stationary(after.transition.matrix),
            after.transition,
            after.emission,
        )
    found = -float(model.log_prob(x)[0])
    np.testing.assert_allclose(found, 342.3479, atol=2e-4)
    assert found > expected("hmm_earthquakes_2", "stationary_negloglik") + 0.02
