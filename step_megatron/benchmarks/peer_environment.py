"""Python environments of peers whose packages would not go with ours, kept in `~/.cache/step_megatron/peers/`.

`step-megatron bench ppo --make-peer` makes them (1.5 GB each with a CPU build of torch). `STEP_TORCH` names the torch to install
where plain `torch==2.13.0` would bring a CUDA build that is not wanted, as for the scripts. `XDG_CACHE_HOME` moves the folder.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from step_megatron.errors import UserError

_STAMP = "requirements.txt"


class PeerError(UserError, RuntimeError):
    """A peer's environment is not there, or could not be made."""


def folder(trl: str) -> Path:
    """Where the environment of a release of TRL is."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "step_megatron" / "peers" / f"trl-{trl}"


def python(trl: str) -> Path:
    """The interpreter of an environment that has been made.

    Raises:
        PeerError: it has not, or with other packages.
    """
    made = folder(trl)
    if not _is_made(made, trl):
        raise PeerError(f"there is no environment with TRL {trl} at {made}; run: step-megatron bench ppo --make-peer")
    return made / "bin" / "python"


def make(trl: str) -> Path:
    """Make the environment where it is not there yet; returns its interpreter.

    Raises:
        PeerError: pip failed; its own words stand above on the terminal.
    """
    made = folder(trl)
    if not _is_made(made, trl):
        print(f"installing {', '.join(_requirements(trl))} into {made}", file=sys.stderr)
        shutil.rmtree(made, ignore_errors=True)
        interpreter = str(made / "bin" / "python")
        try:
            subprocess.run([sys.executable, "-m", "venv", str(made)], check=True)
            subprocess.run([interpreter, "-m", "pip", "install", "--quiet", *_requirements(trl)], check=True)
        except subprocess.CalledProcessError as error:
            raise PeerError(f"could not make {made}: status {error.returncode}; see that pip reaches an index") from error
        (made / _STAMP).write_text("\n".join(_pins(trl)), encoding="utf-8")
    return python(trl)


def _requirements(trl: str) -> list[str]:
    return [os.environ.get("STEP_TORCH", "torch==2.13.0"), *_pins(trl)]


def _pins(trl: str) -> list[str]:
    return ["transformers==5.23.0", f"trl=={trl}"]


def _is_made(made: Path, trl: str) -> bool:
    stamp = made / _STAMP
    return stamp.is_file() and stamp.read_text(encoding="utf-8") == "\n".join(_pins(trl))
