"""Clips a second through the audio encoder: packed, beside transformers' `Qwen2AudioEncoder` with the same weights.

The peer runs twice: as its processor feeds it (every clip padded to 30 s), and at its best (sorted by length, in batches cropped
to their longest clip, masked; its code refuses that, so its position table is cut to the batch). Ours runs once more with every
op of `step_kernels` in plain torch, which says what the kernels are worth. Clips are real recordings where the data are there,
else synthetic features of the same lengths; the weights are whisper-base where they are there. Runs alternate between all, so
that what else the machine does hits them alike; a ratio is formed within each round.
"""

import random
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from step_kernels.bench.contestants import by
from torch import nn

from step_megatron.audio.front_end import DecodedClip, LogMelFrontEnd, split_chunks
from step_megatron.benchmarks.spread import spread
from step_megatron.config.schema import EncoderConfig
from step_megatron.data.recipes import asterisk
from step_megatron.model.encoder import AudioEncoder, build_encoder
from step_megatron.model.whisper import from_huggingface
from step_megatron.runtime.flops import encoder_work

_CLIPS = 128
_BATCH = 8
_PADDED_FRAMES = 3000
# The padded peer takes the same time for every clip, so it gets every eighth one.
_PADDED_STRIDE = 8


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `data` (folder of downloads), `repeats` (rounds), `clips` (sample size, None for 128).

    Returns:
        `{"name", "ratio", "low", "high", "limit", ...}`: clips a second over the padded peer's (median, lowest and highest round;
        `limit` is the ratio of counted FLOPs), the same over the cropped peer and over ours in plain torch (`ratio_torch`), and
        audio-seconds a second of all.

    Raises:
        RuntimeError: if another contestant's features are not ours (then the comparison is worth nothing).
    """
    log_mels, source = _log_mels(Path(options.data), options.clips or _CLIPS)
    encoder = _encoder(Path(options.data))
    peer = Peer(encoder)
    # Also warms every contestant up.
    plain = by("torch", encoder.encode)
    difference = max(_largest_difference(encoder, work, log_mels) for work in (peer.padded, peer.cropped, plain))
    subset = log_mels[::_PADDED_STRIDE]
    contestants: dict[str, tuple[Callable, Sequence[torch.Tensor]]] = {
        "ours": (encoder.encode, log_mels),
        "plain torch ops": (plain, log_mels),
        "padded": (peer.padded, subset),
        "cropped": (peer.cropped, log_mels),
    }
    rounds = [{name: _clips_per_second(*each) for name, each in contestants.items()} for _ in range(options.repeats)]
    positions = [(log_mel.shape[1] - 1) // 2 for log_mel in log_mels]
    limit = encoder_work(encoder.config, [1500] * len(positions)).forward / encoder_work(encoder.config, positions).forward
    seconds = sum(positions) / 50 / len(positions)
    over_padded, over_cropped, over_torch = (
        [each["ours"] / each[name] for each in rounds] for name in ("padded", "cropped", "plain torch ops")
    )
    print(
        f"{len(log_mels)} {source} clips of {seconds:.2f} s on average, {torch.get_num_threads()} threads, weights: "
        f"{Path(encoder.config.weights).name}; audio-seconds a second, median of {len(rounds)} (lowest-highest)"
    )
    for name in contestants:
        print(f"  {name:15} {spread([each[name] * seconds for each in rounds])}")
    print(f"  ours / padded  {spread(over_padded)}, ratio of counted FLOPs {limit:.1f}")
    print(f"  ours / cropped {spread(over_cropped)}; largest difference of a feature {difference:.1e}")
    print(f"  ours / plain torch ops {spread(over_torch)}: by so much the kernels make the whole encoder faster")
    return {
        "name": "encoder",
        "ratio": statistics.median(over_padded),
        "low": min(over_padded),
        "high": max(over_padded),
        "limit": limit,
        "ratio_cropped": statistics.median(over_cropped),
        "low_cropped": min(over_cropped),
        "high_cropped": max(over_cropped),
        "ratio_torch": statistics.median(over_torch),
        "low_torch": min(over_torch),
        "high_torch": max(over_torch),
        "audio_seconds_per_second": {name: statistics.median(each[name] for each in rounds) * seconds for name in contestants},
        "clips": len(log_mels),
        "audio_seconds": seconds * len(log_mels),
        "threads": torch.get_num_threads(),
        "source": source,
        "weights": encoder.config.weights,
        "largest_difference": difference,
    }


class Peer:
    """transformers' `Qwen2AudioEncoder` with the weights of `ours`."""

    def __init__(self, ours: AudioEncoder):
        from transformers import Qwen2AudioEncoderConfig
        from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

        config = ours.config
        self.encoder = Qwen2AudioEncoder(
            Qwen2AudioEncoderConfig(
                num_mel_bins=config.mels,
                d_model=config.width,
                encoder_layers=config.layers,
                encoder_attention_heads=config.heads,
                encoder_ffn_dim=config.ffn_width,
                attn_implementation="sdpa",
            )
        ).eval()
        weights = ours.state_dict()
        names = {name: next(iter(from_huggingface({name: tensor}))) for name, tensor in self.encoder.state_dict().items()}
        self.encoder.load_state_dict({theirs: weights[released] for theirs, released in names.items()})
        self.positions = self.encoder.embed_positions.weight.detach()

    def padded(self, log_mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Batches in the order given, every clip padded to 30 s."""
        return [feature for batch in _batches(log_mels) for feature in self._encode(batch, _PADDED_FRAMES)]

    def cropped(self, log_mels: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Batches of like lengths, padded to the longest clip of each."""
        order = sorted(range(len(log_mels)), key=lambda index: log_mels[index].shape[1])
        features = []
        for batch in _batches([log_mels[index] for index in order]):
            longest = batch[-1].shape[1]
            features += self._encode(batch, longest + longest % 2)
        return [feature for _, feature in sorted(zip(order, features, strict=True), key=lambda pair: pair[0])]

    @torch.no_grad()
    def _encode(self, log_mels: Sequence[torch.Tensor], frames: int) -> list[torch.Tensor]:
        # Whisper's silence is the clip's floor, which is its smallest value.
        padded = [nn.functional.pad(x, (0, frames - x.shape[1]), value=float(x.min())) for x in log_mels]
        self.encoder.config.max_source_positions = frames // 2
        self.encoder.embed_positions = nn.Embedding.from_pretrained(self.positions[: frames // 2])
        valid, features = self.encoder._get_feat_extract_output_lengths(torch.tensor([x.shape[1] - 2 for x in log_mels]))
        mask = torch.arange(frames // 2) >= valid[:, None, None, None]
        mask = torch.zeros(len(log_mels), 1, frames // 2, frames // 2).masked_fill_(mask, float("-inf"))
        hidden = self.encoder(torch.stack(padded), attention_mask=mask).last_hidden_state
        return [each[:count] for each, count in zip(hidden, features.tolist(), strict=True)]


def _largest_difference(encoder: AudioEncoder, work: Callable, log_mels: Sequence[torch.Tensor]) -> float:
    """Between our features and the peer's of the first batch; the weights are half precision's, the sums are long."""
    clips = log_mels[:_BATCH]
    pairs = list(zip(encoder.encode(clips), work(clips), strict=True))
    difference = max(float((ours - theirs).abs().max()) for ours, theirs in pairs)
    largest = max(float(ours.abs().max()) for ours, _ in pairs)
    if difference > 1e-3 * largest:
        raise RuntimeError(f"a contestant computes something else: features of up to {largest:.2f} differ by {difference:.1e}")
    return difference


def _encoder(data: Path) -> AudioEncoder:
    """whisper-base's shape, with its weights where they have been fetched."""
    weights = data / "whisper-base"
    held = str(weights) if (weights / "model.bin").is_file() else "random"
    return build_encoder(EncoderConfig(mels=80, width=512, layers=6, heads=8, ffn_width=2048, weights=held))


def _log_mels(data: Path, count: int) -> tuple[list[torch.Tensor], str]:
    """Features of `count` of the Asterisk prompts that have a text, or random ones of about their lengths (mean 2.75 s)."""
    files = [clip.file for clip in asterisk.clips(data, seed=0)]
    if not files:
        generator = torch.Generator().manual_seed(0)
        seconds = (0.75 + 0.7 * torch.randn(count, generator=generator)).exp().clamp(0.3, 25.0)
        return [torch.randn(80, int(100 * each) + 2, generator=generator) for each in seconds.tolist()], "synthetic"
    chosen = random.Random(0).sample(files, min(count, len(files)))
    front_end = LogMelFrontEnd(80)
    decoded = front_end.decode([file.read_bytes() for file in chosen], [file.name for file in chosen])
    chunks = [chunk for clip in decoded if isinstance(clip, DecodedClip) for chunk in split_chunks(clip.waveform)]
    return front_end.log_mel(chunks), "Asterisk"


def _batches(items: Sequence[torch.Tensor]) -> list[Sequence[torch.Tensor]]:
    return [items[start : start + _BATCH] for start in range(0, len(items), _BATCH)]


def _clips_per_second(work: Callable, clips: Sequence[torch.Tensor]) -> float:
    start = time.perf_counter()
    work(clips)
    return len(clips) / (time.perf_counter() - start)
