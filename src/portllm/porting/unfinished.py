"""What an aligned port has done so far, in the folder that it writes: a run of the same plan goes on from there."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from blake3 import blake3
from safetensors.torch import load_file, save_file
from torch import Tensor

from portllm.arrays import Float32
from portllm.files.own_files import write_text
from portllm.files.seal import digest_file
from portllm.files.staging import Staged, remove
from portllm.running.spool import Spool
from portllm.running.writing import Written

DRAWN = ".prompts.json"
WRITTEN = ".{}.safetensors"
PUT, STATES = ".put-{}-{}.safetensors", ".states-{}-{}.float32"
"""Of a walk, by the layers done: what candidates have in the last of them, and the states behind it."""


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

    def spool(self) -> Spool:
        """Room on the disk for what need not be in memory, nor outlive the run."""
        return Spool(self.staged.folder)

    def drawn(self, draw: Callable[[], list[str]]) -> list[str]:
        """The prompts that a model draws, or drew already, in this run or an earlier one."""
        if self._drawn is None:
            if not self._is_whole(DRAWN):
                write_text(self.staged.folder / DRAWN, json.dumps(draw()))
                self._finish(DRAWN)
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
                self._finish(file)
            kept = load_file(self.staged.folder / file)
            rows = torch.split(kept["ids"], kept["lengths"].tolist())
            self._written[name] = Written([tuple(row.tolist()) for row in rows], kept["states"])
        return self._written[name]

    def walked(self, candidates: Sequence[str], states: Sequence[Float32[Tensor, "..."]]) -> int:
        """How many layers candidates have come through; the states behind them are filled in."""
        walk = _walk_of(candidates)
        n_done = next((n for n in range(self._n_put(walk), 0, -1) if self._is_whole(STATES.format(walk, n))), 0)
        if n_done:
            with (self.staged.folder / STATES.format(walk, n_done)).open("rb") as file:
                for state in states:
                    file.readinto(state.numpy().data.cast("B"))
        return n_done

    def put(self, candidates: Sequence[str], n_layers: int) -> dict[str, Tensor]:
        """What candidates have in the first layers."""
        files = (self.staged.folder / PUT.format(_walk_of(candidates), n) for n in range(1, n_layers + 1))
        return {name: tensor for file in files for name, tensor in load_file(file).items()}

    def keep_walked(
        self,
        n_done: int,
        candidates: Sequence[str],
        put: Mapping[str, Tensor],
        states: Sequence[Float32[Tensor, "..."]],
    ) -> None:
        """Note what candidates have in the last of so many layers, and the states behind it.

        Args:
            n_done: The layers.
            candidates: Of the walk.
            put: What they have there, by name.
            states: All that the next layer is given, in a fixed order.
        """
        walk = _walk_of(candidates)
        save_file(dict(put), self.staged.folder / PUT.format(walk, n_done))
        self._finish(PUT.format(walk, n_done))
        with (self.staged.folder / STATES.format(walk, n_done)).open("wb") as file:
            for state in states:  # one by one, as they lie: a copy of all would be half of the memory of a run
                file.write(state.numpy().data.cast("B"))
        self._finish(STATES.format(walk, n_done))
        remove(self.staged.folder / STATES.format(walk, n_done - 1))

    def clear(self) -> None:
        """Remove all of it: the output is about to be whole."""
        for entry in self.staged.folder.glob(".*"):
            remove(entry)

    def _n_put(self, walk: str) -> int:
        """Of how many layers, from the first on, what was put there is whole."""
        n_put = 0
        while self._is_whole(PUT.format(walk, n_put + 1)):
            n_put += 1
        return n_put

    def _is_whole(self, name: str) -> bool:
        path = self.staged.folder / name
        return name in self.staged.finished and self.staged.finished[name].get("digest") == digest_file(path)

    def _finish(self, name: str) -> None:
        self.staged.finish(name, {"digest": digest_file(self.staged.folder / name)})


def _walk_of(candidates: Sequence[str]) -> str:
    """The name of a walk in those of its files."""
    return blake3("\n".join(candidates).encode()).hexdigest(4)
