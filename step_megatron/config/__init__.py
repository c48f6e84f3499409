"""Typed configuration: dataclasses are the schema, YAML presets and recipes fill them, unknown keys are errors."""

from step_megatron.config.load import ConfigError, load_config, preset_tree, save, to_dict, with_absolute_paths
from step_megatron.config.schema import Config

__all__ = ["Config", "ConfigError", "load_config", "preset_tree", "save", "to_dict", "with_absolute_paths"]
