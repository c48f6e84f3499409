"""How often one run's replies beat another's on held-out prompts, by a program: nobody judges who was trained against.

A reply is worth three for being right (`data.checks`: it names the right answer and no other) and one for the form that was asked
for; the difference of two replies is their level (`judge.local.ScoringJudge`). Both runs reply greedily. A tie is half a win.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from step_megatron.config.rl import JudgeConfig
from step_megatron.data.checks import Check, read_check
from step_megatron.data.rl_prompts import RLPrompt, read_rl_prompts
from step_megatron.data.schema import SchemaError, Turn
from step_megatron.evaluation.files import write_json
from step_megatron.evaluation.load import loaded_run
from step_megatron.evaluation.scoring import wilson_interval
from step_megatron.rl.judge.judging import Judgment, judge_pairs
from step_megatron.rl.judge.local import ScoringJudge
from step_megatron.rl.judge.prompt import Pair
from step_megatron.rl.judge.scale import Scale
from step_megatron.rl.rewards import final_reply
from step_megatron.runtime.progress import Progress

_RIGHT, _FORM = 3.0, 1.0
_EXAMPLES = 8


def compare_runs(run: Path, against: Path, prompts_file: Path, out: Path, limit: int = 0, max_new_tokens: int = 64) -> dict:
    """Let both runs reply to the prompts, and write what `win_rate` says of the replies.

    Args:
        prompts_file: prompts (`data.rl_prompts`) with `meta.checks`.
        out: JSON file, written whole or not at all.
        limit: only the first so many prompts; 0 means all.

    Raises:
        SchemaError: the file is no file of prompts, or one has no check.
        FileNotFoundError: a run has no checkpoint.
    """
    prompts = read_rl_prompts(prompts_file)[: limit or None]
    checks_of(prompts)
    after, before = (_replies(each, prompts, prompts_file.parent, max_new_tokens) for each in (run, against))
    result = {"run": run.name, "against": against.name, **win_rate(prompts, after, before)}
    write_json(out, result)
    return result


def checks_of(prompts: Sequence[RLPrompt]) -> list[Check]:
    """The check of each prompt's reply.

    Raises:
        SchemaError: a prompt has none.
    """
    checks = []
    for prompt in prompts:
        check = read_check(prompt.meta.get("checks", [None])[-1])
        if check is None:
            raise SchemaError(
                f"prompt {prompt.id!r} has no meta.checks: a program cannot judge its replies; add it, or leave it out"
            )
        checks.append(check)
    return checks


def win_rate(prompts: Sequence[RLPrompt], after: Sequence[str | None], before: Sequence[str | None]) -> dict[str, Any]:
    """Compare two replies to each prompt.

    Args:
        after, before: what the two runs wrote, from inside the thinking on; None where a clip could not be read.

    Returns:
        `win_rate` with its 95% `interval`, `wins`, `ties`, `losses`, `n`, `failed`; of either side the shares of replies that are
        `right`, that have the `form`, and their mean length in `words`; `examples`, a few conversations with both replies.
    """
    checks = checks_of(prompts)
    known = [i for i, pair in enumerate(zip(after, before, strict=True)) if None not in pair]
    ours, theirs = ([final_reply(side[i]) for i in known] for side in (after, before))
    checked = [checks[i] for i in known]
    judgments = _judge([prompts[i] for i in known], checked, ours, theirs)
    signs = [judgment.reward > 0 for judgment in judgments], [judgment.reward < 0 for judgment in judgments]
    wins, losses, n = sum(signs[0]), sum(signs[1]), len(known)
    score = wins + (n - wins - losses) / 2
    order = sorted(range(n), key=lambda i: -abs(judgments[i].reward))
    return {
        "win_rate": score / n if n else None,
        "interval": list(wilson_interval(score, n)),
        "wins": wins,
        "ties": n - wins - losses,
        "losses": losses,
        "n": n,
        "failed": len(prompts) - n,
        "after": _shares(ours, checked),
        "before": _shares(theirs, checked),
        "examples": [_example(prompts[known[i]], theirs[i], ours[i], judgments[i]) for i in _spread(order, _EXAMPLES)],
    }


def summary(result: dict[str, Any]) -> str:
    """The comparison in a few lines, two conversations with it."""
    lines = []
    for example in result["examples"][:2]:
        lines += [f"[{example['task']}] {example['question']}  ({example['answer']})"]
        lines += [f"  {side:6} {example[side] or '(no reply)'}" for side in ("before", "after")]
    if result["n"]:
        low, high = result["interval"]
        counts = f"{result['wins']} wins, {result['ties']} ties, {result['losses']} losses"
        lines.append(
            f"{result['run']} against {result['against']}: win rate {result['win_rate']:.3f} ({low:.3f}-{high:.3f}), {counts}"
        )
    return "\n".join(lines)


def _replies(run: Path, prompts: Sequence[RLPrompt], folder: Path, max_new_tokens: int) -> list[str | None]:
    with loaded_run(run, folder) as trained:
        asked = [prompt.conversation for prompt in prompts]
        trained.encode([address for each in asked for address in each.audio_addresses()])
        progress = Progress(len(asked), f"compare: {run.name}")
        texts = trained.reply(asked, max_new_tokens, progress=progress.update)
        progress.close()
    return texts


def _judge(prompts: Sequence[RLPrompt], checks: Sequence[Check], ours: Sequence[str], theirs: Sequence[str]) -> list[Judgment]:
    by_history = {prompt.history: check for prompt, check in zip(prompts, checks, strict=True)}

    def score(history: tuple[Turn, ...], reply: str) -> float:
        check = by_history[history]
        return _RIGHT * check.content(reply) + _FORM * check.kept_form(reply)

    settings = JudgeConfig()
    scale = Scale(settings.levels)
    pairs = [Pair(p.id, p.history, mine, other) for p, mine, other in zip(prompts, ours, theirs, strict=True)]
    return judge_pairs(pairs, ScoringJudge(score, scale, span=scale.best), settings, seed=0)


def _shares(replies: Sequence[str], checks: Sequence[Check]) -> dict[str, float | None]:
    n = len(replies)
    return {
        "right": sum(check.content(reply) for reply, check in zip(replies, checks, strict=True)) / n if n else None,
        "form": sum(check.kept_form(reply) for reply, check in zip(replies, checks, strict=True)) / n if n else None,
        "words": sum(len(reply.split()) for reply in replies) / n if n else None,
    }


def _spread(order: Sequence[int], count: int) -> list[int]:
    """`count` of them, evenly spread: examples are not the best ones only."""
    step = max(1, len(order) // count)
    return list(order[::step][:count])


def _example(prompt: RLPrompt, before: str, after: str, judgment: Judgment) -> dict[str, Any]:
    return {
        "task": prompt.meta.get("task", ""),
        "audio": list(prompt.conversation.audio_addresses()),
        "question": prompt.history[-1].text.strip(),
        "answer": prompt.answer,
        "before": before,
        "after": after,
        "reward": judgment.reward,
    }
