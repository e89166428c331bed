"""One data set, every variant of EM: where each ends, and at what cost.

Three overlapping groups of counts. The table gives how far below the optimum of EM each variant
ends, and about how many E-steps it took (those of the first and the last state are not counted);
hard EM climbs another objective, the classification likelihood, which lies lower. The picture gives
the way there, against E-steps and time; online estimates may lie above the optimum, and are then
not drawn. Run `python examples/variants.py [picture.png]`.
"""

import sys
import time

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxem
from jaxem import EM

jax.config.update("jax_enable_x64", True)

truth = jaxem.Mixture(
    [0.4, 0.35, 0.25], jaxem.emissions.Poisson([[2.0, 5.0], [4.0, 3.0], [7.0, 6.0]])
)
x, _ = truth.sample(jax.random.key(0), 4_000)
start = jaxem.Mixture.init(jax.random.key(3), x, 3, jaxem.emissions.Poisson)
best = jaxem.fit(start, x, tol=1e-13, max_steps=20_000)

blocks = jaxem.em.Conditional(
    ("weights", jaxem.em.ClosedForm()), ("components.rate", jaxem.em.Gradient(optax.lbfgs(), 3))
)
average = jaxem.em.Power(0.7, burn_in=50)
variants = {  # the algorithm, its steps, and what a step costs in E-steps
    "EM": (EM(), 300, 1),
    "SQUAREM": (jaxem.SQUAREM(), 40, 3),
    "Anderson": (jaxem.Anderson(), 80, 1),
    "over-relaxed": (jaxem.em.Overrelaxed(), 150, 1),
    "hard EM": (EM(jaxem.em.Hard()), 50, 1),
    "annealed": (EM(jaxem.em.Annealed(jaxem.em.Geometric(1.5, 0.9))), 300, 1),
    "gradient (Adam)": (EM(maximization=jaxem.em.Gradient(optax.adam(0.02), 5)), 300, 1),
    "gradient (L-BFGS)": (EM(maximization=jaxem.em.Gradient(optax.lbfgs(), 3)), 300, 1),
    "conditional (ECM)": (EM(maximization=blocks), 300, 1),
    "incremental, 10 blocks": (EM(accumulation=jaxem.em.Incremental(10)), 2_000, 0.1),
    "online, batches of 200": (
        EM(accumulation=jaxem.em.Online(jaxem.em.Power(0.7), batch_size=200)),
        2_000,
        0.05,
    ),
    "stochastic (SEM)": (EM(jaxem.em.Sampled()), 150, 1),
    "Monte-Carlo": (EM(jaxem.em.Sampled(jaxem.em.Linear(1, 0.2))), 60, 7),
    "stochastic approximation": (EM(jaxem.em.Sampled(), jaxem.em.Online(average)), 300, 1),
}

figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), sharey=True)
print(f"{'variant':<26}{'steps':>6}{'E-steps':>9}{'seconds':>9}{'below the optimum':>19}  result")
for number, (name, (algorithm, steps, cost)) in enumerate(variants.items()):
    run = jax.jit(
        lambda m, a=algorithm, s=steps: jaxem.fit(m, x, a, key=jax.random.key(1), max_steps=s)
    )
    jax.block_until_ready(run(start))  # compiles
    begun = time.perf_counter()
    solution = jax.block_until_ready(run(start))
    seconds, taken = time.perf_counter() - begun, int(solution.num_steps)
    gap = float(best.objective - solution.objective)
    print(f"{name:<26}{taken:>6}{cost * taken:>9.0f}{seconds:>9.3f}{gap:>19.2g}  {solution.status}")
    passes = np.arange(0, taken + 1, max(1, round(1 / cost)))  # once a pass over the data
    below = float(best.objective) - np.asarray(solution.history)[passes]
    below[below < 1e-8] = np.nan  # converged; or an estimate, above the optimum
    style = "-" if number < 10 else "--"
    left.loglog(1 + cost * passes, below, style, label=name)
    right.loglog(1e-4 + seconds * passes / taken, below, style)
left.set(xlabel="E-steps", ylabel="log-likelihood below the optimum")
right.set(xlabel="seconds")
figure.legend(fontsize=7, loc="center right")
figure.tight_layout(rect=(0, 0, 0.84, 1))
figure.savefig(sys.argv[1] if len(sys.argv) > 1 else "variants.png", dpi=120)
