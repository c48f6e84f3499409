"""Fixtures of the data tests: a Qwen-shaped vocabulary made on the spot, tokenizers, conversations and files of them."""

import base64
import random
from pathlib import Path
from types import SimpleNamespace

import pytest

from step_megatron.config.schema import Config, SourceConfig
from step_megatron.data.schema import Audio, Conversation, Text, Turn, write_conversations
from step_megatron.data.tokenizer import QWEN_RANKS, Tokenizer, build_compact

CORPUS = [
    "What is said in this recording? Hello there.",
    "你好，世界。",
    "The speaker talks for 2.5 s.\n",
    "Привет, мир",
    "because",
]


WORDS = ["recording", "because", "Hello", "said"]


def ranks() -> list[bytes]:
    """151,643 byte strings; each longer one is two earlier ones joined, as in a trained BPE. A few words are one token."""
    # As in Qwen's file, a byte's rank is not its value: rank 0 is "!".
    made = [bytes([(byte + 33) % 256]) for byte in range(256)]
    for word in WORDS:
        made += [word[:end].encode() for end in range(2, len(word) + 1)] + [f" {word}".encode()]
    # Tokens that would merge over the seams of a template.
    made += [b"\n\n", b"\n\n\n", b".\n", b".\n\n", b"\xe4\xbd", b"\xe4\xbd\xa0"]
    pairs = [bytes([a, b]) for a in range(128, 256) for b in range(128, 256)]
    made += pairs + [pair + bytes([byte]) for byte in range(128, 138) for pair in pairs]
    return list(dict.fromkeys(made))[:QWEN_RANKS]


@pytest.fixture(scope="session")
def tiktoken_path(tmp_path_factory) -> Path:
    """A file in the format and of the size of `qwen.tiktoken`."""
    path = tmp_path_factory.mktemp("qwen") / "qwen.tiktoken"
    path.write_bytes(b"".join(base64.b64encode(token) + b" %d\n" % rank for rank, token in enumerate(ranks())))
    return path


@pytest.fixture(scope="session")
def full(tiktoken_path) -> Tokenizer:
    return Tokenizer.load(tiktoken_path.parent)


@pytest.fixture(scope="session")
def compact(tiktoken_path, tmp_path_factory) -> Tokenizer:
    return build_compact(CORPUS, tiktoken_path, tmp_path_factory.mktemp("compact"), limit=300)


@pytest.fixture(scope="session")
def data_set(tmp_path_factory):
    """A folder of `audio.jsonl` (60 conversations about clips of up to 3 chunks) and `text.jsonl` (40); the clips' index."""
    folder = tmp_path_factory.mktemp("data_set")
    draw = random.Random(7)
    index = {f"audio/{i}.wav": SimpleNamespace(num_samples=draw.randint(2_000, 900_000)) for i in range(60)}
    spoken = [
        Conversation(
            f"clip-{i}",
            "recordings",
            (
                Turn("human", (Audio(f"audio/{i}.wav"), Text("What is said? " * draw.randint(1, 5)))),
                Turn("assistant", (Text("Hello there. " * draw.randint(1, 6)),), "The speaker talks. " * draw.randint(0, 3)),
            ),
            {"split": "train"},
        )
        for i in range(60)
    ]
    written = [
        Conversation(
            f"text-{i}", "sums", (Turn("human", (Text(f"{i} + 1?"),)), Turn("assistant", (Text(f"{i + 1} " * (1 + i % 9)),)))
        )
        for i in range(40)
    ]
    write_conversations(folder / "audio.jsonl", spoken)
    write_conversations(folder / "text.jsonl", written)
    return SimpleNamespace(folder=folder, index=index, spoken=spoken, written=written)


@pytest.fixture
def config(data_set) -> Config:
    """A run over the data set: two sources 3 to 1, four micro-batches of 1,024 tokens a step, windows of 32 samples."""
    config = Config()
    config.data.sources = [
        SourceConfig("speech", str(data_set.folder / "audio.jsonl"), 3.0),
        SourceConfig("reasoning", str(data_set.folder / "text.jsonl"), 1.0),
    ]
    config.data.index = str(data_set.folder / "index.jsonl")
    config.data.tokens_per_micro_batch, config.data.packing_window = 1024, 32
    config.training.micro_batches_per_step = 4
    return config
