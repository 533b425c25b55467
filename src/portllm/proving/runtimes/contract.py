"""What a runtime is to the proof: base and patch are loaded, prompts are asked, log-probabilities come back."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol, TypeAlias, runtime_checkable

Model: TypeAlias = Literal["base", "patch"]

TOP = 20
"""Most log-probabilities that are asked for; vLLM gives no more by default."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a runtime says comes next.

    Attributes:
        top: Log-probabilities of the likeliest tokens, by their id.
        n_prompt_tokens: As how many tokens it has read the prompt; None where it does not say.
    """

    top: Mapping[int, float]
    n_prompt_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What a runtime is to load.

    Attributes:
        base: Folder or file of the base, as the runtime takes it.
        patch: Folder or file of the exported patch.
        python: The Python of the environment that the runtime is installed in.
        max_tokens: How many tokens the longest prompt has, and a few more.
        ids_by_text: The tokens by what they say, for servers that name them by that.
    """

    base: Path
    patch: Path
    python: Path
    max_tokens: int
    ids_by_text: Callable[[], Mapping[str, int]]


@runtime_checkable
class Running(Protocol):
    """A runtime that has loaded both."""

    @property
    def version(self) -> str:
        """Of the runtime, or what is known of it."""
        ...

    def ask(self, model: Model, prompt: str) -> Answer:
        """What comes after a prompt.

        Raises:
            RuntimeFailedError: It has ended, or gives no log-probabilities.
        """
        ...


BaseForm = Literal["folder", "gguf"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """A row of `RUNTIMES`.

    Attributes:
        name: As given on the command line.
        title: Its own name.
        package: The module that is imported where it is installed.
        install: What pip is given to install it.
        profile: The id of the form that a patch is exported in for it.
        base: What it takes as base: a checkpoint folder, or a GGUF file.
        start: Starts it, and ends it with the block.
    """

    name: str
    title: str
    package: str
    install: str
    profile: str
    base: BaseForm = "folder"
    start: Callable[[Served], AbstractContextManager[Running]]
