"""The prompt template and the completion field that a patch's record names."""

from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import DataError
from portllm.patch.patch import Patch
from portllm.running.examples import ExampleFormat


def recorded_format(patch: Patch[TensorInfo], *, prompt: str | None, completion: str | None) -> ExampleFormat:
    """How to ask a patch: as it was trained, but for what is given.

    Raises:
        DataError: Neither is known.
    """
    settings = patch.record.capture.settings if patch.record else {}
    prompt = prompt if prompt is not None else _text(settings.get("prompt"))
    completion = completion if completion is not None else _text(settings.get("completion"))
    if prompt is None or completion is None:
        raise DataError(
            f"'{patch.name}': has no recorded prompt template, since it was not trained with 'portllm train'. "
            "Pass --prompt and --completion."
        )
    return ExampleFormat(prompt=prompt, completion=completion)


def recorded_prompt(patch: Patch[TensorInfo]) -> str:
    """The template of the prompts that a patch was trained on.

    Raises:
        DataError: It is not known.
    """
    prompt = _text((patch.record.capture.settings if patch.record else {}).get("prompt"))
    if prompt is None:
        raise DataError(
            f"'{patch.name}': has no recorded prompt template, since it was not trained with 'portllm train'. "
            "Pass --prompt."
        )
    return prompt


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
