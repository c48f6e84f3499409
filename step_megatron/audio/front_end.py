"""Decoding by DALI and log-mel features by DALI or torch, on the CPU or the GPU, fed by our own sampler.

    encoded bytes --decode--> one channel, 16 kHz, float32 --log_mel--> [mels, frames]

Decoding. wav (every PCM width, float, mu-law), flac, ogg vorbis and opus go through DALI; raw g722 and whatever DALI lacks (mp3,
aiff, m4a, ...) are read by soundfile or PyAV and resampled by DALI. **The first channel is taken**, not the mean: that is what
the released model was trained on, and a mean would cancel channels in opposite phase. Where the first is digital silence and
another is not (recordings with sound on the right only), the first that is not silent is taken. Wrong rates are resampled,
formats scaled to [-1, 1].

Log-mel. Whisper's maths: 479 zeros on the right, STFT (400, hop 160, periodic Hann, reflected edges), last frame dropped, slaney
mel filters, log10 clamped at 1e-10, floored at the maximum - 8, (x + 4) / 4. The right padding makes the two tail frames that the
convolutions need (`geometry.TAIL_FRAMES`). It equals padding to 30 s, cut after `mel + 2` frames: every later frame is digital
silence, and cannot raise the maximum. The maximum is taken per chunk, because the released code cuts before it transforms. Edge
cases follow from that:

- one sample: the left edge reflects into the right padding, as it does in a clip padded to 30 s; three frames;
- digital silence: the maximum is the clamp itself, so every value is (-10 + 4) / 4 = -1.5 (`validate` quarantines such clips).

One bad clip stops a whole DALI batch and kills its pipeline. So headers are checked first, and a batch that fails is split until
the bad clips are alone.
Source: Step-Audio-R1 `utils.py`; transformers' `WhisperFeatureExtractor`.
"""

import functools
import importlib.metadata
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from step_megatron.audio.dali_graphs import build_pipeline
from step_megatron.audio.errors import AudioError
from step_megatron.audio.geometry import SAMPLE_RATE, chunk_frames, chunk_lengths
from step_megatron.audio.headers import AudioHeader, read_header
from step_megatron.audio.log_mel import log_mel

# Raised when decoding or features change in a way that changes bits, so that older indices and caches are not used.
_REVISION = 1
# Right padding of the released code: it makes the two tail frames.
RIGHT_PADDING = 479
# One DALI batch: enough clips to keep the threads busy, little enough memory (a 25 s chunk needs 2 MB of spectrogram).
_BATCH_CLIPS = 64
_BATCH_BYTES = 256 << 20
_DALI_FORMATS = ("wav", "flac", "ogg")


@dataclass(frozen=True)
class DecodedClip:
    """A decoded clip.

    Attributes:
        waveform: `[num_samples]` float32, the first channel that is not silent, 16 kHz.
        sample_rate: Hz, of the source.
        channels: of the source.
        format: of the source, as `AudioHeader.format`.
    """

    waveform: np.ndarray
    sample_rate: int
    channels: int
    format: str

    @property
    def seconds(self) -> float:
        """Duration."""
        return len(self.waveform) / SAMPLE_RATE


def split_chunks(waveform: np.ndarray) -> list[np.ndarray]:
    """Cut a waveform into the chunks of `geometry.chunk_lengths`, without copying."""
    starts = np.cumsum([0, *chunk_lengths(len(waveform))])
    return [waveform[start:end] for start, end in zip(starts[:-1], starts[1:], strict=True)]


@functools.cache
def decoder_version() -> str:
    """What the samples of a decoded clip depend on beside its bytes: this file's revision, and the decoders' versions."""
    import soundfile

    dali, av = importlib.metadata.version("nvidia-dali-cuda130"), importlib.metadata.version("av")
    libsndfile = f"{soundfile.__version__}-{soundfile.__libsndfile_version__}"
    return f"front-end-{_REVISION}-dali-{dali}-soundfile-{libsndfile}-av-{av}"


class LogMelFrontEnd:
    """Decoder and feature extractor; one per process, not for several threads at once.

    Args:
        mels: mel bands (80 for Whisper, 128 for the Step-Audio encoder).
        device: where features are made and stay; decoding is always on the CPU.
        threads: DALI's CPU threads.
        max_seconds: longer clips fail with `too-long` before they are decoded, where the header tells the length.
        backend: what makes features: `auto` is DALI on a GPU, and on a CPU torch, whose FFT is faster there (see `log_mel.py`).
    """

    def __init__(
        self,
        mels: int,
        device: torch.device | str = "cpu",
        threads: int = 1,
        max_seconds: float = 600.0,
        backend: Literal["auto", "torch", "dali"] = "auto",
    ):
        self.mels, self.device, self.threads, self.max_seconds = mels, torch.device(device), threads, max_seconds
        self.backend = ("dali" if self.device.type == "cuda" else "torch") if backend == "auto" else backend
        self._pipelines: dict[str, object] = {}

    def decode(self, data: Sequence[bytes], names: Sequence[str] | None = None) -> list[DecodedClip | AudioError]:
        """Decode encoded clips; a clip that cannot be decoded gives its error in its place and disturbs no other.

        Args:
            data: encoded clips.
            names: their file names; only the extension counts, and only for formats without a header (g722).
        """
        headers = [_attempt(read_header, clip, names[i] if names else "") for i, clip in enumerate(data)]
        clips: list[DecodedClip | AudioError] = [_attempt(self._check_length, header) for header in headers]
        by_dali = [i for i, header in enumerate(clips) if isinstance(header, AudioHeader) and header.format in _DALI_FORMATS]
        for batch in _batches(by_dali, [_decoded_bytes(data[i], headers[i]) for i in by_dali]):
            encoded = [(np.frombuffer(data[i], np.uint8), headers[i]) for i in batch]
            for i, clip in zip(batch, _isolating(self._decode_batch, encoded), strict=True):
                clips[i] = clip
        others = [i for i, header in enumerate(clips) if isinstance(header, AudioHeader)]
        with ThreadPoolExecutor(self.threads) as threads:
            decoded = list(threads.map(lambda i: _attempt(_decode_elsewhere, data[i], headers[i], self.max_seconds), others))
        for i, clip in zip(others, decoded, strict=True):
            clips[i] = clip
        clips = [_attempt(_checked, clip, header) for clip, header in zip(clips, headers, strict=True)]
        return [_attempt(self._check_length, clip) for clip in self._resample(clips)]

    def log_mel(self, waveforms: Sequence[np.ndarray]) -> list[torch.Tensor]:
        """Log-mel features of chunks.

        Args:
            waveforms: chunks of 1 to 400,000 samples, float32 at 16 kHz (`split_chunks`).

        Returns:
            For each `[mels, ceil(samples / 160) + 2]` float32 on the device: the last two frames are the padding's.

        Raises:
            ValueError: for an empty chunk or one of more than 25 s.
        """
        if any(chunk_frames(len(waveform)).mel == 0 for waveform in waveforms):
            raise ValueError("an empty chunk has no features")
        if self.backend == "torch":
            return [log_mel(waveform, self.mels).to(self.device) for waveform in waveforms]
        features: list[torch.Tensor] = []
        for batch in _batches(range(len(waveforms)), [4 * len(waveform) for waveform in waveforms]):
            padded = [np.pad(waveforms[i].astype(np.float32, copy=False), (0, RIGHT_PADDING)) for i in batch]
            (outputs,) = self._run("log_mel", wave=padded)
            features += [torch.from_dlpack(outputs[i]).clone() for i in range(len(batch))]
            if self.device.type == "cuda":
                # The pipeline's next run writes where the copies still read from.
                torch.cuda.current_stream(self.device).synchronize()
        return features

    def fingerprint(self) -> str:
        """What the bits of the features depend on beside the clip."""
        return f"{decoder_version()}-{self.mels}-{self.device.type}-{self.backend}"

    def _check_length(self, clip: AudioHeader | DecodedClip) -> AudioHeader | DecodedClip:
        if clip.seconds is not None and clip.seconds > self.max_seconds:
            raise AudioError("too-long", f"{clip.seconds:.1f} s; the limit is {self.max_seconds:g} s")
        return clip

    def _decode_batch(self, batch: list[tuple[np.ndarray, AudioHeader]]) -> list[DecodedClip]:
        """Decode clips by DALI, at their own rates."""
        waves, rates = self._run("decode", encoded=[data for data, _ in batch])
        return [_one_channel(np.asarray(waves[i]), int(np.asarray(rates[i])), header) for i, (_, header) in enumerate(batch)]

    def _resample(self, clips: list[DecodedClip | AudioError]) -> list[DecodedClip | AudioError]:
        """Bring clips of other rates, still at their own, to 16 kHz."""
        wrong = [i for i, clip in enumerate(clips) if isinstance(clip, DecodedClip) and clip.sample_rate != SAMPLE_RATE]
        for batch in _batches(wrong, [clips[i].waveform.nbytes for i in wrong]):
            for i, clip in zip(batch, _isolating(self._resample_batch, [clips[i] for i in batch]), strict=True):
                clips[i] = clip
        return clips

    def _resample_batch(self, batch: list[DecodedClip]) -> list[DecodedClip]:
        rates = [np.array(clip.sample_rate, np.float32) for clip in batch]
        (waves,) = self._run("resample", wave=[clip.waveform for clip in batch], rate=rates)
        return [replace(clip, waveform=np.array(waves[i])) for i, clip in enumerate(batch)]

    def _run(self, kind: str, **inputs: list[np.ndarray]) -> tuple:
        """Feed one batch to a pipeline and return its outputs; a pipeline that failed is dropped, DALI cannot use it again."""
        pipeline = self._pipelines.get(kind)
        if pipeline is None:
            pipeline = self._pipelines[kind] = build_pipeline(kind, _BATCH_CLIPS, self.mels, self.device, self.threads)
        try:
            for name, batch in inputs.items():
                pipeline.feed_input(name, batch)
            return pipeline.run()
        except RuntimeError:
            del self._pipelines[kind]
            raise


def _batches(clips: Sequence[int], sizes: Sequence[int]) -> list[list[int]]:
    """Group clips, in order, into DALI batches bounded in number and bytes."""
    batches: list[list[int]] = []
    room = 0
    for clip, size in zip(clips, sizes, strict=True):
        if not batches or len(batches[-1]) == _BATCH_CLIPS or size > room:
            batches.append([])
            room = _BATCH_BYTES
        batches[-1].append(clip)
        room -= size
    return batches


def _isolating(function: Callable[[list], list[DecodedClip]], batch: list) -> list[DecodedClip | AudioError]:
    """The outcomes of a batch by DALI; when it fails, the batch is halved until every bad clip is alone."""
    try:
        return list(function(batch))
    except RuntimeError as error:
        if len(batch) == 1:
            return [AudioError("corrupt", _dali_reason(error))]
        half = len(batch) // 2
        return _isolating(function, batch[:half]) + _isolating(function, batch[half:])


def _attempt(function: Callable, clip: object, *arguments: object):
    """`function(clip, ...)`, or the error that it raises or was given."""
    try:
        return clip if isinstance(clip, AudioError) else function(clip, *arguments)
    except AudioError as error:
        return error


def is_silent(samples: np.ndarray) -> bool:
    """Digital silence: no sample reaches one step of 16-bit PCM. A decoder's rounding may leave less, a microphone never does."""
    return not len(samples) or max(samples.max(), -samples.min()) < 1.0 / 32768


def _one_channel(samples: np.ndarray, rate: int, header: AudioHeader) -> DecodedClip:
    """A clip from `[frames, channels]`, still at its own rate: the first channel that is not silent, else the first."""
    channels = samples.shape[1]
    heard = next((c for c in range(channels) if not is_silent(samples[:, c])), 0) if channels > 1 else 0
    return DecodedClip(np.array(samples[:, heard]), rate, channels, header.format)


def _checked(clip: DecodedClip, header: AudioHeader) -> DecodedClip:
    """Hold a decoded clip, still at its own rate, against its header."""
    frames = len(clip.waveform)
    if header.frames is not None and frames < header.frames:
        raise AudioError("truncated", f"the {header.format} header promises {header.frames} samples, {frames} could be decoded")
    if not frames:
        raise AudioError("empty", f"a {header.format} clip without samples")
    if not np.isfinite(clip.waveform).all():
        raise AudioError("corrupt", "samples that are not finite numbers")
    return clip


def _decoded_bytes(data: bytes, header: AudioHeader) -> int:
    """Memory that decoding takes; a clip whose header tells no length is taken to be compressed 16 times."""
    return 4 * header.frames * (header.channels or 1) if header.frames else 16 * len(data)


def _decode_elsewhere(data: bytes, header: AudioHeader, max_seconds: float) -> DecodedClip:
    by_av = header.format == "g722" or header.frames is None
    return _decode_by_av(data, header, max_seconds) if by_av else _decode_by_soundfile(data, header)


def _decode_by_soundfile(data: bytes, header: AudioHeader) -> DecodedClip:
    import soundfile

    try:
        samples, rate = soundfile.read(io.BytesIO(data), dtype="float32", always_2d=True)
    except RuntimeError as error:
        raise AudioError("corrupt", str(error)) from error
    return _one_channel(samples, rate, header)


def _decode_by_av(data: bytes, header: AudioHeader, max_seconds: float) -> DecodedClip:
    """Decode raw g722, and containers that only FFmpeg reads."""
    import av

    parts: list[np.ndarray] = []
    try:
        with av.open(io.BytesIO(data), format="g722" if header.format == "g722" else None) as container:
            if not container.streams.audio:
                raise AudioError("corrupt", "no audio stream")
            stream = container.streams.audio[0]
            if stream.codec_context is None:
                raise AudioError("corrupt", "unknown codec: FFmpeg has no decoder for it")
            if not (stream.rate and stream.channels):
                raise AudioError("corrupt", f"an audio stream with {stream.channels} channels at {stream.rate} Hz")
            to_float = av.AudioResampler(format="fltp")
            left = max_seconds * stream.rate
            for frame in container.decode(stream):
                parts += [part.to_ndarray() for part in to_float.resample(frame)]
                left -= frame.samples
                if left < 0:
                    raise AudioError("too-long", f"more than {max_seconds:g} s")
            channels, rate = stream.channels, stream.rate
        samples = np.concatenate([np.zeros((channels, 0), np.float32), *parts], axis=1)
    except (av.FFmpegError, ValueError) as error:
        raise AudioError("corrupt", f"not audio that DALI, soundfile or FFmpeg can read ({error})") from error
    return _one_channel(samples.T, rate, header)


def _dali_reason(error: RuntimeError) -> str:
    """The sentence of a DALI error that says what is wrong with the clip."""
    lines = [
        line.strip() for line in str(error).splitlines() if "Error decoding" in line or "Failed to" in line or "Assert on" in line
    ]
    return lines[0][:300] if lines else str(error).splitlines()[0][:300]
