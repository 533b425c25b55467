"""Every error that PortLLM raises on purpose; a caller that catches `PortLLMError` catches them all.

    PortLLMError
      CheckpointError        a model cannot be read or written as asked
        HeaderError            a safetensors header breaks a rule of the format
        IndexFileError         a shard index does not describe the shards beside it
        MissingShardError      a shard that the index names is not there
        MissingTensorError     a tensor that the caller needs is not there
        UnsupportedDtypeError  a dtype that this program does not compute with
        NotFoundError          no model at the place that was named
        RemoteError            a server does not give the bytes it was asked for
      PatchError             an adapter or patch cannot be used
        AdapterFormatError     the folder is not an adapter this program understands whole
        PatchRecordError       patch.json is missing, breaks its schema or its seal
        NonFiniteError         an infinity or NaN where a number is needed
      PortError
        UnknownMethodError     no row of METHODS has this id
      DeviceError            there is no such device to compute on
      PlanRefusedError       a plan found reasons not to run; it carries them all
      OutputError            the output cannot be written
        OutputExistsError      something is there already
        OutputBusyError        another run is writing there
      CertificateError       certificate.json is missing, breaks its schema, or does not add up
      SignatureError         a signature cannot be made or checked
      FleetFileError         the file that describes a fleet is wrong, or what it names is not there
      StudyFileError         the file that describes a study is wrong
      StudyStepError         a step of a study failed on a worker
      WorkersError           no worker of a fleet or a study can be started
      StorageError           a place that is reached by URL cannot be read or written
      DataError              rows of a data file do not fit the task
      MissingExtraError      an optional dependency is not installed

A message says where, what was found, what was expected, and what to do. The command line prints it and exits
with 1; anything that is not a `PortLLMError` is a bug and keeps its traceback.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class PortLLMError(Exception):
    """The root of the tree."""


class CheckpointError(PortLLMError):
    """A model cannot be read or written as asked."""


class HeaderError(CheckpointError):
    """A safetensors header breaks a rule of the format."""


class IndexFileError(CheckpointError):
    """A shard index does not describe the shards beside it."""


class MissingShardError(CheckpointError):
    """A shard that the index names is not there."""


class MissingTensorError(CheckpointError):
    """A tensor that the caller needs is not in the checkpoint."""


class UnsupportedDtypeError(CheckpointError):
    """A tensor has a dtype that this program does not compute with."""


class NotFoundError(CheckpointError):
    """There is no model at the place that was named."""


class RemoteError(CheckpointError):
    """A server cannot be reached, denies access, or does not give the bytes it was asked for."""


class PatchError(PortLLMError):
    """An adapter or patch cannot be used."""


class AdapterFormatError(PatchError):
    """The folder is not an adapter that this program understands whole."""


class PatchRecordError(PatchError):
    """`patch.json` is missing where it is needed, breaks its schema, or its seal does not fit what it says."""


class NonFiniteError(PatchError):
    """A weight, a delta or their sum holds an infinity or NaN."""


class DeviceError(PortLLMError):
    """There is no such device to compute on."""


class PortError(PortLLMError):
    """A patch cannot be ported as asked."""


class UnknownMethodError(PortError):
    """No row of `METHODS` has this id."""


class OutputError(PortLLMError):
    """The output cannot be written."""


class OutputExistsError(OutputError):
    """Something is at the output's place already."""


class OutputBusyError(OutputError):
    """Another run is writing to the same place."""


class CertificateError(PortLLMError):
    """`certificate.json` is missing where it is needed, breaks its schema or its seal, or does not add up."""


class SignatureError(PortLLMError):
    """A signature cannot be made or checked, whatever it would say."""


class FleetFileError(PortLLMError):
    """The file that describes a fleet breaks its schema, or what it names is not there."""


class StudyFileError(PortLLMError):
    """The file that describes a study is not TOML, or says what a study cannot be."""


class StudyStepError(PortLLMError):
    """A step of a study failed on a worker; the message begins with its name."""


class WorkersError(PortLLMError):
    """No worker of a fleet or a study can be started: Ray cannot be reached, or its nodes lack this program."""


class StorageError(PortLLMError):
    """A place that is reached by URL cannot be read or written.

    Attributes:
        can_pass: Whether it may work when it is tried again: a network that fails, but not a missing permission.
    """

    def __init__(self, message: str, *, can_pass: bool) -> None:
        super().__init__(message)
        self.can_pass = can_pass


class DataError(PortLLMError):
    """Rows of a data file do not fit the task."""


class MissingExtraError(PortLLMError):
    """An optional dependency is not installed; the message names the extra."""


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """One reason not to run a plan.

    Attributes:
        where: The tensor, module, file or option that the reason is about.
        reason: What was found, what was expected, and what to do.
    """

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class PlanRefusedError(PortLLMError):
    """A plan found reasons not to run.

    Attributes:
        refusals: All of them, sorted by place.

    Example:
        >>> print(PlanRefusedError([Refusal("lm_head", "no such module in the evolved model.")]))
        lm_head: no such module in the evolved model.
    """

    SHOWN = 10

    def __init__(self, refusals: Iterable[Refusal]) -> None:
        self.refusals = tuple(sorted(refusals))
        lines = [str(refusal) for refusal in self.refusals[: self.SHOWN]]
        rest = len(self.refusals) - self.SHOWN
        if rest > 0:
            lines.append(f"and {rest} more; --json lists them all.")
        super().__init__("\n".join(lines))


def refuse(refusals: Sequence[Refusal]) -> None:
    """Raise PlanRefusedError with all of the refusals, if there are any."""
    if refusals:
        raise PlanRefusedError(tuple(refusals))
