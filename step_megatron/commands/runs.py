"""`step-megatron eval | report | chat | convert ...`: what is done with a trained run."""

import json
from pathlib import Path

from step_megatron.commands.common import command, default_data
from step_megatron.errors import UserError

# Layouts that `convert export` writes.
EXPORTED = ("step-audio", "qwen2-audio", "qwen2", "llama")


def add_eval(commands) -> None:
    """Declare `eval` and `report`."""
    parser = command(commands, "eval", _eval, "held-out accuracy beside majority class, linear probe and another clip's audio")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=default_data() / "open-speech", help="folder that `data build` wrote")
    parser.add_argument(
        "--out", type=Path, help="file of results (default: RUN/results.json); predictions and report go beside it"
    )
    parser.add_argument("--limit", type=int, help="items a task, for a quick look")
    text = "folder of a Whisper model (CTranslate2) that transcribes the same clips, to compare with; needs the extra dev"
    parser.add_argument("--whisper", type=Path, metavar="DIR", help=text)
    parser = command(commands, "report", _report, "one self-contained HTML file of a run that was evaluated")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=default_data() / "open-speech")
    parser.add_argument("--ablation", type=Path, help="results.json of another run, such as one without text, shown beside")
    parser.add_argument("--reward", type=Path, metavar="RUN", help="reward model's run, with `judge calibrate --out`")
    parser.add_argument("--ppo", type=Path, metavar="RUN", help="PPO run, with `judge compare --out`")


def add_chat(commands) -> None:
    """Declare `chat`."""
    parser = command(commands, "chat", _chat, "talk to a trained run")
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--audio", type=Path, action="append", default=[], help="audio of the first turn; may be repeated")
    parser.add_argument("--text", help="text of the first turn")
    parser.add_argument("--serve", action="store_true", help="an OpenAI-compatible endpoint instead")
    parser.add_argument("--port", type=int, default=8000, help="with --serve")
    parser.add_argument("--host", default="127.0.0.1", help="with --serve; there is no key and no encryption")


def add_convert(commands) -> None:
    """Declare `convert import` and `convert export`."""
    convert = commands.add_parser("convert", help="released checkpoints in, trained ones out").add_subparsers(required=True)
    text = "make a run directory of a released checkpoint: Step-Audio, Qwen2-Audio, Qwen2.5, LLaMA, SmolLM2 (GGUF)"
    parser = command(convert, "import", _convert_import, text)
    parser.add_argument("model", type=Path, metavar="DIR", help="folder of config.json and weights, or a .gguf file")
    parser.add_argument("--encoder", type=Path, metavar="DIR", help="for a decoder alone: Whisper (Hugging Face or CTranslate2)")
    parser.add_argument("--tokenizer", type=Path, metavar="DIR", help="in place of the tokenizer files in DIR")
    parser.add_argument("--out", "--to", type=Path, metavar="OUT", help="run directory to make")
    parser.add_argument("--dry-run", action="store_true", help="read and check every tensor, write nothing")
    parser.add_argument("--seed", type=int, default=1234, help="of an adaptor, and of rows for added specials")
    text = "write a run's newest checkpoint for other tools: config, weights, tokenizer, model card"
    parser = command(convert, "export", _convert_export, text)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("--out", "--to", type=Path, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--layout", choices=EXPORTED, help="default: what the run was imported from, else step-audio")
    parser.add_argument("--step", type=int, help="of a checkpoint that is not the newest")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, as peft reads them (default: merged)")


def _eval(options) -> None:
    from step_megatron.evaluation.report import write_report
    from step_megatron.evaluation.run import Limits, evaluate

    results = options.out or options.run / "results.json"
    evaluate(options.run, options.data, results, Limits(items_per_task=options.limit or 0), options.whisper)
    write_report(options.run, options.data, results.with_name("report.html"), results)


def _report(options) -> None:
    from step_megatron.evaluation.report import write_report
    from step_megatron.evaluation.results import result_line
    from step_megatron.evaluation.rl_results import with_later_stages

    results = with_later_stages(options.run, options.reward, options.ppo)
    write_report(options.run, options.data, options.run / "report.html", None, options.ablation, options.reward, options.ppo)
    print(options.run / "report.html")
    print(result_line(results))


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
