"""Commands that run a model: train, evaluate, demo."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli.options import (
    MODEL,
    DataOption,
    DeviceName,
    DeviceOption,
    DryRunOption,
    JsonOption,
    OutOption,
    OverwriteOption,
    QuietOption,
)
from portllm.cli.terminal import print_json, say

if TYPE_CHECKING:
    pass


def train(
    base: Annotated[str, typer.Option("--base", help=f"The model to fine-tune. {MODEL}")],
    data: DataOption,
    output: OutOption,
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", help="Template such as 'Question: {question} Type:'; else as another patch says."),
    ] = None,
    completion: Annotated[
        str | None, typer.Option("--completion", help="The field that holds what to answer; likewise.")
    ] = None,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="A patch of --base to train on, such as a ported one.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="An older patch; it answers the prompts, in place of --completion.")
    ] = None,
    teacher_base: Annotated[
        str | None, typer.Option("--teacher-base", help="The model that the older patch belongs to.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", min=1, help="That the teacher writes at most; 32.")
    ] = None,
    rank: Annotated[int | None, typer.Option(min=1, help="Inner size of the factors; 8.")] = None,
    alpha: Annotated[int | None, typer.Option(min=1, help="The scale is alpha / rank; 16.")] = None,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="The scale is alpha / sqrt(rank).")] = False,
    target_modules: Annotated[str | None, typer.Option(help="Names between commas, or all-linear, as else.")] = None,
    learning_rate: Annotated[float, typer.Option(help="At its peak.")] = 2e-4,
    epochs: Annotated[float, typer.Option(help="Times that every row is seen.")] = 3.0,
    steps: Annotated[int | None, typer.Option(min=1, help="Updates, instead of --epochs.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of an update.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=2, help="Of a row; a longer prompt loses its beginning.")] = 512,
    dropout: Annotated[float, typer.Option(min=0, help="Of the factors' inputs.")] = 0.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Less memory, a third more time.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of factors and row order.")] = 0,
    device: DeviceOption = DeviceName.AUTO,
    dry_run: DryRunOption = False,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """A first patch by LoRA fine-tuning, or a patch refreshed on an evolved model; the loss counts completions only."""
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.inspecting.inspect import summarize_patch, summary_to_json
    from portllm.patch.adapter_folder import load_patch
    from portllm.training.distil import Teacher
    from portllm.training.lora import TrainSettings
    from portllm.training.request import Training
    from portllm.training.text import render_training

    if (teacher is None) != (teacher_base is None):
        raise typer.BadParameter("--teacher and --teacher-base go together.")
    if teacher is None and max_new_tokens is not None:
        raise typer.BadParameter("--max-new-tokens goes with --teacher.")
    if teacher is not None and completion is not None:
        raise typer.BadParameter("--completion names answers to learn; with --teacher these are the teacher's.")
    shape: dict[str, object] = {
        "rank": rank,
        "alpha": alpha,
        "target_modules": target_modules,
        "use_rslora": use_rslora or None,
    }
    given = {name: value for name, value in shape.items() if value is not None}
    if init_from is not None and given:
        raise typer.BadParameter(f"--{next(iter(given)).replace('_', '-')}: is that of --init-from. Leave it out.")
    if init_from is None and teacher is None and (prompt is None or completion is None):
        raise typer.BadParameter("give --prompt and --completion.")
    if target_modules is not None and "," in target_modules:
        given["target_modules"] = tuple(target_modules.split(","))
    settings = TrainSettings(
        **given,  # type: ignore[arg-type]
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    training = Training(
        base=open_checkpoint(base),
        data=data,
        prompt=prompt,
        completion=completion,
        start=None if init_from is None else load_patch(init_from),
        teacher=None
        if teacher is None or teacher_base is None
        else Teacher(open_checkpoint(teacher_base), load_patch(teacher), max_new_tokens or 32),
        settings=settings,
        out=output,
        overwrite=overwrite,
    )
    if dry_run:
        say(training.preview())
        return
    with shown_progress(quiet=quiet) as progress:
        _, report = training.run(device=device.value, progress=progress)
    summary = summarize_patch(output)
    if as_json:
        print_json({"patch": summary_to_json(summary), "training": {n: getattr(report, n) for n in report.__slots__}})
    else:
        say(render_training(summary, report))
