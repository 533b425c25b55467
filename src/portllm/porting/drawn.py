"""Prompts that the old specialist draws itself, where those of its users are gone.

A prompt is a template with fields. What stands in a field is what the old specialist goes on with behind the text
before it, up to the end of the line; then the template has the word again. With a chat template, that is the user's
turn.

Source: Xu et al. (2024), Magpie: alignment data synthesis from scratch by prompting aligned LLMs with nothing,
arXiv 2406.08464, for chat templates; here for any template.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from portllm.progress import Progress
from portllm.running.encoding import Encoder
from portllm.running.layers import LayeredModel
from portllm.running.ranges import require_ranges
from portllm.running.spool import Spool
from portllm.running.writing import write_layered

FIELD_TOKENS = 48
"""Of what stands in a field, at most."""

MORE = 1.25
"""So many are drawn for one that is kept: some are blank, and some are drawn twice."""


@dataclass(frozen=True, slots=True)
class Drawn:
    """Prompts to be drawn.

    Attributes:
        count: How many, at most; no two are equal.
        parts: Of a prompt: literal texts, and names of fields, which are marked; a field that comes again holds the
            same again.
    """

    count: int
    parts: tuple[tuple[str, bool], ...]

    def __post_init__(self) -> None:
        require_ranges("drawn prompts", ("count", self.count, "1 or more", self.count >= 1))


def draw(
    model: LayeredModel,
    encoder: Encoder,
    drawn: Drawn,
    *,
    seed: int,
    batch_size: int,
    spool: Spool,
    progress: Progress,
) -> list[str]:
    """The prompts, in the order in which they were drawn.

    Args:
        model: The old specialist.
        encoder: Of its tokenizer.
        drawn: What is to be drawn.
        seed: Of the draws.
        batch_size: Prompts of a pass.
        spool: Where keys and values lie.
        progress: Told of the tokens written.
    """
    generator = torch.Generator().manual_seed(seed)
    ends = encoder.stops | lines_end(encoder)

    def drawn_token(logits: Tensor) -> Tensor:
        return torch.multinomial(logits.cpu().softmax(dim=1), 1, generator=generator)[:, 0]

    texts = [""] * round(MORE * drawn.count)
    fields: list[dict[str, str]] = [{} for _ in texts]
    for place, (part, is_field) in enumerate(drawn.parts):
        if is_field and part not in fields[0]:
            written = write_layered(
                model,
                [encoder.encode_text(text) or (encoder.start,) for text in texts],
                most=FIELD_TOKENS,
                ends=ends,
                pick=drawn_token,
                batch_size=batch_size,
                spool=spool,
                progress=progress,
            )
            after = "".join(text for text, is_other in drawn.parts[place + 1 : place + 2] if not is_other)
            for values, ids in zip(fields, written.ids, strict=True):
                values[part] = first_line(encoder.decode(ids), after)
        texts = [text + (values[part] if is_field else part) for text, values in zip(texts, fields, strict=True)]
    whole = (text for text, values in zip(texts, fields, strict=True) if all(values.values()))
    return list(dict.fromkeys(whole))[: drawn.count]


def lines_end(encoder: Encoder) -> frozenset[int]:
    """Tokens with the end of a line."""
    return frozenset(token for token in encoder.tokenizer.get_vocab().values() if "\n" in encoder.decode([token]))


def first_line(text: str, after: str) -> str:
    r"""What stands before the end of a line, and before the text that is to follow.

    Example:
        >>> first_line("why? Type: cause", " Type:"), first_line(" one\ntwo", "")
        ('why?', 'one')
    """
    line = text.partition("\n")[0]
    return (line.partition(after)[0] if after.strip() else line).strip()
