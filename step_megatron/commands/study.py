"""`step-megatron study ...`: arms of training against each other, with seeds and spread."""

from functools import partial
from pathlib import Path

from step_megatron.commands.common import command, default_data, with_config

# Those of `studies.catalogue.STUDIES`, which is not imported for a list of commands: it brings torch.
_STUDIES = {
    "joint-vs-sequential": "PPO on rubric and preference samples in the same batches, or one kind after the other",
    "reward-trap": "PPO on verifiable rewards alone, on preference alone, and on both",
}


def add_study(commands) -> None:
    """Declare `study` and the studies below it."""
    study = commands.add_parser("study", help="arms of training against each other, with seeds and spread").add_subparsers(
        required=True
    )
    for name, text in _STUDIES.items():
        parser = command(study, name, partial(_study, name), text)
        parser.add_argument("--start", type=Path, required=True, metavar="RUN", help="run that every arm starts from")
        prompts = default_data() / "open-speech" / "prompts"
        parser.add_argument("--prompts", type=Path, default=prompts, help="folder of train.jsonl and test.jsonl")
        parser.add_argument("--out", type=Path, required=True, help="folder of the study; what is finished in it is kept")
        parser.add_argument("--seeds", type=int, default=3, help="how many")
        parser.add_argument("--held-out", type=int, default=150, help="most held-out prompts of a kind")
        parser.add_argument("--samples", type=int, default=1, help="replies to each of them")
        parser.add_argument("--jobs", type=int, default=1, help="arms at a time, in processes of their own")
        with_config(parser)


def _study(name: str, options) -> None:
    from step_megatron.studies.arms import Setting
    from step_megatron.studies.catalogue import STUDIES
    from step_megatron.studies.reporting import figures, run_study

    setting = Setting(
        options.start.absolute(),
        options.prompts.absolute(),
        options.out.absolute(),
        options.config and Path(options.config),
        tuple(options.overrides),
        tuple(range(1, options.seeds + 1)),
        options.held_out,
        options.samples,
        options.jobs,
    )
    heads, rows = figures(STUDIES[name], run_study(STUDIES[name], setting))
    for row in (heads, *rows):
        print("  ".join(f"{cell:<16}" for cell in row).rstrip())
    print(setting.out / "report.html")
