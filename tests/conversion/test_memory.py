"""Import and export hold one tensor at a time, a rank its slice: checkpoints of holes, of full shape, whose processes' memory is
measured.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conversion import rank_slice, sparse_import
from support.rank_processes import RankProcesses

GIB = 1 << 30
# Step-Audio-R1.1: layers, width, inner width, heads, groups, vocabulary.
STEP_AUDIO = (64, 5120, 27648, 40, 8, 158720)


def alone(function: Callable, logs: Path, **kwargs: Any) -> dict:
    """What a function tells from a process of its own, forked from one that has imported everything."""
    with RankProcesses(1, logs) as process:
        process.start(function, kwargs)
        heard = process.heard(timeout=3600)
        process.join()
        assert heard is not None, process.logs()
    return json.loads(heard[1])


def test_a_model_is_never_in_memory_as_a_whole(tmp_path):
    """700 MB in bfloat16, of which gate and up are 360; there and back, and to one rank of eight."""
    found = alone(sparse_import.import_holes, tmp_path, folder=tmp_path, sizes=(4, 1024, 22016, 16, 8, 32768))
    assert found["read"] == found["bytes"] > 650e6
    assert found["peak"] - found["before"] < 0.6 * found["bytes"]
    rank = alone(rank_slice.measure, tmp_path, run_dir=tmp_path / "run", ranks=8, place=3)
    # An eighth, and the adaptor, which every rank has whole.
    assert 100e6 < rank["slice"] < 115e6
    assert rank["slice"] <= rank["read"] < rank["slice"] + 10e6
    # Another copy of the rank's gate and up would be 45 MB, the whole embeddings 67.
    assert rank["grown"] < 20e6


@pytest.mark.slow
def test_33_billion_parameters_are_imported_in_less_than_8_gib(tmp_path):
    found = alone(sparse_import.import_holes, tmp_path, folder=tmp_path, sizes=STEP_AUDIO)
    # 33.49 B parameters, two bytes each.
    assert found["read"] == found["bytes"] == pytest.approx(2 * 33.49e9, rel=1e-3)
    assert found["peak"] < 8 * GIB
    assert found["disk"] < 4 * GIB, "the test writes holes"
    rank = alone(rank_slice.measure, tmp_path, run_dir=tmp_path / "run", ranks=8, place=3)
    assert rank["slice"] <= rank["read"] < 1.01 * rank["slice"]
    assert rank["grown"] < 0.5 * GIB and rank["slice"] < 8 * GIB
