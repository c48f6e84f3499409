"""The audio language model: adaptor and decoder, one pipeline stage (or virtual chunk) per module.

    tokens -> embeddings -> audio merged at the placeholders -> context-parallel slice -> sequence-parallel scatter -> decoder

Everything before the decoder happens on the first stage only. The encoder is no part of it: it is frozen, so its output arrives
with the batch (`ModelBatch.audio_features`).
"""

import dataclasses
from typing import Literal

import torch
from megatron.core import parallel_state
from megatron.core.enums import ModelType
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region, scatter_to_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from step_kernels import merge_audio_embeddings_
from step_kernels.merge_audio import check_audio_counts

from step_megatron.config.schema import Config
from step_megatron.model import lora, weights
from step_megatron.model.adaptor import AudioAdaptor
from step_megatron.model.batch import ModelBatch, TokenScores
from step_megatron.model.decoder import build_decoder, transformer_config
from step_megatron.model.output_layer import OutputLayer
from step_megatron.model.rope import RotaryTable
from step_megatron.model.segments import PackedSegments
from step_megatron.model.value_head import ValueHead
from step_megatron.runtime import seeds

__all__ = ["AudioLanguageModel", "ModelBatch", "build_model"]

# What the last stage ends in: logits, the critic's value, or both on one trunk.
Head = Literal["language", "value", "both"]


class AudioLanguageModel(MegatronModule):
    """Adaptor (first stage), decoder stage and output layer (last stage), with what Megatron's schedules ask of a model.

    Args:
        config: the run's configuration.
        transformer: from `transformer_config(config)`; all chunks of a rank share one object.
        vp_stage: virtual pipeline chunk, None without virtual stages.
        head: what the last stage ends in.
    """

    def __init__(self, config: Config, transformer: TransformerConfig, vp_stage: int | None = None, head: Head = "language"):
        super().__init__(config=transformer)
        self.model_type = ModelType.encoder_or_decoder
        self.vp_stage = vp_stage
        if head == "value":
            # There is no output layer to share the embeddings with.
            config = dataclasses.replace(config, model=dataclasses.replace(config.model, tie_embeddings=False))
        self.language_model = build_decoder(config, transformer, vp_stage)
        weights.initialize(self.language_model, config.run.seed, config.model.vocabulary_size)
        if config.model.lora.rank:
            lora.freeze_base(self.language_model)
        self.tp_group = self.language_model.tp_group
        self.pre_process = self.language_model.pre_process
        self.post_process = self.language_model.post_process
        self.share_embeddings_and_output_weights = config.model.tie_embeddings
        device = next(self.language_model.parameters()).device
        self.rotary = RotaryTable(transformer.kv_channels, config.model.max_positions, config.model.rotary_base, device)
        self.encoder_width = config.encoder.width
        self._predicted: torch.Tensor | None = None
        if self.post_process:
            self.language_model.decoder.register_forward_hook(self._select_predicted)
            self.value_head = None
            if head != "language":
                self.value_head = ValueHead(transformer.hidden_size, device, transformer.params_dtype)
            if head == "value":
                # As many weights as the embeddings, and nothing reads them; Megatron writes them only of a stage that has them.
                self.language_model.output_layer, self.language_model.post_process = None, False
            else:
                OutputLayer.adopt(self.language_model.output_layer, config.model.vocabulary_size)
        if self.pre_process:
            self.adaptor = draw_adaptor(config, transformer.hidden_size)
            self.adaptor.to(device=device, dtype=transformer.params_dtype)

    def set_input_tensor(self, input_tensor: torch.Tensor | list[torch.Tensor]) -> None:
        """Take the activations of the stage before; called by Megatron's schedules."""
        self.language_model.set_input_tensor(input_tensor)

    def shared_embedding_or_output_weight(self) -> torch.Tensor | None:
        """The tied weight of this stage, whose gradient Megatron sums over the first and the last stage."""
        return self.language_model.shared_embedding_or_output_weight()

    def forward(self, batch: ModelBatch) -> torch.Tensor | tuple[torch.Tensor, ...]:
        """Run this stage.

        Returns:
            Last stage with labels: the loss of every token, `[1, T_local]`, or of those in `batch.predicted`, `[1, n]`, float32;
            with `batch.loss_weights` their weighted sum, through which alone gradients then flow, and the losses; with
            `batch.temperature` `TokenScores`.
            Last stage without labels: logits, `[1, T_local, vocabulary / tp]`. Other stages: activations,
            `[T_local (/ tp with sequence parallelism), 1, width]`.
        """
        rotary = self.rotary(batch.packed.position_ids, self.config.params_dtype)
        packed = dataclasses.replace(batch.packed, rotary=rotary)
        decoder_input = self.embed(batch) if self.pre_process else None
        self._predicted = batch.predicted
        try:
            if self.post_process and batch.labels is not None:
                return self._losses(batch, decoder_input, packed)
            return self.language_model(
                input_ids=None,
                position_ids=None,
                attention_mask=None,
                decoder_input=decoder_input,
                packed_seq_params=packed,
            )
        finally:
            # The hook also runs where the decoder is called by itself (generation), with rows of its own.
            self._predicted = None

    def embed(self, batch: ModelBatch) -> torch.Tensor:
        """Decoder input of the first stage: embeddings with audio merged in, sliced, scattered; `[T_local (/ tp), 1, width]`."""
        embeddings = self.language_model.embedding(input_ids=batch.tokens, position_ids=None).squeeze(1)
        features, positions, starts = batch.audio_features, batch.audio_positions, batch.encoder_starts
        if features is None:
            # Distributed data parallelism waits for every parameter's gradient: a text-only micro-batch gives the adaptor zeros.
            features = embeddings.new_empty(0, self.encoder_width)
            positions, starts = batch.tokens.new_empty(0), batch.tokens.new_zeros(1, dtype=torch.int32)
        if batch.audio_names:
            given = [self.adaptor.tokens_out(frames) for frames in batch.encoder_frames]
            check_audio_counts(batch.audio_names, batch.audio_tokens, given)
        audio = self.adaptor(features, batch.encoder_frames, starts)
        embeddings = merge_audio_embeddings_(embeddings, audio.to(embeddings.dtype), positions)
        if batch.packed.cp_index is not None:
            embeddings = embeddings.index_select(0, batch.packed.cp_index)
        embeddings = embeddings.unsqueeze(1)
        if self.config.sequence_parallel:
            embeddings = scatter_to_sequence_parallel_region(embeddings, group=self.tp_group)
        return self._keep_gradient(embeddings)

    def _losses(self, batch: ModelBatch, decoder_input: torch.Tensor | None, packed: PackedSegments):
        """Layers and output layer of the last stage, as `GPTModel.forward` runs them, labels going to the output layer."""
        hidden = self.language_model.decoder(hidden_states=decoder_input, attention_mask=None, packed_seq_params=packed)
        output_layer = self.language_model.output_layer
        tied = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        if batch.temperature is None:
            return output_layer(hidden, weight=tied, labels=batch.labels, token_weights=batch.loss_weights)
        log_probs = entropy = values = hidden.new_empty(0, dtype=torch.float32)
        if output_layer is not None:
            asked = {"temperature": batch.temperature, "with_entropy": batch.with_entropy}
            log_probs, entropy = output_layer(hidden, weight=tied, labels=batch.labels, **asked)
        if self.value_head is not None:
            values = self.value_head(hidden.squeeze(1))
        return TokenScores(log_probs, entropy, values)

    def _select_predicted(self, decoder: torch.nn.Module, inputs: tuple, hidden: torch.Tensor) -> torch.Tensor:
        """Forward hook of the last stage's layers: keep the rows that go through the output layer, whole on every rank."""
        if self.config.sequence_parallel:
            # The output layer does not gather (`OutputLayer.adopt`): it sums its input's gradient over the ranks itself.
            hidden = gather_from_sequence_parallel_region(hidden, tensor_parallel_output_grad=False, group=self.tp_group)
        return hidden if self._predicted is None else hidden.index_select(0, self._predicted)

    def _keep_gradient(self, embeddings: torch.Tensor) -> torch.Tensor:
        """Let gradients start at frozen embeddings: full recomputation and pipeline stages find trained layers by their input."""
        needed = self.config.recompute_granularity == "full" or self.config.pipeline_model_parallel_size > 1
        if needed and torch.is_grad_enabled() and not embeddings.requires_grad:
            return embeddings.detach().requires_grad_()
        return embeddings


def draw_adaptor(config: Config, out_width: int) -> AudioAdaptor:
    """The adaptor with its weights at the start, drawn from the run's seed without disturbing any generator.

    It is whole on every tensor-parallel rank, so all draw it alike.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeds.derive(config.run.seed, "adaptor"))
        return AudioAdaptor(config.encoder, config.adaptor, out_width)


def build_model(
    config: Config, transformer: TransformerConfig | None = None, head: Head = "language"
) -> list[AudioLanguageModel]:
    """This rank's part of the model: one module, or one per virtual pipeline chunk, in order; weights drawn, nothing wrapped.

    Args:
        config: the run's configuration; `runtime.initialize(config)` has been called.
        transformer: Megatron's configuration, default `transformer_config(config)`.
        head: what the last stage ends in.

    Raises:
        ValueError: see `decoder.transformer_config` and `decoder.build_decoder`.
    """
    transformer = transformer or transformer_config(config)
    chunks = parallel_state.get_virtual_pipeline_model_parallel_world_size()
    stages = [None] if chunks is None else range(chunks)
    return [AudioLanguageModel(config, transformer, stage, head) for stage in stages]
