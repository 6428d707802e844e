"""Eight CPU devices and 64-bit mode for every test in this process; `commands.py` has what a user's process has."""

import os
import shutil
import sys
from importlib.metadata import version
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_ENABLE_X64"] = "1"
os.environ["JAX_CPU_ENABLE_ASYNC_DISPATCH"] = "0"  # see configure_jax
# Tests compile many tiny programs once each: LLVM's optimisations cost more than they save, and so do the parts that
# XLA would have compiled side by side, and its newer way of emitting fusions (two thirds of the time).
QUICK_TO_COMPILE = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):  # later ones know no such flag, and abort
    QUICK_TO_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"--xla_force_host_platform_device_count=8 {QUICK_TO_COMPILE}"
# What one test compiled, another finds, in another process too: an entry that is still being written is compiled anew.
CACHE = Path(__file__).parents[1] / ".pytest_cache" / f"jax-{sys.version_info.minor}"
os.environ["JAX_COMPILATION_CACHE_DIR"] = str(CACHE)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"

# Checkpoints are written through to the disk, file by file: a hundred times quicker where the disk is memory.
MEMORY = Path("/dev/shm")
if MEMORY.is_dir() and shutil.disk_usage(MEMORY).free > 2**32:
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(MEMORY))

import pytest  # noqa: E402
from hypothesis import HealthCheck, settings  # noqa: E402

settings.register_profile(
    "default", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow], print_blob=True
)
settings.load_profile("default")


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of small documents."""
    from commands import make_text  # which imports JAX, for which the variables above must be set

    return make_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="session")
def saved(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Path:
    """A run of 6 steps on one device, with checkpoints at 2, 4 and 6."""
    from commands import few_devices, small_run

    from prenorm_jax.train.loop import train

    workdir = tmp_path_factory.mktemp("saved") / "run"
    with few_devices(1):
        train(small_run(text, steps=6, checkpoint_every=2, dropout=0.1), workdir)
    return workdir


@pytest.fixture
def one_device():
    """As if this process had one."""
    from commands import few_devices

    with few_devices(1):
        yield
