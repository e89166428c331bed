"""What every benchmark needs: interleaved timing, pinned peers, records that say where they ran.

A section is a generator of `(setting, shapes, rows)`, each of which `main` prints and appends to
`results/BENCHMARK.jsonl`. A row is a time (from `interleave`) or a number.
"""

from __future__ import annotations

import datetime
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from threadpoolctl import threadpool_limits

import jaxem

ROOT = pathlib.Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "equinox",
    "lineax",
    "optax",
    "numpy",
    "scikit-learn",
    "gmmx",
    "pomegranate",
    "torch",
    "hmmlearn",
    "dynamax",
    "pykalman",
    "python-picard",
)
TINY = "--tiny" in sys.argv
Section = Callable[[], Iterator[tuple[str, dict[str, int], dict[str, Any]]]]


def size(full: Any, tiny: Any) -> Any:
    """A size, or that of a trial with `--tiny`, which records nothing."""
    return tiny if TINY else full


# Time


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleave(contenders: dict[str, Callable[[], Any]], runs: int = 7) -> dict[str, Any]:
    """First call of each, then medians over interleaved runs, and median ratios to the first."""
    first = {name: seconds(run) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(size(runs, 1)):
        for name, run in contenders.items():
            seconds(run)  # not counted: caches warm, and the threads of whoever ran before at rest
            times[name].append(seconds(run))
    ours = next(iter(times.values()))
    return {
        name: timed(own, first[name])
        | {"ratio": statistics.median(t / o for t, o in zip(own, ours, strict=True))}
        for name, own in times.items()
    }


def timed(times: list[float], first: float) -> dict[str, float]:
    return {
        "median_s": statistics.median(times),
        "min_s": min(times),
        "max_s": max(times),
        "first_call_s": first,
    }


def pinned(name: str, run: Callable[[], Any]) -> dict[str, Callable[[], Any]]:
    """A peer with the number of BLAS and OpenMP threads, 1 or all, that is faster here."""

    def limited(count: int) -> Any:
        with threadpool_limits(count):
            return run()

    def best(count: int) -> float:
        return min(seconds(functools.partial(limited, count)) for _ in range(2))

    count = min({1, threads()}, key=best)
    return {f"{name} ({count} threads)": functools.partial(limited, count)}


def dynamax_steps(model: Any, params: Any, props: Any, x: jax.Array, num_steps: int) -> Any:
    """dynamax's own e_step and m_step, compiled once: its fit_em compiles at each call."""

    @jax.jit
    def step(params: Any, state: Any) -> Any:
        statistics, _ = jax.vmap(lambda one: model.e_step(params, one, None))(x)
        return model.m_step(params, props, statistics, state)

    def run() -> Any:
        now, state = params, model.initialize_m_step_state(params, props)
        for _ in range(num_steps):
            now, state = step(now, state)
        return now

    return run


# Records


def record(
    benchmark: str,
    section: str,
    setting: str,
    shapes: dict[str, int],
    rows: dict[str, Any],
    more: dict[str, Any] | None = None,
) -> None:
    sizes = " ".join(f"{name}={count:,}" for name, count in shapes.items())
    print(f"\n{section}: {setting}; {sizes}")
    for name, row in rows.items():
        print(f"  {name:<44} {_text(row)}", flush=True)
    if TINY:
        return
    device = jax.devices()[0]
    line = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "section": section,
        "setting": setting,
        "shapes": shapes,
        "results": rows,
        **commit(),
        "jaxem": jaxem.__version__,
        "versions": {name: version(name) for name in PACKAGES},
        "device": processor() if device.platform == "cpu" else device.device_kind,
        "threads": threads(),
        **(more or {}),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(line, ensure_ascii=False) + "\n")


def _text(row: Any) -> str:
    if not isinstance(row, dict):
        return f"{row:.4g}" if isinstance(row, float) else str(row)
    return (
        f"median {row['median_s']:9.5f} s  [{row['min_s']:.5f}, {row['max_s']:.5f}]  "
        f"ratio {row['ratio']:6.2f}  (first call {row['first_call_s']:.2f} s)"
    )


@functools.cache
def commit() -> dict[str, Any]:
    """The commit that was measured, and whether package or benchmarks had changed since."""
    if ROOT not in pathlib.Path(jaxem.__file__).parents:
        sys.exit(f"jaxem is imported from {jaxem.__file__}; run benchmarks in {ROOT}")
    places = ("jaxem", "benchmarks", ":!benchmarks/results")
    changes = git("status", "--porcelain", "--", *places)
    return {"commit": git("rev-parse", "HEAD"), "dirty": bool(changes)}


def git(*arguments: str) -> str:
    command = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def threads() -> int:
    """Processors that this process may use; XLA takes them all."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def processor() -> str:
    info = pathlib.Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# Programs of their own

# This program's peak memory so far, in MB. Linux only; getrusage would remember the process that
# it was forked from.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0]) / 1024
"""


def python(program: str) -> list[float]:
    """The numbers that a program prints."""
    command = [sys.executable, "-c", program, *["--tiny"] * TINY]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [float(word) for word in done.stdout.split()]


def main(benchmark: str, *sections: Section) -> None:
    """Runs the sections that the command line names, or all."""
    known = {section.__name__: section for section in sections}
    chosen = [word for word in sys.argv[1:] if word != "--tiny"] or list(known)
    if unknown := set(chosen) - set(known):
        sys.exit(f"unknown section {sorted(unknown)}; there are {list(known)}, and --tiny")
    for name in chosen:
        for setting, shapes, rows in known[name]():
            record(benchmark, name, setting, shapes, rows)
