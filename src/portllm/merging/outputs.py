"""Merged models on their way: what each of them takes of a tensor is made while that is read, once for all of them.

Each output has its own staged folder and journal, and fails alone: one that cannot be made or written stops no other.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from portllm.checkpoint.model.identity import digest_tensor
from portllm.checkpoint.safetensors.header_file import read_header
from portllm.checkpoint.safetensors.writer import Shard, ShardWriter
from portllm.errors import CheckpointError, OutputError, PortLLMError
from portllm.files.output_folder import resumable_folder
from portllm.files.record import encode
from portllm.files.staging import Staged
from portllm.files.typed import decode
from portllm.merging.plan import MergePlan, MergeStep
from portllm.merging.tensor import Failure, Target, TensorOptions, TensorResults, make_tensor, workspaces
from portllm.workers.threads import Tell, run_side_by_side


@dataclass(slots=True)
class _File:
    """A file that is being written, by threads that take a tensor each."""

    name: str
    writer: ShardWriter
    missing: int
    facts: TensorResults = field(default_factory=TensorResults)


@dataclass(slots=True, eq=False)
class Output:
    """One merged model that is being written.

    Attributes:
        out: Its folder to be.
        plan: What it is made of.
        error: Why it cannot be made, or None.
        known: What is known of the tensors in its finished files.
        left: Its files that are yet to be written.
        opened: What is to be left when the output ends, in whatever way.
    """

    out: Path
    plan: MergePlan
    error: PortLLMError | None = None
    known: TensorResults = field(default_factory=TensorResults)
    left: list[Shard] = field(default_factory=list)
    opened: ExitStack = field(default_factory=ExitStack)
    _staged: Staged | None = None
    _files: dict[str, _File] = field(default_factory=dict)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """What goes wrong in this block goes wrong for this output, and for no other."""
        try:
            yield
        except (PortLLMError, OSError) as error:
            self.fail(error)

    def fail(self, error: Failure) -> None:
        """Give up; the first error stays."""
        self.error = self.error or not_written(self.out, error)

    def begin(self, *, overwrite: bool, digest: str) -> None:
        """Take the place, and find out what an earlier run of the same plan has finished.

        Raises:
            OutputError: It cannot be had.
        """
        staged = resumable_folder(self.out, overwrite=overwrite, plan=digest, inputs=self.plan.files)
        self._staged = self.opened.enter_context(staged)
        found = {shard.file: _finished(self._staged, shard) for shard in self.plan.shards}
        finished = {file: facts for file, facts in found.items() if facts is not None}
        self._staged.keep(finished)
        for facts in finished.values():
            self.known.add(facts)
        self.left = [shard for shard in self.plan.shards if shard.file not in finished]

    @contextmanager
    def ending(self) -> Iterator[Path]:
        """Finish the folder in this block; then it takes its name, or vanishes if the output has failed.

        Raises:
            PortLLMError: Why it has failed.
        """
        with self.opened:
            if self.error is not None:
                raise self.error
            assert self._staged is not None
            yield self._staged.folder

    def file(self, shard: Shard, how: TensorOptions) -> _File:
        """One of its files, which is begun when it is first asked for.

        Raises:
            OSError: It cannot be written.
        """
        if shard.file not in self._files:
            assert self._staged is not None
            writer = ShardWriter(self._staged.folder, shard, keep_cached=how.keep_cached)
            self.opened.callback(writer.abandon)
            self._files[shard.file] = _File(shard.file, writer, len(shard.entries))
        return self._files[shard.file]

    def note(self, file: _File, facts: TensorResults) -> None:
        """Take in that a tensor is written; with the last one its file is brought to the disk and noted as finished.

        Raises:
            OutputError, OSError: It is not on the disk.
        """
        file.facts.add(facts)
        file.missing -= 1
        if not file.missing:
            assert self._staged is not None
            file.writer.close()
            self._staged.finish(file.name, encode(file.facts))
            self.known.add(file.facts)


def not_written(out: Path, error: Failure) -> PortLLMError:
    """The error of an output that could not be written."""
    if isinstance(error, PortLLMError):
        return error
    failure = OutputError(f"'{out}': could not be written: {error.strerror or error}. Nothing was left behind.")
    failure.__cause__ = error
    return failure


def good(outputs: Sequence[Output]) -> list[Output]:
    """Those that have not failed."""
    return [output for output in outputs if output.error is None]


def write_outputs(outputs: Sequence[Output], how: TensorOptions, told: Callable[[int], None]) -> None:
    """Write the files that are left of outputs of one model; every tensor that any of them needs is read once.

    A file is noted as finished as soon as it is on the disk, while the next ones are written. An output that fails has
    its error; if the model cannot be read, all have that one.
    """

    def job(
        places: list[tuple[Output, _File, MergeStep]], tell: Tell
    ) -> list[tuple[Output, _File, TensorResults | Failure]]:
        places = [place for place in places if place[0].error is None]
        if not places:
            return []
        bench = free.get()
        try:
            targets = [Target(step, partial(file.writer.write, step.entry.name)) for _, file, step in places]
            made = make_tensor(targets, bench, tell)
        finally:
            free.put(bench)
        return [(output, file, result) for (output, file, _), result in zip(places, made, strict=True)]

    def jobs() -> Iterator[Callable[[Tell], list[tuple[Output, _File, TensorResults | Failure]]]]:
        for wanted in _by_source(outputs):
            places = []
            for output, shard, step in wanted:
                if output.error is None:
                    with output.alone():
                        places.append((output, output.file(shard, how), step))
            yield partial(job, places)

    def done(results: list[tuple[Output, _File, TensorResults | Failure]]) -> None:
        for output, file, result in results:
            if output.error is None:
                with output.alone():
                    if not isinstance(result, TensorResults):
                        raise result
                    output.note(file, result)
        if results and not good(outputs):
            raise _NothingLeftError

    try:
        with workspaces(how, (step for output in outputs for step in output.plan.steps.values())) as free:
            run_side_by_side(jobs(), threads=how.threads, told=told, done=done)
    except _NothingLeftError:
        pass
    except (PortLLMError, OSError) as error:
        for output in outputs:
            output.fail(error)


class _NothingLeftError(Exception):
    """Every output has failed."""


def _by_source(outputs: Sequence[Output]) -> Iterable[Sequence[tuple[Output, Shard, MergeStep]]]:
    """What is made of each tensor of the model, in the order in which the outputs' files need them."""
    wanted: dict[object, list[tuple[Output, Shard, MergeStep]]] = defaultdict(list)
    for output in outputs:
        for shard in output.left:
            for entry in shard.entries:
                step = output.plan.steps[entry.name]
                # A tensor that gets more rows is read anew for each of those that it gets.
                wanted[step.source, step.entry.shape, step.resized].append((output, shard, step))
    return wanted.values()


def _finished(staged: Staged, shard: Shard) -> TensorResults | None:
    """What an earlier run noted about a file, if the file still has every byte that the run wrote."""
    if shard.file not in staged.finished:
        return None
    file = staged.folder / shard.file
    try:
        with open(file, "rb") as stream:
            if stream.read(len(shard.header)) != shard.header:
                return None
        written = {name: digest_tensor(info) for name, info in read_header(file).tensors.items()}
        facts = decode(TensorResults, staged.finished[shard.file])
    except (OSError, CheckpointError, ValueError):
        return None
    return facts if facts.written == written else None
