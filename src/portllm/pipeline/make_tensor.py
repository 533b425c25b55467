"""One output tensor from the first block to the last: read, changed, written, and both digests taken on the way."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import astuple, dataclass, field
from queue import SimpleQueue

import torch
from blake3 import blake3

from portllm.checkpoint.identity import digest_stored
from portllm.errors import DeviceError
from portllm.patch.rounding import MergeSums
from portllm.pipeline.blocks import NEAREST, Bench, Rounding, blocks_of
from portllm.pipeline.plan import MergeStep
from portllm.pipeline.side_by_side import Tell, default_threads

TELL_BYTES = 1 << 23
"""So much is made between two words to the thread that keeps the books, which has to wake up for each."""


@dataclass(frozen=True, slots=True)
class How:
    """How tensors are made; none of it but rounding and device can change a byte.

    Attributes:
        rounding: How a sum is brought to the storage dtype.
        device: Where the arithmetic is done, `cpu` or `cuda`.
        keep_cached: Leave in the kernel's cache what was read and written.
        threads: Tensors in work at a time.
    """

    rounding: Rounding = NEAREST
    device: str = "cpu"
    keep_cached: bool = True
    threads: int = field(default_factory=lambda: default_threads())


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of tensors, by name in their files: digests of what was read and written; what rounding took."""

    read: dict[str, str] = field(default_factory=dict)
    written: dict[str, str] = field(default_factory=dict)
    sums: dict[str, MergeSums] = field(default_factory=dict)

    def add(self, other: "Facts") -> None:
        """Take in what is known of other tensors."""
        self.read.update(other.read)
        self.written.update(other.written)
        self.sums.update(other.sums)

    def to_json(self) -> dict[str, object]:
        """As JSON values."""
        return {
            "read": self.read,
            "written": self.written,
            "sums": {name: astuple(sums) for name, sums in self.sums.items()},
        }

    @staticmethod
    def from_json(values: Mapping[str, object]) -> "Facts":
        """The facts that these values stand for; ValueError where they stand for none."""
        match values:
            case {"read": dict(read), "written": dict(written), "sums": dict(sums)}:
                return Facts(read, written, {name: MergeSums(*numbers) for name, numbers in sums.items()})
            case _:
                raise ValueError("these are not the facts of a merge")


def make_tensor(step: MergeStep, bench: Bench, write: Callable[[int, memoryview], None], tell: Tell) -> Facts:
    """Hand a tensor's bytes to `write`, with the place of each part in the tensor; `tell` hears how many they were.

    Raises:
        NonFiniteError: As `blocks_of`.
    """
    read, written = blake3(), blake3()
    sums = None if step.change is None else MergeSums()
    place = told = 0
    for block in blocks_of(step, bench):
        write(place, block.data)
        read.update(block.source)
        if block.data is not block.source:
            written.update(block.data)
        if sums is not None and block.sums is not None:
            sums += block.sums
        place += len(block.data)
        if place - told >= TELL_BYTES:
            tell(place - told)
            told = place
    tell(place - told)
    # What is decoded on the way has other bytes in its file, and more than one tensor of them.
    source = step.source
    return Facts(
        {source.name: read.hexdigest()} if source.encoding is None else digest_stored(source, {}),
        {step.entry.name: (read if step.is_copy else written).hexdigest()},
        {} if sums is None else {step.entry.name: sums},
    )


def require_device(device: str) -> str:
    """The same device, if torch finds it here.

    Raises:
        DeviceError: It does not.
    """
    if device != "cpu" and not torch.cuda.is_available():
        raise DeviceError(f"--device {device}: torch finds none here. Leave the option out to compute on the CPU.")
    return device


@contextmanager
def benches(how: How) -> Iterator["SimpleQueue[Bench]"]:
    """A bench for each thread, to be taken and put back."""
    free: SimpleQueue[Bench] = SimpleQueue()
    with ExitStack() as made:
        for _ in range(how.threads):
            free.put(made.enter_context(Bench(how.rounding, device=how.device, keep_cached=how.keep_cached)))
        yield free
