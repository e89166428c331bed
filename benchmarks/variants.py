"""Variants of EM: `python -m benchmarks.variants [section …] [--tiny]`.

Sections: ascent, acceleration, online, incremental, sampled, annealing, throughput, gradient
(default: all). E-steps are counted as they are executed.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxem
from benchmarks._common import interleave, main, seconds, size
from benchmarks._data import data, jaxem_mixture

e_steps: list[None] = []


class Counted(jaxem.em.AbstractExpectation):
    """An expectation that tells each time it is executed."""

    traits: ClassVar[jaxem.em.Traits] = jaxem.em.Traits()
    expectation: jaxem.em.AbstractExpectation

    def init(self, model: Any, problem: Any) -> Any:
        return self.expectation.init(model, problem)

    def __call__(self, model: Any, problem: Any, memory: Any, step: Any, key: Any) -> Any:
        jax.debug.callback(lambda _: e_steps.append(None), step)
        return self.expectation(model, problem, memory, step, key)

    @property
    def final(self) -> Any:
        return self

    def conclusive(self, memory: Any, step: Any) -> Any:
        return self.expectation.conclusive(memory, step)


MONOTONE: dict[str, Callable[[jaxem.EM], Any]] = {
    "EM": lambda em: em,
    "SQUAREM": jaxem.SQUAREM,
    "Anderson": jaxem.Anderson,
    "Overrelaxed": jaxem.em.Overrelaxed,
}

# Random problems, of equal shapes so that they run side by side


def poisson_problem(rng: np.random.Generator) -> tuple[Any, Any]:
    rate = rng.gamma(4.0, 1.0, (3, 1))
    x = rng.poisson(rate[rng.integers(0, 3, 100)])
    return jaxem.Mixture(
        rng.dirichlet(np.ones(3)), jaxem.emissions.Poisson(rng.gamma(4.0, 1.0, (3, 1)))
    ), x


def gaussian_problem(rng: np.random.Generator) -> tuple[Any, Any]:
    centres = 1.5 * rng.normal(size=(2, 2))
    x = centres[rng.integers(0, 2, 100)] + rng.normal(size=(100, 2))
    start = x[rng.choice(100, 2, replace=False)]
    covariance = np.broadcast_to(np.cov(x.T), (2, 2, 2))
    return jaxem.Mixture([0.5, 0.5], jaxem.emissions.Gaussian(start, covariance)), x


def diagonal_problem(rng: np.random.Generator) -> tuple[Any, Any]:
    centres = 1.5 * rng.normal(size=(3, 2))
    x = centres[rng.integers(0, 3, 100)] + rng.normal(size=(100, 2))
    start, variance = x[rng.choice(100, 3, replace=False)], x.var(axis=0)
    return jaxem.Mixture(np.full(3, 1 / 3), jaxem.emissions.DiagonalGaussian(start, variance)), x


def latent_class_problem(rng: np.random.Generator) -> tuple[Any, Any]:
    p = rng.beta(1, 1, (2, 5))
    x = (rng.random((100, 5)) < p[rng.integers(0, 2, 100)]).astype(int)
    return jaxem.Mixture([0.5, 0.5], jaxem.emissions.Bernoulli(rng.beta(2, 2, (2, 5)))), x


def chain_problem(rng: np.random.Generator) -> tuple[Any, Any]:
    stay = rng.uniform(0.6, 0.95, 2)
    matrix = np.array([[stay[0], 1 - stay[0]], [1 - stay[1], stay[1]]])
    z = np.zeros((2, 60), int)
    for t in range(1, 60):
        z[:, t] = rng.random(2) < matrix[z[:, t - 1], 1]
    rate = rng.gamma(4.0, 1.0, (2, 1))
    start = jaxem.emissions.Poisson(rng.gamma(4.0, 1.0, (2, 1)))
    return jaxem.HMM([0.5, 0.5], [[0.7, 0.3], [0.3, 0.7]], start), rng.poisson(rate[z])


def student_problem(rng: np.random.Generator) -> tuple[Any, Any]:
    centres = 3 * rng.normal(size=(2, 1))
    x = centres[rng.integers(0, 2, 100)] + rng.standard_t(rng.uniform(1.5, 8), (100, 1))
    start = x[rng.choice(100, 2, replace=False)]
    return jaxem.Mixture([0.5, 0.5], jaxem.emissions.StudentT(start, np.ones((2, 1, 1)), 5.0)), x


def regression_problem(rng: np.random.Generator) -> tuple[Any, Any]:
    """Counts on a line each for two groups, whose shares depend on the input: a local M-step."""
    u, slopes, level = rng.normal(size=(100, 1)), rng.normal(size=(2, 1)), rng.normal(size=(2, 1))
    z = (rng.random(100) < 1 / (1 + np.exp(-2 * u[:, 0]))).astype(int)
    y = rng.poisson(np.exp(np.clip(slopes[z] * u + level[z] + 1, -5, 5)))
    experts = jaxem.emissions.PoissonRegression(
        0.3 * rng.normal(size=(2, 1, 1)), rng.normal(size=(2, 1)) + 1
    )
    gate = jaxem.factors.LogisticGate(np.zeros((2, 1)), np.zeros(2))
    return jaxem.MixtureOfExperts(gate, experts), (u, (u, y))


PROBLEMS = {
    "Poisson mixture, k=3": poisson_problem,
    "Gaussian mixture, k=2 d=2": gaussian_problem,
    "tied diagonal mixture, k=3 d=2": diagonal_problem,
    "latent classes, k=2 d=5": latent_class_problem,
    "Poisson HMM, k=2": chain_problem,
    "Student-t mixture, k=2 d=1": student_problem,
    "experts, Poisson regressions, k=2": regression_problem,
}


def ascent() -> Iterator[Any]:
    """Falls of the objective, and where accelerated fits end, over random problems in float64.

    An accelerated fit that ends below EM's is taken on by EM. If that brings it to EM's end, it
    was not yet there when its steps were spent; if not, its extrapolations had crossed to a lower
    maximum, as others cross to a higher one.
    """
    count, at_once, max_steps = size((1_000, 50, 3_000), (10, 10, 300))

    @eqx.filter_jit
    def run(models: Any, x: Any, algorithm: Any) -> jaxem.Solution:
        options: Any = dict(max_steps=max_steps, throw=False)
        fit = lambda pair: jaxem.fit(*pair, algorithm, **options)  # noqa: E731
        return jax.lax.map(fit, (models, x), batch_size=at_once)

    with jax.enable_x64(True):
        for name, problem in PROBLEMS.items():
            rng = np.random.default_rng(0)
            pairs = [jax.tree.map(jnp.asarray, problem(rng)) for _ in range(count)]
            models, x = jax.tree.map(lambda *leaves: jnp.stack(leaves), *pairs)
            observations = jax.tree.leaves(x)[0].shape[1]
            rows: dict[str, Any] = {}
            ends: dict[str, np.ndarray] = {}
            for label, wrap in MONOTONE.items():
                solution = run(models, x, wrap(jaxem.EM()))
                history = np.asarray(solution.history)
                falls = -np.diff(history, axis=1) / np.abs(history[:, :-1])
                ends[label] = np.asarray(solution.objective) / observations
                lower = ends["EM"] - ends[label]
                below, behind = np.flatnonzero(lower > 1e-6), 0
                if below.size:
                    padded = np.resize(below, -(-below.size // at_once) * at_once)
                    onward = jax.tree.map(lambda leaf, at=padded: leaf[at], (solution.model, x))
                    further = run(*onward, jaxem.EM()).objective[: below.size] / observations
                    behind = int(np.sum(ends["EM"][below] - further <= 1e-6))
                rows[label] = (
                    f"largest fall {max(np.nanmax(falls), 0):.1e} of the objective; "
                    f"median {np.median(solution.num_steps):.0f} steps, "
                    f"{np.mean(solution.num_steps == max_steps):.1%} took all {max_steps:,}"
                )
                if label != "EM":
                    rows[label] += (
                        f"; more than 1e-6 per observation below EM's end {below.size / count:.1%} "
                        f"({(below.size - behind) / count:.1%} at a lower maximum, "
                        f"{behind / count:.1%} not yet there), "
                        f"above it {np.mean(lower < -1e-6):.1%}"
                    )
            yield f"{name}, float64", {"problems": count, "N": observations}, rows


# Slow problems


def slow_problems() -> dict[str, tuple[Any, Any, Any]]:
    """Model, data and weights, in the order of their names."""
    rng = np.random.default_rng(0)

    def overlapping(n: int, d: int, k: int, spread: float, family: str) -> tuple[Any, Any, Any]:
        x, means = data(n, d, k, spread)
        return jaxem_mixture(family, means), jnp.asarray(x), None

    deaths = np.array([162.0, 267, 271, 185, 111, 61, 27, 8, 3, 1])
    london = jaxem.Mixture([0.3, 0.7], jaxem.emissions.Poisson([[1.0], [2.5]]))
    bits = (rng.random((2_000, 6)) < np.where(rng.random((2_000, 1)) < 0.5, 0.4, 0.6)).astype(int)
    classes = jaxem.Mixture(
        [0.5, 0.5], jaxem.emissions.Bernoulli(np.stack([np.full(6, 0.3), np.full(6, 0.7)]))
    )
    near = jaxem.HMM([0.5, 0.5], [[0.8, 0.2], [0.2, 0.8]], jaxem.emissions.Poisson([[3.0], [4.0]]))
    chain, _ = near.sample(jax.random.key(0), 20, 100)
    start = jaxem.HMM([0.5, 0.5], [[0.6, 0.4], [0.4, 0.6]], jaxem.emissions.Poisson([[2.0], [6.0]]))
    words = jaxem.HMM(
        [0.5, 0.5],
        [[0.7, 0.3], [0.3, 0.7]],
        jaxem.emissions.Categorical([[[0.4, 0.3, 0.3]], [[0.3, 0.3, 0.4]]]),
    )
    text, _ = words.sample(jax.random.key(1), 20, 100)
    guess = jaxem.HMM(
        [0.5, 0.5],
        [[0.6, 0.4], [0.4, 0.6]],
        jaxem.emissions.Categorical([[[0.5, 0.3, 0.2]], [[0.2, 0.3, 0.5]]]),
    )
    tails = rng.standard_t(1.2, size=(500, 2))
    tail = jaxem.Mixture([1.0], jaxem.emissions.StudentT([[0.5, 0.5]], [4 * np.eye(2)], 3.0))
    lives = rng.exponential(np.where(rng.random((1_000, 1)) < 0.5, 1.0, 2.5))
    decay = jaxem.Mixture([0.5, 0.5], jaxem.emissions.Exponential([[2.0], [0.3]]))
    return {
        "The Times' deaths, two Poissons": (london, jnp.arange(10)[:, None], jnp.asarray(deaths)),
        "overlapping Gaussians, k=3 d=2": overlapping(2_000, 2, 3, 1.3, "full"),
        "overlapping Gaussians, k=8 d=8": overlapping(5_000, 8, 8, 1.3, "full"),
        "overlapping tied Gaussians, k=4 d=4": overlapping(2_000, 4, 4, 1.0, "tied"),
        "overlapping diagonal Gaussians, k=5 d=4": overlapping(2_000, 4, 5, 1.0, "diagonal"),
        "overlapping spheres, k=5 d=2": overlapping(2_000, 2, 5, 1.5, "spherical"),
        "Student t, ν = 1.2, d=2": (tail, jnp.asarray(tails), None),
        "latent classes, k=2 d=6": (classes, jnp.asarray(bits), None),
        "two exponentials": (decay, jnp.asarray(lives), None),
        "Poisson HMM of near-equal states": (start, chain, None),
        "categorical HMM of near-equal states": (guess, text, None),
    }


def acceleration() -> Iterator[Any]:
    """E-steps and time of accelerated EM, in ratio to EM's, on slow problems in float64."""
    ratios: dict[str, list[tuple[float, float]]] = {name: [] for name in MONOTONE}
    most = size(20_000, 200)
    with jax.enable_x64(True):
        for name, (model, x, sample_weight) in slow_problems().items():
            model, x = jax.tree.map(
                lambda leaf: (
                    leaf.astype(float) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
                ),
                (model, x),
            )
            rows: dict[str, Any] = {}
            for label, wrap in MONOTONE.items():
                options: Any = dict(sample_weight=sample_weight, max_steps=most, throw=False)
                run = eqx.filter_jit(functools.partial(jaxem.fit, **options))
                counted = wrap(jaxem.EM(Counted(jaxem.em.Exact())))
                e_steps.clear()
                solution = jax.block_until_ready(run(model, x, counted))
                jax.effects_barrier()
                algorithm = wrap(jaxem.EM())
                jax.block_until_ready(run(model, x, algorithm))
                again = functools.partial(run, model, x, algorithm)
                time = statistics.median(seconds(again) for _ in range(3))
                rows[label] = (len(e_steps), time, float(solution.objective))
            for label, (count, time, _) in rows.items():
                ratios[label].append((rows["EM"][0] / count, rows["EM"][1] / time))
            found = {
                label: f"{count} E-steps, {time:.3f} s, ends {end - rows['EM'][2]:+.1e} from EM"
                for label, (count, time, end) in rows.items()
            }
            yield f"{name}, float64", {"N": len(jax.tree.leaves(x)[0])}, found
    medians: dict[str, Any] = {}
    for label, pairs in ratios.items():
        fewer, less = (statistics.median(column) for column in zip(*pairs, strict=True))
        medians |= {f"{label}, times fewer E-steps": fewer, f"{label}, times less time": less}
    yield "medians over problems, float64", {"problems": len(ratios["EM"])}, medians


def online() -> Iterator[Any]:
    """Mini-batches from a start that EM takes to an optimum, after two passes or less."""
    n, d, k, batch = size(1_000_000, 10_000), 8, 16, size(5_000, 500)
    x, means = data(n, d, k, 2.0)
    start, x = jaxem_mixture("full", means), jnp.asarray(x)
    best = jaxem.fit(start, x, max_steps=200)
    rows: dict[str, Any] = {"EM, steps": int(best.num_steps)}
    for passes in (0.5, 1, 2):
        algorithm = jaxem.EM(accumulation=jaxem.em.Online(jaxem.em.Power(0.6), batch_size=batch))
        steps = int(passes * n / batch)
        found = jaxem.fit(start, x, algorithm, key=jax.random.key(0), max_steps=steps)
        gap = float(best.objective - found.objective) / n
        rows[f"nats per observation below EM's optimum after {passes} passes"] = round(gap, 5)
    yield f"Online(batch_size={batch}), full, float32", {"N": n, "D": d, "K": k}, rows


def incremental() -> Iterator[Any]:
    """Passes until the objective is within 1e-4 nats per observation of the optimum."""
    n, d, k, blocks = size(20_000, 2_000), 4, 6, 20
    x, means = data(n, d, k, 1.5)
    start, x = jaxem_mixture("full", means), jnp.asarray(x)
    best = float(jaxem.fit(start, x, max_steps=5_000).objective) / n
    rows: dict[str, Any] = {}
    log_prob = eqx.filter_jit(lambda m: jnp.mean(m.log_prob(x)))
    for label, algorithm, steps in (
        ("EM", jaxem.EM(), 1),
        (f"Incremental({blocks})", jaxem.EM(accumulation=jaxem.em.Incremental(blocks)), blocks),
    ):
        init, step = eqx.filter_jit(algorithm.init), eqx.filter_jit(algorithm.step)
        state, passes = init(start, x), 1
        while best - float(log_prob(state.model)) > 1e-4 and passes < 2_000:
            for _ in range(steps):
                state = step(state, x)
            passes += 1
        rows[f"{label}, passes"] = passes
    yield "full, float32", {"N": n, "D": d, "K": k}, rows


def sampled() -> Iterator[Any]:
    """How far stochastic variants end from EM's optimum, in nats for all the data; ten seeds."""
    n, d, k = 2_000, 2, 3
    x, means = data(n, d, k, 2.0)
    start, x = jaxem_mixture("full", means), jnp.asarray(x)
    best = float(jaxem.fit(start, x, max_steps=5_000).objective)
    rates = functools.partial(jaxem.em.Power, 0.7, 1.0)
    variants = {
        "SEM, 500 steps": (jaxem.EM(jaxem.em.Sampled()), 500),
        "Monte-Carlo EM, draws growing to 100, 100 steps": (
            jaxem.EM(jaxem.em.Sampled(jaxem.em.Linear(1, 1))),
            100,
        ),
        "SAEM, 500 steps": (jaxem.EM(jaxem.em.Sampled(), jaxem.em.Online(rates(200))), 500),
        "SAEM, 5000 steps": (jaxem.EM(jaxem.em.Sampled(), jaxem.em.Online(rates(1_000))), 5_000),
    }
    rows: dict[str, Any] = {}
    for label, (algorithm, steps) in variants.items():
        run = eqx.filter_jit(functools.partial(jaxem.fit, max_steps=size(steps, 20), throw=False))
        ends = [
            best - float(run(start, x, algorithm, key=jax.random.key(seed)).objective)
            for seed in range(size(10, 2))
        ]
        rows[label] = f"median {statistics.median(ends):.3f}, worst {max(ends):.3f}"
    yield "full, float32", {"N": n, "D": d, "K": k}, rows


def trapping_problems() -> dict[str, tuple[Any, Callable[[Any], Any]]]:
    """Data and a random start, where EM is known to be trapped."""
    rng = np.random.default_rng(0)
    centres = np.array([-3.0, 3.0, 15.0])[:, None]
    three = jnp.asarray(centres[rng.integers(0, 3, 900)] + rng.normal(size=(900, 1)))
    side = 3
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), -1).reshape(-1, 2) * 4.0
    nine = jnp.asarray(grid[rng.integers(0, side**2, 900)] + 0.5 * rng.normal(size=(900, 2)))

    def means_at_units(key: Any) -> Any:
        means = jax.random.choice(key, three, (3,), replace=False)
        model = jaxem.Mixture(
            np.full(3, 1 / 3), jaxem.emissions.SphericalGaussian(means, np.ones(3))
        )
        return jaxem.freeze(model, "weights", "components.variance")

    def init(key: Any) -> Any:
        return jaxem.Mixture.init(
            key, nine, side**2, jaxem.emissions.SphericalGaussian, method="random"
        )

    return {
        # Two near, one far, and a lower maximum with one mean for the two: Jin, Zhang,
        # Balakrishnan, Wainwright & Jordan (2016), NeurIPS 29, theorem 1 for three components.
        "unit Gaussians at -3, 3 and 15, free means, K=3": (three, means_at_units),
        f"{side} × {side} grid of spheres, K={side**2}": (nine, init),
    }


def annealing() -> Iterator[Any]:
    """How often fits from the same random starts end at the best maximum that any of them found."""
    starts, max_steps = size((100, 2_000), (10, 100))
    temperatures = ((1.5, 0.9), (2.0, 0.95), (5.0, 0.9), (100.0, 0.95))
    algorithms = {"EM": jaxem.EM()} | {
        f"Annealed, from {first:g} by {factor}": jaxem.EM(
            jaxem.em.Annealed(jaxem.em.Geometric(first, factor))
        )
        for first, factor in temperatures
    }
    with jax.enable_x64(True):
        for name, (x, start) in trapping_problems().items():
            models = eqx.filter_vmap(start)(jax.random.split(jax.random.key(0), starts))
            ends = {
                label: np.asarray(
                    jaxem.fit_restarts(models, x, algorithm, max_steps=max_steps).objective
                )
                for label, algorithm in algorithms.items()
            }
            best = max(np.nanmax(values) for values in ends.values())
            rows: dict[str, Any] = {
                label: f"{np.sum(values > best - 1e-3 * len(x))} of {starts}; median "
                f"{np.nanmedian(best - values) / len(x):.3f} nats per observation below"
                for label, values in ends.items()
            }
            yield f"{name}, float64", {"N": len(x), "starts": starts}, rows


def throughput() -> Iterator[Any]:
    """Rows per second of mini-batch steps, as a share of those of full E-steps."""
    n, d, k, rows_each = size(1_000_000, 20_000), 8, 16, size(20_000, 2_000)
    x, means = data(n, d, k, 2.0)
    model, x = jaxem_mixture("full", means), jnp.asarray(x)
    full, batch = jaxem.EM(), jaxem.EM(accumulation=jaxem.em.Online(batch_size=rows_each))
    steps = n // rows_each
    key = jax.random.key(0)

    @jax.jit
    def pass_of(state: Any) -> Any:
        def one(state: Any, number: Any) -> Any:
            return batch.step(state, x, key=jax.random.fold_in(key, number)), None

        return jax.lax.scan(one, state, jnp.arange(steps))[0]

    whole = eqx.filter_jit(full.step)
    begun, begun_batch = full.init(model, x), batch.init(model, x, key=key)
    rows: dict[str, Any] = interleave(
        {
            "a full step": lambda: whole(begun, x),
            f"{steps} steps of Online(batch_size={rows_each})": lambda: pass_of(begun_batch),
        },
        runs=25,
    )
    _, in_batches = rows.values()
    rows["row throughput, share of full"] = 1 / in_batches["ratio"]
    yield "full, float32", {"N": n, "D": d, "K": k}, rows


def gradient() -> Iterator[Any]:
    """Gradient M-steps: programs compiled in a loop of one's own, and the steps they need."""
    n, max_steps = size((5_000, 1_000), (500, 50))
    x, means = data(n, 4, 4, 2.0)
    model, x = jaxem_mixture("full", means), jnp.asarray(x)
    traces: list[None] = []
    rows: dict[str, Any] = {}
    for label, optimiser in {"L-BFGS": optax.lbfgs(), "Adam(0.02)": optax.adam(0.02)}.items():
        algorithm = jaxem.EM(maximization=jaxem.em.Gradient(optimiser, 5))
        traces.clear()

        @eqx.filter_jit
        def step(state: Any, algorithm: Any = algorithm) -> Any:
            traces.append(None)
            return algorithm.step(state, x)

        state = algorithm.init(model, x)
        for _ in range(10):
            state = step(state)
        found = jaxem.fit(model, x, algorithm, max_steps=max_steps, throw=False)
        rows[f"{label}, programs for 10 steps"] = len(traces)
        rows[f"{label}, steps to converge"] = int(found.num_steps)
    closed = jaxem.fit(model, x, max_steps=max_steps, throw=False)
    rows["closed form, steps to converge"] = int(closed.num_steps)
    yield "full, 5 optimiser steps an M-step, float32", {"N": n, "D": 4, "K": 4}, rows


if __name__ == "__main__":
    main(
        "variants",
        ascent,
        acceleration,
        online,
        incremental,
        sampled,
        annealing,
        throughput,
        gradient,
    )
