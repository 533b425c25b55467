"""Options about data that several commands take, and what they say of the rows that were read."""

import re
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from portllm.cli.terminal import say

if TYPE_CHECKING:
    from collections.abc import Sequence

    from portllm.checkpoint.model.checkpoint import Checkpoint
    from portllm.patch.patch import Patch
    from portllm.running.data import Data
    from portllm.tensors.info import TensorInfo

DATA = "A data file: JSONL, JSON, CSV or Parquet; or a dataset of the Hub: hf://datasets/OWNER/NAME/SPLIT."

PromptOption = Annotated[
    str | None,
    typer.Option(
        "--prompt",
        help=r"Prompt template with fields of the rows, such as 'Question: {question}\nType:'; \n is a new line, \t a "
        r"tab and \\ a backslash. Defaults to the one recorded in the patch, or to the shape of the rows: messages, "
        "prompt and completion, or text.",
    ),
]

PromptFileOption = Annotated[
    Path | None,
    typer.Option("--prompt-file", help="The prompt template as a text file, taken as it is but for its last newline."),
]

CompletionOption = Annotated[
    str | None, typer.Option("--completion", help="Field with the right answer. Same default as --prompt.")
]

_ESCAPE = re.compile(r"\\(.?)", re.DOTALL)
_MEANT = {"n": "\n", "t": "\t", "\\": "\\"}


def given_prompt(prompt: str | None, file: Path | None) -> str | None:
    """The template that was given, by an option or in a file; None if neither.

    Raises:
        typer.BadParameter: Both are given, the file cannot be read, or a backslash stands before something else.
    """
    if file is None:
        return None if prompt is None else unescape(prompt)
    if prompt is not None:
        raise typer.BadParameter("pass --prompt or --prompt-file, not both.")
    from portllm.files.input_file import read_input

    try:
        text = read_input(file).decode("utf-8-sig").removesuffix("\n").removesuffix("\r")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "is not UTF-8"
        raise typer.BadParameter(f"--prompt-file '{file}': cannot be read: {why}.") from error
    if not text:
        raise typer.BadParameter(f"--prompt-file '{file}': is empty.")
    return text


def unescape(text: str) -> str:
    r"""A text as it is meant: `\n` is a new line, `\t` a tab, and two backslashes are one.

    Raises:
        typer.BadParameter: A backslash stands before something else.

    Example:
        >>> unescape(r"Question:\n{q}"), unescape(r"C:\\temp")
        ('Question:\n{q}', 'C:\\temp')
    """

    def meant(found: re.Match[str]) -> str:
        if found[1] not in _MEANT:
            raise typer.BadParameter(
                rf"--prompt: '{found[0]}' at character {found.start() + 1} is not an escape; there are \n, \t and \\. "
                r"Write a backslash as \\."
            )
        return _MEANT[found[1]]

    return _ESCAPE.sub(meant, text)


def say_templates(
    data: "Data", patches: "Sequence[Patch[TensorInfo]]", base: "Checkpoint", evolved: "Checkpoint"
) -> None:
    """Warn on stderr where the updated model comes with another chat template than the prompts go through."""
    from portllm.running.chat_template import has_chat_template, read_chat_template
    from portllm.running.data import chat_template_for

    if base.folder is None or evolved.folder is None or not has_chat_template(evolved.folder):
        return
    template = chat_template_for(data, *patches, folder=base.folder)
    if template is not None and read_chat_template(evolved.folder) != template:
        say(
            f"warning: {evolved.name} has another chat template than the patch was trained through. Both models are "
            "asked through that of the training; served through the new one, answers may differ.",
            err=True,
        )


def say_data(data: "Data", *, labels: bool = True, quiet: bool) -> None:
    """Say on stderr which rows were read and how, the labels in use, and which of them may be meant otherwise."""
    from portllm.running.labels import MOST_LABELS, doubtful_labels

    counts = Counter(filter(None, data.answers)) if labels else Counter()
    if not quiet:
        say(str(data), err=True)
    if 1 < len(counts) <= MOST_LABELS and not quiet:
        say("labels: " + ", ".join(f"'{label}' {count}" for label, count in counts.most_common()), err=True)
    for doubt in doubtful_labels(counts):
        say(f"warning: {doubt}", err=True)
