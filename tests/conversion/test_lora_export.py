"""A run with LoRA leaves as plain weights and as peft's adapter, and both compute in transformers what it computes here."""

import json
from contextlib import closing

import pytest
import torch
from conversion import foreign

from step_megatron.config import load_config, save
from step_megatron.conversion.exporting import export_run
from step_megatron.conversion.importing import import_model
from step_megatron.conversion.sources import ConversionError

TOKENS = torch.randint(0, 130, (1, 20), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _runtime_ends():
    from step_megatron.runtime.device import shutdown

    yield
    shutdown()


def adapted_run(folder, imported, targets):
    """A run that started from an import, with adapters that are not zero; its configuration and logits."""
    from step_megatron.checkpoint.saving import Checkpoints
    from step_megatron.model.batch import make_batch
    from step_megatron.model.lora import is_adapter
    from step_megatron.runtime.device import initialize, shutdown
    from step_megatron.training.state import build_state

    lora = f"model.lora={{rank: 4, alpha: 6, targets: [{', '.join(targets)}]}}"
    given = [f"model.weights={imported}", lora, f"run={{dir: {folder}, threads: 1, device: cpu}}", "megatron.optimizer.lr=1e-3"]
    config = load_config(None, given)
    initialize(config)
    state = build_state(config)
    model = state.model[0].module
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        before = model(make_batch(TOKENS, [20]))
        for name, parameter in model.named_parameters():
            if is_adapter(name):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        logits = model(make_batch(TOKENS, [20]))
    with closing(Checkpoints(folder)) as checkpoints:
        checkpoints.save(3, state.model, state.optimizer, state.scheduler, {})
    save(config, folder / "config.yaml")
    shutdown()
    return before, logits


@pytest.mark.parametrize(
    ("kind", "targets"), [("qwen2", ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")), ("llama", ("linear_qkv",))]
)
def test_merged_weights_and_pefts_adapter_compute_the_same(kind, targets, tmp_path):
    from peft import PeftModel

    theirs = foreign.text_model(tmp_path / "theirs", kind)
    import_model(tmp_path / "theirs", tmp_path / "run")
    before, logits = adapted_run(tmp_path / "lora", tmp_path / "run", targets)
    export_run(tmp_path / "lora", tmp_path / "merged")
    summary = export_run(tmp_path / "lora", tmp_path / "adapter", adapter=True)
    assert all(name.startswith("adaptor.") for name in summary["left_out"]) and summary["left_out"]
    with torch.no_grad():
        torch.testing.assert_close(before, theirs(TOKENS).logits, rtol=0, atol=1e-4)
        merged = type(theirs).from_pretrained(tmp_path / "merged")(TOKENS).logits
        with_adapter = PeftModel.from_pretrained(theirs, tmp_path / "adapter")(TOKENS).logits
    scale = logits.abs().max()
    assert (logits - before).abs().max() > 0.1 * scale, "the adapters have to matter"
    assert (merged - logits).abs().max() < 1e-6 * scale
    assert (with_adapter - logits).abs().max() < 1e-6 * scale
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == "theirs" and (written["r"], written["lora_alpha"]) == (4, 6)


def test_a_run_without_adapters_has_none_to_export(tmp_path):
    foreign.text_model(tmp_path / "theirs", "qwen2")
    import_model(tmp_path / "theirs", tmp_path / "run")
    with pytest.raises(ConversionError, match="without LoRA"):
        export_run(tmp_path / "run", tmp_path / "out", adapter=True)
