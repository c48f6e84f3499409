"""Where to download Debian packages from: STEP_DEBIAN_MIRROR, or the mirror that this machine's apt already uses.

No host name is written in the code, so that the machine's own settings decide.
"""

import os
import re
from pathlib import Path

from step_megatron.errors import UserError

VARIABLE = "STEP_DEBIAN_MIRROR"
_APT = Path("/etc/apt")


class MirrorError(UserError, RuntimeError):
    """No Debian mirror is known."""


def candidates(apt_dir: Path = _APT) -> list[str]:
    """Base URIs to try in order; each is followed by a pool path (`pool/main/...`).

    `STEP_DEBIAN_MIRROR` (one base URI, or several divided by spaces) stands alone when it is set.

    Raises:
        MirrorError: if neither the variable nor apt names an http(s) mirror.
    """
    if override := os.environ.get(VARIABLE, "").split():
        return [uri.rstrip("/") for uri in override]
    uris: list[str] = []
    for file in [apt_dir / "sources.list", *sorted((apt_dir / "sources.list.d").glob("*"))]:
        if file.suffix in (".list", ".sources") and file.is_file():
            text = file.read_text(encoding="utf-8", errors="replace")
            uris += _deb822(text) if file.suffix == ".sources" else _one_line(text)
    web = [uri.rstrip("/") for uri in dict.fromkeys(uris) if uri.startswith(("http://", "https://"))]
    if not web:
        raise MirrorError(
            f"no Debian mirror is known: {apt_dir} names none. Set {VARIABLE} to the base URI of one, "
            "that is the directory that holds `pool/` and `dists/`."
        )
    # A mirror of Debian proper ends in /debian by custom; vendors' own repositories do not hold the pool.
    return sorted(web, key=lambda uri: not uri.endswith("/debian"))


def _one_line(text: str) -> list[str]:
    """URIs of `deb [options] URI suite components` lines."""
    return re.findall(r"^\s*deb\s+(?:\[[^\]]*\]\s+)?(\S+)", text, re.MULTILINE)


def _deb822(text: str) -> list[str]:
    """URIs of enabled `deb` stanzas of a deb822 file."""
    uris = []
    text = re.sub(r"^#.*\n?", "", text, flags=re.MULTILINE)
    for stanza in re.split(r"\n\s*\n", text):
        joined = re.sub(r"\n[ \t]+", " ", stanza)
        fields = dict(re.findall(r"^([\w-]+):[ \t]*(.*?)[ \t]*$", joined, re.MULTILINE))
        fields = {key.lower(): value for key, value in fields.items()}
        if "deb" in fields.get("types", "deb").split() and fields.get("enabled", "yes").lower() not in ("no", "false"):
            uris += fields.get("uris", "").split()
    return uris
