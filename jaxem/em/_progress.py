"""Reports from inside the compiled loop of a fit."""

from collections.abc import Callable

import equinox as eqx
import jax
from jaxtyping import Array


def _print_progress(step: int, objective: float, change: float) -> None:
    print(f"step {int(step):5d}   objective {float(objective):.8g}   change {float(change):.1e}")


class Progress(eqx.Module):
    """A report on the host every few steps of a fit.

    **Arguments:** `every`, in steps; `report(step, objective, change)`, default: print a line.

    **Raises:** `ValueError` for less than every step.
    """

    every: int = eqx.field(static=True, default=10)
    report: Callable[..., None] = eqx.field(static=True, default=_print_progress)

    def __check_init__(self):
        if self.every < 1:
            raise ValueError(f"Progress reports every 1 or more steps, got {self.every}.")

    def emit(self, step: Array, objective: Array, change: Array) -> None:
        """Reports from within a compiled program, if `every` divides the number of this step."""
        jax.lax.cond(
            step % self.every == 0,
            lambda: jax.debug.callback(self.report, step, objective, change),
            lambda: None,
        )
