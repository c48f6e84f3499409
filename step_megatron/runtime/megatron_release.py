"""What depends on one Megatron-Core release, in one place: the version check, resets between layouts, default settings.

Everything else in this project uses Megatron-Core through names that its documentation keeps stable. The pinned release is the
newest that Python 3.11 gets.
"""

import importlib.metadata
import importlib.util
import warnings
from typing import Any

TESTED_RELEASE = "0.16.1"

# Fused helpers of Megatron that are compiled for, or only correct on, a GPU.
_CPU_TRANSFORMER = {
    "masked_softmax_fusion": False,
    "bias_activation_fusion": False,
    "bias_dropout_fusion": False,
    "apply_rope_fusion": False,
    "persist_layer_norm": False,
    "gradient_accumulation_fusion": False,
    "use_cpu_initialization": True,
    # Pipeline messages are synchronised with the device by default; gloo on a CPU has nothing to wait for.
    "batch_p2p_sync": False,
}


def check_version(installed: str | None = None) -> None:
    """Check that the Megatron-Core that is installed is the one this release of the project was tested with.

    Raises:
        ImportError: when it is missing or another release; the message holds the command that repairs it.
    """
    if installed is None:
        try:
            installed = importlib.metadata.version("megatron-core")
        except importlib.metadata.PackageNotFoundError:
            raise ImportError(f"megatron-core is not installed; run: pip install megatron-core=={TESTED_RELEASE}") from None
    if installed != TESTED_RELEASE:
        raise ImportError(
            f"megatron-core {installed} is installed, but step-megatron is tested with {TESTED_RELEASE} only; "
            f"run: pip install megatron-core=={TESTED_RELEASE}"
        )


def silence_import_warnings() -> None:
    """Keep Megatron from warning once per module that Transformer Engine and apex are absent: `step-megatron doctor` says it."""
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex are not installed", category=UserWarning)


def transformer_defaults(settings: dict[str, Any], on_cpu: bool) -> dict[str, Any]:
    """Complete `config.megatron.transformer` with what this release needs; a value that the user set is kept.

    Args:
        settings: fields of Megatron's `TransformerConfig`, as written in a recipe.
        on_cpu: whether the run is on the CPU, where fusions are off.

    Returns:
        A new dict with the defaults under `settings`.
    """
    defaults: dict[str, Any] = {
        # Packed micro-batches differ in length. Megatron 0.16 asks for this dispatcher beside it, even in a dense model.
        "variable_seq_lengths": True,
        "moe_token_dispatcher_type": "alltoall",
        # The loss is a sum over tokens divided by their number over all micro-batches and ranks.
        "calculate_per_token_loss": True,
    }
    if settings.get("virtual_pipeline_model_parallel_size"):
        # Overlapping messages are sent one by one; see `check_interleaving`.
        defaults |= {"overlap_p2p_comm": True, "batch_p2p_comm": False}
    if on_cpu:
        defaults |= _CPU_TRANSFORMER
    return defaults | settings


def check_recomputation(settings: dict[str, Any]) -> None:
    """Refuse what this release recomputes by Transformer Engine's means alone, where that is not installed.

    Raises:
        ValueError: names the key and what to use instead.
    """
    if "layernorm" in (settings.get("recompute_modules") or ()) and importlib.util.find_spec("transformer_engine") is None:
        raise ValueError(
            f"megatron.transformer.recompute_modules: Megatron-Core {TESTED_RELEASE} recomputes layernorm with Transformer "
            "Engine only, which is not installed; use core_attn, mlp, or recompute_granularity=full"
        )


def check_interleaving(settings: dict[str, Any]) -> None:
    """Refuse virtual stages on a pipeline of two without overlapping messages.

    Its stages are each other's next and previous one. Messages that are sent in one batch then arrive in each other's place:
    an activation of another micro-batch, which nothing notices when the two have the same length.

    Raises:
        ValueError: names the key.
    """
    virtual = settings.get("virtual_pipeline_model_parallel_size")
    if virtual and settings.get("pipeline_model_parallel_size") == 2 and not settings.get("overlap_p2p_comm"):
        raise ValueError(
            "megatron.transformer.overlap_p2p_comm=false: with virtual stages two pipeline stages mix up messages that do not "
            "overlap; set it to true (and batch_p2p_comm to false), or use more stages"
        )


def reset_globals() -> None:
    """Forget what Megatron keeps in module globals, so that another layout can be initialised in this process."""
    from megatron.core import parallel_state
    from megatron.core.num_microbatches_calculator import unset_num_microbatches_calculator
    from megatron.core.rerun_state_machine import destroy_rerun_state_machine

    unset_num_microbatches_calculator()
    destroy_rerun_state_machine()
    parallel_state.destroy_model_parallel()
