"""README and CONTRIBUTING are true: their code runs, their tables name what is there."""

import inspect
import pathlib
import re
import subprocess
import sys

import pytest

import jaxem
from jaxem._solution import result_names

ROOT = pathlib.Path(__file__).parent.parent
DOCUMENTS = {name: (ROOT / name).read_text() for name in ("README.md", "CONTRIBUTING.md")}
EMISSIONS = {
    name: value
    for name, value in vars(jaxem).items()
    if isinstance(value, type)
    and issubclass(value, jaxem.AbstractEmission)
    and value is not jaxem.AbstractEmission
}


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def rows(text, title):
    """Cells of the table whose first header is `title`."""
    table = text[text.index(f"| {title} |") :].split("\n\n")[0].splitlines()[2:]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in table]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_code_runs(name, tmp_path):
    code = "\n".join(blocks(DOCUMENTS[name], "python"))
    assert code
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    if name == "README.md":
        assert "Solution: converged" in done.stdout
        (slope,) = (float(s) for s in re.findall(r"^-?\d+\.\d+(?:e-\d+)?$", done.stdout, re.M))
        assert slope != 0 and abs(slope) < 1


def test_worked_emission_is_the_example():
    (code,) = blocks(DOCUMENTS["CONTRIBUTING.md"], "python")
    assert code.strip() in (ROOT / "examples" / "custom_emission.py").read_text()


def test_every_emission_is_listed_with_its_parameters_and_prior():
    listed = {row[0].strip("`"): row for row in rows(DOCUMENTS["README.md"], "emission")}
    assert listed.keys() == EMISSIONS.keys()
    for name, (_, parameters, _, prior) in listed.items():
        if name == "Independent":
            continue
        assert set(re.findall(r"`(\w+)`", parameters)) == set(EMISSIONS[name].natural)
        arguments = list(inspect.signature(EMISSIONS[name].prior).parameters)[1:]
        assert re.findall(r"`(\w+)`", prior) == arguments


def test_every_result_is_listed():
    table = rows(DOCUMENTS["README.md"], "`jaxem.RESULTS.…`")
    listed = [re.search(r"\w+", row[0]).group() for row in table]
    assert sorted(listed) == sorted(result_names())


def test_names_exist():
    for text in DOCUMENTS.values():
        for name in re.findall(r"\bjaxem\.([A-Za-z_]\w*)", text):
            assert hasattr(jaxem, name), name
    for path in re.findall(
        r"`((?:examples|tests|benchmarks|jaxem)/[\w./]*)`", "".join(DOCUMENTS.values())
    ):
        assert (ROOT / path).exists(), path
    for example in re.findall(r"`(\w+\.py)` \(", DOCUMENTS["README.md"]):
        assert (ROOT / "examples" / example).exists(), example


def test_default_tolerances_are_as_documented():
    text = DOCUMENTS["README.md"]
    double, single = re.search(r"by default (\S+) in float64 and\s+(\S+) in float32", text).groups()
    assert float(double) == pytest.approx((2.0**-52) ** (2 / 3), rel=0.1)
    assert float(single) == pytest.approx((2.0**-23) ** (2 / 3), rel=0.25)


def test_ci_runs_the_command_of_the_readme():
    commands = [
        line for block in blocks(DOCUMENTS["README.md"], "bash") for line in block.splitlines()
    ]
    assert sum(bool(re.match(r"python3 .*pytest", line)) for line in commands) == 1
    assert sum(bool(re.match(r"python3 .*quickstart", line)) for line in commands) == 1
