"""Commands that run a model: train, evaluate, demo."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from portllm.cli.main import MODEL, DryRunOption, JsonOption, OutOption, OverwriteOption, QuietOption, app, print_json


class DeviceName(StrEnum):
    """Where a model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[DeviceName, typer.Option("--device", help="auto takes a GPU where there is one.")]
DataOption = Annotated[Path, typer.Option("--data", help="A JSONL file, one row an object.")]


@app.command()
def train(
    base: Annotated[str, typer.Option("--base", help=f"The model to fine-tune. {MODEL}")],
    data: DataOption,
    prompt: Annotated[str, typer.Option("--prompt", help="Template such as 'Question: {question} Type:'.")],
    completion: Annotated[str, typer.Option("--completion", help="The field that holds what to answer.")],
    output: OutOption,
    rank: Annotated[int, typer.Option(min=1, help="Inner size of the factors.")] = 8,
    alpha: Annotated[int, typer.Option(min=1, help="The scale is alpha / rank.")] = 16,
    use_rslora: Annotated[bool, typer.Option("--use-rslora", help="The scale is alpha / sqrt(rank).")] = False,
    target_modules: Annotated[str, typer.Option(help="Names between commas, or all-linear.")] = "all-linear",
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
    """A first patch by LoRA fine-tuning; the loss counts the completion only."""
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.checkpoint.writer import check_free
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_models import render_training
    from portllm.live.examples import ExampleFormat, read_examples
    from portllm.live.train import TrainSettings
    from portllm.pipeline.inspect import summarize_patch, summary_to_json
    from portllm.pipeline.train import model_folder
    from portllm.pipeline.train import train as train_patch

    settings = TrainSettings(
        rank=rank,
        alpha=alpha,
        use_rslora=use_rslora,
        target_modules=tuple(target_modules.split(",")) if "," in target_modules else target_modules,
        learning_rate=learning_rate,
        epochs=epochs,
        steps=steps,
        batch_size=batch_size,
        max_tokens=max_tokens,
        dropout=dropout,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
    )
    fmt = ExampleFormat(prompt=prompt, completion=completion)
    model = open_checkpoint(base)
    if dry_run:
        rows = read_examples(data, fmt)
        model_folder(model)
        check_free(output, overwrite=overwrite)
        typer.echo(f"would train a patch of {model.name} on {len(rows)} rows; the first:\n{rows[0]}\nto {output}")
        return
    with shown_progress(quiet=quiet) as progress:
        _, report = train_patch(
            model,
            data=data,
            fmt=fmt,
            out=output,
            settings=settings,
            device=device.value,
            overwrite=overwrite,
            progress=progress,
        )
    summary = summarize_patch(output)
    if as_json:
        print_json({"patch": summary_to_json(summary), "training": {n: getattr(report, n) for n in report.__slots__}})
    else:
        typer.echo(render_training(summary, report))
