"""What every benchmark needs: interleaved timing, and a record that says where it ran."""

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
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import jaxem

RESULTS = pathlib.Path(__file__).parent / "results"
PACKAGES = (
    "jax",
    "jaxlib",
    "equinox",
    "lineax",
    "numpy",
    "scikit-learn",
    "gmmx",
    "pomegranate",
    "torch",
    "hmmlearn",
    "dynamax",
)


def seconds(run: Callable[[], Any]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(run())
    return time.perf_counter() - start


def interleave(contenders: dict[str, Callable[[], Any]], runs: int = 7) -> dict[str, Any]:
    """First call of each, then the median over interleaved runs, and ratios to the first one."""
    first = {name: seconds(run) for name, run in contenders.items()}
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for _ in range(runs):
        for name, run in contenders.items():
            seconds(run)  # not counted: caches warm, and the threads of whoever ran before at rest
            times[name].append(seconds(run))
    ours = next(iter(times))
    ratios = {
        name: statistics.median(t / o for t, o in zip(times[name], times[ours], strict=True))
        for name in times
    }
    return {
        name: {
            "median_s": statistics.median(times[name]),
            "min_s": min(times[name]),
            "max_s": max(times[name]),
            "first_call_s": first[name],
            "times_ours": ratios[name],
        }
        for name in contenders
    }


def record(benchmark: str, section: str, setting: str, results: dict[str, Any]) -> None:
    print(f"\n{section}: {setting}")
    for name, row in results.items():
        if isinstance(row, dict):
            print(
                f"  {name:<34} median {row['median_s']:8.4f} s  [{row['min_s']:.4f}, "
                f"{row['max_s']:.4f}]  {row['times_ours']:6.2f} × ours  "
                f"(first call {row['first_call_s']:.2f} s)"
            )
        else:
            print(f"  {name:<34} {row}")
    versions = {name: version(name) for name in PACKAGES}
    line = {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "section": section,
        "setting": setting,
        "results": results,
        "device": f"{jax.devices()[0].device_kind}, {os.cpu_count()} cores, {platform.machine()}",
        "versions": versions,
        "package": package(),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{benchmark}.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")


@functools.cache
def package() -> str | None:
    """Git's hash of the folder `jaxem` that was measured, with `+` if it was changed since."""
    root = pathlib.Path(__file__).parent.parent
    git = ["git", "-C", str(root)]
    found = subprocess.run(
        [*git, "rev-parse", "--short", "HEAD:jaxem"], capture_output=True, text=True
    )
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "jaxem"], capture_output=True)
    return None if found.returncode else found.stdout.strip() + "+" * bool(changed.returncode)


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def data(n: int, d: int, k: int, spread: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Unit clusters in float32, and means to start from."""
    rng = np.random.default_rng(seed)
    centres = spread * rng.normal(size=(k, d))
    x = centres[rng.integers(k, size=n)] + rng.normal(size=(n, d))
    return x.astype(np.float32), (centres + 0.3 * rng.normal(size=(k, d))).astype(np.float32)


def jaxem_mixture(kind: str, means: np.ndarray) -> jaxem.Mixture:
    k, d = means.shape
    eye, one = np.eye(d, dtype=np.float32), np.float32(1)
    components = {
        "full": lambda: jaxem.emissions.Gaussian(means, np.broadcast_to(eye, (k, d, d))),
        "tied": lambda: jaxem.emissions.TiedGaussian(means, eye),
        "diag": lambda: jaxem.emissions.DiagonalGaussian(means, np.ones((k, d), np.float32)),
        "spherical": lambda: jaxem.emissions.SphericalGaussian(means, np.ones(k, np.float32)),
    }[kind]()
    return jaxem.Mixture(np.full(k, one / k, np.float32), components)


# For programs of their own: this program's peak memory so far, in MB. Linux only; getrusage would
# remember the process that it was forked from.
PEAK = """
def peak():
    with open("/proc/self/status") as file:
        return int(file.read().split("VmHWM:")[1].split()[0]) / 1024
"""


def python(program: str) -> list[float]:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [float(word) for word in done.stdout.split()]


def main(sections: dict[str, Callable[[], None]]) -> None:
    """Runs the sections named on the command line, or all."""
    chosen = sys.argv[1:] or list(sections)
    unknown = set(chosen) - set(sections)
    if unknown:
        sys.exit(f"unknown section {sorted(unknown)}; there are {list(sections)}")
    for name in chosen:
        sections[name]()
