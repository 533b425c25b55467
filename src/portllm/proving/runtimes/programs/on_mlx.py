"""MLX through mlx-lm, in float32: the base, and the base with the adapter."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def load(
    base: str, patch: str, top: int, max_tokens: int
) -> tuple[str, Callable[[str, str], tuple[list[tuple[int, float]], int | None]]]:
    """The version, and what answers (model, prompt) with the likeliest tokens and the number of the prompt's."""
    import mlx.core as mx
    from mlx_lm import load as load_mlx

    del max_tokens
    plain, tokenizer = load_mlx(base)
    adapted, _ = load_mlx(base, adapter_path=patch)
    models: dict[str, Any] = {"base": plain, "patch": adapted}
    for model in models.values():
        model.set_dtype(mx.float32)

    def ask(model: str, prompt: str) -> tuple[list[tuple[int, float]], int | None]:
        ids = tokenizer.encode(prompt)
        logits = models[model](mx.array([ids]))[0, -1].astype(mx.float32)
        log_probs = logits - mx.logsumexp(logits)
        best = mx.argpartition(-log_probs, kth=top - 1)[:top]
        return list(zip(best.tolist(), log_probs[best].tolist())), len(ids)  # noqa: B905 (as long as each other)

    return f"{version('mlx-lm')} (mlx {version('mlx')})", ask
