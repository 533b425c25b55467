"""What `export` says first: what was written for whom, and the command that serves it. Pure."""

from typing import TYPE_CHECKING

from portllm.show.headline import Headline
from portllm.show.names import patch_name
from portllm.show.numbers import counted, percent

if TYPE_CHECKING:
    from portllm.exporting.export import Exported


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
