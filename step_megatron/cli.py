"""The command line: `step-megatron doctor | data | train | judge | label | eval | report | chat | convert | bench`.

Every command imports what it needs when it runs, so that `--help` and `doctor` work on a machine where the rest does not.
An error that a user can mend (a bad path, a bad setting, bad data) prints its message and exits with 2; anything else is a defect
and shows its traceback, as every error does when STEP_TRACEBACK is set.
"""

import argparse
import json
import os
import sys
import warnings
from functools import partial
from pathlib import Path

from step_megatron.errors import UserError

# What is benched -> its module in `step_megatron.benchmarks`.
BENCHED_PARTS = {
    "front-end": "front_end",
    "encoder": "encoder",
    "train-step": "train_step",
    "train-tokens": "train_tokens",
    "rollout": "rollout",
    "shares": "shares",
    "checkpoint": "checkpoint",
    "import": "import_speed",
}
# Those that have no peer in transformers.
_WITHOUT_PEER = ("shares", "checkpoint", "import")
# Layouts that `convert export` writes.
EXPORTED = ("step-audio", "qwen2-audio", "qwen2", "llama")
# Those of `data.filters`.
FILTERS = ("api_error", "empty_reasoning", "near_empty_reply", "duplicated_turn", "role_order")
# The ops of `step_kernels.bench.OPS`, which is not imported for a list of commands: it brings torch.
BENCHED_OPS = (
    "pool-norm-downsample",
    "conv-downsample-gelu",
    "fused-downsample",
    "merge-audio",
    "gae",
    "audio-attention",
    "causal-attention",
    "paged-attention",
    "linear-cross-entropy",
)
# Options of `bench` that only some have.
_OPTIONS = {
    "choose": BENCHED_OPS,
    "device": BENCHED_OPS,
    "out": (*BENCHED_OPS, "import", "checkpoint"),
    "gigabytes": ("import",),
    "preset": ("shares", "train-tokens", "checkpoint"),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # Megatron warns on import about every optional package that is absent: `doctor` says it once, with the remedy.
    warnings.filterwarnings("ignore", module="megatron")
    options = _parser().parse_args(arguments)
    try:
        return options.command(options) or 0
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    except (UserError, ValueError, OSError, ImportError) as error:
        if os.environ.get("STEP_TRACEBACK"):
            raise
        # Said by every rank, though often all say the same: it may be wrong on one machine only, and torchrun ends the others
        # as soon as one has failed, maybe before they have said anything.
        rank = os.environ.get("RANK", "0")
        print(f"error: {error}" if rank == "0" else f"error on rank {rank}: {error}", file=sys.stderr)
        return 2


def _default_data() -> Path:
    return Path(os.environ.get("STEP_DATA", "data"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="step-megatron", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_data(commands)
    _add_train(commands)
    _add_judge(commands)
    _add_eval(commands)
    _add_chat(commands)
    _add_convert(commands)
    _add_bench(commands)
    return parser


def _command(commands, name: str, run, text: str) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run)
    return parser


def _with_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="RECIPE", help="YAML recipe; see examples/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")


def _config(options):
    from step_megatron.config import load_config

    return load_config(options.config, options.overrides)


def _add_doctor(commands) -> None:
    parser = _command(commands, "doctor", _doctor, "what this machine can run, why not the rest, and the remedy for each gap")
    parser.add_argument("--json", action="store_true")


def _doctor(options) -> int:
    from step_megatron import doctor

    return doctor.main(as_json=options.json)


def _add_data(commands) -> None:
    data = commands.add_parser("data", help="fetch, build, validate, encode and look at data").add_subparsers(required=True)
    parser = _command(data, "fetch", _data_fetch, "download open speech and pre-trained weights, by pinned hash, with resume")
    parser.add_argument("--data", type=Path, default=_default_data(), help="folder (default: $STEP_DATA or ./data)")
    parser.add_argument("--group", action="append", help="what to fetch (default: quickstart); may be repeated")
    parser = _command(data, "build", _data_build, "turn the downloads into conversations, a vocabulary and an audio index")
    parser.add_argument("--data", type=Path, default=_default_data())
    parser.add_argument("--out", type=Path, help="folder to write (default: DATA/open-speech)")
    parser.add_argument("--max-audio-seconds", type=float, default=5000.0)
    parser.add_argument("--clips", type=int, help="only so many clips, for a quick look")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    text = "turn the telephone prompts into conversations that ask for the words, and an audio index; no vocabulary"
    parser = _command(data, "build-transcripts", _data_build_transcripts, text)
    parser.add_argument("--data", type=Path, default=_default_data())
    parser.add_argument("--out", type=Path, help="folder to write (default: DATA/transcripts)")
    parser.add_argument("--languages", nargs="+", default=["en", "es", "fr", "it"], metavar="LL")
    parser.add_argument("--seed", type=int, default=1)
    parser = _command(data, "build-dialogues", _data_build_dialogues, "multi-turn dialogues about the clips, each with checks")
    parser.add_argument(
        "--open-speech", type=Path, default=_default_data() / "open-speech", help="folder that `data build` wrote"
    )
    parser.add_argument("--out", type=Path, help="folder to write (default: OPEN_SPEECH/dialogues)")
    parser.add_argument("--per-aspect", type=int, help="training dialogues of each of the four aspects (default: 300)")
    parser.add_argument("--seed", type=int, default=1)
    parser = _command(data, "from-manifest", _data_from_manifest, "turn a NeMo manifest (tarred or not) into conversations")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST.json")
    parser.add_argument("--out", type=Path, required=True, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--instruction", default="Write down what is said.", help="what the human asks of each clip")
    parser.add_argument("--source", help="name of the source (default: the manifest's)")
    parser.add_argument("--tars", default="", help="pattern of a tarred manifest's tars: audio_{shard}.tar or NeMo's")
    text = "turn preference records into conversations that a reward model is trained on"
    parser = _command(data, "from-preferences", _data_from_preferences, text)
    parser.add_argument("--preferences", type=Path, required=True, metavar="PREFERENCES.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="CONVERSATIONS.jsonl")
    _with_config(parser)
    parser = _command(data, "inspect", _data_inspect, "counts, durations and tokens by source, task and split")
    parser.add_argument("paths", nargs="+", type=Path, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--index", type=Path, help="audio index, or its folder (default: the one beside the first file)")
    parser.add_argument("--json", action="store_true")
    parser = _command(data, "filter", _data_filter, "drop leaked API errors, empty reasoning, duplicated turns and the like")
    parser.add_argument("path", type=Path, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="KEPT.jsonl")
    parser.add_argument("--dropped", type=Path, help="file of what was dropped and why (default: KEPT.dropped.jsonl)")
    parser.add_argument("--filter", action="append", choices=FILTERS, help="default: all; may be repeated")
    parser = _command(data, "validate", _data_validate, "decode every clip once; index the good, quarantine the bad")
    parser.add_argument("paths", nargs="+", type=Path, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--out", type=Path, help="folder of index.jsonl and quarantine.jsonl (default: beside the first file)")
    parser.add_argument("--limit", type=float, default=0.01, help="share of bad clips above which this fails")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="longest clip (a run's audio.max_clip_seconds)")
    parser = _command(data, "show-batch", _data_show_batch, "an HTML page of one packed batch")
    _with_config(parser)
    parser.add_argument("--out", type=Path, default=Path("batch.html"))
    parser.add_argument("--step", type=int, default=0)
    parser = _command(data, "encode", _data_encode, "run the frozen encoder over every clip of a recipe, into the cache")
    _with_config(parser)


def _add_train(commands) -> None:
    train = commands.add_parser("train", help="train a stage").add_subparsers(required=True)
    parser = _command(train, "midtrain", _train_midtrain, "audio-centric mid-training; under torchrun for several processes")
    _with_config(parser)
    parser = _command(train, "sft", _train_sft, "cold-start supervised fine-tuning of the run that model.weights names")
    _with_config(parser)
    parser = _command(train, "reward", _train_reward, "the generative reward model, on what `data from-preferences` wrote")
    _with_config(parser)
    text = "run the batch of a step that was out of order again; under torchrun for a replica of several processes"
    parser = _command(train, "replay", _train_replay, text)
    parser.add_argument("folder", type=Path, metavar="RUN/anomalies/...")
    parser.add_argument("--step", type=int, help="of the checkpoint to run it on (default: the newest from before the batch)")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the run's")


def _add_judge(commands) -> None:
    judge = commands.add_parser("judge", help="compare replies, and measure who compares").add_subparsers(required=True)
    text = "ask a reward model's run, or the server of rl.judge.server, about every record of a file"
    parser = _command(judge, "ask", _judge_ask, text)
    parser.add_argument("--preferences", type=Path, required=True, metavar="PREFERENCES.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="JUDGMENTS.jsonl")
    parser.add_argument("--run", type=Path, help="run of a reward model (default: ask the server)")
    parser.add_argument("--listen", action="store_true", help="send the clips along to the server")
    _with_config(parser)
    parser = _command(commands, "label", _label, "compare replies by eye and ear in a browser; writes preference records")
    parser.add_argument("source", type=Path, metavar="RUN", help="a run with preferences.jsonl, or a file of records")
    parser.add_argument("--out", type=Path, required=True, metavar="LABELLED.jsonl")
    parser.add_argument("--labeller", default="", help="who labels, for the records")
    parser.add_argument("--levels", type=int, default=7, help="of the scale (rl.judge.levels)")
    parser.add_argument("--port", type=int, default=0, help="on this machine (default: a free one)")
    text = "judgments beside known verdicts: accuracy, disagreement of orders, confusion, a length-only baseline"
    parser = _command(judge, "calibrate", _judge_calibrate, text)
    parser.add_argument("preferences", type=Path, metavar="PREFERENCES.jsonl")
    parser.add_argument("judgments", type=Path, metavar="JUDGMENTS.jsonl")
    parser.add_argument("--levels", type=int, default=7, help="of the scale (rl.judge.levels)")
    parser.add_argument("--json", action="store_true")


def _add_eval(commands) -> None:
    parser = _command(commands, "eval", _eval, "held-out accuracy beside majority class, linear probe and another clip's audio")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=_default_data() / "open-speech", help="folder that `data build` wrote")
    parser.add_argument(
        "--out", type=Path, help="file of results (default: RUN/results.json); predictions and report go beside it"
    )
    parser.add_argument("--limit", type=int, help="items a task, for a quick look")
    text = "folder of a Whisper model (CTranslate2) that transcribes the same clips, to compare with; needs the extra dev"
    parser.add_argument("--whisper", type=Path, metavar="DIR", help=text)
    parser = _command(commands, "report", _report, "one self-contained HTML file of a run that was evaluated")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=_default_data() / "open-speech")
    parser.add_argument("--ablation", type=Path, help="results.json of another run, such as one without text, shown beside")


def _add_chat(commands) -> None:
    parser = _command(commands, "chat", _chat, "talk to a trained run")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--audio", type=Path, action="append", default=[], help="audio of the first turn; may be repeated")
    parser.add_argument("--text", help="text of the first turn")
    parser.add_argument("--serve", action="store_true", help="an OpenAI-compatible endpoint instead")
    parser.add_argument("--port", type=int, default=8000, help="with --serve")
    parser.add_argument("--host", default="127.0.0.1", help="with --serve; there is no key and no encryption")


def _add_convert(commands) -> None:
    convert = commands.add_parser("convert", help="released checkpoints in, trained ones out").add_subparsers(required=True)
    text = "make a run directory of a released checkpoint: Step-Audio, Qwen2-Audio, Qwen2.5, LLaMA, SmolLM2 (GGUF)"
    parser = _command(convert, "import", _convert_import, text)
    parser.add_argument("model", type=Path, metavar="DIR", help="folder of config.json and weights, or a .gguf file")
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="for a decoder alone: Whisper (Hugging Face or CTranslate2)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="in place of the tokenizer files in DIR")
    parser.add_argument("--out", "--to", type=Path, metavar="OUT", help="run directory to make")
    parser.add_argument("--dry-run", action="store_true", help="read and check every tensor, write nothing")
    parser.add_argument("--seed", type=int, default=1234, help="of an adaptor, and of rows for added specials")
    text = "write a run's newest checkpoint for other tools: config, weights, tokenizer, model card"
    parser = _command(convert, "export", _convert_export, text)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", "--to", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--layout", choices=EXPORTED, help="default: what the run was imported from, else step-audio")
    parser.add_argument("--step", type=int, help="of a checkpoint that is not the newest")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, as peft reads them (default: merged)")


def _add_bench(commands) -> None:
    parser = _command(commands, "bench", _bench, "time a part or an op against its peers, side by side in one run")
    parser.add_argument("name", nargs="?", choices=(*BENCHED_PARTS, *BENCHED_OPS))
    parser.add_argument("--inspect", action="store_true", help="compile every GPU kernel and hold it against its budget")
    parser.add_argument("--arch", action="append", help="with --inspect: sm_90a (default), sm_80, sm_100; may be repeated")
    parser.add_argument("--data", type=Path, default=_default_data())
    parser.add_argument("--repeats", type=int, help="rounds (default: 5; of an op 15, fewer where one takes long)")
    parser.add_argument("--clips", type=int, help="clips in the sample")
    parser.add_argument("--gigabytes", type=float, help="of import: size of the checkpoint (default: 1.2)")
    parser.add_argument("--preset", help="of shares, rollout, train-tokens, checkpoint: the model (default: tiny, and smol-135m)")
    parser.add_argument("--out", type=Path, help="folder of an op's CSV and plot, or to write into (default: runs/bench)")
    parser.add_argument("--device", help="of an op (default: cuda where there is one, else cpu)")
    parser.add_argument("--choose", action="store_true", help="of attention: use the fastest backend on this device from now on")
    parser.add_argument("--json", action="store_true", help="print one JSON object last")


def _data_fetch(options) -> None:
    from step_megatron.data.fetch import fetch

    for folder in fetch(options.data, options.group or ["quickstart"]):
        print(folder)


def _data_build(options) -> None:
    from step_megatron.data.prepare import prepare
    from step_megatron.rl.preference_data import open_speech_judgments

    out = options.out or options.data / "open-speech"
    more = partial(open_speech_judgments, seed=options.seed)
    summary = prepare(options.data, out, options.max_audio_seconds, options.vocabulary, options.seed, options.clips, more)
    print(f"{out}: {summary['audio_seconds']:.0f} audio-seconds, clips {summary['clips']}")


def _data_build_transcripts(options) -> None:
    from step_megatron.data.prepare import prepare_transcripts

    out = options.out or options.data / "transcripts"
    summary = prepare_transcripts(options.data, out, options.languages, options.seed)
    print(f"{out}: {summary['audio_seconds']:.0f} audio-seconds, clips {summary['languages']}")


def _data_build_dialogues(options) -> None:
    from step_megatron.data.dialogues.build import COUNTS, build_dialogues

    out = options.out or options.open_speech / "dialogues"
    counts = COUNTS | ({"train": options.per_aspect} if options.per_aspect else {})
    summary = build_dialogues(options.open_speech, out, options.seed, counts)
    made = {split: sum(tasks.values()) for split, tasks in summary["dialogues"].items()}
    print(f"{out}: dialogues {made}, dropped {summary['dropped']}")


def _data_from_manifest(options) -> None:
    from step_megatron.data.manifest import convert_manifest

    source = options.source or options.manifest.stem
    count = convert_manifest(options.manifest, options.out, options.instruction, source, options.tars)
    print(f"{options.out}: {count} conversations")


def _data_from_preferences(options) -> None:
    from step_megatron.rl.preference_data import convert_preferences

    count, left = convert_preferences(options.preferences, options.out, _config(options).rl.judge)
    print(f"{options.out}: {count} conversations" + (f"; {left} records without a verdict are left out" if left else ""))


def _data_inspect(options) -> None:
    from step_megatron.audio.index import AudioIndex
    from step_megatron.data.inspect import inspect_files, table
    from step_megatron.data.tokenizer import Tokenizer

    folder = options.paths[0].parent
    beside = folder if (folder / "index.jsonl").is_file() else None
    index = AudioIndex.load(options.index or beside) if options.index or beside else None
    tokenizer = Tokenizer.load(folder / "tokenizer") if (folder / "tokenizer").is_dir() else None
    report = inspect_files(options.paths, tokenizer, index, index and index.folder)
    print(json.dumps(report, ensure_ascii=False) if options.json else table(report))


def _data_filter(options) -> None:
    from step_megatron.data.filters import filter_file

    dropped = options.dropped or options.out.with_suffix(".dropped.jsonl")
    counts = filter_file(options.path, options.out, dropped, options.filter or FILTERS)
    print(f"{options.out}: " + ", ".join(f"{name} {count}" for name, count in counts.items()))


def _data_validate(options) -> None:
    from step_megatron.data.prepare import validate_conversations

    out = options.out or options.paths[0].parent
    report = validate_conversations(options.paths, out, options.limit, options.max_seconds)
    print(f"{out / 'index.jsonl'}: {report.valid} clips, {report.seconds:.0f} s; {report.quarantined} quarantined {report.kinds}")


def _data_show_batch(options) -> None:
    from step_megatron.data.show_batch import write_page

    print(write_page(_config(options), options.out, options.step))


def _data_encode(options) -> None:
    from step_megatron.training.encoding import encode

    encode(_config(options))


def _train_midtrain(options) -> int:
    from step_megatron.training.midtrain import midtrain

    return _trained(midtrain(_config(options)))


def _train_sft(options) -> int:
    from step_megatron.training.sft import sft

    return _trained(sft(_config(options)))


def _train_reward(options) -> int:
    from step_megatron.training.reward import train_reward

    return _trained(train_reward(_config(options)))


def _trained(summary: dict) -> int:
    """Print what a stage returns; its exit status."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(summary))
    # A run that a signal ended is not done: the caller must not go on to evaluate it.
    return 130 if summary["interrupted"] else 0


def _judge_ask(options) -> None:
    from step_megatron.rl.judge.asking import ask

    counts = ask(options.preferences, options.out, _config(options), options.run, options.listen)
    print(f"{options.out}: {json.dumps(counts)}")


def _judge_calibrate(options) -> None:
    from step_megatron.data.preferences import read_preferences
    from step_megatron.rl.calibration import calibrate, report
    from step_megatron.rl.judge.records import read_judgments
    from step_megatron.rl.judge.scale import Scale

    preferences = read_preferences(options.preferences)
    found = calibrate(preferences, read_judgments(options.judgments, preferences), Scale(options.levels))
    print(json.dumps(found) if options.json else report(found))


def _label(options) -> None:
    from step_megatron.audio.front_end import LogMelFrontEnd
    from step_megatron.audio.wav import wav_bytes
    from step_megatron.rl.judge.scale import Scale
    from step_megatron.rl.labelling import Labelling, serve

    labelling = Labelling(options.source, options.out, Scale(options.levels), options.labeller)
    server, address = serve(labelling, partial(wav_bytes, LogMelFrontEnd(mels=80), labelling.file.parent), options.port)
    print(f"{address}\nopen it in a browser on this machine; Ctrl-C ends", flush=True)
    server.serve_forever()


def _train_replay(options) -> None:
    from step_megatron.training.replay import replay, table

    result = replay(options.folder, options.step, options.overrides)
    if int(os.environ.get("RANK", "0")) == 0:
        print(json.dumps(result) if options.json else table(result))


def _eval(options) -> None:
    from step_megatron.evaluation.report import write_report
    from step_megatron.evaluation.run import Limits, evaluate

    results = options.out or options.run / "results.json"
    evaluate(options.run, options.data, results, Limits(items_per_task=options.limit or 0), options.whisper)
    write_report(options.run, options.data, results.with_name("report.html"), results)


def _report(options) -> None:
    from step_megatron.evaluation.report import write_report

    write_report(options.run, options.data, options.run / "report.html", ablation=options.ablation)
    print(options.run / "report.html")


def _chat(options) -> None:
    if options.serve:
        from step_megatron.serving.server import serve

        if options.audio or options.text:
            raise UserError("chat --serve takes its turns over HTTP: leave --audio and --text out")
        serve(options.run, options.host, options.port)
        return
    from step_megatron.evaluation.chat import chat

    chat(options.run, options.audio, options.text)


def _convert_import(options) -> None:
    from step_megatron.conversion.importing import import_model

    if (options.out is None) != options.dry_run:
        raise UserError("convert import: name the run directory to make by --to OUT, or read and check only, by --dry-run")
    print(json.dumps(import_model(options.model, options.out, options.encoder, options.tokenizer, options.seed)))


def _convert_export(options) -> None:
    from step_megatron.conversion.exporting import export_run

    print(json.dumps(export_run(options.run, options.out, options.layout, options.step, options.adapter)))


def _bench(options) -> int | None:
    import importlib
    import importlib.util

    if options.inspect:
        from step_kernels.inspect import ARCHITECTURES, run

        return run(options.arch or ARCHITECTURES[:1], options.json)
    if options.name is None:
        raise UserError("bench: say what to time (see --help), or --inspect")
    for option, names in _OPTIONS.items():
        if getattr(options, option) and options.name not in names:
            raise UserError(f"bench {options.name}: has no --{option}; that is of {', '.join(names)}")
    if options.choose:
        from step_kernels.bench import choose

        if options.out is not None:
            raise UserError("bench --choose writes the file of choices, no folder; STEP_KERNELS_CHOICES names another, not --out")
        result = choose(options.name, options.repeats or 15, options.device)
    elif options.name in BENCHED_OPS:
        from step_kernels.bench import run

        result = run(options.name, options.repeats, options.out or Path("runs/bench"), options.device)
    elif options.name not in _WITHOUT_PEER and importlib.util.find_spec("transformers") is None:
        raise ImportError(
            f"bench {options.name} compares with transformers, which is not installed; run: pip install 'step-megatron[dev]' "
            "(in a checkout: pip install -e '.[dev]')"
        )
    else:
        options.repeats = options.repeats or 5
        result = importlib.import_module(f"step_megatron.benchmarks.{BENCHED_PARTS[options.name]}").run(options)
    if options.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(main())
