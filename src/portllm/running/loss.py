"""What a model pays for completions, token by token: what training lowers and evaluation reports."""

from collections.abc import Sequence

import torch
from torch.nn.functional import cross_entropy

from portllm.arrays import Float32, Int64
from portllm.running.encoding import Encoded, pad_left
from portllm.running.model import PeftModel, PreTrainedModel

IGNORED = -100
"""The target of a place that stands for nothing."""


def completion_nats(
    model: PreTrainedModel | PeftModel, rows: Sequence[Encoded], *, device: torch.device
) -> Float32[torch.Tensor, "rows width"]:
    """`-log p(token | all before it)` of each completion token, at the right edge; 0 before a shorter completion.

    Args:
        model: A causal language model.
        rows: Prompts and completions.
        device: Where the model is.

    Returns:
        Natural logarithms; `width` is the length of the longest completion.
    """
    return token_nats(completion_logits(model, rows, device=device), completion_targets(rows, device=device))


def completion_logits(
    model: PreTrainedModel | PeftModel, rows: Sequence[Encoded], *, device: torch.device
) -> Float32[torch.Tensor, "rows width vocabulary"]:
    """What the model predicts at each place of `completion_targets`.

    Rows end in the last column, so the logits of all completions are those of the last few columns: the head, a quarter
    of a small model's work, runs on these only. The last token of a row is a target and never an input.
    """
    batch = pad_left([row.prompt + row.completion[:-1] for row in rows], device=device)
    logits: torch.Tensor = model(
        input_ids=batch.ids,
        attention_mask=batch.mask,
        position_ids=batch.positions,
        logits_to_keep=max(len(row.completion) for row in rows),
        use_cache=False,
    ).logits
    return logits.float()


def completion_targets(rows: Sequence[Encoded], *, device: torch.device) -> Int64[torch.Tensor, "rows width"]:
    """The completion tokens at the right edge; `IGNORED` before a shorter completion, and where none is counted."""
    width = max(len(row.completion) for row in rows)
    targets = torch.full((len(rows), width), IGNORED, dtype=torch.int64)
    for index, row in enumerate(rows):
        targets[index, width - len(row.completion) :] = torch.tensor(row.completion, dtype=torch.int64)
        if row.counted is not None:
            targets[index, width - len(row.completion) :][~torch.tensor(row.counted)] = IGNORED
    return targets.to(device)


def token_nats(
    logits: Float32[torch.Tensor, "rows width vocabulary"], targets: Int64[torch.Tensor, "rows width"]
) -> Float32[torch.Tensor, "rows width"]:
    """`-log p(target)` at each place, 0 where it is `IGNORED`."""
    nats = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction="none")
    return nats.view(targets.shape)
