"""The native library holds to torch's stable ABI: one build loads into several releases."""

import os
import subprocess

import pytest
from step_kernels import native

# What a library may ask of its surroundings: torch's C functions, and libc, libgcc and libstdc++ (symbols with versions, but
# for some members of namespace std that libtorch exports as well).
ALLOWED = ("aoti_torch_", "torch_", "_ITM_", "__gmon_start__", "__cxa_finalize", "_ZNSt", "_ZNKSt", "_ZSt")
VERSIONED = ("@GLIBC", "@GLIBCXX", "@CXXABI", "@GCC")
# Runs in the other release's interpreter, which has neither this package nor numpy.
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
    import torch

    python_bindings = os.path.join(os.path.dirname(torch.__file__), "lib", "libtorch_python.so")
    symbols = undefined(python_bindings)
    assert any(not s.startswith(ALLOWED) and not any(version in s for version in VERSIONED) for s in symbols)


@pytest.mark.skipif("STEP_SECOND_TORCH" not in os.environ, reason="STEP_SECOND_TORCH names no Python with another torch release")
def test_it_runs_in_another_release():
    import torch

    command = [os.environ["STEP_SECOND_TORCH"], "-c", PROGRAM, str(native._LIBRARY)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() != torch.__version__
