"""What does not fit is named, all of it at once, and leaves nothing behind; what is known to be of no use is passed over."""

import json

import pytest
import torch
from conversion import foreign
from safetensors.torch import save_file

from step_megatron import cli
from step_megatron.checkpoint.directory import CheckpointError
from step_megatron.config import load_config
from step_megatron.conversion.exporting import export_run
from step_megatron.conversion.importing import import_model
from step_megatron.conversion.sources import ConversionError


@pytest.fixture
def decoder(tmp_path):
    """A Qwen2 in one file, and its tensors."""
    foreign.text_model(tmp_path / "theirs", "qwen2")
    state = foreign.tensors_of(tmp_path / "theirs")
    for file in (tmp_path / "theirs").glob("model*"):
        file.unlink()
    return tmp_path / "theirs", state


def with_config(folder, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(folder, state, message: str, out=None) -> str:
    save_file(state, folder / "model.safetensors")
    with pytest.raises(ConversionError, match=message) as caught:
        import_model(folder, out)
    return str(caught.value)


def test_every_tensor_that_does_not_fit_is_named_in_one_error(decoder, tmp_path):
    folder, state = decoder
    del state["model.layers.0.mlp.up_proj.weight"], state["model.norm.weight"]
    state["model.layers.1.self_attn.k_proj.weight"] = torch.zeros(16, 64)
    state |= {"model.layers.2.mlp.up_proj.weight": torch.zeros(96, 64), "visual.patch": torch.zeros(2)}
    said = refused(folder, state, "5 tensors are not those of config.json", tmp_path / "run")
    for line in (
        "missing: model.layers.0.mlp.up_proj.weight [96, 64]",
        "missing: model.norm.weight [64]",
        "misshapen: model.layers.1.self_attn.k_proj.weight is [16, 64], the configuration wants [32, 64]",
        "unknown: model.layers.2.mlp.up_proj.weight [96, 64]",
        "unknown: visual.patch [2]",
    ):
        assert line in said
    assert not (tmp_path / "run").exists() and not list(tmp_path.glob(".run*"))


def test_what_can_be_computed_is_passed_over(decoder, tmp_path):
    folder, state = decoder
    save_file(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, folder / "model.safetensors")
    assert import_model(folder, None)["tensors"] == 3 + 2 * 7
    assert not (tmp_path / "run").exists()


def test_a_tied_copy_has_to_be_one(decoder, tmp_path):
    folder, state = decoder
    with_config(folder, tie_word_embeddings=True)
    refused(folder, state, "lm_head.weight differs from the embeddings, though config.json ties them")
    save_file(state | {"lm_head.weight": state["model.embed_tokens.weight"].clone()}, folder / "model.safetensors")
    import_model(folder, tmp_path / "run")
    assert load_config(tmp_path / "run" / "config.yaml").model.tie_embeddings


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window=True: our decoder does not have that"),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}, "rope_scaling=.*yarn"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope_scaling=.*linear"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"model_type": "mistral"}, "model_type is 'mistral'; known are step_audio_2"),
        ({"model_type": "llama", "attention_bias": True}, "attention_bias=True"),
        ({"model_type": "step_audio_2"}, "audio_encoder_config is missing"),
    ],
)
def test_settings_that_our_decoder_does_not_have_are_named(change, message, decoder):
    folder, state = decoder
    with_config(folder, **change)
    refused(folder, state, message)


def test_mixed_types_of_joined_tensors_are_refused(decoder):
    folder, state = decoder
    state["model.layers.0.mlp.up_proj.weight"] = state["model.layers.0.mlp.up_proj.weight"].half()
    refused(folder, state, "gate_proj.weight, model.layers.0.mlp.up_proj.weight: of different types")


def test_parts_that_do_not_go_together_are_refused(decoder, tmp_path):
    folder, state = decoder
    save_file(state, folder / "model.safetensors")
    foreign.step_audio(tmp_path / "step")
    with pytest.raises(ConversionError, match="has an encoder, and an adaptor trained for it"):
        import_model(tmp_path / "step", None, encoder=tmp_path / "step")
    with pytest.raises(ConversionError, match="a qwen2 checkpoint has no audio encoder"):
        import_model(folder, None, encoder=folder)
    foreign.whisper(tmp_path / "whisper")
    with pytest.raises(ConversionError, match="a whisper checkpoint has no decoder of ours"):
        import_model(tmp_path / "whisper", None)
    whole = foreign.tensors_of(tmp_path / "whisper")
    del whole["model.encoder.layers.1.fc1.bias"]
    save_file(whole | {"model.encoder.more": torch.zeros(1)}, tmp_path / "whisper" / "model.safetensors")
    with pytest.raises(ConversionError, match=r"missing: model.encoder.layers.1.fc1.bias(?s:.*)unknown: model.encoder.more"):
        import_model(folder, None, encoder=tmp_path / "whisper")


def test_the_encoder_of_another_audio_model_is_taken_alone(decoder, tmp_path):
    folder, state = decoder
    save_file(state, folder / "model.safetensors")
    released = foreign.step_audio(tmp_path / "step")
    import_model(folder, tmp_path / "run", encoder=tmp_path / "step")
    expected = {name.removeprefix("encoder."): t for name, t in released.items() if name.startswith("encoder.")}
    foreign.same_bits(foreign.tensors_of(tmp_path / "run" / "encoder"), expected)


def test_mistakes_on_the_command_line_are_one_line(decoder, tmp_path, capsys):
    folder, state = decoder
    save_file(state, folder / "model.safetensors")
    for arguments, message in (
        (["import", str(tmp_path / "absent"), "--dry-run"], "absent: no such folder"),
        (["import", str(folder)], "by --to OUT, or read and check only, by --dry-run"),
        (["import", str(folder), "--to", str(folder)], "exists; name another --out"),
        (["import", str(folder), "--dry-run", "--tokenizer", str(tmp_path)], "neither tokenizer.json nor qwen.tiktoken"),
        (["export", str(tmp_path / "absent"), "--to", str(tmp_path / "back")], "config.yaml: no such file"),
    ):
        assert cli.main(["convert", *arguments]) == 2
        captured = capsys.readouterr()
        assert message in captured.err and "Traceback" not in captured.err
    assert cli.main(["convert", "import", str(folder), "--to", str(tmp_path / "run")]) == 0
    assert json.loads(capsys.readouterr().out)["layouts"] == ["qwen2"]
    assert cli.main(["convert", "export", str(tmp_path / "run"), "--to", str(tmp_path / "back")]) == 0
    assert json.loads(capsys.readouterr().out)["checkpoint"] == "step_00000000"


def test_exports_that_cannot_be_are_named(decoder, tmp_path):
    folder, state = decoder
    save_file(state, folder / "model.safetensors")
    import_model(folder, tmp_path / "run")
    for layout, message in (("llama", "this run has one"), ("step-audio", "holds an encoder, this run has none")):
        with pytest.raises(ConversionError, match=message):
            export_run(tmp_path / "run", tmp_path / "back", layout)
    with pytest.raises(CheckpointError, match="no such checkpoint; there are: step_00000000"):
        export_run(tmp_path / "run", tmp_path / "back", step=7)
    text = (tmp_path / "run" / "config.yaml").read_text()
    (tmp_path / "run" / "config.yaml").write_text(text.replace("ffn_hidden_size: 96", "ffn_hidden_size: 104"))
    with pytest.raises(
        CheckpointError, match=r"not a checkpoint of this model:(\n  misshapen: .*linear_fc[12].weight is .*){4}$"
    ):
        export_run(tmp_path / "run", tmp_path / "back")
    assert not (tmp_path / "back").exists() and not list(tmp_path.glob(".back*"))


def test_a_run_does_not_go_on_from_weights_alone(decoder, tmp_path):
    """It starts from them, in a directory of its own."""
    from training.toy_run import overrides, write_data

    from step_megatron.training.midtrain import midtrain

    folder, state = decoder
    # As many rows as the toy's tokenizer has ids.
    with_config(folder, vocab_size=320, max_position_embeddings=512)
    rows = torch.randn(320, 64, generator=torch.Generator().manual_seed(0)) * 0.05
    state = {name: rows.clone() if tensor.shape[0] == 131 else tensor for name, tensor in state.items()}
    save_file(state, folder / "model.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    write_data(data)
    import_model(folder, tmp_path / "run", tokenizer=data / "tokenizer")
    sizes = ("model=", "encoder=", "adaptor.", "data.", "megatron=", "tokenizer.")
    settings = [line for line in overrides(str(data), str(tmp_path / "new")) if not line.startswith(sizes)]
    settings += [f"data.sources=[{{name: sums, path: {data}/sums.jsonl}}]", "training.steps=2", "training.lr_warmup_steps=0"]
    settings += [f"model.weights={tmp_path / 'run'}", "megatron.optimizer.lr=1e-3"]
    with pytest.raises(CheckpointError, match="holds weights alone, .* model.weights"):
        midtrain(load_config(None, [*settings, f"run.dir={tmp_path / 'run'}"]))
    assert midtrain(load_config(None, settings))["steps"] == 2
    export_run(tmp_path / "new", tmp_path / "back")
    trained = foreign.tensors_of(tmp_path / "back")
    assert trained.keys() == state.keys()
    assert not torch.equal(trained["model.norm.weight"], state["model.norm.weight"])
    card = (tmp_path / "back" / "README.md").read_text()
    assert "checkpoint `step_00000002` of run `new`" in card and "started from the weights of `run`" in card
    assert "imported: `theirs` (layout qwen2), licence: unknown" in card
