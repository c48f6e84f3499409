"""SFT from a configuration: it starts from a run, takes as many steps as its epochs have, and reports by aspect."""

from pathlib import Path

import pytest
from training.test_midtrain import CLOCK
from training.toy_run import overrides, train, write_data

from step_megatron.config import ConfigError, load_config
from step_megatron.data.schema import Audio, Conversation, Text, Turn, write_conversations
from step_megatron.runtime.metrics import read_metrics
from step_megatron.training.sft import sft

ASPECTS = ({"aspect": "continuity", "aspect_kind": "context"}, {"aspect": "naturalness"})


def dialogue(number: int, meta: dict) -> Conversation:
    clips = [f"{(number + i) % 12}.wav" for i in range(2)]
    turns = [
        turn
        for clip in clips
        for turn in (Turn("human", (Audio(clip), Text("How high?"))), Turn("assistant", (Text("low"),), reasoning="a tone"))
    ]
    last = (Turn("human", (Text("Both?"),)), Turn("assistant", (Text("no " * (1 + number % 3)),), reasoning="two tones"))
    return Conversation(f"d{number}", "dialogues", (*turns, *last), meta)


@pytest.fixture(scope="module")
def data(worker_pool, tmp_path_factory) -> str:
    """The toy data with dialogues of two aspects, and a run of three steps to start from."""
    folder = tmp_path_factory.mktemp("toy_dialogues")
    write_data(folder)
    made = [dialogue(i, ASPECTS[i % 2]) for i in range(24)]
    leak = (Turn("human", (Audio("0.wav"),)), Turn("assistant", (Text("Error code: 429 - too many requests"),)))
    write_conversations(folder / "dialogues.jsonl", [*made, Conversation("leak", "dialogues", leak)])
    for number, name in enumerate(("context", "natural")):
        write_conversations(folder / f"{name}.jsonl", [dialogue(100 + i, ASPECTS[number]) for i in range(4)])
    arguments = {"data": str(folder), "run_dir": str(folder / "midtrained"), "extra": ("training.steps=3",)}
    worker_pool(1).run(train, arguments)
    return str(folder)


def settings(data: str) -> tuple[str, ...]:
    return (
        f"model.weights={data}/midtrained",
        f"data.sources=[{{name: dialogues, path: {data}/dialogues.jsonl}}]",
        f"data.validation=[{{name: c, path: {data}/context.jsonl}}, {{name: n, path: {data}/natural.jsonl}}]",
        "data.filters=[api_error, role_order]",
        "tokenizer.earlier_reasoning=strip",
        "data.packing_window=8",
        "training.epochs=1",
    )


def lines(run_dir: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if not any(word in k for word in CLOCK)} for line in read_metrics(run_dir)]


def test_an_epoch_of_dialogues_by_aspect_and_after_a_stop_the_same(worker_pool, data, tmp_path):
    def run(name: str, signal_at: int = 0) -> dict:
        arguments = {"data": data, "run_dir": str(tmp_path / name), "extra": settings(data), "stage": "sft"}
        return worker_pool(1).run(train, arguments | {"signal_at": signal_at})[0]

    whole = run("whole")
    (*_, last) = lines(tmp_path / "whole")
    # 24 dialogues, each a sample of every one of its three rounds; a step holds up to 512 tokens.
    assert whole["steps"] == last["step"] > 6, "not the six steps of the toy run"
    assert last["samples_left_out"] == 1
    by_aspect = [last["aspect_loss/continuity"], last["aspect_loss/naturalness"]]
    assert min(by_aspect) <= last["loss"] == last["loss/dialogues"] <= max(by_aspect)
    assert last["aspect_loss/continuity.context"] == last["aspect_loss/continuity"]
    assert last["validation_aspect_loss/continuity"] == last["validation_loss/c"]
    assert last["validation_aspect_loss/naturalness"] == last["validation_loss/n"] != last["validation_loss/c"]

    assert run("stopped", signal_at=3)["interrupted"] == "SIGTERM"
    run("stopped")
    assert lines(tmp_path / "stopped") == lines(tmp_path / "whole")


def test_sft_needs_something_to_start_from(data, tmp_path):
    with pytest.raises(ConfigError, match="model.weights is not set: name the folder of the run that SFT starts from"):
        sft(load_config(None, overrides(data, str(tmp_path))))
