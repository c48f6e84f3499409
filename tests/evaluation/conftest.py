"""A run as training leaves it, with random weights, and the small data set that it would have been trained on."""

import base64
import itertools
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile

from step_megatron.audio.index import validate
from step_megatron.config.load import load_config, save
from step_megatron.data.schema import Audio, Conversation, Text, Turn, write_conversations
from step_megatron.data.tokenizer import QWEN_RANKS, build_compact

PITCHES = {"low": 110.0, "mid": 220.0, "high": 440.0}


def write_clips(folder: Path) -> list[tuple[str, str]]:
    """Twelve tones, (address, label), half of them 16 kHz wav and half 8 kHz flac; one is not audio."""
    clips = []
    generator = np.random.default_rng(0)
    for i, (label, pitch) in enumerate(itertools.islice(itertools.cycle(PITCHES.items()), 12)):
        rate, ending = ((16000, "wav"), (8000, "flac"))[i % 2]
        t = np.arange(int(rate * (0.3 + 0.05 * i))) / rate
        samples = 0.2 * np.sin(2 * np.pi * pitch * t) + 0.01 * generator.standard_normal(t.size)
        soundfile.write(folder / f"{i}.{ending}", samples, rate)
        clips.append((f"{i}.{ending}", label))
    (folder / "broken.wav").write_bytes(b"RIFF nothing")
    return clips


def conversations(clips: list[tuple[str, str]], split: str) -> list[Conversation]:
    return [
        Conversation(
            f"{split}-{i}",
            "tones",
            (Turn("human", (Audio(address), Text("How high?"))), Turn("assistant", (Text(label),), reasoning="a tone")),
            {"task": "pitch", "answer": label, "split": split},
        )
        for i, (address, label) in enumerate(clips)
    ]


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory) -> Path:
    """A compact tokenizer of bytes over a file of the size of `qwen.tiktoken`."""
    longer = (bytes(t) for t in itertools.product(range(256), range(256), range(4)))
    tokens = itertools.chain((bytes([b]) for b in range(256)), longer)
    source = tmp_path_factory.mktemp("qwen") / "qwen.tiktoken"
    lines = (base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(itertools.islice(tokens, QWEN_RANKS)))
    source.write_bytes(b"".join(lines))
    folder = tmp_path_factory.mktemp("tokenizer")
    build_compact([], source, folder, limit=300)
    return folder


@pytest.fixture(scope="session")
def trained(tokenizer_dir, tmp_path_factory) -> SimpleNamespace:
    """`run`: directory of a run trained as TP2 by its configuration; `data`: its data directory."""
    from step_megatron.checkpoint.saving import Checkpoints
    from step_megatron.runtime.device import initialize, shutdown
    from step_megatron.training.state import build_state

    data, run = tmp_path_factory.mktemp("data"), tmp_path_factory.mktemp("run")
    clips = write_clips(data)
    write_conversations(data / "train.jsonl", conversations(clips[6:], "train"))
    write_conversations(data / "test.jsonl", conversations([*clips[:6], ("broken.wav", "low")], "test"))
    sums = Turn("human", (Text("1 + 1?"),)), Turn("assistant", (Text("2"),))
    write_conversations(data / "text_test.jsonl", [Conversation("sum", "sums", sums, {"task": "sums", "answer": "2"})])
    validate([*(address for address, _ in clips), "broken.wav"], data, data, quarantine_limit=1.0, threads=1)
    sizes = "num_layers: 2, hidden_size: 64, ffn_hidden_size: 128, num_attention_heads: 2, num_query_groups: 1"
    config = load_config(
        None,
        [
            f"run={{dir: {run}, threads: 1, seed: 3}}",
            "model={preset: tiny, vocabulary_size: 320, max_positions: 512}",
            "encoder={mels: 80, width: 64, layers: 1, heads: 1, ffn_width: 128, weights: random}",
            "adaptor.width=64",
            f"tokenizer.path={tokenizer_dir}",
            f"data.index={data}",
            f"megatron={{transformer: {{{sizes}}}, optimizer: {{lr: 1e-3}}}}",
        ],
    )
    runtime = initialize(config)
    state = build_state(config, runtime.control_group)
    with closing(Checkpoints(run)) as checkpoints:
        checkpoints.save(1, state.model, state.optimizer, state.scheduler, {})
    shutdown()
    config.megatron.transformer |= {"tensor_model_parallel_size": 2, "sequence_parallel": True}
    save(config, run / "config.yaml")
    return SimpleNamespace(run=run, data=data)
