"""Derivatives of fits: `python -m benchmarks.gradients [section …] [--tiny]`.

Sections: implicit, unrolled, influence, memory (default: all). The cost of the implicit gradient is
given in E-steps and as a share of the fit that it differentiates; the products with the Jacobian
that its Krylov solver makes are counted by it.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp

import jaxem
from benchmarks._common import PEAK, interleave, main, python, size
from benchmarks._data import data, jaxem_mixture

products: list[int] = []


class Counted(jaxem.em.GCR):
    """The default solver, telling how many products it made."""

    def compute(self, state, vector, options):
        found, result, stats = super().compute(state, vector, options)
        jax.debug.callback(lambda n: products.append(int(n)), stats["num_steps"])
        return found, result, stats


def overlapping(n: int, d: int, k: int, spread: float = 1.3) -> tuple[jaxem.Mixture, jax.Array]:
    """A start, and clusters so close that EM needs hundreds of steps."""
    x, means = data(n, d, k, spread)
    return jaxem_mixture("full", means), jnp.asarray(x)


def after_fit(
    model: Any, x: jax.Array, sample_weight: jax.Array, adjoint: Any = jaxem.em.Implicit()
) -> Any:
    """A number that depends on all of a fit that is done: no step is taken."""
    options: Any = dict(sample_weight=sample_weight, max_steps=0, adjoint=adjoint, throw=False)
    return jnp.sum(jaxem.fit(model, x, **options).model.components.mean ** 2)


def implicit() -> Iterator[Any]:
    n, d, k = size(20_000, 1_000), 8, 8
    start, x = overlapping(n, d, k)
    sample_weight = jnp.ones(n, x.dtype)
    fit = jax.jit(lambda m: jaxem.fit(m, x, sample_weight=sample_weight, max_steps=3000))
    solution = fit(start)
    model = solution.model
    e_step = jax.jit(lambda m: m.e_step(x, sample_weight)[1])
    algorithm = jaxem.EM()

    def em_map(m: Any) -> Any:
        statistics, _ = m.e_step(x, sample_weight)
        return jax.tree.leaves(algorithm.maximization(statistics, None, None, float(n))[0])

    @jax.jit
    def em_map_vjp(m: Any) -> Any:
        value, pull = jax.vjp(em_map, m)
        return pull(value)

    counted = jaxem.em.Implicit(Counted())
    jax.block_until_ready(jax.grad(lambda w: after_fit(model, x, w, counted))(sample_weight))
    jax.effects_barrier()
    krylov = sum(products)
    gradient = jax.jit(jax.grad(lambda w: after_fit(model, x, w)))
    value = jax.jit(lambda w: after_fit(model, x, w))
    rows = interleave(
        {
            "E-step": lambda: e_step(model),
            "EM map": lambda: jax.jit(em_map)(model),
            "vjp of the EM map": lambda: em_map_vjp(model),
            "fit": lambda: fit(start),
            "a fit of no steps": lambda: value(sample_weight),
            "implicit gradient of it": lambda: gradient(sample_weight),
        }
    )
    one = rows["E-step"]["median_s"]
    cost = rows["implicit gradient of it"]["median_s"] - rows["a fit of no steps"]["median_s"]
    results: dict[str, Any] = {
        "steps of the fit": int(solution.num_steps),
        "products with the Jacobian": krylov,
        "gradient alone, in E-steps": cost / one,
        "bar: (products + 3) × 4 E-steps": (krylov + 3) * 4,
        "gradient alone / fit": cost / rows["fit"]["median_s"],
    }
    yield "full, float32", {"N": n, "D": d, "K": k}, rows | results


def unrolled() -> Iterator[Any]:
    n, d, k, steps = 2_000, 2, 3, size(1_000, 100)
    start, x = overlapping(n, d, k, spread=4.0)  # converged long before: the two agree
    sample_weight = jnp.ones(n, x.dtype)

    def gradient(adjoint: Any) -> Any:
        def value(w):
            options: Any = dict(
                sample_weight=w, tol=0.0, max_steps=steps, adjoint=adjoint, throw=False
            )
            return jnp.sum(jaxem.fit(start, x, **options).model.components.mean ** 2)

        return jax.jit(jax.value_and_grad(value))

    contenders = {
        "fit and implicit gradient": gradient(jaxem.em.Implicit(throw=False)),
        "fit and unrolled gradient": gradient(jaxem.em.Unrolled()),
    }
    rows: dict[str, Any] = interleave(
        {name: functools.partial(run, sample_weight) for name, run in contenders.items()}
    )
    (_, a), (_, b) = (run(sample_weight) for run in contenders.values())
    rows["largest difference, relative"] = float(jnp.max(jnp.abs(a - b)) / jnp.max(jnp.abs(b)))
    yield f"full, {steps} steps, float32", {"N": n, "D": d, "K": k}, rows


def influence() -> Iterator[Any]:
    n, d, k = size(100_000, 1_000), 4, 4
    start, x = overlapping(n, d, k)
    fit = jax.jit(lambda m: jaxem.fit(m, x, max_steps=3000))
    solution = fit(start)

    def first_mean(model: jaxem.Mixture) -> jax.Array:
        return model.components.mean[0, 0]  # pyright: ignore[reportAttributeAccessIssue]

    rows = interleave(
        {
            "fit": lambda: fit(start),
            "influence of every observation": lambda: jaxem.inference.influence(
                first_mean, solution, x
            ),
        }
    )
    rows["steps of the fit"] = int(solution.num_steps)
    yield "full, float32", {"N": n, "D": d, "K": k}, rows


MEMORY = f"""
{PEAK}
import jax, jax.numpy as jnp, jaxem
from benchmarks._common import size
from benchmarks.gradients import after_fit, overlapping
n, d, k = size(100_000, 2_000), 32, size(64, 4)
model, x = overlapping(n, d, k)
sample_weight = jnp.ones(n, x.dtype)
adjoint = jaxem.em.Implicit(jaxem.em.GCR(max_steps=10), throw=False)  # memory, not accuracy
gradient = jax.jit(jax.grad(lambda x, w: after_fit(model, x, w, adjoint), argnums=(0, 1)))
gradient = gradient.lower(x, sample_weight).compile()
before = peak()
jax.block_until_ready(gradient(x, sample_weight))
statistics = k * (3 + d + d * d)
print(peak() - before, before, 2 * jaxem.em.GCR().basis * statistics * 4 / 2**20, n, k)
"""

STEPS = """
import jax, jax.numpy as jnp, jaxem
from benchmarks._common import size
from benchmarks.gradients import overlapping
model, x = overlapping(size(20_000, 1_000), 8, 8)
sample_weight = jnp.ones(len(x), x.dtype)
for adjoint in (jaxem.em.Implicit(), jaxem.em.Unrolled()):
    for steps in (100, 10_000):
        options = dict(max_steps=steps, adjoint=adjoint)
        fit = lambda w: jaxem.fit(model, x, sample_weight=w, **options).objective
        compiled = jax.jit(jax.grad(fit)).lower(sample_weight).compile()
        print(compiled.memory_analysis().temp_size_in_bytes / 2**20)
"""


def memory() -> Iterator[Any]:
    extra, before, basis, n, k = python(MEMORY)
    names = ("implicit, 100 steps", "implicit, 10,000 steps")
    names += ("unrolled, 100 steps", "unrolled, 10,000 steps")
    rows: dict[str, Any] = {
        "peak beyond data and program, MB": round(extra, 1),
        "of which Krylov basis, MB": round(basis, 1),
        "before, MB": round(before, 1),
    }
    rows |= {f"buffers, {n}, MB": round(v, 2) for n, v in zip(names, python(STEPS), strict=True)}
    shapes = {"N": int(n), "D": 32, "K": int(k)}
    yield "gradient by data and weights, full, float32", shapes, rows


if __name__ == "__main__":
    main("gradients", implicit, unrolled, influence, memory)
