"""What `export` says first: what was written for whom, and the commands that serve it and prove it. Pure."""

from typing import TYPE_CHECKING

from portllm.show.headline import Headline, command_line
from portllm.show.names import patch_name
from portllm.show.numbers import counted, percent

if TYPE_CHECKING:
    from portllm.exporting.export import Exported

PROVEN = ("vllm", "mistralrs", "llamacpp", "mlx")
"""Runtimes that `prove` starts itself; others are asked at their address."""


def decide(exported: "Exported", patch: str) -> Headline:
    """The sentence to act on.

    Args:
        exported: What was written.
        patch: What the user calls the patch.
    """
    record = exported.record
    kept = "" if record.kept_gain is None else f"; {percent(record.kept_gain, digits=2)} of it survives rounding"
    all_of = f"all of {patch_name(patch)} for {record.runtime}"
    text = f"Exported {all_of}: {counted(exported.n_modules, 'module')}{kept}."
    return Headline("good", text, (), "serve it", exported.serve)


def prove_command(exported: "Exported", patch: str, base: str | None) -> str:
    """What shows that the runtime serves the patch as it is; empty where `prove` does not start that runtime."""
    runtime = exported.record.runtime
    if runtime not in PROVEN:
        return ""
    how = ("--runtime", runtime, "--export", exported.given)
    return command_line("portllm", "prove", patch, "--base", base or "BASE", *how)
