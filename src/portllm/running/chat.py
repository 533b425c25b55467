"""Conversations through a chat template: what is asked, and which tokens of a text are the assistant's.

The text is what transformers' `apply_chat_template` makes, and so are its tokens. Which of them are learned is said by
the template itself, where it marks what is generated (`{% generation %}`). Otherwise a turn is what the text of the
conversation up to it has beyond the text of what comes before it, with the prompt to generate. Where a template writes
an earlier turn otherwise once others follow it, the turn is what gives way to another answer in its place.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

from portllm.errors import DataError
from portllm.foreign import foreign, quiet
from portllm.running.encoding import Encoded, Encoder, NoRoomError
from portllm.running.examples import Border
from portllm.running.shapes import ASSISTANT, Conversation, Message

SPEAKERS = ("user", ASSISTANT)
"""Whose words every template writes; some have no place for a system's."""

MARKS_TURNS = re.compile(r"\{%-?\s*generation\s*-?%\}")
ASKS_OTHERWISE = (
    "the chat template writes an answer otherwise than it asks for one, so prompt and answer cannot be told apart. "
    "Write the rows as 'prompt' and 'completion' texts."
)

THOUGHT_END = "</think>"
"""What ends a thought, which a template may leave out of an answer."""

PROBE = "PROBE-58d2c1f0e7"
"""An answer that stands nowhere else, to see what a template puts around one."""


@dataclass(frozen=True, slots=True)
class Chat:
    """A chat template with the tokenizer that it belongs to.

    Attributes:
        encoder: Of the model.
        template: Its chat template.
    """

    encoder: Encoder
    template: str

    def text(self, messages: Sequence[Message], *, opened: bool = False) -> str:
        """The text of a conversation; `opened` for the assistant to answer.

        Raises:
            DataError: The template refuses the conversation, or leaves out what is said in it.
        """
        text = str(self._apply(messages, tokenize=False, add_generation_prompt=opened))
        for number, message in enumerate(messages, start=1):
            if message["role"] in SPEAKERS and message["content"].rpartition(THOUGHT_END)[2].strip() not in text:
                raise DataError(
                    f"the chat template leaves out what message {number} says, as templates for images may do. Use one "
                    "that takes texts."
                )
        return text

    def ask(self, messages: Sequence[Message]) -> tuple[str, Border]:
        """The prompt that a conversation makes, and how an answer follows it.

        Raises:
            DataError: The template refuses it, or does not put an answer where it asks for one.
        """
        opened = self.text(messages, opened=True)
        answered = self.text([*messages, {"role": ASSISTANT, "content": PROBE}])
        if not answered.startswith(opened) or answered.count(PROBE) != 1:
            raise DataError(ASKS_OTHERWISE)
        lead, _, end = answered.removeprefix(opened).partition(PROBE)
        if lead.strip():  # such as an empty thought, which is the same before every answer
            opened, lead = opened + lead, ""
        return opened, Border(lead=lead, marks=False, end=end)

    def encode(self, conversation: Conversation, *, max_tokens: int) -> Encoded:
        """The ids of a conversation, those of the assistant's turns counted.

        Args:
            conversation: With at least one turn to learn.
            max_tokens: Most ids; what is too long is cut from the left, behind a begin-of-text token.

        Raises:
            DataError: Its turns cannot be told apart, or the last one does not fit.
        """
        whole = self.text(conversation.messages)
        if MARKS_TURNS.search(self.template) and len(conversation.learned) == _n_turns(conversation):
            made = self._apply(
                conversation.messages, tokenize=True, return_dict=True, return_assistant_tokens_mask=True
            )
            ids, counted = tuple(made["input_ids"]), [mark == 1 for mark in made["assistant_masks"]]
        else:
            spans = tuple(self._turns(whole, conversation))
            made = self._tokens(whole)
            ids = tuple(made["input_ids"])
            counted = [any(start <= a and b <= end for start, end in spans) for a, b in made["offset_mapping"]]
        n_cut = max(0, len(ids) - max_tokens)
        kept = 1 if n_cut and ids[0] == self.encoder.bos else 0
        ids, counted = ids[:kept] + ids[kept + n_cut :], counted[:kept] + counted[kept + n_cut :]
        if n_cut:  # a turn that lost its beginning is no answer to learn
            begun = next((place for place in range(kept, len(ids)) if not counted[place]), len(ids))
            counted[kept:begun] = [False] * (begun - kept)
        first = next((place for place, counts in enumerate(counted) if counts and place), None)
        if first is None:
            if n_cut:
                raise NoRoomError(
                    f"a conversation of {len(ids) + n_cut} tokens, of which {max_tokens} leave no room for a question "
                    "and its answer",
                    lacking=n_cut,
                )
            raise DataError("the chat template marks nothing of the conversation as the assistant's.")
        return Encoded(ids[:first], ids[first:], n_cut=n_cut, counted=tuple(counted[first:]))

    def _turns(self, whole: str, conversation: Conversation) -> Iterator[tuple[int, int]]:
        """Where each turn to learn begins and ends in the text of the whole."""
        messages = conversation.messages
        for place in conversation.learned:
            opened, closed = self.text(messages[:place], opened=True), self.text(messages[: place + 1])
            if not closed.startswith(opened):
                raise DataError(ASKS_OTHERWISE)
            yield (
                (len(opened), len(closed)) if whole.startswith(closed) else self._rewritten_turn(whole, messages, place)
            )

    def _rewritten_turn(self, whole: str, messages: Sequence[Message], place: int) -> tuple[int, int]:
        """Where an answer stands that the template writes otherwise once others follow it, such as without a thought.

        That is where another answer would stand, and behind it what then ends one in both places.
        """
        probe = {**messages[place], "content": PROBE}
        head, _, tail = self.text([*messages[:place], probe, *messages[place + 1 :]]).partition(PROBE)
        end = len(whole) - len(tail)
        is_there = whole.startswith(head) and whole.endswith(tail)
        if not is_there or messages[place]["content"].strip() not in whole[len(head) : end]:
            raise DataError(
                f"the chat template writes message {place + 1} otherwise once others follow it, so it cannot be told "
                "which tokens are the assistant's. Train on one answer per row, or mark the assistant's turns in the "
                "template with '{% generation %}'."
            )
        _, border = self.ask(messages[:place])
        return len(head), end + _n_shared(tail, border.end)

    def _tokens(self, text: str) -> Any:  # noqa: ANN401
        with foreign(self.encoder.failed):
            return self.encoder.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)

    def _apply(self, messages: Sequence[Message], **how: object) -> Any:  # noqa: ANN401
        def refused(why: str) -> DataError:
            return DataError(f"the chat template refuses the conversation: {why}")

        with quiet(), foreign(refused):
            return self.encoder.tokenizer.apply_chat_template(
                [dict(message) for message in messages], chat_template=self.template, **how
            )


def _n_shared(one: str, other: str) -> int:
    """How many signs two texts begin with alike."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _n_turns(conversation: Conversation) -> int:
    return sum(message["role"] == ASSISTANT for message in conversation.messages)
