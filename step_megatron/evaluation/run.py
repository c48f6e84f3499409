"""Evaluate a trained run on held-out items: `evaluate(run_dir, data_dir, out)` writes `results.json` and `predictions.jsonl`.

1. items of `test.jsonl` by task, and for each with a clip the same question about another clip (the control);
2. clips encoded once (the encoded-audio cache holds what training encoded), among them the probe's train clips;
3. replies to all of them, the engine starting one where another has ended;
4. scores, a few conversations to read, and one line of results.
"""

import random
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch

from step_megatron.data.schema import Conversation
from step_megatron.evaluation.files import write_json, write_jsonl
from step_megatron.evaluation.predictions import Prediction
from step_megatron.evaluation.probe import clip_features, probe_predictions
from step_megatron.evaluation.results import build_results, result_line
from step_megatron.evaluation.scoring import split_reply
from step_megatron.evaluation.tasks import (
    Item,
    Labelled,
    group_by_task,
    limit_items,
    other_clip_donors,
    read_items,
    read_labels,
    training_task,
    with_audio,
)
from step_megatron.runtime.progress import Progress, get_logger

logger = get_logger(__name__)


@dataclass(frozen=True)
class Limits:
    """How much is evaluated; 0 means all.

    Attributes:
        items_per_task: held-out items of a task.
        train_clips_per_task: clips that the probe of a task is trained on.
        max_new_tokens: length of a reply, reasoning included; a longer one is cut, and so unparsable or wrong.
        samples: conversations printed at the end.
    """

    items_per_task: int = 0
    train_clips_per_task: int = 2000
    max_new_tokens: int = 96
    samples: int = 6
    seed: int = 0


class Listener(Protocol):
    """What is evaluated: a model with its encoder (`load.TrainedRun`)."""

    def encode(self, addresses: Sequence[str]) -> None:
        """Encode what the cache lacks; a clip that cannot be read is logged and has no features."""

    def features(self, addresses: Sequence[str]) -> dict[str, torch.Tensor | None]:
        """Encoder output `[frames, width]` of clips already encoded; None for one that could not be read."""

    def reply(
        self, conversations: Sequence[Conversation], max_new_tokens: int, progress: Callable[[int], None] | None = None
    ) -> list[str | None]:
        """Generated text of the next assistant turn, from inside `<think>` on; None where a clip could not be read.

        `progress` is called with the number of replies that have ended since the last call.
        """


def evaluate(run_dir: Path, data_dir: Path, out: Path, limits: Limits | None = None, whisper: Path | None = None) -> dict:
    """Evaluate the newest checkpoint of a run on a data directory; print conversations and, last, one line of results.

    Args:
        run_dir: directory of the run: config, checkpoints, and `seconds.STAGE` files of the stages before this one.
        data_dir: holds `train.jsonl` and `test.jsonl` and the clips that they name, and `text_train.jsonl` and
            `text_test.jsonl` where there is text-only data.
        out: `results.json` to write; `predictions.jsonl` goes beside it. Both are written whole or not at all.
        whisper: folder of a Whisper model that transcribes the same clips, for comparison; needs transformers.

    Returns:
        What `results.json` holds; see `results.py`.
    """
    from step_megatron.evaluation.load import loaded_run

    started = time.perf_counter()
    limits = limits or Limits()
    with loaded_run(run_dir, data_dir) as listener:
        test, train = read_items(data_dir), read_labels(data_dir)
        predictions = predict(listener, test, train, limits)
    peer = None
    if whisper is not None:
        from step_megatron.evaluation.whisper import whisper_rates

        peer = whisper_rates(whisper, test, data_dir)
    seconds = {**stage_seconds(run_dir), "evaluate": time.perf_counter() - started}
    results = build_results(predictions, answers_by_task(train), seconds, peer)
    write_jsonl(out.with_name("predictions.jsonl"), (prediction.row() for prediction in predictions))
    write_json(out, results)
    print_samples(predictions, limits)
    print(result_line(results), flush=True)
    return results


def predict(listener: Listener, test: Sequence[Item], train: Sequence[Labelled], limits: Limits) -> list[Prediction]:
    """Answer the held-out items, with the other-clip control and the probe; items of a task stay together."""
    groups = {task: limit_items(items, limits.items_per_task, limits.seed) for task, items in group_by_task(test).items()}
    controls = {task: _other_clips(items, limits.seed) for task, items in groups.items()}
    probes = {task: probe for task, items in groups.items() if (probe := _probe_clips(task, items, train, limits))}
    clips = [address for items in groups.values() for item in items for address in item.audio]
    clips += [address for probe in probes.values() for address in probe]
    with _stage("encode"):
        listener.encode(list(dict.fromkeys(clips)))
    with _stage("generate"):
        replies = _generate(listener, groups, controls, limits)
    with _stage("probe"):
        probed = {task: _probe(listener, groups[task], clips) for task, clips in probes.items()}
    predictions = []
    for task, items in groups.items():
        for i, item in enumerate(items):
            other = controls[task][i]
            predictions.append(
                Prediction(
                    id=item.id,
                    task=task,
                    kind=item.kind,
                    question=item.question,
                    answer=item.answer,
                    reference_reasoning=item.reasoning,
                    audio=item.audio,
                    language=item.language,
                    reply=replies[task, i, "own"],
                    other_clip=other,
                    other_clip_reply=replies.get((task, i, "other")),
                    probe=probed[task][i] if task in probed else None,
                    aspect=item.aspect,
                    check=item.check,
                )
            )
    return predictions


def stage_seconds(run_dir: Path) -> dict[str, float]:
    """Seconds of the stages that wrote `seconds.STAGE` into the run directory, oldest first.

    Raises:
        ValueError: naming a file that does not hold a number.
    """
    seconds = {}
    for path in sorted(run_dir.glob("seconds.*"), key=lambda path: path.stat().st_mtime_ns):
        try:
            seconds[path.suffix[1:]] = float(path.read_text())
        except ValueError:
            raise ValueError(f"{path}: must hold a number of seconds; remove it or run its stage again") from None
    return seconds


def answers_by_task(items: Sequence[Labelled]) -> dict[str, list[str]]:
    """Answers of the train split by task."""
    answers: dict[str, list[str]] = {}
    for item in items:
        answers.setdefault(item.task, []).append(item.answer)
    return answers


def _other_clips(items: Sequence[Item], seed: int) -> list[tuple[str, ...] | None]:
    """For every item the clips that it hears in the control, None where there can be none."""
    donors = other_clip_donors([item.answer for item in items], seed) if items[0].audio else None
    return [None] * len(items) if donors is None else [items[donor].audio for donor in donors]


def _probe_clips(task: str, items: Sequence[Item], train: Sequence[Labelled], limits: Limits) -> dict[str, str]:
    """Train clips and their labels for the probe of a classification task; empty where a probe makes no sense."""
    if items[0].kind != "classification" or any(len(item.audio) != 1 for item in items):
        return {}
    source = training_task(task, {item.task for item in train})
    members = [item for item in train if item.task == source and len(item.audio) == 1]
    clips = {item.audio[0]: item.answer for item in members}
    if len(set(clips.values())) < 2:
        return {}
    if 0 < limits.train_clips_per_task < len(clips):
        clips = dict(random.Random(limits.seed).sample(sorted(clips.items()), limits.train_clips_per_task))
    return clips


def _generate(
    listener: Listener, groups: Mapping[str, Sequence[Item]], controls: Mapping[str, Sequence], limits: Limits
) -> dict[tuple[str, int, str], str | None]:
    """Replies by (task, item, "own" or "other")."""
    jobs: dict[tuple[str, int, str], Conversation] = {}
    for task, items in groups.items():
        for i, (item, clips) in enumerate(zip(items, controls[task], strict=True)):
            jobs[task, i, "own"] = item.conversation
            if clips is not None:
                jobs[task, i, "other"] = with_audio(item.conversation, clips)
    progress = Progress(len(jobs), "evaluate: replies")
    texts = listener.reply(list(jobs.values()), limits.max_new_tokens, progress=progress.update)
    progress.close()
    return dict(zip(jobs, texts, strict=True))


def _probe(listener: Listener, items: Sequence[Item], clips: Mapping[str, str]) -> list[str | None]:
    """Answers of the linear probe to the items; None for a clip that could not be read."""
    wanted = dict.fromkeys([*clips, *(item.audio[0] for item in items)])
    described = {
        address: clip_features(encoded)
        for address, encoded in listener.features(list(wanted)).items()
        if encoded is not None and encoded.shape[0]
    }
    train = [address for address in clips if address in described]
    test = [address for address in dict.fromkeys(item.audio[0] for item in items) if address in described]
    if len({clips[address] for address in train}) < 2:
        return [None] * len(items)
    guesses = probe_predictions([described[a] for a in train], [clips[a] for a in train], [described[a] for a in test])
    by_clip = dict(zip(test, guesses, strict=True))
    return [by_clip.get(item.audio[0]) for item in items]


def print_samples(predictions: Sequence[Prediction], limits: Limits, write: Callable[[str], None] = print) -> None:
    """Print a few conversations, one task after the other: question, reference, the model's reasoning and reply."""
    for prediction in sample_predictions(predictions, limits.samples, limits.seed):
        reply = split_reply(prediction.reply)
        write("")
        write(f"[{prediction.task}] {' '.join(prediction.audio) or 'text only'}")
        write(f"  question   {prediction.question}")
        write(f"  reference  {prediction.answer}")
        write(f"  reasoning  {reply.reasoning}")
        write(f"  reply      {reply.answer if reply.answer is not None else '(no answer: the reasoning never ended)'}")
    write("")


def sample_predictions(predictions: Sequence[Prediction], count: int, seed: int) -> list[Prediction]:
    """`count` answered predictions, round robin over the tasks, the same for the same seed."""
    rng = random.Random(seed)
    queues: dict[str, list[Prediction]] = {}
    for prediction in predictions:
        if prediction.reply is not None:
            queues.setdefault(prediction.task, []).append(prediction)
    for queue in queues.values():
        rng.shuffle(queue)
    rounds = max(map(len, queues.values()), default=0)
    return [queue[i] for i in range(rounds) for queue in queues.values() if i < len(queue)][:count]


@contextmanager
def _stage(name: str):
    started = time.perf_counter()
    yield
    logger.info("evaluate: %s took %.1f s", name, time.perf_counter() - started)
