"""A Triton kernel with one fault in its source, in the place of the real one: what a test must notice."""

import ast
import contextlib
import importlib
import runpy
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

_PRELUDE = "from __future__ import annotations\n\nfrom step_kernels.triton_language import jit, tl, triton\n"


@contextlib.contextmanager
def with_fault(folder: Path, module: str, kernel: str, old: str, new: str) -> Iterator[None]:
    """Within the block, `kernel` of `step_kernels.MODULE` is what its source says with `new` for the only `old`.

    Args:
        folder: where the faulty source goes: the interpreter reads a kernel from its file.

    Raises:
        AssertionError: the kernels of the module do not have `old` exactly once: write the fault anew.
    """
    real = importlib.import_module(f"step_kernels.{module}")
    source = Path(real.__file__).read_text()
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    jitted = [node for node in functions if any(ast.unparse(each) == "jit" for each in node.decorator_list)]
    kernels = "\n\n".join(f"@jit\n{ast.get_source_segment(source, node)}" for node in jitted)
    assert kernels.count(old) == 1, f"the kernels of {module} have {old!r} {kernels.count(old)} times: write the fault anew"
    path = folder / f"{module}_with_a_fault.py"
    path.write_text(_PRELUDE + "\n\n" + kernels.replace(old, new) + "\n")
    with mock.patch.object(real, kernel, runpy.run_path(str(path))[kernel]):
        yield
