"""What is imported and exported again is the same, bit for bit; what is imported computes what transformers computes."""

import json

import pytest
import torch
from conversion import foreign
from conversion.foreign import same_bits, tensors_of

from step_megatron.config import load_config
from step_megatron.conversion.exporting import export_run
from step_megatron.conversion.importing import import_model
from step_megatron.conversion.sources import ConversionError
from step_megatron.generation.engine import Engine
from step_megatron.generation.request import Prompt, Sampling
from step_megatron.model.huggingface import to_huggingface

BF16 = torch.bfloat16
TOKENS = torch.randint(0, 130, (1, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _runtime_ends():
    from step_megatron.runtime.device import shutdown

    yield
    shutdown()


@pytest.mark.parametrize(
    ("kind", "tied", "dtype", "sizes"),
    [
        ("qwen2", False, torch.float32, {}),
        ("qwen2", True, BF16, {}),
        ("llama", False, torch.float16, {}),
        # Heads that are wider than their share, and a vocabulary that nothing divides.
        ("llama", True, torch.float32, {"head_dim": 24, "vocab_size": 127}),
    ],
)
def test_a_decoder_comes_back_bit_for_bit(kind, tied, dtype, sizes, tmp_path):
    theirs = foreign.text_model(tmp_path / "theirs", kind, tied, dtype, **sizes)
    summary = import_model(tmp_path / "theirs", tmp_path / "run")
    assert summary["layouts"] == [kind] and load_config(tmp_path / "run" / "config.yaml").encoder.weights == ""
    assert export_run(tmp_path / "run", tmp_path / "back")["layout"] == kind
    same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    again = type(theirs).from_pretrained(tmp_path / "back")
    assert again.dtype == dtype
    before, after = theirs.config.to_dict(), again.config.to_dict()
    ours = {"attention_bias", "mlp_bias", "use_sliding_window", "_name_or_path", "transformers_version"}
    assert {k: v for k, v in after.items() if k not in ours} == {k: v for k, v in before.items() if k not in ours}


@pytest.mark.parametrize("kind", ["qwen2", "llama"])
def test_a_decoder_computes_what_transformers_computes(kind, tmp_path):
    from step_megatron.model.batch import make_batch

    theirs = foreign.text_model(tmp_path / "theirs", kind)
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    exported = type(theirs).from_pretrained(tmp_path / "back")
    _, (model,) = foreign.loaded(tmp_path / "run")
    with torch.no_grad():
        ours, expected = model(make_batch(TOKENS, [20])), theirs(TOKENS).logits
        assert torch.equal(exported(TOKENS).logits, expected)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
    (result,) = Engine(model).generate([Prompt(TOKENS[0].tolist())], Sampling(max_new_tokens=24))
    assert result.tokens == exported.generate(TOKENS, max_new_tokens=24, do_sample=False, pad_token_id=0)[0, 20:].tolist()


def logits(rank: int, world_size: int, *, run_dir, transformer: dict) -> torch.Tensor | None:
    """Logits of the whole vocabulary, on ranks of the last stage."""
    from megatron.core import parallel_state
    from megatron.core.pipeline_parallel import get_forward_backward_func
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    from step_megatron.model.batch import make_batch

    config, chunks = foreign.loaded(run_dir, transformer)
    found = []

    def forward(batches, model):
        def keep(output):
            found.append(gather_from_tensor_model_parallel_region(output))
            return output.sum() * 0, {}

        return model(next(batches)), keep

    iterators = [iter([make_batch(TOKENS, [20])]) for _ in chunks]
    with torch.no_grad():
        get_forward_backward_func()(
            forward_step_func=forward,
            data_iterator=iterators if len(chunks) > 1 else iterators[0],
            model=chunks,
            num_microbatches=1,
            seq_length=1,
            micro_batch_size=1,
            forward_only=True,
        )
    return found[0][..., : config.model.vocabulary_size] if parallel_state.is_pipeline_last_stage() else None


@pytest.mark.parametrize("layout", ["tensor_model_parallel_size", "pipeline_model_parallel_size"])
def test_any_layout_reads_it(layout, worker_pool, tmp_path):
    """131 tokens on two tensor-parallel ranks: padded in memory, not in the files."""
    theirs = foreign.text_model(tmp_path / "theirs", "qwen2")
    import_model(tmp_path / "theirs", tmp_path / "run")
    results = worker_pool(2).run(logits, {"run_dir": tmp_path / "run", "transformer": {layout: 2}})
    with torch.no_grad():
        torch.testing.assert_close(results[-1], theirs(TOKENS).logits, rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_step_audio_comes_back_bit_for_bit(dtype, tmp_path):
    state = foreign.step_audio(tmp_path / "theirs", dtype)
    import_model(tmp_path / "theirs", tmp_path / "run")
    config = load_config(tmp_path / "run" / "config.yaml")
    assert (config.adaptor.kind, config.adaptor.width, config.encoder.ffn_width) == ("step", 32, 192)
    assert config.megatron.transformer.get("bf16", False) == (dtype == BF16)
    export_run(tmp_path / "run", tmp_path / "back")
    same_bits(tensors_of(tmp_path / "back"), state)
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("theirs", "back"))
    assert after["dtype"] == before.pop("torch_dtype")
    for section in ("text_config", "audio_encoder_config"):
        assert before.pop(section).items() <= after[section].items()
    assert before.items() <= after.items()
    with pytest.raises(ConversionError, match="qwen2-audio has a linear adaptor, this run adaptor.kind=step; .* step-audio"):
        export_run(tmp_path / "run", tmp_path / "other", "qwen2-audio")
    # The decoder alone, for transformers.
    from transformers import Qwen2ForCausalLM

    export_run(tmp_path / "run", tmp_path / "decoder", "qwen2")
    same_bits(tensors_of(tmp_path / "decoder"), {n: t for n, t in state.items() if n.startswith(("model.", "lm_head."))})
    assert Qwen2ForCausalLM.from_pretrained(tmp_path / "decoder").config.rope_parameters["rope_theta"] == 5e4


def test_step_audio_loads_in_our_model(tmp_path):
    """Decoder, adaptor and encoder are where the released names say: each part against plain torch on the file's tensors."""
    from step_megatron.model.encoder import build_encoder

    state = foreign.step_audio(tmp_path / "theirs", torch.float32)
    import_model(tmp_path / "theirs", tmp_path / "run")
    config, (model,) = foreign.loaded(tmp_path / "run")
    encoder = build_encoder(config.encoder).state_dict()
    same_bits(encoder, {name.removeprefix("encoder."): t for name, t in state.items() if name.startswith("encoder.")})
    adaptor = {name.removeprefix("adapter."): t for name, t in state.items() if name.startswith("adapter.")}
    same_bits(dict(model.adaptor.state_dict()), adaptor)
    x = torch.randn(9, 48, generator=torch.Generator().manual_seed(0))
    conv = torch.nn.functional.conv1d(x.t()[None], adaptor["conv.weight"], adaptor["conv.bias"], stride=2, padding=1)[0].t()
    hidden = torch.relu(torch.nn.functional.gelu(conv) @ adaptor["linear1.weight"].t() + adaptor["linear1.bias"])
    with torch.no_grad():
        expected = hidden @ adaptor["linear2.weight"].t() + adaptor["linear2.bias"]
        torch.testing.assert_close(model.adaptor(x, [9]), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, BF16])
def test_qwen2_audio_comes_back_bit_for_bit(dtype, tmp_path):
    from transformers import Qwen2AudioForConditionalGeneration

    theirs = foreign.qwen2_audio(tmp_path / "theirs", dtype)
    import_model(tmp_path / "theirs", tmp_path / "run")
    assert export_run(tmp_path / "run", tmp_path / "back")["layout"] == "qwen2-audio"
    same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "theirs"))
    again = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "back")
    assert again.dtype == dtype and again.config.audio_token_index == foreign.AUDIO_TOKEN
    same_bits(dict(again.state_dict()), dict(theirs.state_dict()))
    with pytest.raises(ConversionError, match="step-audio has the step adaptor, this run adaptor.kind=linear"):
        export_run(tmp_path / "run", tmp_path / "other", "step-audio")


def test_qwen2_audio_hears_what_transformers_hears(tmp_path):
    """Two clips of unlike length, each after two words: the same logits and the same greedy text as the exported model's."""
    from transformers import Qwen2AudioForConditionalGeneration

    from step_megatron.model.batch import make_batch
    from step_megatron.model.encoder import build_encoder

    foreign.qwen2_audio(tmp_path / "theirs")
    import_model(tmp_path / "theirs", tmp_path / "run")
    export_run(tmp_path / "run", tmp_path / "back")
    exported = Qwen2AudioForConditionalGeneration.from_pretrained(tmp_path / "back").eval()
    config, (model,) = foreign.loaded(tmp_path / "run")
    encoder = build_encoder(config.encoder, block=64)
    frames = 2 * config.encoder.max_positions
    generator = torch.Generator().manual_seed(4)
    for valid in (50, 21):
        log_mel = torch.randn(16, valid + 2, generator=generator)
        (features,) = encoder.encode([log_mel])
        count = len(features)
        ids = [3, 7, *([foreign.AUDIO_TOKEN] * count), 11, 29]
        audio = {
            "input_features": torch.nn.functional.pad(log_mel, (0, frames - log_mel.shape[1]), value=-1.0)[None],
            "feature_attention_mask": (torch.arange(frames) < valid).long()[None],
        }
        places = torch.arange(2, 2 + count)
        batch = make_batch(torch.tensor([ids]), [len(ids)], None, features, (count,), places)
        with torch.no_grad():
            ours = model(batch)
            expected = exported(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), **audio).logits
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-4)
        (result,) = Engine(model).generate([Prompt(ids, places.tolist(), features, (count,))], Sampling(max_new_tokens=12))
        mask = torch.ones(1, len(ids), dtype=torch.long)
        text = exported.generate(
            input_ids=torch.tensor([ids]), attention_mask=mask, **audio, max_new_tokens=12, do_sample=False, pad_token_id=0
        )
        assert result.tokens == text[0, len(ids) :].tolist()


def test_a_decoder_gets_the_encoder_of_another_model(tmp_path):
    """Whisper's own decoder is not used; the adaptor is drawn from the seed, the same in training and in the checkpoint."""
    from step_megatron.model.audio_lm import build_model
    from step_megatron.model.encoder import AudioEncoder, build_encoder
    from step_megatron.model.whisper import from_huggingface
    from step_megatron.runtime.device import initialize, shutdown

    foreign.text_model(tmp_path / "decoder", "llama")
    theirs = foreign.whisper(tmp_path / "whisper")
    summary = import_model(tmp_path / "decoder", tmp_path / "run", encoder=tmp_path / "whisper", seed=5)
    assert summary["layouts"] == ["llama", "whisper"] and len(summary["drawn"]) == 6
    config, (model,) = foreign.loaded(tmp_path / "run")
    encoder = build_encoder(config.encoder)
    expected = AudioEncoder(config.encoder)
    expected.load_state_dict(from_huggingface(theirs.model.encoder.state_dict()))
    same_bits(dict(encoder.state_dict()), dict(expected.state_dict()))
    assert (config.run.seed, config.encoder.mels) == (5, 16)
    shutdown()
    initialize(config)
    (fresh,) = build_model(config)
    same_bits(dict(fresh.adaptor.state_dict()), dict(model.adaptor.state_dict()))
    shutdown()
    export_run(tmp_path / "run", tmp_path / "back")
    same_bits(tensors_of(tmp_path / "back"), tensors_of(tmp_path / "decoder"))


def test_a_run_of_two_ranks_is_exported_whole(worker_pool, tmp_path):
    """Trained under tensor parallelism with a padded vocabulary; imported again it is the same."""
    from training.toy_run import train, write_data

    from step_megatron.runtime.device import shutdown

    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    extra = (
        "model.vocabulary_size=321",
        "megatron.transformer.tensor_model_parallel_size=2",
        "training.steps=2",
        "training.lr_warmup_steps=0",
    )
    worker_pool(2).run(train, {"data": str(data), "run_dir": str(tmp_path / "run"), "extra": extra})
    export_run(tmp_path / "run", tmp_path / "back", "qwen2")
    _, (model,) = foreign.loaded(tmp_path / "run", {"tensor_model_parallel_size": 1})
    exported = tensors_of(tmp_path / "back")
    decoder = model.language_model
    assert torch.equal(exported["model.embed_tokens.weight"], decoder.embedding.word_embeddings.weight)
    assert exported["lm_head.weight"].shape[0] == 321
    layer = decoder.decoder.layers[1]
    gate_up = torch.cat([exported[f"model.layers.1.mlp.{half}_proj.weight"] for half in ("gate", "up")])
    assert torch.equal(gate_up, layer.mlp.linear_fc1.weight)
    # One group: query, key and value one below the other.
    qkv = torch.cat([exported[f"model.layers.1.self_attn.{letter}_proj.bias"] for letter in "qkv"])
    assert torch.equal(qkv, layer.self_attention.linear_qkv.bias)
    shutdown()
    import_model(tmp_path / "back", tmp_path / "again")
    assert export_run(tmp_path / "again", tmp_path / "third")["layout"] == "qwen2"
    same_bits(tensors_of(tmp_path / "third"), exported)
    card = (tmp_path / "back" / "README.md").read_text()
    assert "nothing was imported" in card and "checkpoint `step_00000002` of run `run`" in card


@pytest.mark.parametrize(("dtype", "held"), [(BF16, BF16), (torch.float16, torch.float32)])
def test_half_precision_is_held_as_it_is_trained(dtype, held, tmp_path):
    """bfloat16 in bfloat16; float16, which would need a loss scale, exactly, in float32."""
    theirs = foreign.text_model(tmp_path / "theirs", "qwen2", dtype=dtype)
    import_model(tmp_path / "theirs", tmp_path / "run")
    config, (model,) = foreign.loaded(tmp_path / "run")
    ours = to_huggingface(dict(model.language_model.named_parameters()), model.config, config.model.tie_embeddings)
    same_bits(ours, {name: tensor.to(held) for name, tensor in theirs.state_dict().items()})
