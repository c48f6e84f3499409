"""NeMo manifests -> conversations: each line's clip, with an instruction, is answered by its text.

A manifest is JSON lines: `{"audio_filepath": "clip.wav", "duration": 2.5, "text": "hello"}`, paths relative to the manifest. Also
read: `offset` (seconds; the part from there, `duration` long, is cut out into a clip of its own, unless it is the whole), `lang`
(or `source_lang`), and the tarred form, where `audio_filepath` is a tar's member and `shard_id` (or a suffix, `clip.wav@3`) says
which tar. NeMo stores a recording that has several entries once, and numbers the further entries `clip-sub1.wav`,
`clip-sub2.wav`. Other keys go to `meta`.
"""

import io
import json
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import soundfile

from step_megatron.audio.address import parse_address
from step_megatron.audio.errors import AudioError
from step_megatron.data.schema import Audio, Conversation, SchemaError, Text, Turn, parse_line, to_record, write_conversations

_NEMO_RANGE = re.compile(r"_OP_\d+\.\.\d+_CL_|\{\d+\.\.\d+\}")
_SUB = re.compile(r"-sub\d+(?=\.[^.]*$)")
_AT_SHARD = re.compile(r"(?P<name>.+)@(?P<shard>\d+)")
# Durations are rounded, often to hundredths: a part may end so far behind the recording, and one so close to all of it is all.
_ROUNDED_SECONDS = 0.01


def convert_manifest(manifest: str | Path, out: str | Path, instruction: str, source: str, tars: str = "") -> int:
    """Turn a manifest into a JSONL of conversations and return their number.

    Args:
        out: the JSONL; clips cut out of longer recordings are written beside it, to `cut/`.
        instruction: what the human asks of the clip, such as "Write down what is said."
        source: the conversations' source; ids are `source-LINE`.
        tars: pattern of the tars, relative to the manifest, for a tarred one: `audio_{shard}.tar` or NeMo's
            `audio__OP_0..127_CL_.tar`.

    Raises:
        SchemaError: names the manifest's line, field and remedy; nothing is left half written.
    """
    reader = _Reader(Path(manifest), Path(out), instruction, source, _NEMO_RANGE.sub("{shard}", tars))
    try:
        return write_conversations(out, reader.conversations())
    finally:
        reader.remove_partial()


class _Reader:
    """Reads one manifest; holds what every line needs."""

    def __init__(self, manifest: Path, out: Path, instruction: str, source: str, tars: str):
        self.manifest, self.out_dir, self.instruction, self.source = manifest, out.absolute().parent, instruction, source
        if tars and "{shard}" not in tars:
            raise SchemaError(f"{tars!r} has no place for the shard's number; write it like audio_{{shard}}.tar")
        if not manifest.is_file():
            raise SchemaError(f"{manifest}: no such manifest")
        self.tars = tars
        self._cut: list[Path] = []

    def conversations(self) -> Iterator[Conversation]:
        with self.manifest.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self.conversation(line, number)
        # Every line is right.
        for path in self._cut:
            _partial(path).replace(path)

    def remove_partial(self) -> None:
        """Remove what a manifest that was refused has left."""
        for path in self._cut:
            _partial(path).unlink(missing_ok=True)
        folder = self.out_dir / "cut"
        if self._cut and not any(folder.iterdir()):
            folder.rmdir()

    def conversation(self, line: bytes, number: int) -> Conversation:
        where = f"{self.manifest}:{number}"
        try:
            entry = json.loads(line.decode("utf-8"))
        except ValueError as error:
            raise SchemaError(f"{where}: not a JSON object in UTF-8 ({error}); write one entry a line") from error
        if not isinstance(entry, dict):
            raise SchemaError(f"{where}: not a JSON object; write one entry a line")
        name = _field(entry, "audio_filepath", str, where)
        text = _field(entry, "text", str, where)
        address = self.address(entry, name, where)
        if entry.get("offset") is not None:
            address = self.cut(address, _field(entry, "offset", float, where), _field(entry, "duration", float, where), number)
        meta = {key: value for key, value in entry.items() if key not in ("audio_filepath", "text", "offset", "shard_id")}
        language = meta.pop("lang", None) or meta.pop("source_lang", None)
        meta |= {"task": "transcription", "answer": text} | ({"language": language} if language else {})
        turns = (
            Turn("human", (Audio(self.relative(address)), Text(self.instruction))),
            Turn("assistant", (Text(text),)),
        )
        conversation = Conversation(f"{self.source}-{number}", self.source, turns, meta)
        # Refused here, a value that no conversation may have is named by its line of the manifest.
        parse_line(json.dumps(to_record(conversation)), where)
        return conversation

    def address(self, entry: dict[str, Any], name: str, where: str) -> str:
        """The clip's address with an absolute path."""
        root = self.manifest.absolute().parent
        if not self.tars:
            if "shard_id" in entry:
                raise SchemaError(
                    f"{where}: field `shard_id` says that this manifest is tarred; name the tars, audio_{{shard}}.tar"
                )
            return os.path.join(root, name)
        shard = entry.get("shard_id")
        if match := _AT_SHARD.fullmatch(name):
            name, shard = match["name"], int(match["shard"])
        if not isinstance(shard, int):
            raise SchemaError(f"{where}: field `shard_id` is {shard!r}; a tarred manifest needs its number, or clip.wav@NUMBER")
        return f"{os.path.join(root, self.tars.replace('{shard}', str(shard)))}::{_SUB.sub('', name)}"

    def relative(self, address: str) -> str:
        """An address as the JSONL writes it: relative for what lies under its folder."""
        inside = address.startswith(str(self.out_dir) + os.sep)
        return os.path.relpath(address, self.out_dir) if inside else address

    def cut(self, address: str, offset: float, duration: float, number: int) -> str:
        """Write a part of a recording, sample for sample, to a file of its own, unless it is all of it; its address."""
        where = f"{self.manifest}:{number}"
        try:
            with soundfile.SoundFile(io.BytesIO(parse_address(address).read())) as file:
                start, rounded = round(offset * file.samplerate), round(_ROUNDED_SECONDS * file.samplerate)
                count = round(duration * file.samplerate)
                if offset < 0 or count < 1 or start >= file.frames or start + count > file.frames + rounded:
                    raise SchemaError(
                        f"{where}: fields `offset` and `duration` ask for {offset} s to {offset + duration} s of "
                        f"{file.frames / file.samplerate} s of {address}; correct them"
                    )
                if start == 0 and count >= file.frames - rounded:
                    return address
                file.seek(start)
                samples = file.read(count, dtype="int16" if file.subtype == "PCM_16" else "float32")
                rate, subtype = file.samplerate, "PCM_16" if file.subtype == "PCM_16" else "FLOAT"
        except (AudioError, soundfile.SoundFileError, OSError) as error:
            raise SchemaError(
                f"{where}: field `audio_filepath`: {address} cannot be cut ({error}); repair or remove it"
            ) from error
        path = self.out_dir / "cut" / f"{self.source}-{number}.wav"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._cut.append(path)
        soundfile.write(_partial(path), samples, rate, subtype, format="WAV")
        return str(path)


def _partial(path: Path) -> Path:
    """Where a part lies until the whole manifest is read."""
    return path.with_name(path.name + ".partial")


def _field(entry: dict[str, Any], name: str, kind: type, where: str) -> Any:
    """A field of a manifest entry, checked."""
    value = entry.get(name)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, kind) or (kind is float and not math.isfinite(value)):
        expected = {str: "a string", float: "seconds, a number"}[kind]
        raise SchemaError(f"{where}: field `{name}` is {value!r}; write {expected}")
    return value
