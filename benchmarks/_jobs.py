"""One job of `benchmarks.before_after`, in a process of its own: `_jobs.py GROUP NAME`.

It prints a JSON line: the first call (time and processor time), the calls after it, and a number
that the result must share with the other commit's. `jaxem` is the first one on the path. Jobs use
what both commits have; `BEFORE` marks the names of the package before its rebuild, d79c2c0 and
earlier, and goes when nothing that old is compared.
"""

from __future__ import annotations

import functools
import json
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxem
from benchmarks._common import size
from benchmarks._data import clusters, data, gaussian_hmm, jaxem_mixture

BEFORE = "em" not in vars(jaxem)
em: Any = jaxem if BEFORE else jaxem.em
influence: Any = jaxem.influence if BEFORE else jaxem.inference.influence  # pyright: ignore
emissions = jaxem.emissions


class Job(NamedTuple):
    make: Callable[..., Callable[[], Any]]
    given: tuple[Any, ...]
    shapes: dict[str, int]


GROUPS: dict[str, dict[str, Job]] = {
    name: {}
    for name in ("mixtures", "hmm", "gradients", "variants", "small", "restarts", "compile")
}


def online(batch_size: int) -> Any:
    return em.Minibatch(batch_size) if BEFORE else em.Online(batch_size=batch_size)


def covariance_prior(model: Any, strength: Any, covariance: Any) -> Any:
    components = model.components
    if BEFORE:
        own = components.prior(covariance=covariance, covariance_count=strength)
    else:
        own = components.prior({"covariance": strength}, covariance=covariance)
    return model.prior(components=own)


def fixed(model: Any, x: Any, steps: int = 10, *rest: Any, **options: Any) -> Any:
    return jaxem.fit(model, x, *rest, tol=0.0, max_steps=steps, throw=False, **options)


def job(group: str, name: str, make: Callable[..., Any], *given: Any, **shapes: int) -> None:
    """Registers what `make(*given, **shapes)` returns, to be called and timed."""
    GROUPS[group][name] = Job(make, given, shapes)


# Mixtures and chains


def mixture(kind: str, spread: float, n: int, d: int, k: int) -> Callable[[], Any]:
    x, means = data(n, d, k, spread)
    return functools.partial(fixed, jaxem_mixture(kind, means), jnp.asarray(x))


for _kind in ("full", "tied", "diagonal", "spherical"):
    for _distance, _spread in (("close", 3.0), ("far", 300.0)):
        _name, _n = f"{_kind}, {_distance}", size(200_000, 1_000)
        job("mixtures", _name, mixture, _kind, _spread, n=_n, d=16, k=16)


def hmm(b: int, t: int, d: int, k: int) -> Callable[[], Any]:
    x, matrix, means = clusters(b * t, d, k)
    return functools.partial(fixed, gaussian_hmm(matrix, means), jnp.asarray(x.reshape(b, t, d)))


job("hmm", "one sequence", hmm, b=1, t=size(100_000, 200), d=4, k=8)
job("hmm", "many sequences", hmm, b=size(1_000, 5), t=200, d=4, k=8)


# Derivatives


def overlapping(n: int, d: int, k: int, spread: float) -> tuple[Any, Any]:
    x, means = data(n, d, k, spread)
    return jaxem_mixture("full", means), jnp.asarray(x)


def by_data(adjoint: Any, n: int, d: int, k: int, steps: int) -> Callable[[], Any]:
    start, x = overlapping(n, d, k, 4.0)

    @jax.jit
    @jax.grad
    def run(x: Any) -> Any:
        return jnp.sum(fixed(start, x, steps, adjoint=adjoint).model.components.mean ** 2)

    return lambda: run(x)


def by_prior(n: int, d: int, k: int) -> Callable[[], Any]:
    start, x = overlapping(n, d, k, 4.0)

    @jax.jit
    @jax.grad
    def run(strength: Any) -> Any:
        prior = covariance_prior(start, strength, 2 * jnp.eye(d))
        options: Any = dict(prior=prior, max_steps=200, throw=False)
        return jnp.sum(jaxem.fit(start, x, **options).model.components.covariance)

    return lambda: run(10.0)


def influences(n: int, d: int, k: int) -> Callable[[], Any]:
    start, x = overlapping(n, d, k, 3.0)
    solution = jaxem.fit(start, x, max_steps=1_000)
    return lambda: influence(lambda model: model.components.mean[0, 0], solution, x)


N = size(20_000, 500)
job("gradients", "implicit, by data", by_data, em.Implicit(throw=False), n=N, d=2, k=3, steps=50)
job("gradients", "unrolled, by data", by_data, em.Unrolled(), n=N, d=2, k=3, steps=50)
job("gradients", "implicit, by prior", by_prior, n=N, d=4, k=4)
job("gradients", "influence", influences, n=size(100_000, 500), d=4, k=4)


# Variants


def variant(make: Callable[[], Any], n: int, d: int, k: int, steps: int) -> Callable[[], Any]:
    model, x = overlapping(n, d, k, 2.0)
    return functools.partial(fixed, model, x, steps, make(), key=jax.random.key(0))


def log_joint(n: int, k: int) -> Callable[[], Any]:
    x = jnp.asarray(data(n, 1, k, 3.0)[0])

    def log_joint(params: Any, x: Any) -> Any:
        logs = jax.scipy.stats.logistic.logpdf(x, params["centre"], jnp.exp(params["scale"]))
        return jax.nn.log_softmax(params["logits"]) + logs

    params = {"logits": jnp.zeros(k), "centre": jnp.linspace(-1, 1, k), "scale": jnp.zeros(())}
    return functools.partial(fixed, jaxem.from_log_joint(log_joint, params), x)


# Steps and observations differ, so that each takes about as long.
VARIANTS: dict[tuple[int, int], dict[str, Callable[[], Any]]] = {
    (10, size(50_000, 500)): {
        "hard": lambda: jaxem.EM(em.Hard()),
        "tempered": lambda: jaxem.EM(em.Tempered(2.0)),
        "annealed": lambda: jaxem.EM(em.Annealed(em.Geometric(5.0, 0.9))),
        "sampled": lambda: jaxem.EM(em.Sampled()),
        "SQUAREM": jaxem.SQUAREM,
        "Anderson": jaxem.Anderson,
        "Overrelaxed": em.Overrelaxed,
    },
    (50, size(50_000, 500)): {
        "mini-batches": lambda: jaxem.EM(accumulation=online(size(2_000, 100))),
        "incremental": lambda: jaxem.EM(accumulation=em.Incremental(10)),
    },
    (10, size(5_000, 501)): {
        "gradient, Adam": lambda: jaxem.EM(maximization=em.Gradient(optax.adam(0.02), 5)),
        "conditional": lambda: jaxem.EM(
            maximization=em.Conditional(
                (("weights", "components.covariance"), em.ClosedForm()),
                ("components.mean", em.ClosedForm()),
            )
        ),
    },
}
for (_steps, _n), _makes in VARIANTS.items():
    for _name, _make in _makes.items():
        job("variants", _name, variant, _make, n=_n, d=8, k=8, steps=_steps)


def line_searches(n: int, d: int, k: int, steps: int, repeats: int) -> Callable[[], Any]:
    """Near a maximum, rounding decides how long a line search goes on: several data even it out."""
    model, x = overlapping(n, d, k, 2.0)
    noise = np.random.default_rng(0).normal(scale=1e-3, size=(repeats, *x.shape))
    algorithm = jaxem.EM(maximization=em.Gradient(optax.lbfgs(), 5))
    data = [x + jnp.asarray(own, x.dtype) for own in noise]
    return lambda: [fixed(model, own, steps, algorithm) for own in data]


_sizes = dict(n=size(5_000, 501), steps=10, repeats=size(10, 2))
job("variants", "gradient, L-BFGS", line_searches, d=8, k=8, **_sizes)
job("variants", "log-joint", log_joint, n=size(50_000, 500), k=2)


# Small fits, where dispatch takes the time; and restarts


def small(jitted: bool, n: int, d: int, k: int, fits: int) -> Callable[[], Any]:
    model, x = overlapping(n, d, k, 2.0)
    run = functools.partial(fixed, x=x)
    one = jax.jit(run) if jitted else run
    return lambda: [one(model) for _ in range(fits)]


def small_hmm(t: int, d: int, k: int, fits: int) -> Callable[[], Any]:
    x, matrix, means = clusters(t, d, k)
    model, x = gaussian_hmm(matrix, means), jnp.asarray(x)[None]
    return lambda: [fixed(model, x) for _ in range(fits)]


job("small", "fit", small, False, n=400, d=2, k=2, fits=20)
job("small", "jit(fit)", small, True, n=400, d=2, k=2, fits=20)
job("small", "fit of an HMM", small_hmm, t=400, d=2, k=2, fits=20)


def restarts(loop: bool, n: int, d: int, k: int, starts: int, steps: int) -> Callable[[], Any]:
    x = jnp.asarray(data(n, d, k, 2.0)[0])
    keys = jax.random.split(jax.random.key(0), starts)
    models = jax.vmap(lambda key: jaxem.Mixture.init(key, x, k, emissions.Gaussian))(keys)
    if not loop:
        return lambda: jaxem.fit_restarts(models, x, tol=0.0, max_steps=steps)
    one = jax.jit(lambda model: fixed(model, x, steps))
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], models) for i in range(starts)]
    return lambda: [one(model) for model in each]


for _name, _loop in (("fit_restarts", False), ("loop over jit(fit)", True)):
    _sizes = dict(starts=size(100, 10), steps=size(200, 10))
    job("restarts", _name, restarts, _loop, n=2_000, d=2, k=4, **_sizes)


# The first fit, model and all, in a fresh process


def first_fit(
    build: Callable[[], Any], look: Callable[[np.ndarray], Any] | None = None, *, n: int, d: int
) -> Callable[[], Any]:
    x = data(n, d, 2, 3.0)[0]
    x = jax.block_until_ready(jnp.asarray(x if look is None else look(x)))
    return lambda: jaxem.fit(build(), x, max_steps=50, throw=False)


def mixed(emission: Any) -> jaxem.Mixture:
    return jaxem.Mixture([0.5, 0.5], emission)


def chained(emission: Any) -> jaxem.HMM:
    return jaxem.HMM([0.5, 0.5], [[0.9, 0.1], [0.2, 0.8]], emission)


def positive(x: np.ndarray) -> np.ndarray:
    return np.abs(x) + np.float32(0.1)


def counts(x: np.ndarray) -> np.ndarray:
    return np.round(3 * positive(x))


def cut(x: np.ndarray) -> np.ndarray:
    return x.reshape(4, -1, x.shape[1])


MEAN = np.array([[0.0, 0.0], [2.0, 2.0]], np.float32)
RATE, ONE = MEAN + 1, np.ones((2, 2), np.float32)
EYE = np.broadcast_to(np.eye(2, dtype=np.float32), (2, 2, 2))
FIRST: dict[str, tuple[Callable[..., Any], ...]] = {
    "Gaussian": (lambda: mixed(emissions.Gaussian(MEAN, EYE)),),
    "TiedGaussian": (lambda: mixed(emissions.TiedGaussian(MEAN, EYE[0])),),
    "DiagonalGaussian": (lambda: mixed(emissions.DiagonalGaussian(MEAN, ONE)),),
    "SphericalGaussian": (lambda: mixed(emissions.SphericalGaussian(MEAN, ONE[0])),),
    "StudentT": (lambda: mixed(emissions.StudentT(MEAN, EYE, [5.0, 5.0])),),
    "Poisson": (lambda: mixed(emissions.Poisson(RATE)), counts),
    "NegativeBinomial": (lambda: mixed(emissions.NegativeBinomial(RATE, RATE + 1)), counts),
    "Bernoulli": (
        lambda: mixed(emissions.Bernoulli([[0.3, 0.4], [0.6, 0.7]])),
        lambda x: (x > 0).astype(np.float32),
    ),
    "Exponential": (lambda: mixed(emissions.Exponential(RATE)), positive),
    "Gamma": (lambda: mixed(emissions.Gamma(RATE, RATE)), positive),
    "HMM, Gaussian": (lambda: chained(emissions.Gaussian(MEAN, EYE)), cut),
    "HMM, Poisson": (lambda: chained(emissions.Poisson(RATE)), lambda x: cut(counts(x))),
}
for _name, _parts in FIRST.items():
    job("compile", _name, first_fit, *_parts, n=400, d=2)


def checksum(result: Any) -> float:
    """A number that does not depend on how a result is arranged."""
    while isinstance(result, list):
        result = result[-1]
    if isinstance(result, jaxem.Solution):
        result = result.objective
    return float(np.linalg.norm(np.asarray(result, np.float64).ravel()))


def main(group: str, name: str) -> None:
    make, given, shapes = GROUPS[group][name]
    run = make(*given, **shapes)

    def timed() -> tuple[float, float, Any]:
        wall, own = time.perf_counter(), time.process_time()
        result = jax.block_until_ready(run())
        return time.perf_counter() - wall, time.process_time() - own, result

    first, first_own, result = timed()
    times = [timed()[0] for _ in range(size(6, 2))][1:]
    measured = {"first": first, "processor": first_own, "times": times, "value": checksum(result)}
    print(json.dumps(measured | {"jaxem": jaxem.__file__}))


if __name__ == "__main__":
    main(*(word for word in sys.argv[1:] if word != "--tiny"))
