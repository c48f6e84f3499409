"""Megatron's sharded state as items to write: which part of it is this rank's, and the index of them all.

Of Megatron's `save` this is the planning; its writing is replaced by `checkpoint.writing`, for it forks writers, starts a manager
process for their results (seconds of every rank; a hang where the main module is not guarded), writes `common.pt` on one rank in
the middle of collectives (a full disk hangs the others), and its asynchronous form divides by the number of GPUs.
"""

import dataclasses
import io
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing.serialization import _CONTENT_METADATA_KEY
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from step_megatron.runtime.agreement import Ranks


@dataclass(frozen=True)
class WritePlan:
    """What a save has to write.

    Attributes:
        items: this rank's parts, with their values: tensors of the training itself, or bytes.
        common: everything beside them, as `torch.save` writes it; of the first rank.
        metadata: which tensor has which parts, without the places in files; on the first rank, None on the others.
    """

    items: list[tuple[WriteItem, torch.Tensor | io.BytesIO]]
    common: bytes
    metadata: Metadata | None


class WritePlanner:
    """Plans the saves of a run. The index is made anew, from every rank's parts, only when some rank's parts have changed."""

    def __init__(self, ranks: Ranks):
        self._ranks = ranks
        self._parts: SavePlan | None = None
        self._metadata: Metadata | None = None

    def plan(self, state: dict[str, Any], layout: dict[str, Any]) -> WritePlan:
        """Plan the writing of a sharded state; collective.

        Args:
            state: as `sharded_state_dict` makes it, and plain values; used up.
            layout: how it was made, for the reader.
        """
        first = self._parts is None
        sharded, common = save_preprocess(state | {_CONTENT_METADATA_KEY: dict(layout)}, validate_access_integrity=first)
        by_key, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(by_key), is_coordinator=self._ranks.rank == 0)
        parts = planner.create_local_plan()
        if any(self._ranks.gather_all(parts != self._parts)):
            everyone = self._ranks.gather(parts)
            self._parts, self._metadata = parts, planner.create_global_plan(everyone)[1] if everyone else None
        return WritePlan(
            [(item, planner.resolve_data(item)) for item in parts.items],
            saved_bytes(common) if self._ranks.rank == 0 else b"",
            self._metadata and dataclasses.replace(self._metadata),
        )


def saved_bytes(value: Any) -> bytes:
    """What `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()
