"""What authors of a family get wrong first: `check_model` says what came and what is expected."""

import pathlib
import runpy

import jax.numpy as jnp
import pytest

import jaxem

EXAMPLE = runpy.run_path(
    str(pathlib.Path(__file__).parent.parent / "examples" / "custom_emission.py")
)
HalfNormal, Squares = EXAMPLE["HalfNormal"], EXAMPLE["Squares"]
X = jnp.arange(12.0)[:, None]

# A method, what is wrong there, and what the message says
SLIPS = {
    "a field that is none": (
        "maximize",
        lambda s, sums: {"log_scale": sums.squares},
        r"no attribute 'squares'.*Squares\(count \(2, 1\), square \(2, 1\)\)",
    ),
    "a parameter, not its leaf": ("maximize", lambda s, sums: {"scale": s.scale}, "by field: log_"),
    "an array": ("maximize", lambda s, sums: s.log_scale, "expected a dict of leaves"),
    "another shape": (
        "maximize",
        lambda s, sums: {"log_scale": sums.square[0]},
        r"returns \(1,\); expected \(2, 1\)",
    ),
    "no count": ("canonical", lambda s: (s.log_scale, s.log_scale), "one of them called count"),
    "sums of another shape": (
        "expected",
        lambda s: Squares(jnp.ones(2), jnp.ones((2, 1))),
        r"count \(2,\).*expected Squares\(count \(2, 1\)",
    ),
    "nothing": ("reframe", lambda s, sums, old: None, "returns NoneType; expected Squares"),
    "features not summed": (
        "log_prob",
        lambda s, x, tilt: x[:, None] + tilt.count,
        r"returns \(12, 2, 1\); expected \(n, k\)",
    ),
}


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_named(slip, monkeypatch):
    method, wrong, message = SLIPS[slip]
    monkeypatch.setattr(HalfNormal, method, wrong)
    model = jaxem.Mixture([0.5, 0.5], HalfNormal([[1.0], [4.0]]))
    with pytest.raises(ValueError, match=message):
        jaxem.testing.check_model(model, X)


def test_laws_are_chosen_by_name():
    model = jaxem.Mixture([0.5, 0.5], HalfNormal([[1.0], [4.0]]))
    report = jaxem.testing.check_model(model, X, laws=["memory", "free leaves"])
    assert [verdict.law for verdict in report] == ["free leaves", "memory"] and report.ok
    with pytest.raises(ValueError, match="'speed' is no law; there are additivity"):
        jaxem.testing.check_model(model, X, laws="speed")
