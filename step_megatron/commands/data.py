"""`step-megatron data ...`: fetch, build, filter, validate, encode and look at data."""

import json
from functools import partial
from pathlib import Path

from step_megatron.commands.common import command, config_of, default_data, with_config

# Those of `data.filters`.
FILTERS = ("api_error", "empty_reasoning", "near_empty_reply", "duplicated_turn", "role_order")


def add_data(commands) -> None:
    """Declare `data` and what is below it."""
    data = commands.add_parser("data", help="fetch, build, validate, encode and look at data").add_subparsers(required=True)
    parser = command(data, "fetch", _data_fetch, "download open speech and pre-trained weights, by pinned hash, with resume")
    parser.add_argument("--data", type=Path, default=default_data(), help="folder (default: $STEP_DATA or ./data)")
    parser.add_argument("--group", action="append", help="what to fetch (default: quickstart); may be repeated")
    parser = command(data, "build", _data_build, "turn the downloads into conversations, a vocabulary and an audio index")
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--out", type=Path, help="folder to write (default: DATA/open-speech)")
    parser.add_argument("--max-audio-seconds", type=float, default=5000.0)
    parser.add_argument("--clips", type=int, help="only so many clips, for a quick look")
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--seed", type=int, default=1)
    text = "turn the telephone prompts into conversations that ask for the words, and an audio index; no vocabulary"
    parser = command(data, "build-transcripts", _data_build_transcripts, text)
    parser.add_argument("--data", type=Path, default=default_data())
    parser.add_argument("--out", type=Path, help="folder to write (default: DATA/transcripts)")
    parser.add_argument("--languages", nargs="+", default=["en", "es", "fr", "it"], metavar="LL")
    parser.add_argument("--seed", type=int, default=1)
    parser = command(data, "build-dialogues", _data_build_dialogues, "multi-turn dialogues about the clips, each with checks")
    parser.add_argument("--open-speech", type=Path, default=default_data() / "open-speech", help="folder that `data build` wrote")
    parser.add_argument("--out", type=Path, help="folder to write (default: OPEN_SPEECH/dialogues)")
    parser.add_argument("--per-aspect", type=int, help="training dialogues of each of the four aspects (default: 300)")
    parser.add_argument("--seed", type=int, default=1)
    parser = command(data, "from-manifest", _data_from_manifest, "turn a NeMo manifest (tarred or not) into conversations")
    parser.add_argument("manifest", type=Path, metavar="MANIFEST.json")
    parser.add_argument("--out", type=Path, required=True, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--instruction", default="Write down what is said.", help="what the human asks of each clip")
    parser.add_argument("--source", help="name of the source (default: the manifest's)")
    parser.add_argument("--tars", default="", help="pattern of a tarred manifest's tars: audio_{shard}.tar or NeMo's")
    text = "turn preference records into conversations that a reward model is trained on"
    parser = command(data, "from-preferences", _data_from_preferences, text)
    parser.add_argument("--preferences", type=Path, required=True, metavar="PREFERENCES.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="CONVERSATIONS.jsonl")
    with_config(parser)
    parser = command(data, "inspect", _data_inspect, "counts, durations and tokens by source, task and split")
    parser.add_argument("paths", nargs="+", type=Path, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--index", type=Path, help="audio index, or its folder (default: the one beside the first file)")
    parser.add_argument("--json", action="store_true")
    parser = command(data, "filter", _data_filter, "drop leaked API errors, empty reasoning, duplicated turns and the like")
    parser.add_argument("path", type=Path, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--out", type=Path, required=True, metavar="KEPT.jsonl")
    parser.add_argument("--dropped", type=Path, help="file of what was dropped and why (default: KEPT.dropped.jsonl)")
    parser.add_argument("--filter", action="append", choices=FILTERS, help="default: all; may be repeated")
    parser = command(data, "validate", _data_validate, "decode every clip once; index the good, quarantine the bad")
    parser.add_argument("paths", nargs="+", type=Path, metavar="CONVERSATIONS.jsonl")
    parser.add_argument("--out", type=Path, help="folder of index.jsonl and quarantine.jsonl (default: beside the first file)")
    parser.add_argument("--limit", type=float, default=0.01, help="share of bad clips above which this fails")
    parser.add_argument("--max-seconds", type=float, default=600.0, help="longest clip (a run's audio.max_clip_seconds)")
    parser = command(data, "show-batch", _data_show_batch, "an HTML page of one packed batch")
    with_config(parser)
    parser.add_argument("--out", type=Path, default=Path("batch.html"))
    parser.add_argument("--step", type=int, default=0)
    parser = command(data, "encode", _data_encode, "run the frozen encoder over every clip of a recipe, into the cache")
    with_config(parser)


def _data_fetch(options) -> None:
    from step_megatron.data.fetch import fetch

    for folder in fetch(options.data, options.group or ["quickstart"]):
        print(folder)


def _data_build(options) -> None:
    from step_megatron.data.prepare import prepare
    from step_megatron.rl.preference_data import open_speech_rl_data

    out = options.out or options.data / "open-speech"
    more = partial(open_speech_rl_data, seed=options.seed)
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

    count, left = convert_preferences(options.preferences, options.out, config_of(options).rl.judge)
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

    print(write_page(config_of(options), options.out, options.step))


def _data_encode(options) -> None:
    from step_megatron.training.encoding import encode

    encode(config_of(options))
