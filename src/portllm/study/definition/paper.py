"""Numbers of the paper and of later work, to set results beside: each with where it was read."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources

import msgspec


@dataclass(frozen=True, slots=True)
class PublishedRow:
    """One row of a published table, in percent; None where the number could not be had.

    Attributes:
        task: The task, by the name that the paper uses.
        pretrained: The base.
        tuned: The base with its patch.
        evolved: The updated model.
        ported: The updated model with the old patch.
        retrained: The updated model with a patch trained on it.
    """

    task: str
    pretrained: float | None = None
    tuned: float | None = None
    evolved: float | None = None
    ported: float | None = None
    retrained: float | None = None


@dataclass(frozen=True, slots=True)
class PublishedTable:
    """Numbers that somebody else measured.

    Attributes:
        title: Model, corpus and where they stand.
        provenance: How they were had: read in the source, or second-hand.
        rows: As far as they are known.
    """

    title: str
    provenance: str
    rows: tuple[PublishedRow, ...]


@cache
def published() -> Mapping[str, PublishedTable]:
    """The tables by name."""
    text = resources.files("portllm.study.definition").joinpath("published.json").read_bytes()
    return msgspec.json.decode(text, type=dict[str, PublishedTable])
