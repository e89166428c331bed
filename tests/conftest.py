"""Tests run in float64 on two forced host devices.

It is tracing and compiling that take the time. XLA's optimisations are left out where their flags
are known (an unknown flag would end the process), traces do not note where they come from, garbage
is collected seldom, and what one process of a run has compiled the others load.
"""

import atexit
import gc
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

FLAGS = ["--xla_force_host_platform_device_count=2"]
JAXLIB = ".".join(importlib.metadata.version("jaxlib").split(".")[:2])
if JAXLIB in ("0.10", "0.11", "0.12"):
    FLAGS += [
        "--xla_backend_optimization_level=0",
        "--xla_llvm_disable_expensive_passes=true",
        "--xla_cpu_parallel_codegen_split_count=1",
        "--xla_disable_hlo_passes=while-loop-invariant-code-motion,while-loop-constant-sinking,"
        "simplify-while-loops",
    ]
if JAXLIB in ("0.10", "0.11"):  # 0.12 has no other emitters
    FLAGS += ["--xla_backend_extra_options=xla_cpu_disable_new_fusion_emitters"]
os.environ.setdefault("XLA_FLAGS", " ".join(FLAGS))

# The first process of a run makes the cache of programs; workers and examples inherit it.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    programs = tempfile.mkdtemp(prefix="jaxem-programs-")
    atexit.register(shutil.rmtree, programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = programs
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")

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
