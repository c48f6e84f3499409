"""The frozen audio encoder: log-mel frames in, 25 Hz features out; packed, never padded to 30 s.

The network is Whisper's, as Qwen2-Audio and Step-Audio 2 use it: two convolutions (100 -> 50 Hz), a frozen position table,
pre-LN transformer blocks (bidirectional, `key` has no bias), average pooling by two, `after_norm`.

Frames of a chunk with `valid` mel frames. The input carries two tail frames of silence; the last 50 Hz position reads them:

    T = valid + 2         mel frames that go in
    a = (valid + 1) // 2  50 Hz positions: all that attention sees
    e = a // 2            25 Hz features that come out

`compat="step"`. The released code, on one clip, runs both convolutions over all T frames, which makes a + 1 positions; it masks
the last one as a key, but lets it attend, and pools it. Where a is odd, the pooled sequence so gets an extra, invalid frame: the
mean of the last valid position and the masked one. The adaptor's last tap (input 2 o + 1 of its last output o) lands on it when e
is odd too, that is when a % 4 == 3; in all other cases nothing reads it. With `compat="step"` the encoder therefore emits e + 1
features for these chunks and e for all others. The adaptor needs to know nothing: (e - 1) // 2 + 1 is the same for odd e and for
e + 1. With `compat="clean"` the tap reads zero.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from step_kernels import audio_attention_varlen, native, packed_attention, pool_norm_downsample, registry
from step_kernels.segments import cumulative
from torch import nn
from torch.nn.functional import gelu, linear

from step_megatron.config.load import ConfigError
from step_megatron.config.schema import EncoderConfig
from step_megatron.model.canonical import canonical_blocks, on_threads, one_thread
from step_megatron.model.whisper import read_encoder_weights, sinusoids

# Raised when the computation changes in a way that changes bits, so that older caches are not used.
_REVISION = 4
_TAIL_FRAMES = 2


class _Attention(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)


class _Block(nn.Module):
    """Parameters of one transformer block under their released names."""

    def __init__(self, width: int, ffn_width: int):
        super().__init__()
        self.attn = _Attention(width)
        self.attn_ln = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, ffn_width), nn.GELU(), nn.Linear(ffn_width, width))
        self.mlp_ln = nn.LayerNorm(width)


class AudioEncoder(nn.Module):
    """Frozen Whisper-shaped encoder over packed chunks; a chunk's bits depend on the chunk alone.

    Args:
        config: sizes; `weights` is not read here (see `build_encoder`).
        block: rows of every matrix product (see `step_megatron.model.canonical`).
        compat: `clean`, or `step` to reproduce the released batch-1 code (see the module's docstring).

    Raises:
        ValueError: if the width is not a multiple of the heads.
    """

    def __init__(self, config: EncoderConfig, block: int = 1024, compat: Literal["clean", "step"] = "clean"):
        super().__init__()
        if config.width % config.heads:
            raise ValueError(f"encoder.width {config.width} is not a multiple of encoder.heads {config.heads}")
        self.config, self.block, self.compat = config, block, compat
        self.conv1 = nn.Conv1d(config.mels, config.width, 3, padding=1)
        self.conv2 = nn.Conv1d(config.width, config.width, 3, stride=2, padding=1)
        self.positional_embedding = nn.Embedding(config.max_positions, config.width)
        self.blocks = nn.ModuleList(_Block(config.width, config.ffn_width) for _ in range(config.layers))
        self.after_norm = nn.LayerNorm(config.width)
        with torch.no_grad():
            self.positional_embedding.weight.copy_(sinusoids(config.max_positions, config.width))
        self.requires_grad_(False)

    def frames_out(self, mel_frames: int) -> int:
        """Features that come out for one chunk of `mel_frames` frames in (the two tail frames included)."""
        positions, invalid = self._positions(mel_frames)
        return (positions + invalid) // 2 if self.config.pooling else positions

    def _positions(self, mel_frames: int) -> tuple[int, int]:
        """50 Hz positions that are valid, and whether (1 or 0) the masked one after them is needed."""
        positions = (mel_frames - _TAIL_FRAMES + 1) // 2
        return positions, int(self.compat == "step" and self.config.pooling and positions % 4 == 3)

    @torch.no_grad()
    def encode(self, log_mels: Sequence[torch.Tensor], max_rows: int = 0) -> list[torch.Tensor]:
        """Encode chunks of any number and order; on a CPU, torch's threads each work on packs of their own.

        Args:
            log_mels: each `[mels, valid + 2]`, 100 Hz, two tail frames of silence included (`LogMelFrontEnd.log_mel`).
            max_rows: 50 Hz rows of a pack, default four blocks; a thread holds one pack in memory.

        Returns:
            one `[e, width]` float32 tensor a chunk, in the order given.
        """
        packs = self._packs([log_mel.shape[1] for log_mel in log_mels], max_rows or 4 * self.block)

        def encode_pack(members: list[int]) -> list[torch.Tensor]:
            chunks = [log_mels[index] for index in members]
            features, frames = self(torch.cat(chunks, dim=1), [chunk.shape[1] for chunk in chunks])
            return list(features.split(frames))

        results: list[torch.Tensor] = [torch.empty(0)] * len(log_mels)
        for members, features in zip(packs, on_threads(encode_pack, packs, self.conv1.weight.device), strict=True):
            for index, feature in zip(members, features, strict=True):
                results[index] = feature
        return results

    def _packs(self, mel_frames: Sequence[int], max_rows: int) -> list[list[int]]:
        """Share the chunks out, sorted by length, over packs of whole blocks as full as their lengths allow."""
        rows = [sum(self._positions(frames)) for frames in mel_frames]
        threads = torch.get_num_threads() if self.conv1.weight.device.type == "cpu" else 1
        # As many packs as keep every thread busy, but never less than a block each.
        count = -(-sum(rows) // max_rows // threads) * threads or 1
        limit = min(max_rows, -(-sum(rows) // count // self.block) * self.block)
        packs, filled = [], limit
        for index in sorted(range(len(rows)), key=rows.__getitem__):
            if not packs or filled + rows[index] > limit:
                packs.append([])
                filled = 0
            packs[-1].append(index)
            filled += rows[index]
        return packs

    @torch.no_grad()
    def forward(self, mels: torch.Tensor, frames: Sequence[int]) -> tuple[torch.Tensor, tuple[int, ...]]:
        """Encode packed chunks.

        Args:
            mels: `[mels, sum(frames)]`, the chunks one after the other.
            frames: mel frames of each chunk, the two tail frames included.

        Returns:
            `[sum(frames_out), width]` float32, and the number of features of each chunk.

        Raises:
            ValueError: if the frames do not describe `mels`, a chunk lacks its tail frames, or is longer than the position table.
        """
        self._check(mels, frames)
        counts = [self._positions(length) for length in frames]
        lengths, valid = [sum(count) for count in counts], [count[0] for count in counts]
        dtype, device = self.conv1.weight.dtype, self.conv1.weight.device
        with one_thread(device):
            hidden = self._convolve(mels.to(device, dtype).t().contiguous(), frames, lengths)
            cu_seqlens = cumulative(lengths, device)
            for layer in self.blocks:
                self._attend(layer, hidden, cu_seqlens, lengths, valid)
                self._feed_forward(layer, hidden)
            norm = self.after_norm
            if not self.config.pooling:
                return norm(hidden).float(), tuple(lengths)
            features = tuple(length // 2 for length in lengths)
            pooled = pool_norm_downsample(hidden, cu_seqlens, norm.weight, norm.bias, norm.eps, sum(features))
            return pooled.float(), features

    def _check(self, mels: torch.Tensor, frames: Sequence[int]) -> None:
        if mels.dim() != 2 or mels.shape != (self.config.mels, sum(frames)):
            raise ValueError(f"expected mels of shape [{self.config.mels}, {sum(frames)}], got {list(mels.shape)}")
        if frames and min(frames) < _TAIL_FRAMES:
            raise ValueError(f"a chunk of {min(frames)} mel frames lacks its {_TAIL_FRAMES} tail frames of silence")
        if frames and sum(self._positions(max(frames))) > self.config.max_positions:
            raise ValueError(
                f"a chunk of {max(frames)} mel frames is longer than the encoder's {self.config.max_positions} positions; cut it"
            )

    def _convolve(self, mels: torch.Tensor, frames: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
        """`[sum T, mels]` -> `[sum positions, width]` at 50 Hz with positions added; a tap outside a chunk reads zero."""
        starts, device = cumulative(frames, mels.device).long(), mels.device
        chunk = torch.repeat_interleave(starts.diff(), output_size=mels.shape[0])
        row = torch.arange(mels.shape[0], device=device)
        hidden = self._convolution(self.conv1, mels, row, starts[chunk], starts[chunk + 1])

        chunk = torch.repeat_interleave(torch.tensor(lengths, device=device), output_size=sum(lengths))
        position = torch.arange(sum(lengths), device=device) - cumulative(lengths, device).long()[chunk]
        hidden = self._convolution(self.conv2, hidden, starts[chunk] + 2 * position, starts[chunk], starts[chunk + 1])
        return hidden.add_(self.positional_embedding.weight.index_select(0, position))

    def _convolution(
        self, conv: nn.Conv1d, x: torch.Tensor, centre: torch.Tensor, start: torch.Tensor, end: torch.Tensor
    ) -> torch.Tensor:
        """GELU(conv) at the rows `centre` of `x`, within `[start, end)`, as matrix products on canonical blocks."""
        x = torch.cat([x.new_zeros(1, x.shape[1]), x])
        weight = conv.weight.transpose(1, 2).flatten(1)
        taps = centre[:, None] + torch.arange(-1, 2, device=x.device)
        taps = torch.where((taps >= start[:, None]) & (taps < end[:, None]), taps + 1, 0)
        out = x.new_empty(centre.shape[0], weight.shape[0])
        for rows, piece in canonical_blocks(taps, self.block):
            columns = x.index_select(0, piece.view(-1)).view(self.block, -1)
            out[rows] = gelu(linear(columns, weight, conv.bias))[: rows.stop - rows.start]
        return out

    def _attend(
        self, layer: _Block, hidden: torch.Tensor, cu_seqlens: torch.Tensor, lengths: Sequence[int], valid: Sequence[int]
    ) -> None:
        """Add the attention of one block to `hidden`, in place."""
        attn = layer.attn
        query, key, value = (torch.empty_like(hidden) for _ in range(3))
        for rows, piece in canonical_blocks(hidden, self.block):
            piece = layer.attn_ln(piece)
            for out, projection in ((query, attn.query), (key, attn.key), (value, attn.value)):
                out[rows] = projection(piece)[: rows.stop - rows.start]
        heads = (self.config.heads, self.config.width // self.config.heads)
        query, key, value = (part.unflatten(1, heads) for part in (query, key, value))
        attended = audio_attention_varlen(query, key, value, cu_seqlens, lengths, valid).flatten(1)
        for rows, piece in canonical_blocks(attended, self.block):
            hidden[rows] += attn.out(piece)[: rows.stop - rows.start]

    def _feed_forward(self, layer: _Block, hidden: torch.Tensor) -> None:
        """Add the feed-forward part of one block to `hidden`, in place."""
        for rows, piece in canonical_blocks(hidden, self.block):
            hidden[rows] += layer.mlp(layer.mlp_ln(piece))[: rows.stop - rows.start]

    def load(self, directory: str | Path) -> "AudioEncoder":
        """Load weights from a directory: CTranslate2 Whisper, or safetensors under released or Hugging Face names.

        Raises:
            ValueError: names the file and the setting or tensor that does not fit.
        """
        state, expected = read_encoder_weights(Path(directory), self.config), self.state_dict()
        if state.keys() != expected.keys():
            missing, unknown = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
            raise ValueError(f"{directory}: not this encoder; missing tensors: {missing[:5]}, unknown tensors: {unknown[:5]}")
        self.load_state_dict(state)
        return self

    def reset_parameters(self, seed: int) -> "AudioEncoder":
        """Draw random weights (torch's own initialisation) from `seed`, the same on every rank; leaves global state alone."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for module in self.modules():
                if isinstance(module, nn.Linear | nn.Conv1d | nn.LayerNorm):
                    module.reset_parameters()
        return self

    def _backends(self) -> tuple[str, str]:
        """What computes attention and pooling here: by a measurement on this machine it may be another than elsewhere."""
        device, dtype, width = self.conv1.weight.device, self.conv1.weight.dtype, self.config.width
        attention = packed_attention.describe("audio_attention_varlen", device, dtype, width // self.config.heads)
        return attention, registry.decide("pool_norm_downsample", device, dtype, width)[0]

    def fingerprint(self) -> str:
        """Hash of all that the bits of a feature depend on: sizes, weights, canonical block, libraries, kind of processor."""
        device = self.conv1.weight.device
        kind = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
        sizes = {name: value for name, value in asdict(self.config).items() if name != "weights"}
        kernels = (native.describe().get("cpu"), registry.in_force or None, *self._backends())
        parts = [sizes, self.block, self.compat, _REVISION, torch.__version__, device.type, kind, kernels]
        digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode())
        for name, tensor in sorted(self.state_dict().items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.contiguous().view(torch.uint8).cpu().numpy())
        return digest.hexdigest()


def build_encoder(
    config: EncoderConfig, block: int = 1024, compat: Literal["clean", "step"] = "clean", seed: int = 0
) -> AudioEncoder:
    """Make the encoder that a configuration describes: random weights from `seed`, or those in the directory `config.weights`.

    Raises:
        ConfigError: `config.weights` is not set.
        ValueError: see `AudioEncoder.load`.
    """
    if not config.weights:
        raise ConfigError(
            "encoder.weights is not set; give a folder with Whisper's or Qwen2-Audio's encoder (`step-megatron data fetch` makes "
            "whisper-base), or say `random` for one that has learnt nothing"
        )
    encoder = AudioEncoder(config, block, compat)
    return encoder.reset_parameters(seed) if config.weights == "random" else encoder.load(config.weights)
