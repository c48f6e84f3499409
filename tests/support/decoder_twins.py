"""Small decoders here and their twins in transformers, with the same weights: the independent reference of the model tests."""

import torch

from step_megatron.config.schema import AdaptorConfig, Config, EncoderConfig, MegatronConfig, ModelConfig, RunConfig

ENCODER_WIDTH, VOCABULARY, ROTARY_BASE = 24, 128, 1e4


def small_config(tied: bool = False, qkv_bias: bool = True, **transformer) -> Config:
    """Two layers, width 64, 4 heads in 2 groups; `transformer` goes to Megatron."""
    sizes = {
        "num_layers": 2, "hidden_size": 64, "ffn_hidden_size": 160, "num_attention_heads": 4, "num_query_groups": 2,
        "layernorm_epsilon": 1e-6, "init_method_std": 0.05, "add_qkv_bias": qkv_bias,
    }  # fmt: skip
    return Config(
        run=RunConfig(device="cpu", threads=1, seed=5),
        model=ModelConfig(
            preset="test", vocabulary_size=VOCABULARY, max_positions=256, rotary_base=ROTARY_BASE, tie_embeddings=tied
        ),
        encoder=EncoderConfig(mels=8, width=ENCODER_WIDTH, layers=1, heads=2, ffn_width=48),
        adaptor=AdaptorConfig(width=32),
        megatron=MegatronConfig(transformer=sizes | transformer),
    )


def huggingface_twin(config: Config, seed: int = 0) -> torch.nn.Module:
    """`Qwen2ForCausalLM` (or `LlamaForCausalLM` without the bias of query, key and value) of the configuration's shape.

    Norm weights and biases are random too, so that a wrong mapping shows.
    """
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    sizes = config.megatron.transformer
    shape = dict(
        vocab_size=config.model.vocabulary_size,
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"],
        num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"],
        max_position_embeddings=config.model.max_positions,
        rms_norm_eps=sizes["layernorm_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": config.model.rotary_base},
        tie_word_embeddings=config.model.tie_embeddings,
        initializer_range=0.05,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(seed)
    twin = Qwen2ForCausalLM(Qwen2Config(**shape)) if sizes["add_qkv_bias"] else LlamaForCausalLM(LlamaConfig(**shape))
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, parameter in twin.named_parameters():
            if name.endswith("bias"):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
            elif "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn(parameter.shape, generator=generator))
    twin.set_attn_implementation("eager")
    return twin.float().eval()


def model_of_twin(config: Config, twin: torch.nn.Module):
    """Our model on one pipeline stage with the twin's decoder weights; the runtime has been initialised."""
    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.huggingface import from_huggingface
    from step_megatron.model.weights import load

    (model,) = build_model(config)
    load([model.language_model], from_huggingface(twin.state_dict(), model.config, config.model.tie_embeddings))
    return model


def twin_logits(twin: torch.nn.Module, tokens: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """The twin's logits, one segment at a time, packed again: `[1, T, vocabulary]`."""
    with torch.no_grad():
        return torch.cat([twin(part, use_cache=False).logits for part in tokens.split(lengths, dim=1)], dim=1)


def random_tokens(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (1, count), generator=torch.Generator().manual_seed(seed))


def audio_batch(lengths: list[int], frames: dict[int, int], seed: int = 3, **kwargs):
    """A packed batch; segment `i` holds one chunk of `frames[i]` encoder frames from its second token on."""
    from step_megatron.model.batch import make_batch

    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    tokens, labels = torch.randint(0, VOCABULARY, (2, 1, total), generator=generator)
    positions, counts, start = [], [], 0
    for segment, length in enumerate(lengths):
        if segment in frames:
            audio = (frames[segment] + 1) // 2
            assert audio < length
            positions += range(start + 1, start + 1 + audio)
            counts.append(frames[segment])
        start += length
    features = torch.randn(sum(counts), ENCODER_WIDTH, generator=generator) if counts else None
    audio_positions = torch.tensor(positions, dtype=torch.int64) if counts else None
    return make_batch(tokens, lengths, labels, features, tuple(counts), audio_positions, **kwargs)
