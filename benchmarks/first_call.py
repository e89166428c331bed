"""First calls: `python -m benchmarks.first_call [OLD_COMMIT] [--which NAME,…] [--rounds 3]`.

Each job runs in processes of its own, first with an empty persistent cache, then with the one that
this left: a start (`init`), the fit from it, and all since `import jax`. Jobs are starts of a few
families from 272 numbers, and the fits of every model of `tests/models.py`. Of each it prints the
minimum over rounds, in seconds of wall time and of processor time (which other programs on the
machine disturb less), and the number of programs that were compiled. With OLD_COMMIT its package
is measured too, in turns.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]
STARTS = ("Gaussian", "k-means", "StudentT", "Poisson", "NegativeBinomial", "Gamma", "HMM")
STAGES = "import", "start", "fit", "all"


def measure(name: str) -> dict[str, Any]:
    """What this process takes for a job, from its first import on."""
    marks = [(time.perf_counter(), time.process_time())]

    def mark() -> None:
        marks.append((time.perf_counter(), time.process_time()))

    import jax
    import jax.monitoring
    import numpy as np

    import jaxem

    programs: list[float] = []

    def note(event: str, seconds: float, **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            programs.append(seconds)

    mark()
    jax.monitoring.register_event_duration_secs_listener(note)
    key, rng = jax.random.key(0), np.random.default_rng(0)
    x = np.r_[rng.normal(54.6, 5.9, 98), rng.normal(80.1, 5.9, 174)][:, None].astype(np.float32)
    counts = rng.poisson(20, (107, 1))
    if name == "k-means":
        start, fit = lambda: None, lambda _: jaxem.kmeans(key, x, 3)
    elif name in STARTS:
        count = name in ("Poisson", "NegativeBinomial", "HMM")
        data = (counts[None] if name == "HMM" else counts) if count else x
        model: Any = jaxem.HMM if name == "HMM" else jaxem.Mixture
        family = getattr(jaxem.emissions, "Poisson" if name == "HMM" else name)
        start = functools.partial(model.init, key, data, 2, family)
        fit = lambda model: jaxem.fit(model, data, throw=False)  # noqa: E731
    else:
        from tests.models import CASES

        start, fit = CASES[name], lambda case: jaxem.fit(case.model, case.data, throw=False)
    found = jax.block_until_ready(start())
    mark()
    jax.block_until_ready(jax.tree.leaves(fit(found)))
    mark()
    times = [(b[0] - a[0], b[1] - a[1]) for a, b in zip(marks, marks[1:], strict=False)]
    times.append((marks[-1][0] - marks[0][0], marks[-1][1] - marks[0][1]))
    return {"times": times, "programs": len(programs), "jaxem": jaxem.__file__}


def run(name: str, place: pathlib.Path, cache: str) -> dict[str, Any]:
    """What a new process measures with the package in `place`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(place), str(ROOT))),
        "JAX_COMPILATION_CACHE_DIR": cache,
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0",
    }
    command = [sys.executable, "-P", "-m", "benchmarks.first_call", "--job", name]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}, jaxem in {place}:\n{done.stderr[-2000:]}")
    found = json.loads(done.stdout.splitlines()[-1])
    if place not in pathlib.Path(found["jaxem"]).parents:
        raise RuntimeError(f"{found['jaxem']} was measured in place of the one in {place}")
    return found


def compare(name: str, trees: dict[str, pathlib.Path], rounds: int) -> dict[str, Any]:
    """Minima over rounds, cold and warm, of each tree."""
    found: dict[str, list[dict[str, Any]]] = {}
    for number in range(rounds):
        for label in list(trees)[:: 1 - 2 * (number % 2)]:
            with tempfile.TemporaryDirectory() as cache:
                for heat in ("cold", "warm"):
                    one = run(name, trees[label], cache)
                    found.setdefault(f"{label}, {heat}", []).append(one)
    rows: dict[str, Any] = {}
    for label, own in sorted(found.items()):
        for clock, unit in enumerate(("s", "processor s")):
            for stage, what in enumerate(STAGES):
                rows[f"{label}: {what}, {unit}"] = min(one["times"][stage][clock] for one in own)
        rows[f"{label}: programs"] = own[0]["programs"]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", nargs="?", help="a commit")
    parser.add_argument("--which", metavar="NAME,…", help="default: all")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--job", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.job:
        print(json.dumps(measure(options.job)))
        return
    from benchmarks._common import commit, git, record
    from benchmarks.before_after import unpack
    from tests.models import CASES

    names = options.which.split(",") if options.which else [*STARTS, *CASES]
    more = dict(commit())
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        trees = {"working tree": ROOT}
        if options.old:
            trees = {"old": unpack(options.old, folder / "old"), **trees}
            more["old_commit"] = git("rev-parse", options.old)
        for name in names:
            rows = compare(name, trees, options.rounds)
            record("first_call", "starts" if name in STARTS else "models", name, {}, rows, more)


if __name__ == "__main__":
    main()
