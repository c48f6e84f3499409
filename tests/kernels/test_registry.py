"""The backend of an op is the fastest that takes the tensor, or the one asked for by name; nothing falls back silently."""

import subprocess
import sys

import pytest
import torch
from step_kernels import available_backends, native, registry

FLOAT = torch.zeros(1)


@pytest.fixture(autouse=True)
def an_op(monkeypatch):
    monkeypatch.setattr(registry, "_ops", {})
    monkeypatch.setattr(registry, "in_force", "")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    registry.register("op", cuda=(torch.float32,), triton=(torch.float32,), cpp=(torch.float32,))
    registry.register("plain")


def test_the_first_backend_for_device_and_dtype_is_taken_and_counted():
    before = registry.chosen["op", "cpp"]
    assert registry.backend("op", FLOAT) == "cpp"
    assert registry.chosen["op", "cpp"] == before + 1
    assert registry.backend("op", FLOAT.double()) == "torch"
    assert registry.backend("plain", FLOAT) == "torch"


def test_a_broken_installation_is_an_error_not_a_slow_run(monkeypatch):
    monkeypatch.setattr(native, "load_error", lambda: "no library")
    with pytest.raises(RuntimeError, match="op: no library, or set STEP_KERNELS_BACKEND=torch"):
        registry.backend("op", FLOAT)
    monkeypatch.setattr(registry, "in_force", "torch")
    assert registry.backend("op", FLOAT) == "torch"


def test_the_environment_forces_a_backend_and_a_block_another(monkeypatch):
    code = "import torch; from step_kernels import registry; print(registry.decide('swiglu', torch.device('cpu'), torch.float32))"
    monkeypatch.setenv(registry.VARIABLE, "torch")
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said == "('torch', 'forced by STEP_KERNELS_BACKEND=torch')\n"
    with registry.forced("torch"), registry.forced(""):
        assert registry.backend("op", FLOAT) == "cpp"
    with registry.forced("torch"):
        assert registry.backend("op", FLOAT) == "torch"
    assert registry.backend("op", FLOAT) == "cpp"


@pytest.mark.parametrize(
    ("forced", "tensor", "message"),
    [
        ("avx", FLOAT, "'avx' is not a backend; there are cuda, triton, flash, te, cpp, torch"),
        ("cuda", FLOAT, "op cannot use cuda: cuda kernels run on cuda tensors, not on cpu"),
        ("triton", FLOAT, "op cannot use triton"),
        ("cpp", FLOAT.double(), "op by cpp does not take torch.float64; add torch to the list"),
    ],
)
def test_a_forced_backend_that_cannot_run_is_an_error(forced, tensor, message, monkeypatch):
    monkeypatch.setattr(registry, "in_force", forced)
    with pytest.raises(RuntimeError, match=message):
        registry.backend("op", tensor)


def test_a_list_is_taken_in_order_and_must_hold_a_backend_of_the_op(monkeypatch):
    monkeypatch.setattr(registry, "in_force", "cpp,torch")
    assert registry.backend("op", FLOAT) == "cpp" and registry.backend("plain", FLOAT) == "torch"
    assert registry.backend("op", FLOAT.double()) == "torch" and registry.backend("op", FLOAT, {"cpp": "a zero"}) == "torch"
    monkeypatch.setattr(registry, "in_force", "triton,cpp")
    with pytest.raises(RuntimeError, match="plain has torch; add one of them"):
        registry.backend("plain", FLOAT)


def test_triton_runs_on_a_cpu_only_under_its_interpreter(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert available_backends("cpu")["triton"] == ""
    monkeypatch.setattr(registry, "in_force", "triton")
    assert registry.backend("op", FLOAT) == "triton"


def test_the_library_is_there_and_says_what_it_holds():
    assert native.load_error() == ""
    assert native.describe()["cpu"] in ("portable", "avx2", "avx512")
