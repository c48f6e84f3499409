"""Fixtures that all tests share: worker pools, a single-process runtime, the folder of downloads."""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import settings

# What was measured on this machine decides nothing here.
os.environ["STEP_KERNELS_CHOICES"] = ""

# Before torch is imported: several processes share the cores in many tests.
for _name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
    os.environ.setdefault(_name, "1")

# Tests run on the CPU everywhere, so that they mean the same everywhere; to run them on a GPU, name it.
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

ROOT = Path(__file__).resolve().parents[1]
# `tests.parallel.layouts` and `support.worker_pool` are importable however pytest was started.
for _path in (ROOT / "tests", ROOT):
    if str(_path) not in sys.path:
        sys.path.insert(0, str(_path))

# Triton's kernels run in its interpreter here, which is decided when they are defined.
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")
if os.environ.get("TRITON_INTERPRET") == "1" and find_spec("triton"):
    # Without it bfloat16 and fp8 are silently wrong in the interpreter.
    from support.triton_interpreter import install

    install()

# The same examples on every run: a failure is repeatable, and a slow machine is not a failure.
settings.register_profile("repeatable", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("repeatable")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: minutes long; `tests/run.sh --full` runs it")
    # Megatron and torch say at import what `step-megatron doctor` says once.
    for message in ("Transformer Engine and Apex are not installed", "The following imports from", "`torch.jit"):
        config.addinivalue_line("filterwarnings", f"ignore:{message}")


@pytest.fixture(scope="session")
def worker_pool():
    """`worker_pool(world_size)` gives the session's pool of that size; see `support/worker_pool.py`."""
    from support.worker_pool import WorkerPool

    pools: dict[int, WorkerPool] = {}

    def pool(world_size: int) -> WorkerPool:
        if world_size not in pools:
            pools[world_size] = WorkerPool(world_size)
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()


@pytest.fixture
def runtime():
    """A runtime of one process with one thread, ended after the test."""
    from step_megatron.config.schema import Config, RunConfig
    from step_megatron.runtime.device import initialize, shutdown

    yield initialize(Config(run=RunConfig(threads=1)))
    shutdown()


@pytest.fixture(scope="session")
def step_data() -> Path:
    """The folder of downloads (`STEP_DATA`, else `data/`); tests that need a file of it skip when it is not there."""
    return Path(os.environ.get("STEP_DATA", ROOT / "data"))
