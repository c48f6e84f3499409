"""Compile GPU kernels for an architecture without having one, and read what the compiler made of them.

Triton kernels come from an op's `aot_kernels()`, CUDA kernels from `csrc/cuda`. The machine code is taken apart with `cuobjdump`
and `nvdisasm`, which Triton's wheel brings.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from step_kernels import toolkit

CUDA_SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"


@dataclass(frozen=True)
class Code:
    """What the compiler made of one kernel.

    Attributes:
        registers: of each thread.
        spill_bytes: local memory of each thread; our kernels have no local arrays of their own, so all of it is spilt registers.
        shared_bytes: of each block; on sm_90 and later 1,024 of them may be the driver's.
        hgmma, qgmma: asynchronous matrix instructions of Hopper (16-bit and 8-bit).
        matrix: matrix instructions of any kind.
        ldg128_share: share of the instructions that load from global memory (LDG, LDGSTS, UTMALDG) that load at least 16 bytes; 1
            where there are none.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    hgmma: int
    qgmma: int
    matrix: int
    ldg128_share: float


def compile_triton(
    function,
    signature: Mapping[str, str],
    constants: Mapping[str, object],
    aligned: Sequence[str],
    warps: int,
    stages: int,
    arch: str,
) -> Code:
    """Compile a Triton kernel as its launch would; `aligned` arguments are multiples of 16, which the launch finds out by itself.

    Raises:
        ImportError: Triton is not installed.
        RuntimeError: it interprets its kernels.
    """
    if find_spec("triton") is None:
        raise ImportError("the inspection compiles Triton kernels: pip install 'triton>=3.6,<3.9'")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not isinstance(function, triton.JITFunction):
        raise RuntimeError("Triton's interpreter is on: unset TRITON_INTERPRET and start again")
    names = function.arg_names
    source = ASTSource(
        fn=function,
        signature={name: "constexpr" if name in constants else signature[name] for name in names},
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(names.index(name),): [["tt.divisibility", 16]] for name in aligned},
    )
    target = GPUTarget("cuda", int(re.sub(r"\D", "", arch)), 32)
    compiled = triton.compile(source, target=target, options={"num_warps": warps, "num_stages": stages})
    (code,) = read_cubin(compiled.asm["cubin"]).values()
    # Dynamic shared memory is asked for at the launch: the code does not say how much.
    return Code(**{**vars(code), "shared_bytes": code.shared_bytes + compiled.metadata.shared})


@functools.cache
def compile_cuda(source: Path, arch: str) -> dict[str, Code]:
    """Compile a .cu file; its kernels by their mangled names.

    Raises:
        FileNotFoundError: there is no nvcc; says how to get it.
        RuntimeError: it refuses the source for this architecture.
    """
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        command = [toolkit.require_nvcc(), "-std=c++17", "-O3", "-cubin", f"-arch={arch}", f"-I{CUDA_SOURCES}"]
        done = subprocess.run([*command, str(source), "-o", str(cubin)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{source.name} does not compile for {arch}:\n{done.stdout}{done.stderr}")
        return read_cubin(cubin.read_bytes())


def read_cubin(cubin: bytes) -> dict[str, Code]:
    """The kernels of a machine-code file by name."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, assembly = _run("cuobjdump", "-res-usage", file.name), _run("nvdisasm", "-c", file.name)
    resources = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    operations = operations_by_function(assembly)
    return {
        name: Code(
            registers=int(registers),
            spill_bytes=max(int(stack), int(local)),
            shared_bytes=int(shared),
            **count(operations[name]),
        )
        for name, registers, stack, shared, local in resources
    }


def operations_by_function(assembly: str) -> dict[str, list[str]]:
    """Names of the instructions of every function, in order, from `nvdisasm -c`."""
    functions: dict[str, list[str]] = {}
    current: list[str] = []
    for line in assembly.splitlines():
        if found := re.match(r"//-+\s+\.text\.(\S+)", line):
            current = functions.setdefault(found[1], [])
        elif found := re.match(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P[T0-9]+\s+)?([A-Z][A-Z0-9_.]*)", line):
            current.append(found[1])
    return functions


def count(operations: Sequence[str]) -> dict[str, float]:
    """What of these instructions matters: matrix products, and how wide loads from global memory are."""
    loads = [each for each in operations if each.startswith(("LDG", "UTMALDG"))]
    wide = [each for each in loads if ".128" in each or ".256" in each or each.startswith("UTMALDG")]
    kinds = {name: sum(each.startswith(name) for each in operations) for name in ("HGMMA", "QGMMA", "HMMA", "UTCHMMA", "QMMA")}
    return {
        "hgmma": kinds["HGMMA"],
        "qgmma": kinds["QGMMA"],
        "matrix": sum(kinds.values()),
        "ldg128_share": round(len(wide) / len(loads), 3) if loads else 1.0,
    }


def _run(tool: str, *arguments: str) -> str:
    done = subprocess.run([_tool(tool), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{tool} failed: {done.stderr.strip() or done.stdout.strip()}")
    return done.stdout


@functools.cache
def _tool(name: str) -> str:
    """`cuobjdump` or `nvdisasm`: of Triton's wheel, else of the toolkit."""
    specification = find_spec("triton")
    folders = [str(Path(specification.origin).parent / "backends" / "nvidia" / "bin")] if specification else []
    if nvcc := toolkit.find_nvcc():
        folders.append(str(toolkit.home(nvcc) / "bin"))
    path = next((found for folder in [*folders, None] if (found := shutil.which(name, path=folder))), None)
    if path is None:
        raise FileNotFoundError(f"{name} is missing; Triton's wheel has it: pip install 'triton>=3.6,<3.9'")
    return path
