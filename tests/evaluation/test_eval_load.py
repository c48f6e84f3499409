"""A loaded run reads what training read; evaluation goes from a run directory to its files; chat keeps the conversation."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from step_megatron.audio.errors import AudioError
from step_megatron.config.load import for_one_process, load_config
from step_megatron.data.schema import Audio, Conversation, Text, Turn, read_conversations
from step_megatron.data.template import render
from step_megatron.evaluation.chat import Chat, chat
from step_megatron.evaluation.load import loaded_run
from step_megatron.evaluation.report import write_report
from step_megatron.evaluation.run import Limits, evaluate
from step_megatron.evaluation.tasks import read_items


def test_one_process_takes_any_layout(trained):
    config = load_config(trained.run / "config.yaml")
    alone = for_one_process(config)
    assert not {"tensor_model_parallel_size", "sequence_parallel"} & alone.megatron.transformer.keys()
    assert config.megatron.transformer["tensor_model_parallel_size"] == 2
    assert alone.megatron.transformer["hidden_size"] == config.megatron.transformer["hidden_size"]


def test_prompt_is_the_beginning_of_the_training_sample(trained):
    conversation = read_conversations(trained.data / "train.jsonl")[0]
    address = conversation.audio_addresses()[0]
    with loaded_run(trained.run, trained.data) as run:
        run.encode([address])
        prompt = run.prompt(conversation)
        features = run.features([address])[address]
        samples = run._audio.index[address].num_samples
        tokens = [((-(-samples // 160) + 1) // 2 // 2 - 1) // 2 + 1]
        sample = render(conversation, run.tokenizer, lambda _: tokens, "step-audio")
        patch = run.tokenizer.special("<audio_patch>")
    n = len(prompt.tokens)
    assert np.array_equal(prompt.tokens, sample.input_ids[:n])
    # The prompt ends exactly where the targets begin.
    assert not sample.loss_mask[:n].any() and sample.loss_mask[n]
    assert np.array_equal(prompt.audio_positions, np.flatnonzero(np.asarray(prompt.tokens) == patch))
    assert prompt.encoder_frames == (features.shape[0],) and torch.equal(prompt.audio_features, features)


def test_a_file_and_an_indexed_clip_give_the_same_bits(trained):
    with loaded_run(trained.run, trained.data) as run:
        run.encode(["3.flac"])
        name = run.add_file(trained.data / "3.flac")
        clips = run.features(["3.flac", name])
    assert torch.equal(clips["3.flac"], clips[name])


def test_reply_depends_on_the_clip_and_not_on_companions(trained):
    asked = read_conversations(trained.data / "test.jsonl")
    with loaded_run(trained.run, trained.data) as run:
        run.encode([address for each in asked for address in each.audio_addresses()])
        together = run.reply(asked, max_new_tokens=6)
        alone = [run.reply([each], max_new_tokens=6)[0] for each in asked]
        seeds = list(range(len(asked)))
        drawn = run.reply(asked, 6, temperature=1.0, seed=seeds)
        drawn_alone = [run.reply([each], 6, temperature=1.0, seed=[seed])[0] for each, seed in zip(asked, seeds, strict=True)]
    assert together == alone and drawn == drawn_alone != together
    assert together[-1] is None and None not in together[:-1]
    assert len(set(together)) > 1


def test_a_relative_data_directory_is_the_shells(trained, monkeypatch):
    monkeypatch.chdir(trained.data.parent)
    with loaded_run(trained.run, Path(trained.data.name)) as run:
        addresses = [item.audio[0] for item in read_items(trained.data) if item.audio][:1]
        run.encode(addresses)
        assert run.features(addresses)[addresses[0]] is not None


def test_clip_that_was_never_indexed_says_what_to_do(trained):
    with loaded_run(trained.run, trained.data) as run, pytest.raises(ValueError, match="data validate"):
        run.encode(["never.wav"])


def test_prompts_follow_the_runs_setting_of_earlier_reasoning(trained):
    turns = [
        Turn("human", (Audio("0.wav"), Text("How high?"))),
        Turn("assistant", (Text("low"),), reasoning="a deep tone"),
        Turn("function_output", (Text("110 Hz"),)),
        Turn("human", (Text("And this?"), Audio("1.flac"))),
    ]
    conversation = Conversation("c", "s", tuple(turns))
    with loaded_run(trained.run, trained.data) as run:
        run.encode(["0.wav", "1.flac"])
        kept = run.prompt(conversation)
        run.config.tokenizer.earlier_reasoning = "strip"
        stripped = run.prompt(conversation)
        texts = [run.tokenizer.decode(prompt.tokens, skip_special=True) for prompt in (kept, stripped)]
    assert texts[1] == texts[0].replace("a deep tone", "") != texts[0] and "110 Hz" in texts[1]
    assert stripped.encoder_frames == kept.encoder_frames and len(stripped.audio_positions) == len(kept.audio_positions)


def test_missing_run_and_missing_checkpoint_say_what_to_do(trained, tmp_path):
    with pytest.raises(FileNotFoundError, match="directory of a run"), loaded_run(tmp_path):
        pass
    (tmp_path / "config.yaml").write_text((trained.run / "config.yaml").read_text())
    with pytest.raises(FileNotFoundError, match="no checkpoint yet"), loaded_run(tmp_path):
        pass


def test_evaluate_and_report_from_a_run_directory(trained, tmp_path, capsys):
    out = tmp_path / "results.json"
    limits = Limits(max_new_tokens=5)
    results = evaluate(trained.run, trained.data, out, limits)
    assert json.loads(out.read_text()) == results
    task = results["tasks"]["pitch"]
    assert (task["attempted"], task["failed"], task["n"], task["probe_n"]) == (7, 1, 6, 6)
    assert results["text_only"]["n"] == 1 and results["seconds"]["evaluate"] > 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("results: pitch ")
    before = (tmp_path / "predictions.jsonl").read_text()
    evaluate(trained.run, trained.data, out, limits)
    assert (tmp_path / "predictions.jsonl").read_text() == before
    write_report(trained.run, trained.data, tmp_path / "report.html", out)
    assert (tmp_path / "report.html").read_text().count("data:audio/wav;base64,") == 6


class Parrot:
    """Answers with the number of turns and clips that it was given."""

    def __init__(self, thinks_forever: bool = False):
        self.thinks_forever, self.conversations = thinks_forever, []

    def add_file(self, path):
        if path.suffix != ".wav":
            raise AudioError("corrupt", "not audio")
        return str(path)

    def reply(self, conversations, max_new_tokens, temperature=0.0, seed=0):
        self.conversations += conversations
        text = f"heard {len(conversations[0].audio_addresses())}"
        return [text if self.thinks_forever else f"{text}\n</think>\n{len(conversations[0].turns)} turns<|EOT|>"]


def test_chat_keeps_turns_clips_and_reasoning(tmp_path):
    clip = tmp_path / "a b.wav"
    clip.write_bytes(b"")
    lines: list[str] = []
    session = Chat(parrot := Parrot(), lines.append)
    for line in (f"/audio {clip}", "What is it?", "", "And now?\n"):
        assert session.command(line)
    assert lines[1:] == ["  thinks: heard 1", "model: 1 turns", "  thinks: heard 1", "model: 3 turns"]
    last = parrot.conversations[-1].turns
    assert last[0] == Turn("human", (Audio(str(clip)), Text("What is it?")))
    assert last[1] == Turn("assistant", (Text("1 turns"),), reasoning="heard 1")
    session.command("/new")
    session.command("Hello")
    assert len(parrot.conversations[-1].turns) == 1
    assert not session.command("/quit")


def test_chat_says_what_is_wrong_and_goes_on(tmp_path):
    (tmp_path / "x.txt").write_text("no audio")
    lines: list[str] = []
    session = Chat(Parrot(thinks_forever=True), lines.append)
    for line in (f"/audio {tmp_path}/none.wav", f"/audio {tmp_path}/x.txt", "/what", "Hi"):
        assert session.command(line)
    assert "no such file" in lines[0] and "corrupt: not audio" in lines[1] and "commands:" in lines[2]
    assert lines[-1].startswith("model: (no answer")


def test_chat_with_a_run(trained, capsys):
    lines = iter(["And the pitch?", f"/audio {trained.data / '1.flac'}", "This one?"])
    chat(trained.run, [trained.data / "0.wav"], "How high?", lines, max_new_tokens=8)
    assert capsys.readouterr().out.count("model: ") == 3
    with pytest.raises(ValueError, match="no such file"):
        chat(trained.run, [trained.data / "no.wav"])
    with pytest.raises(ValueError, match="broken.wav"):
        chat(trained.run, [trained.data / "broken.wav"], lines=iter([]))
