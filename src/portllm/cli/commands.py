"""The commands of the program, each imported when it is asked for, so that none waits for the others."""

from importlib import import_module
from typing import Any

import typer
from typer.core import TyperGroup

COMMANDS = (
    "demo",
    "inspect",
    "train",
    "capture",
    "check",
    "port",
    "merge",
    "combine",
    "evaluate",
    "certify",
    "export",
    "prove",
    "verify",
    "sign",
    "fleet",
    "doctor",
    "study",
)
"""In the order in which a patch goes through them, which is that of `--help`; each is in the module of its name."""


class Commands(TyperGroup):
    """The group of all of them."""

    def list_commands(self, ctx: object) -> list[str]:
        """Their names."""
        del ctx
        return [*COMMANDS]

    def get_command(self, ctx: object, cmd_name: str) -> Any:  # noqa: ANN401 (a class of click's, of which typer has a copy)
        """One of them; where there is none of the name, all are loaded, to say which was meant."""
        del ctx
        for name in (cmd_name,) if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands[name] = _load(name)
        return self.commands.get(cmd_name)


def _load(name: str) -> Any:  # noqa: ANN401 (as above)
    found = getattr(import_module(f"portllm.cli.{name}"), name)
    if not isinstance(found, typer.Typer):
        found, function = typer.Typer(add_completion=False, rich_markup_mode=None), found
        found.command()(function)
    return typer.main.get_command(found)
