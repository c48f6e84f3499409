"""Training conversations of the reward model: the judge's own prompt, the right order, and the loss where it belongs."""

import dataclasses
import json

import pytest
from training.toy_run import overrides

from step_megatron.cli import main
from step_megatron.config.rl import JudgeConfig
from step_megatron.data.preferences import Preference, Verdict, write_preferences
from step_megatron.data.schema import Audio, SchemaError, Text, Turn, read_conversations
from step_megatron.data.template import render
from step_megatron.rl.judge.prompt import build_prompt
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.judge.verdict import parse_verdict
from step_megatron.rl.preference_data import judge_conversation, pair_of

PREFERENCE = Preference(
    "p", "s", (Turn("human", (Audio("a.wav"), Text("Language?"))),), "It is Italian.", "Italian", "data",
    ("Is a sentence.",), Verdict((3,), 2), "{response} is a sentence, {reference} is not.",
)  # fmt: skip
JUDGE = JudgeConfig()


class Letters:
    """A tokenizer of characters, with specials as negative numbers."""

    def encode(self, text):
        return [ord(letter) for letter in text]

    def special(self, name):
        return -sum(ord(letter) << i for i, letter in enumerate(name))


def trained_text(conversation, template="step-audio") -> str:
    """The targets, specials as `*`."""
    sample = render(conversation, Letters(), lambda address: [3], template)
    return "".join(
        chr(i) if i >= 0 else "*" for i, m in zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True) if m
    )


@pytest.mark.parametrize("swapped", [False, True])
def test_the_prompt_is_the_one_that_the_judge_will_see(swapped):
    conversation = judge_conversation(PREFERENCE, swapped, JUDGE)
    prompt = build_prompt(pair_of(PREFERENCE), swapped, Scale())
    assert conversation.turns[:-1] == prompt.turns
    asked = render(prompt, Letters(), lambda address: [3], generation=True).input_ids.tolist()
    assert render(conversation, Letters(), lambda address: [3]).input_ids.tolist()[: len(asked)] == asked


def test_the_answer_turns_with_the_order_and_reads_as_a_verdict():
    straight, swapped = (judge_conversation(PREFERENCE, order, JUDGE).turns[-1] for order in (False, True))
    assert straight.reasoning == "Reply 1 is a sentence, Reply 2 is not."
    assert swapped.reasoning == "Reply 2 is a sentence, Reply 1 is not."
    for turn, verdict in ((straight, PREFERENCE.verdict), (swapped, PREFERENCE.verdict.swapped())):
        assert parse_verdict(f"{turn.reasoning}\n</think>\n{turn.text}", Scale(), 1) == verdict


def test_lines_about_a_reply_come_in_the_order_of_the_replies():
    record = dataclasses.replace(PREFERENCE, reasoning="Italian\n{response}: right\n{reference}: wrong\n{response} wins")
    straight, swapped = (judge_conversation(record, order, JUDGE).turns[-1].reasoning for order in (False, True))
    assert straight == "Italian\nReply 1: right\nReply 2: wrong\nReply 1 wins"
    assert swapped == "Italian\nReply 1: wrong\nReply 2: right\nReply 2 wins"


def test_the_loss_covers_reasoning_and_verdict_or_the_verdict_alone():
    verdict = '{"rubric": [3], "overall": 2}'
    with_reasoning = judge_conversation(PREFERENCE, False, JUDGE)
    assert trained_text(with_reasoning) == f"Reply 1 is a sentence, Reply 2 is not.\n*\n{verdict}*"
    without = judge_conversation(dataclasses.replace(PREFERENCE, reasoning=None), False, JUDGE)
    for template in ("step-audio", "chatml"):
        assert trained_text(without, template) == f"{verdict}*"


def test_what_cannot_be_trained_on_is_refused():
    with pytest.raises(SchemaError, match="'p' has no verdict"):
        judge_conversation(dataclasses.replace(PREFERENCE, verdict=None), False, JUDGE)
    with pytest.raises(SchemaError, match="level 0 is not on the scale of rl.judge.levels=6"):
        judge_conversation(dataclasses.replace(PREFERENCE, verdict=Verdict((0,), 2)), False, JudgeConfig(levels=6))


def test_the_command_converts_both_orders_and_counts_what_it_leaves_out(tmp_path, capsys):
    write_preferences(
        tmp_path / "p.jsonl",
        [PREFERENCE, dataclasses.replace(PREFERENCE, id="q", verdict=None), dataclasses.replace(PREFERENCE, id="r")],
    )
    out = tmp_path / "sub/judge.jsonl"
    assert (
        main(
            [
                "data",
                "from-preferences",
                "--preferences",
                str(tmp_path / "p.jsonl"),
                "--out",
                str(out),
                "rl.judge.instructions=brief",
            ]
        )
        == 0
    )
    assert "4 conversations; 1 records without a verdict are left out" in capsys.readouterr().out
    written = read_conversations(out)
    assert [c.id for c in written] == ["p:straight", "p:swapped", "r:straight", "r:swapped"]
    assert written[0].audio_addresses() == ("../a.wav",)
    write_preferences(tmp_path / "none.jsonl", [dataclasses.replace(PREFERENCE, verdict=None)])
    assert main(["data", "from-preferences", "--preferences", str(tmp_path / "none.jsonl"), "--out", str(out)]) == 2
    assert "no record has a verdict" in capsys.readouterr().err


def train_reward_model(rank: int, world_size: int, *, data: str, run_dir: str) -> dict:
    from step_megatron.config import load_config
    from step_megatron.training.reward import train_reward

    settings = [setting for setting in overrides(data, run_dir) if not setting.startswith(("data.", "data="))]
    sources = [f"data.sources=[{{name: judge, path: {data}/judge.jsonl}}]", "data.tokens_per_micro_batch=512"]
    validation = ["training.validation_interval=0", "megatron.optimizer.lr=1e-2", f"data.index={data}"]
    return train_reward(load_config(None, settings + sources + validation))


def test_a_reward_model_is_trained_by_the_supervised_stage(worker_pool, tmp_path):
    from training.toy_run import write_data

    write_data(tmp_path)
    history = (Turn("human", (Audio("0.wav"), Text("How high?"))),)
    records = [Preference(f"p{i}", "s", history, "low", "high", "data", (), Verdict((), 3)) for i in range(8)]
    write_preferences(tmp_path / "p.jsonl", records)
    command = ["data", "from-preferences", "--preferences", str(tmp_path / "p.jsonl"), "--out", str(tmp_path / "judge.jsonl")]
    assert main([*command, "rl.judge.instructions=brief"]) == 0
    run = tmp_path / "run"
    (summary,) = worker_pool(1).run(train_reward_model, {"data": str(tmp_path), "run_dir": str(run)})
    first = json.loads((run / "metrics.jsonl").read_text().splitlines()[0])
    assert summary["steps"] == 6 and summary["loss"] < 0.8 * first["loss"]
    assert summary["loss/judge"] == summary["loss"]
