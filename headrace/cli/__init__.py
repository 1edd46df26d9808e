"""The command line, `headrace`: commands by name, each in a module of its own.

A command's module is imported when the command runs or is helped with, so that
`headrace --help` is there at once.
"""

from __future__ import annotations

import importlib
from typing import Any

import click

from headrace import __version__
from headrace.errors import StartupError

COMMANDS = {
    "up": "headrace.cli.up:up",
    "down": "headrace.cli.down:down",
    "status": "headrace.cli.status:status",
    "chat": "headrace.cli.chat:chat",
    "bench": "headrace.cli.bench:bench",
    "models": "headrace.cli.models:models",
    "replay": "headrace.cli.replay:replay",
}


class _Commands(click.Group):
    """Imports a command at its first use; a StartupError is one line and exit status 1."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except StartupError as error:
            raise click.ClickException(str(error)) from error


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="headrace")
def main() -> None:
    """Headrace serves language models: a mesh of gateway, tokenizers, router and workers.

    \b
    headrace up                       start a mesh with the default model
    headrace chat "Why is the sky blue?"
    headrace status                   is it well?
    headrace bench --concurrency 1,8  how fast is it?
    headrace models list              what can it serve?
    headrace replay TRACE             what would a larger fleet do?

    Each command's --help has examples.
    """
