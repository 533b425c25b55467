"""What an aligned port has done so far, in the folder that it writes: a run of the same plan goes on from there."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from portllm.arrays import Float32
from portllm.files.own_files import write_text
from portllm.files.seal import digest_file
from portllm.files.staging import Staged, remove
from portllm.running.writing import Written

DRAWN = ".prompts.json"
WRITTEN = ".{}.safetensors"
WALK = ".layer-{}.safetensors"
MAPPED = ".states-{}"

MAPPED_BYTES = 1 << 26
"""States of that size or more lie on disk."""


@dataclass
class Unfinished:
    """The work of a run that may die.

    Attributes:
        staged: The folder that is written; it stays where the run is interrupted.
    """

    staged: Staged

    def __post_init__(self) -> None:
        self._drawn: list[str] | None = None
        self._written: dict[str, Written] = {}

    def drawn(self, draw: Callable[[], list[str]]) -> list[str]:
        """The prompts that a model draws, or drew already, in this run or an earlier one."""
        if self._drawn is None:
            if not self._is_whole(DRAWN):
                write_text(self.staged.folder / DRAWN, json.dumps(draw()))
                self._finish(DRAWN, {})
            self._drawn = [str(text) for text in json.loads((self.staged.folder / DRAWN).read_text(encoding="utf-8"))]
        return self._drawn

    def written(self, name: str, write: Callable[[], Written]) -> Written:
        """What a model writes, or wrote already, likewise."""
        if name not in self._written:
            file = WRITTEN.format(name)
            if not self._is_whole(file):
                found = write()
                ids = torch.tensor([token for row in found.ids for token in row], dtype=torch.int64)
                lengths = torch.tensor([len(row) for row in found.ids])
                save_file({"ids": ids, "lengths": lengths, "states": found.states}, self.staged.folder / file)
                self._finish(file, {})
            kept = load_file(self.staged.folder / file)
            rows = torch.split(kept["ids"], kept["lengths"].tolist())
            self._written[name] = Written([tuple(row.tolist()) for row in rows], kept["states"])
        return self._written[name]

    def walked(self, candidates: Sequence[str]) -> tuple[int, dict[str, Tensor]]:
        """How many layers candidates have come through, and what they had there."""
        for number in sorted(self._layers(), reverse=True):
            name = WALK.format(number)
            if self.staged.finished[name].get("candidates") == list(candidates) and self._is_whole(name):
                return number, load_file(self.staged.folder / name)
        return 0, {}

    def keep_walked(self, number: int, candidates: Sequence[str], tensors: Mapping[str, Tensor]) -> None:
        """Note what candidates have behind so many layers."""
        name = WALK.format(number)
        save_file(dict(tensors), self.staged.folder / name)
        self._finish(name, {"candidates": list(candidates)})
        for before in range(number):
            remove(self.staged.folder / WALK.format(before))

    def room(self, name: str, *shape: int) -> Float32[Tensor, "..."]:
        """A tensor to be filled; a large one lies in a mapped file, which the system may take out of memory."""
        size = math.prod(shape)
        if size * torch.float32.itemsize < MAPPED_BYTES:
            return torch.empty(shape)
        file = self.staged.folder / MAPPED.format(name)
        return torch.from_file(str(file), shared=True, size=size, dtype=torch.float32).view(shape)

    def clear(self) -> None:
        """Remove all of it: the output is about to be whole."""
        for entry in self.staged.folder.glob(".*"):
            remove(entry)

    def _layers(self) -> list[int]:
        first, last = WALK.split("{}")
        return [
            int(name.removeprefix(first).removesuffix(last)) for name in self.staged.finished if name.startswith(first)
        ]

    def _is_whole(self, name: str) -> bool:
        path = self.staged.folder / name
        return name in self.staged.finished and self.staged.finished[name].get("digest") == digest_file(path)

    def _finish(self, name: str, facts: Mapping[str, object]) -> None:
        self.staged.finish(name, {**facts, "digest": digest_file(self.staged.folder / name)})
