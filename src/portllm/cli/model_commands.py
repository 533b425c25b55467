"""Commands that run a model: train, evaluate, demo."""

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli.main import (
    MODEL,
    DryRunOption,
    HtmlOption,
    JsonOption,
    OtherBaseOption,
    OutOption,
    OverwriteOption,
    QuietOption,
)
from portllm.cli.plain import print_json, say

if TYPE_CHECKING:
    from portllm.checkpoint.header import TensorInfo
    from portllm.comparison.scoring import Scored, Task
    from portllm.patch.patch import Patch


class DeviceName(StrEnum):
    """Where a model runs."""

    AUTO = "auto"
    CPU = "cpu"
    CUDA = "cuda"


DeviceOption = Annotated[DeviceName, typer.Option("--device", help="auto takes a GPU where there is one.")]
DataOption = Annotated[Path, typer.Option("--data", help="A JSONL file, one row an object.")]


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
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_models import render_training
    from portllm.cli.training import Training
    from portllm.live.train import TrainSettings
    from portllm.patch.adapter_folder import load_patch
    from portllm.pipeline.distil import Teacher
    from portllm.pipeline.inspect import summarize_patch, summary_to_json

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
        report = training.run(device=device.value, progress=progress)
    summary = summarize_patch(output)
    if as_json:
        print_json({"patch": summary_to_json(summary), "training": {n: getattr(report, n) for n in report.__slots__}})
    else:
        say(render_training(summary, report))


class Judging(StrEnum):
    """How answers are judged."""

    LABELS = "labels"
    TEXT = "text"


def evaluate(
    base: Annotated[str, typer.Option("--base", help=f"The model the patch was made on. {MODEL}")],
    patch: Annotated[Path, typer.Option("--patch", help="The patch.")],
    evolved: Annotated[str, typer.Option("--evolved", help="The later version of the base.")],
    ported: Annotated[Path, typer.Option("--ported", help="The patch carried over to it.")],
    data: Annotated[
        Path | None, typer.Option("--data", help="A JSONL file, one row an object; with --task, a folder of tasks.")
    ] = None,
    task: Annotated[
        str | None, typer.Option("--task", help="Of lm-evaluation-harness, such as sst2; without --data from the hub.")
    ] = None,
    retrained: Annotated[
        Path | None, typer.Option("--retrained", help="A patch trained on the evolved model; retention needs it.")
    ] = None,
    merged: Annotated[
        str | None, typer.Option("--merged", help="The evolved model with the ported patch in its weights.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Template; as in training where the patch says.")] = None,
    completion: Annotated[str | None, typer.Option(help="Field of the right answer; likewise.")] = None,
    judge: Annotated[Judging | None, typer.Option(help="labels, if not given: the likeliest; text: written.")] = None,
    labels: Annotated[str | None, typer.Option(help="Between commas; else the answers that occur.")] = None,
    max_tokens: Annotated[
        int | None, typer.Option(min=2, help="Of a row; a longer prompt loses its beginning. 512, or a --task's.")
    ] = None,
    max_new_tokens: Annotated[int | None, typer.Option(min=1, help="Written at most. 32, or a --task's.")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows of a forward pass.")] = 16,
    limit: Annotated[int | None, typer.Option(min=1, help="Use the first rows only.")] = None,
    seed: Annotated[int, typer.Option(help="Of the intervals' resampling.")] = 0,
    device: DeviceOption = DeviceName.AUTO,
    allow_other_base: OtherBaseOption = False,
    html: HtmlOption = None,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """Base, base + patch, evolved, evolved + ported (and retrained) on the same rows: score, loss, retention."""
    from portllm.checkpoint.reader import open_checkpoint
    from portllm.cli.pages import Page
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_models import render_comparison
    from portllm.patch.adapter_folder import load_patch
    from portllm.pipeline.evaluate import evaluate as evaluate_patch

    page = Page(html, overwrite=overwrite)
    old = load_patch(patch)
    bounds = {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens}
    given = {name: value for name, value in bounds.items() if value is not None}
    if task is not None:
        if any(option is not None for option in (prompt, completion, judge, labels)):
            raise typer.BadParameter("--task has its own --prompt, --completion, --judge and --labels.")
        from portllm.harness.source import HarnessRows

        rows: Scored = HarnessRows(task, data=data, score_rows=limit, batch_size=batch_size, **given)
    elif data is not None:
        rows = _rows_of_a_file(old, data, prompt, completion, judge, labels, limit, batch_size=batch_size, **given)
    else:
        raise typer.BadParameter("give --data, or --task.")
    with shown_progress(quiet=quiet) as progress:
        comparison = evaluate_patch(
            rows,
            base=open_checkpoint(base),
            patch=old,
            evolved=open_checkpoint(evolved),
            ported=load_patch(ported),
            retrained=None if retrained is None else load_patch(retrained),
            merged=None if merged is None else open_checkpoint(merged),
            allow_other_base=allow_other_base,
            device=device.value,
            seed=seed,
            progress=progress,
        )
    if page.is_wanted:
        from portllm.report.evaluate_page import evaluate_page

        page.write(evaluate_page(comparison, title=f"{patch} from {base} to {evolved}"))
    if as_json:
        print_json(comparison.to_json())
    else:
        say(render_comparison(comparison))


def _rows_of_a_file(
    patch: "Patch[TensorInfo]",
    data: Path,
    prompt: str | None,
    completion: str | None,
    judge: Judging | None,
    labels: str | None,
    limit: int | None,
    **bounds: int,
) -> "Task":
    from portllm.comparison.scoring import Task
    from portllm.live.examples import read_examples
    from portllm.pipeline.train import recorded_format

    examples = read_examples(data, recorded_format(patch, prompt=prompt, completion=completion))
    return Task(
        examples=tuple(examples[:limit]),
        kind=(judge or Judging.LABELS).value,
        labels=tuple(label.strip() for label in labels.split(",")) if labels else (),
        **bounds,
    )


def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="The folder for its files.")] = Path("portllm-demo"),
    as_json: JsonOption = False,
    quiet: QuietOption = False,
) -> None:
    """The whole story on a real small model, in minutes, on a CPU, offline; a second run reuses what is there."""
    from portllm.cli.progress import shown_progress
    from portllm.cli.render_demo import render_opening, render_step, render_story, story_to_json
    from portllm.demo.story import Step, tell

    def on_step(step: Step) -> None:
        if not as_json:
            say(render_step(step))

    if not as_json:
        say(render_opening(output))
    with shown_progress(quiet=quiet) as progress:
        story = tell(output, on_step=on_step, progress=progress)
    if as_json:
        print_json(story_to_json(story))
    else:
        say(render_story(story))
