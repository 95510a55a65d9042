"""What every test runs under: run-time checks of shapes and dtypes, strict promotion, eight fake devices.

Several programs with collectives in flight at once on fake CPU devices can abort or hang: a test on a mesh calls
`jax.block_until_ready` after every step.
"""

import gc
import json
import os
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

REPOSITORY = Path(__file__).resolve().parent.parent
SHARED = REPOSITORY.parent / "shared"

install_import_hook("rlhf_jax", "beartype.beartype")

# XLA's older emitters compile such small programs in a third of the time, and a fifth of that is saved where a program
# is not split into parts that are compiled one by one. Processes that tests start inherit this.
FLAGS = (
    "--xla_cpu_use_fusion_emitters=false",
    "--xla_cpu_parallel_codegen_split_count=1",
    # Eight devices are eight threads: on a busy machine one may be late by more than the 40 s after which XLA aborts.
    "--xla_cpu_collective_call_terminate_timeout_seconds=600",
)
os.environ["XLA_FLAGS"] = " ".join((os.environ.get("XLA_FLAGS", ""), *FLAGS)).strip()
# Tracing makes many small objects that live on: looking them all through again and again is a tenth of the time.
gc.set_threshold(100_000, 20, 20)
gc.freeze()

jax.config.update("jax_platforms", os.environ.get("JAX_PLATFORMS", "cpu"))
jax.config.update("jax_num_cpu_devices", 8)
# Compiling is most of the time of these tests, running what was compiled next to nothing.
jax.config.update("jax_disable_most_optimizations", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update(
    "jax_compilation_cache_dir", os.environ.get("JAX_COMPILATION_CACHE_DIR", str(REPOSITORY / ".cache" / "jax"))
)
# 0: the thousands of small programs are kept too; a second run of the tests takes less than half the time.
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

settings.register_profile("rlhf_jax", deadline=None, derandomize=True, max_examples=25)
settings.load_profile("rlhf_jax")


@pytest.fixture
def key() -> jax.Array:
    """A typed random key, the same in every test."""
    return jax.random.key(0)


@pytest.fixture(scope="session")
def config():
    """A tiny model whose initial weights are large enough for every token to be heard; some folders have another."""
    from rlhf_jax.models.config import ModelConfig

    return ModelConfig(
        vocab_size=12,
        width=8,
        layers=1,
        heads=2,
        key_value_heads=1,
        feed_forward_width=12,
        context_length=16,
        initializer_range=0.5,
    )


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real data sets and weights beside the repository; skips where there is none."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("no folder ../shared/data beside the repository: tests on real data are left out")
    return folder


@pytest.fixture(scope="session")
def golden_losses() -> dict:
    """Reference values of the losses, computed with other software; skips where there are none."""
    path = SHARED / "reference" / "golden_losses.json"
    if not path.is_file():
        pytest.skip("no file ../shared/reference/golden_losses.json beside the repository: no reference values")
    return json.loads(path.read_text(encoding="utf-8"))
