"""What the commands share: how one is declared, and how it gets its configuration."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from step_megatron.config.schema import Config


def command(commands: Any, name: str, run: Callable, text: str) -> argparse.ArgumentParser:
    """Declare a command that calls `run(options)`; its exit status is what that returns, None being 0."""
    parser = commands.add_parser(name, help=text, description=text)
    parser.set_defaults(command=run)
    return parser


def with_config(parser: argparse.ArgumentParser) -> None:
    """Let a command take a recipe and settings."""
    parser.add_argument("--config", metavar="RECIPE", help="YAML recipe; see examples/recipes")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that replace the recipe's")


def config_of(options: argparse.Namespace) -> "Config":
    """The configuration of a command that was declared `with_config`."""
    from step_megatron.config import load_config

    return load_config(options.config, options.overrides)


def default_data() -> Path:
    """The folder of downloads, where the command line names none."""
    return Path(os.environ.get("STEP_DATA", "data"))
