"""Which layouts generate, and the mode that a model is in meanwhile."""

from collections.abc import Iterator
from contextlib import contextmanager

from step_megatron.model.audio_lm import AudioLanguageModel


def check_layout(model: AudioLanguageModel) -> None:
    """Refuse a pipelined model.

    Raises:
        ValueError: says why, and the nearest layout that works.
    """
    config = model.config
    stages, tensor = config.pipeline_model_parallel_size, config.tensor_model_parallel_size
    if model.pre_process and model.post_process:
        return
    wider = tensor * stages
    fits = not (config.num_query_groups % wider or config.num_attention_heads % wider or config.ffn_hidden_size % wider)
    nearest = wider if fits else tensor
    raise ValueError(
        "generation needs the whole decoder on one pipeline stage, for every new token would wait for all stages in turn; the "
        f"nearest layout is megatron.transformer.pipeline_model_parallel_size=1 with tensor_model_parallel_size={nearest} "
        "(checkpoints load in any layout)"
    )


@contextmanager
def generation_mode(model: AudioLanguageModel) -> Iterator[None]:
    """Evaluation mode without sequence parallelism, which cannot split the few tokens of a decoding step."""
    training, split = model.training, model.config.sequence_parallel
    holders = [module for module in model.modules() if getattr(module, "sequence_parallel", False)]
    try:
        model.eval()
        model.config.sequence_parallel = False
        for module in holders:
            module.sequence_parallel = False
        yield
    finally:
        for module in holders:
            module.sequence_parallel = True
        model.config.sequence_parallel = split
        model.train(training)
