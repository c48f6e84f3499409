"""The command line: `step-megatron doctor | data | train | judge | label | eval | report | chat | convert | study | bench`.

Every command imports what it needs when it runs, so that `--help` and `doctor` work on a machine where the rest does not.
An error that a user can mend (a bad path, a bad setting, bad data) prints its message and exits with 2; anything else is a defect
and shows its traceback, as every error does when STEP_TRACEBACK is set.
"""

import argparse
import os
import sys
import warnings

from step_megatron.commands.bench import add_bench
from step_megatron.commands.common import command
from step_megatron.commands.data import add_data
from step_megatron.commands.runs import add_chat, add_convert, add_eval
from step_megatron.commands.study import add_study
from step_megatron.commands.train import add_judge, add_train
from step_megatron.errors import UserError


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    # Megatron warns on import about every optional package that is absent: `doctor` says it once, with the remedy.
    warnings.filterwarnings("ignore", module="megatron")
    # Megatron's calls, which torch attributes to itself.
    warnings.filterwarnings("ignore", message=".torch.distributed.* is deprecated", category=FutureWarning)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="step-megatron", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    add_data(commands)
    add_train(commands)
    add_judge(commands)
    add_eval(commands)
    add_chat(commands)
    add_convert(commands)
    add_study(commands)
    add_bench(commands)
    return parser


def _add_doctor(commands) -> None:
    parser = command(commands, "doctor", _doctor, "what this machine can run, why not the rest, and the remedy for each gap")
    parser.add_argument("--json", action="store_true")


def _doctor(options) -> int:
    from step_megatron import doctor

    return doctor.main(as_json=options.json)


if __name__ == "__main__":
    sys.exit(main())
