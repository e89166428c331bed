"""Random fits, and whether what they say of themselves is true.

    python -m benchmarks.fuzz --fits 100000 --seed 1 [--only gaussian,poisson]

Every lane is a small data set of a random kind (units, offsets, outliers, copies, collinear and
constant columns, clusters far apart, few observations), a random start and one algorithm. A lie is

- `nan`: a number in the returned model is not finite, and the result is not `nonfinite`;
- `objective`: the objective is not the one recomputed from the returned model;
- `plateau`: `converged`, and EM in float64 from there, over ten times as many steps, gains more
  than 1e-3 nats for each observation;
- `decreased`: EM with exact sums, and the objective is said to have fallen;
- `float64`: the objective per observation is another in float64, relative to its size.

Counts per outcome are printed, and each lie with the seed that repeats it.
"""

import argparse
import collections
import functools
import time

import jax

jax.config.update("jax_enable_x64", True)

import equinox as eqx  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import jaxem  # noqa: E402
from jaxem import emissions as em  # noqa: E402

LANES = 128
N = 40
GAIN = 1e-3


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
    kind = rng.integers(0, 9, lanes)
    for lane, what in enumerate(kind):
        if what == 1:
            x[lane] *= 10 ** rng.uniform(-8, 8)
        if what == 2:
            x[lane] += 10 ** rng.uniform(0, 3)
        if what == 3:
            x[lane, 0] = 10 ** rng.uniform(1, 4)
        if what == 4:
            x[lane, N // 2 :] = x[lane, : N - N // 2]
        if what == 5:
            x[lane, :, 1] = 2 * x[lane, :, 0] + 10 ** rng.uniform(-4, -1) * x[lane, :, 1]
        if what == 6:
            x[lane] = np.round(x[lane])
        if what == 7:
            x[lane] *= 10 ** rng.uniform(-3, 3, 2)
        if what == 8:
            x[lane, :5] += 10 ** rng.uniform(2, 4)
    return x


def positive(rng, lanes):
    shape = 10 ** rng.uniform(-0.5, 1, (lanes, 1, 1))
    scale = 10 ** rng.uniform(-2, 2, (lanes, 1, 1)) * 10 ** rng.uniform(0, 1.5, (lanes, N, 1)) ** (
        rng.integers(0, 2, (lanes, N, 1))
    )
    return np.maximum(rng.gamma(shape, 1.0, (lanes, N, 2)) * scale, 1e-6)


def numbers(rng, lanes):
    rate = 10 ** rng.uniform(-1, 3, (lanes, 1, 1)) * np.where(
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


FAMILIES = {
    "gaussian": (em.Gaussian, measurements),
    "tied": (em.TiedGaussian, measurements),
    "diagonal": (em.DiagonalGaussian, measurements),
    "spherical": (em.SphericalGaussian, measurements),
    "student-t": (em.StudentT, measurements),
    "poisson": (em.Poisson, numbers),
    "negative-binomial": (em.NegativeBinomial, numbers),
    "bernoulli": (em.Bernoulli, bits),
    "categorical": (functools.partial(em.Categorical, num_categories=3), codes),
    "exponential": (em.Exponential, positive),
    "gamma": (em.Gamma, positive),
}
ALGORITHMS = {
    "EM": jaxem.EM(),
    "SQUAREM": jaxem.SQUAREM(),
    "Anderson": jaxem.Anderson(),
}


def cast(tree, dtype):
    def one(leaf):
        floating = eqx.is_array(leaf) and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(dtype) if floating else leaf

    return jax.tree.map(one, tree)


@functools.lru_cache(None)
def program(family, algorithm, k):
    """Fits of all lanes from starts of their own."""

    @eqx.filter_jit
    @functools.partial(eqx.filter_vmap, in_axes=(0, 0))
    def run(key, x):
        start = jaxem.Mixture.init(key, x, k, FAMILIES[family][0])
        solution = jaxem.fit(start, x, ALGORITHMS[algorithm], throw=False, max_steps=300)
        again = jnp.sum(solution.model.log_prob(x))
        return solution, again

    return run


@functools.lru_cache(None)
def continued():
    @eqx.filter_jit
    @functools.partial(eqx.filter_vmap, in_axes=(0, 0))
    def run(model, x):
        return jaxem.fit(model, x, tol=1e-13, throw=False, max_steps=3000)

    return run


def finite(model):
    """Whether every number in the model of each lane is finite."""
    leaves = [leaf for leaf in jax.tree.leaves(eqx.filter(model, eqx.is_inexact_array))]
    flags = [np.isfinite(np.asarray(leaf)).reshape(len(leaf), -1).all(1) for leaf in leaves]
    return np.all(flags, axis=0)


def batch(family, algorithm, dtype, k, seed):
    """Outcomes of one program's lanes, and the lies among them."""
    rng = np.random.default_rng([seed, k])
    raw = FAMILIES[family][1](rng, LANES)
    x = jnp.asarray(raw.astype(dtype) if raw.dtype.kind == "f" else raw)
    keys = jax.random.split(jax.random.key(seed), LANES)
    solution, again = program(family, algorithm, k)(keys, x)
    status = np.asarray(solution.status)
    objective = np.asarray(solution.objective, float)
    eps = np.finfo(dtype).eps
    lies = {}
    lies["nan"] = ~finite(solution.model) & (status != "nonfinite")
    size = np.abs(objective) + N
    lies["objective"] = (status != "nonfinite") & ~(
        np.abs(objective - np.asarray(again, float)) <= 3e4 * eps * size
    )
    lies["decreased"] = status == "decreased"
    ended = status == "converged"
    further = continued()(cast(solution.model, float), cast(x, float))
    base = np.asarray(again64(solution.model, x))
    gain = (np.asarray(further.objective) - base) / N
    lies["plateau"] = ended & (gain > GAIN)
    lies["float64"] = (status != "nonfinite") & (
        np.abs(objective - base) / N > GAIN * np.maximum(1, size / N)
    )
    info = {
        "gain": gain,
        "steps": np.asarray(solution.num_steps),
        "error": np.asarray(solution.error),
    }
    return status, lies, info


@eqx.filter_jit
@functools.partial(eqx.filter_vmap, in_axes=(0, 0))
def again64(model, x):
    return jnp.sum(cast(model, float).log_prob(cast(x, float)))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fits", type=int, default=20_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default=",".join(FAMILIES))
    parser.add_argument("--algorithms", default="EM")
    parser.add_argument("--dtypes", default="float32")
    given = parser.parse_args()
    names = given.only.split(",")
    jobs = [
        (family, algorithm, dtype, k)
        for family in names
        for algorithm in given.algorithms.split(",")
        for dtype in given.dtypes.split(",")
        for k in (2, 3)
    ]
    rounds = max(1, given.fits // (LANES * len(jobs)))
    outcomes, lies = collections.defaultdict(collections.Counter), collections.Counter()
    for job in jobs:
        begun = time.time()
        for r in range(rounds):
            seed = given.seed + r
            status, found, info = batch(*job, seed)
            outcomes[job[:3]].update(status.tolist())
            for lie, where in found.items():
                lies[(*job[:3], lie)] += int(where.sum())
                for lane in np.flatnonzero(where)[:3]:
                    own = ", ".join(f"{name} {values[lane]:.3g}" for name, values in info.items())
                    print(
                        f"  {lie}: {job} seed {seed} lane {lane}: {status[lane]}, {own}", flush=True
                    )
        print(f"{job}: {rounds * LANES} fits in {time.time() - begun:.0f} s", flush=True)
    for job, counts in outcomes.items():
        print(*job, dict(counts), {k[-1]: v for k, v in lies.items() if k[:3] == job and v})


if __name__ == "__main__":
    main()
