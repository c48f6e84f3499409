"""Where the CUDA compiler is; used by setup.py, the tests and the inspection, so it needs Python alone.

nvcc is looked for on PATH, in `CUDA_HOME/bin` and in the packages of PyPI (`nvidia-cuda-nvcc` and those that it needs: the extra
`dev` brings them), in this order.
"""

import functools
import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

PACKAGES = ("nvidia-cuda-nvcc", "nvidia-cuda-crt", "nvidia-cuda-runtime", "nvidia-cuda-cccl", "nvidia-nvvm")
REMEDY = (
    "there is no nvcc on PATH, in CUDA_HOME/bin or among the Python packages; install the CUDA 13.0 toolkit, or: pip install "
    + " ".join(f"'{name}==13.0.*'" for name in PACKAGES)
)


def find_nvcc() -> str | None:
    """Path of nvcc, None if there is none."""
    packaged = Path(sysconfig.get_path("purelib")) / "nvidia" / "cu13" / "bin"
    folders = [None, f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin", str(packaged)]
    return next((path for folder in folders if (path := shutil.which("nvcc", path=folder))), None)


def require_nvcc() -> str:
    """Path of nvcc.

    Raises:
        FileNotFoundError: there is none; says how to get one.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise FileNotFoundError(REMEDY)
    return nvcc


@functools.cache
def home(nvcc: str) -> Path:
    """The toolkit's folder. nvcc on PATH may be a wrapper script: it says itself where its toolkit is."""
    dry = subprocess.run([nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull], capture_output=True, text=True)
    found = re.search(r"^#\$ TOP=(.+)$", dry.stderr, re.MULTILINE)
    return Path(found[1].strip() if found else os.environ.get("CUDA_HOME", "/usr/local/cuda"))


def include_folders(nvcc: str) -> list[Path]:
    """Where a host compiler finds CUDA's headers."""
    roots = [home(nvcc) / "include", *(home(nvcc) / "targets" / target / "include" for target in _TARGETS)]
    return [folder for root in roots for folder in (root, root / "cccl") if folder.is_dir()]


def static_runtime(nvcc: str) -> Path | None:
    """`libcudart_static.a`, None if the toolkit lacks it."""
    places = ("lib64", "lib", *(f"targets/{target}/lib" for target in _TARGETS))
    return next((path for place in places if (path := home(nvcc) / place / "libcudart_static.a").exists()), None)


_TARGETS = ("x86_64-linux", "sbsa-linux")
