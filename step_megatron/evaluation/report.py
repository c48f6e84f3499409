"""Write `report.html`: what a run learnt, how that was measured, and what the numbers do not say.

`write_report(run_dir, data_dir, out)` reads `metrics.jsonl`, `config.yaml` and `run.json` of the run, `results.json` and
`predictions.jsonl` of its evaluation, and puts clips from the data directory into the page. Parts that are missing are left out
and named.
"""

import base64
import io
import json
import wave
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from step_megatron.audio.address import parse_address
from step_megatron.audio.errors import AudioError
from step_megatron.audio.front_end import LogMelFrontEnd
from step_megatron.audio.geometry import SAMPLE_RATE
from step_megatron.data.recipes.build import SUMMARY_NAME
from step_megatron.evaluation import page
from step_megatron.evaluation.charts import Series, line_chart
from step_megatron.evaluation.files import read_jsonl, write_text
from step_megatron.evaluation.predictions import Prediction, read_predictions
from step_megatron.evaluation.rl_report import ppo_section, reward_model_section
from step_megatron.evaluation.run import sample_predictions
from step_megatron.evaluation.scoring import normalise_label, split_reply
from step_megatron.runtime.metrics import read_metrics
from step_megatron.runtime.progress import get_logger

logger = get_logger(__name__)

CLIPS = 12
# Bytes of wav in the page before base64 adds a third: the whole page stays under 3 MB.
CLIP_BYTES = 2_000_000
CLIP_SECONDS = 8.0

# Of the data that `data build` makes; another corpus with a task of the same name has confounds of its own.
CONFOUNDS = {
    "language": "Asterisk prompts have one speaker a language (Italian is a man, the others are women), so “language” there is "
    "also speaker and recording. “language other corpus” asks the same about another corpus with other speakers.",
    "tone": "Tone is asked about syllables (with their tone) that training never saw, but of the same two speakers.",
    "gender": "Gender is asked about synthesised voices that training never saw; no human voice is in it.",
    "gender_other_corpus": "“Gender other corpus” asks about human voices (Asterisk) after training on synthesised ones; "
    "all male clips there are of one man, the Italian.",
    "speaking_rate": "Speaking rate is asked about synthesised speech, with the measured rate as the truth.",
    "transcription": "Transcription is asked about texts that training never saw, of the speakers that it heard: one a language.",
}
SPLITS_APART = "No transcript occurs in two splits."
ALWAYS = (
    "“Other clip” is the same model and the same question with another clip of another label, scored against the original label: "
    "what the question alone gives away. Below chance is expected where the model follows the clip that it hears.",
    "“Probe” is a logistic regression on mean, standard deviation and first-half-minus-second-half of the same frozen features, "
    "trained on the train clips of that task. A model well below it does not use what the encoder gives it.",
    "Whiskers are 95% Wilson intervals: they cover the draw of the test items, not the draw of the run.",
)


def write_report(
    run_dir: Path,
    data_dir: Path,
    out: Path,
    results_file: Path | None = None,
    ablation: Path | None = None,
    reward_run: Path | None = None,
    ppo_run: Path | None = None,
) -> None:
    """Write the report of a run as one self-contained HTML file, whole or not at all.

    Args:
        run_dir: the run; `results.json` and `predictions.jsonl` are read here unless `results_file` names another place.
        data_dir: where the clips' addresses start.
        ablation: `results.json` of a run without the text-only source, shown beside this one.
        reward_run, ppo_run: runs of the stages after it, where there are some (`rl_report`).

    Raises:
        FileNotFoundError: if there are no results, or one of those runs lacks its own.
        ValueError: if one of the files is damaged.
    """
    results_file = results_file or run_dir / "results.json"
    if not results_file.is_file():
        raise FileNotFoundError(f"{results_file}: no results yet; `step-megatron eval --run {run_dir}` writes them")
    results = _read_json(results_file)
    metrics = _optional(run_dir / "metrics.jsonl", read_metrics, [])
    predictions = read_predictions(_optional(results_file.with_name("predictions.jsonl"), read_jsonl, []))
    other = _read_json(ablation) if ablation else None
    parts = [
        page.header(f"step-megatron: {run_dir.name}", _subtitle(metrics, results), _tiles(results)),
        _listening(results),
        _open_answers(results, other),
        _dialogues(results),
        reward_model_section(reward_run),
        ppo_section(ppo_run),
        _played(predictions, data_dir),
        _training(metrics),
        page.section("Where the time went", "Wall-clock seconds by stage.", page.stage_table(results["seconds"])),
        page.section("What these numbers do not say", "", page.bullets(_confounds(results, data_dir))),
        _configuration(run_dir),
    ]
    write_text(out, page.page(f"step-megatron: {run_dir.name}", parts))


def _read_json(path: Path) -> dict:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON ({error.msg}); evaluate again to write it anew") from None


def _optional(path: Path, read, missing):
    if path.is_file():
        return read(path)
    logger.warning("%s is missing: its part of the report is left out", path)
    return missing


def beats_controls(result: Mapping) -> bool:
    """Whether the lower bound of accuracy lies above the majority class and above the upper bound of the other-clip control."""
    if result["accuracy"] is None or result["majority"] is None or result["other_clip"] is None:
        return False
    return result["accuracy_interval"][0] > max(result["majority"], result["other_clip_interval"][1])


def _subtitle(metrics: Sequence[Mapping], results: Mapping) -> str:
    steps = f"{metrics[-1]['step']:,} training steps, " if metrics else ""
    items = sum(r["attempted"] for r in results["tasks"].values())
    items += results["transcription"]["attempted"] + results["text_only"]["attempted"]
    return f"{steps}{items:,} held-out items"


def _tiles(results: Mapping) -> list[tuple[str, str]]:
    tasks = results["tasks"]
    tiles = [(f"{sum(map(beats_controls, tasks.values()))} of {len(tasks)}", "tasks clearly above majority and other clip")]
    tiles += [(page.share(tasks[name]["accuracy"]), f"accuracy, {name}") for name in ("language", "tone") if name in tasks]
    tiles.append((page.share(results["transcription"]["cer"]), "character error rate"))
    tiles.append((page.share(results["text_only"]["accuracy"]), "accuracy, text only"))
    if judge := results.get("reward_model"):
        tiles.append((page.share(judge["accuracy"]), "accuracy of the reward model"))
    if ppo := results.get("ppo"):
        tiles.append((page.share(ppo["win_rate"]), "win rate of PPO against SFT"))
    if results["seconds"]:
        minutes, seconds = divmod(round(sum(results["seconds"].values())), 60)
        tiles.append((f"{minutes}:{seconds:02d}", "minutes, all stages"))
    return tiles


def _interval(bounds: Sequence[float] | None) -> str:
    return "–" if bounds is None else f"{bounds[0]:.2f}–{bounds[1]:.2f}"


def _listening(results: Mapping) -> str:
    tasks = results["tasks"]
    if not tasks:
        return page.section("Does it listen?", "No task with a closed set of labels was evaluated.")
    heads = ("task", "accuracy", "95%", "majority", "other clip", "probe", "n", "failed", "unparsable")
    rows = [
        (
            name.replace("_", " "),
            page.share(r["accuracy"]),
            _interval(r["accuracy_interval"]),
            page.share(r["majority"]),
            page.share(r["other_clip"]),
            page.share(r["probe"]),
            r["n"],
            r["failed"],
            r["unparsable"],
        )
        for name, r in tasks.items()
    ]
    note = (
        "Accuracy on held-out clips, beside what needs no listening (majority class, another clip's audio) and beside a "
        "linear listener."
    )
    return page.section("Does it listen?", note, page.task_panels(tasks), "<p></p>", page.table(heads, rows))


def _open_answers(results: Mapping, ablation: Mapping | None) -> str:
    spoken, text = results["transcription"], results["text_only"]
    parts = ["<h3>Transcription</h3>", _transcription(spoken), "<p></p><h3>Text only</h3>"]
    rows = [
        (name.replace("_", " "), page.share(r["accuracy"]), page.share(r["majority"]), r["n"], r["unparsable"])
        for name, r in text.get("tasks", {}).items()
    ]
    rows.append(("all", page.share(text["accuracy"]), "", text["n"], text["unparsable"]))
    parts.append(page.table(("reasoning task", "accuracy", "majority", "n", "unparsable"), rows))
    if ablation is not None:
        parts += ["<p></p><h3>Without the text-only source</h3>", _ablation(results, ablation)]
    return page.section(
        "Transcription and text", "Error rates are edits over reference length: 0 is perfect, above 1 is possible.", *parts
    )


def _transcription(spoken: Mapping) -> str:
    """Error rates of the model, of the same model about another clip, and of Whisper, over all clips and by language."""
    rows = [("all, own clip", spoken)]
    if spoken.get("other_clip_cer") is not None:
        rows.append(("all, another clip", {"cer": spoken["other_clip_cer"], "wer": spoken["other_clip_wer"]}))
    whisper = spoken.get("whisper")
    if whisper:
        rows.append((f"all, {whisper['name']}", whisper))
    for language, rates in spoken.get("languages", {}).items():
        rows.append((language, rates))
        if whisper and language in whisper["languages"]:
            rows.append((f"{language}, {whisper['name']}", whisper["languages"][language]))
    heads = ("clips", "character error", "word error", "n", "failed", "unparsable")
    counts = ("n", "failed", "unparsable")
    cells = [
        (name, page.share(rates["cer"]), page.share(rates["wer"]), *(rates.get(count, "") for count in counts))
        for name, rates in rows
    ]
    return page.table(heads, cells)


def _dialogues(results: Mapping) -> str:
    aspects = results.get("aspects")
    if not aspects:
        return ""
    heads = ("aspect", "quality", "95%", "content", "form", "other clip", "n", "failed", "unparsable")
    rows = []
    for aspect, whole in aspects.items():
        for name, r in {aspect: whole, **{f"{aspect}: {kind}": r for kind, r in whole["kinds"].items()}}.items():
            shares = (page.share(r["quality"]), _interval(r["quality_interval"]), page.share(r["content"]), page.share(r["form"]))
            rows.append((name.replace("_", " "), *shares, page.share(r["other_clip"]), r["n"], r["failed"], r["unparsable"]))
    note = (
        "Share of held-out dialogues whose last reply has the right content and the form that was asked for, held against "
        "facts by a program; replies before it are the reference's."
    )
    return page.section("Does it converse?", note, page.table(heads, rows))


def _ablation(results: Mapping, other: Mapping) -> str:
    def row(name: str, ours: float | None, theirs: float | None) -> tuple[str, str, str, str]:
        change = "–" if ours is None or theirs is None else f"{ours - theirs:+.2f}"
        return name, page.share(ours), page.share(theirs), change

    rows = [
        row(name.replace("_", " "), r["accuracy"], other["tasks"].get(name, {}).get("accuracy"))
        for name, r in results["tasks"].items()
    ]
    rows.append(row("transcription, character error", results["transcription"]["cer"], other["transcription"]["cer"]))
    rows.append(row("text only", results["text_only"]["accuracy"], other["text_only"]["accuracy"]))
    return page.table(("", "with text", "audio only", "difference"), rows)


def _played(predictions: Sequence[Prediction], data_dir: Path) -> str:
    clips = choose_clips(predictions, data_dir)
    if not clips:
        return ""
    note = (
        "Drawn at random, round robin over the tasks: right and wrong as they come. “Other clip” is the answer to the same "
        "question about another clip."
    )
    return page.section("Listen", note, page.clip_cards(clips))


def choose_clips(
    predictions: Sequence[Prediction], data_dir: Path, count: int = CLIPS, budget: int = CLIP_BYTES
) -> list[page.Clip]:
    """Up to `count` answered items with one clip each, at most `budget` bytes of wav together; a repeatable draw."""
    candidates = [p for p in predictions if len(p.audio) == 1 and p.reply is not None]
    # Some candidates are too long to show: a few more than are needed.
    candidates = sample_predictions(candidates, 2 * count, seed=0)
    clips: list[page.Clip] = []
    for prediction, wav in zip(candidates, wav_bytes([p.audio[0] for p in candidates], data_dir), strict=True):
        if wav is not None and len(wav) <= budget and len(clips) < count:
            budget -= len(wav)
            clips.append(_clip(prediction, "data:audio/wav;base64," + base64.b64encode(wav).decode("ascii")))
    return clips


def _clip(prediction: Prediction, uri: str) -> page.Clip:
    reply = split_reply(prediction.reply)
    other = None if prediction.other_clip_reply is None else split_reply(prediction.other_clip_reply).answer or "(none)"
    right = None
    if prediction.kind == "classification":
        right = reply.answer is not None and normalise_label(reply.answer) == normalise_label(prediction.answer)
    return page.Clip(prediction.task, uri, prediction.question, prediction.answer, reply.reasoning, reply.answer, other, right)


def wav_bytes(addresses: Sequence[str], data_dir: Path) -> list[bytes | None]:
    """Clips as 16 kHz mono 16-bit wav, as the model hears them; None for one that cannot be read or is longer than 8 s."""
    places = [parse_address(address, data_dir) for address in addresses]
    front_end = LogMelFrontEnd(mels=80)
    wavs: list[bytes | None] = []
    for place in places:
        try:
            clip = front_end.decode([place.read()], [place.name])[0]
        except AudioError as error:
            clip = error
        if isinstance(clip, AudioError):
            logger.warning("%s is not in the report: %s", place, clip)
        playable = not isinstance(clip, AudioError) and len(clip.waveform) <= CLIP_SECONDS * SAMPLE_RATE
        wavs.append(_wav(clip.waveform) if playable else None)
    return wavs


def _wav(waveform: np.ndarray) -> bytes:
    out = io.BytesIO()
    with wave.open(out, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(SAMPLE_RATE)
        file.writeframes((np.clip(waveform, -1, 1) * 32767).astype("<i2").tobytes())
    return out.getvalue()


def _series(metrics: Sequence[Mapping], key: str, label: str, colour: str = "model", smooth: bool = False) -> Series:
    return Series(label, [(row["step"], row[key]) for row in metrics if row.get(key) is not None], colour, smooth)


def _losses(metrics: Sequence[Mapping], prefix: str) -> list[Series]:
    """A series for every loss whose name starts with `prefix`."""
    colours = ("model", "other", "probe", "second", "plain")
    names = sorted({key for row in metrics for key in row if key.startswith(prefix)})
    return [
        _series(metrics, name, name.removeprefix(prefix).replace("_", " "), colours[i % len(colours)])
        for i, name in enumerate(names)
    ]


def _training(metrics: Sequence[Mapping]) -> str:
    if not metrics:
        return page.section("Training", "No metrics were found in the run directory.")
    by_source = _losses(metrics, "loss/")
    by_aspect = [series for series in _losses(metrics, "aspect_loss/") if "." not in series.label]
    losses = [_series(metrics, "loss", "train", smooth=True), _series(metrics, "validation_loss", "validation", "other")]
    charts = [
        line_chart("Loss", losses, "nats per trained token"),
        line_chart("Loss by source", by_source, "nats per trained token") if by_source else "",
        line_chart("Loss by aspect", by_aspect, "nats per trained token") if by_aspect else "",
        line_chart("Learning rate", [_series(metrics, "learning_rate", "learning rate")]),
        line_chart("Gradient norm", [_series(metrics, "grad_norm", "gradient norm", smooth=True)], "before clipping", log=True),
        line_chart("Tokens", [_series(metrics, "tokens_per_second", "tokens", smooth=True)], "per second, all ranks"),
        line_chart(
            "Audio", [_series(metrics, "audio_seconds_per_second", "audio", smooth=True)], "seconds per second, all ranks"
        ),
        line_chart("Padding", [_series(metrics, "padding_share", "padding")], "share of tokens"),
        line_chart("Model FLOP/s", [_series(metrics, "model_flops_per_second", "model FLOP/s", smooth=True)], "all ranks"),
    ]
    return page.section("Training", "Raw values faint, running median on top.", page.grid(chart for chart in charts if chart))


def _confounds(results: Mapping, data_dir: Path) -> list[str]:
    if not (data_dir / SUMMARY_NAME).is_file():
        return list(ALWAYS)
    stated = [
        text for name, text in CONFOUNDS.items() if name in results["tasks"] or (name == "transcription" and results[name]["n"])
    ]
    return [*ALWAYS, SPLITS_APART, *stated]


def _configuration(run_dir: Path) -> str:
    parts = []
    for name, title in (("config.yaml", "Resolved configuration"), ("run.json", "Versions, layout and seed")):
        text = _optional(run_dir / name, lambda path: path.read_text(encoding="utf-8"), "")
        if text:
            parts.append(page.folded(title, text.strip()))
    return page.section("Configuration and versions", "", *parts) if parts else ""
