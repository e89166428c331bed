"""Two commits side by side: `python -m benchmarks.before_after OLD [NEW] [--which GROUP,…]`.

NEW is the working tree unless it is named. Every job runs in processes of its own, old and new in
turns, since one program can be faster in one process than in the next. Of each job it prints the
median over rounds of the processes' medians, the minimum over all calls, and both ratios, new to
old; in the group `compile` a time is that of the first call, without a persistent cache. Groups:
mixtures, hmm, gradients, variants, small, restarts, compile (default: all). `--rounds` (5);
`--tiny` tries the jobs and records nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tarfile
import tempfile
from typing import Any

from benchmarks._common import ROOT, TINY, commit, git, record
from benchmarks._jobs import GROUPS


def unpack(name: str, place: pathlib.Path) -> pathlib.Path:
    """The package as it was at a commit, alone in a folder."""
    command = ["git", "-C", str(ROOT), "archive", name, "jaxem"]
    archive = subprocess.run(command, capture_output=True, check=True).stdout
    place.mkdir()
    with tarfile.open(fileobj=io.BytesIO(archive)) as file:
        file.extractall(place, filter="data")
    return place


def measure(group: str, job: str, place: pathlib.Path) -> dict[str, Any]:
    """What one process measures with the package in `place`."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join((str(place), str(ROOT))),
        "JAX_ENABLE_COMPILATION_CACHE": "false",
    }
    command = [sys.executable, "-P", "-m", "benchmarks._jobs", group, job, *["--tiny"] * TINY]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{group}, {job}, jaxem in {place}:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])
    if place not in pathlib.Path(found["jaxem"]).parents:
        raise RuntimeError(f"{found['jaxem']} was measured in place of the one in {place}")
    return found


def compare(group: str, job: str, trees: dict[str, pathlib.Path], rounds: int) -> dict[str, Any]:
    processes: dict[str, list[dict[str, Any]]] = {label: [] for label in trees}
    for number in range(rounds):
        for label in list(trees)[:: 1 - 2 * (number % 2)]:
            processes[label].append(measure(group, job, trees[label]))
    rows: dict[str, Any] = {}
    for label, own in processes.items():
        calls = [[one["first"]] if group == "compile" else one["times"] for one in own]
        rows[label] = {
            "median_s": statistics.median(statistics.median(times) for times in calls),
            "min_s": min(min(times) for times in calls),
            "max_s": max(max(times) for times in calls),
            "first_call_s": statistics.median(one["first"] for one in own),
            "first_call_processor_s": statistics.median(one["processor"] for one in own),
        }
    old = rows["old"]
    for row in rows.values():
        row["ratio"] = row["median_s"] / old["median_s"]
    rows["ratio of minima"] = rows["new"]["min_s"] / old["min_s"]
    rows["ratio of processor time, first call"] = (
        rows["new"]["first_call_processor_s"] / old["first_call_processor_s"]
    )
    values = [own[-1]["value"] for own in processes.values()]
    rows["results differ by, relative"] = abs(values[1] - values[0]) / max(abs(values[0]), 1e-30)
    return rows


def summary(ratios: dict[str, tuple[float, float]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for place, name in enumerate(("medians", "minima")):
        column = {job: pair[place] for job, pair in ratios.items()}
        worst = max(column, key=column.__getitem__)
        found[f"median ratio of {name}"] = statistics.median(column.values())
        found[f"largest ratio of {name}"] = column[worst]
        found[f"largest ratio of {name}, job"] = worst
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("old", help="a commit")
    parser.add_argument("new", nargs="?", help="a commit; default: the working tree")
    parser.add_argument("--which", default=",".join(GROUPS), metavar="GROUP,…")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tiny", action="store_true")
    options = parser.parse_args()
    if unknown := set(options.which.split(",")) - set(GROUPS):
        parser.error(f"unknown groups {sorted(unknown)}; there are {list(GROUPS)}")

    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory())).resolve()
        trees = {"old": unpack(options.old, folder / "old"), "new": ROOT}
        commits = {"old": {"commit": git("rev-parse", options.old), "dirty": False}}
        commits["new"] = commit()
        if options.new:
            trees["new"] = unpack(options.new, folder / "new")
            commits["new"] = {"commit": git("rev-parse", options.new), "dirty": False}
        print("\n".join(f"{label}: {where}" for label, where in commits.items()))
        more = {**commits["new"], "old_commit": commits["old"]["commit"], "rounds": options.rounds}
        for group in options.which.split(","):
            ratios: dict[str, tuple[float, float]] = {}
            for name, job in GROUPS[group].items():
                try:
                    rows = compare(group, name, trees, options.rounds)
                except RuntimeError as error:
                    print(f"\n{group}: {name} failed\n{error}", file=sys.stderr)
                    continue
                ratios[name] = (rows["new"]["ratio"], rows["ratio of minima"])
                record("before_after", group, name, job.shapes, rows, more)
            if ratios:
                rows = summary(ratios)
                record("before_after", group, "all jobs", {"jobs": len(ratios)}, rows, more)


if __name__ == "__main__":
    main()
