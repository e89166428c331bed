"""Programs of few numbers, compiled faster: the compiler takes most of the time of a first call."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
from jax.core import Tracer

# XLA has two ways to write a fused loop for a CPU. The older one, in one module for all loops,
# takes half the time, and the programs are as fast where they hold few numbers.
_OLDER = {"xla_cpu_use_fusion_emitters": False, "xla_cpu_parallel_codegen_split_count": 1}
_FEW = 2**13


def filter_jit(*, optimized: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """`eqx.filter_jit`, which compiles faster on CPU where arguments hold few numbers.

    `optimized` is False for programs that run once: LLVM then optimises nothing. Not within another
    program: options are those of a whole one. Those in `XLA_FLAGS` stay as they are.
    """

    def decorator(function: Callable[..., Any]) -> Callable[..., Any]:
        plain: Any = eqx.filter_jit(function)
        options = _OLDER | {"xla_backend_optimization_level": int(optimized)}
        given = os.environ.get("XLA_FLAGS", "")
        options = {name: value for name, value in options.items() if name not in given}
        keywords: Any = {"compiler_options": options}
        faster: Any = eqx.filter_jit(function, **keywords)

        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return (faster if _few(args) and _known() else plain)(*args)

        return call

    return decorator


def _few(args: Any) -> bool:
    leaves = [leaf for leaf in jax.tree.leaves(args) if eqx.is_array(leaf)]
    # within another program new arrays are traced, even where arguments are not
    traced = any(isinstance(leaf, Tracer) for leaf in [*leaves, jnp.zeros(())])
    return not traced and sum(leaf.size for leaf in leaves) <= _FEW


@functools.cache
def _known() -> bool:
    """Whether this platform and this version of its compiler have these options."""
    if jax.default_backend() != "cpu":
        return False
    try:
        jax.jit(lambda: 0, compiler_options=_OLDER).lower().compile()
    except jax.errors.JaxRuntimeError:
        return False
    return True
