"""What answers begin with whatever the prompt: it says nothing of the prompt, so models are compared behind it."""

from collections.abc import Callable

import torch
from jaxtyping import Float32
from torch import Tensor

MOST_SHARED = 8
"""Tokens that all answers may begin with: a blank, a quotation mark, a few words of form."""

Logits = Float32[Tensor, "prompts vocabulary"]


def shared_beginning(
    ask: Callable[[tuple[int, ...]], list[Logits]], *, end: int
) -> tuple[tuple[int, ...], list[Logits]]:
    """What answers begin with whatever the prompt, and what models say after it.

    A beginning that all answers share says nothing of the prompt: where labels are numbers, a tokenizer may put a blank
    before them as a token of its own.

    Args:
        ask: The logits of each model after every prompt and some tokens.
        end: The token that ends an answer.

    Returns:
        The tokens, none where all answers are the same to their end or for more than `MOST_SHARED` tokens, and the
        logits after them.

    Example:
        >>> blanks, answers = torch.eye(4)[[1, 1]], torch.eye(4)[[2, 3]]
        >>> shared_beginning(lambda shared: [answers if shared else blanks], end=0)[0]
        (1,)
    """
    shared: tuple[int, ...] = ()
    first = logits = ask(shared)
    while len(likeliest := {int(token) for each in logits for token in each.argmax(dim=-1)}) == 1:
        if len(shared) == MOST_SHARED or end in likeliest:
            return (), first
        shared += (*likeliest,)
        logits = ask(shared)
    return shared, logits
