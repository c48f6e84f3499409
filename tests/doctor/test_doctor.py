"""The doctor: what a faked gap looks like, that every gap has a remedy, and that a machine without torch still gets a report."""

import importlib.util
import json
import subprocess
import sys
import types
from importlib.metadata import PackageNotFoundError

import pytest
import torch

from step_megatron import doctor


def found(name):
    return next(check for check in doctor.report() if check.name == name)


@pytest.fixture
def without(monkeypatch):
    """`without("av")` makes a distribution look absent, whatever the machine has."""
    version = importlib.metadata.version

    def hide(*distributions):
        def fake(name):
            if name in distributions:
                raise PackageNotFoundError(name)
            return version(name)

        monkeypatch.setattr(importlib.metadata, "version", fake)

    return hide


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: types.SimpleNamespace(total_memory=80 * 2**30))


def test_this_machine_is_healthy_and_every_gap_has_a_remedy(capsys):
    assert doctor.main() == 0
    printed = capsys.readouterr().out
    checks = doctor.report()
    assert len({check.name for check in checks}) == len(checks) >= 18
    assert all(check.remedy for check in checks if check.status != "ok")
    assert all(check.name in printed and check.detail in printed for check in checks)


def test_json_holds_the_same(capsys):
    assert doctor.main(as_json=True) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert {check["name"]: check["status"] for check in told["checks"]} == {check.name: check.status for check in doctor.report()}
    assert set(told["checks"][0]) == {"name", "status", "detail", "remedy"}


def test_a_missing_package_fails_with_the_range_that_this_project_asks_for(without, capsys):
    without("av")
    check = found("PyAV")
    assert check.status == "missing" and "not installed" in check.detail
    assert check.remedy.startswith("pip install 'av") and ">=16" in check.remedy
    assert doctor.main() == 1
    assert "This machine cannot train yet: PyAV." in capsys.readouterr().out
    assert doctor.main(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)["ok"] is False


def test_the_peer_of_the_benchmarks_is_listed_but_not_needed_to_train(without):
    without("transformers")
    check = found("transformers")
    assert check.status == "limited" and "bench" in check.detail and "step-megatron[dev]" in check.remedy


def test_a_package_that_cannot_be_imported_is_not_taken_for_installed(monkeypatch):
    monkeypatch.setitem(sys.modules, "soundfile", None)
    check = found("soundfile")
    assert check.status == "missing" and "cannot be imported" in check.detail and "--force-reinstall" in check.remedy


def test_other_release_of_megatron(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "0.15.0")
    assert doctor._megatron() == ("missing", "0.15.0; tested with one release only", "pip install megatron-core==0.16.1")


def test_absent_transformer_engine_is_right_on_a_cpu_and_a_gap_on_a_gpu(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert doctor._transformer_engine()[0] == "ok"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    status, _, remedy = doctor._transformer_engine()
    assert status == "limited" and "step-megatron[cuda]" in remedy


def test_transformer_engine_without_its_torch_extension_breaks_megatron(tmp_path, monkeypatch):
    package = tmp_path / "transformer_engine" / "pytorch"
    package.mkdir(parents=True)
    (package.parent / "__init__.py").write_text("")
    (package / "__init__.py").write_text(
        "raise AssertionError('Could not find shared object file for Transformer Engine torch lib')"
    )
    monkeypatch.syspath_prepend(tmp_path)
    try:
        check = found("Transformer Engine")
    finally:
        for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
            del sys.modules[name]
    assert check.status == "missing" and "breaks Megatron-Core" in check.detail and "Could not find shared" in check.detail
    assert check.remedy.startswith("pip uninstall transformer_engine")


def test_a_gpu_is_described(gpu):
    check = found("GPU")
    assert check.status == "ok" and check.detail == "8 x NVIDIA H100 80GB HBM3, 80 GiB, capability 9.0"
    assert found("apex").status == "limited"


def test_a_gpu_that_torch_cannot_see_has_a_reason(monkeypatch):
    monkeypatch.setattr(doctor.Path, "exists", lambda path: str(path) == "/dev/nvidia0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert "CPU build" in doctor._gpu()[1]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert "driver" in doctor._gpu()[2]


def test_small_machines_are_told_so(monkeypatch):
    monkeypatch.setattr(doctor.machine, "cores", lambda: 1)
    monkeypatch.setattr(doctor.machine, "memory_bytes", lambda: 2**30)
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=2**30))
    assert found("cores").status == "limited"
    assert found("memory").status == "limited"
    assert found("disk").status == "limited" and "STEP_DATA" in found("disk").remedy


def test_missing_compilers(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    assert found("nvcc").status == "limited" and "pip install" in found("nvcc").remedy
    assert found("C++ compiler").status == "limited"


def test_a_check_that_fails_is_a_line_of_the_report(monkeypatch):
    def broken():
        raise OSError("no such file")

    monkeypatch.setitem(doctor._CHECKS, "disk", broken)
    check = found("disk")
    assert check.status == "missing" and "OSError: no such file" in check.detail and check.remedy


def test_a_machine_without_torch_still_gets_its_report():
    program = "import sys; sys.modules['torch'] = None; from step_megatron import doctor; sys.exit(doctor.main(as_json=True))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    checks = {check["name"]: check for check in json.loads(done.stdout)["checks"]}
    assert checks["GPU"]["detail"] == "cannot be checked without torch" and checks["cores"]["status"] == "ok"


def test_the_native_modules_are_listed_with_their_remedies(monkeypatch):
    assert found("step_kernels._host").status == found("step_kernels").status == "ok"
    from step_kernels import packing, registry

    monkeypatch.setitem(sys.modules, "step_kernels._host", None)
    monkeypatch.delattr("step_kernels._host", raising=False)
    packing._host.cache_clear()
    check = found("step_kernels._host")
    packing._host.cache_clear()
    assert check.status == "missing" and "host module" in check.detail and "pybind11" in check.remedy
    monkeypatch.setattr(registry, "in_force", "cuda")
    check = found("step_kernels")
    assert check.status == "missing" and "audio_attention_varlen has triton, flash, te, cpp, torch" in check.detail
    monkeypatch.setattr(registry, "in_force", "torch")
    assert "by torch, forced by STEP_KERNELS_BACKEND=torch" in found("step_kernels").detail


def test_json_says_for_every_op_who_runs_it_and_why(capsys):
    from step_kernels import registered

    doctor.main(as_json=True)
    told = json.loads(capsys.readouterr().out)["kernels"]
    assert {each["op"] for each in told} == set(registered())
    assert all(each["backend"] in ("cpp", "torch") and each["why"] for each in told)


def test_json_survives_a_file_of_choices_that_cannot_be_read(monkeypatch, tmp_path, capsys):
    from step_kernels import choices

    monkeypatch.setenv(choices.VARIABLE, str(tmp_path))
    choices.load.cache_clear()
    assert doctor.main(as_json=True) == 1
    told = json.loads(capsys.readouterr().out)
    check = next(check for check in told["checks"] if check["name"] == "step_kernels")
    assert check["status"] == "missing" and str(tmp_path) in check["detail"] and choices.VARIABLE in check["remedy"]
    assert told["kernels"] == []
