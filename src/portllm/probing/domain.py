"""Prompts of the domain that patches are for, read before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import DataError, refuse
from portllm.matching.port_plan import PortPlan
from portllm.patch.patch import Patch
from portllm.progress import Progress
from portllm.running.data import Data, chat_template_for, read_data
from portllm.running.rows import read_lines

if TYPE_CHECKING:
    from portllm.porting.domain import Domain
    from portllm.running.model import Device

PLAIN_SUFFIX = ".txt"


class DomainSettings(TypedDict):
    """How prompts are run: attributes of `Domain`."""

    max_tokens: int
    answer_tokens: int
    wanted: float | None
    batch_size: int
    device: "Device"


def read_domain(file: Path, patches: Sequence[Patch[TensorInfo]], *, template: str | None = None) -> Data | list[str]:
    """The prompts in a file: the lines of a `.txt` file as they are, or the rows of a data file.

    Args:
        file: The file.
        patches: Their records say how prompts are made, where `template` does not.
        template: For instance `"Question: {question}"`.

    Raises:
        DataError: Rows do not fit, or patches were trained on different prompts, or do not say on which.
    """
    if file.suffix != PLAIN_SUFFIX:
        return read_data(file, *patches, prompt=template, answers=False)
    if template is not None:
        raise DataError(f"'{file}': is plain text, one prompt per line; a template only applies to rows. Omit it.")
    return read_lines(file)


def domain_of(
    plan: PortPlan,
    file: Path,
    *,
    template: str | None,
    anchors: Path | None,
    progress: Progress,
    **settings: Unpack[DomainSettings],
) -> "Domain":
    """What an aligned port reads: the prompts in a file, worded for its models, and general text.

    Args:
        plan: Of the port.
        file: The prompts, as for `read_domain`.
        template: Of the prompt; None for what the patch records.
        anchors: General text, one a line; None for text that the evolved model writes.
        progress: Progress callback (downloaded bytes, layers).
        settings: The other attributes of `Domain`.

    Raises:
        PlanRefusedError: The plan has refusals; said before a file is read.
        DataError: Rows do not fit.
    """
    refuse(plan.refusals)
    read = read_domain(file, [plan.patch], template=template)
    text = None if anchors is None else read_lines(anchors)
    from portllm.porting.domain import Domain
    from portllm.running.folder import model_folder
    from portllm.running.wording import word

    if not isinstance(read, Data):
        return Domain(prompts=read, anchors=text, progress=progress, **settings)
    folder = model_folder(plan.base or plan.evolved, progress=progress)
    asked = word(read, folder, chat_template_for(read, plan.patch, folder=folder))
    return Domain(prompts=asked.prompts, border=asked.border, anchors=text, progress=progress, **settings)
