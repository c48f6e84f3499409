"""Quality by aspect, by hand; and a dialogue on its way from the file to the results."""

from pathlib import Path

import pytest

from step_megatron.data.schema import Audio, Conversation, Text, Turn
from step_megatron.evaluation.aspects import score_aspects
from step_megatron.evaluation.predictions import Prediction
from step_megatron.evaluation.report import write_report
from step_megatron.evaluation.results import build_results, result_line
from step_megatron.evaluation.run import Limits, predict
from step_megatron.evaluation.tasks import to_item

FAST = {"has": ["fast"], "lacks": ["slow"], "form": "sentence"}


def prediction(name: str, aspect: str, reply: str | None, other: str | None = None, check: dict = FAST) -> Prediction:
    heard = None if other is None else ("b.wav",)
    return Prediction(name, aspect, "dialogue", "?", "fast", None, ("a.wav",), reply, heard, other, aspect=aspect, check=check)


def dialogue(name: str, label: str, aspect: str, kind: str | None = None) -> Conversation:
    turns = (
        Turn("human", (Audio(f"{name}-1.wav"), Text("How fast?"))),
        Turn("assistant", (Text("It is slow."),), reasoning="2 beats"),
        Turn("human", (Text("And this?"), Audio(f"{label}-2.wav"))),
        Turn("assistant", (Text(f"It is {label}."),), reasoning="5 beats"),
    )
    check = {"has": [label], "lacks": [each for each in ("fast", "slow") if each != label], "form": "sentence"}
    meta = {"aspect": aspect, **({"aspect_kind": kind} if kind else {}), "checks": [None, check]}
    return Conversation(name, "s", turns, {"task": f"{aspect}.{kind}", "answer": label, **meta})


def test_scores_by_hand():
    scores = score_aspects(
        [
            prediction("1", "continuity.context", "</think>It is fast.", other="</think>It is slow."),
            prediction("2", "continuity.context", "</think>fast", other="</think>It is fast."),
            prediction("3", "continuity.constraint", "</think>It is slow."),
            prediction("4", "continuity.constraint", "it never ends"),
            prediction("5", "continuity.constraint", None),
            prediction("6", "naturalness", "</think>It is fast."),
        ]
    )
    whole = scores["continuity"]
    assert [whole[key] for key in ("attempted", "n", "failed", "unparsable")] == [5, 4, 1, 1]
    assert [whole[key] for key in ("quality", "content", "form")] == [1 / 4, 2 / 4, 2 / 4]
    assert whole["other_clip"] == 1 / 2 and whole["quality_interval"][0] < 0.25 < whole["quality_interval"][1]
    assert {kind: score["quality"] for kind, score in whole["kinds"].items()} == {"context": 1 / 2, "constraint": 0.0}
    assert scores["naturalness"]["quality"] == 1.0 and scores["naturalness"]["kinds"] == {}
    assert scores["naturalness"]["other_clip"] is None
    assert score_aspects([prediction("1", "naturalness", None)])["naturalness"]["quality"] is None


class Parrot:
    """Answers with the label that the last clip's name begins with, in a sentence."""

    def encode(self, addresses):
        pass

    def features(self, addresses):
        raise AssertionError("dialogues have no probe")

    def reply(self, conversations, max_new_tokens, progress=None):
        assert all(each.turns[-1].role == "human" for each in conversations)
        return [f"beats</think>It is {each.audio_addresses()[-1].partition('-')[0]}." for each in conversations]


@pytest.fixture
def predictions() -> list[Prediction]:
    made = [
        dialogue(f"d{i}", label, "interaction_awareness", "revision") for i, label in enumerate(("fast", "slow", "fast", "slow"))
    ]
    made += [dialogue("n", "fast", "naturalness")]
    return predict(Parrot(), [to_item(each, "test.jsonl") for each in made], [], Limits())


def test_dialogues_are_answered_and_scored_by_their_checks(predictions):
    results = build_results(predictions, {}, {})
    assert results["tasks"] == {} and results["text_only"]["n"] == 0
    revision = results["aspects"]["interaction_awareness"]
    assert revision["quality"] == 1.0 and revision["n"] == 4
    assert revision["other_clip"] == 0.0, "with clips of other labels the parrot is wrong"
    assert results["aspects"]["naturalness"]["other_clip"] is None, "one label only"
    assert "interaction_awareness 1.00 (other clip 0.00, n 4)" in result_line(results)


def test_the_report_shows_them(predictions, tmp_path: Path):
    from step_megatron.evaluation.files import write_json, write_jsonl

    write_json(tmp_path / "results.json", build_results(predictions, {}, {}))
    write_jsonl(tmp_path / "predictions.jsonl", (each.row() for each in predictions))
    write_report(tmp_path, tmp_path, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "Does it converse?" in page and "interaction awareness: revision" in page
