"""The tables of README.md and benchmarks/README.md, from the latest records.

`python -m benchmarks.tables` prints them; `--write` puts them into the two files, in place of the
section of their heading. Every number is that of the latest record of its job.
"""

from __future__ import annotations

import json
import re
import sys
from typing import Any

from benchmarks._common import RESULTS, ROOT

Record = dict[str, Any]
BENCHMARKS = ("mixtures", "hmm", "gradients", "variants", "before_after")


def records(benchmark: str) -> list[Record]:
    """The latest record of each job, in the order in which jobs were first recorded."""
    file = RESULTS / f"{benchmark}.jsonl"
    latest: dict[str, Record] = {}
    for line in file.read_text(encoding="utf-8").splitlines() if file.exists() else []:
        found = json.loads(line)
        if "commit" in found:  # older records do not say what they measured
            job = json.dumps([found["section"], found["setting"], found["shapes"]])
            latest[job] = found
    return list(latest.values())


def record(benchmark: str, section: str, setting: str = "") -> Record:
    for found in records(benchmark):
        if found["section"] == section and found["setting"].startswith(setting):
            return found
    sys.exit(f"no record: run `python -m benchmarks.{benchmark} {section}` (for {setting!r})")


# Cells


def two(number: float) -> str:
    """Two digits."""
    return f"{float(f'{number:.2g}'):,.10g}"


def sizes(found: Record) -> str:
    """Such as N = 2,000, D = K = 4."""
    names: dict[int, list[str]] = {}
    for name, count in found["shapes"].items():
        names.setdefault(count, []).append(name.upper() if len(name) == 1 else name)
    return ", ".join(f"{' = '.join(own)} = {count:,}" for count, own in names.items())


def times(found: Record) -> dict[str, dict[str, float]]:
    """Rows that are times, without the numbers of threads in their names."""
    rows = found["results"].items()
    return {re.sub(r" \(\d+ threads\)$", "", n): row for n, row in rows if isinstance(row, dict)}


def cells(*found: Record, peers: tuple[str, ...] = ()) -> tuple[str, str]:
    """Our times, and how many times as long each peer took; one number for each record."""
    ours = ", ".join(two(next(iter(times(one).values()))["median_s"]) for one in found) + " s"
    theirs = [f"{p} {', '.join(two(times(one)[p]['ratio']) for one in found)}" for p in peers]
    return ours, "; ".join(theirs)


def table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    cut = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *cut)]


def origin(found: list[Record]) -> str:
    """When, on what and from which commits records were made."""
    days = sorted({one["when"][:10] for one in found})
    machines = sorted({f"{one['threads']} threads of {one['device']}" for one in found})
    commits = sorted({one["commit"][:7] + " (changed)" * one["dirty"] for one in found})
    jaxes = sorted({one["versions"]["jax"] for one in found})
    when = days[0] if len(days) == 1 else f"{days[0]} to {days[-1]}"
    return f"{when}, {'; '.join(machines)}, jax {', '.join(jaxes)}, commit {', '.join(commits)}"


# README.md


def speed() -> list[str]:
    kinds = ("full", "tied", "diagonal", "spherical")
    (full, *close), (full_far, *far) = (
        [record("mixtures", "covariances", f"{kind}, {at}") for kind in kinds]
        for at in ("close", "far")
    )
    lloyd, starts = record("mixtures", "kmeans"), record("mixtures", "restarts")
    chain, implicit = record("hmm", "gaussian"), record("gradients", "implicit")
    medians = record("variants", "acceleration", "medians")
    sklearn, loop = "scikit-learn", "one after another, jit(fit)"
    others = ", ".join(kinds[1:])
    seconds, theirs = cells(starts, peers=(loop,))
    each = two(starts["results"]["scikit-learn per restart / ours"])
    restarts = f"{starts['setting'].partition(' steps')[0]} steps of restarts, {sizes(starts)}"
    steps = implicit["results"]["steps of the fit"]
    share = two(implicit["results"]["gradient alone / fit"])
    fewer = [
        two(medians["results"][f"{name}, times fewer E-steps"]) for name in ("SQUAREM", "Anderson")
    ]
    rows = [
        (
            f"10 steps, full covariances, {sizes(full)}, close, far",
            *cells(full, full_far, peers=(sklearn, "gmmx", "pomegranate")),
        ),
        (f"the same, {others}, close", *cells(*close, peers=(sklearn,))),
        (f"the same, {others}, far", *cells(*far, peers=(sklearn,))),
        ("k-means, 10 steps on as many data", *cells(lloyd, peers=(sklearn,))),
        (
            restarts,
            seconds,
            f"{theirs.replace(loop, 'a loop over jit(fit)')}; {sklearn} {each}, per start",
        ),
        (
            f"HMM, Gaussian, 10 steps, {sizes(chain)}",
            *cells(chain, peers=("dynamax", "hmmlearn with scaling")),
        ),
        (f"implicit gradient of a fit of {steps:,} steps", f"{share} of the fit", ""),
        (
            f"SQUAREM, Anderson: {medians['shapes']['problems']} slow problems",
            f"{', '.join(fewer)} × fewer E-steps than EM",
            "",
        ),
    ]
    used = [full, full_far, *close, *far, lloyd, starts, chain, implicit, medians]
    return [
        f"Medians of {origin(used)}, "
        "float32, without compilation ([records](benchmarks/README.md)).",
        '"Far" clusters (300 standard deviations, not 3) forbid the cheaper form; peers: times as '
        "long.",
        "",
        *table(("job", "jaxem", "peers"), rows),
    ]


# benchmarks/README.md


def everything() -> list[str]:
    lines = [
        "A median is that of the first contender. The last column has the others, in times as "
        "long, and numbers.",
        "",
    ]
    for benchmark in BENCHMARKS:
        found = records(benchmark)
        if not found:
            continue
        lines += [f"### {benchmark}", "", f"{origin(found)}.", ""]
        if benchmark == "before_after":
            lines += [*before_after(found), ""]
            continue
        rows = []
        for one in found:
            job = f"{one['section']}: {one['setting'].removesuffix(', float32')}"
            timed = times(one)
            others = [f"{name} {two(row['ratio'])}" for name, row in list(timed.items())[1:]]
            others += [
                f"{name} {two(value) if isinstance(value, float) else value}"
                for name, value in one["results"].items()
                if not isinstance(value, dict)
            ]
            first = [f"{two(row['median_s'])} s ({name})" for name, row in timed.items()][:1]
            rows.append((job, sizes(one), "".join(first), "; ".join(others)))
        lines += [*table(("job", "sizes", "median", "times as long, and numbers"), rows), ""]
    return lines[:-1]


def before_after(found: list[Record]) -> list[str]:
    olds = sorted({one["old_commit"][:7] for one in found})
    rows, sums = [], []
    for one in found:
        results = one["results"]
        if one["setting"] == "all jobs":
            sums.append(
                f"- {one['section']}: median ratio {results['median ratio of medians']:.2f} "
                f"(minima {results['median ratio of minima']:.2f}), largest "
                f"{results['largest ratio of medians']:.2f} "
                f"(minima {results['largest ratio of minima']:.2f})"
            )
            continue
        old, new = results["old"], results["new"]
        ratios = (f"{new['ratio']:.2f}", f"{results['ratio of minima']:.2f}")
        job = f"{one['section']}: {one['setting']}"
        rows.append((job, sizes(one), two(old["median_s"]), two(new["median_s"]), *ratios))
    head = ("job", "sizes", "old, s", "new, s", "ratio of medians", "ratio of minima")
    return [f"Old: {', '.join(olds)}.", "", *table(head, rows), "", *sums]


def put(page: str, heading: str, lines: list[str]) -> None:
    """Replaces the section of a heading."""
    file = ROOT / page
    text = file.read_text(encoding="utf-8")
    found = re.search(rf"^## {heading}\n.*?(?=^## |\Z)", text, re.M | re.S)
    if found is None:
        sys.exit(f"{page} has no section {heading}")
    section = "\n".join([f"## {heading}", "", *lines, ""])
    rest = text[found.end() :]
    file.write_text(text[: found.start()] + section + "\n" * bool(rest) + rest, encoding="utf-8")


def main() -> None:
    if unknown := set(sys.argv[1:]) - {"--write"}:
        sys.exit(f"unknown {sorted(unknown)}; there is --write")
    pages = [("README.md", "Speed", speed()), ("benchmarks/README.md", "Records", everything())]
    for page, heading, lines in pages:
        if "--write" in sys.argv:
            put(page, heading, lines)
        else:
            print(f"{page}: {heading}\n", *lines, "", sep="\n")


if __name__ == "__main__":
    main()
