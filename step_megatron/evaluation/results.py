"""From predictions to `results.json`: pure functions, so results can be made again from `predictions.jsonl` without the model.

    {"tasks": {NAME: {"accuracy", "majority", "other_clip", "probe", "n", ...}},
     "transcription": {"cer", "wer", "n", ..., "languages": {LL: {"cer", ...}}, "whisper": {"cer", ...} or null},
     "text_only": {"accuracy", "majority", "n", ..., "tasks": {NAME: {...}}},
     "aspects": {ASPECT: {"quality", "content", "form", "other_clip", "n", ..., "kinds": {NAME: {...}}}},
     "seconds": {STAGE: s}}

and, once there are those stages (`rl_results`),

    {"reward_model": {"accuracy", "length_only", "order_disagreement", "n", ...},
     "ppo": {"reward_before", "reward_after", "win_rate", "kl", "max_abs_dlogp", "n", ...}}

Every share is a float in [0, 1], or null where it was not measured (no train items, one label only, no clip). `n` is the number
of items behind `accuracy` (= `scored`); `attempted`, `scored`, `failed` and `unparsable` are counts; `*_interval` are 95%
Wilson intervals.
"""

from collections.abc import Mapping, Sequence

from step_megatron.evaluation.aspects import score_aspects
from step_megatron.evaluation.predictions import Prediction
from step_megatron.evaluation.scoring import (
    LabelScore,
    normalise_label,
    score_labels,
    score_transcripts,
    wilson_interval,
)
from step_megatron.evaluation.tasks import DIALOGUE, TRANSCRIPTION, majority_label, training_task


def build_results(
    predictions: Sequence[Prediction],
    train_answers: Mapping[str, Sequence[str]],
    seconds: Mapping[str, float],
    whisper: Mapping | None = None,
) -> dict:
    """Score predictions and put them in the form of `results.json`.

    Args:
        train_answers: answers of the train split by task: they give the majority class and the label sets.
        seconds: wall-clock seconds by stage.
        whisper: rates of Whisper on the same clips (`evaluation.whisper`), None where it was not asked.
    """
    groups: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        groups.setdefault(prediction.task, []).append(prediction)
    by_kind = {kind: {} for kind in ("classification", TRANSCRIPTION, "text_only", DIALOGUE)}
    for task, members in sorted(groups.items()):
        by_kind[members[0].kind][task] = members
    transcripts = [p for members in by_kind[TRANSCRIPTION].values() for p in members]
    return {
        "tasks": {task: _classification(members, train_answers) for task, members in by_kind["classification"].items()},
        "transcription": {**_transcription(transcripts), "whisper": whisper},
        "text_only": _text_only(by_kind["text_only"], train_answers),
        "aspects": score_aspects(p for members in by_kind[DIALOGUE].values() for p in members),
        "seconds": {stage: round(float(s), 2) for stage, s in seconds.items()},
    }


def _counts(score: LabelScore) -> dict:
    return {
        "attempted": score.attempted,
        "scored": score.scored,
        "failed": score.failed,
        "unparsable": score.unparsable,
        "accuracy_interval": score.interval,
    }


def _majority_share(members: Sequence[Prediction], train: Sequence[str]) -> float | None:
    """Accuracy, on the scored items, of always giving the train split's most frequent answer."""
    majority = majority_label(train)
    scored = [p for p in members if p.reply is not None]
    if majority is None or not scored:
        return None
    return sum(normalise_label(p.answer) == majority for p in scored) / len(scored)


def _classification(members: Sequence[Prediction], train_answers: Mapping[str, Sequence[str]]) -> dict:
    source = training_task(members[0].task, train_answers)
    train = train_answers.get(source, ())
    answers = [p.answer for p in members]
    labels = sorted({*map(normalise_label, train), *map(normalise_label, answers)})
    own = score_labels(answers, [p.reply for p in members], labels)
    controlled = [p for p in members if p.other_clip is not None]
    other = score_labels([p.answer for p in controlled], [p.other_clip_reply for p in controlled], labels)
    probed = [p for p in members if p.probe is not None and p.reply is not None]
    right = sum(normalise_label(p.probe) == normalise_label(p.answer) for p in probed)
    return {
        "accuracy": own.accuracy,
        "majority": _majority_share(members, train),
        "other_clip": other.accuracy,
        "probe": right / len(probed) if probed else None,
        "n": own.scored,
        **_counts(own),
        "other_clip_n": other.scored,
        "other_clip_interval": other.interval if other.scored else None,
        "probe_n": len(probed),
        "probe_interval": list(wilson_interval(right, len(probed))) if probed else None,
        "labels": labels,
        "trained_on": source if train else None,
    }


def _transcription(members: Sequence[Prediction]) -> dict:
    controlled = [p for p in members if p.other_clip is not None]
    other = score_transcripts([p.answer for p in controlled], [p.other_clip_reply for p in controlled])
    scores = transcription_rates([p.answer for p in members], [p.reply for p in members], [p.language for p in members])
    return {**scores, "other_clip_cer": other["cer"], "other_clip_wer": other["wer"]}


def transcription_rates(references: Sequence[str], replies: Sequence[str | None], languages: Sequence[str | None]) -> dict:
    """`score_transcripts` of all, and under `languages` of each language that is known."""
    by_language = {
        language: [i for i, other in enumerate(languages) if other == language] for language in sorted(set(languages) - {None})
    }
    return {
        **score_transcripts(references, replies),
        "languages": {
            language: score_transcripts([references[i] for i in own], [replies[i] for i in own])
            for language, own in by_language.items()
        },
    }


def _text_only(groups: Mapping[str, Sequence[Prediction]], train_answers: Mapping[str, Sequence[str]]) -> dict:
    tasks = {}
    for task, members in groups.items():
        score = score_labels([p.answer for p in members], [p.reply for p in members], None)
        majority = _majority_share(members, train_answers.get(training_task(task, train_answers), ()))
        tasks[task] = {"accuracy": score.accuracy, "majority": majority, "n": score.scored, **_counts(score)}
    everything = [p for members in groups.values() for p in members]
    score = score_labels([p.answer for p in everything], [p.reply for p in everything], None)
    return {"accuracy": score.accuracy, "n": score.scored, **_counts(score), "tasks": tasks}


def result_line(results: Mapping) -> str:
    """The one line that ends a run: every task with its controls, transcription, text-only, seconds."""

    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.2f}"

    parts = [
        f"{task} {share(r['accuracy'])} (majority {share(r['majority'])}, other clip {share(r['other_clip'])}, "
        f"probe {share(r['probe'])}, n {r['n']})"
        for task, r in results["tasks"].items()
    ]
    spoken, text = results["transcription"], results["text_only"]
    rates = [("transcription", spoken), *spoken["languages"].items()]
    rates += [(spoken["whisper"]["name"], spoken["whisper"])] if spoken["whisper"] else []
    parts += [f"{name} cer {share(each['cer'])} wer {share(each['wer'])} (n {each['n']})" for name, each in rates]
    parts += [
        f"{aspect} {share(r['quality'])} (other clip {share(r['other_clip'])}, n {r['n']})"
        for aspect, r in results["aspects"].items()
    ]
    parts.append(f"text-only {share(text['accuracy'])} (n {text['n']})")
    if judge := results.get("reward_model"):
        parts.append(
            f"reward model {share(judge['accuracy'])} (length alone {share(judge['length_only'])}, "
            f"orders disagree {share(judge['order_disagreement'])}, n {judge['n']})"
        )
    if ppo := results.get("ppo"):
        parts.append(
            f"ppo reward {share(ppo['reward_before'])} -> {share(ppo['reward_after'])}, win rate {share(ppo['win_rate'])} "
            f"(n {ppo['n']}), kl {share(ppo['kl'])}, max |dlogp| {ppo['max_abs_dlogp']:.1e}"
        )
    if results["seconds"]:
        parts.append("seconds " + " ".join(f"{stage} {s:.0f}" for stage, s in results["seconds"].items()))
    return "results: " + "; ".join(parts)
