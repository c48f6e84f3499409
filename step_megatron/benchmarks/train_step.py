"""Samples a second of a training step: encoder, adaptor, decoder, backward and update, beside transformers' Qwen2-Audio.

Both have a frozen encoder of whisper-base's shape and the decoder of the preset `tiny`, the same weights in float32, the same
clips (as log-mel features), questions and replies, and make one AdamW update a pass over the samples. Contestants:

    ours         packed, as it trains: the `step` adaptor, 12.5 audio tokens a second, nothing cached
    equal tokens the same with Qwen2-Audio's projector, 25 audio tokens a second as the peer has; its loss must be the peer's
    cached       ours with the clips' features at hand, as in a second epoch
    plain torch  ours with every op of `step_kernels` in plain torch, which says what the kernels are worth; cached likewise
    padded       the peer as its processor feeds it: clips padded to 30 s, texts to the longest of the batch
    cropped      the peer at its best: sorted by length, clips padded to the longest of the batch (its encoder refuses that, so
                 its position table is cut to the batch)

Passes alternate between the contestants, so that what else the machine does hits all alike; a ratio is formed within each round.
"""

import dataclasses
import statistics
import time
from argparse import Namespace
from collections.abc import Callable, Sequence

import numpy as np
import torch
from step_kernels.bench.contestants import by
from step_kernels.packing import first_fit_decreasing

from step_megatron.audio.cache import EncodedClip
from step_megatron.audio.geometry import HOP_SAMPLES, chunk_frames
from step_megatron.benchmarks.spread import spread
from step_megatron.benchmarks.train_step_peer import PADDED_FRAMES, Peer, Sample
from step_megatron.config import load_config
from step_megatron.config.schema import Config
from step_megatron.data.aspects import LossGroup
from step_megatron.data.micro_batch import MicroBatch, Padding, assemble
from step_megatron.data.template import AudioSpan, TokenizedSample
from step_megatron.model.encoder import AudioEncoder, build_encoder
from step_megatron.runtime.device import Runtime, initialize, shutdown
from step_megatron.runtime.flops import DecoderShape, adaptor_work, decoder_work, encoder_work
from step_megatron.training.batch import TrainingBatch, to_device
from step_megatron.training.loop import run_schedule, supervised_loss
from step_megatron.training.state import build_state

_SAMPLES = 64
_TOKENS = 2048
_AUDIO_ID = 1
_GROUP = LossGroup("clips")
# The padded peer takes about the same time for every sample, so it gets every fourth one.
_PADDED_STRIDE = 4
OVERRIDES = (
    "run={device: cpu, seed: 1}",
    "model.preset=tiny",
    "encoder.weights=random",
    "training={steps: 1000000, lr_schedule: constant}",
    "megatron.optimizer={lr: 1e-4, min_lr: 1e-4, clip_grad: 1.0, weight_decay: 0.01}",
)


def run(options: Namespace) -> dict:
    """Measure, print a table, and return the figures.

    Args:
        options: `repeats` (rounds), `clips` (samples, None for 64); `data` is not read, lengths are like the Asterisk prompts'.

    Returns:
        `{"name", "ratio", "low", "high", "limit", ...}`: samples a second of ours over the padded peer's (median, lowest and
        highest round; `limit` is the ratio of counted FLOPs), the same for the other pairs (what the kernels are worth is in
        `ratio_torch` and `ratio_cached_torch`), and the audio tokens on both sides.

    Raises:
        RuntimeError: another contestant's loss is not ours on the same weights (then the comparison is worth nothing).
    """
    samples = make_samples(options.clips or _SAMPLES)
    config = load_config(None, list(OVERRIDES))
    runtime = initialize(config)
    try:
        encoder = build_encoder(config.encoder, seed=config.run.seed)
        ours = Ours(config, encoder, samples, runtime)
        linear = dataclasses.replace(config, adaptor=dataclasses.replace(config.adaptor, kind="linear"))
        equal = Ours(linear, encoder, samples, runtime)
        peer = Peer(linear, equal.model, encoder, _AUDIO_ID)
        _check(equal, peer, ours, samples)
        subset = samples[::_PADDED_STRIDE]
        contestants: dict[str, tuple[Callable[[], object], int]] = {
            "ours": (ours.train, len(samples)),
            "equal tokens": (equal.train, len(samples)),
            "cached": (ours.train_cached, len(samples)),
            "plain torch": (by("torch", ours.train), len(samples)),
            "plain torch, cached": (by("torch", ours.train_cached), len(samples)),
            "padded": (lambda: peer.padded(subset), len(subset)),
            "cropped": (lambda: peer.cropped(samples), len(samples)),
        }
        for work, _ in contestants.values():
            work()
        rounds = [{name: _rate(*each) for name, each in contestants.items()} for _ in range(options.repeats)]
    finally:
        shutdown()
    limit = _padded_work(config, subset) / len(subset) / (ours.work() / len(samples))
    return _report(rounds, samples, ours, limit)


def make_samples(count: int) -> list[Sample]:
    """Conversations about clips of log-normal lengths, 2.75 s on average, as the Asterisk prompts; ids from 2 to 4,095."""
    generator = torch.Generator().manual_seed(0)
    seconds = (0.75 + 0.7 * torch.randn(count, generator=generator)).exp().clamp(0.3, 25.0).tolist()

    def ids(low: int, high: int) -> tuple[int, ...]:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return tuple(torch.randint(2, 4096, (length,), generator=generator).tolist())

    return [Sample(torch.randn(80, int(100 * each) + 2, generator=generator), ids(6, 16), ids(8, 28)) for each in seconds]


class Ours:
    """Our training step over the samples, packed once into micro-batches of `tokens` (the loader packs ahead of the step)."""

    def __init__(self, config: Config, encoder: AudioEncoder, samples: Sequence[Sample], runtime: Runtime, tokens: int = _TOKENS):
        self.config, self.encoder, self.samples, self.runtime = config, encoder, samples, runtime
        self.state = build_state(config)
        self.model = self.state.model[0].module
        self.micro_batches = pack(samples, config, tokens)
        self.clips = self._encode()

    @property
    def audio_tokens(self) -> int:
        """Audio tokens of all samples."""
        return sum(len(batch.audio_positions) for batch in self.micro_batches)

    def train(self) -> float:
        """One update with nothing cached; returns the mean loss of a trained token."""
        return self._update(self._encode())

    def train_cached(self) -> float:
        """One update with the clips' features at hand."""
        return self._update(self.clips)

    def loss(self) -> float:
        """Mean loss of a trained token, encoder included, with no update."""
        return self._loss(self._batches(self._encode()), forward_only=True)

    def work(self) -> int:
        """Counted operations of `train`."""
        config = self.config
        shape = DecoderShape.of(config)
        lengths = [length for batch in self.micro_batches for length in batch.segment_lengths]
        frames = [count for batch in self.micro_batches for count in batch.encoder_frames]
        decoder = decoder_work(shape, lengths, sum(len(sample.reply) for sample in self.samples))
        adaptor = adaptor_work(config.encoder, config.adaptor, shape.width, frames)
        encoder = encoder_work(config.encoder, [(sample.frames + 1) // 2 for sample in self.samples])
        return decoder.training() + adaptor.training(inputs=False) + encoder.forward

    def _encode(self) -> dict[str, EncodedClip]:
        features = self.encoder.encode([sample.log_mel for sample in self.samples])
        return {str(i): EncodedClip(each.to(torch.bfloat16), (len(each),)) for i, each in enumerate(features)}

    def _update(self, clips: dict[str, EncodedClip]) -> float:
        batches, state = self._batches(clips), self.state
        for chunk in state.model:
            chunk.zero_grad_buffer()
        state.optimizer.zero_grad()
        loss = self._loss(batches)
        state.scheduler.step(1)
        state.optimizer.step()
        return loss

    def _batches(self, clips: dict[str, EncodedClip]) -> list[TrainingBatch]:
        return [to_device(b, clips, (_GROUP,), self.config.encoder.width, self.runtime) for b in self.micro_batches]

    def _loss(self, batches: list[TrainingBatch], forward_only: bool = False) -> float:
        reports = run_schedule(self.state.model, batches, supervised_loss(1), forward_only)
        loss, tokens = sum(report["sums"][0] for report in reports).tolist()
        return loss / tokens


def pack(samples: Sequence[Sample], config: Config, tokens: int = _TOKENS) -> list[MicroBatch]:
    """The samples as the loader would pack them, `tokens` a micro-batch; sample i's clip has the address `str(i)`."""
    frames = {str(i): [chunk_frames(sample.frames * HOP_SAMPLES, config.adaptor.kind)] for i, sample in enumerate(samples)}
    rendered = []
    for i, sample in enumerate(samples):
        audio = frames[str(i)][0].tokens
        ids = [_AUDIO_ID] * audio + [*sample.question, *sample.reply]
        mask = [0] * (len(ids) - len(sample.reply)) + [1] * len(sample.reply)
        spans = (AudioSpan(str(i), 0, 0, audio),)
        rendered.append(TokenizedSample(str(i), _GROUP.source, np.array(ids, np.int32), np.array(mask, np.uint8), spans))
    bins = first_fit_decreasing([len(each.input_ids) for each in rendered], tokens)
    return [assemble([rendered[i] for i in items], [_GROUP] * len(items), frames.__getitem__, Padding(), 0) for items in bins]


def _check(equal: Ours, peer: Peer, ours: Ours, samples: Sequence[Sample]) -> None:
    """The first update's losses, on the same weights: ours has bfloat16 features, the peer's are float32."""
    pairs = {"the peer": (equal.train(), peer.cropped(samples)), "plain torch": (ours.loss(), by("torch", ours.loss)())}
    for name, (loss, theirs) in pairs.items():
        if abs(loss / theirs - 1) > 1e-3:
            raise RuntimeError(f"{name} computes something else: on the same weights its loss is {theirs:.5f}, ours {loss:.5f}")


def _padded_work(config: Config, samples: Sequence[Sample]) -> int:
    """Counted operations of the padded peer, had its decoder no padding: what a perfect packing would have left it with."""
    shape = DecoderShape.of(config)
    linear = dataclasses.replace(config.adaptor, kind="linear")
    encoder = encoder_work(config.encoder, [PADDED_FRAMES // 2] * len(samples)).forward
    adaptor = adaptor_work(config.encoder, linear, shape.width, [sample.audio_tokens for sample in samples])
    decoder = decoder_work(shape, [s.audio_tokens + len(s.question) + len(s.reply) for s in samples])
    return encoder + adaptor.training(inputs=False) + decoder.training()


def _rate(work: Callable[[], object], samples: int) -> float:
    start = time.perf_counter()
    work()
    return samples / (time.perf_counter() - start)


def _report(rounds: list[dict[str, float]], samples: Sequence[Sample], ours: Ours, limit: float) -> dict:
    seconds = sum(sample.frames for sample in samples) / 100
    theirs = sum(sample.audio_tokens for sample in samples)
    print(
        f"{len(samples)} samples, {seconds:.0f} s of audio, {ours.audio_tokens} audio tokens in ours (12.5 Hz) and {theirs} in "
        f"the peer (25 Hz), {torch.get_num_threads()} threads; samples a second, median of {len(rounds)} (lowest-highest)"
    )
    for name in rounds[0]:
        print(f"  {name:19} {spread([each[name] for each in rounds])}")
    result = {"name": "train-step", "limit": limit}
    pairs = {"": ("ours", "padded"), "_cropped": ("ours", "cropped"), "_equal_tokens": ("equal tokens", "padded")}
    pairs |= {"_equal_tokens_cropped": ("equal tokens", "cropped"), "_cached": ("cached", "padded")}
    pairs |= {"_torch": ("ours", "plain torch"), "_cached_torch": ("cached", "plain torch, cached")}
    for suffix, (first, second) in pairs.items():
        ratios = [each[first] / each[second] for each in rounds]
        print(f"  {first} / {second}: {spread(ratios)}")
        result |= {f"ratio{suffix}": statistics.median(ratios), f"low{suffix}": min(ratios), f"high{suffix}": max(ratios)}
    print(f"  ratio of counted FLOPs, padded over ours: {limit:.1f}")
    return result | {
        "samples_per_second": {name: statistics.median(each[name] for each in rounds) for name in rounds[0]},
        "samples": len(samples),
        "audio_seconds": seconds,
        "audio_tokens": {"ours": ours.audio_tokens, "peer": theirs},
        "threads": torch.get_num_threads(),
    }
