"""The command `evaluate`."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli import options
from portllm.cli.data import (
    DATA,
    CompletionOption,
    PromptFileOption,
    PromptOption,
    given_prompt,
    say_data,
    say_templates,
)
from portllm.cli.numbers import whole
from portllm.cli.terminal import print_json, say, width_of

if TYPE_CHECKING:
    from portllm.evaluating.scoring import Scored


class Computing(StrEnum):
    """What models compute in."""

    AUTO = "auto"
    FLOAT32 = "float32"


class Judging(StrEnum):
    """How answers are judged."""

    LABELS = "labels"
    TEXT = "text"


def evaluate(
    base: Annotated[str, typer.Option("--base", help=options.BASE)],
    patch: Annotated[Path, typer.Option("--patch", help="The patch.")],
    evolved: Annotated[str, typer.Option("--evolved", help="The updated base.")],
    ported: Annotated[
        list[Path],
        typer.Option(
            "--ported",
            help="The patch ported to the evolved model. Given again: other ports of it, such as by another method, "
            "set beside the first, which the verdict is on.",
        ),
    ],
    data: Annotated[
        Path | None, typer.Option("--data", help=f"Test data. {DATA} With --task, a folder of task data.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(
            "--task",
            help="A task of lm-evaluation-harness, such as sst2; its data comes from the Hub unless --data is given.",
        ),
    ] = None,
    retrained: Annotated[
        Path | None, typer.Option("--retrained", help="A patch retrained on the evolved model; retention needs it.")
    ] = None,
    merged: Annotated[
        str | None, typer.Option("--merged", help="The evolved model with the ported patch merged in.")
    ] = None,
    prompt: PromptOption = None,
    prompt_file: PromptFileOption = None,
    completion: CompletionOption = None,
    judge: Annotated[
        Judging | None,
        typer.Option(help="labels picks the likeliest label; text compares generated text. Defaults to labels."),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Comma-separated labels. Defaults to the answers that occur in the data.")
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(
            parser=whole(least=2),
            help="Maximum tokens per row; longer prompts are truncated from the left. Defaults to 512, or the task's.",
        ),
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(parser=whole(), help="Maximum number of tokens to generate. Defaults to 32, or the task's."),
    ] = None,
    batch_size: Annotated[int, typer.Option(parser=whole(), help="Rows per forward pass.")] = 16,
    limit: Annotated[int | None, typer.Option(parser=whole(), help="Use only the first N rows.")] = None,
    max_loss: options.MaxLoss = None,
    seed: Annotated[int, typer.Option(help="Random seed for the bootstrap behind retention's intervals.")] = 0,
    device: options.Device = options.DeviceName.AUTO,
    dtype: Annotated[
        Computing,
        typer.Option(
            help="Dtype to compute in. auto is the stored one if the processor supports it; float32 leaves fewer "
            "answers to rounding."
        ),
    ] = Computing.AUTO,
    allow_other_base: options.OtherBase = False,
    allow_training_data: options.TrainingData = False,
    html: options.Html = None,
    card: options.Card = False,
    overwrite: options.Overwrite = False,
    as_json: options.Json = False,
    quiet: options.Quiet = False,
) -> None:
    """Compare models with and without a patch on the same rows.

    Scores base, base + patch, evolved, evolved + ported (and retrained). Says first what the update cost. Exits with 3
    if --max-loss is given and the interval of the loss reaches beyond it. --ported can be given for
    each of several ports, such as by add and by align.
    """
    from portllm.checkpoint.open import open_checkpoint
    from portllm.cli.cards import Cards
    from portllm.cli.pages import Page, named, written
    from portllm.cli.progress import shown_progress
    from portllm.evaluating.decision import Compared, decide, points_text, within
    from portllm.evaluating.evaluate import evaluate as evaluate_patch
    from portllm.evaluating.file_rows import FileRows
    from portllm.patch.adapter_folder import load_patch
    from portllm.show.names import patch_name

    prompt = given_prompt(prompt, prompt_file)
    page = Page(html, overwrite=overwrite)
    first, *rivals = ported
    cards = Cards([first, merged], wanted=card)
    old, before, after = load_patch(patch), open_checkpoint(base), open_checkpoint(evolved)
    bounds = {"max_tokens": max_tokens, "max_new_tokens": max_new_tokens}
    given = {name: value for name, value in bounds.items() if value is not None}
    if task is not None:
        if any(option is not None for option in (prompt, completion, judge, labels)):
            raise typer.BadParameter("--task defines its own --prompt, --completion, --judge and --labels; omit them.")
        from portllm.evaluating.harness.source import HarnessRows

        rows: FileRows | Scored = HarnessRows(task, data=data, score_rows=limit, batch_size=batch_size, **given)
    elif data is not None:
        from portllm.running.data import read_data

        rows = FileRows(
            read_data(data, old, prompt=prompt, completion=completion),
            kind=(judge or Judging.LABELS).value,
            labels=tuple(label.strip() for label in labels.split(",")) if labels else (),
            limit=limit,
            batch_size=batch_size,
            **given,
        )
        say_data(rows.data, labels=rows.kind == "labels", quiet=quiet)
        say_templates(rows.data, [old], before, after)
    else:
        raise typer.BadParameter("pass --data or --task.")
    with shown_progress(quiet=quiet) as progress:
        comparison = evaluate_patch(
            rows,
            base=before,
            patch=old,
            evolved=after,
            ported=first,
            rivals=rivals,
            retrained=retrained,
            merged=merged,
            allow_other_base=allow_other_base,
            allow_training_data=allow_training_data,
            device=device.value,
            dtype=dtype.value,
            seed=seed,
            progress=progress,
        )
    accepted = None if max_loss is None else max_loss / 100
    headline = decide(comparison, max_loss=accepted, compared=Compared(evolved, str(first), merged))
    if page.is_wanted:
        from portllm.evaluating.page import evaluate_page

        about = {
            "patch": patch_name(str(patch)),
            "base": named(base),
            "updated base": named(evolved),
            "ported patch": patch_name(str(first)),
            **({"beside it": ", ".join(patch_name(str(rival)) for rival in rivals)} if rivals else {}),
            "data": f"{comparison.n_rows:,} rows of {task if data is None else data.name}",
            "limit": "none given (--max-loss)" if accepted is None else f"{points_text(accepted)} of accuracy",
        }
        title = f"{patch_name(str(patch))} from {named(base)} to {named(evolved)}"
        page.write(evaluate_page(comparison, headline, title=title, about=about | written(), max_loss=accepted))
    cards.add(f"portllm evaluate: {task if data is None else data.name}", headline.text)
    from portllm.evaluating.text import render_comparison

    met = within(comparison, accepted)
    if as_json:
        decided = {"text": headline.text, "max_loss": accepted, "met": met}
        print_json(comparison.to_json() | {"decision": decided})
    else:
        say(render_comparison(comparison, headline, width=width_of(sys.stdout)), tone=headline.tone)
    if met is False:
        raise typer.Exit(3)
