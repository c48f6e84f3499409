"""What the optimizer refuses is said on every rank, though one rank alone may see it."""

import pytest
from parallel.layouts import OPTIMIZERS, small_config

STAGES = {
    "first": ("adaptor.*", "language_model.embedding.*", "language_model.decoder.layers.[01].*"),
    "last": ("language_model.decoder.layers.[23].*", "*final_layernorm*", "language_model.output_layer.*"),
}


def build_frozen(rank, world_size, *, freeze, distributed):
    from step_megatron.config.load import ConfigError
    from step_megatron.runtime.device import initialize
    from step_megatron.training.state import build_state

    ddp = {"use_distributed_optimizer": distributed}
    config = small_config({"pipeline_model_parallel_size": 2}, OPTIMIZERS["adam"], ddp, freeze)
    runtime = initialize(config)
    try:
        build_state(config, runtime.control_group)
    except ConfigError as error:
        return str(error)
    return "built"


@pytest.mark.parametrize("stage", STAGES)
def test_a_frozen_stage_under_the_distributed_optimizer_is_refused_by_all_ranks(stage, worker_pool):
    said = worker_pool(2).run(build_frozen, {"freeze": STAGES[stage], "distributed": True})
    assert said[0] == said[1] and "use_distributed_optimizer: model.freeze leaves a pipeline stage nothing to train" in said[0]
    assert worker_pool(2).run(build_frozen, {"freeze": STAGES[stage], "distributed": False}) == ["built", "built"]
