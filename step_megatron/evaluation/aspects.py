"""Quality by aspect: the share of dialogues whose last reply passes its check (`data.checks`), judged by a program."""

from collections.abc import Iterable, Sequence

from step_megatron.data.checks import read_check
from step_megatron.evaluation.predictions import Prediction
from step_megatron.evaluation.scoring import split_reply, wilson_interval


def score_aspects(predictions: Iterable[Prediction]) -> dict[str, dict]:
    """Scores of the dialogues among the predictions.

    Returns:
        aspect -> what `score_checks` gives, and `kinds`: the same by kind, where the aspect has kinds.
    """
    by_aspect: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        by_aspect.setdefault(prediction.aspect.partition(".")[0], []).append(prediction)
    scores = {}
    for aspect, members in sorted(by_aspect.items()):
        kinds = sorted({p.aspect.partition(".")[2] for p in members} - {""})
        by_kind = {kind: score_checks([p for p in members if p.aspect == f"{aspect}.{kind}"]) for kind in kinds}
        scores[aspect] = {**score_checks(members), "kinds": by_kind}
    return scores


def score_checks(members: Sequence[Prediction]) -> dict:
    """`quality`: replies that pass; `content` and `form`: those that pass this half; `other_clip`: quality where other clips were
    heard. A reply that cannot be read passes nothing and is counted in `unparsable`, one that there is not in `failed`.
    """
    replies = [(p.check, split_reply(p.reply).answer) for p in members if p.reply is not None]
    others = [(p.check, split_reply(p.other_clip_reply).answer) for p in members if p.other_clip_reply is not None]
    passed = [_verdict(check, reply) for check, reply in replies]
    quality = sum(content and form for content, form in passed)
    other_quality = sum(all(_verdict(check, reply)) for check, reply in others)
    n = len(replies)
    return {
        "quality": quality / n if n else None,
        "quality_interval": list(wilson_interval(quality, n)),
        "content": sum(content for content, _ in passed) / n if n else None,
        "form": sum(form for _, form in passed) / n if n else None,
        "other_clip": other_quality / len(others) if others else None,
        "n": n,
        "attempted": len(members),
        "failed": len(members) - n,
        "unparsable": sum(reply is None for _, reply in replies),
    }


def _verdict(record: dict, reply: str | None) -> tuple[bool, bool]:
    """Whether a reply has the right content, and the right form."""
    check = read_check(record)
    return (False, False) if reply is None else (check.content(reply), check.kept_form(reply))
