"""examples/environment.sh builds the native code again where nvcc came with the packages that it installed."""

import os
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# In the place of the environment's Python: notes what it is asked for; installing the project brings nvcc if NVCC_COMES is set.
PYTHON = """#!/usr/bin/env bash
echo "$*" >> "$STEP_VENV/calls"
case "$*" in
    *find_nvcc*) if [ -e "$STEP_VENV/nvcc" ]; then echo "$STEP_VENV/nvcc"; else echo; fi ;;
    *" -e "*) if [ -n "${NVCC_COMES:-}" ]; then touch "$STEP_VENV/nvcc"; fi ;;
esac
"""


@pytest.mark.parametrize(
    ("there", "settings", "builds"),
    [
        (False, {"NVCC_COMES": "1"}, True),
        (False, {}, False),
        (True, {"NVCC_COMES": "1"}, False),
        (False, {"NVCC_COMES": "1", "STEP_CUDA": "0"}, False),
    ],
)
def test_an_nvcc_that_came_with_the_packages_is_used(tmp_path, there, settings, builds):
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "python").write_text(PYTHON)
    (tmp_path / "bin" / "python").chmod(0o755)
    if there:
        (tmp_path / "nvcc").touch()
    environment = {name: value for name, value in os.environ.items() if name not in ("NVCC_COMES", "STEP_CUDA")}
    command = ["bash", "-euo", "pipefail", "-c", "source examples/environment.sh dev"]
    for _ in range(2):  # the second time nothing has changed, and nothing is done
        done = subprocess.run(
            command, cwd=ROOT, env=environment | settings | {"STEP_VENV": str(tmp_path)}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
    calls = (tmp_path / "calls").read_text().splitlines()
    installs = [index for index, call in enumerate(calls) if " -e " in call]
    again = [index for index, call in enumerate(calls) if call == "setup.py -q build_ext --inplace"]
    assert len(installs) == 1 and len(again) == builds and all(index > installs[0] for index in again)
