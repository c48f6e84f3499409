"""Ask a judge about a file of preferences: a trained run, or the configured server."""

from contextlib import closing
from functools import partial
from pathlib import Path

from step_megatron.audio.front_end import LogMelFrontEnd
from step_megatron.audio.wav import wav_bytes
from step_megatron.config.schema import Config
from step_megatron.data.preferences import read_preferences
from step_megatron.evaluation.load import TrainedRun, loaded_run
from step_megatron.rl.judge.judging import Judge, Judgment, check_failures, judge_pairs, summarise
from step_megatron.rl.judge.local import ModelJudge
from step_megatron.rl.judge.records import write_judgments
from step_megatron.rl.judge.server import ServerJudge
from step_megatron.rl.preference_data import pair_of
from step_megatron.runtime.progress import Progress


def ask(preferences: Path, out: Path, config: Config, run: Path | None = None, listens: bool = False) -> dict[str, float]:
    """Judge every record of a file and write the judgments; returns `judging.summarise` of them.

    Args:
        run: a reward model's run; None asks `rl.judge.server`.
        listens: send the clips along to the server.

    Raises:
        JudgingError: too many judgments failed; they are written nevertheless, for a look at why.
        JudgeServerError, SchemaError: the server or the file cannot be used.
    """
    if run is not None:
        with loaded_run(run, preferences.parent) as trained:
            judgments = _judge(preferences, config, ModelJudge(partial(_complete, trained, config)))
    else:
        wav = partial(wav_bytes, LogMelFrontEnd(config.encoder.mels), preferences.parent) if listens else None
        with closing(ServerJudge(config.rl.judge, wav)) as judge:
            judgments = _judge(preferences, config, judge)
    write_judgments(out, judgments)
    summary = summarise(judgments)
    check_failures(summary["masked"], summary["judged"], config.rl.judge.failure_limit)
    return summary


def _judge(preferences: Path, config: Config, judge: Judge) -> list[Judgment]:
    pairs = [pair_of(preference) for preference in read_preferences(preferences)]
    return judge_pairs(pairs, judge, config.rl.judge, config.run.seed)


def _complete(trained: TrainedRun, config: Config, prompts, seeds) -> list[str | None]:
    """`local.Generate` by a trained run."""
    trained.encode([address for prompt in prompts for address in prompt.audio_addresses()])
    with Progress(len(prompts), "judge", "answers") as bar:
        return trained.reply(prompts, config.rl.judge.max_tokens, config.rl.judge.temperature, seeds, bar.update)
