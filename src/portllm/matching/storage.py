"""Can anything be added to a weight as a model stores it? Where not, another file of the model is to be passed."""

from collections.abc import Iterable, Iterator

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.errors import Refusal
from portllm.tensors.info import FLOAT_DTYPES, TensorInfo


def unaddable(where: str, name: str, stored: Iterable[TensorInfo], model: Checkpoint) -> Iterator[Refusal]:
    """Why nothing can be added to what a name means in a model; at most one reason.

    Args:
        where: What the reason is about.
        name: The tensor.
        stored: What the model stores for it; nothing where it has no such tensor.
        model: The model.
    """
    if reason := model.why_converted(name):
        yield Refusal(where, reason, is_of_input=True)
        return
    for info in stored:
        if info.dtype not in FLOAT_DTYPES:
            yield Refusal(
                where,
                f"its weight in {model.name} is stored as {info.dtype}; a patch can only be added to "
                f"{', '.join(FLOAT_DTYPES)}. Use the unquantized model.",
                is_of_input=True,
            )
            return
