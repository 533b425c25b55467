"""Options that several commands take."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli.numbers import points

PATCHES = "A patch, a PEFT LoRA adapter, or a folder of them. Can be repeated."

MODEL = "A folder, a .safetensors or .gguf file, a Hugging Face Hub id (org/name[@revision]), or builtin:smollm2-135m."

BASE = f"The model the patch was made on. {MODEL}"

Out = Annotated[Path, typer.Option("--output", "-o", help="Output folder.")]

Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]

DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Show what would be done, or why it cannot be, and write nothing.")
]

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output if it exists.")]

Card = Annotated[
    bool,
    typer.Option(
        "--card", help="Add the result to the model card (README.md) of the patch, ported patch or merged model."
    ),
]
Html = Annotated[
    Path | None, typer.Option("--html", metavar="FILE", help="Also write the report as a self-contained HTML page.")
]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Do not show progress.")]

OtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Accept a model other than the one the patch was made on.")
]

TrainingData = Annotated[
    bool, typer.Option("--allow-training-data", help="Accept the file that a patch was trained on.")
]

MaxLoss = Annotated[
    float | None,
    typer.Option(
        "--max-loss",
        metavar="POINTS",
        parser=points,
        help="The loss of accuracy that you can accept, in percentage points, such as 2 or 2%. Exits with 3 unless the "
        "loss is shown to be within it.",
    ),
]


class DeviceName(StrEnum):
    """Where a model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


Device = Annotated[DeviceName, typer.Option("--device", help="Device to run on; auto uses a GPU if there is one.")]
