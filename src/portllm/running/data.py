"""A data file as it is to be learned or asked: by a template, given or recorded, or by the shape of its rows.

Nothing here needs torch: rows that do not fit are refused before a model is loaded.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from portllm.errors import DataError
from portllm.files.input_file import local_file
from portllm.files.source import LocalFile
from portllm.patch.adapter_folder import PatchLike, folder_of, load_patch
from portllm.patch.patch import Patch
from portllm.running.chat_template import has_chat_template, read_chat_template, template_digest
from portllm.running.examples import Border, Example, ExampleFormat, read_examples, read_prompts, recorded_wording
from portllm.running.rows import Row, RowError, first_row, read_rows, read_with_digest
from portllm.running.shapes import SHAPES, Content, Conversation, Shape, recognize
from portllm.tensors.info import TensorInfo

SHAREGPT = '{messages: [.FIELD[] | {role: ({human: "user", gpt: "assistant"}[.from] // .from), content: .value}]}'
"""What makes messages of ShareGPT's rows, for jq."""

HUB = "hf:"
"""How addresses begin."""

SHAPES_SAID = "'messages', 'prompt' and 'completion', or 'text' alone"


@dataclass(frozen=True, slots=True, kw_only=True)
class Wording:
    """How prompts are made of rows.

    Attributes:
        prompt: A template; None where the shape of the rows says it.
        completion: Field of the right answer.
        shape: The shape of the rows; None with a template.
    """

    prompt: str | None = None
    completion: str | None = None
    shape: Shape | None = None

    @property
    def is_chat(self) -> bool:
        """A chat template makes the prompts."""
        return self.shape is not None and self.shape.is_chat

    @property
    def template(self) -> str:
        """As a template: the field of the prompt, where the shape of the rows says it."""
        return f"{{{next(iter(self.shape.fields))}}}" if self.shape is not None else self.prompt or ""

    @property
    def answer_field(self) -> str | None:
        """The field of the right answer."""
        return self.completion if self.shape is None else [*self.shape.fields][-1]

    @property
    def recorded(self) -> dict[str, object]:
        """What a record says of it, the chat template apart."""
        if self.shape is not None:
            return {"shape": self.shape.name}
        return recorded_wording(self.prompt, self.completion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Data:
    """The rows of a file.

    Attributes:
        rows: What they hold; an example without a completion where none is there.
        wording: How prompts are made of them.
        digest: Of all bytes of the file.
        file: The file.
        given: As the user named it: the file, or the address of a dataset.
    """

    rows: tuple[Content, ...]
    wording: Wording
    digest: str
    file: LocalFile
    given: str

    @property
    def recorded(self) -> dict[str, object]:
        """What a record says of it, the chat template apart."""
        return {**self.wording.recorded, "data": self.digest}

    @property
    def answers(self) -> tuple[str, ...]:
        """The right answers, without whitespace around them; empty where there is none."""
        return tuple(map(_answer, self.rows))

    @property
    def border(self) -> Border:
        """How completions follow prompts where they are learned, the chat template apart."""
        return Border() if self.wording.shape is None else Border(lead="")

    def __str__(self) -> str:
        shape = self.wording.shape
        how = f"prompts by the template {self.wording.prompt!r}" if shape is None else f"rows of {shape.said}"
        return (
            f"'{self.given}': {len(self.rows):,} rows, read as {how}"
            + ", through the chat template" * self.wording.is_chat
        )


def read_data(
    path: str | Path,
    *patches: PatchLike,
    prompt: str | None = None,
    completion: str | None = None,
    answers: bool | None = True,
) -> Data:
    """The rows of a data file.

    Args:
        path: The file; or the address of a dataset of the hub, see `docs/data.md`.
        *patches: Their records say how prompts are made, where nothing is given; the first one's completion counts.
        prompt: Template of the prompt.
        completion: Field of the completion.
        answers: Each row has one; None: all or none have; False: none is looked for.

    Raises:
        DataError: The file cannot be read, rows do not fit, or it is not known how prompts are made.
        MissingExtraError: A dataset of the hub is named, and its library is not installed.
        RemoteError, NotFoundError: The hub does not give the dataset.
    """
    given, path = str(path), Path(path)
    if given.startswith(HUB):
        from portllm.running.hub_rows import fetch_rows, parse_address  # its library takes a second to load

        address = parse_address(given)
        given, path = str(address), fetch_rows(address)
    opened = [load_patch(patch) for patch in patches]
    wording = find_wording(path, opened, prompt=prompt, completion=completion, answers=answers)
    rows, digest = read_with_digest(path, lambda: _read(path, wording, answers=answers))
    return Data(rows=tuple(rows), wording=wording, digest=digest, file=local_file(path), given=given)


def find_wording(
    path: Path,
    patches: Sequence[Patch[TensorInfo]],
    *,
    prompt: str | None,
    completion: str | None,
    answers: bool | None,
) -> Wording:
    """How prompts are made of the rows of a file: as given, else as recorded, else as its first row has them.

    Raises:
        DataError: It is not known, or the patches do not agree.
    """
    said = [_settings(patch) for patch in patches]
    if prompt is None:
        prompts = sorted({text for settings in said if isinstance(text := settings.get("prompt"), str)})
        if len(prompts) > 1:
            raise DataError(
                f"the patches were trained on {len(prompts)} different prompts: "
                f"{', '.join(map(repr, prompts[:3]))}. Check them separately, or pass one --prompt for all."
            )
        prompt = prompts[0] if prompts else None
    if completion is None and said and isinstance(field := said[0].get("completion"), str):
        completion = field
    if answers is False:
        completion = None
    if prompt is not None and (completion is not None or not answers):
        return Wording(prompt=prompt, completion=completion)
    row = first_row(path)
    shape = None if row is None or prompt or completion else recognize(row, answered=answers is True)
    if row is None:
        read_rows(path, lambda row: row, what="prompts and completions")  # says why
    if shape is None:
        raise DataError(_unknown(path, row or {}, patches, prompt=prompt, answers=answers))
    for patch, settings in zip(patches, said, strict=True):
        if (trained := settings.get("shape")) not in (None, shape.name):
            raise DataError(
                f"'{path}': has {shape}, but {patch.name} was trained on rows of '{trained}'. Write the rows as in "
                "training, or pass --prompt and --completion."
            )
    return Wording(shape=shape)


def recorded_wording_of(patch: Patch[TensorInfo], prompt: str | None = None) -> Wording | None:
    """How prompts are made where there are no rows to see it from: as given, or as the patch records; None if neither.

    Raises:
        DataError: The template is broken.
    """
    settings = _settings(patch)
    prompt = prompt or (text if isinstance(text := settings.get("prompt"), str) else None)
    if prompt is not None:
        return Wording(prompt=prompt)
    return next((Wording(shape=shape) for shape in SHAPES if shape.name == settings.get("shape")), None)


def chat_template_for(data: Data, *patches: Patch[TensorInfo], folder: Path) -> str | None:
    """The chat template that makes prompts of conversations: saved with the patch, or else that of its base.

    Args:
        data: The rows.
        *patches: The patches that are asked.
        folder: Of their base.

    Returns:
        None where the rows need none.

    Raises:
        DataError: There is none, or a patch was trained through another.
    """
    return chat_template_of(*patches, folder=folder, asked=f"'{data.file}'") if data.wording.is_chat else None


def chat_template_of(*patches: Patch[TensorInfo], folder: Path, asked: str) -> str:
    """The chat template that patches are asked through, saved with them, or else that of their base.

    Args:
        *patches: The patches.
        folder: Of their base.
        asked: Where the conversations come from, for people.

    Raises:
        DataError: There is none, or a patch was trained through another.
    """
    own = {read_chat_template(folder_of(patch)) for patch in patches if has_chat_template(folder_of(patch))}
    if len(own) > 1:
        raise DataError("the patches were saved with different chat templates. Ask them separately.")
    template = own.pop() if own else read_chat_template(folder)
    for patch in patches:
        if _settings(patch).get("chat_template") not in (None, template_digest(template)):
            raise DataError(
                f"'{patch.name}': was trained through another chat template than that of '{folder}', so the prompts of "
                f"{asked} would not be those it knows. Pass the model with the tokenizer of the training."
            )
    return template


def _read(path: Path, wording: Wording, *, answers: bool | None) -> Sequence[Content]:
    if wording.shape is not None:
        return _read_shape(path, wording.shape, answers=answers)
    prompt = wording.prompt or ""
    if answers:
        return read_examples(path, ExampleFormat(prompt=prompt, completion=wording.completion or ""))
    prompts, completions = read_prompts(path, prompt, completion=wording.completion)
    return [Example(*pair) for pair in zip(prompts, completions or [""] * len(prompts), strict=True)]


def _read_shape(path: Path, shape: Shape, *, answers: bool | None) -> Sequence[Content]:
    def make(row: Row) -> Content:
        content = shape.make(row)
        if answers and isinstance(content, Conversation) and not content.learned:
            roles = ", ".join(dict.fromkeys(f"'{message['role']}'" for message in content.messages))
            raise RowError(f"has no message of 'assistant' to learn (roles: {roles})")
        return content

    return read_rows(path, make, what=f"rows of {shape.said}")


def _answer(content: Content) -> str:
    match content:
        case Example(completion=answer):
            return answer.strip()
        case Conversation():
            return (content.answer or "").strip()
        case _:
            return ""


def _settings(patch: Patch[TensorInfo]) -> Mapping[str, object]:
    return patch.record.capture.settings if patch.record else {}


def _unknown(
    path: Path, row: Row, patches: Sequence[Patch[TensorInfo]], *, prompt: str | None, answers: bool | None
) -> str:
    """Why no prompts can be made of rows, and what makes some."""
    there = ", ".join(f"'{name}'" for name in row) or "no fields"
    said = f"'{path}': its rows have {there}; without a template, {SHAPES_SAID} are expected."
    for name, listed in row.items():
        if isinstance(listed, list) and listed and isinstance(listed[0], dict):
            is_talk = {"from", "value"} <= listed[0].keys()
            query = SHAREGPT.replace("FIELD", name) if is_talk else f".{name}[]"
            what = f"'{name}' is in the shape of ShareGPT" if is_talk else f"The rows seem to be in '{name}'"
            return f"{said} {what}. Run: jq -c '{query}' {path} > rows.jsonl"
    silent = [patch.name for patch in patches if "prompt" not in _settings(patch)]
    fields = [name for name, value in row.items() if isinstance(value, str)] or ["question", "type"]
    if {"chosen", "rejected"} <= set(fields):  # a preference: what was rejected is neither asked nor learned
        fields = [*(name for name in fields if name not in ("chosen", "rejected")), "chosen"]
    asked = prompt or r"\n".join(f"{{{name}}}" for name in fields[: max(1, len(fields) - 1)])
    answer = "" if answers is False else f" --completion {fields[-1]}"
    if silent:
        said += (
            f" '{silent[0]}' has no recorded prompt template, since it was not trained with 'portllm train'; 'portllm "
            "capture' with --prompt and --completion keeps one."
        )
    return f"{said} Pass {'--completion' if prompt else '--prompt'}, such as --prompt '{asked}'{answer}."
