"""What this machine can run, why not the rest, and the remedy for each gap: `step-megatron doctor [--json]`.

A check is `ok`; `limited` when everything works without it but something is slower or switched off; `missing` when training
cannot run until it is repaired. Nothing is imported before it is checked, so that this works on a machine where the rest does
not.
"""

import dataclasses
import importlib
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

from step_megatron.runtime import machine, megatron_release

GIB = 2**30
# The quickstart: an environment, downloads, features and checkpoints.
_DISK_GIB = 10
# Two ranks with Megatron, DALI and the whisper-base encoder.
_MEMORY_GIB = 4


@dataclasses.dataclass(frozen=True)
class Check:
    """One line of the report; `remedy` is empty when there is nothing to do."""

    name: str
    status: Literal["ok", "limited", "missing"]
    detail: str
    remedy: str = ""


def report() -> list[Check]:
    """Check everything; a check that fails itself is reported as missing with its error."""
    checks = []
    for name, check in _CHECKS.items():
        try:
            status, detail, remedy = check()
        except ModuleNotFoundError as error:
            status, detail, remedy = "missing", f"cannot be checked without {error.name}", f"install {error.name} first"
        except Exception as error:
            status, detail, remedy = "missing", f"the check failed: {type(error).__name__}: {error}", "repair or reinstall it"
        checks.append(Check(name, status, detail, remedy))
    return checks


def main(as_json: bool = False) -> int:
    """Print the report; the exit status is 1 when something is missing, else 0."""
    checks = report()
    healthy = all(check.status != "missing" for check in checks)
    if as_json:
        told = {"ok": healthy, "checks": [dataclasses.asdict(check) for check in checks], "kernels": _backends_of_ops()}
        print(json.dumps(told, indent=2))
        return 0 if healthy else 1
    width = max(len(check.name) for check in checks)
    for check in checks:
        print(f"{check.status:8}{check.name:{width}}  {check.detail}")
        if check.remedy:
            print(f"{'':{8 + width}}  -> {check.remedy}")
    print(_summary(checks))
    return 0 if healthy else 1


def _summary(checks: list[Check]) -> str:
    missing = [check.name for check in checks if check.status == "missing"]
    if missing:
        return f"This machine cannot train yet: {', '.join(missing)}."
    if any(check.name == "GPU" and check.status == "ok" for check in checks):
        return "This machine trains on its GPUs (NCCL)."
    return "This machine trains on its CPU (gloo), in every parallel layout, at the size of the tiny and small presets."


Answer = tuple[Literal["ok", "limited", "missing"], str, str]


def _python() -> Answer:
    version = ".".join(map(str, sys.version_info[:3]))
    if sys.version_info[:2] == (3, 11):
        return "ok", version, ""
    return "limited", f"{version}; tested with 3.11 only", "make the environment with Python 3.11"


def _cores() -> Answer:
    count = machine.cores()
    if count < 2:
        return "limited", "1 core: the ranks of a parallel run take turns", "give this machine 2 cores or more"
    return "ok", f"{count} cores", ""


def _memory() -> Answer:
    usable = machine.memory_bytes() / GIB
    if usable < _MEMORY_GIB:
        return "limited", f"{usable:.1f} GiB; the quickstart needs about {_MEMORY_GIB}", "use a machine with more memory"
    return "ok", f"{usable:.1f} GiB", ""


def _disk() -> Answer:
    free = shutil.disk_usage(Path.cwd()).free / GIB
    if free < _DISK_GIB:
        remedy = "free space here, or set STEP_DATA and run.dir to another disk"
        return "limited", f"{free:.1f} GiB free here; the quickstart needs about {_DISK_GIB}", remedy
    return "ok", f"{free:.0f} GiB free here", ""


def _torch() -> Answer:
    version = _version("torch")
    if version is None:
        return "missing", "not installed", "pip install torch==2.13.0"
    import torch

    build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU build"
    return "ok", f"{version} ({build})", ""


def _gpu() -> Answer:
    import torch

    # The driver's device file: there is a GPU, whatever torch makes of it.
    plugged_in = Path("/dev/nvidia0").exists()
    if torch.cuda.is_available():
        names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
        capability = torch.cuda.get_device_capability()
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        return "ok", f"{len(names)} x {names[0]}, {memory:.0f} GiB, capability {capability[0]}.{capability[1]}", ""
    if plugged_in and not torch.version.cuda:
        return "limited", "a GPU is here, but torch is a CPU build and cannot see it", "install a CUDA build of torch"
    if plugged_in:
        return "limited", "a GPU is here, but torch cannot use it", "compare the driver (nvidia-smi) with torch's CUDA version"
    return "limited", "none: runs on the CPU; the presets from 7B up need GPUs", "use a machine with NVIDIA GPUs (H100 for 32B)"


def _nccl() -> Answer:
    import torch
    import torch.distributed as dist

    if dist.is_nccl_available():
        return "ok", "NCCL " + ".".join(map(str, torch.cuda.nccl.version())) + ", gloo", ""
    if torch.cuda.is_available():
        return "missing", "torch has no NCCL, but there is a GPU", "install a CUDA build of torch, or set run.backend=gloo"
    return "ok", "gloo (NCCL is for GPUs)", ""


def _megatron() -> Answer:
    version = _version("megatron-core")
    remedy = f"pip install megatron-core=={megatron_release.TESTED_RELEASE}"
    if version != megatron_release.TESTED_RELEASE:
        return "missing", "not installed" if version is None else f"{version}; tested with one release only", remedy
    return "ok", version, ""


def _transformer_engine() -> Answer:
    import torch

    on_gpu = torch.cuda.is_available()
    if importlib.util.find_spec("transformer_engine") is None:
        if on_gpu:
            return "limited", "not installed: the torch layers are used, without FP8", "pip install 'step-megatron[cuda]'"
        return "ok", "not installed, as it has to be on a CPU", ""
    error = _import_error("transformer_engine.pytorch")
    if error:
        detail = f"installed without a working torch extension, which breaks Megatron-Core's optimizer ({error})"
        remedy = "pip uninstall transformer_engine transformer_engine_torch transformer_engine_cu12 transformer_engine_cu13"
        return "missing", detail, remedy + (", then pip install 'step-megatron[cuda]'" if on_gpu else "")
    return "ok", _version("transformer-engine") or "version unknown", ""


def _apex() -> Answer:
    import torch

    if importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None:
        return "ok", "gradient-accumulation fusion available", ""
    if torch.cuda.is_available():
        remedy = "build apex from source with --cuda_ext, if that fusion matters to you"
        return "limited", "not installed: gradient-accumulation fusion is off; Megatron falls back for the rest", remedy
    return "ok", "not installed: of use on GPUs only", ""


def _triton() -> Answer:
    import torch

    version = _version("triton")
    if version is None:
        return "limited", "not installed: its kernels are off, the torch ones are used", "pip install triton==3.8.0"
    where = "compiles for the GPU" if torch.cuda.is_available() else "no GPU: its kernels run in the interpreter only, for tests"
    return "ok", f"{version}; {where}", ""


def _nvcc() -> Answer:
    from step_kernels import toolkit

    path = toolkit.find_nvcc()
    if path is None:
        return "limited", "not found: CUDA kernels cannot be built", toolkit.REMEDY.partition("; ")[2]
    said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=30).stdout
    release = re.search(r"release ([\d.]+)", said)
    return "ok", f"{release[1] if release else 'version unknown'} ({path})", ""


def _compiler() -> Answer:
    path = shutil.which(os.environ.get("CXX", "c++")) or shutil.which("g++") or shutil.which("clang++")
    if path is None:
        remedy = "install one, e.g. the package g++, and run pip install -e . again"
        return "limited", "no C++ compiler: C++ kernels cannot be built", remedy
    return "ok", path, ""


def _kernels() -> Answer:
    import torch
    from step_kernels import choices, native, registry

    library = native.describe()
    if not library["loaded"]:
        return "missing", str(library["reason"]), "pip install --no-build-isolation -e . with a C++ compiler"
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        told = registry.decisions(device)
    except ValueError as error:
        return "missing", str(error), f"repair that file, measure again, or set {choices.VARIABLE} empty"
    if broken := [each for each in told if not each["backend"]]:
        return "missing", broken[0]["why"], f"install what it names, or change {registry.VARIABLE}"
    used: dict[str, list[str]] = {}
    for each in told:
        sizes = "" if each["width"] is None else f" ({each['dtype']}, {each['width']})"
        used.setdefault(f"{each['backend']}, {each['why']}", []).append(each["op"] + sizes)
    detail = "; ".join(f"{', '.join(ops)} by {how}" for how, ops in used.items())
    return "ok", f"on {device} ({library['cpu']}, CUDA kernels {'built' if library['cuda'] else 'not built'}): {detail}", ""


def _backends_of_ops() -> list[dict]:
    """Every op with the backend that runs it here and why; none where that cannot be found out, which a check says."""
    try:
        import torch
        from step_kernels import registry

        return registry.decisions("cuda" if torch.cuda.is_available() else "cpu")
    except Exception:
        return []


def _host_module() -> Answer:
    from step_kernels import packing

    try:
        packing.balance([1], 1)
    except RuntimeError as error:
        return "missing", str(error), "pip install --no-build-isolation -e . with a C++ compiler and pybind11"
    return "ok", "built: packing and balancing of batches", ""


def _package(distribution: str, module: str, what: str) -> Callable[[], Answer]:
    """A check of a required package: installed, and its module can be imported."""

    def check() -> Answer:
        version, specification = _version(distribution), _requirement(distribution)
        if version is None:
            return "missing", f"not installed: {what}", f"pip install '{specification}'"
        error = _import_error(module)
        if error:
            remedy = f"pip install --force-reinstall '{specification}'"
            return "missing", f"{version} is installed but cannot be imported ({error}): {what}", remedy
        return "ok", version, ""

    return check


def _wandb() -> Answer:
    version = _version("wandb")
    return "ok", version or "not installed: of use only when run.wandb_project is set (pip install 'step-megatron[wandb]')", ""


def _transformers() -> Answer:
    version = _version("transformers")
    if version is None:
        return "limited", "not installed: `bench` has no peer to compare with", "pip install 'step-megatron[dev]'"
    return "ok", f"{version} (the peer of `bench`)", ""


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _requirement(distribution: str) -> str:
    """What this project asks of a package, e.g. `av<19,>=16`; the bare name when this project itself is not installed."""
    try:
        wanted = importlib.metadata.requires("step-megatron") or []
    except importlib.metadata.PackageNotFoundError:
        wanted = []
    lines = (line.split(";")[0].strip() for line in wanted)
    return next((line for line in lines if re.fullmatch(rf"{re.escape(distribution)}(\[.*\])?[^\w-].*", line)), distribution)


def _import_error(module: str) -> str:
    """Why a module cannot be imported, "" when it can; whatever it raises counts."""
    try:
        importlib.import_module(module)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""


_CHECKS: dict[str, Callable[[], Answer]] = {
    "Python": _python,
    "cores": _cores,
    "memory": _memory,
    "disk": _disk,
    "torch": _torch,
    "GPU": _gpu,
    "collectives": _nccl,
    "Megatron-Core": _megatron,
    "Transformer Engine": _transformer_engine,
    "apex": _apex,
    "Triton": _triton,
    "nvcc": _nvcc,
    "C++ compiler": _compiler,
    "step_kernels": _kernels,
    "step_kernels._host": _host_module,
    "DALI": _package("nvidia-dali-cuda130", "nvidia.dali", "audio cannot be decoded"),
    "soundfile": _package("soundfile", "soundfile", "mp3 cannot be read, nor corpora prepared"),
    "PyAV": _package("av", "av", "containers that soundfile does not know cannot be read"),
    "tiktoken": _package("tiktoken", "tiktoken", "text cannot be tokenised"),
    "TensorBoard": _package("tensorboard", "tensorboard", "set run.tensorboard=false to do without"),
    "transformers": _transformers,
    "wandb": _wandb,
}
