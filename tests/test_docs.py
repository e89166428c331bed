"""README and docs are true: their code runs, and prints what they say it prints.

The Python blocks of a page run in order, in one namespace; those of the README each in its own, as
they are copied. A block of text after one is what it prints. `python tests/test_docs.py PAGE…`
writes those blocks anew.
"""

import contextlib
import io
import pathlib
import re
import sys

import jax
import pytest

import jaxem
from jaxem.em._solution import STATUSES
from jaxem.emissions import AbstractEmission

ROOT = pathlib.Path(__file__).parent.parent
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))]
LANGUAGES = {"python", "text", "bash", "bibtex", ""}
FENCED = re.compile(r"^```(.*)\n((?:.*\n)*?)```$", re.M)
CODE = re.compile(r"^```python\n((?:.*\n)*?)```\n(?:\n?```text\n((?:.*\n)*?)```\n)?", re.M)
NUMBER = re.compile(r"[-−]?\d+(?:\.\d*)?(?:e[-+]?\d+)?")


def text_of(page):
    return (ROOT / page).read_text(encoding="utf-8")


def printed_by(page):
    """What each Python block of a page prints; in float32 unless the page enables float64."""
    text, printed = text_of(page), []
    namespace: dict = {"__name__": "__main__"}
    with jax.enable_x64("jax_enable_x64" in text):
        for number, (code, _) in enumerate(CODE.findall(text), start=1):
            if page == "README.md":
                namespace = {"__name__": "__main__"}
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, f"{page}, block {number}", "exec"), namespace)
                jax.effects_barrier()
            printed.append(out.getvalue())
    return printed


def agree(said, printed):
    """Whether two texts have the same words, and numbers that rounding may have moved.

    Whole numbers agree to 5 % (steps), those with an exponent to a factor of 10 (errors), others
    to 1 % or two of their last digits.
    """
    if NUMBER.sub(" # ", said).split() != NUMBER.sub(" # ", printed).split():
        return False
    pairs = list(zip(NUMBER.findall(said), NUMBER.findall(printed), strict=True))
    return all(near(*(n.replace("−", "-") for n in pair)) for pair in pairs)


def near(said, printed):
    a, b = float(said), float(printed)
    if "e" in said or "e" in printed:
        return a == b or (a * b > 0 and 0.1 < abs(a / b) < 10)
    digits = len(said.partition(".")[2])
    share, least = (0.01, 2 * 10**-digits) if "." in said else (0.05, 0)
    return abs(a - b) <= max(share * abs(a), least * 1.001)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_code_runs_and_prints_what_is_said(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for (code, said), printed in zip(CODE.findall(text_of(page)), printed_by(page), strict=True):
        if said or printed:
            assert agree(said, printed), f"{page} says\n{said}\nof\n{code}\nwhich prints\n{printed}"


@pytest.mark.parametrize("page", PAGES)
def test_every_block_is_one_that_is_checked(page):
    languages = [language for language, _ in FENCED.findall(text_of(page))]
    assert set(languages) <= LANGUAGES
    assert languages.count("python") == len(CODE.findall(text_of(page)))


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#:]+)\)", text_of(page)):
        assert ((ROOT / page).parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES)
def test_names_exist(page):
    for path in re.findall(r"\bjaxem((?:\.\w+)+)", text_of(page)):
        found = jaxem
        for name in path.strip(".").split("."):
            if not isinstance(found, type) and name not in ("py", "toml"):
                assert hasattr(found, name), f"jaxem{path}"
                found = getattr(found, name)


def test_every_emission_and_factor_is_described():
    text = text_of("docs/models.md")
    for room in (jaxem.emissions, jaxem.factors):
        for name, value in vars(room).items():
            if isinstance(value, type) and not name.startswith("Abstract"):
                assert f"`{name}`" in text, name
                if issubclass(value, AbstractEmission):
                    for parameter in value.parameters:
                        assert f"`{parameter}`" in text, (name, parameter)


def test_every_result_is_described():
    table = re.findall(r"^\| `(\w+)`", text_of("docs/endings.md"), re.M)
    assert set(STATUSES) <= set(table)


def test_ci_runs_the_command_of_the_readme():
    lines = text_of("README.md").splitlines()
    assert sum(bool(re.match(r"python3 .*pytest", line)) for line in lines) == 1
    assert sum(bool(re.match(r"python3 .*quickstart", line)) for line in lines) == 1


def write(page):
    """Puts what the blocks of a page print behind them."""
    printed = iter(printed_by(page))
    gap = "" if page == "README.md" else "\n"  # it is short

    def filled(match):
        out = "\n".join(line.rstrip() for line in next(printed).splitlines())
        return f"```python\n{match[1]}```\n" + (f"{gap}```text\n{out}\n```\n" if out else "")

    path = ROOT / page
    path.write_text(CODE.sub(filled, text_of(page)), encoding="utf-8")


if __name__ == "__main__":
    for page in sys.argv[1:]:
        write(page)
