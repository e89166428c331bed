"""Random fits, and whether what they say of themselves is true.

    python -m benchmarks.fuzz --fits 1000000 --seed 1 [--only gaussian,poisson] [--algorithms EM]

Every lane is a small data set of a random kind (units, offsets, outliers, copies, collinear and
constant columns, clusters far apart, observations of weight 0 or nearly so), a random start and one
algorithm; lanes share a compiled program. A lie is

- `nan`: a number in the returned model is not finite, and the result is not `nonfinite`;
- `objective`: the objective is not the one recomputed from the returned model;
- `plateau`: `converged`, and EM in float64 from there, over five times as many steps, gains more
  than 1e-3 nats for each observation;
- `decreased`: EM with exact sums, and the objective is said to have fallen;
- `float64`: a sound fit's objective per observation is another in float64, relative to its size;

and of five steps of EM from one start, again relative to the size of the objective,

- `weights`: weight 2 is not the observation twice;
- `order`: the order of observations or components changes the objective;
- `units`: other units or another origin of the data change it by more than their Jacobian.

Counts per outcome are printed and recorded, and each lie printed with the seed that repeats it.
"""

import argparse
import collections
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax

jax.config.update("jax_enable_x64", True)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jaxem  # noqa: E402
from benchmarks._common import record  # noqa: E402
from jaxem import emissions as em  # noqa: E402

LANES = 512
N = 40
GAIN = 1e-3

# Data, as (lanes, N, …), and weights


def clusters(rng, lanes, d=2):
    """Unit clusters, between on top of each other and far apart."""
    gap = 10 ** rng.uniform(-1, 1.5, (lanes, 1, 1))
    side = rng.integers(0, 3, (lanes, N, 1))
    own = 10 ** rng.uniform(-1, 0.5, (lanes, 3, d))
    spread = np.take_along_axis(own, np.broadcast_to(side, (lanes, N, d)), axis=1)
    direction = rng.normal(size=(lanes, 1, d))
    return side * gap * direction + spread * rng.normal(size=(lanes, N, d))


def measurements(rng, lanes):
    """Clusters, with what data in use have."""
    x = clusters(rng, lanes)
    for lane, what in enumerate(rng.integers(0, 11, lanes)):
        if what == 1:
            x[lane] *= 10 ** rng.uniform(-8, 8)
        if what == 2:
            x[lane] += 10 ** rng.uniform(0, 4)
        if what == 3:
            x[lane, 0] = 10 ** rng.uniform(1, 4)
        if what == 4:
            x[lane, N // 2 :] = x[lane, : N - N // 2]
        if what == 5:
            x[lane, :, 1] = 2 * x[lane, :, 0] + 10 ** rng.uniform(-4, -1) * x[lane, :, 1]
        if what == 6:
            x[lane] = np.round(x[lane])
        if what == 7:
            x[lane] *= 10 ** rng.uniform(-4, 4, 2)
        if what == 8:
            x[lane, :5] += 10 ** rng.uniform(2, 4)
        if what == 9:
            x[lane, :, 1] = 10 ** rng.uniform(-2, 3)
    return x


def positive(rng, lanes):
    shape = 10 ** rng.uniform(-0.5, 1, (lanes, 1, 1))
    scale = 10 ** rng.uniform(-4, 4, (lanes, 1, 1)) * 10 ** rng.uniform(0, 1.5, (lanes, N, 1)) ** (
        rng.integers(0, 2, (lanes, N, 1))
    )
    return np.maximum(rng.gamma(shape, 1.0, (lanes, N, 2)) * scale, 1e-8)


def numbers(rng, lanes):
    rate = 10 ** rng.uniform(-1, 4, (lanes, 1, 1)) * np.where(
        rng.random((lanes, N, 1)) < 0.5, 1, rng.uniform(1, 10, (lanes, 1, 1))
    )
    return rng.poisson(rate * np.ones(2)).astype(float)


def bits(rng, lanes):
    chance = np.where(
        rng.random((lanes, N, 1)) < 0.5, rng.random((lanes, 1, 4)), rng.random((lanes, 1, 4))
    )
    return (rng.random((lanes, N, 4)) < chance**2).astype(float)


def codes(rng, lanes):
    return rng.binomial(2, bits(rng, lanes) * 0.4 + 0.3).astype(int)


def pairs(rng, lanes):
    """Inputs, nearly collinear in places, and a response on one of two planes."""
    u = measurements(rng, lanes)
    slope = rng.normal(size=(lanes, 2, 2)) / np.maximum(np.abs(u).max(1, keepdims=True), 1e-30)
    line = np.einsum("lnd,lkd->lnk", u, slope)
    which = rng.integers(0, 2, (lanes, N, 1))
    return u, np.take_along_axis(line, which, 2) + 0.1 * rng.normal(size=(lanes, N, 1))


def counted_pairs(rng, lanes):
    u, y = pairs(rng, lanes)
    return u, rng.poisson(np.exp(np.clip(y, -3, 3))).astype(float)


def cut(make):
    """Data as ten sequences of four steps."""

    def sequences(rng, lanes):
        x = make(rng, lanes)
        return x.reshape(lanes, 10, N // 10, x.shape[-1])

    return sequences


def weights(rng, lanes, n):
    """How often each observation counts: once; 0, 1 or 2 times; hardly; or most of them never."""
    w = np.ones((lanes, n))
    for lane, what in enumerate(rng.integers(0, 8, lanes)):
        if what == 1:
            w[lane] = rng.integers(0, 3, n)
        if what == 2:
            w[lane, : n // 4] = 10 ** rng.uniform(-6, -1)
        if what == 3:
            w[lane, 6:] = 0
        if what == 4:
            w[lane] = rng.uniform(0, 10, n)
    w[:, 0] = 1
    return w


# Cases


@dataclasses.dataclass(frozen=True)
class Case:
    """A family, its data, the model of which it is a part, and whether units are free."""

    family: Any
    data: Callable[[np.random.Generator, int], Any]
    model: Any = jaxem.Mixture
    units: bool = False


CASES = {
    "gaussian": Case(em.Gaussian, measurements, units=True),
    "tied": Case(em.TiedGaussian, measurements, units=True),
    "diagonal": Case(em.DiagonalGaussian, measurements, units=True),
    "spherical": Case(em.SphericalGaussian, measurements, units=True),
    "student-t": Case(em.StudentT, measurements, units=True),
    "poisson": Case(em.Poisson, numbers),
    "negative-binomial": Case(em.NegativeBinomial, numbers),
    "bernoulli": Case(em.Bernoulli, bits),
    "categorical": Case(functools.partial(em.Categorical, num_categories=3), codes),
    "exponential": Case(em.Exponential, positive),
    "gamma": Case(em.Gamma, positive),
    "linear-regression": Case(em.LinearRegression, pairs),
    "poisson-regression": Case(em.PoissonRegression, counted_pairs),
    "hmm-gaussian": Case(em.Gaussian, cut(measurements), jaxem.HMM, units=True),
    "hmm-poisson": Case(em.Poisson, cut(numbers), jaxem.HMM),
}
ALGORITHMS = {
    "EM": jaxem.EM(),
    "SQUAREM": jaxem.SQUAREM(),
    "Anderson": jaxem.Anderson(),
    "Overrelaxed": jaxem.em.Overrelaxed(),
    "Incremental": jaxem.EM(accumulation=jaxem.em.Incremental(5)),
    "Online": jaxem.EM(accumulation=jaxem.em.Online(batch_size=10)),
    "Hard": jaxem.EM(jaxem.em.Hard()),
}


def cast(tree, dtype):
    def one(leaf):
        floating = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(one, tree)


# Programs, each compiled once for all lanes


def lanes(function):
    return eqx.filter_jit(eqx.filter_vmap(function))


@functools.lru_cache(None)
def start(case, k):
    given = CASES[case]

    def run(key, x, w):
        return given.model.init(key, x, k, given.family, sample_weight=w)

    return lanes(run)


@functools.lru_cache(None)
def fits(algorithm, max_steps=300, tol=None):
    """Fits, and the objective recomputed from their models."""

    def run(model, x, w, key):
        problem = jaxem.em.Problem(x, w)
        found = jaxem.fit(
            model,
            problem,
            ALGORITHMS[algorithm],
            key=key,
            tol=tol,
            max_steps=max_steps,
            throw=False,
        )
        posterior = jaxem.em.Hard() if algorithm == "Hard" else jaxem.em.Exact()
        _, again = found.model.e_step(x, w, posterior=posterior)
        return found, again

    return lanes(run)


def finite(model):
    """Whether every number in the model of each lane is finite."""
    leaves = jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))
    flags = [np.isfinite(np.asarray(leaf)).reshape(len(leaf), -1).all(1) for leaf in leaves]
    return np.all(flags, axis=0)


def batch(case, algorithm, dtype, k, seed):
    """Outcomes of one program's lanes, the lies among them, and what is known of each lane."""
    rng = np.random.default_rng([seed, k])
    x = jax.tree.map(jnp.asarray, cast(CASES[case].data(rng, LANES), dtype))
    w = jnp.asarray(weights(rng, LANES, jax.tree.leaves(x)[0].shape[1]).astype(dtype))
    keys = jax.random.split(jax.random.key(seed), LANES)
    model = start(case, k)(keys, x, w)
    found, again = fits(algorithm)(model, x, w, keys)
    status = np.asarray(found.status)
    objective, again = np.asarray(found.objective, float), np.asarray(again, float)
    known = ~np.isin(status, ["nonfinite", "invalid_data", "invalid_sample_weight"])
    total = np.asarray(jnp.sum(w, axis=1), float)
    size = np.abs(objective) + total
    lies = {"nan": known & ~finite(found.model)}
    lies["objective"] = known & ~(
        np.abs(objective - again) <= 3e4 * float(jnp.finfo(dtype).eps) * size
    )
    lies["decreased"] = status == "decreased"

    wide = cast((found.model, x, w), float)
    climber = "Hard" if algorithm == "Hard" else "EM"
    further, _ = fits(climber, 1500, 1e-13)(*wide, keys)
    base = np.asarray(further.history[:, 0])
    gain = (np.asarray(further.objective) - base) / total
    lies["plateau"] = (status == "converged") & (gain > GAIN)
    sound = np.isin(status, ["converged", "max_steps_reached"])
    lies["float64"] = sound & ~(np.abs(objective - base) <= GAIN * size)
    if algorithm == "EM":
        same = equalities(case, model, x, w, keys, k, total)
        lies |= {lie: sound & where for lie, where in same.items()}
    info = {"gain": gain, "steps": np.asarray(found.num_steps), "error": np.asarray(found.error)}
    return status, lies, info


def equalities(case, model, x, w, keys, k, total):
    """Lanes in which five steps from equivalent starts on equivalent data differ."""

    def five(model, x, w):
        return np.asarray(fits("EM", 5, 0.0)(model, x, w, keys)[0].objective, float)

    first = five(model, x, w)
    size = GAIN * (np.abs(first) + total)

    def differ(other):
        both = np.isfinite(first) & np.isfinite(other)
        return both & (np.abs(other - first) > size)

    rng = np.random.default_rng(k)
    order, back = rng.permutation(w.shape[1]), np.roll(np.arange(k), 1)
    turned = eqx.filter_vmap(lambda m: jaxem.models.reorder(m, back))(model)
    lies = {"order": differ(five(turned, *jax.tree.map(lambda a: a[:, order], (x, w))))}

    twice = jax.tree.map(lambda a: jnp.concatenate([a, a], axis=1), x)
    halves = jnp.concatenate([w, w], axis=1)
    lies["weights"] = differ(five(model, twice, halves) / 2)
    if CASES[case].units:
        unit, origin = 1024.0, 3.0
        moved = unit * (x + origin * jnp.std(x, axis=1, keepdims=True))
        steps = np.asarray(total) * (x[0].size // w.shape[1]) * np.log(unit)
        lies["units"] = differ(five(start(case, k)(keys, moved, w), moved, w) + steps)
    return lies


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(CASES))
    parser.add_argument("--algorithms", default="EM,SQUAREM,Anderson")
    parser.add_argument("--dtypes", default="float32")
    parser.add_argument("--components", default="3")
    given = parser.parse_args()
    jobs = [
        (case, algorithm, dtype, k)
        for case in given.only.split(",")
        for algorithm in given.algorithms.split(",")
        for dtype in given.dtypes.split(",")
        for k in map(int, given.components.split(","))
    ]
    rounds = max(1, given.fits // (LANES * len(jobs)))
    for job in jobs:
        begun, outcomes, lies = time.time(), collections.Counter(), collections.Counter()
        steps = []
        for seed in range(given.seed, given.seed + rounds):
            status, found, info = batch(*job, seed)
            outcomes.update(status.tolist())
            steps.append(info["steps"])
            for lie, where in found.items():
                lies[lie] += int(where.sum())
                for lane in np.flatnonzero(where)[:3]:
                    own = ", ".join(f"{name} {values[lane]:.3g}" for name, values in info.items())
                    print(f"  {lie}: {job} seed {seed} lane {lane}: {status[lane]}, {own}")
        case, algorithm, dtype, k = job
        rows = dict(outcomes) | {f"lie: {lie}": count for lie, count in lies.items() if count}
        rows |= {"median steps": float(np.median(np.concatenate(steps)))}
        rows |= {"seconds": round(time.time() - begun)}
        shapes = {"fits": rounds * LANES, "N": N, "K": k, "seed": given.seed}
        record("fuzz", case, f"{algorithm}, {dtype}", shapes, rows)


if __name__ == "__main__":
    main()
