"""Encoder weights: every format gives the same features; a bad file is refused with its name, its place and what to do."""

import struct

import pytest
import torch
from safetensors.torch import save_file
from transformers import WhisperConfig
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from step_megatron.config.schema import EncoderConfig
from step_megatron.model.encoder import AudioEncoder, build_encoder
from step_megatron.model.whisper import CTranslate2File, from_ctranslate2, from_huggingface

SIZES = {"mels": 3, "width": 8, "layers": 2, "heads": 2, "ffn_width": 12, "max_positions": 20}
CONFIG = EncoderConfig(**SIZES)
KINDS = {torch.float32: 0, torch.int8: 1, torch.float16: 4}


def string(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def model_bin(tensors: dict[str, torch.Tensor], version: int = 6) -> bytes:
    """A CTranslate2 file, written from its published layout."""
    data = struct.pack("<I", version) + string("WhisperSpec") + struct.pack("<II", 3, len(tensors))
    for name, tensor in tensors.items():
        raw = tensor.contiguous().numpy().tobytes()
        data += string(name) + struct.pack(f"<B{tensor.dim()}I", tensor.dim(), *tensor.shape)
        data += struct.pack("<BI", KINDS[tensor.dtype], len(raw)) + raw
    return data + struct.pack("<I", 0)


def ctranslate2_tensors(encoder: AudioEncoder) -> dict[str, torch.Tensor]:
    """The encoder under CTranslate2's names: query, key and value stacked, with a zero bias for the keys."""
    state = encoder.state_dict()
    tensors = {"encoder/position_encodings/encodings": state["positional_embedding.weight"]}
    for part, gamma in (("weight", "gamma"), ("bias", "beta")):
        tensors[f"encoder/layer_norm/{gamma}"] = state[f"after_norm.{part}"]
        for conv in ("conv1", "conv2"):
            tensors[f"encoder/{conv}/{part}"] = state[f"{conv}.{part}"]
        for i in range(CONFIG.layers):
            layer, block = f"encoder/layer_{i}", f"blocks.{i}"
            query, value = state[f"{block}.attn.query.{part}"], state[f"{block}.attn.value.{part}"]
            key = state.get(f"{block}.attn.key.{part}", torch.zeros_like(query))
            tensors[f"{layer}/self_attention/linear_0/{part}"] = torch.cat([query, key, value])
            tensors[f"{layer}/self_attention/linear_1/{part}"] = state[f"{block}.attn.out.{part}"]
            tensors[f"{layer}/self_attention/layer_norm/{gamma}"] = state[f"{block}.attn_ln.{part}"]
            tensors[f"{layer}/ffn/layer_norm/{gamma}"] = state[f"{block}.mlp_ln.{part}"]
            tensors[f"{layer}/ffn/linear_0/{part}"] = state[f"{block}.mlp.0.{part}"]
            tensors[f"{layer}/ffn/linear_1/{part}"] = state[f"{block}.mlp.2.{part}"]
    return tensors | {
        "decoder/layer_0/ffn/linear_0/weight": torch.ones(5, dtype=torch.int8),
        "encoder/num_heads": torch.tensor(2.0),
    }


@pytest.fixture
def encoder() -> AudioEncoder:
    encoder = AudioEncoder(CONFIG, block=8).reset_parameters(4)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(parameter.numel())) * 0.1)
    return encoder


def assert_loads(directory, encoder: AudioEncoder) -> None:
    config = EncoderConfig(**SIZES, weights=str(directory))
    assert build_encoder(config, block=8).fingerprint() == encoder.fingerprint()


def test_ctranslate2_file(tmp_path, encoder):
    (tmp_path / "model.bin").write_bytes(model_bin(ctranslate2_tensors(encoder)))
    assert_loads(tmp_path, encoder)


def test_released_safetensors_with_prefix_and_several_files(tmp_path, encoder):
    state = {f"encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    names = sorted(state)
    save_file({name: state[name] for name in names[::2]}, tmp_path / "a.safetensors")
    save_file({name: state[name] for name in names[1::2]} | {"adapter.conv.bias": torch.ones(3)}, tmp_path / "b.safetensors")
    assert_loads(tmp_path, encoder)


@pytest.mark.parametrize("prefix", ["", "model.encoder.", "audio_tower."])
def test_hugging_face_safetensors(tmp_path, prefix):
    sizes = {"d_model": 8, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 12}
    theirs = WhisperEncoder(WhisperConfig(num_mel_bins=3, max_source_positions=20, **sizes))
    save_file({prefix + name: tensor for name, tensor in theirs.state_dict().items()}, tmp_path / "model.safetensors")
    expected = AudioEncoder(CONFIG, block=8)
    expected.load_state_dict(from_huggingface(theirs.state_dict()))
    assert_loads(tmp_path, expected)


def test_reads_only_the_prefix_and_half_precision(tmp_path):
    tensor = torch.randn(2, 3).half()
    (tmp_path / "model.bin").write_bytes(model_bin({"decoder/x": torch.ones(4), "encoder/y": tensor}))
    read = CTranslate2File(tmp_path / "model.bin").tensors("encoder/")
    assert list(read) == ["encoder/y"] and torch.equal(read["encoder/y"], tensor)


def test_every_truncation_is_refused(tmp_path):
    data = model_bin({"encoder/a": torch.ones(3), "decoder/b": torch.ones(2, 2)})[:-4]
    path = tmp_path / "model.bin"
    for size in range(len(data)):
        path.write_bytes(data[:size])
        with pytest.raises(ValueError, match=r"model.bin, byte \d+: .*truncated, fetch it again"):
            CTranslate2File(path).tensors()


def test_inconsistent_files_are_refused(tmp_path):
    path = tmp_path / "model.bin"

    def refused(data: bytes, message: str) -> None:
        path.write_bytes(data)
        with pytest.raises(ValueError, match=message):
            CTranslate2File(path).tensors("encoder/")

    good = model_bin({"encoder/a": torch.ones(3)})
    refused(model_bin({"encoder/a": torch.ones(3)}, version=7), "format version 7, expected 6")
    refused(good.replace(struct.pack("<BI", 0, 12), struct.pack("<BI", 9, 12)), "do not hold .3. of type 9")
    refused(good.replace(struct.pack("<I", 12), struct.pack("<I", 11)), "11 bytes do not hold")
    refused(good.replace(b"encoder", b"\xff\xfe\xff\xfe\xff\xfe\xff"), "is not a name")
    refused(model_bin({"decoder/a": torch.ones(3)}), r"no tensor is called encoder/\*")
    twice = model_bin({"encoder/a": torch.ones(3), "encoder/b": torch.ones(3)}).replace(b"encoder/b", b"encoder/a")
    refused(twice, "encoder/a occurs twice")


def test_sizes_that_differ_name_the_setting(tmp_path, encoder):
    (tmp_path / "model.bin").write_bytes(model_bin(ctranslate2_tensors(encoder)))
    for name, value in (("width", 16), ("layers", 3), ("mels", 80), ("ffn_width", 32), ("max_positions", 1500)):
        with pytest.raises(
            ValueError, match=rf"encoder.{name} is {value}, but .*model.bin holds {SIZES[name]}: set encoder.{name}="
        ):
            AudioEncoder(EncoderConfig(**SIZES | {name: value})).load(tmp_path)


def test_missing_quantised_and_biased_tensors_are_refused(tmp_path, encoder):
    tensors = ctranslate2_tensors(encoder)
    tensors = {name: tensor for name, tensor in tensors.items() if name.startswith("encoder/") and "num_heads" not in name}
    for name in tensors:
        (tmp_path / "model.bin").write_bytes(model_bin({other: tensor for other, tensor in tensors.items() if other != name}))
        with pytest.raises(ValueError, match=f"model.bin: the tensor {name.removeprefix('encoder/')} is missing"):
            AudioEncoder(CONFIG).load(tmp_path)
    (tmp_path / "model.bin").unlink()
    with pytest.raises(ValueError, match="quantised"):
        from_ctranslate2(tensors | {"encoder/conv1/weight": torch.ones(8, 3, 3, dtype=torch.int8)})
    with pytest.raises(ValueError, match="the keys have a bias"):
        from_ctranslate2(tensors | {"encoder/layer_0/self_attention/linear_0/bias": torch.ones(24)})
    with pytest.raises(ValueError, match="decoder.layers.0 is not a tensor"):
        from_huggingface({"decoder.layers.0": torch.ones(1)})
    save_file({k: v for k, v in encoder.state_dict().items() if k != "blocks.1.mlp.2.bias"}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="not this encoder; missing tensors: .'blocks.1.mlp.2.bias'."):
        AudioEncoder(CONFIG).load(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(ValueError, match="holds neither model.bin nor .*data fetch"):
        AudioEncoder(CONFIG).load(tmp_path)


def test_whisper_base_tables_are_the_closed_form(step_data):
    path = step_data / "whisper-base" / "model.bin"
    if not path.is_file():
        pytest.skip(f"{path} is not there: run `step-megatron data fetch`")
    config = EncoderConfig(mels=80, width=512, layers=6, heads=8, ffn_width=2048, weights=str(path.parent))
    table = build_encoder(config).positional_embedding.weight
    closed_form = AudioEncoder(config).positional_embedding.weight
    # The file holds half precision.
    torch.testing.assert_close(table, closed_form, rtol=0, atol=1e-3)
