"""Pipelines whose stages have unequal shares of the layers: the losses, gradients and parameters of one process.

The first stage carries the adaptor and the embeddings, the last one the output layer: fewer layers there even the stages out.
"""

import pytest
import torch
from parallel.layouts import load_and_train, train, train_and_save
from parallel.test_parallel_parity import check, furthest

PP2 = {"pipeline_model_parallel_size": 2}
FIRST_ONE = PP2 | {"num_layers_in_first_pipeline_stage": 1}
LAST_ONE = PP2 | {"num_layers_in_last_pipeline_stage": 1}
EMBEDDING_ALONE = PP2 | {"pipeline_model_parallel_layout": "E|ttttL"}
VIRTUAL = PP2 | {"virtual_pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "E|tt|t|tL"}
TP2_UNEVEN = FIRST_ONE | {"tensor_model_parallel_size": 2, "sequence_parallel": True}
# Six shares of work over two stages, were it even: embeddings, five layers; so two layers on the first stage, three on the last.
COUNTED = PP2 | {"num_layers": 5, "account_for_embedding_in_pipeline_split": True}
LAYOUTS = {
    "one-layer-first": (2, FIRST_ONE),
    "one-layer-last": (2, LAST_ONE),
    "embedding-alone": (2, EMBEDDING_ALONE),
    "virtual-stages": (2, VIRTUAL),
    "embedding-counted": (2, COUNTED),
    "tp2-sp": (4, TP2_UNEVEN),
}


@pytest.fixture(scope="module")
def one_process(worker_pool):
    """The run of one process, by number of layers."""
    return {n: worker_pool(1).run(train, {"transformer": {"num_layers": n}, "optimizer": "adam"})[0] for n in (4, 5)}


@pytest.mark.parametrize("layout", list(LAYOUTS))
def test_uneven_layout_equals_one_process(layout, worker_pool, one_process):
    processes, transformer = LAYOUTS[layout]
    results = worker_pool(processes).run(train, {"transformer": transformer, "optimizer": "adam"})
    check(results[0], one_process[transformer.get("num_layers", 4)], "adam")


@pytest.mark.parametrize(
    ("before", "after"),
    [(FIRST_ONE, {}), (FIRST_ONE, VIRTUAL), ({}, EMBEDDING_ALONE)],
    ids=["to-one-process", "uneven-to-uneven", "from-one-process"],
)
def test_checkpoints_move_to_and_from_uneven_layouts(before, after, worker_pool, tmp_path):
    kwargs = {"optimizer": "adam", "run_dir": str(tmp_path)}
    written = worker_pool(2 if before else 1).run(train_and_save, kwargs | {"transformer": before, "steps": 1})[0]
    resumed = worker_pool(2 if after else 1).run(load_and_train, kwargs | {"transformer": after})[0]
    assert furthest(resumed["saved"], written["saved"])[0] == 0
    assert resumed["line"]["loss"] == pytest.approx(written["line"]["loss"], rel=1e-6)
    assert furthest(resumed["after"], written["after"])[0] < 5e-5


def test_a_run_in_an_uneven_layout_is_exported_and_imported_into_another(worker_pool, tmp_path):
    from conversion.foreign import tensors_of
    from conversion.test_round_trip import TOKENS, logits
    from parallel.layouts import OPTIMIZERS, small_config
    from transformers import Qwen2ForCausalLM

    from step_megatron.config import save
    from step_megatron.conversion.exporting import export_run
    from step_megatron.conversion.importing import import_model
    from step_megatron.model.huggingface import to_huggingface

    kwargs = {"transformer": FIRST_ONE, "optimizer": "adam", "vocabulary": 131, "steps": 1, "run_dir": str(tmp_path / "run")}
    saved = worker_pool(2).run(train_and_save, kwargs)[0]["saved"]
    config = small_config(FIRST_ONE, OPTIMIZERS["adam"], vocabulary=131)
    config.model.preset = ""
    save(config, tmp_path / "run" / "config.yaml")
    export_run(tmp_path / "run", tmp_path / "out", "qwen2")
    decoder = {name.removeprefix("language_model."): tensor for name, tensor in saved.items()}
    exported = tensors_of(tmp_path / "out")
    expected = to_huggingface(decoder, transformer_of(config), tied=False)
    assert exported.keys() == expected.keys() and all(torch.equal(exported[name], expected[name]) for name in expected)
    import_model(tmp_path / "out", tmp_path / "again")
    result = worker_pool(2).run(logits, {"run_dir": tmp_path / "again", "transformer": EMBEDDING_ALONE})[-1]
    with torch.no_grad():
        theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "out")(TOKENS).logits
    torch.testing.assert_close(result, theirs, rtol=0, atol=1e-4)


def transformer_of(config):
    """Megatron's configuration in one process."""
    from step_megatron.config.load import for_one_process
    from step_megatron.model.decoder import transformer_config

    return transformer_config(for_one_process(config))
