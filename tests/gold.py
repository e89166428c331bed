"""Published and peer-computed results, and the data that they belong to."""

import functools
import json
import pathlib
from typing import Any

import numpy as np
import pandas as pd
import pytest

import jaxem

HERE = pathlib.Path(__file__).parent / "data"
SHARED = HERE.parents[2] / "shared" / "gold"  # data that may not be redistributed


def _read(name: str) -> dict[str, Any]:
    return {case["id"]: case for case in json.loads((HERE / f"{name}.json").read_text())}


CASES = _read("gold")
REGRESSIONS = _read("gold_regression")
ROBUST = _read("gold_robust")
CHAINS = _read("gold_hmm")
FACTORS = _read("gold_factors")
STATES = _read("gold_state_space")
ALL = CASES | REGRESSIONS | ROBUST | CHAINS | FACTORS | STATES


@functools.cache
def table(name: str) -> pd.DataFrame:
    """A data set; skips the test where it may not be redistributed and is not at hand."""
    places = [HERE / f"{name}.csv", SHARED / "data" / f"{name}.csv"]
    found = [place for place in places if place.exists()]
    if not found:
        pytest.skip(f"{name}.csv may not be redistributed, and ../shared/gold/data lacks it")
    return pd.read_csv(found[0])


def expected(case: str, key: str):
    return ALL[case]["expected"][key]["value"]


def tolerance(case: str) -> float:
    """The tightest tolerance of any number that only a converged fit reaches."""
    entries = ALL[case]["expected"].values()
    return min(e["atol"] for e in entries if e["kind"] in ("mle", "exact") and e.get("atol"))


def match(case: str, key: str, value) -> None:
    """Asserts |value − expected| ≤ atol + rtol·|expected|."""
    entry = ALL[case]["expected"][key]
    pairs = [(value, entry["value"])]
    if isinstance(entry["value"], dict):
        assert value.keys() == entry["value"].keys()
        pairs = [(value[name], entry["value"][name]) for name in value]
    for ours, theirs in pairs:
        assert np.shape(ours) == np.shape(theirs), f"{case}: {key} has shape {np.shape(ours)}"
        np.testing.assert_allclose(
            ours, theirs, entry.get("rtol", 0), entry.get("atol", 0), err_msg=f"{case}: {key}"
        )


def match_all(
    case: str, numbers: dict[str, Any], besides: frozenset[tuple[str, str]] = frozenset()
) -> None:
    """Asserts all that is expected, besides the pairs of a case and a key that are named."""
    wanted = {(case, key) for key in ALL[case]["expected"]} - besides
    assert {(case, key) for key in numbers} == wanted
    for key, value in numbers.items():
        match(case, key, value)


def solve(case: str, model: Any, data: Any, tol: float = 1e-13, **options: Any) -> jaxem.Solution:
    """A fit whose estimated error, not its last step, is below the tolerance of the case."""
    solution = jaxem.fit(model, data, tol=tol, **{"max_steps": 20_000} | options)
    assert solution.result == jaxem.RESULTS.converged
    assert solution.error < tolerance(case)
    return solution
