"""What the tools read: made when it is first asked for, and kept for the next benchmark."""

import hashlib
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from bench.shapes import Shape
from portllm.files.output_folder import staged_folder

RESERVE_BYTES = 5_000_000_000
"""Left free on the disk whatever is made."""

OUTPUTS = "out"
"""The folder of all that tools write: empty before each run, and after it."""


class NoRoomError(Exception):
    """The disk has no room for a model of this shape."""


class Inputs:
    """Checkpoints, an adapter and a patch of one shape, in a folder of their own."""

    def __init__(self, shape: Shape, folder: Path, *, rank: int = 16) -> None:
        self.shape = shape
        self.folder = folder
        self.rank = rank
        made_by = folder / "made-by"
        if not made_by.exists() or made_by.read_text() != _maker(shape, rank):
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir(parents=True)
            made_by.write_text(_maker(shape, rank))

    @property
    def model_bytes(self) -> int:
        """Bytes of one checkpoint."""
        return 2 * self.shape.n_params

    @cached_property
    def base(self) -> Path:
        """The model that the adapter was made on."""
        return self._checkpoint("base")

    @cached_property
    def tuned(self) -> Path:
        """The base with the adapter's delta in its weights, rounded."""
        return self._checkpoint("tuned", delta=True)

    @cached_property
    def evolved(self) -> Path:
        """A later version of the base."""
        return self._checkpoint("evolved", drift=True)

    @cached_property
    def adapter(self) -> Path:
        """A PEFT adapter on all seven linear layers."""
        from bench.synthetic import write_adapter

        return self._made("adapter", lambda folder: write_adapter(self.shape, folder, rank=self.rank))

    def adapters(self, n: int) -> Path:
        """A folder of so many adapters; the first one's delta is that of `adapter`."""
        from bench.synthetic import write_adapter

        def write(folder: Path) -> None:
            with staged_folder(folder, overwrite=False) as part:
                for seed in range(n):
                    write_adapter(self.shape, part / f"{seed:03d}", seed=seed)

        return self._made(f"adapters-{n}", write)

    @cached_property
    def patch(self) -> Path:
        """The adapter, captured: it knows its base."""
        shutil.rmtree(self.folder / "patch", ignore_errors=True)  # by the program as it is now
        arguments = ("capture", "--quiet", "--adapter", str(self.adapter), "--base", str(self.base), "--output")
        return self._made(
            "patch",
            lambda folder: subprocess.run(
                [sys.executable, "-m", "portllm", *arguments, str(folder)], check=True, stdout=subprocess.DEVNULL
            ),
        )

    def output(self, name: str) -> Path:
        """Where a tool may write."""
        return self.folder / OUTPUTS / name

    def require_room(self, n_bytes: int) -> None:
        """Raise NoRoomError unless so many bytes can be written, and an output of a model's size beside them."""
        needed = n_bytes + self.model_bytes + RESERVE_BYTES
        free = shutil.disk_usage(self.folder).free
        if free < needed:
            raise NoRoomError(f"{needed / 1e9:.0f} GB are needed in '{self.folder}', {free / 1e9:.0f} GB are free")

    def _checkpoint(self, name: str, *, delta: bool = False, drift: bool = False) -> Path:
        from bench.synthetic import write_checkpoint

        if not (self.folder / name).exists():
            self.require_room(self.model_bytes)
        return self._made(name, lambda folder: write_checkpoint(self.shape, folder, delta=delta, drift=drift))

    def _made(self, name: str, make: Callable[[Path], object]) -> Path:
        folder = self.folder / name
        if not folder.exists():
            print(f"making {folder}", flush=True)
            make(folder)
        return folder


def _maker(shape: Shape, rank: int) -> str:
    """All that the models depend on: their shape, the adapter's rank, and the code that makes them."""
    source = Path(__file__).with_name("synthetic.py").read_text()
    return hashlib.sha256(f"{source} {shape.shard_bytes} {shape.config} {rank}".encode()).hexdigest()
