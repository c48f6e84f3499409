"""Random numbers: one seed for a run, sub-seeds by name, and the state that a checkpoint keeps."""

import hashlib
import random
from typing import Any

import numpy
import torch


def derive(seed: int, *names: str | int) -> int:
    """A seed that depends on `seed` and on every name, the same in every process and Python version: `[0, 2**63)`."""
    text = "/".join(str(part) for part in (seed, *names))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *names: str | int) -> torch.Generator:
    """A CPU generator of its own for one purpose, seeded by `derive`."""
    return torch.Generator().manual_seed(derive(seed, *names))


def seed_everything(seed: int, pp_rank: int = 0) -> None:
    """Seed Python, NumPy, torch and Megatron's per-rank generators; stages of a pipeline draw different numbers.

    Needs Megatron's parallel state. Raises ValueError when the seed is outside `[0, 2**31)`: NumPy and Megatron add to it.
    """
    if not 0 <= seed < 2**31:
        raise ValueError(f"run.seed is {seed}; it has to be from 0 to {2**31 - 1}")
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    stage_seed = seed + 100 * pp_rank
    random.seed(stage_seed)
    numpy.random.seed(stage_seed)
    torch.manual_seed(stage_seed)
    model_parallel_cuda_manual_seed(stage_seed)


def rng_state() -> dict[str, Any]:
    """Everything that random numbers of this rank depend on, as plain values and tensors, for a checkpoint."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    name, keys, *rest = numpy.random.get_state()
    return {
        "python": random.getstate(),
        # A list, not an array: it loads without unpickling NumPy's classes.
        "numpy": (name, keys.tolist(), *rest),
        "torch": torch.get_rng_state(),
        # On a CPU the device's generator is torch's.
        "device": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "megatron": get_cuda_rng_tracker().get_states(),
    }


def load_rng_state(state: dict[str, Any]) -> None:
    """Restore what `rng_state` returned."""
    from megatron.core.tensor_parallel import get_cuda_rng_tracker

    random.setstate(state["python"])
    numpy.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if state["device"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["device"])
    get_cuda_rng_tracker().set_states(dict(state["megatron"]))
