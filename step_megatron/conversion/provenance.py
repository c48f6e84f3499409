"""Where weights come from: files, hashes, licences, told on import and passed on with every export."""

import json
import re
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from step_megatron.config.load import RUN_CONFIG, load_config
from step_megatron.config.schema import Config
from step_megatron.conversion.digests import Digest, checked, known_digests
from step_megatron.conversion.gguf_file import GgufFile
from step_megatron.conversion.layouts import Foreign
from step_megatron.conversion.tokenizer_files import NAMES

FILE = "import.json"
UNKNOWN = "unknown"


@dataclass
class History:
    """What is known of where a run's weights come from.

    Attributes:
        run: name of the run.
        ancestors: runs whose weights it started from, the last first.
        models: records of the imported checkpoints (`describe`), the decoder's first.
        drawn, added: parameters and special tokens that the import made.
        encoder: name and licence of the encoder's directory where the run was not imported.
        places: directories that may hold licence texts.
    """

    run: str
    ancestors: list[str] = field(default_factory=list)
    models: list[dict[str, Any]] = field(default_factory=list)
    drawn: list[str] = field(default_factory=list)
    added: dict[str, int] = field(default_factory=dict)
    encoder: tuple[str, str] | None = None
    places: list[Path] = field(default_factory=list)

    @property
    def layout(self) -> str | None:
        """The layout of the imported decoder."""
        return self.models[0]["layout"] if self.models else None

    @property
    def config(self) -> dict[str, Any]:
        """Its `config.json`."""
        return self.models[0]["config"] if self.models else {}

    @property
    def generation(self) -> dict[str, Any] | None:
        """Its `generation_config.json`."""
        return self.models[0]["generation_config"] if self.models else None


def history(run_dir: Path, config: Config) -> History:
    """Follow `model.weights` from a run back to the import at its beginning, as far as the directories are still there."""
    past = History(run_dir.resolve().name)
    place, weights = run_dir, config.model.weights
    while True:
        past.places.append(place)
        record = place / FILE
        if record.is_file():
            told = json.loads(record.read_text(encoding="utf-8"))
            past.models, past.drawn, past.added = told["models"], told["drawn"], told["added"]
        if not weights or Path(weights) in past.places:
            break
        place = Path(weights)
        past.ancestors.append(place.name)
        path = place / RUN_CONFIG
        weights = load_config(path).model.weights if path.is_file() else ""
    if config.encoder.weights not in ("", "random") and not past.models:
        place = Path(config.encoder.weights)
        past.encoder = place.name, licence(place)
        past.places.append(place)
    return past


def describe(foreign: Foreign) -> dict[str, Any]:
    """The record of one imported checkpoint; reads every file once, for its digest.

    Raises:
        ConversionError: a file whose digest is known and is another.
    """
    generation = foreign.directory / "generation_config.json"
    known = known_digests(foreign.directory)
    beside = [foreign.directory / name for name in ("config.json", generation.name, *NAMES)]
    files = list(dict.fromkeys([*foreign.source.files, *(file for file in beside if file.is_file())]))
    return {
        "name": foreign.directory.resolve().name,
        "layout": foreign.layout,
        "licence": str(foreign.source.fields.get("general.license", UNKNOWN))
        if isinstance(foreign.source, GgufFile)
        else licence(foreign.directory),
        "files": {file.name: _describe_file(file, known.get(file.name)) for file in files},
        "config": foreign.tree,
        "generation_config": json.loads(generation.read_text(encoding="utf-8")) if generation.is_file() else None,
    }


def _describe_file(file: Path, known: Digest | None) -> dict[str, Any]:
    return {
        "bytes": file.stat().st_size,
        "sha256": checked(file, known),
        "checked_against": known.said_by if known else None,
    }


def licence(directory: Path) -> str:
    """The licence as the files around the weights name it: the fetched source's pin, or the model card's header."""
    pin, card = directory / "PINNED.json", directory / "README.md"
    if pin.is_file():
        return str(json.loads(pin.read_text(encoding="utf-8")).get("licence", UNKNOWN))
    if card.is_file():
        header = re.match(r"---\n(.*?)\n---", card.read_text(encoding="utf-8", errors="replace"), re.DOTALL)
        if header and (found := re.search(r"^license:\s*(\S+)", header[1], re.MULTILINE)):
            return found[1]
    return UNKNOWN


def copy_licences(source: Path, target: Path) -> None:
    """Copy licence texts that lie in `source` or in its `LICENCES` into `target`; one that is there already is kept."""
    patterns = ("LICENSE*", "LICENCE*", "NOTICE*", "LICENCES/*")
    for file in (file for pattern in patterns for file in sorted(source.glob(pattern)) if file.is_file()):
        name = file.name if file.parent.name == "LICENCES" else f"{source.resolve().name}-{file.name}"
        if not (target / name).exists():
            target.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / name)
