"""One tensor from the first block to the last: read once, and for each output changed, written and digested."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from queue import SimpleQueue

import msgspec
from blake3 import blake3

from portllm.checkpoint.model.identity import digest_stored
from portllm.errors import DeviceError, PortLLMError
from portllm.merging.blocks import BlockKernel, SourceBlock, Tiling, Workspace, copied, cut_for, read_blocks
from portllm.merging.plan import MergeStep
from portllm.merging.rounding_modes import NEAREST, Rounding
from portllm.merging.with_native import can_fuse, fused
from portllm.patch.rounding import MergeSums
from portllm.workers.threads import Tell, default_threads

TELL_BYTES = 1 << 23
"""So much is made between two words to the thread that keeps the books, which has to wake up for each."""


@dataclass(frozen=True, slots=True)
class TensorOptions:
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


class TensorResults(msgspec.Struct, frozen=True):
    """What is known of tensors, by name in their files: digests of what was read and written; what rounding took."""

    read: dict[str, str] = msgspec.field(default_factory=dict)
    written: dict[str, str] = msgspec.field(default_factory=dict)
    sums: dict[str, MergeSums] = msgspec.field(default_factory=dict)

    def add(self, other: "TensorResults") -> None:
        """Take in what is known of other tensors."""
        self.read.update(other.read)
        self.written.update(other.written)
        self.sums.update(other.sums)


@dataclass(frozen=True, slots=True)
class Target:
    """An output tensor: what is done to its source, and what takes its bytes, with the place of each part in it."""

    step: MergeStep
    write: Callable[[int, memoryview], None]


Failure = PortLLMError | OSError
"""Why an output has no tensor; the others have theirs all the same."""


def make_tensor(targets: Sequence[Target], bench: Workspace, tell: Tell) -> list[TensorResults | Failure]:
    """Read a tensor once and hand every target its bytes; `tell` hears how many they were.

    What patches leave alone is rounded and digested once, however many targets take it.

    Args:
        targets: What becomes of the tensor: steps of one source.
        bench: Where the blocks are made.
        tell: Told of the bytes that were written.

    Returns:
        For each target what is known of its tensor, or why it could not be made or written.

    Raises:
        CheckpointError: The source cannot be read.
    """
    source = targets[0].step.source
    cut = cut_for([target.step for target in targets], bench)
    makings = _makings(targets)
    for making in makings:
        making.begin(cut, bench)
    read, n_bytes = blake3(), 0
    for stored in read_blocks(cut, bench):
        if stored.is_stored:
            read.update(stored.data)
        for making in makings:
            n_bytes += making.make(stored)
        if n_bytes >= TELL_BYTES:
            tell(n_bytes)
            n_bytes = 0
        if not any(making.left for making in makings):
            break
    tell(n_bytes)
    # What is decoded on the way has other bytes in its file, and more than one tensor of them.
    digests = {source.name: read.hexdigest()} if source.encoding is None else digest_stored(source, {})
    made = {number: result for making in makings for number, result in making.results(digests)}
    return [made[number] for number in range(len(targets))]


class _SharedOutput:
    """What some targets get alike, block by block; it ends for a target that cannot be written.

    Attributes:
        left: The targets that are still written, by their numbers.
    """

    def __init__(self, targets: Mapping[int, Target]) -> None:
        self.left = dict(targets)
        self._step = next(iter(targets.values())).step
        self._digest = blake3()
        self._sums = None if self._step.change is None else MergeSums()
        self._failed: dict[int, Failure] = {}
        self._place = 0

    def begin(self, cut: Tiling, bench: Workspace) -> None:
        """Read what the patch has for this tensor."""
        try:
            self._maker = _maker_of(self._step, cut, bench)
        except PortLLMError as error:
            self._fail(error, *self.left)

    def make(self, stored: SourceBlock) -> int:
        """Make a block and hand it to the targets; how many bytes they took together."""
        if not self.left:
            return 0
        try:
            block = self._maker(stored)
        except PortLLMError as error:
            self._fail(error, *self.left)
            return 0
        for number, target in list(self.left.items()):
            try:
                target.write(self._place, block.data)
            except OSError as error:
                self._fail(error, number)
        if not self._step.is_copy:
            self._digest.update(block.data)
        if self._sums is not None and block.sums is not None:
            self._sums += block.sums
        self._place += len(block.data)
        return len(self.left) * len(block.data)

    def results(self, read: Mapping[str, str]) -> Iterator[tuple[int, TensorResults | Failure]]:
        """What became of each target, with the digests of what was read."""
        yield from self._failed.items()
        for number, target in self.left.items():
            name, source = target.step.entry.name, target.step.source.name
            written = read[source] if self._step.is_copy else self._digest.hexdigest()
            yield number, TensorResults(dict(read), {name: written}, {} if self._sums is None else {name: self._sums})

    def _fail(self, error: Failure, *numbers: int) -> None:
        for number in numbers:
            self._failed[number] = error
            del self.left[number]


def _maker_of(step: MergeStep, cut: Tiling, bench: Workspace) -> BlockKernel:
    if step.is_copy:
        return copied
    if can_fuse(step, bench.rounding, bench.device):
        return fused(step, bench)
    from portllm.merging.with_torch import change_of  # loads torch

    return change_of(step, cut, bench)


def _makings(targets: Sequence[Target]) -> list[_SharedOutput]:
    """The targets by what they get: each change is made for itself, all else once for each storage dtype."""
    alike: dict[int | str, dict[int, Target]] = defaultdict(dict)
    for number, target in enumerate(targets):
        alike[target.step.entry.dtype if target.step.change is None else number][number] = target
    return [_SharedOutput(found) for found in alike.values()]


def require_device(device: str) -> str:
    """The same device, if torch finds it here.

    Raises:
        DeviceError: It does not.
    """
    if device != "cpu":
        import torch

        if not torch.cuda.is_available():
            raise DeviceError(f"--device {device}: torch finds no such device. Omit the option to compute on the CPU.")
    return device


@contextmanager
def workspaces(how: TensorOptions, steps: Iterable[MergeStep]) -> Iterator["SimpleQueue[Workspace]"]:
    """A bench for each thread, to be taken and put back; where the steps need torch, it computes on one thread each."""
    free: SimpleQueue[Workspace] = SimpleQueue()
    with ExitStack() as made:
        if not all(step.is_copy or can_fuse(step, how.rounding, how.device) for step in steps):
            from portllm.workers.one_thread import one_thread  # loads torch

            made.enter_context(one_thread())
        for _ in range(how.threads):
            free.put(made.enter_context(Workspace(how.rounding, device=how.device, keep_cached=how.keep_cached)))
        yield free
