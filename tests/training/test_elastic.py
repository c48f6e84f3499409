"""torchrun itself: all ranks are started again after one died, and the run comes to the end that it would have come to."""

import os
import subprocess
import sys
from pathlib import Path

from training.survival import remains, run_rank, settings
from training.toy_run import write_text

SHORT = ("training.steps=8", "training.save_interval=4", "run.log_interval=3", "run.tensorboard=false")


def test_the_ranks_are_restarted_and_go_on_from_the_last_checkpoint(worker_pool, tmp_path):
    write_text(tmp_path)
    run_dir = tmp_path / "run"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--max-restarts", "1"),
        *("--monitor-interval", "0.1", str(Path(__file__).with_name("elastic_worker.py"))),
        *settings(str(tmp_path), str(run_dir), SHORT),
    ]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=600, env=dict(os.environ))
    assert ended.returncode == 0, ended.stderr[-4000:]
    # Killed in step 7: the second life begins with the checkpoint of step 4.
    assert f"going on from {run_dir}/checkpoints/step_00000004" in ended.stderr
    whole = worker_pool(2).run(run_rank, {"data": str(tmp_path), "run_dir": str(tmp_path / "whole"), "extra": SHORT})
    assert remains(run_dir)["metrics"] == remains(tmp_path / "whole")["metrics"]
    assert remains(run_dir)["checkpoints"] == remains(tmp_path / "whole")["checkpoints"] and len(whole) == 2
