"""The record of a run, `config.yaml` and `run.json`, and what a run that goes on may change of it."""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from step_megatron.config import load_config, save, with_absolute_paths
from step_megatron.config.load import MODEL_FIELDS, RUN_CONFIG, ConfigError, to_dict
from step_megatron.config.schema import Config
from step_megatron.runtime.device import Runtime
from step_megatron.runtime.files import replace_text
from step_megatron.runtime.progress import get_logger

# What makes the model: with another value a checkpoint's weights would not fit, or would mean something else, without an error.
_MODEL = ("model.", "encoder.", "adaptor.", "tokenizer.")
_MODEL_FIELDS = tuple(f"megatron.transformer.{name}" for name in MODEL_FIELDS)
# The torch layers and Transformer Engine's read the same checkpoint; where a run began is past when it goes on.
_EXCEPT = ("model.layers", "model.weights")

RUN_RECORD = "run.json"

logger = get_logger(__name__)


def write_record(config: Config, runtime: Runtime) -> None:
    """Write `config.yaml` and `run.json` into the run directory."""
    folder = Path(config.run.dir)
    folder.mkdir(parents=True, exist_ok=True)
    # Evaluation and chat read it from wherever they are started.
    save(with_absolute_paths(config), folder / RUN_CONFIG)
    packages = ("step-megatron", "torch", "megatron-core", "numpy", "nvidia-dali-cuda130")
    record = {
        "versions": {"python": platform.python_version(), **{name: _version(name) for name in packages}},
        "device": str(runtime.device.type),
        "backend": runtime.backend,
        "layout": _layout(runtime),
        "seed": config.run.seed,
    }
    replace_text(folder / RUN_RECORD, json.dumps(record, indent=2) + "\n")


def check_record(config: Config, runtime: Runtime) -> None:
    """Hold the settings of a run that goes on from a checkpoint against those it recorded; rank 0 names every difference.

    Raises:
        ConfigError: a difference in the model, or in what is needed to read it; names the key.
    """
    path = Path(config.run.dir) / RUN_CONFIG
    for key, (old, new) in changed_settings(config).items():
        if key not in _EXCEPT and (key.startswith(_MODEL) or key in _MODEL_FIELDS):
            raise ConfigError(
                f"{key} is {new!r}, but this run was made with {old!r}: its checkpoints are of that model; restore the setting, "
                f"or start a new run in another run.dir (if a file has only moved, write its new place into {path})"
            )
        if runtime.rank == 0:
            logger.warning("going on with %s=%r, it was %r until now", key, new, old)
    _compare_layout(path.with_name(RUN_RECORD), runtime)


def changed_settings(config: Config) -> dict[str, tuple[Any, Any]]:
    """The settings that the run of `config.run.dir` recorded otherwise: key -> (value then, value now); none without a record."""
    path = Path(config.run.dir) / RUN_CONFIG
    if not path.is_file():
        return {}
    before, now = _flat(to_dict(load_config(path))), _flat(to_dict(with_absolute_paths(config)))
    values = {key: (before.get(key), now.get(key)) for key in sorted(before.keys() | now.keys())}
    return {key: (old, new) for key, (old, new) in values.items() if old != new}


def _compare_layout(path: Path, runtime: Runtime) -> None:
    """Say it where a run goes on in another layout: then it goes on in the same way, but not with the same bits."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["layout"]
    except (OSError, ValueError, KeyError):
        # Only told to the reader; nothing depends on it.
        return
    now = _layout(runtime)
    if before != now and runtime.rank == 0:
        logger.warning(
            "going on in the layout %s, it was %s until now: the results are the same up to rounding, not to the bit", now, before
        )


def _layout(runtime: Runtime) -> dict[str, int]:
    return {name: getattr(runtime, f"{name}_size") for name in ("tp", "pp", "cp", "dp")}


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with keys as they are written on the command line."""
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
