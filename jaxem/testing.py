"""The laws that every model obeys, as a public function with a readable report."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, PyTree

from jaxem._core.numerics import float_dtype
from jaxem._laws import LAWS, Broken, NotApplicable
from jaxem._slips import check_slips
from jaxem.models._alone import as_model


class Verdict(NamedTuple):
    """The outcome of one law: `verdict` is "holds", "fails" or "not applicable"."""

    law: str
    verdict: str
    detail: str


class Report(tuple[Verdict, ...]):
    """One verdict for each law; `ok` if none fails. Printing it gives a table."""

    @property
    def ok(self) -> bool:
        return all(verdict.verdict != "fails" for verdict in self)

    def __str__(self) -> str:
        return "\n".join(
            f"{v.law:<28} {v.verdict}" + (f", {v.detail}" if v.detail else "") for v in self
        )

    __repr__ = __str__


def check_model(
    model: Any,
    data: PyTree[Array],
    *,
    tol: float | None = None,
    laws: Iterable[str] = tuple(LAWS),
) -> Report:
    """Tests the ten laws of CONTRIBUTING.md on a model and some data, in their order.

    For whoever writes a model or an emission: `print(jaxem.testing.check_model(model, data))`. The
    data should be ordinary ones, a few dozen observations or more, and the model not converged.
    An exception that the model raises is passed on.

    **Arguments:** `model`, or an emission of one component; `tol`, relative; default 1e-9 in
    float64 and 1e-3 in float32; `laws`, names of those to test, as a report has them, such as
    `["additivity", "Fisher's identity"]`: these two find most slips, and take seconds.

    **Returns:** a `Report`, one verdict for each law.

    **Raises:** `ValueError` for the name of no law, and for a family whose methods return what they
    should not, such as sums of another structure.
    """
    model = as_model(model, "check_model")
    chosen = [laws] if isinstance(laws, str) else list(laws)
    if unknown := [name for name in chosen if name not in LAWS]:
        raise ValueError(f"{unknown[0]!r} is no law; there are {', '.join(LAWS)}.")
    check_slips(model, data)
    if tol is None:
        tol = 1e-9 if float_dtype(model) == jnp.float64 else 1e-3
    verdicts = []
    for name, law in LAWS.items():
        if name not in chosen:
            continue
        try:
            verdicts.append(Verdict(name, "holds", law(model, data, tol)))
        except NotApplicable as reason:
            verdicts.append(Verdict(name, "not applicable", f"because {reason}"))
        except Broken as failure:
            verdicts.append(Verdict(name, "fails", str(failure)))
    return Report(verdicts)
