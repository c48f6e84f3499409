"""A data set and a configuration that train in seconds: tones and sums, and what a test runs on a worker of a pool."""

import base64
import importlib
import itertools
import os
import signal
from pathlib import Path

import numpy as np
import soundfile

from step_megatron.config import load_config

PITCHES = {"low": 110.0, "mid": 220.0, "high": 440.0}


def write_data(folder: Path) -> None:
    """`train.jsonl`, `held_out.jsonl` (12 and 6 tones), the index of the clips, and what `write_text` writes."""
    from step_megatron.audio.index import validate
    from step_megatron.data.schema import Audio, Conversation, Text, Turn, write_conversations

    spoken = []
    for number, (label, pitch) in enumerate(itertools.islice(itertools.cycle(PITCHES.items()), 18)):
        t = np.arange(int(16000 * (0.3 + 0.03 * number))) / 16000
        soundfile.write(folder / f"{number}.wav", 0.2 * np.sin(2 * np.pi * pitch * t), 16000)
        turns = (
            Turn("human", (Audio(f"{number}.wav"), Text("How high?"))),
            Turn("assistant", (Text(label),), reasoning="a tone"),
        )
        spoken.append(Conversation(f"tone-{number}", "tones", turns))
    write_conversations(folder / "train.jsonl", spoken[:12])
    write_conversations(folder / "held_out.jsonl", spoken[12:])
    validate([f"{number}.wav" for number in range(18)], folder, folder, threads=1)
    write_text(folder)


def write_text(folder: Path) -> None:
    """`sums.jsonl` (20 sums), `uneven.jsonl` (the same and two samples that fit into no micro-batch) and a tokenizer."""
    from step_megatron.data.schema import Conversation, Text, Turn, write_conversations
    from step_megatron.data.tokenizer import QWEN_RANKS, build_compact

    sums = []
    for n in range(22):
        reply = Turn("assistant", (Text(f"{n + 1} " * (n % 4 + 1 if n < 20 else 300)),))
        sums.append(Conversation(f"sum-{n}", "sums", (Turn("human", (Text(f"{n} + 1?"),)), reply)))
    write_conversations(folder / "sums.jsonl", sums[:20])
    write_conversations(folder / "uneven.jsonl", sums)
    longer = (bytes(t) for t in itertools.product(range(256), range(256), range(4)))
    tokens = itertools.islice(itertools.chain((bytes([b]) for b in range(256)), longer), QWEN_RANKS)
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(tokens))
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    build_compact([], folder / "qwen.tiktoken", folder / "tokenizer", limit=300)


def overrides(data: str, run_dir: str) -> list[str]:
    """Six steps with a line of metrics each; validation at 3 and 6."""
    sizes = "num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2, num_query_groups: 1"
    return [
        f"run={{dir: {run_dir}, threads: 1, seed: 3, log_interval: 1, tensorboard: false}}",
        "model={preset: tiny, vocabulary_size: 320, max_positions: 512}",
        "encoder={mels: 80, width: 64, layers: 1, heads: 1, ffn_width: 128, weights: random}",
        "adaptor.width=64",
        f"tokenizer.path={data}/tokenizer",
        f"data={{index: {data}, tokens_per_micro_batch: 256, packing_window: 24}}",
        f"data.sources=[{{name: tones, path: {data}/train.jsonl, weight: 2}}, {{name: sums, path: {data}/sums.jsonl}}]",
        f"data.validation=[{{name: held out, path: {data}/held_out.jsonl}}]",
        "training={steps: 6, micro_batches_per_step: 2, lr_warmup_steps: 2, validation_interval: 3, validation_micro_batches: 2}",
        f"megatron={{transformer: {{{sizes}}}, optimizer: {{lr: 1e-2, weight_decay: 0.1}}}}",
    ]


def train(
    rank: int,
    world_size: int,
    *,
    data: str,
    run_dir: str,
    extra: tuple[str, ...] = (),
    signal_at: int = 0,
    stage: str = "midtrain",
) -> dict:
    """Run a stage; in step `signal_at` rank 0 gets a SIGTERM, as from a scheduler that takes the machine back."""
    from unittest import mock

    from step_megatron.training import loop

    step = loop.training_step

    def step_after_signal(trainer):
        if trainer.step == signal_at - 1 and rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer)

    config = load_config(None, overrides(data, run_dir) + list(extra))
    with mock.patch.object(loop, "training_step", step_after_signal):
        return getattr(importlib.import_module(f"step_megatron.training.{stage}"), stage)(config)


def encode_clips(rank: int, world_size: int, *, data: str, run_dir: str, extra: tuple[str, ...] = ()) -> int:
    """Run `encode`; returns how many clips it encoded."""
    from step_megatron.training.encoding import encode

    return encode(load_config(None, overrides(data, run_dir) + list(extra)))
