"""Counting what is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import jax.monitoring

_compiled: list[str] = []


def _listen(event: str, duration: float, **kwargs: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        _compiled.append(event)


jax.monitoring.register_event_duration_secs_listener(_listen)


def compilations(call: Callable[[], Any]) -> int:
    """How many programs a call compiles."""
    before = len(_compiled)
    jax.block_until_ready(jax.tree.leaves(call()))
    return len(_compiled) - before
