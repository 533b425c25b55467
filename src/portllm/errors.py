"""Every error that PortLLM raises on purpose; a caller that catches `PortLLMError` catches them all.

    PortLLMError
      CheckpointError        a model cannot be read or written as asked
        HeaderError            a safetensors header breaks a rule of the format
        IndexFileError         a shard index does not describe the shards beside it
        MissingShardError      a shard that the index names is not there
        MissingTensorError     a tensor that the caller needs is not there
        InputChangedError    a file changed while it was read
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
      RuntimeFailedError     a runtime that serves models cannot be started, ends, or gives no log-probabilities
      DataError              rows of a data file do not fit the task
      MissingExtraError      an optional dependency is not installed

A message says where, what was found, what was expected, and what to do. The command line prints it and exits
with 1; anything that is not a `PortLLMError` is a bug and keeps its traceback.
"""

from collections.abc import Iterable
from dataclasses import dataclass


class PortLLMError(Exception):
    """Base class of all errors of PortLLM."""


class CheckpointError(PortLLMError):
    """A model cannot be read or written."""


class HeaderError(CheckpointError):
    """A safetensors header violates the format."""


class IndexFileError(CheckpointError):
    """A shard index does not match its shards."""


class MissingShardError(CheckpointError):
    """A shard named by the index is missing."""


class MissingTensorError(CheckpointError):
    """A required tensor is missing from the checkpoint."""


class InputChangedError(CheckpointError):
    """A file changed while it was read: what was read may be neither the old one nor the new one."""


class UnsupportedDtypeError(CheckpointError):
    """A tensor has an unsupported dtype."""


class NotFoundError(CheckpointError):
    """No model exists at the given path or id."""


class RemoteError(CheckpointError):
    """A server cannot be reached, denies access, or returns the wrong bytes."""


class PatchError(PortLLMError):
    """An adapter or patch cannot be used."""


class AdapterFormatError(PatchError):
    """The folder is not a fully supported adapter."""


class PatchRecordError(PatchError):
    """`patch.json` is missing, violates its schema, or does not match its seal."""


class NonFiniteError(PatchError):
    """A weight, a delta or their sum contains an infinity or NaN."""


class DeviceError(PortLLMError):
    """The requested device is not available."""


class PortError(PortLLMError):
    """A patch cannot be ported."""


class UnknownMethodError(PortError):
    """The port method is unknown."""


class OutputError(PortLLMError):
    """The output cannot be written."""


class OutputExistsError(OutputError):
    """The output already exists."""


class OutputBusyError(OutputError):
    """Another run is writing to the same path."""


class CertificateError(PortLLMError):
    """`certificate.json` is missing, violates its schema, does not match its seal, or is inconsistent."""


class SignatureError(PortLLMError):
    """A signature cannot be made or checked."""


class FleetFileError(PortLLMError):
    """A fleet file violates its schema, or something it names does not exist."""


class StudyFileError(PortLLMError):
    """A study file is not valid TOML, or describes an invalid study."""


class StudyStepError(PortLLMError):
    """A step of a study failed on a worker; the message starts with its name."""


class WorkersError(PortLLMError):
    """No worker of a fleet or a study can be started: Ray cannot be reached, or its nodes lack this program."""


class StorageError(PortLLMError):
    """A URL cannot be read or written.

    Attributes:
        can_pass: Whether it may work when it is tried again: a network that fails, but not a missing permission.
    """

    def __init__(self, message: str, *, can_pass: bool) -> None:
        super().__init__(message)
        self.can_pass = can_pass


class RuntimeFailedError(PortLLMError):
    """A runtime cannot be started, has ended, or does not give what is asked of it."""


class DataError(PortLLMError):
    """Rows of a data file are invalid for the task."""


class MissingExtraError(PortLLMError):
    """An optional dependency is not installed; the message names the extra."""


@dataclass(frozen=True, slots=True, order=True)
class Refusal:
    """One reason why a plan cannot run.

    Attributes:
        where: The tensor, module, file or option that the reason is about.
        reason: What was found, what was expected, and what to do.
        is_of_input: Whether a model or an option that was given with the patch is at fault: the patch may be sound.
    """

    where: str
    reason: str
    is_of_input: bool = False

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


class PlanRefusedError(PortLLMError):
    """A plan cannot run; lists every reason.

    Attributes:
        refusals: All reasons, sorted by place.

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


def refuse(refusals: Iterable[Refusal]) -> None:
    """Raise PlanRefusedError with all of the refusals, each once, if there are any."""
    if found := tuple(dict.fromkeys(refusals)):
        raise PlanRefusedError(found)
