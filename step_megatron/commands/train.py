"""`step-megatron train ...`, `judge ...` and `label`: the stages of training, and who judges."""

import json
import os
from functools import partial
from pathlib import Path

from step_megatron.commands.common import command, config_of, with_config


def add_train(commands) -> None:
    """Declare `train` and the stages below it."""
    train = commands.add_parser("train", help="train a stage").add_subparsers(required=True)
    parser = command(train, "midtrain", _train_midtrain, "audio-centric mid-training; under torchrun for several processes")
    with_config(parser)
    parser = command(train, "sft", _train_sft, "cold-start supervised fine-tuning of the run that model.weights names")
    with_config(parser)
    parser = command(train, "reward", _train_reward, "the generative reward model, on what `data from-preferences` wrote")
    with_config(parser)
    parser = command(train, "ppo", _train_ppo, "reinforcement learning from a judge's, or verifiable, rewards (PPO)")
    with_config(parser)
    text = "run the batch of a step that was out of order again; under torchrun for a replica of several processes"
    parser = command(train, "replay", _train_replay, text)
    parser.add_argument("folder", type=Path, metavar="RUN/anomalies/...")
    parser.add_argument("--step", type=int, help="of the checkpoint to run it on (default: the newest from before the batch)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the run's")


def add_judge(commands) -> None:
    """Declare `judge` and `label`."""
    judge = commands.add_parser("judge", help="compare replies, and measure who compares").add_subparsers(required=True)
    text = "ask a reward model's run, or the server of rl.judge.server, about every record of a file"
    parser = command(judge, "ask", _judge_ask, text)
    parser.add_argument("--preferences", type=Path, required=True, metavar="PREFERENCES.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="JUDGMENTS.jsonl")
    parser.add_argument("--run", type=Path, help="run of a reward model (default: ask the server)")
    parser.add_argument("--listen", action="store_true", help="send the clips along to the server")
    with_config(parser)
    parser = command(commands, "label", _label, "compare replies by eye and ear in a browser; writes preference records")
    parser.add_argument("source", type=Path, metavar="RUN", help="a run with preferences.jsonl, or a file of records")
    parser.add_argument("--out", type=Path, required=True, metavar="LABELLED.jsonl")
    parser.add_argument("--labeller", default="", help="who labels, for the records")
    parser.add_argument("--levels", type=int, default=7, help="of the scale (rl.judge.levels)")
    parser.add_argument("--port", type=int, default=0, help="on this machine (default: a free one)")
    text = "judgments beside known verdicts: accuracy, disagreement of orders, confusion, a length-only baseline"
    parser = command(judge, "calibrate", _judge_calibrate, text)
    parser.add_argument("preferences", type=Path, metavar="PREFERENCES.jsonl")
    parser.add_argument("judgments", type=Path, metavar="JUDGMENTS.jsonl")
    parser.add_argument("--levels", type=int, default=7, help="of the scale (rl.judge.levels)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--out", type=Path, metavar="CALIBRATION.json", help="write it down as well")
    text = "how often a run's replies beat another run's on held-out prompts, judged by a program"
    parser = command(judge, "compare", _judge_compare, text)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--against", type=Path, required=True, metavar="RUN")
    parser.add_argument("--prompts", type=Path, required=True, metavar="PROMPTS.jsonl", help="with meta.checks")
    parser.add_argument("--out", type=Path, required=True, metavar="COMPARISON.json")
    parser.add_argument("--limit", type=int, default=0, help="only the first so many prompts, for a quick look")


def _train_midtrain(options) -> int:
    from step_megatron.training.midtrain import midtrain

    return _trained(midtrain(config_of(options)))


def _train_sft(options) -> int:
    from step_megatron.training.sft import sft

    return _trained(sft(config_of(options)))


def _train_reward(options) -> int:
    from step_megatron.training.reward import train_reward

    return _trained(train_reward(config_of(options)))


def _train_ppo(options) -> int:
    from step_megatron.rl.run import run_ppo

    return _trained(run_ppo(config_of(options)))


def _trained(summary: dict) -> int:
    """Print what a stage returns; its exit status."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))
    # A run that a signal ended is not done: the caller must not go on to evaluate it.
    return 130 if summary["interrupted"] else 0


def _train_replay(options) -> None:
    from step_megatron.training.replay import replay, table

    result = replay(options.folder, options.step, options.overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result) if options.json else table(result))


def _judge_ask(options) -> None:
    from step_megatron.rl.judge.asking import ask

    counts = ask(options.preferences, options.out, config_of(options), options.run, options.listen)
    print(f"{options.out}: {json.dumps(counts)}")


def _judge_calibrate(options) -> None:
    from step_megatron.data.preferences import read_preferences
    from step_megatron.evaluation.files import write_json
    from step_megatron.rl.calibration import calibrate, report
    from step_megatron.rl.judge.records import read_judgments
    from step_megatron.rl.judge.scale import Scale

    preferences = read_preferences(options.preferences)
    found = calibrate(preferences, read_judgments(options.judgments, preferences), Scale(options.levels))
    if options.out:
        write_json(options.out, found)
    print(json.dumps(found) if options.json else report(found))


def _judge_compare(options) -> None:
    from step_megatron.rl.win_rate import compare_runs, summary

    print(summary(compare_runs(options.run, options.against, options.prompts, options.out, options.limit)))


def _label(options) -> None:
    from step_megatron.audio.front_end import LogMelFrontEnd
    from step_megatron.audio.wav import wav_bytes
    from step_megatron.rl.judge.scale import Scale
    from step_megatron.rl.labelling import Labelling, serve

    labelling = Labelling(options.source, options.out, Scale(options.levels), options.labeller)
    server, address = serve(labelling, partial(wav_bytes, LogMelFrontEnd(mels=80), labelling.file.parent), options.port)
    print(f"{address}\nopen it in a browser on this machine; Ctrl-C ends", flush=True)
    server.serve_forever()
