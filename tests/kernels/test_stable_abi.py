"""The native library holds to torch's stable ABI: built against one of two releases, it runs in both."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from step_kernels import native

ROOT = Path(__file__).resolve().parents[2]
OTHER = "torch==2.14.1"

# What a library may ask of its surroundings: torch's C functions, and libc, libgcc and libstdc++ (symbols with versions, but
# for some members of namespace std that libtorch exports as well).
ALLOWED = ("aoti_torch_", "torch_", "_ITM_", "__gmon_start__", "__cxa_finalize", "_ZNSt", "_ZNKSt", "_ZSt")
VERSIONED = ("@GLIBC", "@GLIBCXX", "@CXXABI", "@GCC")
# Runs where there is neither this package nor numpy.
PROGRAM = """
import sys, torch
torch.ops.load_library(sys.argv[1])
hidden = torch.arange(12.0).view(4, 3).square()
out = torch.empty(2, 3)
weight, bias = torch.ones(3), torch.zeros(3)
torch.ops.step_native.pool_norm_downsample(hidden, torch.tensor([0, 4], dtype=torch.int32), weight, bias, 1e-5, out)
expected = torch.nn.functional.layer_norm(hidden.view(2, 2, 3).mean(1), (3,))
assert (out - expected).abs().max() < 1e-5, (out, expected)
print(torch.__version__)
"""


def undefined(library: str) -> list[str]:
    said = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True).stdout
    return [line.split()[-1] for line in said.splitlines()]


def test_it_needs_nothing_of_torch_but_its_c_functions():
    symbols = undefined(str(native._LIBRARY))
    assert any(symbol.startswith("aoti_torch_") for symbol in symbols)
    assert [s for s in symbols if not s.startswith(ALLOWED) and not any(version in s for version in VERSIONED)] == []


def test_the_check_would_see_a_library_that_does():
    python_bindings = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_python.so")
    symbols = undefined(python_bindings)
    assert any(not s.startswith(ALLOWED) and not any(version in s for version in VERSIONED) for s in symbols)


@pytest.fixture(scope="module")
def other_python() -> str:
    """Python with another release of torch: of the environment that STEP_SECOND_TORCH names, else of one that is made and kept.

    PyPI's builds are for CUDA: it takes 6 GB and some minutes the first time.
    """
    folder = Path(os.environ.get("STEP_SECOND_TORCH") or ROOT / "build" / OTHER.replace("==", "-"))
    python = str(folder / "bin" / "python")
    if not (folder / "complete").exists() and "STEP_SECOND_TORCH" not in os.environ:
        run(sys.executable, "-m", "venv", "--clear", str(folder))
        run(python, "-m", "pip", "install", "-q", "--disable-pip-version-check", OTHER, "setuptools>=69,<83", "pybind11")
        (folder / "complete").touch()
    assert run(python, "-c", "import torch; print(torch.__version__)") != torch.__version__
    return python


def run(*command: str, **how) -> str:
    done = subprocess.run(command, capture_output=True, text=True, **how)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"
    return done.stdout.strip()


@pytest.mark.slow
def test_it_runs_in_another_release(other_python):
    assert run(other_python, "-c", PROGRAM, str(native._LIBRARY)).split("+")[0] == OTHER.removeprefix("torch==")


@pytest.mark.slow
def test_built_against_the_other_release_it_runs_in_both(other_python, tmp_path):
    build = ("setup.py", "-q", "build_ext", "--build-temp", str(tmp_path / "temp"), "--build-lib", str(tmp_path / "lib"))
    run(other_python, *build, cwd=ROOT, env=os.environ | {"STEP_CUDA": "0"})
    library = tmp_path / "lib" / "step_kernels" / "_native.so"
    for python in (other_python, sys.executable):
        run(python, "-c", PROGRAM, str(library))
