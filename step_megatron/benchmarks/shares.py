"""Each part's share of a training step and of generation, so that it is known which op is worth a kernel.

Passes: a training step that encodes its clips, one whose clips' features are at hand (a second epoch), and generation for the
same clips (the prompts' forward pass and decoding, as in evaluation and rollouts). Samples are those of `bench train-step`,
packed as the quickstart does it: one micro-batch of 1,024 tokens an update. On a CPU one thread computes, as in each of the
quickstart's processes. How a profile is divided: `parts.py`. A pass runs several times in turn with the others, and shares are
medians; the time of a pass is that without a profiler.

For rope, rms_norm and swiglu, which do no more than move memory, the most that a better kernel could still save is said too:
their time, less that of moving each tensor once at the speed at which this machine copies tensors of that size.
"""

import statistics
import time
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass

import torch

from step_megatron.benchmarks import train_step
from step_megatron.benchmarks.parts import REST, Parts
from step_megatron.config import load_config
from step_megatron.generation import cache, decode, forward, layers, prompts
from step_megatron.generation.engine import Engine
from step_megatron.generation.request import Prompt, Sampling
from step_megatron.model import audio_lm, encoder, rope
from step_megatron.model.encoder import build_encoder
from step_megatron.runtime.device import initialize, shutdown
from step_megatron.runtime.flops import DecoderShape

_SAMPLES, _TOKENS = 16, 1024
_NEW_TOKENS = 32

ENCODER, ENCODER_ATTENTION, POOL_NORM = "encoder", "encoder's attention", "pool + norm"
CONV, ADAPTOR, MERGE, EMBEDDING = "conv + GELU", "adaptor's linears", "merge", "embedding"
ATTENTION, ROPE, NORM, SWIGLU, LINEARS = "attention", "rope", "rms_norm", "swiglu", "decoder's linears"
LOSS, OPTIMIZER, SUMS, BATCH, SAMPLING = "output layer + loss", "optimizer", "gradient sums", "batch", "choice of tokens"
PARTS = (
    *(ENCODER, ENCODER_ATTENTION, POOL_NORM, CONV, ADAPTOR, EMBEDDING, MERGE, ATTENTION, ROPE, NORM, SWIGLU, LINEARS, LOSS),
    *(SUMS, OPTIMIZER, BATCH, SAMPLING, REST),
)

# Classes of Megatron, of Transformer Engine and of this project. A norm that is fused with a product counts with the product.
_MODULES = {
    "AudioAdaptor": ADAPTOR,
    "PackedConv": CONV,
    "LanguageModelEmbedding": EMBEDDING,
    "RotaryTable": ROPE,
    "PackedCausalAttention": ATTENTION,
    "TransformerEngineAttention": ATTENTION,
    "RMSNorm": NORM,
    "MLP": SWIGLU,
    "OutputLayer": LOSS,
    **dict.fromkeys(("ColumnParallelLinear", "RowParallelLinear", "TELayerNormColumnParallelLinear", "TELinear"), LINEARS),
}


def run(options: Namespace) -> dict:
    """Measure, print a table for every pass, and return the figures.

    Args:
        options: `repeats` (profiles of each pass), `clips` (samples, None for 16), `preset` (of the model).

    Returns:
        `{"name", "preset", "threads", "device", "passes": {pass: {"milliseconds", "profiled_milliseconds", "tokens", "forward",
        "backward", "could_save"}}}`: shares of the pass by part, which add up to 1 over both directions, and the share that a
        better kernel of rope, rms_norm or swiglu could save at most.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    preset = options.preset or "tiny"
    overrides = [f"model.preset={preset}", f"run={{device: {device.type}, seed: 1, threads: 1}}"]
    config = load_config(None, [*train_step.OVERRIDES, *overrides])
    samples = train_step.make_samples(options.clips or _SAMPLES)
    before = torch.get_num_threads()
    runtime = initialize(config)
    try:
        audio_encoder = build_encoder(config.encoder, seed=config.run.seed).to(runtime.device)
        ours = train_step.Ours(config, audio_encoder, samples, runtime, _TOKENS)
        parts = make_parts(ours)
        measured = _measure(parts, ours, _passes(ours, parts), options.repeats, runtime.device)
        floor = _floors(DecoderShape.of(config), measured["cached step"].tokens, runtime.device)
    finally:
        shutdown()
        torch.set_num_threads(before)
    result = {"name": "shares", "preset": preset, "threads": 1, "device": str(device), "passes": {}}
    for name, each in measured.items():
        result["passes"][name] = each.summary(floor if name != "generation" else {})
        print(_table(f"{preset}, {name}", result["passes"][name]))
    return result


def make_parts(ours: train_step.Ours) -> Parts:
    """Where each part of the training step and of generation begins and ends."""
    functions = {
        (ours.encoder, "encode"): ENCODER,
        (encoder, "audio_attention_varlen"): ENCODER_ATTENTION,
        (encoder, "pool_norm_downsample"): POOL_NORM,
        (audio_lm, "merge_audio_embeddings_"): MERGE,
        (rope, "rope_qk"): ROPE,
        (train_step, "to_device"): BATCH,
        (ours.state.optimizer, "step"): OPTIMIZER,
        (decode, "choose"): SAMPLING,
        (forward.Forward, "embed"): EMBEDDING,
        (forward.Forward, "logits"): LOSS,
        (prompts.PromptReader, "_embed"): MERGE,
        (layers.LeanLayers, "__call__"): LINEARS,
        (layers, "rms_norm"): NORM,
        (layers, "swiglu"): SWIGLU,
        (cache, "rope_to_cache"): ROPE,
        (cache, "paged_attention"): ATTENTION,
    }
    for chunk in ours.state.model:
        functions[chunk, "zero_grad_buffer"] = SUMS
    return Parts(_MODULES, functions, SUMS)


@dataclass
class _Measured:
    """Of one pass: its tokens, seconds of every run without a profiler, and the parts' seconds in every profile."""

    tokens: int
    seconds: list[float]
    profiles: list[dict[str, tuple[float, float]]]

    def summary(self, floors: dict[str, float]) -> dict:
        wholes = [sum(map(sum, profile.values())) for profile in self.profiles]
        shares = [
            {
                name: statistics.median(
                    profile.get(name, (0, 0))[way] / whole for profile, whole in zip(self.profiles, wholes, strict=True)
                )
                for name in PARTS
            }
            for way in (0, 1)
        ]
        # Medians of shares do not add up to one by themselves.
        total = sum(sum(way.values()) for way in shares)
        forward, backward = ({name: share / total for name, share in way.items()} for way in shares)
        profiled = statistics.median(wholes)
        saved = {name: max(0.0, forward[name] + backward[name] - floor / profiled) for name, floor in floors.items()}
        return {
            "milliseconds": 1e3 * statistics.median(self.seconds),
            "profiled_milliseconds": 1e3 * profiled,
            "tokens": self.tokens,
            "forward": forward,
            "backward": backward,
            "could_save": saved,
        }


def _passes(ours: train_step.Ours, parts: Parts) -> dict[str, tuple[Callable[[], object], int]]:
    """The passes, each with its tokens: all that an update trains on, or those of the prompts and the replies."""
    tokens = sum(sum(batch.segment_lengths) for batch in ours.micro_batches)
    asked = [
        Prompt(
            tokens=[0] * rows + list(sample.question),
            audio_positions=range(rows),
            audio_features=clip.features,
            encoder_frames=clip.chunk_frames,
        )
        for sample, clip in zip(ours.samples, ours.clips.values(), strict=True)
        for rows in [sum(map(ours.model.adaptor.tokens_out, clip.chunk_frames))]
    ]
    engine = Engine(ours.model)
    made = sum(len(prompt.tokens) for prompt in asked) + _NEW_TOKENS * len(asked)
    return {
        "uncached step": (ours.train, tokens),
        "cached step": (ours.train_cached, tokens),
        "generation": (lambda: engine.generate(asked, Sampling(max_new_tokens=_NEW_TOKENS)), made),
    }


def _measure(parts: Parts, ours: train_step.Ours, passes, repeats: int, device: torch.device) -> dict[str, _Measured]:
    measured = {name: _Measured(tokens, [], []) for name, (_, tokens) in passes.items()}
    for work, _ in passes.values():
        work()
    for _ in range(repeats):
        for name, (work, _) in passes.items():
            start = time.perf_counter()
            work()
            if device.type == "cuda":
                torch.cuda.synchronize()
            measured[name].seconds.append(time.perf_counter() - start)
            with parts.watching(ours.encoder, *ours.state.model):
                measured[name].profiles.append(parts.measure(work, device))
    return measured


def moved_bytes(shape: DecoderShape, tokens: int, element: int) -> dict[str, int]:
    """Bytes that each op has to move in a training step: every tensor once, forward and backward."""
    rotated = (shape.heads + shape.kv_heads) * shape.head_dim
    values = {
        # x in, out out; the gradient the same way
        ROPE: shape.layers * rotated * (2 + 2),
        # x in, out out; x and the gradient in, one gradient out. Two norms a layer and the last one
        NORM: (2 * shape.layers + 1) * shape.width * (2 + 3),
        # two halves in, one out; the halves and the gradient in, two gradients out
        SWIGLU: shape.layers * shape.ffn_width * (3 + 5),
    }
    return {name: tokens * element * count for name, count in values.items()}


def _floors(shape: DecoderShape, tokens: int, device: torch.device) -> dict[str, float]:
    """Seconds that a step's rope, norms and swiglu take at least: their bytes, at the speed of copying tensors of their size."""
    widths = {ROPE: (shape.heads + shape.kv_heads) * shape.head_dim, NORM: shape.width, SWIGLU: 2 * shape.ffn_width}
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    floors = {}
    for name, moved in moved_bytes(shape, tokens, dtype.itemsize).items():
        source = torch.zeros(min(tokens, _TOKENS), widths[name], dtype=dtype, device=device)
        target, samples = torch.empty_like(source), []
        for _ in range(20):
            start = time.perf_counter()
            target.copy_(source)
            if device.type == "cuda":
                torch.cuda.synchronize()
            samples.append(time.perf_counter() - start)
        floors[name] = moved * statistics.median(samples) / (2 * source.nbytes)
    return floors


def _table(title: str, result: dict) -> str:
    times = f"{result['milliseconds']:.0f} ms ({result['profiled_milliseconds']:.0f} in the profile)"
    lines = [f"{title}: {result['tokens']} tokens, {times}", f"  {'part':22} forward  backward  share"]
    for name in PARTS:
        forward, backward = result["forward"][name], result["backward"][name]
        if forward or backward:
            line = f"  {name:22} {forward:6.1%}   {backward:6.1%}  {forward + backward:6.1%}"
            if name in result["could_save"]:
                line += f"; a better kernel could save at most {result['could_save'][name]:.1%} of the step"
            lines.append(line)
    return "\n".join(lines)
