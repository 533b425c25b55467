"""The programs that a patch can be exported for, and what each of them takes."""

import importlib.resources
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache

import msgspec

from portllm.errors import PortLLMError


class Form(StrEnum):
    """How a runtime wants a patch."""

    PEFT = "peft"
    LORA = "lora"
    FILE = "file"
    MLX = "mlx"
    GGUF_LORA = "gguf-lora"
    GGUF_MODEL = "gguf-model"


class Part(StrEnum):
    """What a patch may have besides the plain deltas of linear modules."""

    DORA = "DoRA"
    WHOLE = "whole modules"
    BIASES = "biases"
    BIAS_DELTAS = "bias deltas"
    TOKEN_ROWS = "token rows"
    ADDED_TOKENS = "added tokens"
    EXPERTS = "experts"
    EMBEDDING = "embedding"
    HEAD = "head"
    CONV1D = "Conv1D"


@dataclass(frozen=True, slots=True)
class Runtime:
    """What one program takes.

    Attributes:
        id: Its name on the command line.
        title: Its name for people.
        version: The version whose source was read.
        form: How it wants a patch.
        serve: How it is started or called with the export.
        library: What the hub calls it.
        swap: How a ported patch takes the place of the old one.
        prove: The runtime that `prove` starts to see that an export is served; empty where it starts none.
        holds: What it takes besides the plain deltas of linear modules.
        why: Of what it does not take, what it does with it, where that is known.
        ranks: The ranks to pad to, ascending; none for any.
        max_rank: The largest rank that it takes; None for any.
        every_layer: Whether each module must be in every layer, as zeros where the patch has none.
        together: Modules that must all be there where one of them is.
    """

    id: str
    title: str
    version: str
    form: Form
    library: str
    serve: str
    swap: str
    prove: str = ""
    holds: frozenset[Part] = frozenset()
    why: Mapping[Part, str] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    max_rank: int | None = None
    every_layer: bool = False
    together: tuple[tuple[str, ...], ...] = ()

    def rank_for(self, rank: int) -> int | None:
        """The rank that deltas of up to `rank` are padded to; None where they are too large.

        Example:
            >>> [runtimes()["vllm"].rank_for(rank) for rank in (4, 24, 600)]
            [8, 32, None]
        """
        if self.ranks:
            return next((taken for taken in self.ranks if taken >= rank), None)
        return rank if self.max_rank is None or rank <= self.max_rank else None


@cache
def runtimes() -> Mapping[str, Runtime]:
    """Every runtime by its id, in the order of the table."""
    text = importlib.resources.files("portllm.serving").joinpath("runtimes.toml").read_text(encoding="utf-8")
    rows = {name: {"id": name, **row} for name, row in tomllib.loads(text).items()}
    return msgspec.convert(rows, dict[str, Runtime])


def runtime_named(name: str) -> Runtime:
    """A runtime by its id.

    Raises:
        PortLLMError: There is none of this name.
    """
    if name not in runtimes():
        raise PortLLMError(f"--for {name}: unknown runtime; expected one of {', '.join(runtimes())}.")
    return runtimes()[name]
