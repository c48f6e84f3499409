"""The batch of a step that was out of order, on disk: what a replica's model read, so that `training.replay` can run it again.

    RUN/anomalies/0001_step_00000012_rank_0/model.safetensors   tensors of every micro-batch, audio features included
    RUN/anomalies/0001_step_00000012_rank_0/batch.json          samples, clips, loss of each sample, why, seed, layout

One folder for each data-parallel replica, named after the anomaly's number, the step and the replica's first rank. No pickle.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from step_megatron.audio.cache import EncodedClip
from step_megatron.checkpoint.safetensors_files import SafetensorsError, SafetensorsFiles, TensorInfo, write_safetensors
from step_megatron.data.aspects import LossGroup
from step_megatron.data.micro_batch import MicroBatch
from step_megatron.data.template import AudioSpan
from step_megatron.errors import UserError
from step_megatron.runtime.device import Runtime
from step_megatron.runtime.folders import whole_folder
from step_megatron.runtime.metrics import strict_number
from step_megatron.runtime.progress import get_logger
from step_megatron.training.batch import TrainingBatch, local_tokens

FOLDER = "anomalies"
_RECORD = "batch.json"
_FEATURES = "audio_features"

logger = get_logger(__name__)


class DumpError(UserError, ValueError):
    """A folder that holds no batch, or a damaged one."""


@dataclass(frozen=True)
class DumpedBatch:
    """A replica's part of one step.

    Attributes:
        record: `step`, `rank`, `reason` and the like; `micro_batches[i]["losses"]` are the samples' mean losses at that time.
        clips: by address, as `batch.to_device` takes them; None for one that failed then.
    """

    record: dict[str, Any]
    micro_batches: list[MicroBatch]
    clips: dict[str, EncodedClip | None]


def write_batch(
    run_dir: str | Path, batches: list[TrainingBatch], losses: list[list[float | None]], runtime: Runtime, record: dict[str, Any]
) -> Path:
    """Write this replica's micro-batches; its first rank does, every rank gets the folder's path.

    Args:
        losses: mean loss of every sample of every micro-batch (`sample_losses`).
        record: what else `batch.json` tells; its `number` and `step` name the folder.
    """
    first = dist.get_global_rank(runtime.control_group, 0)
    folder = Path(run_dir) / FOLDER / f"{record['number']:04d}_step_{record['step']:08d}_rank_{first}"
    if runtime.rank != first:
        return folder
    tensors: dict[str, torch.Tensor] = {}
    told = []
    for number, (batch, of_samples) in enumerate(zip(batches, losses, strict=True)):
        parts, plain = _parts(batch)
        tensors |= {f"{number}.{name}": part for name, part in parts.items()}
        told.append(plain | {"losses": [strict_number(loss) for loss in of_samples], "failed": list(batch.failed)})
    layout = {name: getattr(runtime, f"{name}_size") for name in ("tp", "pp", "cp", "dp")}
    infos = {name: TensorInfo(tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    text = json.dumps(
        record | {"rank": first, "layout": layout, "micro_batches": told}, ensure_ascii=False, allow_nan=False, indent=1
    )
    try:
        with whole_folder(folder) as partial:
            write_safetensors(partial, infos, tensors.__getitem__)
            (partial / _RECORD).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        # Not worth the run, and this rank must not end alone.
        logger.error("%s: the batch could not be written down: %s", folder, error)
    return folder


def _parts(batch: TrainingBatch) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The tensors of a micro-batch, and the rest of it as JSON values."""
    values = vars(batch.micro_batch)
    tensors = {name: value for name, value in values.items() if isinstance(value, torch.Tensor)}
    if batch.model.audio_features is not None:
        tensors[_FEATURES] = batch.model.audio_features.cpu()
    plain = {name: value for name, value in values.items() if not isinstance(value, torch.Tensor)}
    for name in ("audio", "groups"):
        plain[name] = [dataclasses.asdict(item) for item in plain[name]]
    return tensors, plain


def read_batch(folder: Path) -> DumpedBatch:
    """What `write_batch` wrote.

    Raises:
        DumpError: nothing of the kind there, or damaged; names the file.
    """
    try:
        record = json.loads((folder / _RECORD).read_text(encoding="utf-8"))
        files = SafetensorsFiles(folder)
        micro_batches, clips = [], {}
        for number, told in enumerate(record["micro_batches"]):
            tensors = {
                name.partition(".")[2]: files.read(name) for name in files.tensors if name.partition(".")[0] == str(number)
            }
            features = tensors.pop(_FEATURES, None)
            micro_batches.append(_micro_batch(told, tensors))
            clips |= _clips(micro_batches[-1], features, told["failed"])
    except FileNotFoundError as error:
        raise DumpError(f"{error.filename}: no such file; give a folder of RUN/{FOLDER}") from error
    except (SafetensorsError, KeyError, TypeError, ValueError) as error:
        raise DumpError(f"{folder}: not a batch that a run wrote down, or a damaged one: {error!r}") from error
    return DumpedBatch(record, micro_batches, clips)


def _micro_batch(told: dict[str, Any], tensors: dict[str, torch.Tensor]) -> MicroBatch:
    plain = {name: tuple(told[name]) for name in ("segment_lengths", "encoder_frames", "sample_ids")}
    audio = tuple(AudioSpan(**span) for span in told["audio"])
    groups = tuple(LossGroup(**group) for group in told["groups"])
    return MicroBatch(**tensors, **plain, audio=audio, groups=groups, padding=told["padding"])


def _clips(micro_batch: MicroBatch, features: torch.Tensor | None, failed: list[str]) -> dict[str, EncodedClip | None]:
    """The clips again from the features of their chunks, which lie back to back in the order of the placeholders."""
    clips: dict[str, EncodedClip | None] = {}
    chunks: dict[str, dict[int, torch.Tensor]] = {}
    pieces = () if features is None else features.split(list(micro_batch.encoder_frames))
    for span, piece in zip(micro_batch.audio, pieces, strict=features is not None):
        chunks.setdefault(span.address, {})[span.chunk] = piece
    for address, parts in chunks.items():
        ordered = [parts[chunk] for chunk in sorted(parts)]
        clips[address] = EncodedClip(torch.cat(ordered), tuple(len(part) for part in ordered))
    return clips | dict.fromkeys(failed)


def sample_losses(
    batches: list[TrainingBatch], reports: list[dict[str, torch.Tensor]], runtime: Runtime
) -> list[list[float | None]]:
    """Mean loss over the trained tokens of every sample of every micro-batch, None where it has none; collective over a replica.

    Args:
        reports: of the schedule, one for each micro-batch on last-stage ranks, none on others.
    """
    sums = [torch.zeros(len(batch.micro_batch.segment_lengths), 2, dtype=torch.float64) for batch in batches]
    for own, batch, report in zip(sums, batches, reports, strict=False) if runtime.tp_rank == 0 else ():
        places = local_tokens(batch.micro_batch, runtime)[batch.model.predicted.cpu()]
        segment = torch.searchsorted(batch.micro_batch.cu_seqlens.long(), places, right=True) - 1
        mask, losses = batch.loss_mask[0].cpu(), report["losses"][0].cpu()
        # Not a product: a masked token's loss may be anything.
        own.index_add_(0, segment, torch.stack((torch.where(mask > 0, losses, 0.0), mask), dim=1).double())
    together = torch.cat(sums)
    dist.all_reduce(together, group=runtime.control_group)
    means = [(total / tokens) if tokens else None for total, tokens in together.tolist()]
    ends = [len(own) for own in sums]
    return [means[sum(ends[:i]) : sum(ends[: i + 1])] for i in range(len(ends))]
