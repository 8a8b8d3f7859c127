"""All tests run on the CPU, with reuse of a PRNG key an error, and with compiled programs made quickly and kept between runs."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path(tempfile.gettempdir()) / "diffpo_jax_compilation_cache"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_DEBUG_KEY_REUSE", "true")  # through the environment, so that the processes that tests start have it too
if "xla_backend_optimization_level" not in os.environ.get("XLA_FLAGS", ""):  # compiling is most of the time that these sizes take
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()

import jax  # noqa: E402  after its settings above
import pytest  # noqa: E402


@pytest.fixture(autouse=True, scope="module")
def _forget_compiled_programs():
    """A process may have 65,530 memory maps (Linux's default), a compiled program takes dozens, and past that XLA dies."""
    yield
    jax.clear_caches()
