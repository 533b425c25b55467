"""Options that several commands take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

PATCHES = "A patch or PEFT LoRA folder, or a folder that holds such folders; may be given more than once."


MODEL = "A folder, a .safetensors or .gguf file, org/name[@revision] of the Hugging Face Hub, or builtin:smollm2-135m."


OutOption = Annotated[Path, typer.Option("--output", "-o", help="The folder to write.")]


JsonOption = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]


DryRunOption = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, and every reason not to.")]


OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="Replace the output where it exists.")]


HtmlOption = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write it as a page: one file, for a browser.")
]


QuietOption = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


OtherBaseOption = Annotated[
    bool, typer.Option("--allow-other-base", help="Go on though the patch belongs to another model.")
]


class DeviceName(StrEnum):
    """Where a model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[DeviceName, typer.Option("--device", help="auto takes a GPU where there is one.")]


DataOption = Annotated[Path, typer.Option("--data", help="A JSONL file, one row an object.")]
