"""The command `train`."""

from pathlib import Path
from typing import Annotated

import typer

from portllm.cli import options
from portllm.cli.data import DATA, CompletionOption, PromptFileOption, PromptOption, given_prompt, say_data
from portllm.cli.numbers import real, share, whole
from portllm.cli.terminal import print_json, say


def train(
    base: Annotated[str, typer.Option("--base", help=f"The model to fine-tune. {options.MODEL}")],
    data: Annotated[Path, typer.Option("--data", help=f"Training data. {DATA}")],
    output: options.Out,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    completion: CompletionOption = None,
    init_from: Annotated[
        Path | None, typer.Option("--init-from", help="Start from this patch of --base, such as a ported one.")
    ] = None,
    teacher: Annotated[
        Path | None, typer.Option("--teacher", help="Learn from this older patch's answers instead of --completion.")
    ] = None,
    teacher_base: Annotated[
        str | None, typer.Option("--teacher-base", help="The model the --teacher patch was made on.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            "--max-new-tokens", parser=whole(), help="Maximum number of tokens the teacher generates. Defaults to 32."
        ),
    ] = None,
    rank: Annotated[int | None, typer.Option(parser=whole(), help="LoRA rank. Defaults to 8.")] = None,
    alpha: Annotated[
        int | None,
        typer.Option(parser=whole(), help="LoRA alpha; the delta is scaled by alpha / rank. Defaults to 16."),
    ] = None,
    use_rslora: Annotated[
        bool, typer.Option("--use-rslora", help="Scale by alpha / sqrt(rank) (rank-stabilized LoRA).")
    ] = False,
    target_modules: Annotated[
        str | None, typer.Option(help="Comma-separated module names, or all-linear. Defaults to all-linear.")
    ] = None,
    learning_rate: Annotated[float, typer.Option(parser=real(), help="Peak learning rate.")] = 2e-4,
    epochs: Annotated[float, typer.Option(parser=real(), help="Number of passes over the data.")] = 3.0,
    steps: Annotated[
        int | None, typer.Option(parser=whole(), help="Number of optimizer steps, instead of --epochs.")
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=whole(), help="Rows per optimizer step.")] = 8,
    max_tokens: Annotated[
        int,
        typer.Option(parser=whole(least=2), help="Maximum tokens per row; longer prompts are truncated from the left."),
    ] = 512,
    dropout: Annotated[float, typer.Option(parser=share, help="LoRA dropout.")] = 0.0,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Trade about a third more time for less memory.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Random seed for initialization and row order.")] = 0,
    device: options.Device = options.DeviceName.AUTO,
    dry_run: options.DryRun = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Train a patch by LoRA, or refresh one on an evolved model.

    The loss covers completions only.
    """
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.progress import shown_progress
    from portllm.inspecting.inspect import summarize_patch, summary_to_json
    from portllm.patch.adapter_folder import load_patch
    from portllm.running.data import read_data
    from portllm.training.decision import decide
    from portllm.training.lessons import Teacher, read_labels, read_questions
    from portllm.training.settings import TrainSettings
    from portllm.training.text import render_training
    from portllm.training.train import Training

    if (teacher is None) != (teacher_base is None):
        raise typer.BadParameter("--teacher and --teacher-base must be used together.")
    if teacher is None and max_new_tokens is not None:
        raise typer.BadParameter("--max-new-tokens requires --teacher.")
    if teacher is not None and completion is not None:
        raise typer.BadParameter("--completion cannot be used with --teacher, whose answers are learned instead.")
    prompt = given_prompt(prompt, prompt_file)
    shape: dict[str, object] = {
        "rank": rank,
        "alpha": alpha,
        "target_modules": target_modules,
        "use_rslora": use_rslora or None,
    }
    given = {name: value for name, value in shape.items() if value is not None}
    if init_from is not None and given:
        raise typer.BadParameter(f"--{next(iter(given)).replace('_', '-')}: is fixed by --init-from. Omit it.")
    if init_from is None and teacher is None and (prompt is None) != (completion is None):
        raise typer.BadParameter("pass --prompt and --completion together.")
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
    start = None if init_from is None else load_patch(init_from)
    taught_by = None if teacher is None else load_patch(teacher)
    known = taught_by or start
    rows = read_data(
        data, *(() if known is None else (known,)), prompt=prompt, completion=completion, answers=teacher is None
    )
    old = None
    if taught_by is not None and teacher_base is not None:
        old = Teacher(open_checkpoint(teacher_base), taught_by, max_new_tokens or 32)
    training = Training(
        base=open_checkpoint(base),
        lesson=read_labels(rows) if old is None else read_questions(rows, old),
        settings=settings,
        start=start,
        out=output,
        overwrite=overwrite,
    )
    say_data(rows, labels=teacher is None, quiet=quiet)
    if dry_run:
        say(training.preview())
        return
    with shown_progress(quiet=quiet) as progress:
        _, report = training.run(device=device.value, progress=progress)
    summary = summarize_patch(output)
    if as_json:
        print_json({"patch": summary_to_json(summary), "training": {n: getattr(report, n) for n in report.__slots__}})
    else:
        headline = decide(report, str(output), base)
        say(render_training(summary, report, headline), tone=headline.tone)
