"""Whether a patch can be run in both versions of a model over the same tokens, as align and transport do."""

from collections.abc import Iterator

from portllm.checkpoint.open import side_file
from portllm.checkpoint.vocabulary import TOKENIZER_FILE, has_same_tokenizer
from portllm.errors import Refusal
from portllm.matching.port_plan import PortPlan


def not_in_step(plan: PortPlan, *, method: str) -> Iterator[Refusal]:
    """Why not: the patch has tokens that one of them lacks, they have experts, or no common tokenizer.

    Args:
        plan: Of a port from the one to the other.
        method: That would run them.
    """
    if plan.own or plan.carried_tokens is not None:
        yield Refusal(
            "--method",
            f"{plan.patch.name} has tokens or a head of its own, which the evolved model lacks, so method "
            f"'{method}' cannot run it there. Port it with --method add.",
        )
    if plan.evolved.experts:
        yield Refusal(
            "--evolved",
            f"{plan.evolved.name} has experts, and what these write is not known for every token. Method "
            f"'{method}' is for dense models.",
        )
    models = [model for model in (plan.base, plan.evolved) if model is not None]
    if unread := [model.name for model in models if side_file(model, TOKENIZER_FILE) is None]:
        yield Refusal(
            "--evolved",
            f"there is no '{TOKENIZER_FILE}' in {' and '.join(unread)}, so method '{method}' cannot run it on text. "
            "Copy the file from where the model came from.",
        )
    elif not has_same_tokenizer(models[0], models[-1]):
        yield Refusal(
            "--evolved",
            f"{models[0].name} and {models[-1].name} have different tokenizers, so method '{method}' cannot "
            "compare them token by token.",
        )
