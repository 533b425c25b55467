"""What a model pays for completions, token by token: what training lowers and evaluation reports."""

from collections.abc import Sequence

import torch
from jaxtyping import Float32
from torch.nn.functional import cross_entropy

from portllm.live.encoding import Encoded, pad_left
from portllm.live.model import PeftModel, PreTrainedModel

_IGNORED = -100


def completion_nats(
    model: PreTrainedModel | PeftModel, rows: Sequence[Encoded], *, device: torch.device
) -> Float32[torch.Tensor, "rows width"]:
    """`-log p(token | all before it)` of each completion token, at the right edge; 0 before a shorter completion.

    Rows end in the last column, so the logits of all completions are those of the last few columns: the head, a quarter
    of a small model's work, runs on these only. The last token of a row is a target and never an input.

    Args:
        model: A causal language model.
        rows: Prompts and completions.
        device: Where the model is.

    Returns:
        Natural logarithms; `width` is the length of the longest completion.
    """
    batch = pad_left([row.prompt + row.completion[:-1] for row in rows], device=device)
    width = max(len(row.completion) for row in rows)
    targets = torch.full((len(rows), width), _IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        targets[index, width - len(row.completion) :] = torch.tensor(row.completion, dtype=torch.int64)
    logits: torch.Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        logits_to_keep=width,
        use_cache=False,
    ).logits
    nats = cross_entropy(
        logits.flatten(0, 1).float(), targets.to(device).flatten(), ignore_index=_IGNORED, reduction="none"
    )
    return nats.view(len(rows), width)
