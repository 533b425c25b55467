"""The shapes of rows that need no template: those that OpenAI's fine-tuning and TRL's trainers take. Pure.

https://huggingface.co/docs/trl/dataset_formats, https://platform.openai.com/docs/guides/supervised-fine-tuning
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

from portllm.running.examples import Example
from portllm.running.rows import Row, RowError, kind_of, row_texts

ASSISTANT = "assistant"

Message: TypeAlias = Mapping[str, str]
"""Role and content, and what else a chat template may read of it."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages that a model's chat template makes one text of.

    Attributes:
        messages: All of them, at least one.
        learned: Which of them are to be learned, the first being 0: turns of the assistant.
    """

    messages: tuple[Message, ...]
    learned: tuple[int, ...] = ()

    @property
    def answer(self) -> str | None:
        """The last message, if it is the assistant's."""
        last = self.messages[-1]
        return last["content"] if last["role"] == ASSISTANT else None

    @property
    def asked(self) -> tuple[Message, ...]:
        """The messages before the answer."""
        return self.messages if self.answer is None else self.messages[:-1]


Content: TypeAlias = Example | Conversation | str
"""What a row holds: a prompt and a completion, a conversation, or one text."""


def shown(content: Content) -> str:
    """A row, to be read.

    Example:
        >>> print(shown(Conversation(({"role": "user", "content": "why?"},))))
        user: why?
    """
    match content:
        case Conversation(messages):
            return "\n".join(f"{message['role']}: {message['content']}" for message in messages)
        case Example(prompt, completion):
            return f"{prompt}\n-> {completion}" if completion else prompt
        case _:
            return content


@dataclass(frozen=True, slots=True)
class Shape:
    """A shape of rows.

    Attributes:
        name: As recorded: `messages`, `prompt-completion` or `text`.
        said: For people.
        fields: The fields that it is recognized by, and their types.
        make: What a row holds.
    """

    name: str
    said: str
    fields: Mapping[str, type]
    make: Callable[[Row], Content]

    @property
    def is_chat(self) -> bool:
        """Its rows are conversations."""
        return self.name == "messages"

    def __str__(self) -> str:
        return f"rows of {self.said}"


def recognize(row: Row, *, answered: bool) -> Shape | None:
    """The shape of a row, or None.

    Args:
        row: A row.
        answered: The answer has to be there; otherwise a prompt alone is enough.

    Example:
        >>> recognize({"prompt": "1 + 1 =", "completion": " 2"}, answered=True).name
        'prompt-completion'
    """
    shapes = SHAPES if answered else SHAPES + UNANSWERED
    for shape in shapes:
        if all(isinstance(row.get(field), kind) for field, kind in shape.fields.items()):
            return shape if shape.name != "text" or len(row) == 1 else None  # a label beside it would be left out
    return None


def _messages(row: Row, field: str) -> tuple[Message, ...]:
    """The messages in a field.

    Raises:
        RowError: There are none, or one holds more than text.
    """
    listed = row.get(field)
    if not isinstance(listed, list) or not listed:
        found = "missing" if field not in row else "empty" if listed == [] else kind_of(listed)
        raise RowError(f"field '{field}' is {found}; expected a list of messages")
    if row.get("tools") or row.get("functions"):
        raise RowError("has tools, which are not supported. Remove the row, or its tools if the answer needs none")
    return tuple(_message(message, f"message {number} of '{field}'") for number, message in enumerate(listed, start=1))


def _message(message: object, where: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f"{where} is {kind_of(message)}; expected an object with 'role' and 'content'")
    if {"from", "value"} <= message.keys():
        raise RowError(f"{where} has 'from' and 'value' (ShareGPT). Rename them to 'role' and 'content'")
    said = {name: _text(value) for name, value in message.items() if value is not None and name != "weight"}
    for name in ("role", "content"):
        if name not in said:
            is_call = message.keys() & {"tool_calls", "function_call"}
            raise RowError(f"{where} " + ("is a tool call, which is not supported" if is_call else f"has no '{name}'"))
    if strange := [name for name, value in said.items() if value is None]:
        raise RowError(f"{where}: '{strange[0]}' is more than text, which is not supported")
    return {name: value for name, value in said.items() if value is not None}


def _text(value: object) -> str | None:
    """A text, or the one text in a list of parts; None for what is more than that."""
    match value:
        case str(text) | [{"type": "text", "text": str(text)}]:
            return text
        case _:
            return None


def _chat(row: Row) -> Conversation:
    messages = _messages(row, "messages")
    weights = [message.get("weight") for message in row["messages"]]  # type: ignore[attr-defined]
    if strange := [weight for weight in weights if str(weight) not in ("None", "0", "1")]:
        raise RowError(f"a message has the weight {strange[0]}; expected 0 or 1")
    return Conversation(messages, _turns(messages, lambda place: str(weights[place]) != "0"))


def _chat_pair(row: Row) -> Conversation:
    prompt, completion = _messages(row, "prompt"), _messages(row, "completion")
    return Conversation(prompt + completion, _turns(prompt + completion, lambda place: place >= len(prompt)))


def _turns(messages: tuple[Message, ...], is_learned: Callable[[int], bool]) -> tuple[int, ...]:
    turns = (place for place, message in enumerate(messages) if message["role"] == ASSISTANT)
    return tuple(filter(is_learned, turns))


def _pair(row: Row) -> Example:
    return Example(prompt=_filled(row, "prompt"), completion=_filled(row, "completion"))


def _prompt(row: Row) -> Example:
    return Example(prompt=_filled(row, "prompt"), completion="")


def _whole(row: Row) -> str:
    if len(row) > 1:
        raise RowError("has fields beside 'text'")
    return _filled(row, "text")


def _filled(row: Row, field: str) -> str:
    """A text that is not blank."""
    text = row_texts(row, [field])[field]
    if not text.strip():
        raise RowError(f"field '{field}' is blank")
    return text


SHAPES = (
    Shape("messages", "'messages'", MappingProxyType({"messages": list}), _chat),
    Shape(
        "messages", "'prompt' and 'completion' as messages",
        MappingProxyType({"prompt": list, "completion": list}), _chat_pair,
    ),
    Shape(
        "prompt-completion", "'prompt' and 'completion'",
        MappingProxyType({"prompt": str, "completion": str}), _pair,
    ),
    Shape("text", "'text'", MappingProxyType({"text": str}), _whole),
)  # fmt: skip
"""The most telling first: a row may have fields besides."""

UNANSWERED = (
    Shape(
        "messages", "'prompt' as messages",
        MappingProxyType({"prompt": list}), lambda row: Conversation(_messages(row, "prompt")),
    ),
    Shape("prompt-completion", "'prompt'", MappingProxyType({"prompt": str}), _prompt),
)  # fmt: skip
"""Where nobody has to answer."""
