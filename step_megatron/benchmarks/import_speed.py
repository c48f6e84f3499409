"""`convert import` in GB/s beside a plain copy of the same bytes: same disk, same page cache, everything synced to the disk.

The checkpoint is a Qwen2.5-shaped decoder in bfloat16 shards that is made here, of the size asked for. The copy is that of the
weight files by blocks of 16 MiB, with an fsync a file. Both read from the page cache (the files were read just before) and both
are timed until what they wrote is on the disk. Rounds alternate between them; a ratio is formed within each round.

An import does more than a copy: it joins query, key and value, gate and up, and takes the SHA-256 of every file that it reads.
"""

import json
import os
import resource
import shutil
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from step_megatron.benchmarks.spread import spread
from step_megatron.checkpoint.safetensors_files import TensorInfo, write_safetensors
from step_megatron.config.schema import Config, MegatronConfig
from step_megatron.conversion.importing import import_model
from step_megatron.conversion.layouts import decoder_sizes
from step_megatron.model.decoder import transformer_config
from step_megatron.model.huggingface import decoder_entries

_GIGABYTES = 1.2
_BLOCK = 16 << 20
_WIDTH, _INNER, _HEADS, _GROUPS, _VOCABULARY = 1536, 8960, 12, 2, 32768
_SHARD_BYTES = 512 << 20


@dataclass(frozen=True)
class _Pass:
    """What one pass took, in seconds; `cpu` is user and system time of all threads."""

    wall: float
    cpu: float


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `repeats` (rounds), `gigabytes` of the checkpoint (None for 1.2), `out` (folder to work in, on the disk that is
            measured; None for `runs/bench`).

    Returns:
        `{"name", "ratio", "low", "high", ...}`: speed of the import over that of the copy (median, lowest, highest round), and
        GB/s and CPU-seconds of both.
    """
    place = options.out or Path("runs/bench")
    place.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=place) as folder:
        source = Path(folder) / "theirs"
        size = write_model(source, round((options.gigabytes or _GIGABYTES) * 1e9))
        contestants: dict[str, Callable[[Path], object]] = {
            "import": lambda out: import_model(source, out),
            "copy": lambda out: copy_files(source, out),
        }
        rounds = []
        for _ in range(options.repeats):
            rounds.append({name: _measured(work, Path(folder) / name) for name, work in contestants.items()})
    print(f"{size / 1e9:.2f} GB of bfloat16, read from the page cache, written and synced to {place}; GB/s")
    for name in contestants:
        print(f"  {name:7} {spread([size / 1e9 / each[name].wall for each in rounds])}")
    ratios = [each["copy"].wall / each["import"].wall for each in rounds]
    print(f"  import / copy: {spread(ratios)}")
    return {
        "name": "import",
        "ratio": statistics.median(ratios),
        "low": min(ratios),
        "high": max(ratios),
        "bytes": size,
        "gigabytes_per_second": {n: statistics.median(size / 1e9 / each[n].wall for each in rounds) for n in contestants},
        "cpu_seconds": {n: statistics.median(each[n].cpu for each in rounds) for n in contestants},
        "load": os.getloadavg()[0],
    }


def write_model(folder: Path, size: int) -> int:
    """A decoder of about `size` bytes with random weights, in shards; returns the bytes of its tensors."""
    tree = {
        "model_type": "qwen2",
        "vocab_size": _VOCABULARY,
        "hidden_size": _WIDTH,
        "intermediate_size": _INNER,
        "num_attention_heads": _HEADS,
        "num_key_value_heads": _GROUPS,
    }
    per_layer = _WIDTH * (3 * _INNER + 2 * _WIDTH + 2 * _GROUPS * _WIDTH // _HEADS)
    tree["num_hidden_layers"] = max(1, round((size / 2 - 2 * _VOCABULARY * _WIDTH) / per_layer))
    sizes = decoder_sizes(tree, "qwen2", folder)
    config = Config(megatron=MegatronConfig(transformer=sizes.transformer))
    entries = decoder_entries(transformer_config(config), _VOCABULARY, tied=False)
    tensors = {name: TensorInfo(shape, torch.bfloat16) for entry in entries for name, shape in entry.theirs}
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(max(info.bytes // 2 for info in tensors.values()), generator=generator).bfloat16()
    write_safetensors(folder, tensors, lambda name: _first(noise, tensors[name]), limit=_SHARD_BYTES)
    (folder / "config.json").write_text(json.dumps(tree), encoding="utf-8")
    return sum(info.bytes for info in tensors.values())


def _first(noise: torch.Tensor, info: TensorInfo) -> torch.Tensor:
    return noise[: info.bytes // 2].view(info.shape)


def copy_files(source: Path, out: Path) -> None:
    """Copy a folder's files through memory, each synced to the disk."""
    out.mkdir()
    block = memoryview(bytearray(_BLOCK))
    for file in sorted(source.iterdir()):
        with file.open("rb", buffering=0) as reading, (out / file.name).open("wb", buffering=0) as writing:
            while count := reading.readinto(block):
                writing.write(block[:count])
            os.fsync(writing.fileno())


def _measured(work: Callable[[Path], object], out: Path) -> _Pass:
    with _clean(out):
        cpu, wall = _cpu_seconds(), time.perf_counter()
        work(out)
        return _Pass(time.perf_counter() - wall, _cpu_seconds() - cpu)


@contextmanager
def _clean(out: Path) -> Iterator[None]:
    """Nothing is waiting for the disk before, nothing stays after."""
    os.sync()
    yield
    shutil.rmtree(out)


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
