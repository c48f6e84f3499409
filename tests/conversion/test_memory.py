"""Import and export hold one tensor at a time: checkpoints of holes, with full shapes, in a process whose memory is measured."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

GIB = 1 << 30
# Step-Audio-R1.1: layers, width, inner width, heads, groups, vocabulary.
STEP_AUDIO = (64, 5120, 27648, 40, 8, 158720)


def measure(folder: Path, *sizes: int) -> dict:
    script = Path(__file__).with_name("sparse_import.py")
    paths = [str(script.parents[1]), str(script.parents[2])]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *map(str, sizes)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_model_is_never_in_memory_as_a_whole(tmp_path):
    """663 MB in bfloat16, of which the embeddings are 134; there and back."""
    found = measure(tmp_path, 8, 1024, 5504, 16, 8, 65536)
    assert found["read"] == found["bytes"] > 650e6
    assert found["peak"] - found["before"] < 0.6 * found["bytes"]


@pytest.mark.slow
def test_33_billion_parameters_are_imported_in_less_than_8_gib(tmp_path):
    found = measure(tmp_path, *STEP_AUDIO)
    # 33.49 B parameters, two bytes each.
    assert found["read"] == found["bytes"] == pytest.approx(2 * 33.49e9, rel=1e-3)
    assert found["peak"] < 8 * GIB
    assert found["disk"] < 4 * GIB, "the test writes holes"
