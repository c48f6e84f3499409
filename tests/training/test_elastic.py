"""torchrun's agent: all ranks are started again after one died, and the run comes to the end that it would have come to.

The ranks are fresh processes, forked from the pools' server: torchrun's own would import everything four times.
"""

from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context

from support.worker_pool import PRELOAD
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, Std
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from training import elastic_worker
from training.survival import remains, run_rank, settings

SHORT = ("training.steps=8", "training.save_interval=4", "run.log_interval=3", "run.tensorboard=false")


def test_the_ranks_are_restarted_and_go_on_from_the_last_checkpoint(worker_pool, data, tmp_path, monkeypatch):
    run_dir = tmp_path / "run"
    # As torchrun --standalone --nproc-per-node 2 --max-restarts 1.
    torchrun = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=2, max_restarts=1, run_id="test", start_method="forkserver",
        rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(str(tmp_path / "logs"), redirects=Std.ALL),
    )  # fmt: skip
    get_context("forkserver").set_forkserver_preload(PRELOAD)
    # The agent names the signals that it handles in the environment, and handles none outside of the main thread.
    monkeypatch.setenv("TORCHELASTIC_SIGNALS_TO_HANDLE", "")
    with ThreadPoolExecutor(1) as thread:
        ended = thread.submit(elastic_launch(torchrun, elastic_worker.main), *settings(data, str(run_dir), SHORT))
    assert ended.result() == {0: 0, 1: 0}
    # Killed in step 7: the second life begins with the checkpoint of step 4.
    (log,) = (tmp_path / "logs").glob("*/attempt_1/0/stderr.log")
    assert f"going on from {run_dir}/checkpoints/step_00000004" in log.read_text()
    whole = worker_pool(2).run(run_rank, {"data": data, "run_dir": str(tmp_path / "whole"), "extra": SHORT})
    assert remains(run_dir)["metrics"] == remains(tmp_path / "whole")["metrics"]
    assert remains(run_dir)["checkpoints"] == remains(tmp_path / "whole")["checkpoints"] and len(whole) == 2
