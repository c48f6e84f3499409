"""The frozen encoder as preprocessing: every clip is encoded once, by whichever rank has time, and used by all.

`prepare` fills the node's cache before training; `fetch` gives a step's clips to the ranks that need them, and encodes what no
cache holds: without a cache (`cache=None`, one pass over the data) that is everything. Either way clips are shared out by length,
longest first, each to the rank with the least to do. The features are rounded to bfloat16 when they are made, and that value is
what is stored, sent and trained on: cold, warm, with other companions or on other rank counts the bits are the same.

A clip that cannot be used (its file has gone, or has changed since it was indexed) fails by itself: all ranks learn of it inside
`fetch`, before any of them runs the model, so all of them leave it out together and none waits for another.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from step_kernels.packing import balance

from step_megatron.audio.address import AudioAddress
from step_megatron.audio.cache import EncodedCache, EncodedClip
from step_megatron.audio.errors import AudioError, QuarantineLimitExceeded
from step_megatron.audio.front_end import DecodedClip, LogMelFrontEnd, split_chunks
from step_megatron.audio.geometry import SAMPLE_RATE, chunk_frames, chunk_lengths
from step_megatron.audio.index import AudioIndex, ClipInfo
from step_megatron.config.schema import Config
from step_megatron.runtime.device import Runtime
from step_megatron.runtime.files import append_json_line
from step_megatron.runtime.progress import Progress, get_logger

# Samples that are decoded and encoded together: 5 minutes, 15 MB of log-mel.
_PACK_SAMPLES = 300 * SAMPLE_RATE
# Failures of the place or of the settings, not of the content: they are not kept in the cache, the clip may be right next time.
_PASSING = ("missing", "unreadable", "too-long")

# A clip as a later pipeline stage gets it: that stage has the micro-batch's lengths and reads nothing else of it.
_ELSEWHERE = EncodedClip(torch.zeros(0, 0, dtype=torch.bfloat16), ())

logger = get_logger(__name__)


class Encoder(Protocol):
    """What `AudioEncoder` offers to this module."""

    def fingerprint(self) -> str:
        """Hash of all that the bits of a feature depend on."""

    def encode(self, log_mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """`[mels, T_i]` each -> `[e_i, width]` each; a chunk's bits depend on the chunk alone."""


class Prepared(NamedTuple):
    """What `EncodedAudio.prepare` did on this node: clips that it encoded, and clips that failed while it did."""

    encoded: int
    failed: int


@dataclass(frozen=True)
class _Wants:
    """What one rank tells the others about its step: clips whose features it needs and has not, clips known to be unusable."""

    missing: tuple[str, ...]
    failed: dict[str, str]


class EncodedAudio:
    """Encoded clips for training; made by all ranks together (it creates process groups).

    Args:
        encoder: the frozen encoder, the same on every rank.
        front_end: decoder and features.
        index: lengths and hashes of all clips.
        cache: the node's cache, or None to encode inside every step.
        runtime: this rank's place.
        quarantine: file that a clip which fails is written to, with its reason.
        quarantine_limit: share of `clips` that may fail before a run stops.
        clips: how many clips the run uses; None for all of the index.

    Attributes:
        failures: clips that cannot be used, by address with the reason, as all ranks agreed so far.
        encoded_frames: attention positions (50 Hz) of every chunk that this rank encoded inside the latest `fetch`.
    """

    def __init__(
        self,
        encoder: Encoder,
        front_end: LogMelFrontEnd,
        index: AudioIndex,
        cache: EncodedCache | None,
        runtime: Runtime,
        quarantine: str | Path | None = None,
        quarantine_limit: float = 0.01,
        clips: int | None = None,
    ):
        self.encoder, self.front_end, self.index, self.cache, self.runtime = encoder, front_end, index, cache, runtime
        self.failures: dict[str, str] = {}
        self.encoded_frames: tuple[int, ...] = ()
        self._quarantine = Path(quarantine) if quarantine else None
        self._limit, self._clips = quarantine_limit, len(index) if clips is None else clips
        self._world, self._node = _host_groups(runtime)

    def prepare(
        self, addresses: Sequence[str | AudioAddress], progress: bool = True, stop: Callable[[], bool] = lambda: False
    ) -> Prepared:
        """Encode what the node's cache lacks, shared over the node's ranks; collective over all ranks.

        Args:
            addresses: clips that this node will use, the same list on each of its ranks.
            progress: print audio-seconds done, rate and time left on rank 0.
            stop: asked after every clip whether this rank is to leave the rest to `fetch`; what it has encoded is kept.

        Returns:
            How many clips were encoded and failed now; none without a cache (then `fetch` encodes).

        Raises:
            QuarantineLimitExceeded: on all ranks alike, when too many clips have failed, now or when the cache was filled.
        """
        if self.cache is None:
            return Prepared(0, 0)
        clips = {self.index[address].sha256: address for address in addresses}
        used = [self.index[address].num_samples for address in clips.values()]
        self.cache.expect(sum(chunk_frames(samples).encoder for length in used for samples in chunk_lengths(length)))
        todo = self._agreed_missing(sorted(clips))
        lengths = [self.index[clips[sha256]].num_samples for sha256 in todo]
        mine = balance(lengths, self.runtime.local_world_size)[self.runtime.local_rank]
        seconds = sum(lengths[i] for i in mine) / SAMPLE_RATE
        failed = {}
        # Silent ranks: `Progress` prints on rank 0 alone, whose share stands for the others'.
        with Progress(round(seconds, 1), "encode", "audio-seconds") if progress else _NoProgress() as bar:
            for address, clip in self._encode([clips[todo[i]] for i in mine]):
                info = self.index[address]
                self._store(info.sha256, clip)
                if clip.failure is not None:
                    failed[address] = clip.failure
                bar.update(info.num_samples / SAMPLE_RATE)
                if stop():
                    break
        self.cache.close()
        if self._node is not None:
            dist.barrier(self._node)
        self.cache.refresh()
        failed |= {str(clips[sha256]): reason for sha256 in clips if (reason := self.cache.failure(sha256)) is not None}
        failed = {address: reason for part in self._gather(failed) for address, reason in part.items()}
        now = sum(str(clips[sha256]) in failed for sha256 in todo)
        encoded = len(todo) - now - (sum(sha256 not in self.cache for sha256 in todo) if stop() else 0)
        if todo:
            logger.info("%d clips encoded, %d failed", encoded, now)
        self._count_failures(failed)
        return Prepared(encoded, now)

    def fetch(self, addresses: Sequence[str | AudioAddress]) -> dict[str, EncodedClip | None]:
        """Clips of this replica's next step; collective over all ranks, also over those whose step has no audio.

        Args:
            addresses: the clips of all micro-batches of this data-parallel replica's step, the same on all ranks of the replica.

        Returns:
            For each address (as text) the clip, on the host; with empty features on ranks outside the first pipeline stage.
            None for a clip that cannot be used, the same on every rank.

        Raises:
            QuarantineLimitExceeded: on all ranks alike, when too many clips have failed.
        """
        self.encoded_frames = ()
        wanted = list(dict.fromkeys(str(address) for address in addresses))
        clips = self._lookup(wanted) if self.runtime.is_first_stage else {}
        missing = tuple(address for address in wanted if address not in clips) if self.runtime.is_first_stage else ()
        failed = {address: clip.failure for address, clip in clips.items() if clip.failure is not None}
        wants: list[_Wants] = self._gather(_Wants(missing, failed))
        todo = sorted({address for each in wants for address in each.missing})
        failed = {address: reason for each in wants for address, reason in each.failed.items()}
        if todo:
            received, newly_failed = self._encode_together(todo, [each.missing for each in wants])
            clips |= received
            failed |= newly_failed
        self._count_failures(failed)
        return {address: None if address in failed else clips.get(address, _ELSEWHERE) for address in wanted}

    def recall(self, failures: dict[str, str]) -> None:
        """Take over the failures of a run that goes on, those that are still true; collective over all ranks."""
        self.failures |= failures
        clips = self.fetch(list(failures)) if failures else {}
        self.failures = {address: reason for address, reason in self.failures.items() if clips.get(address) is None}

    def _lookup(self, addresses: list[str]) -> dict[str, EncodedClip]:
        """What the node's cache holds of these clips, failures included."""
        if self.cache is None:
            return {}
        hashes = {address: self.index[address].sha256 for address in addresses}
        if any(sha256 not in self.cache for sha256 in hashes.values()):
            self.cache.refresh()
        found = {address: self.cache.get(sha256) for address, sha256 in hashes.items()}
        return {address: clip for address, clip in found.items() if clip is not None}

    def _encode_together(self, todo: list[str], wants: list[tuple[str, ...]]) -> tuple[dict[str, EncodedClip], dict[str, str]]:
        """Encode clips on all ranks and send each to the ranks that want it.

        Returns:
            The clips that this rank wants, and all failures with their reasons.
        """
        shares = balance([self.index[address].num_samples for address in todo], self.runtime.world_size)
        mine = dict(self._encode([todo[i] for i in shares[self.runtime.rank]]))
        good = [self.index[address].num_samples for address, clip in mine.items() if clip.failure is None]
        self.encoded_frames = tuple(chunk_frames(samples).conv for length in good for samples in chunk_lengths(length))
        # From rank -> address -> (frames of the chunks, width, failure), in one order on all ranks.
        made = self._gather(
            {address: (clip.chunk_frames, clip.features.shape[1], clip.failure) for address, clip in mine.items()}
        )
        failed = {address: failure for part in made for address, (_, _, failure) in part.items() if failure is not None}
        received = self._exchange(mine, made, [set(each) - failed.keys() for each in wants])
        if self.runtime.tp_rank == 0 and self.runtime.cp_rank == 0:
            for address, clip in received.items():
                self._store(self.index[address].sha256, clip)
        return received, failed

    def _exchange(self, mine: dict[str, EncodedClip], made: list[dict], wants: list[set[str]]) -> dict[str, EncodedClip]:
        """Send features from the ranks that made them to the ranks that want them, in one all-to-all."""
        rank = self.runtime.rank
        incoming = [[address for address in part if address in wants[rank]] for part in made]
        if self._world is None:
            return {address: mine[address] for address in incoming[0]}
        outgoing = [[clip.features.flatten() for address, clip in mine.items() if address in want] for want in wants]
        sizes = [[sum(made[source][a][0]) * made[source][a][1] for a in part] for source, part in enumerate(incoming)]
        empty = torch.zeros(0, dtype=torch.bfloat16)
        # Bytes: every backend moves them, and as they are.
        send = torch.cat([empty, *(part for parts in outgoing for part in parts)]).view(torch.uint8).to(self._transport)
        receive = torch.empty(2 * sum(map(sum, sizes)), dtype=torch.uint8, device=self._transport)
        received_bytes = [2 * sum(part) for part in sizes]
        dist.all_to_all_single(receive, send, received_bytes, [2 * sum(p.numel() for p in parts) for parts in outgoing])
        pieces = iter(receive.cpu().view(torch.bfloat16).split([size for part in sizes for size in part]))
        clips = {}
        for source, part in enumerate(incoming):
            for address in part:
                frames, width, _ = made[source][address]
                clips[address] = EncodedClip(next(pieces).view(sum(frames), width), frames)
        return clips

    @property
    def _transport(self) -> torch.device:
        return torch.device("cpu") if self.runtime.backend == "gloo" else self.runtime.device

    def _agreed_missing(self, hashes: list[str]) -> list[str]:
        """Which clips the node lacks, as its first rank sees it: another job may be filling the same cache right now."""
        self.cache.refresh()
        absent = torch.tensor([sha256 not in self.cache for sha256 in hashes], dtype=torch.uint8)
        if self._node is not None and hashes:
            dist.broadcast(absent, self.runtime.rank - self.runtime.local_rank, self._node)
        return [sha256 for sha256, flag in zip(hashes, absent.tolist(), strict=True) if flag]

    def _store(self, sha256: str, clip: EncodedClip) -> None:
        if self.cache is not None and not (clip.failure or "").startswith(_PASSING):
            self.cache.put(sha256, clip)

    def _encode(self, addresses: Sequence[str | AudioAddress]) -> Iterator[tuple[str, EncodedClip]]:
        """Read, decode and encode clips in packs of bounded length; a clip that fails comes with its failure."""
        pack: list[tuple[str, ClipInfo]] = []
        for address in addresses:
            info = self.index[address]
            if pack and sum(other.num_samples for _, other in pack) + info.num_samples > _PACK_SAMPLES:
                yield from self._encode_pack(pack)
                pack = []
            pack.append((str(address), info))
        if pack:
            yield from self._encode_pack(pack)

    def _encode_pack(self, pack: list[tuple[str, ClipInfo]]) -> Iterator[tuple[str, EncodedClip]]:
        chunks, counts = [], []
        outcomes = self._decode(pack)
        for outcome in outcomes:
            parts = split_chunks(outcome.waveform) if isinstance(outcome, DecodedClip) else []
            chunks += parts
            counts.append(len(parts))
        encoded = iter(self.encoder.encode(self.front_end.log_mel(chunks)) if chunks else ())
        for (address, info), outcome, count in zip(pack, outcomes, counts, strict=True):
            if isinstance(outcome, AudioError):
                self._write_quarantine(address, info, outcome)
                yield address, EncodedClip(torch.zeros(0, 0, dtype=torch.bfloat16), (), str(outcome))
                continue
            features = [next(encoded).to(torch.bfloat16).cpu() for _ in range(count)]
            yield address, EncodedClip(torch.cat(features), tuple(len(part) for part in features))

    def _decode(self, pack: list[tuple[str, ClipInfo]]) -> list[DecodedClip | AudioError]:
        """Decode clips, holding them against what the index promised."""
        outcomes: list[DecodedClip | AudioError | None] = []
        data, names = [], []
        for address, info in pack:
            try:
                place = self.index.resolve(address)
                content = place.read()
                if hashlib.sha256(content).hexdigest() != info.sha256:
                    raise AudioError("unreadable", "the content has changed since `step-megatron data validate`; run it again")
                data.append(content)
                names.append(place.name)
                outcomes.append(None)
            except AudioError as error:
                outcomes.append(error)
        decoded = iter(self.front_end.decode(data, names))
        outcomes = [next(decoded) if outcome is None else outcome for outcome in outcomes]
        return [_as_promised(outcome, info) for outcome, (_, info) in zip(outcomes, pack, strict=True)]

    def _write_quarantine(self, address: str, info: ClipInfo, error: AudioError) -> None:
        if address in self.failures:
            # Tried again, for it may have come back; said once.
            return
        logger.warning("clip %s cannot be used, its samples are left out: %s", address, error)
        if self._quarantine is None:
            return
        entry = {"address": info.address, "kind": error.kind, "reason": str(error), "rank": self.runtime.rank}
        append_json_line(self._quarantine, entry)

    def _count_failures(self, failed: dict[str, str]) -> None:
        """Keep the agreed failures of the run; too many stop it, on all ranks alike."""
        self.failures |= failed
        if failed and len(self.failures) > self._limit * self._clips:
            last = [f"  {address}: {reason}" for address, reason in list(self.failures.items())[-5:]]
            raise QuarantineLimitExceeded(
                f"{len(self.failures)} of {self._clips} clips cannot be used, data.quarantine_limit allows {self._limit:.1%}: "
                "see whether the audio is where `step-megatron data validate` found it, repair what quarantine.jsonl names, or "
                "raise the limit. The last ones:\n" + "\n".join(last)
            )

    def _gather(self, value):
        """`value` of every rank, in rank order."""
        if self._world is None:
            return [value]
        values = [None] * self.runtime.world_size
        dist.all_gather_object(values, value, self._world)
        return values


class _NoProgress:
    def __enter__(self) -> "_NoProgress":
        return self

    def __exit__(self, *exception: object) -> None:
        pass

    def update(self, amount: float) -> None:
        pass


def _host_groups(runtime: Runtime) -> tuple[dist.ProcessGroup | None, dist.ProcessGroup | None]:
    """Gloo groups of all ranks and of this node's ranks, for host values; None where a rank is alone."""
    if runtime.world_size == 1:
        return None, None
    world = dist.group.WORLD if runtime.backend == "gloo" else dist.new_group(backend="gloo", timeout=runtime.timeout)
    size = runtime.local_world_size
    # Every rank has to take part in the making of every group.
    nodes = [
        dist.new_group(list(range(first, first + size)), backend="gloo", timeout=runtime.timeout)
        for first in range(0, runtime.world_size, size)
    ]
    return world, nodes[runtime.rank // size] if size > 1 else None


def _as_promised(outcome: DecodedClip | AudioError, info: ClipInfo) -> DecodedClip | AudioError:
    """The outcome, or an error where the clip is not as long as the plan's token count assumes."""
    if isinstance(outcome, DecodedClip) and len(outcome.waveform) != info.num_samples:
        return AudioError(
            "unreadable", f"{len(outcome.waveform)} samples at 16 kHz, the index promised {info.num_samples}; validate again"
        )
    return outcome


def open_encoded_audio(
    config: Config, encoder: Encoder, index: AudioIndex, runtime: Runtime, passes: float, clips: int | None = None
) -> EncodedAudio:
    """`EncodedAudio` as the configuration has it; collective over all ranks.

    Args:
        passes: how often the run will see its data; `audio.cache: auto` keeps features on disk for more than one.
        clips: how many clips the run uses, of which `data.quarantine_limit` is a share; None for all of the index.
    """
    index.check_durations(config.audio.max_clip_seconds)
    front_end = LogMelFrontEnd(config.encoder.mels, runtime.device, runtime.threads, config.audio.max_clip_seconds)
    cache = None
    if config.audio.cache == "on" or (config.audio.cache == "auto" and passes > 1):
        fingerprint = hashlib.sha256(f"{encoder.fingerprint()} {front_end.fingerprint()}".encode()).hexdigest()[:32]
        folder = config.audio.cache_dir or Path(index.folder) / "encoded-audio"
        cache = EncodedCache(folder, fingerprint, int(config.audio.cache_max_gib * 2**30))
    quarantine = Path(config.run.dir) / "quarantine.jsonl"
    return EncodedAudio(encoder, front_end, index, cache, runtime, quarantine, config.data.quarantine_limit, clips)
