"""GGUF files written by the gguf package: transformers' reading of them, every truncation refused, other models named."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from step_megatron.conversion.gguf_file import GgufFile
from step_megatron.conversion.layouts import recognise
from step_megatron.conversion.sources import ConversionError

WIDTH, INNER, HEADS, GROUPS, ROWS = 64, 96, 4, 2, 40


def permuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows as llama.cpp's converter orders them."""
    return weight.reshape(heads, 2, weight.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(weight.shape)


def write(path: Path, architecture: str = "llama", tied: bool = True) -> None:
    """One layer, a type of storage a tensor."""
    generator = np.random.default_rng(0)
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_block_count(1)
    writer.add_context_length(128)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(GROUPS)
    writer.add_rope_freq_base(5e4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_token_list([f"t{n}" for n in range(ROWS)])
    writer.add_array("test.flags", [True, False])
    keys = WIDTH // HEADS * GROUPS
    shapes = {
        "token_embd": (ROWS, WIDTH, Kind.Q8_0), "output_norm": (WIDTH, Kind.F32), "blk.0.attn_norm": (WIDTH, Kind.F32),
        "blk.0.ffn_norm": (WIDTH, Kind.F32), "blk.0.attn_q": (WIDTH, WIDTH, Kind.Q4_1), "blk.0.attn_k": (keys, WIDTH, Kind.F16),
        "blk.0.attn_v": (keys, WIDTH, Kind.Q5_0), "blk.0.attn_output": (WIDTH, WIDTH, Kind.Q4_0),
        "blk.0.ffn_gate": (INNER, WIDTH, Kind.BF16), "blk.0.ffn_up": (INNER, WIDTH, Kind.F32),
        "blk.0.ffn_down": (WIDTH, INNER, Kind.Q8_0),
    }  # fmt: skip
    shapes |= {} if tied else {"output": (ROWS, WIDTH, Kind.F16)}
    for name, (*shape, kind) in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        for module, heads in (("attn_q", HEADS), ("attn_k", GROUPS)):
            values = permuted(values, heads) if name.endswith(module) else values
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("tied", [True, False])
def test_tensors_are_those_that_transformers_reads(tied, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    path = tmp_path / "model.gguf"
    write(path, tied=tied)
    sizes = {"hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=ROWS, intermediate_size=INNER, tie_word_embeddings=tied, **sizes))
    expected = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    source = GgufFile(path)
    assert source.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        read = source.read(name)
        assert read.shape == source.tensors[name].shape and torch.equal(read, tensor.float()), name
    assert source.fields["test.flags"] == [True, False] and source.fields["tokenizer.ggml.tokens"][7] == "t7"
    found = recognise(tmp_path)
    assert found.decoder.model["tie_embeddings"] is tied and found.decoder.transformer["layernorm_epsilon"] == 1e-5
    assert found.decoder.model["rotary_base"] == 5e4


def test_every_truncation_is_refused(tmp_path):
    path = tmp_path / "model.gguf"
    write(path)
    data = path.read_bytes()
    for size in (*range(0, 200), *range(200, len(data), 97), len(data) - 1):
        path.write_bytes(data[:size])
        with pytest.raises(ConversionError, match=r"model.gguf.*fetch it again"):
            GgufFile(path)


def test_other_files_are_named(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGML" + bytes(40))
    with pytest.raises(ConversionError, match="no GGUF file"):
        GgufFile(path)
    path.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + bytes(40))
    with pytest.raises(ConversionError, match="format version 9"):
        GgufFile(path)
    write(path, "qwen2")
    with pytest.raises(ConversionError, match="its architecture is qwen2; of GGUF files only llama"):
        recognise(path)
    write(path)
    write(tmp_path / "second.gguf")
    with pytest.raises(ConversionError, match="2 GGUF files; name one"):
        recognise(tmp_path)
