"""Transformers and PEFT themselves, as anyone would load an adapter with them; in float32."""

from collections.abc import Callable
from importlib.metadata import version


def load(
    base: str, patch: str, top: int, max_tokens: int
) -> tuple[str, Callable[[str, str], tuple[list[tuple[int, float]], int | None]]]:
    """The version, and what answers (model, prompt) with the likeliest tokens and the number of the prompt's."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    del max_tokens
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), patch).eval()

    def ask(which: str, prompt: str) -> tuple[list[tuple[int, float]], int | None]:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            if which == "base":
                with model.disable_adapter():
                    logits = model(ids).logits[0, -1]
            else:
                logits = model(ids).logits[0, -1]
        best = logits.double().log_softmax(dim=-1).topk(top)
        return list(zip(best.indices.tolist(), best.values.tolist())), ids.shape[1]  # noqa: B905

    return f"{version('transformers')}, peft {version('peft')}", ask
