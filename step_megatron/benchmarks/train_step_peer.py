"""The peer of the training-step benchmark: transformers' `Qwen2AudioForConditionalGeneration` with the weights of ours."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from step_megatron.config.schema import Config
from step_megatron.model import huggingface
from step_megatron.model.audio_lm import AudioLanguageModel
from step_megatron.model.encoder import AudioEncoder
from step_megatron.model.whisper import from_huggingface

PADDED_FRAMES = 3000
BATCH = 8
_IGNORED = -100


@dataclass(frozen=True)
class Sample:
    """One conversation: a clip's log-mel features `[mels, frames + 2]`, then a question, then a reply that is trained."""

    log_mel: torch.Tensor
    question: tuple[int, ...]
    reply: tuple[int, ...]

    @property
    def frames(self) -> int:
        """Log-mel frames that hold sound."""
        return self.log_mel.shape[1] - 2

    @property
    def audio_tokens(self) -> int:
        """Audio tokens at Qwen2-Audio's 25 Hz."""
        return (self.frames + 1) // 2 // 2


class Peer:
    """Trains on samples in padded batches; the encoder is frozen.

    Args:
        config: of ours, with `adaptor.kind=linear`.
        model: our adaptor and decoder, in one process, whose weights the peer starts from.
        encoder: our encoder.
        audio_id: the placeholder's token.
    """

    def __init__(self, config: Config, model: AudioLanguageModel, encoder: AudioEncoder, audio_id: int):
        self.audio_id = audio_id
        self.model = _build(config, audio_id)
        _copy_weights(self.model, model, encoder)
        self.model.model.audio_tower.requires_grad_(False)
        self.positions = self.model.model.audio_tower.embed_positions.weight.detach().clone()
        self.optimizer = torch.optim.AdamW([p for p in self.model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def padded(self, samples: Sequence[Sample]) -> float:
        """One update: batches in the order given, clips padded to 30 s. Returns the mean loss of a trained token."""
        return self._update(_batches(samples), lambda batch: PADDED_FRAMES)

    def cropped(self, samples: Sequence[Sample]) -> float:
        """One update: batches of like lengths, clips padded to the longest of the batch."""
        ordered = sorted(samples, key=lambda sample: sample.frames)
        return self._update(_batches(ordered), lambda batch: -(-(batch[-1].frames + 2) // 2) * 2)

    def _update(self, batches: list[Sequence[Sample]], frames_of) -> float:
        trained = sum(len(sample.reply) for batch in batches for sample in batch)
        total = 0.0
        self.optimizer.zero_grad(set_to_none=True)
        for batch in batches:
            # The model returns the mean over a batch: weigh it by its tokens, as ours does.
            share = sum(len(sample.reply) for sample in batch) / trained
            loss = self.model(**self._inputs(batch, frames_of(batch)), use_cache=False).loss * share
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return total

    def _inputs(self, batch: Sequence[Sample], frames: int) -> dict[str, torch.Tensor]:
        tower = self.model.model.audio_tower
        tower.config.max_source_positions = frames // 2
        tower.embed_positions = nn.Embedding.from_pretrained(self.positions[: frames // 2])
        rows = [((self.audio_id,) * s.audio_tokens + s.question, s.reply) for s in batch]
        longest = max(len(prompt) + len(reply) for prompt, reply in rows)
        padding = [longest - len(prompt) - len(reply) for prompt, reply in rows]
        return {
            "input_ids": torch.tensor([[*p, *r, *([0] * n)] for (p, r), n in zip(rows, padding, strict=True)]),
            "labels": torch.tensor(
                [[*([_IGNORED] * len(p)), *r, *([_IGNORED] * n)] for (p, r), n in zip(rows, padding, strict=True)]
            ),
            "attention_mask": torch.tensor([[*([1] * (longest - n)), *([0] * n)] for n in padding]),
            # Whisper's silence is the clip's floor, which is its smallest value.
            "input_features": torch.stack(
                [nn.functional.pad(s.log_mel, (0, frames - s.log_mel.shape[1]), value=float(s.log_mel.min())) for s in batch]
            ),
            "feature_attention_mask": torch.tensor([[*([1] * s.frames), *([0] * (frames - s.frames))] for s in batch]),
        }


def _batches(samples: Sequence[Sample]) -> list[Sequence[Sample]]:
    return [samples[start : start + BATCH] for start in range(0, len(samples), BATCH)]


def text_config(config: Config):
    """transformers' configuration of the decoder: `Qwen2Config`, without the bias of query, key and value `LlamaConfig`."""
    from transformers import LlamaConfig, Qwen2Config

    settings = config.megatron.transformer
    kind = Qwen2Config if settings.get("add_qkv_bias", True) else LlamaConfig
    return kind(
        vocab_size=config.model.vocabulary_size,
        hidden_size=settings["hidden_size"],
        intermediate_size=settings["ffn_hidden_size"],
        num_hidden_layers=settings["num_layers"],
        num_attention_heads=settings["num_attention_heads"],
        num_key_value_heads=settings["num_query_groups"],
        max_position_embeddings=config.model.max_positions,
        rms_norm_eps=settings["layernorm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": config.model.rotary_base},
        tie_word_embeddings=config.model.tie_embeddings,
    )


def decoder_weights(model: AudioLanguageModel) -> dict[str, torch.Tensor]:
    """Weights of the decoder, in one process, by the names of transformers' `Qwen2ForCausalLM` and `LlamaForCausalLM`."""
    tied = model.share_embeddings_and_output_weights
    return huggingface.to_huggingface(huggingface.gather([model.language_model]), model.config, tied)


def _build(config: Config, audio_id: int) -> nn.Module:
    from transformers import Qwen2AudioConfig, Qwen2AudioEncoderConfig, Qwen2AudioForConditionalGeneration

    encoder = config.encoder
    audio = Qwen2AudioEncoderConfig(
        num_mel_bins=encoder.mels,
        d_model=encoder.width,
        encoder_layers=encoder.layers,
        encoder_attention_heads=encoder.heads,
        encoder_ffn_dim=encoder.ffn_width,
    )
    text = text_config(config)
    whole = Qwen2AudioConfig(audio_config=audio, text_config=text, audio_token_index=audio_id, attn_implementation="sdpa")
    return Qwen2AudioForConditionalGeneration(whole).train()


def _copy_weights(peer: nn.Module, model: AudioLanguageModel, encoder: AudioEncoder) -> None:
    released = encoder.state_dict()
    tower = peer.model.audio_tower
    names = {name: next(iter(from_huggingface({name: tensor}))) for name, tensor in tower.state_dict().items()}
    tower.load_state_dict({theirs: released[ours] for theirs, ours in names.items()})
    decoder = decoder_weights(model)
    peer.lm_head.weight.data.copy_(decoder.pop("lm_head.weight"))
    peer.model.language_model.load_state_dict({name.removeprefix("model."): tensor for name, tensor in decoder.items()})
    peer.model.multi_modal_projector.linear.load_state_dict(model.adaptor.linear.state_dict())
