"""The report is one file that asks the network for nothing, holds what was measured, and says what is missing."""

import base64
import io
import json
import math
import wave
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import soundfile

from step_megatron.evaluation.charts import Bar, Series, bar_panel, line_chart, log_ticks, nice_ticks, number, running_median
from step_megatron.evaluation.files import write_json, write_jsonl
from step_megatron.evaluation.predictions import Prediction
from step_megatron.evaluation.report import beats_controls, choose_clips, write_report
from step_megatron.evaluation.results import build_results


class Page(HTMLParser):
    """Tags, their addresses and the text of a page; complains about tags that are not closed in order."""

    VOID = {"meta", "link", "img", "br", "input", "hr"}

    def __init__(self, text: str):
        super().__init__()
        self.addresses, self.tags, self.open, self.words = [], [], [], []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag not in self.VOID:
            self.open.append(tag)
        self.addresses += [
            (tag, value) for name, value in attributes if name in ("src", "href", "srcset", "data", "action", "poster")
        ]
        self.addresses += [(tag, value) for name, value in attributes if name == "style" and "url(" in value]

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


@pytest.fixture
def run(tmp_path):
    """A run directory with metrics, results and predictions, and its data directory."""
    data, run = tmp_path / "data", tmp_path / "quick<start>"
    data.mkdir()
    run.mkdir()
    predictions = []
    for i in range(20):
        samples = 0.3 * np.sin(2 * np.pi * (200 + 40 * i) * np.arange(16000) / 16000)
        soundfile.write(data / f"{i}.flac", samples, 16000)
        predictions.append(
            Prediction(f"l{i}", "language", "classification", "Which <b>language</b>?", "fr", "r", (f"{i}.flac",),
                       "long & short</think>fr" if i % 4 else "x</think>it", (f"{(i + 1) % 20}.flac",), "</think>it", "fr")
        )  # fmt: skip
    (data / "SUMMARY.json").write_text("{}")
    soundfile.write(data / "long.wav", np.full(16000 * 9, 0.1), 16000)
    predictions.append(Prediction("long", "transcription", "transcription", "?", "a b", None, ("long.wav",), "</think>a"))
    predictions.append(Prediction("gone", "transcription", "transcription", "?", "a b", None, ("gone.wav",), "</think>a"))
    predictions.append(Prediction("s", "sums", "text_only", "?", "4", None, (), "</think>4"))
    results = build_results(predictions, {"language": ["it", "fr"]}, {"encode": 61, "evaluate": 9})
    write_json(run / "results.json", results)
    write_jsonl(run / "predictions.jsonl", (p.row() for p in predictions))
    steps = [{"step": s, "time": 0.0, "loss": 3 / s, "loss/audio": 4 / s, "grad_norm": "nan", "mfu": None} for s in range(1, 40)]
    write_jsonl(run / "metrics.jsonl", steps)
    (run / "config.yaml").write_text("model:\n  preset: tiny # <ours>\n")
    return run, data, predictions


def test_report_asks_the_network_for_nothing(run):
    folder, data, _ = run
    write_report(folder, data, folder / "report.html")
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert page.addresses and all(value.startswith("data:audio/wav;base64,") for _, value in page.addresses)
    assert not {"script", "link", "iframe", "img", "object", "embed"} & set(page.tags)
    assert "@import" not in text and "url(" not in text and "://" not in text
    assert len(text) < 3_000_000


def test_report_holds_results_and_escapes_what_others_wrote(run):
    folder, data, _ = run
    write_report(folder, data, folder / "report.html")
    text = (folder / "report.html").read_text()
    page = Page(text)
    assert "<b>language</b>" not in text and "quick&lt;start&gt;" in text and "&lt;ours&gt;" in text
    for expected in (
        "0.75",
        "Transcription",
        "sums",
        "61.0 s",
        "1:10",
        "one speaker a language",
        "No transcript occurs in two splits",
        "long & short",
        "39 training steps",
    ):
        assert expected in page.text, expected
    assert page.tags.count("audio") == 12


def test_whisper_stands_beside_the_model_in_every_language(run):
    folder, data, _ = run
    results = json.loads((folder / "results.json").read_text())
    rates = {"n": 7, "failed": 0, "unparsable": 0}
    results["transcription"] |= {
        "languages": {"en": {"cer": 0.31, "wer": 0.52, **rates}, "fr": {"cer": 0.83, "wer": 0.94, **rates}},
        "whisper": {"name": "whisper-base", "cer": 0.05, "wer": 0.11, **rates, "languages": {"en": {"cer": 0.04, "wer": 0.07}}},
    }
    write_json(folder / "results.json", results)
    write_report(folder, data, folder / "report.html")
    text = " ".join(Page((folder / "report.html").read_text()).text.split())
    order = ("all, whisper-base 0.05 0.11", "en 0.31 0.52", "en, whisper-base 0.04 0.07", "fr 0.83 0.94")
    places = [text.index(row) for row in order]
    assert places == sorted(places)


def test_confounds_of_the_open_recordings_are_said_of_them_only(run):
    folder, data, _ = run
    (data / "SUMMARY.json").unlink()
    write_report(folder, data, folder / "report.html")
    text = Page((folder / "report.html").read_text()).text
    assert "Asterisk" not in text and "No transcript occurs" not in text and "Wilson" in text


def test_ablation_is_shown_beside(run, tmp_path):
    folder, data, _ = run
    other = json.loads((folder / "results.json").read_text())
    other["text_only"]["accuracy"] = 0.25
    write_json(tmp_path / "other.json", other)
    write_report(folder, data, folder / "report.html", ablation=tmp_path / "other.json")
    assert "+0.75" in Page((folder / "report.html").read_text()).text


def test_report_without_optional_files(run):
    folder, data, _ = run
    for name in ("metrics.jsonl", "predictions.jsonl", "config.yaml"):
        (folder / name).unlink()
    write_report(folder, data, folder / "report.html")
    page = Page((folder / "report.html").read_text())
    assert "No metrics were found" in page.text and "audio" not in page.tags
    (folder / "results.json").unlink()
    with pytest.raises(FileNotFoundError, match="step-megatron eval"):
        write_report(folder, data, folder / "report.html")


def test_damaged_results_name_the_file(run):
    folder, data, _ = run
    (folder / "results.json").write_text('{"tasks": ')
    with pytest.raises(ValueError, match="results.json:1"):
        write_report(folder, data, folder / "report.html")


def test_clips_are_what_is_heard_and_stay_within_the_budget(run):
    folder, data, predictions = run
    clips = choose_clips(predictions, data, count=4, budget=100_000)
    assert len(clips) == 3 and {clip.task for clip in clips} == {"language"}
    assert clips == choose_clips(predictions, data, count=4, budget=100_000)
    assert {clip.right for clip in choose_clips(predictions, data)} == {True, False}
    with wave.open(io.BytesIO(base64.b64decode(clips[0].uri.partition(",")[2]))) as file:
        assert (file.getnchannels(), file.getframerate(), file.getnframes()) == (1, 16000, 16000)
        heard = np.frombuffer(file.readframes(16000), "<i2") / 32767
    originals = [soundfile.read(data / f"{i}.flac")[0] for i in range(20)]
    assert min(np.abs(heard - original).max() for original in originals) < 1e-3


def test_beating_the_controls_needs_more_than_chance():
    good = {
        "accuracy": 0.9,
        "accuracy_interval": [0.8, 0.95],
        "majority": 0.3,
        "other_clip": 0.2,
        "other_clip_interval": [0.1, 0.4],
    }
    assert beats_controls(good)
    assert not beats_controls(good | {"majority": 0.81})
    assert not beats_controls(good | {"other_clip_interval": [0.1, 0.85]})
    assert not beats_controls(good | {"other_clip": None})


def points(svg: str) -> list[list[tuple[float, float]]]:
    lines = ElementTree.fromstring(svg).iter("polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_curve_is_drawn_to_scale():
    (curve,) = points(line_chart("Loss", [Series("a", [(0, 0.0), (10, 5.0), (20, 10.0)])]))
    xs, ys = zip(*curve, strict=True)
    assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2) and ys[0] - ys[1] == pytest.approx(ys[1] - ys[2], abs=0.2)
    assert ys[0] > ys[2] and 0 <= xs[0] < xs[2] <= 360
    (curve,) = points(line_chart("Norm", [Series("a", [(0, 1.0), (1, 10.0), (2, 100.0), (3, 0.0), (4, math.nan)])], log=True))
    assert len(curve) == 3 and curve[0][1] - curve[1][1] == pytest.approx(curve[1][1] - curve[2][1], abs=0.2)


def test_smoothing_adds_a_median_and_empty_charts_say_so():
    noisy = [(i, 100.0 if i == 20 else 1.0) for i in range(41)]
    raw, median = points(line_chart("x", [Series("a", noisy, smooth=True)]))
    assert min(y for _, y in raw) < min(y for _, y in median)
    assert running_median([1, 9, 2, 8, 3], 1) == [9, 2, 8, 3, 8]
    assert "no values recorded" in line_chart("x", [Series("a", [(1, math.nan)])])
    assert len(points(line_chart("x", [Series("a", [(1, 2.0)])]))) == 0


def test_bars_are_to_scale_and_clipped():
    svg = ElementTree.fromstring(
        bar_panel("t", "n", [Bar("a", 0.5, "model", (0.4, 0.6)), Bar("b", 1.0, "plain"), Bar("c", None, "other")])
    )
    widths = [float(rect.get("width")) for rect in svg.iter("rect")]
    assert widths[0] == pytest.approx(widths[1] / 2, abs=0.1) and len(widths) == 2
    assert "not measured" in "".join(svg.itertext())


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0.0213, 0.0298), (-3, 7), (0, 12345), (5, 5)])
def test_ticks_are_round_and_inside(low, high):
    ticks = nice_ticks(low, high)
    assert 1 <= len(ticks) <= 7 and all(low <= tick <= high + 1e-9 for tick in ticks)
    assert all(len(f"{tick:.3g}") <= 7 for tick in ticks)
    assert [round(10**tick, 6) for tick in log_ticks(-1, 0)] == [0.1, 0.2, 0.5, 1]


def test_numbers_are_short():
    values = (0, 3e-4, 0.05, 1.5, 1200, 6.5e10)
    assert [number(value) for value in values] == ["0", "3e-4", "0.05", "1.5", "1.2k", "65G"]
