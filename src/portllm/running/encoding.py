"""Text to token ids: one rule for the border between prompt and completion, and padded batches of both.

Training and scoring cut at the same place, so a label is scored on the very tokens that it was learned as.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch

from portllm.arrays import Int64
from portllm.errors import CheckpointError, DataError
from portllm.foreign import foreign
from portllm.running.examples import Border
from portllm.running.model import PreTrainedTokenizerBase

Row = TypeVar("Row")
Ids = TypeVar("Ids")

SHOWN = 10
"""Of the rows that cannot be encoded, so many are told one by one."""

LOGITS = 1 << 27
"""Of rows that are run together, where logits of many places are asked for: half a gigabyte."""


@dataclass(frozen=True, slots=True)
class Encoded:
    """One example as token ids.

    Attributes:
        prompt: Ids of the prompt, with what the tokenizer puts before a text; never empty.
        completion: Ids of the completion, without an end mark; never empty.
        n_cut: Tokens of the prompt that were left out because the whole was too long.
        counted: Which tokens of the completion are to be learned; None for all.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    n_cut: int = 0
    counted: tuple[bool, ...] | None = None

    @property
    def n_counted(self) -> int:
        """How many tokens of the completion are to be learned."""
        return len(self.completion) if self.counted is None else sum(self.counted)


@dataclass(frozen=True, slots=True)
class PaddedBatch:
    """Rows of different lengths in one rectangle, padded on the left so that all end in the last column.

    Attributes:
        ids: Token ids; what stands under the padding does not matter.
        mask: 1 where there is a token, 0 under the padding.
        positions: Position of each token in its own row, 0 under the padding.
    """

    ids: Int64[torch.Tensor, "rows tokens"]
    mask: Int64[torch.Tensor, "rows tokens"]
    positions: Int64[torch.Tensor, "rows tokens"]


class Encoder:
    """Encodes prompts and completions with one tokenizer.

    Args:
        tokenizer: Of the model; it needs an end-of-text token.
        border: How completions follow prompts.

    Raises:
        DataError: The tokenizer has no end-of-text token.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, border: Border | None = None) -> None:
        if tokenizer.eos_token_id is None:
            raise DataError(
                "tokenizer: has no end-of-text token, so a model cannot learn where an answer ends. "
                "Set 'eos_token' in its 'tokenizer_config.json'."
            )
        self.tokenizer = tokenizer
        self.eos: int = tokenizer.eos_token_id
        self.bos: int | None = tokenizer.bos_token_id
        self.border = border or Border()
        marks = set(tokenizer.all_special_ids)
        ends = (token for token in self._ids_of(self.border.end, add_special_tokens=False) if token in marks)
        self.end: int = next(ends, self.eos)
        """The token that ends an answer."""
        self.stops = frozenset({self.eos, self.end})
        """The tokens that end an answer, however it was learned."""

    def at(self, border: Border) -> "Encoder":
        """The same tokenizer, for prompts of another kind."""
        return self if border == self.border else Encoder(self.tokenizer, border)

    @property
    def start(self) -> int:
        """What a text begins behind that follows nothing: the begin-of-text token, or the end mark of another text."""
        return self.eos if self.bos is None else self.bos

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Ids of a text that stands for itself, with what the tokenizer puts before it and nothing after it."""
        ids = self._ids_of(text, add_special_tokens=self.border.marks)
        if ids and ids[-1] == self.eos and not text.endswith(self.tokenizer.eos_token):
            ids = ids[:-1]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without marks."""
        with foreign(self.failed):
            text: str = self.tokenizer.decode(list(ids), skip_special_tokens=True)
        return text

    def _ids_of(self, text: str, *, add_special_tokens: bool) -> tuple[int, ...]:
        with foreign(self.failed):
            return tuple(self.tokenizer(text, add_special_tokens=add_special_tokens, verbose=False)["input_ids"])

    def failed(self, why: str) -> CheckpointError:
        """The error for what the tokenizer raises."""
        return CheckpointError(
            f"'{self.tokenizer.name_or_path}': its tokenizer fails on a text: {why} "
            "Copy 'tokenizer.json' from the model's own folder."
        )

    def encode(self, prompt: str, completion: str, *, max_tokens: int | None = None, reserve: int = 0) -> Encoded:
        """Ids of a prompt and of its completion, apart.

        The prompt is encoded for itself. The completion's ids are what the encoding of both together has after the
        prompt's ids; where the border falls inside a token of the whole, it is encoded for itself. The prompt's ids
        thus never depend on the completion, and labels of one prompt share its cache.

        Args:
            prompt: Text of the prompt.
            completion: Text of the completion; the border says how it joins the prompt.
            max_tokens: Most ids of prompt, completion and `reserve` together; the prompt is cut from the left, behind
                its begin-of-text token.
            reserve: Ids to be added later, such as the end mark.

        Raises:
            DataError: No token of the prompt is left, or one of the two has no tokens.
        """
        joined = self.border.join(prompt, completion)
        before = self.encode_text(prompt)
        whole = self.encode_text(prompt + joined)
        if len(whole) > len(before) and whole[: len(before)] == before:
            after = whole[len(before) :]
        else:
            after = self._ids_of(joined, add_special_tokens=False)
        if not before or not after:
            raise DataError(
                f"prompt '{_shorten(prompt)}' with completion '{_shorten(completion)}': "
                f"the {'prompt' if not before else 'completion'} has no tokens; both need at least one."
            )
        if max_tokens is None:
            return Encoded(prompt=before, completion=after)
        kept, n_cut = self.cut_prompt(before, room=max_tokens - len(after) - reserve)
        return Encoded(prompt=kept, completion=after, n_cut=n_cut)

    def encode_whole(self, text: str, *, max_tokens: int, reserve: int = 0) -> Encoded:
        """Ids of a text that is a completion as a whole: the first one is given, for nothing stands before it.

        Args:
            text: The text.
            max_tokens: Most ids of the text and `reserve` together; the text is cut from the left.
            reserve: Ids to be added later, such as the end mark.

        Raises:
            DataError: It has fewer than two tokens.
        """
        ids = self.encode_text(text)
        if len(ids) < 2:
            raise DataError(f"text '{_shorten(text)}': has {len(ids)} tokens; at least two are needed to learn from.")
        kept, n_cut = self.cut_prompt(ids, room=max_tokens - reserve)
        return Encoded(prompt=kept[:1], completion=kept[1:], n_cut=n_cut)

    def cut_prompt(self, prompt: tuple[int, ...], *, room: int) -> tuple[tuple[int, ...], int]:
        """The last `room` ids of a prompt and how many were cut; a begin-of-text token at its start is kept.

        Raises:
            NoRoomError: Nothing of the prompt's own text is left.
        """
        n_cut = max(0, len(prompt) - room)
        head = prompt[:1] if n_cut and prompt[0] == self.bos else ()
        if n_cut and room <= len(head):
            raise NoRoomError(
                f"a prompt of {len(prompt)} tokens, of which its completion leaves room for {max(room, 0)}",
                lacking=n_cut,
            )
        return head + prompt[len(head) + n_cut :], n_cut


class NoRoomError(DataError):
    """A row is too long to be cut.

    Attributes:
        found: The row, and the room for it.
        lacking: By how many tokens the limit would have to be raised for the whole row.
    """

    def __init__(self, found: str, *, lacking: int) -> None:
        super().__init__(f"{found}. Raise the token limit by {lacking}, or shorten the completion.")
        self.found = found
        self.lacking = lacking


def encode_rows(rows: Sequence[Row], encode: Callable[[Row], Ids], *, max_tokens: int) -> list[Ids]:
    """What `encode` makes of each row.

    Args:
        rows: What is to be encoded.
        encode: Makes ids of one row, or raises a `DataError`.
        max_tokens: The limit by which it does.

    Raises:
        DataError: Some rows cannot be encoded; all are counted, the first ten told one by one, and the limit with which
            they would fit whole.
    """
    encoded: list[Ids] = []
    problems: list[str] = []
    lacking = 0
    for number, row in enumerate(rows, start=1):
        try:
            encoded.append(encode(row))
        except NoRoomError as error:
            problems.append(f"  example {number}: {error.found}.")
            lacking = max(lacking, error.lacking)
        except DataError as error:
            problems.append(f"  example {number}: {error}")
    if not problems:
        return encoded
    lines = [f"{len(problems)} of {len(rows)} examples are invalid:", *problems[:SHOWN]]
    if len(problems) > SHOWN:
        lines.append(f"  and {len(problems) - SHOWN} more.")
    if lacking:
        enough = f"a limit of {max_tokens + lacking} tokens (--max-tokens)"
        lines.append(f"  With {enough}, those that are too long fit whole. Otherwise leave them out.")
    raise DataError("\n".join(lines))


def encode_prompts(encoder: Encoder, prompts: Sequence[str], *, room: int) -> tuple[list[tuple[int, ...]], int]:
    """The ids of each prompt, cut from the left to `room` of them, and how many prompts were.

    Raises:
        DataError: A prompt has no tokens.
    """
    rows, n_cut_rows = [], 0
    for number, prompt in enumerate(prompts, start=1):
        ids = encoder.encode_text(prompt)
        if not ids:
            raise DataError(f"prompt {number}: has no tokens; a model needs at least one.")
        kept, n_cut = encoder.cut_prompt(ids, room=room)
        rows.append(kept)
        n_cut_rows += n_cut > 0
    return rows, n_cut_rows


def pad_left(rows: Sequence[Sequence[int]], *, device: torch.device) -> PaddedBatch:
    """The rows in one rectangle, each at the right edge.

    Example:
        >>> batch = pad_left([[5, 6, 7], [8]], device=torch.device("cpu"))
        >>> batch.mask.tolist(), batch.positions.tolist()
        ([[1, 1, 1], [0, 0, 1]], [[0, 1, 2], [0, 0, 0]])
    """
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, width - len(row) :] = torch.tensor(row, dtype=torch.int64)
        mask[index, width - len(row) :] = 1
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return PaddedBatch(ids=ids.to(device), mask=mask.to(device), positions=positions.to(device))


def batches(lengths: Sequence[int], *, batch_size: int) -> Iterator[list[int]]:
    """All rows in batches of similar length: little padding, and the longest first, so that memory runs out at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    for start in range(0, len(order), batch_size):
        yield order[start : start + batch_size]


def together(widths: Sequence[int], vocabulary: int, *, most: int | None = None) -> Iterator[slice]:
    """Rows, in their order, as many at a time as leave the logits that are asked for within `LOGITS`; at least one.

    Args:
        widths: Places of each row whose logits are asked for, over the whole vocabulary; all rows get as many as the
            widest.
        vocabulary: Logits of a place.
        most: Rows at a time.

    Example:
        >>> list(together([3, 1, 2], LOGITS // 6))
        [slice(0, 2, None), slice(2, 3, None)]
    """
    start, widest = 0, 0
    for stop, width in enumerate(widths):
        count, widest = stop + 1 - start, max(widest, width)
        if count > 1 and (count > (most or count) or count * widest * vocabulary > LOGITS):
            yield slice(start, stop)
            start, widest = stop, width
    if widths:
        yield slice(start, len(widths))


def _shorten(text: str, *, width: int = 60) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"
