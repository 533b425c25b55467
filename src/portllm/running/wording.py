"""What is asked of a model: the rows of a data file as prompts and answers, by the model's chat template if need be."""

from dataclasses import dataclass, field
from pathlib import Path

from portllm.errors import DataError
from portllm.running.chat import Chat
from portllm.running.data import Data
from portllm.running.encoding import Encoder
from portllm.running.examples import Border, Example
from portllm.running.model import load_tokenizer
from portllm.running.shapes import Conversation


@dataclass(frozen=True, slots=True)
class Asked:
    """Prompts as a model is given them.

    Attributes:
        prompts: Texts.
        completions: The right answers, without whitespace around them; empty where there is none.
        border: How an answer follows a prompt.
        file: Where they come from.
    """

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    border: Border
    file: str = field(default="data")

    @property
    def answers(self) -> tuple[str, ...] | None:
        """The right answers; None where no row has one.

        Raises:
            DataError: Some rows have one.
        """
        n = sum(map(bool, self.completions))
        if 0 < n < len(self.completions):
            raise DataError(
                f"'{self.file}': {n} of {len(self.completions)} rows have an answer, the others do not. Either all or "
                "none must have one."
            )
        return self.completions if n else None

    @property
    def examples(self) -> tuple[Example, ...]:
        """Prompts with their answers.

        Raises:
            DataError: Rows have none.
        """
        if self.answers is None:
            raise DataError(
                f"'{self.file}': its rows hold no answer to compare with. Pass rows with one: 'messages' that end with "
                "the assistant's, 'prompt' and 'completion', or fields of your own with --prompt and --completion."
            )
        return tuple(map(Example, self.prompts, self.completions))


def word(data: Data, folder: Path, template: str | None) -> Asked:
    """What the rows of a file ask, and how an answer follows.

    Args:
        data: The rows.
        folder: Of the model whose tokenizer it is.
        template: The chat template that makes prompts of conversations.

    Raises:
        DataError: The chat template refuses a row, or answers do not follow all prompts in the same way.
    """
    chat = None if template is None else Chat(Encoder(load_tokenizer(folder)), template)
    asked: list[tuple[str, Border]] = []
    for number, row in enumerate(data.rows, start=1):
        match row:
            case Conversation() if chat is not None:
                try:
                    asked.append(chat.ask(row.asked))
                except DataError as error:
                    raise DataError(f"'{data.file}', row {number}: {error}") from error
            case Example(prompt, completion):
                asked.append((prompt, _border(data, completion)))
            case str():
                asked.append((row, Border()))
    prompts, borders = zip(*asked, strict=True)
    border, *others = dict.fromkeys(borders)
    if others:
        raise DataError(
            f"'{data.file}': answers do not follow all prompts in the same way: after {border.lead!r} and "
            f"{others[0].lead!r}, before {border.end!r} and {others[0].end!r}. Make the rows alike."
        )
    return Asked(prompts, data.answers, border, str(data.file))


def _border(data: Data, completion: str) -> Border:
    """How a completion that is text follows: by a template, or directly."""
    if data.wording.shape is None:
        return Border()
    return Border(lead=completion[: len(completion) - len(completion.lstrip())])
