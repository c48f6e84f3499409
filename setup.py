"""Packages: `step_megatron` (the trainer) and `step_kernels` (ops usable without Megatron, in `kernels/`), with its native code.

`csrc/cpu` is compiled once per instruction set, `csrc/cuda` where nvcc is found (no GPU and no CUDA build of torch are needed),
and `csrc/bindings` joins both against torch's stable ABI. `csrc/host` is a pybind11 module. torch has to be installed before:

    pip install torch && pip install --no-build-isolation -e .

STEP_CUDA=0 leaves CUDA out, STEP_CUDA=1 makes a missing nvcc an error; STEP_CUDA_ARCHS lists architectures (default "80;90a").
"""

import os
import platform
import runpy
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
# Without importing the package: its dependencies may not be there yet.
toolkit = SimpleNamespace(**runpy.run_path(str(ROOT / "kernels" / "step_kernels" / "toolkit.py")))
# The lowest release of torch whose stable ABI has all that the bindings use: 2.10 for the CPU; the handle of the current stream,
# which CUDA kernels are launched on, came with 2.13.
TORCH_TARGET = {
    "cpu": "-DTORCH_TARGET_VERSION=((2ULL<<56)|(10ULL<<48))",
    "cuda": "-DTORCH_TARGET_VERSION=((2ULL<<56)|(13ULL<<48))",
}
COMMON = ["-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wno-unknown-pragmas", "-fno-math-errno"]
X86 = platform.machine() in ("x86_64", "AMD64")
INSTRUCTION_SETS = (
    {
        "avx2": ["-mavx2", "-mfma"],
        "avx512": ["-mavx512f", "-mavx512dq", "-mavx512vl", "-mavx512bw", "-mfma", "-mprefer-vector-width=512"],
    }
    if X86
    else {"portable": []}
)


class BuildNative(build_ext):
    """Compile and link `_native.so` and `_host`; objects that are newer than all sources and headers are kept."""

    def get_ext_filename(self, fullname: str) -> str:
        # Not a Python module: torch loads it, so it carries no version of Python in its name.
        return "/".join(fullname.split(".")) + ".so" if fullname.endswith("_native") else super().get_ext_filename(fullname)

    def build_extension(self, extension: Extension) -> None:
        if not extension.name.endswith("_native"):
            super().build_extension(extension)
            return
        try:
            from torch.utils.cpp_extension import include_paths, library_paths
        except ImportError as error:
            raise SystemExit(
                "step-megatron's native ops are built against torch: install torch first, then "
                "`pip install --no-build-isolation -e .`"
            ) from error
        self.objects = Path(self.build_temp).absolute() / "native"
        self.objects.mkdir(parents=True, exist_ok=True)
        nvcc = find_nvcc()
        compiler = os.environ.get("CXX", "c++")
        jobs = [
            (path, f"{path.stem}.{isa}.o", [compiler, *COMMON, *flags, f"-DSTEP_ISA={isa}"])
            for path in sorted((CSRC / "cpu").glob("*.cpp"))
            for isa, flags in INSTRUCTION_SETS.items()
        ]
        includes = [f"-I{path}" for path in include_paths()]
        target = [TORCH_TARGET["cuda"], "-DSTEP_WITH_CUDA", "-DUSE_CUDA"] if nvcc else [TORCH_TARGET["cpu"]]
        bindings = [compiler, *COMMON, *target, *includes]
        jobs += [(path, f"binding.{path.stem}.o", bindings) for path in sorted((CSRC / "bindings").glob("*.cpp"))]
        if nvcc:
            jobs += [(path, f"{path.stem}.cu.o", cuda_command(nvcc)) for path in sorted((CSRC / "cuda").glob("*.cu"))]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            built = list(pool.map(lambda job: self._compile(*job), jobs))
        target = Path(self.get_ext_fullpath(extension.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        link = [compiler, "-shared", *map(str, built), *(f"-L{path}" for path in library_paths()), "-lc10", "-ltorch_cpu"]
        link += [*cuda_runtime(nvcc), "-Wl,--no-undefined", "-o", str(target)]
        run(link)

    def _compile(self, source: Path, name: str, command: list[str]) -> Path:
        target = self.objects / name
        record = target.with_suffix(".command")
        said = " ".join(command)
        newest = max(path.stat().st_mtime for path in [source, *CSRC.rglob("*.h")])
        if target.exists() and target.stat().st_mtime > newest and record.exists() and record.read_text() == said:
            return target
        run([*command, "-c", str(source), "-o", str(target)])
        record.write_text(said)
        return target


def run(command: list[str]) -> None:
    """Run a compiler; its own words are the error."""
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"failed: {' '.join(command)}\n{done.stdout}{done.stderr}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def find_nvcc() -> str | None:
    """Path of nvcc, None where CUDA is left out."""
    wanted = os.environ.get("STEP_CUDA", "auto")
    nvcc = toolkit.find_nvcc()
    if wanted == "1" and nvcc is None:
        raise SystemExit(f"STEP_CUDA=1, but {toolkit.REMEDY}")
    return None if wanted == "0" else nvcc


def cuda_command(nvcc: str) -> list[str]:
    """How a .cu file is compiled: machine code for each architecture, and nothing to be compiled at load time."""
    archs = os.environ.get("STEP_CUDA_ARCHS", "80;90a").split(";")
    codes = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [nvcc, "-std=c++17", "-O3", "-Xcompiler", "-fPIC,-fvisibility=hidden", *codes]


def cuda_runtime(nvcc: str | None) -> list[str]:
    """The static CUDA runtime, so that the library loads where there is none."""
    if nvcc is None:
        return []
    library = toolkit.static_runtime(nvcc)
    if library is None:
        raise SystemExit(f"{toolkit.home(nvcc)} has no libcudart_static.a; install CUDA's runtime or set STEP_CUDA=0")
    return [str(library), "-lrt", "-lpthread", "-ldl"]


def host_extension() -> list[Extension]:
    """The pybind11 module of host algorithms."""
    sources = sorted(str(path.relative_to(ROOT)) for path in (CSRC / "host").glob("*.cpp"))
    if not sources:
        return []
    try:
        import pybind11
    except ImportError as error:
        raise SystemExit("pybind11 is needed to build: pip install pybind11, then install again") from error
    include = [pybind11.get_include(), sysconfig.get_path("include")]
    return [
        Extension("step_kernels._host", sources, include_dirs=include, extra_compile_args=["-std=c++17", "-O3"], language="c++")
    ]


setup(
    name="step-megatron",
    version="0.1.0",
    description="Train audio language models on Megatron-Core: the system of the Step-Audio-R1.5 report",
    license="Apache-2.0",
    python_requires=">=3.11,<3.12",
    packages=find_packages(include=["step_megatron", "step_megatron.*"]) + ["step_kernels", "step_kernels.bench"],
    package_dir={"step_kernels": "kernels/step_kernels"},
    package_data={
        "step_megatron": ["config/presets/*.yaml", "data/fetch/sources.yaml", "rl/label_page.html"],
        "step_kernels.bench": ["asterisk_lengths.json"],
    },
    ext_modules=[Extension("step_kernels._native", []), *host_extension()],
    cmdclass={"build_ext": BuildNative},
    install_requires=[
        "torch>=2.13,<2.15",
        "megatron-core==0.16.1",
        "nvidia-dali-cuda130>=2.4,<2.5",
        "numpy>=2,<3",
        "soundfile>=0.13,<0.15",
        "av>=16,<19",
        "pyyaml>=6,<7",
        "tiktoken>=0.9,<0.15",
        "tokenizers>=0.21,<0.24",
        "tensorboard>=2.18,<2.22",
        "einops>=0.8,<0.10",
        "psutil>=6,<8",
        "tqdm>=4.66,<5",
    ],
    extras_require={
        # A GPU machine: Transformer Engine layers (FP8). Never beside Megatron on a CPU: without its torch extension it breaks
        # `import megatron.core.optimizer`.
        "cuda": ["transformer-engine[pytorch]>=2.9,<2.12", "triton>=3.6,<3.9"],
        # Import of GGUF files (SmolLM2).
        "gguf": ["gguf>=0.17,<0.20"],
        "nemo": ["nemo-toolkit[asr]>=2.5,<4"],
        "wandb": ["wandb>=0.19,<1"],
        # Rollouts by vLLM; each of its releases wants one release of torch. Not run here.
        "vllm": ["vllm>=0.25,<0.34"],
        "dev": [
            "pytest>=8,<10",
            "pytest-timeout>=2.3,<3",
            "hypothesis>=6.100,<7",
            "transformers>=5.20,<6",
            "gguf>=0.17,<0.20",
            # The tests read and write checkpoints with it; ours does without.
            "safetensors>=0.5,<0.9",
            "scikit-learn>=1.5,<2",
            "matplotlib>=3.8,<4",
            "triton>=3.6,<3.9",
            # LoRA adapters are held against it; transformers' Trainer, a peer of the benchmarks, needs accelerate.
            "peft>=0.21,<0.22",
            "accelerate>=1.10,<2",
            # Its fused loss is held against ours.
            "liger-kernel>=0.8,<0.9",
            "ruff>=0.9,<0.18",
            # nvcc where the machine has no toolkit (105 MB): the tests compile every CUDA kernel, with or without a GPU.
            "nvidia-cuda-nvcc==13.0.*",
            "nvidia-cuda-crt==13.0.*",
            "nvidia-cuda-runtime==13.0.*",
            "nvidia-cuda-cccl==13.0.*",
            "nvidia-nvvm==13.0.*",
        ],
    },
    entry_points={"console_scripts": ["step-megatron=step_megatron.cli:main"]},
)
