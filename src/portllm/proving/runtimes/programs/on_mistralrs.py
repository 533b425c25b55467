"""mistral.rs, in float32 throughout."""

import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version

PASS_THROUGH = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
"""A chat template that adds nothing: log-probabilities are given for chats alone."""


def load(
    base: str, patch: str, top: int, max_tokens: int
) -> tuple[str, Callable[[str, str], tuple[list[tuple[int, float]], int | None]]]:
    """The version, and what answers (model, prompt) with the likeliest tokens and the number of the prompt's."""
    del max_tokens
    os.environ["MISTRALRS_CPU_KV_F32"] = "1"  # its cache of keys and values is float16 otherwise
    from mistralrs import ChatCompletionRequest, LoraAdapter, ModelDType, Runner, Which

    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(PASS_THROUGH)
        template.flush()
        runner = Runner(
            which=Which.Lora(
                model_id=base, adapters=[LoraAdapter(alias="patch", source=patch)], dtype=ModelDType.F32, max_rank=256
            ),
            token_source="none",
            jinja_explicit=template.name,
        )

    def ask(model: str, prompt: str) -> tuple[list[tuple[int, float]], int | None]:
        request = ChatCompletionRequest(
            messages=prompt,
            model="default",
            max_tokens=1,
            temperature=0.0,
            logprobs=True,
            top_logprobs=top,
            adapter="patch" if model == "patch" else None,
        )
        response = runner.send_chat_completion_request(request)
        first = response.choices[0].logprobs.content[0]
        return [(token.token, token.logprob) for token in first.top_logprobs], response.usage.prompt_tokens

    return version("mistralrs"), ask
