"""Inspect every GPU kernel without a GPU: `python -m step_kernels.inspect [--json]` or `step-megatron bench --inspect`.

Each kernel is compiled ahead of time and held against its budget, a line of `kernels/benchmarks/budget.json`: registers, spilt
bytes, shared memory, matrix instructions and wide loads as the compiler made them; FLOPs and bytes as the op counts them. The
floor is the time that an H100 needs for those at its peak: no measurement, nothing here runs on a GPU.

An op's file states its kernels: `aot_kernels()` yields those in Triton (name and shape, function, signature, constants, aligned
arguments, warps, stages, FLOPs, bytes), `cuda_kernels()` those in CUDA C++ (name and shape, source, a part of the mangled name,
bytes of dynamic shared memory, FLOPs, bytes).
"""

import argparse
import importlib
import json
import pkgutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import step_kernels
from step_kernels import aot

BUDGET = Path(__file__).resolve().parents[1] / "benchmarks" / "budget.json"
ARCHITECTURES = ("sm_90a", "sm_80", "sm_100")
# What a budget limits, and which way is worse.
MORE_IS_WORSE = ("registers", "spill_bytes", "shared_bytes", "flops", "bytes")
LESS_IS_WORSE = ("hgmma", "qgmma", "ldg128_share")
FIGURES = ("registers", "spill_bytes", "shared_bytes", "hgmma", "qgmma", "ldg128_share", "flops", "bytes")
# H100 SXM, dense: bytes and operations a microsecond.
MEMORY, FP32, MATRIX_16, MATRIX_8 = 3.35e6, 66.9e6, 989.4e6, 1978.9e6


@dataclass(frozen=True)
class Kernel:
    """A kernel for one shape.

    Attributes:
        name: op and function, `pool_norm_downsample.pool_norm_warp`.
        shape: what it is compiled and counted for.
        compile: architecture -> `aot.Code`.
        flops, bytes: as the op counts them: operations, and bytes that must be read and written at least once.
    """

    name: str
    shape: str
    compile: partial
    flops: int
    bytes: int


def kernels() -> list[Kernel]:
    """All kernels of all ops.

    Raises:
        RuntimeError: two have one name and shape.
    """
    found = [kernel for module in _modules() for kernel in (*_triton(module), *_cuda(module))]
    names = [(kernel.name, kernel.shape) for kernel in found]
    if twice := {name for name in names if names.count(name) > 1}:
        raise RuntimeError(f"kernels stated twice: {sorted(twice)}")
    return found


def inspect(kernel: Kernel, arch: str, budget: Mapping[str, Mapping[str, float]]) -> dict:
    """The record of one kernel: its figures, the H100's floor in microseconds, and whether it keeps to its budget."""
    code = kernel.compile(arch)
    figures = {name: getattr(code, name) for name in FIGURES[:6]} | {"flops": int(kernel.flops), "bytes": int(kernel.bytes)}
    record = {"name": kernel.name, "shape": kernel.shape, "arch": arch, **figures}
    peak = MATRIX_8 if code.qgmma else MATRIX_16 if code.matrix else FP32
    record["floor_us"] = round(max(kernel.bytes / MEMORY, kernel.flops / peak), 3)
    record["budget_ok"] = not worse(record, budget.get(key(record)))
    return record


def worse(record: Mapping, budget: Mapping[str, float] | None) -> list[str]:
    """What exceeds the budget, in words; a kernel without a budget exceeds it."""
    if budget is None:
        return ["no budget"]
    more = [name for name in MORE_IS_WORSE if record[name] > budget[name]]
    less = [name for name in LESS_IS_WORSE if record[name] < budget[name]]
    return [f"{name} {record[name]}, budget {budget[name]}" for name in (*more, *less)]


def key(record: Mapping) -> str:
    """Name of a record's line in the budget."""
    return f"{record['name']} | {record['shape']} | {record['arch']}"


def read_budget(path: Path = BUDGET) -> dict[str, dict[str, float]]:
    """Budgets by `key`.

    Raises:
        FileNotFoundError: there is no such file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: the inspection needs a checkout of the repository")
    return json.loads(path.read_text())


def write_budget(records: Sequence[Mapping], path: Path = BUDGET) -> None:
    """Make the figures of these records their budgets, one line each; the budgets of other architectures stay."""
    architectures = {record["arch"] for record in records}
    before = read_budget(path) if path.is_file() else {}
    budget = {name: limits for name, limits in before.items() if name.split(" | ")[2] not in architectures}
    budget |= {key(record): {name: record[name] for name in FIGURES} for record in records}
    lines = [f"  {json.dumps(name)}: {json.dumps(budget[name])}" for name in sorted(budget)]
    path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def run(architectures: Sequence[str] = ARCHITECTURES[:1], as_json: bool = False, new_budget: bool = False) -> int:
    """Inspect everything and print it, as a table or as one JSON object a line.

    Returns:
        1 if a kernel is over its budget, else 0.

    Raises:
        ValueError: an architecture that is none of `ARCHITECTURES`.
    """
    if unknown := set(architectures) - set(ARCHITECTURES):
        raise ValueError(f"{sorted(unknown)[0]} is not an architecture of the inspection; there are {', '.join(ARCHITECTURES)}")
    found, records = kernels(), []
    budget = {} if new_budget else read_budget()
    if not as_json:
        print(_HEADER)
    # nvcc is a process of its own: the CUDA sources are compiled ahead, side by side.
    sources = {(kernel.compile.args[0], arch) for kernel in found if kernel.compile.func is _cuda_code for arch in architectures}
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda each: aot.compile_cuda(*each), sources))
    for arch in architectures:
        for kernel in found:
            records.append(inspect(kernel, arch, budget))
            print(json.dumps(records[-1]) if as_json else _row(records[-1], new_budget), flush=True)
    if new_budget:
        write_budget(records)
        print(f"{BUDGET}: the figures above are the budget now")
        return 0
    over = [record for record in records if not record["budget_ok"]]
    for record in over:
        print(f"{key(record)}: {'; '.join(worse(record, budget.get(key(record))))}", file=sys.stderr)
    if not as_json:
        print(
            f"{len(records)} kernels compiled, {len(over)} over budget; floor: H100 SXM, from bytes and FLOPs, not run on a GPU"
        )
    return 1 if over else 0


def _modules() -> Iterator:
    """The package's modules that state kernels."""
    for each in pkgutil.iter_modules(step_kernels.__path__):
        if not each.ispkg and not each.name.startswith("_"):
            yield importlib.import_module(f"step_kernels.{each.name}")


def _triton(module) -> Iterator[Kernel]:
    function = getattr(module, "aot_kernels", None)
    # One that is imported is stated by its own file; one with arguments serves several files that state theirs.
    if function is None or function.__module__ != module.__name__ or function.__code__.co_argcount:
        return
    for name, kernel, signature, constants, aligned, warps, stages, flops, moved in function():
        op, _, shape = name.partition(" ")
        compiled = partial(aot.compile_triton, kernel, signature, constants, aligned, warps, stages)
        yield Kernel(f"{op}.{kernel.__name__.strip('_')}", shape, compiled, flops, moved)


def _cuda(module) -> Iterator[Kernel]:
    function = getattr(module, "cuda_kernels", None)
    if function is None:
        return
    for name, source, entry, shared, flops, moved in function():
        op, _, shape = name.partition(" ")
        yield Kernel(op, shape, partial(_cuda_code, aot.CUDA_SOURCES / source, entry, shared), flops, moved)


def _cuda_code(source: Path, entry: str, shared: int, arch: str) -> aot.Code:
    compiled = aot.compile_cuda(source, arch)
    names = [name for name in compiled if entry in name]
    if len(names) != 1:
        raise RuntimeError(f"{source.name}: {len(names)} kernels have {entry!r} in their names, of {sorted(compiled)}")
    code = compiled[names[0]]
    return aot.Code(**{**vars(code), "shared_bytes": code.shared_bytes + shared})


_COLUMNS = {
    "registers": 5,
    "spill_bytes": 6,
    "shared_bytes": 8,
    "hgmma": 6,
    "qgmma": 6,
    "ldg128_share": 8,
    "flops": 9,
    "bytes": 9,
}
_HEADER = (
    f"{'kernel':48} {'shape':34} {'arch':7} {'regs':>5} {'spill':>6} {'shared':>8} {'HGMMA':>6} {'QGMMA':>6} "
    f"{'LDG.128':>8} {'FLOPs':>9} {'bytes':>9} {'floor us':>9}  budget"
)


def _row(record: Mapping, new_budget: bool) -> str:
    numbers = " ".join(
        f"{record[name]:{width}.2e}" if name in ("flops", "bytes") else f"{record[name]:{width}}"
        for name, width in _COLUMNS.items()
    )
    verdict = "new" if new_budget else "ok" if record["budget_ok"] else "OVER"
    return f"{record['name']:48} {record['shape']:34} {record['arch']:7} {numbers} {record['floor_us']:9.2f}  {verdict}"


def main(arguments: list[str] | None = None) -> int:
    """`python -m step_kernels.inspect`."""
    parser = argparse.ArgumentParser(prog="python -m step_kernels.inspect", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", action="append", choices=ARCHITECTURES, help="default: sm_90a; may be repeated")
    parser.add_argument("--json", action="store_true", help="print one JSON object a kernel and shape")
    parser.add_argument("--write-budget", action="store_true", help="make today's figures the budget")
    options = parser.parse_args(arguments)
    return run(options.arch or ARCHITECTURES[:1], options.json, options.write_budget)


if __name__ == "__main__":
    sys.exit(main())
