"""One rank of a tensor-parallel job loads its slice of an imported run, in a process that stands for that rank alone.

    PYTHONPATH=tests:. python tests/conversion/rank_slice.py RUN RANKS RANK

The other ranks are torch's "fake" group: enough to build the rank's part of the model and to say what it needs. What ranks tell
each other before a load (who reads which file, whether all have the same parts) is left out. Tells, or prints, one JSON object,
in bytes: the slice, what was read from files while it was loaded, and by how much the process's memory grew at most meanwhile.
"""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.strategies import torch as strategies
from torch.testing._internal.distributed.fake_pg import FakeStore


@dataclass
class Loaded:
    """The rank's model with its weights, and what that took."""

    model: torch.nn.Module
    read: int
    grown: int


def load(run_dir: Path, ranks: int, rank: int) -> Loaded:
    from step_megatron.checkpoint import seal
    from step_megatron.checkpoint.directory import latest_checkpoint
    from step_megatron.checkpoint.distributed import load_model_weights
    from step_megatron.config import load_config
    from step_megatron.model.audio_lm import build_model
    from step_megatron.runtime import megatron_cpu, seeds

    config = load_config(run_dir / "config.yaml")
    # Weights that are loaded need no first values.
    config.megatron.transformer |= {"tensor_model_parallel_size": ranks, "perform_initialization": False}
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    parallel_state.initialize_model_parallel(tensor_model_parallel_size=ranks, create_gloo_process_groups=False)
    megatron_cpu.install()
    seeds.seed_everything(config.run.seed, 0)
    alone = functools.partial(strategies.checkpoint.load_state_dict, no_dist=True)
    (model,) = build_model(config)
    with torch.no_grad():
        for parameter in model.parameters():
            # Its memory is the process's before, not while, the weights come.
            parameter.zero_()
    # The highest mark is set back to what the process has now.
    Path("/proc/self/clear_refs").write_text("5")
    before, read_before = memory_mark(), bytes_read()
    with (
        mock.patch.object(seal, "verify", lambda *_: []),
        mock.patch.object(strategies.checkpoint, "load_state_dict", alone),
        mock.patch.object(dist, "all_gather_object", lambda values, value, group=None: values.__setitem__(rank, value)),
    ):
        load_model_weights(model, latest_checkpoint(run_dir))
    return Loaded(model, bytes_read() - read_before, memory_mark() - before)


def memory_mark() -> int:
    """Most memory that this process has had since the mark was set back."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def bytes_read() -> int:
    """What this process has asked files for, from the page cache or not."""
    return int(Path("/proc/self/io").read_text().split()[1])


def measure(rank: int, world_size: int, tell: Callable[[str], None], *, run_dir: Path, ranks: int, place: int) -> None:
    """Load what the rank at `place` of `ranks` needs."""
    loaded = load(run_dir, ranks, place)
    held = sum(parameter.nbytes for parameter in loaded.model.parameters())
    tell(json.dumps({"slice": held, "read": loaded.read, "grown": loaded.grown}))


if __name__ == "__main__":
    measure(0, 1, print, run_dir=Path(sys.argv[1]), ranks=int(sys.argv[2]), place=int(sys.argv[3]))
