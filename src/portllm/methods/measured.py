"""What is measured of a patch on the evolved model as it is, where nothing is fitted, beside plain addition.

Both models read prompts, and the patch is compared with the old specialist, as an aligned port is: by its divergence,
by how often it answers alike on prompts to report on, and by what it costs on general text.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from portllm.methods.align import ADD, costs, evidence
from portllm.methods.contract import Comparison, Streams


@dataclass(frozen=True, slots=True)
class Measured:
    """What was measured of a patch.

    Attributes:
        streams: Says what each prompt is for.
        compared: Its answers with the old specialist's.
        price: What each row of general text costs it, in nats a token, and what the bare model beside it ("").
        loss: Likewise of rows with right answers, beside the old specialist.
    """

    streams: Streams
    compared: Comparison
    price: Mapping[str, Tensor]
    loss: Mapping[str, Tensor]

    @classmethod
    def of(cls, name: str, streams: Streams) -> Self:
        """Run it.

        Args:
            name: What it is called.
            streams: Of both models, the evolved one with the patch added.
        """
        for _ in streams.walk([], beside=[name], label=f"compare {name}"):
            pass
        both: dict[str, tuple[str | None, Mapping[str, tuple[Tensor, Tensor]]]] = {"": (None, {}), name: (name, {})}
        compared = streams.compare({name: streams.last_states(name)})[name]
        return cls(streams, compared, streams.nats("price", both), streams.nats("judge", both))


def measures(found: Mapping[str, Measured], name: str) -> dict[str, float]:
    """The numbers of a patch that stand in a record, to six digits.

    Args:
        found: By name, what was measured of it and of addition.
        name: Of the patch.
    """
    numbers = evidence({key: each.compared for key, each in found.items()}, name, found[name].streams)
    added, ported = found[ADD], found[name]
    numbers |= costs(_told(added.price, name, ported.price), "general_nats")
    numbers |= costs(_told(added.loss, name, ported.loss), "loss")
    return {key: float(f"{value:.6g}") for key, value in numbers.items()}


def _told(added: Mapping[str, Tensor], name: str, ported: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What rows cost the bare model or the old specialist, addition, and the patch; nothing where there are none."""
    return {"": added[""], "_added": added[ADD], "_ported": ported[name]} if added else {}
