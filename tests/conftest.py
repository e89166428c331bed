"""Tests run in float64 on two forced host devices.

It is tracing and compiling that take the time. XLA's optimisations are left out where their flags
are known (an unknown flag would end the process), traces do not note where they come from, and
garbage is collected seldom.
"""

import gc
import importlib.metadata
import os
import pathlib

FLAGS = ["--xla_force_host_platform_device_count=2"]
if importlib.metadata.version("jaxlib").startswith("0.10."):
    FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_use_fusion_emitters=false",
        "--xla_cpu_parallel_codegen_split_count=1",
    ]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_traceback_in_locations_limit", 0)
gc.set_threshold(100_000, 50, 100)

MAPS = pathlib.Path("/proc/self/maps")  # Linux, which allows a process 65,530 of them


@pytest.fixture(autouse=True)
def _forget_compiled_programs():
    """Thousands of compiled programs in one process exhaust its memory maps, and it crashes."""
    yield
    if MAPS.exists() and MAPS.read_bytes().count(b"\n") > 25_000:
        jax.clear_caches()
        gc.collect()
