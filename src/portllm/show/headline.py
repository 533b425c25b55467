"""What a result says first, in the terminal and on its page: one sentence to act on, why, and what to do next. Pure."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Tone = Literal["good", "doubt", "bad", "plain"]


@dataclass(frozen=True, slots=True)
class Headline:
    """What is said first.

    Attributes:
        tone: Its color and sign.
        text: In one sentence.
        reasons: What stands below it, a line each.
        next: What to do now, in words; empty where nothing follows.
        command: The command that does it, or none.
    """

    tone: Tone
    text: str
    reasons: Sequence[str] = ()
    next: str = ""
    command: str = ""


def headline_lines(headline: Headline) -> list[str]:
    r"""A headline for the terminal.

    Example:
        >>> print(*headline_lines(Headline("good", "Safe.", ["so it is"], "Merge it", "portllm merge p")), sep="\n")
        Safe.
          - so it is
        Next: Merge it:
          portllm merge p
    """
    lines = [headline.text, *(f"  - {reason}" for reason in headline.reasons)]
    if headline.next:
        lines.append(f"Next: {headline.next}{':' if headline.command else '.'}")
    return [*lines, f"  {headline.command}"] if headline.command else lines


def command_line(*words: object) -> str:
    """A command as a shell reads it.

    Example:
        >>> command_line("portllm", "inspect", "my patch")
        "portllm inspect 'my patch'"
    """
    return shlex.join(map(str, words))
