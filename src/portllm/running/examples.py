"""Rows as prompts and completions by a template; nothing here needs torch.

A template with plain `{field}` placeholders makes the prompt of a row, one field is the completion.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from portllm.errors import DataError
from portllm.running.rows import Row, RowError, read_rows, row_texts

_PIECE = re.compile(r"(?P<literal>[^{}]+)|(?P<escape>\{\{|\}\})|\{(?P<field>[^{}]*)\}|(?P<stray>[{}])")
_FIELD = re.compile(r"[^\W\d][\w-]*")


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt and its correct completion.

    Attributes:
        prompt: The text before the completion, as it is; whitespace at its end counts.
        completion: The text to learn or to score, without whitespace around it.
    """

    prompt: str
    completion: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Border:
    """How a completion follows a prompt; the same in all rows.

    Attributes:
        lead: What stands between the two; None for a space, and nothing where the prompt ends in whitespace.
        marks: The tokenizer puts its own marks before the prompt, which does not contain them yet.
        end: What a chat template puts after the completion; empty for the tokenizer's end-of-text token.
    """

    lead: str | None = None
    marks: bool = True
    end: str = ""

    def join(self, prompt: str, completion: str) -> str:
        """The completion as it follows the prompt."""
        return completion_text(prompt, completion) if self.lead is None else self.lead + completion


@dataclass(frozen=True, slots=True)
class Template:
    """A text with plain `{field}` placeholders; `{{` and `}}` stand for braces.

    No attributes, indices, conversions or format specifications: a template comes from a command line and its fields
    from a file, and neither should reach into Python objects.

    Args:
        text: The template.

    Raises:
        DataError: A brace has no partner, or what stands between braces is not a field's name.

    Example:
        >>> template = Template("Q: {question} {{sic}}")
        >>> template.fields, template.fill({"question": "why?"})
        (('question',), 'Q: why? {sic}')
    """

    text: str

    def __post_init__(self) -> None:
        if not self.text.isprintable() and any(0xD800 <= ord(sign) <= 0xDFFF for sign in self.text):
            raise DataError(f"template {self.text!r}: is not valid UTF-8. Write it in the encoding of this terminal.")
        for piece in _PIECE.finditer(self.text):
            field = piece["field"]
            if piece["stray"] or (field is not None and not _FIELD.fullmatch(field)):
                raise DataError(
                    f"template '{self.text}': '{piece[0]}' at character {piece.start() + 1} is not a placeholder; "
                    "expected '{field}' with the name of a field. Write '{{' and '}}' for literal braces."
                )

    @property
    def fields(self) -> tuple[str, ...]:
        """The names between braces, each once, in order of appearance."""
        return tuple(dict.fromkeys(piece["field"] for piece in _PIECE.finditer(self.text) if piece["field"]))

    @property
    def parts(self) -> tuple[tuple[str, bool], ...]:
        """Literal texts, and names between braces, which are marked, in turn and in order.

        Example:
            >>> Template("Q: {question}?").parts
            (('Q: ', False), ('question', True), ('?', False))
        """
        found: list[tuple[str, bool]] = [("", False)]
        for piece in _PIECE.finditer(self.text):
            if piece["field"]:
                found += [(piece["field"], True), ("", False)]
            else:
                found[-1] = (found[-1][0] + (piece["literal"] or piece["escape"][:1]), False)
        return tuple(part for part in found if part[0])

    def fill(self, values: Mapping[str, str]) -> str:
        """The text with every placeholder replaced by its value."""
        return "".join(
            piece["literal"] or (piece["escape"] or "")[:1] or values[piece["field"]]
            for piece in _PIECE.finditer(self.text)
        )


@dataclass(frozen=True, slots=True)
class ExampleFormat:
    r"""The template and field that turn a row into an `Example`.

    Args:
        prompt: Template of the prompt, such as `"Question: {question}\nType:"`.
        completion: Name of the field that holds the completion.

    Raises:
        DataError: The template is broken or names no field, or the completion's name stands in it.
    """

    prompt: str
    completion: str

    def __post_init__(self) -> None:
        fields = Template(self.prompt).fields
        if not fields:
            raise DataError(
                f"template '{self.prompt}': names no field, so every prompt would be the same. "
                "Put a field of the rows between braces, such as '{question}'."
            )
        if self.completion in fields:
            raise DataError(
                f"template '{self.prompt}': '{{{self.completion}}}' is the completion; a prompt that contains it "
                "leaves nothing to learn. Remove it from the template, or choose another completion field."
            )


def recorded_wording(prompt: str | None, completion: str | None) -> dict[str, object]:
    """What a record says of a template and the field of the answer.

    Raises:
        DataError: The template is broken, or shows the answer.
    """
    if prompt is not None and completion is not None:
        ExampleFormat(prompt=prompt, completion=completion)
    elif prompt is not None:
        Template(prompt)
    said = {"prompt": prompt, "completion": completion}
    return {name: value for name, value in said.items() if value is not None}


def completion_text(prompt: str, completion: str) -> str:
    """The completion as it follows the prompt: after one space, or directly where the prompt ends in whitespace.

    Example:
        >>> completion_text("Type:", "treatment"), completion_text("Type: ", "treatment")
        (' treatment', 'treatment')
    """
    return completion if not prompt or prompt[-1].isspace() else f" {completion}"


def read_examples(path: str | Path, fmt: ExampleFormat) -> list[Example]:
    """Read the examples in a data file, in order; blank lines are skipped.

    Text is UTF-8, with or without a byte order mark; lines may end in CRLF. Numbers and booleans become the JSON text
    that stands in the file.

    Args:
        path: The file.
        fmt: Prompt template and completion field.

    Raises:
        DataError: The file cannot be read, has no rows, or some rows do not fit; all of them are counted, the first
            ten shown with their line numbers.
    """
    template = Template(fmt.prompt)

    def make(row: Row) -> Example:
        texts = row_texts(row, (*template.fields, fmt.completion))
        completion = texts[fmt.completion].strip()
        if not completion:
            raise RowError(f"field '{fmt.completion}' is empty; expected the completion")
        prompt = template.fill(texts)
        if not prompt.strip():
            raise RowError("the prompt is blank")
        return Example(prompt=prompt, completion=completion)

    return read_rows(path, make, what=f"the prompt {fmt.prompt!r} and the completion '{fmt.completion}'")


def read_prompts(path: str | Path, template: str, *, completion: str | None) -> tuple[list[str], list[str] | None]:
    r"""The prompts in a data file, and their completions if the rows have them; otherwise as `read_examples`.

    Args:
        path: The file.
        template: For instance `"Question: {question}\nType:"`.
        completion: Field of the completion, or None: none is looked for.

    Raises:
        DataError: As for `read_examples`; or some rows have a completion and others not.
    """
    if completion is not None:
        ExampleFormat(prompt=template, completion=completion)  # refuses a prompt that shows the answer
    parsed = Template(template)

    def make(row: Row) -> tuple[str, str]:
        asked = completion is not None and row.get(completion) not in (None, "")
        texts = row_texts(row, (*parsed.fields, completion) if asked and completion else parsed.fields)
        prompt = parsed.fill(texts)
        if not prompt.strip():
            raise RowError("the prompt is blank")
        return prompt, texts[completion].strip() if asked and completion else ""

    made = read_rows(path, make, what=f"the prompt {template!r}")
    n_completed = sum(bool(text) for _, text in made)
    if 0 < n_completed < len(made):
        raise DataError(
            f"'{path}': {n_completed} of {len(made)} rows have a completion in '{completion}', the others do not. "
            "Either all or none must have one."
        )
    return [prompt for prompt, _ in made], [text for _, text in made] if n_completed else None


def read_texts(path: str | Path, template: str) -> list[str]:
    r"""The texts that a template makes of the rows of a data file; as `read_examples`, without a completion.

    Args:
        path: The file.
        template: For instance `"{question}\n{answer}"`.

    Raises:
        DataError: As for `read_examples`.
    """
    parsed = Template(template)

    def make(row: Row) -> str:
        text = parsed.fill(row_texts(row, parsed.fields))
        if not text.strip():
            raise RowError("the text is blank")
        return text

    return read_rows(path, make, what=f"the text {template!r}")
