"""Import a checkpoint of holes, in a process of its own: full shapes and real headers, next to nothing on the disk.

    PYTHONPATH=tests:. python tests/conversion/sparse_import.py FOLDER LAYERS WIDTH FFN HEADS GROUPS VOCABULARY

Models of fewer than 64 layers are exported again. Tells, or prints, one JSON object: bytes of the checkpoint, peak memory, its
peak before, bytes on the disk, seconds.
"""

import json
import resource
import struct
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from conversion.foreign import step_audio_shapes, step_audio_tree

_SHARD = 4 << 30


def write_holes(folder: Path, shapes: dict[str, tuple[int, ...]]) -> int:
    """Released-layout shards in bfloat16: headers, and files of the right length; returns the bytes of all tensors."""
    shards, filled = [{}], 0
    for name, shape in shapes.items():
        size = 2 * torch.Size(shape).numel()
        if filled + size > _SHARD:
            shards, filled = [*shards, {}], 0
        shards[-1][name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [filled, filled + size]}
        filled += size
    total = 0
    for number, table in enumerate(shards):
        header = json.dumps(table).encode()
        length = max(entry["data_offsets"][1] for entry in table.values())
        with (folder / f"model-{number:05}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(header)) + header)
            file.truncate(8 + len(header) + length)
        total += length
    return total


class SparseStream:
    """A file in which zeros are not written."""

    def __init__(self, path: Path):
        self.file = open(path, "wb")

    def write(self, data) -> int:
        view = np.frombuffer(data, np.uint8)
        if len(view) > 4096 and not view.any():
            self.file.seek(len(view), 1)
            self.file.truncate(self.file.tell())
            return len(view)
        return self.file.write(data)

    def __getattr__(self, name):
        return getattr(self.file, name)


def import_holes(rank: int, world_size: int, tell: Callable[[str], None], *, folder: Path, sizes: tuple[int, ...]) -> None:
    """Import a checkpoint of these layers, width, inner width, heads, groups and vocabulary into `folder/run`."""
    from unittest import mock

    from step_megatron.checkpoint import seal
    from step_megatron.conversion.exporting import export_run
    from step_megatron.conversion.importing import import_model

    layers, width, ffn, heads, groups, vocabulary = sizes
    tree = step_audio_tree(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=ffn, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, num_attention_groups=groups,
    )  # fmt: skip
    tree["audio_encoder_config"] |= {"n_mels": 128, "n_audio_ctx": 1500, "n_audio_state": 1280, "n_audio_head": 20}
    tree["audio_encoder_config"]["n_audio_layer"] = 32 if layers == 64 else 1
    source = folder / "theirs"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(tree))
    total = write_holes(source, step_audio_shapes(tree, inner=2048, ffn=5120))

    def peak() -> int:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

    before, started = peak(), time.perf_counter()
    with mock.patch.object(seal, "open", lambda path, mode, buffering: SparseStream(path), create=True):
        summary = import_model(source, folder / "run")
    seconds = time.perf_counter() - started
    if layers < 64:
        assert export_run(folder / "run", folder / "back")["bytes"] == total
    disk = sum(file.stat().st_blocks * 512 for file in folder.rglob("*") if file.is_file())
    result = {"bytes": total, "read": summary["bytes"], "before": before, "peak": peak(), "disk": disk, "seconds": seconds}
    tell(json.dumps(result))


if __name__ == "__main__":
    import_holes(0, 1, print, folder=Path(sys.argv[1]), sizes=tuple(map(int, sys.argv[2:])))
