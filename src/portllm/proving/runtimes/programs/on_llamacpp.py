"""llama.cpp through xllamacpp: two servers inside this process, with and without the adapter or the merged file."""

from collections.abc import Callable
from importlib.metadata import version
from typing import Any


def load(
    base: str, patch: str, top: int, max_tokens: int
) -> tuple[str, Callable[[str, str], tuple[list[tuple[int, float]], int | None]]]:
    """The version, and what answers (model, prompt) with the likeliest tokens and the number of the prompt's."""
    import xllamacpp

    def serve(model: str, *adapters: str) -> Any:  # noqa: ANN401
        params = xllamacpp.CommonParams()
        params.model.path = model
        params.n_ctx, params.n_parallel, params.warmup = max_tokens, 1, False
        params.hostnames, params.port = ["127.0.0.1"], 0
        # Keys and values are float16 otherwise.
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(adapter, 1.0) for adapter in adapters]
        return xllamacpp.Server(params)

    servers = {"base": serve(base), "patch": serve(base, patch) if _is_adapter(patch) else serve(patch)}

    def ask(model: str, prompt: str) -> tuple[list[tuple[int, float]], int | None]:
        request = {"prompt": prompt, "n_predict": 1, "n_probs": top, "temperature": 0.0, "cache_prompt": False}
        said = servers[model].handle_completions(request)
        first = said["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(token["id"], token["logprob"]) for token in first], said["usage"]["prompt_tokens"]

    return version("xllamacpp"), ask


def _is_adapter(file: str) -> bool:
    """Whether a GGUF file is an adapter, as the metadata at its beginning says; else it is a merged model."""
    with open(file, "rb") as stream:
        return b"adapter.type" in stream.read(1 << 16)
