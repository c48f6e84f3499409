"""Read, merge, check and write configurations.

`load_config(recipe, overrides)` merges, in rising order: defaults of the schema, the model preset that the recipe or an
override names (or the model that `model.weights` names), the recipe (YAML), the overrides (`key.path=value`, the value read as
YAML). An unknown key is an error that names the place and the nearest key that exists; a value of the wrong type is an error that
names the key, the value and the type expected.
"""

import copy
import dataclasses
import difflib
import os
import re
import types
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from step_megatron.config.schema import Config, ModelConfig
from step_megatron.runtime.files import replace_text

PRESETS = Path(__file__).parent / "presets"
RUN_CONFIG = "config.yaml"
# The fields of `megatron.transformer` that make a model: with another value its weights would not fit, or mean something else.
MODEL_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "layernorm_epsilon",
    "add_qkv_bias",
    "add_bias_linear",
    "gated_linear_unit",
    "activation_func",
    "qk_layernorm",
    "softmax_scale",
)

# What a layout adds to Megatron's configuration; one process has none of it.
LAYOUT_FIELDS = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "context_parallel_size",
    "sequence_parallel",
    "num_layers_in_first_pipeline_stage",
    "num_layers_in_last_pipeline_stage",
    "pipeline_model_parallel_layout",
    "account_for_embedding_in_pipeline_split",
    "account_for_loss_in_pipeline_split",
    "tp_comm_overlap",
)


class ConfigError(ValueError):
    """A configuration that cannot be used; the message says where and how to mend it."""


def load_config(recipe: str | Path | None = None, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Build a `Config` from a recipe file and `key=value` overrides.

    Args:
        recipe: YAML file, or None for the defaults.
        overrides: `section.key=value`; a value is YAML (`1e-4`, `true`, `[a, b]`, `{x: 1}`).

    Raises:
        ConfigError: unknown key, wrong type, unreadable YAML, unknown preset.
    """
    layers: list[tuple[str, dict]] = []
    if recipe is not None:
        layers.append((str(recipe), _read_yaml(Path(recipe))))
    layers.extend((f"override {text!r}", _parse_override(text)) for text in overrides)
    merged: dict = {}
    for origin, tree in layers:
        _check_keys(tree, Config, origin, "")
        merged = _merge(merged, tree)
    return _build(Config, _merge(_base(merged), merged), "")


def preset_tree(name: str) -> dict:
    """The YAML tree of a model preset, by name; nothing for the empty name.

    Raises:
        ConfigError: no such preset; lists those there are.
    """
    if not name:
        return {}
    path = PRESETS / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PRESETS.glob("*.yaml")))
        raise ConfigError(f"model.preset: no preset {name!r}; there are {known}")
    return _read_yaml(path)


def weights_tree(directory: str | Path) -> dict:
    """What a run or an imported model decides of a run that starts from it: sizes, encoder, adaptor, tokenizer, precision.

    Raises:
        ConfigError: no `config.yaml` there, or a damaged one.
    """
    path = Path(directory) / RUN_CONFIG
    if not path.is_file():
        raise ConfigError(f"model.weights: {path} is missing; give a run's directory, or one that `convert import` wrote")
    tree = _read_yaml(path)
    given = tree.get("megatron", {}).get("transformer", {})
    kept = {name: tree[name] for name in ("model", "encoder", "adaptor", "tokenizer") if name in tree}
    # Which parameters train is a matter of the run, not of the model.
    kept["model"] = {name: value for name, value in kept.get("model", {}).items() if name not in ("weights", "freeze")}
    fields = (*MODEL_FIELDS, "bf16", "params_dtype")
    return kept | {"megatron": {"transformer": {name: given[name] for name in fields if name in given}}}


def _base(given: dict) -> dict:
    """The layer under everything that is given: the sizes of the model that `model.weights` names, or the preset's."""
    model = given.get("model", {})
    if model.get("weights"):
        # A saved configuration names every field itself: it is read also where the weights it once started from are gone.
        saved = get_type_hints(ModelConfig).keys() <= model.keys()
        return {} if saved else weights_tree(model["weights"])
    return preset_tree(model.get("preset", Config().model.preset))


def to_dict(config: Config) -> dict:
    """The configuration as plain dictionaries, lists and scalars, ready for YAML or JSON."""
    return dataclasses.asdict(config)


def with_absolute_paths(config: Config) -> Config:
    """A copy whose files and folders are named from the root, so that it means the same in any working directory."""
    config = copy.deepcopy(config)
    named = [(config.run, "dir"), (config.tokenizer, "path"), (config.data, "index"), (config.audio, "cache_dir")]
    named += [(source, "path") for source in (*config.data.sources, *config.data.validation, *config.rl.prompts)]
    named += [(config.model, "weights"), (config.rl.judge, "run")]
    if config.encoder.weights != "random":
        named.append((config.encoder, "weights"))
    for section, name in named:
        value = getattr(section, name)
        setattr(section, name, os.path.abspath(value) if value else value)
    return config


def for_one_process(config: Config) -> Config:
    """The same model for one process on the device that is here; the given configuration stays as it is."""
    config = copy.deepcopy(config)
    for name in LAYOUT_FIELDS:
        config.megatron.transformer.pop(name, None)
    config.run.device = config.run.backend = "auto"
    return config


def save(config: Config, path: str | Path) -> None:
    """Write the resolved configuration as YAML; `load_config(path)` gives it back."""
    replace_text(Path(path), yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))


class _Loader(yaml.SafeLoader):
    """Safe YAML 1.2 in two points where PyYAML's 1.1 surprises: `1e-4` is a float, and `on`, `off`, `yes`, `no` are words."""

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag != "tag:yaml.org,2002:bool"]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))

_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+\.\d*|\.\d+|\d+)([eE][-+]?\d+)$|^[-+]?(\d+\.\d*|\.\d+)$|^[-+]?\.(inf|Inf)$|^\.(nan|NaN)$"),
    list("-+.0123456789"),
)


def _read_yaml(path: Path) -> dict:
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give --config an existing YAML file") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {error}") from error
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: the top level must be a mapping of sections, got {type(tree).__name__}")
    return tree


def _parse_override(text: str) -> dict:
    key, separator, value = text.partition("=")
    if not separator or not key.strip():
        raise ConfigError(f"override {text!r}: write key.path=value, for example training.steps=100")
    try:
        parsed = yaml.load(value, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(f"override {text!r}: the value is not valid YAML: {error}") from error
    tree: Any = parsed
    for part in reversed(key.strip().split(".")):
        tree = {part: tree}
    return tree


def _check_keys(tree: Any, kind: type, origin: str, prefix: str) -> None:
    """Refuse keys that the schema does not have, with the nearest one that it has."""
    if not isinstance(tree, dict):
        raise ConfigError(f"{origin}: {prefix.rstrip('.') or 'top level'} must be a mapping, got {tree!r}")
    hints = get_type_hints(kind)
    for key, value in tree.items():
        if key not in hints:
            near = difflib.get_close_matches(str(key), list(hints), n=1)
            hint = f"; did you mean {prefix}{near[0]}?" if near else f"; known here: {', '.join(hints)}"
            raise ConfigError(f"{origin}: unknown key {prefix}{key}{hint}")
        if dataclasses.is_dataclass(hints[key]):
            _check_keys(value, hints[key], origin, f"{prefix}{key}.")


def _merge(base: dict, top: dict) -> dict:
    merged = dict(base)
    for key, value in top.items():
        merged[key] = _merge(merged[key], value) if isinstance(value, dict) and isinstance(merged.get(key), dict) else value
    return merged


def _build(kind: Any, value: Any, where: str) -> Any:
    """Make a value of the annotated type, or say what was expected where."""
    if dataclasses.is_dataclass(kind):
        hints = get_type_hints(kind)
        _check_keys(value, kind, "configuration", f"{where}." if where else "")
        return kind(**{key: _build(hints[key], item, f"{where}.{key}".lstrip(".")) for key, item in value.items()})
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        if value not in arguments:
            raise ConfigError(f"{where}={value!r}: must be one of {', '.join(map(str, arguments))}")
        return value
    if origin in (Union, types.UnionType):
        return None if value is None else _build(next(a for a in arguments if a is not type(None)), value, where)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{where}={value!r}: must be a list")
        return [_build(arguments[0], item, f"{where}[{i}]") for i, item in enumerate(value)]
    if origin is dict:
        if not isinstance(value, dict):
            raise ConfigError(f"{where}={value!r}: must be a mapping")
        return value
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind:
        raise ConfigError(f"{where}={value!r}: must be {kind.__name__}, got {type(value).__name__}")
    return value
