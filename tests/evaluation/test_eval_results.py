"""Results: exactly the published form, controls scored against the original label, counts by hand, files whole or not at all."""

import json
import os

import pytest
import torch

from step_megatron.data.schema import Audio, Conversation, Text, Turn
from step_megatron.evaluation import files
from step_megatron.evaluation.predictions import Prediction, read_predictions
from step_megatron.evaluation.results import build_results, result_line
from step_megatron.evaluation.run import Limits, predict, print_samples, sample_predictions, stage_seconds
from step_megatron.evaluation.tasks import Labelled, to_item

LANGUAGES = ("italian", "french", "russian")


def prediction(name: str, answer: str, reply: str | None, kind: str = "classification", **more) -> Prediction:
    task = more.pop("task", {"classification": "language"}.get(kind, kind))
    return Prediction(name, task, kind, "?", answer, None, ("a.wav",), reply, **more)


def test_results_have_exactly_the_published_form():
    results = build_results(
        [
            prediction("1", "a", "</think>a", other_clip=("b.wav",), other_clip_reply="</think>b", probe="a"),
            prediction("2", "b", "</think>a", other_clip=("a.wav",), other_clip_reply="</think>b", probe="b"),
            prediction("3", "hello", "</think>hello", "transcription"),
            prediction("4", "7", "</think>7", "text_only", task="sums"),
        ],
        {"language": ["a", "a", "b"], "sums": ["7"]},
        {"encode": 1.5, "evaluate": 2},
    )
    assert list(results) == ["tasks", "transcription", "text_only", "aspects", "seconds"]
    task = results["tasks"]["language"]
    assert {key: task[key] for key in ("accuracy", "majority", "other_clip", "probe", "n")} == {
        "accuracy": 0.5,
        "majority": 0.5,
        "other_clip": 0.5,
        "probe": 1.0,
        "n": 2,
    }
    assert {key: results["transcription"][key] for key in ("cer", "wer", "n")} == {"cer": 0, "wer": 0, "n": 1}
    assert results["text_only"]["accuracy"] == 1 and results["text_only"]["tasks"]["sums"]["n"] == 1
    assert results["seconds"] == {"encode": 1.5, "evaluate": 2.0}
    assert json.loads(json.dumps(results, allow_nan=False)) == results


def test_counts_and_controls_by_hand():
    members = [
        prediction("1", "a", "</think>a", other_clip=("x",), other_clip_reply="</think>a", probe="b"),
        prediction("2", "a", "no end", other_clip=("x",), other_clip_reply="</think>b", probe="a"),
        prediction("3", "b", None, other_clip=("x",), other_clip_reply=None, probe="b"),
        prediction("4", "b", "</think>c", other_clip=("x",), other_clip_reply="</think>zzz", probe="a"),
        prediction("5", "b", "</think>B.", other_clip=("x",), other_clip_reply="</think>c"),
    ]
    task = build_results(members, {"language": ["c", "b", "b"]}, {})["tasks"]["language"]
    assert (task["attempted"], task["scored"], task["failed"], task["unparsable"], task["n"]) == (5, 4, 1, 1, 4)
    # `c` is a label of the train split: a wrong answer, not an unparsable one.
    assert task["labels"] == ["a", "b", "c"]
    assert task["accuracy"] == 2 / 4
    assert task["majority"] == 2 / 4
    assert (task["other_clip"], task["other_clip_n"]) == (1 / 4, 4)
    assert (task["probe"], task["probe_n"]) == (1 / 3, 3)


def test_nothing_measured_is_null_not_zero():
    results = build_results([prediction("1", "a", None)], {}, {})
    task = results["tasks"]["language"]
    assert [task[key] for key in ("accuracy", "majority", "other_clip", "probe")] == [None] * 4
    assert results["transcription"]["cer"] is None and results["text_only"]["accuracy"] is None
    assert "language - (majority -, other clip -, probe -, n 0)" in result_line(results)


def test_transcripts_are_scored_by_language_beside_whisper():
    """By hand: a word of two is wrong in English, none of three in French; what names no language is in the whole alone."""
    members = [
        prediction("1", "press one", "</think>press two", "transcription", language="en"),
        prediction("2", "au revoir monsieur", "</think>Au revoir, Monsieur.", "transcription", language="fr"),
        prediction("3", "ciao", "</think>addio", "transcription"),
    ]
    whisper = {"name": "whisper-base", "cer": 0.0, "wer": 0.0, "n": 2, "languages": {}}
    results = build_results(members, {}, {}, whisper)
    spoken = results["transcription"]
    assert {name: (rates["wer"], rates["n"]) for name, rates in spoken["languages"].items()} == {"en": (0.5, 1), "fr": (0.0, 1)}
    assert (spoken["wer"], spoken["n"], spoken["whisper"]) == (2 / 6, 3, whisper)
    line = result_line(results)
    assert "transcription cer 0.23 wer 0.33 (n 3); en cer" in line and "whisper-base cer 0.00 wer 0.00 (n 2)" in line


def test_other_corpus_takes_the_train_labels_of_its_task():
    members = [prediction(str(i), "fr", "</think>fr", task="language_other_corpus") for i in range(2)]
    task = build_results(members, {"language": ["fr", "it", "fr"]}, {})["tasks"]["language_other_corpus"]
    assert (task["majority"], task["trained_on"], task["labels"]) == (1.0, "language", ["fr", "it"])


def test_result_line_is_one_line():
    line = result_line(build_results([prediction("1", "a", "</think>a")], {"language": ["a"]}, {"train": 225.4}))
    assert "\n" not in line and line.startswith("results: language 1.00 (majority 1.00") and line.endswith("seconds train 225")


class FakeListener:
    """Hears the label that a clip's name begins with; cannot read clips called broken; never answers about `mute`."""

    def __init__(self):
        self.encoded: list[str] = []
        self.batches: list[int] = []

    def encode(self, addresses):
        self.encoded += addresses

    def features(self, addresses):
        assert set(addresses) <= set(self.encoded)
        means = {label: 5.0 * i for i, label in enumerate(LANGUAGES)}
        noise = torch.Generator().manual_seed(0)
        return {
            a: None if "broken" in a else means.get(a.split("-")[0], 0) + torch.randn(6, 4, generator=noise) for a in addresses
        }

    def reply(self, conversations, max_new_tokens, progress=None):
        self.batches.append(len(conversations))
        replies = []
        for each in conversations:
            assert each.turns[-1].role == "human"
            clip = next(iter(each.audio_addresses()), "")
            replies.append(None if "broken" in clip else f"heard</think>{clip.split('-')[0] or '4'}")
        return replies


def item(name: str, task: str, answer: str, clip: str | None):
    content = ((Audio(clip),) if clip else ()) + (Text("?"),)
    turns = (Turn("human", content), Turn("assistant", (Text(answer),)))
    return to_item(Conversation(name, "s", turns, {"task": task, "answer": answer}), "f")


def train_labels(n: int) -> list[Labelled]:
    return [Labelled("language", LANGUAGES[i % 3], (f"{LANGUAGES[i % 3]}-train{i}.wav",)) for i in range(n)]


def held_out(n: int) -> list:
    labels = [LANGUAGES[i % 3] for i in range(n)]
    return [item(f"test{i}", "language", label, f"{label}-test{i}.wav") for i, label in enumerate(labels)]


def test_a_perfect_listener_is_perfect_and_the_control_is_at_zero():
    test = held_out(12) + [item("t", "sums", "4", None), item("w", "transcription", "ciao", "ciao-1.wav")]
    train = train_labels(30) + [Labelled("sums", "4", ())]
    listener = FakeListener()
    predictions = predict(listener, test, train, Limits())
    results = build_results(predictions, {"language": [t.answer for t in train[:30]], "sums": ["4"]}, {})
    task = results["tasks"]["language"]
    assert (task["accuracy"], task["other_clip"], task["probe"], task["n"]) == (1.0, 0.0, 1.0, 12)
    assert results["transcription"]["cer"] == 0 and results["text_only"]["accuracy"] == 1
    # 12 own and 12 other clips and the other tasks, all at once: the engine sees to the batches. No clip is asked for twice.
    assert listener.batches == [26]
    assert len(listener.encoded) == len(set(listener.encoded))


def test_a_clip_that_cannot_be_read_is_failed_not_wrong():
    test = held_out(6) + [item("b", "language", "french", "broken-9.wav")]
    results = build_results(predict(FakeListener(), test, train_labels(9), Limits()), {"language": ["french"]}, {})
    task = results["tasks"]["language"]
    assert (task["attempted"], task["failed"], task["n"], task["accuracy"], task["probe_n"]) == (7, 1, 6, 1.0, 6)


def test_predictions_survive_their_file(tmp_path):
    predictions = predict(FakeListener(), held_out(6), train_labels(9), Limits())
    files.write_jsonl(tmp_path / "predictions.jsonl", (p.row() for p in predictions))
    assert read_predictions(files.read_jsonl(tmp_path / "predictions.jsonl")) == predictions


def test_samples_are_spread_over_the_tasks():
    test = held_out(9) + [item(f"s{i}", "sums", "4", None) for i in range(9)]
    predictions = predict(FakeListener(), test, train_labels(9), Limits())
    chosen = sample_predictions(predictions, 4, seed=0)
    assert sorted(p.task for p in chosen) == ["language", "language", "sums", "sums"]
    lines: list[str] = []
    print_samples(predictions, Limits(samples=4), lines.append)
    assert sum("question" in line for line in lines) == 4 and any("reasoning  heard" in line for line in lines)


def test_stage_seconds_are_read_oldest_first(tmp_path):
    for age, (name, text) in enumerate([("midtrain", "200"), ("encode", "10.5\n")]):
        path = tmp_path / f"seconds.{name}"
        path.write_text(text)
        os.utime(path, (1000 - age, 1000 - age))
    assert list(stage_seconds(tmp_path).items()) == [("encode", 10.5), ("midtrain", 200.0)]
    (tmp_path / "seconds.bad").write_text("soon")
    with pytest.raises(ValueError, match="seconds.bad"):
        stage_seconds(tmp_path)


@pytest.mark.parametrize("broken", ["write", "replace"])
def test_interrupted_write_keeps_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "results.json"
    files.write_json(path, {"old": 1})

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync" if broken == "write" else "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        files.write_json(path, {"new": 2})
    assert json.loads(path.read_text()) == {"old": 1}
    assert os.listdir(tmp_path) == ["results.json"]


def test_results_are_strict_json(tmp_path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "x.json", {"cer": float("nan")})
    assert not list(tmp_path.iterdir())


def test_damaged_lines_name_their_place(tmp_path):
    path = tmp_path / "p.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(ValueError, match=r"p\.jsonl:2: not JSON"):
        files.read_jsonl(path)
    path.write_text('{"a": 1}\n{"a": ')
    assert files.read_jsonl(path) == [{"a": 1}]
