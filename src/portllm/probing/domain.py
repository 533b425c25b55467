"""Prompts of the domain that patches are for, read before torch is loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

from portllm.errors import DataError, refuse
from portllm.matching.port_plan import PortPlan
from portllm.patch.patch import Patch
from portllm.progress import Progress
from portllm.running.data import Data, chat_template_for, chat_template_of, read_data, recorded_wording_of
from portllm.running.examples import Border, Template
from portllm.running.rows import read_lines
from portllm.tensors.info import TensorInfo

if TYPE_CHECKING:
    from portllm.porting.domain import Domain
    from portllm.porting.drawn import Drawn
    from portllm.running.model import Device
    from portllm.running.wording import Asked

PLAIN_SUFFIX = ".txt"


class DomainSettings(TypedDict):
    """How prompts are run: attributes of `Domain`."""

    max_tokens: int
    answer_tokens: int
    most_nats: float
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Asking:
    """What an aligned port asks its models.

    Attributes:
        text: A file of prompts, as for `read_domain`.
        data: A data file with right answers, to choose by; without `text`, its prompts are asked too.
        draw: How many prompts the old specialist draws itself, where there is neither.
        template: Of the prompt; None for what the patch records.
        completion: Field of the right answer; None likewise.
        anchors: General text, one a line; None for text that the evolved model writes.
    """

    text: Path | None = None
    data: Path | None = None
    draw: int | None = None
    template: str | None = None
    completion: str | None = None
    anchors: Path | None = None

    def __post_init__(self) -> None:
        if self.draw is not None and self.text is not None:
            raise DataError("prompts: are either read from a file or drawn. Pass --text or --draw, not both.")

    @property
    def is_given(self) -> bool:
        """Whether anything is asked at all."""
        return any(each is not None for each in (self.text, self.data, self.draw))


def domain_of(plan: PortPlan, asking: Asking, *, progress: Progress, **settings: Unpack[DomainSettings]) -> "Domain":
    """What an aligned port reads: prompts, worded for its models, rows with right answers, and general text.

    Args:
        plan: Of the port.
        asking: Where they come from.
        progress: Progress callback (downloaded bytes, layers).
        settings: The other attributes of `Domain`.

    Raises:
        PlanRefusedError: The plan has refusals; said before a file is read.
        DataError: Rows do not fit, or nobody knows how prompts are made.
    """
    refuse(plan.refusals)
    read = None if asking.text is None else read_domain(asking.text, [plan.patch], template=asking.template)
    data = None
    if asking.data is not None:
        data = read_data(asking.data, plan.patch, prompt=asking.template, completion=asking.completion)
    anchors = None if asking.anchors is None else read_lines(asking.anchors)
    from portllm.porting.domain import Domain
    from portllm.running.folder import model_folder

    folder = model_folder(plan.base or plan.evolved, progress=progress)
    prompts: Sequence[str] | Drawn
    judges = None if data is None else _worded(data, plan, folder)
    if asking.draw is not None:
        prompts, border = _drawn(plan, folder, asking.draw, asking.template)
    elif isinstance(read, list):
        prompts, border = read, Border()
    elif (asked := judges if read is None else _worded(read, plan, folder)) is not None:
        prompts, border = asked.prompts, asked.border
    else:
        raise AssertionError("nothing is asked")
    if judges is not None and judges.border != border:
        raise DataError(
            f"'{asking.data}': answers follow its prompts otherwise than the other prompts: after "
            f"{judges.border.lead!r} and {border.lead!r}, before {judges.border.end!r} and {border.end!r}. "
            "Make the rows alike."
        )
    answered = () if judges is None else judges.examples
    return Domain(prompts=prompts, answered=answered, border=border, anchors=anchors, progress=progress, **settings)


def _worded(data: Data, plan: PortPlan, folder: Path) -> "Asked":
    from portllm.running.wording import word

    return word(data, folder, chat_template_for(data, plan.patch, folder=folder))


def _drawn(plan: PortPlan, folder: Path, count: int, template: str | None) -> tuple["Drawn", Border]:
    """What the old specialist is to draw, and how answers follow it."""
    from portllm.porting.drawn import Drawn

    wording = recorded_wording_of(plan.patch, template)
    if wording is None:
        raise DataError(
            f"'{plan.patch.name}': does not record how prompts were made, so none can be drawn. Pass --prompt, such as "
            r"--prompt 'Question: {question}\nType:'."
        )
    if wording.is_chat:
        from portllm.running.chat import PROBE, Chat
        from portllm.running.encoding import Encoder
        from portllm.running.model import load_tokenizer

        chat = Chat(
            Encoder(load_tokenizer(folder)), chat_template_of(plan.patch, folder=folder, asked="the model itself")
        )
        asked, border = chat.ask([{"role": "user", "content": PROBE}])
        before, _, after = asked.partition(PROBE)
        return Drawn(count, ((before, False), ("content", True), (after, False))), border
    return Drawn(count, Template(wording.template).parts), Border(lead=None if wording.shape is None else "")
