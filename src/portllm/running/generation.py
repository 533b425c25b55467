"""What a model writes after a prompt, always taking the likeliest token."""

from collections.abc import Sequence

import torch

from portllm.running.encoding import Encoder, pad_left
from portllm.running.model import PeftModel, PreTrainedModel


def write(
    model: PreTrainedModel | PeftModel,
    encoder: Encoder,
    prompts: Sequence[tuple[int, ...]],
    *,
    max_new_tokens: int,
    one_line: bool,
    device: torch.device,
) -> list[tuple[int, ...]]:
    """The tokens that a model writes after each prompt, with the end mark where it comes to one.

    Args:
        model: In evaluation mode.
        encoder: Of the model.
        prompts: Ids of each.
        max_new_tokens: Most tokens written.
        one_line: Stop behind the first line that is not blank.
        device: Where the model is.
    """
    batch = pad_left(prompts, device=device)
    ids, mask, positions, cache = batch.ids, batch.mask, batch.positions, None
    written: list[list[int]] = [[] for _ in prompts]
    open_rows = set(range(len(prompts)))
    for _ in range(max_new_tokens):
        output = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            logits_to_keep=1,
            use_cache=True,
        )
        cache = output.past_key_values
        ids = output.logits[:, -1].argmax(dim=-1, keepdim=True)
        for row in sorted(open_rows):
            written[row].append(int(ids[row, 0]))
            if written[row][-1] in encoder.stops or (one_line and "\n" in encoder.decode(written[row]).lstrip()):
                open_rows.remove(row)
        if not open_rows:
            break
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
        positions = positions[:, -1:] + 1
    return [tuple(tokens) for tokens in written]
