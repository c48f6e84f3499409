"""The audio index: every clip decoded once beforehand, its length and content hash written down, every unusable clip named.

`validate` writes two files of JSON lines:

    index.jsonl       {"address", "sha256", "num_samples", "sample_rate", "channels", "duration", "format", "stamp", "decoder",
                       "span"}
    quarantine.jsonl  {"address", "kind", "reason", "stamp", "decoder"}

Addresses are relative to the folder of the index where that is possible, so a data set can be moved. `num_samples` is at 16 kHz,
exactly what decoding returns: the packer counts tokens from it without touching audio. `stamp` is size and modification time of
the file: a clip whose file did not change is not read again by the same `decoder`, which also makes an interrupted run resumable.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from step_megatron.audio.address import AudioAddress, parse_address
from step_megatron.audio.errors import AudioError, NotIndexed, QuarantineLimitExceeded
from step_megatron.audio.front_end import DecodedClip, LogMelFrontEnd, decoder_version, is_silent
from step_megatron.audio.geometry import MIN_CHUNK_SAMPLES, SAMPLE_RATE
from step_megatron.audio.tar_index import audio_members
from step_megatron.runtime.progress import Progress

INDEX_NAME, QUARANTINE_NAME = "index.jsonl", "quarantine.jsonl"
_BATCH = 64


@dataclass(frozen=True)
class ClipInfo:
    """What the index knows of a clip.

    Attributes:
        address: relative to the index's folder where possible.
        sha256: of the encoded bytes; the key of the encoded-audio cache.
        num_samples: at 16 kHz, as `LogMelFrontEnd.decode` returns.
        sample_rate, channels, format: of the source.
        duration: seconds.
        stamp: size and modification time (ns) of the file that holds the clip.
        decoder: `decoder_version()` of who decoded it.
        span: byte offset and size in its tar; None for other clips.
    """

    address: str
    sha256: str
    num_samples: int
    sample_rate: int
    channels: int
    duration: float
    format: str
    stamp: tuple[int, int]
    decoder: str
    span: tuple[int, int] | None = None


@dataclass(frozen=True)
class ValidationReport:
    """Counts of one `validate` call, over the addresses it was given.

    Attributes:
        total, valid, quarantined: clips.
        read: clips decoded now; the others were known and unchanged.
        kinds: quarantined clips by kind of failure.
        seconds: total duration of the valid clips.
    """

    total: int
    valid: int
    quarantined: int
    read: int
    kinds: dict[str, int]
    seconds: float


class AudioIndex:
    """The index in memory; `index[address]` takes an `AudioAddress`, or text with a path relative to the index's folder."""

    def __init__(self, folder: str | Path, clips: Iterable[ClipInfo], reasons: dict[str, str]):
        self.folder = os.path.abspath(folder)
        self._clips = {self._key(clip.address): clip for clip in clips}
        self._reasons = {self._key(address): reason for address, reason in reasons.items()}

    @classmethod
    def load(cls, path: str | Path) -> "AudioIndex":
        """Read `index.jsonl` (or the folder that holds it) and the quarantine list beside it.

        Raises:
            FileNotFoundError: with the command that makes the index.
            ValueError: for a damaged line, naming file and line.
        """
        path = Path(path)
        path = path / INDEX_NAME if path.is_dir() else path
        if not path.exists():
            raise FileNotFoundError(f"{path}: no audio index; make it with `step-megatron data validate`")
        clips = [_clip_info(entry, path) for entry in _read_lines(path)]
        return cls(
            path.parent, clips, {entry["address"]: entry["reason"] for entry in _read_lines(path.parent / QUARANTINE_NAME)}
        )

    def __len__(self) -> int:
        return len(self._clips)

    def __iter__(self) -> Iterator[ClipInfo]:
        return iter(self._clips.values())

    def __contains__(self, address: str | AudioAddress) -> bool:
        return self._key(address) in self._clips

    def __getitem__(self, address: str | AudioAddress) -> ClipInfo:
        """Raises NotIndexed (a KeyError) that says whether the clip is quarantined (and why) or was never validated."""
        clip = self._clips.get(self._key(address))
        if clip is None:
            reason = self.reason(address)
            hint = (
                f"is quarantined ({reason})"
                if reason
                else "is not in the audio index; run `step-megatron data validate` over its data"
            )
            raise NotIndexed(f"{address} {hint}")
        return clip

    def reason(self, address: str | AudioAddress) -> str | None:
        """Why a clip is quarantined; None when it is not."""
        return self._reasons.get(self._key(address))

    def resolve(self, address: str | AudioAddress) -> AudioAddress:
        """The address with an absolute path, ready to read: a tar member by its place, while the tar is as it was."""
        place, clip = parse_address(str(address), self.folder), self._clips.get(self._key(address))
        if clip is None or clip.span is None or _stamp(place) != clip.stamp:
            return place
        return replace(place, offset=clip.span[0], size=clip.span[1])

    def check_durations(self, max_seconds: float) -> None:
        """Refuse an index with clips that decoding would refuse.

        Raises:
            ValueError: names the longest clip and `audio.max_clip_seconds`.
        """
        longest = max(self, key=lambda clip: clip.duration, default=None)
        if longest is not None and longest.duration > max_seconds:
            raise ValueError(
                f"audio.max_clip_seconds is {max_seconds:g}, and the index has {longest.address} of {longest.duration:.1f} s; "
                f"raise it, or run `step-megatron data validate --max-seconds {max_seconds:g}`"
            )

    def _key(self, address: str | AudioAddress) -> str:
        return os.path.normpath(os.path.join(self.folder, str(address)))


def validate(
    addresses: Iterable[str | AudioAddress],
    out_dir: str | Path,
    root: str | Path = ".",
    quarantine_limit: float = 0.01,
    max_seconds: float = 600.0,
    threads: int = 0,
) -> ValidationReport:
    """Decode every clip once, and write the index and the quarantine list. Interrupt it and run it again as you like.

    Quarantined are clips that are missing, unreadable (also by a name that is not UTF-8), empty, corrupt, truncated, silent (no
    sample of any channel reaches one step of 16-bit PCM), too short for one token (320 samples or fewer), or longer than
    `max_seconds`. Any rate, channel count or sample width is right.

    Args:
        addresses: clips, or shards (`s.tar`, `s-{000..127}.tar`), which stand for all their clips; a relative path is taken from
            `root`.
        out_dir: folder of `index.jsonl` and `quarantine.jsonl`; clips of earlier calls stay in them.
        quarantine_limit: share of `addresses` that may be unusable.
        threads: readers and decoders; 0 is every core.

    Raises:
        QuarantineLimitExceeded: after everything is written, when the share is above the limit.
        ValueError: for a malformed address.
        AudioError: for a shard that is no readable tar.
    """
    threads = threads or len(os.sched_getaffinity(0))
    out_dir = Path(os.path.abspath(out_dir))
    out_dir.mkdir(parents=True, exist_ok=True)
    named = [_relative(clip, out_dir) for address in addresses for clip in _clips_of(address, root)]
    wanted = {_escaped(address): None for address in named}
    clips, quarantined = _known(out_dir, wanted, max_seconds)
    quarantined |= {_escaped(address): _misnamed(address, out_dir) for address in named if address != _escaped(address)}
    missing = [address for address in wanted if address not in clips and address not in quarantined]
    # Written whole before anything is appended: an interrupted run may have left half a line.
    _replace(out_dir / INDEX_NAME, clips.values())
    _replace(out_dir / QUARANTINE_NAME, quarantined.values())
    front_end = LogMelFrontEnd(mels=80, threads=threads, max_seconds=max_seconds)
    with (
        open(out_dir / INDEX_NAME, "a", encoding="utf-8") as index,
        open(out_dir / QUARANTINE_NAME, "a", encoding="utf-8") as quarantine,
    ):
        for address, outcome in _examine(missing, out_dir, front_end, threads):
            known, file = (clips, index) if isinstance(outcome, ClipInfo) else (quarantined, quarantine)
            known[address] = asdict(outcome) if isinstance(outcome, ClipInfo) else outcome
            file.write(json.dumps(known[address], ensure_ascii=False) + "\n")
    _replace(out_dir / INDEX_NAME, clips.values())
    _replace(out_dir / QUARANTINE_NAME, quarantined.values())
    bad = [quarantined[address] for address in wanted if address in quarantined]
    report = ValidationReport(
        total=len(wanted),
        valid=len(wanted) - len(bad),
        quarantined=len(bad),
        read=len(missing),
        kinds=dict(Counter(entry["kind"] for entry in bad).most_common()),
        seconds=sum(clips[address]["duration"] for address in wanted if address in clips),
    )
    if len(bad) > quarantine_limit * len(wanted):
        raise QuarantineLimitExceeded(_limit_message(report, bad, quarantine_limit, out_dir))
    return report


def _clips_of(address: str | AudioAddress, root: str | Path) -> Iterable[AudioAddress]:
    """The clip of an address, or all clips of a shard."""
    place = parse_address(str(address), os.path.abspath(root))
    whole_shard = place.member is None and place.offset is None and place.path.endswith(".tar")
    return audio_members(place.path) if whole_shard else (place,)


def _relative(address: AudioAddress, out_dir: Path) -> str:
    """The address as the index writes it: relative to the index's folder for what lies under it, else absolute."""
    text = str(address)
    return os.path.relpath(text, out_dir) if text.startswith(str(out_dir) + os.sep) else text


def _escaped(address: str) -> str:
    """The address with what is not UTF-8 in a tar member's name written as `\\xff`; others are returned as they are."""
    return address.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _misnamed(address: str, out_dir: Path) -> dict:
    error = AudioError("unreadable", "the name is not UTF-8, so that no conversation can name the clip; repack the tar")
    return _quarantine_entry(_escaped(address), error, _stamp(parse_address(address, out_dir)))


def _known(out_dir: Path, wanted: dict[str, None], max_seconds: float) -> tuple[dict[str, dict], dict[str, dict]]:
    """Entries of earlier runs that still hold: of unchanged files, and of clips that this call does not ask about."""
    clips = {entry["address"]: entry for entry in _read_lines(out_dir / INDEX_NAME, torn_tail=True)}
    quarantined = {entry["address"]: entry for entry in _read_lines(out_dir / QUARANTINE_NAME, torn_tail=True)}
    for address in wanted:
        entry = clips.get(address) or quarantined.get(address)
        if (
            entry is None
            or _may_differ(entry, max_seconds)
            or _stamp(parse_address(address, out_dir)) != _as_pair(entry["stamp"])
        ):
            clips.pop(address, None)
            quarantined.pop(address, None)
    return clips, quarantined


def _may_differ(entry: dict, max_seconds: float) -> bool:
    """Whether a clip of an unchanged file must be looked at again: decoder, length limit or permissions may be others now."""
    if entry.get("decoder") != decoder_version() or entry.get("kind") in ("too-long", "unreadable"):
        return True
    return entry.get("duration", 0.0) > max_seconds


def _examine(
    addresses: list[str], out_dir: Path, front_end: LogMelFrontEnd, threads: int
) -> Iterator[tuple[str, ClipInfo | dict]]:
    """Decode clips batch by batch; the next batch is read and hashed while this one is decoded."""
    batches = [addresses[i : i + _BATCH] for i in range(0, len(addresses), _BATCH)]
    with ThreadPoolExecutor(threads) as readers, Progress(len(addresses), "validate", "clips") as progress:
        ahead = [readers.submit(_read_and_hash, parse_address(address, out_dir)) for address in (batches[0] if batches else [])]
        for number, batch in enumerate(batches):
            contents = [future.result() for future in ahead]
            following = batches[number + 1] if number + 1 < len(batches) else []
            ahead = [readers.submit(_read_and_hash, parse_address(address, out_dir)) for address in following]
            readable = [i for i, content in enumerate(contents) if not isinstance(content.data, AudioError)]
            decoded = front_end.decode([contents[i].data for i in readable], [parse_address(batch[i]).name for i in readable])
            outcomes: dict[int, DecodedClip | AudioError] = dict(zip(readable, decoded, strict=True))
            for i, address in enumerate(batch):
                yield address, _judge(address, outcomes.get(i, contents[i].data), contents[i])
            progress.update(len(batch))


@dataclass(frozen=True)
class _Content:
    """What is read of a clip: its bytes or why there are none, and the rest as `ClipInfo` has it."""

    data: bytes | AudioError
    sha256: str
    stamp: tuple[int, int] | None
    span: tuple[int, int] | None = None


def _read_and_hash(address: AudioAddress) -> _Content:
    stamp = _stamp(address)
    try:
        data = address.read()
        span = address.locate() if address.member is not None else None
    except AudioError as error:
        return _Content(error, "", stamp)
    return _Content(data, hashlib.sha256(data).hexdigest(), stamp, span)


def _judge(address: str, outcome: DecodedClip | AudioError, content: _Content) -> ClipInfo | dict:
    """The index entry of a good clip, or the quarantine entry of a bad one."""
    error = outcome if isinstance(outcome, AudioError) else _content_error(outcome.waveform)
    if error is not None:
        return _quarantine_entry(address, error, content.stamp)
    samples = len(outcome.waveform)
    return ClipInfo(
        address,
        content.sha256,
        samples,
        outcome.sample_rate,
        outcome.channels,
        samples / SAMPLE_RATE,
        outcome.format,
        content.stamp,
        decoder_version(),
        content.span,
    )


def _quarantine_entry(address: str, error: AudioError, stamp: tuple[int, int] | None) -> dict:
    return {"address": address, "kind": error.kind, "reason": str(error), "stamp": stamp, "decoder": decoder_version()}


def _content_error(waveform: np.ndarray) -> AudioError | None:
    """What is wrong with a waveform that decoded well."""
    if len(waveform) < MIN_CHUNK_SAMPLES:
        return AudioError("too-short", f"{len(waveform)} samples at 16 kHz; one token needs {MIN_CHUNK_SAMPLES}")
    if is_silent(waveform):
        return AudioError("silent", "digital silence")
    return None


def _stamp(address: AudioAddress) -> tuple[int, int] | None:
    try:
        return address.stamp()
    except AudioError:
        return None


def _as_pair(pair: list[int] | None) -> tuple[int, int] | None:
    return None if pair is None else (pair[0], pair[1])


def _clip_info(entry: dict, path: Path) -> ClipInfo:
    try:
        return ClipInfo(**entry | {"stamp": _as_pair(entry["stamp"]), "span": _as_pair(entry.get("span"))})
    except (TypeError, KeyError) as error:
        raise ValueError(f"{path}: an entry of another version ({error}); run `step-megatron data validate` again") from error


def _read_lines(path: Path, torn_tail: bool = False) -> list[dict]:
    """JSON lines of a file, none when it does not exist; `torn_tail` forgives a last line that an interrupted run cut."""
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    entries = []
    for number, line in enumerate(lines, 1):
        try:
            if line.strip():
                entries.append(json.loads(line.decode("utf-8")))
        except ValueError as error:
            last = number >= len(lines) - 1
            if torn_tail and last:
                break
            remedy = "run `step-megatron data validate` again" if last else "delete the file and validate again"
            raise ValueError(f"{path}, line {number}: not JSON ({error}); {remedy}") from error
    return entries


def _replace(path: Path, entries: Iterable[dict]) -> None:
    """Write a file whole, atomically: one line for each entry."""
    temporary = path.with_suffix(".tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(entry, ensure_ascii=False) + "\n" for entry in entries)
    os.replace(temporary, path)


def _limit_message(report: ValidationReport, bad: list[dict], limit: float, out_dir: Path) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in report.kinds.items())
    worst = [next(entry for entry in bad if entry["kind"] == kind) for kind in list(report.kinds)[:5]]
    share = f"{report.quarantined} of {report.total} clips ({report.quarantined / report.total:.1%}) are unusable"
    return "\n".join(
        [f"{share}, the limit is {limit:.1%} (data.quarantine_limit): {kinds}. For example:"]
        + [f"  {entry['address']}: {entry['reason']}" for entry in worst]
        + [f"All of them: {out_dir / QUARANTINE_NAME}"]
    )
