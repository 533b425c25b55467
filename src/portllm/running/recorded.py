"""The prompt template and the completion field that a patch's record names, and prompts read by them."""

from collections.abc import Sequence
from pathlib import Path

from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import DataError
from portllm.patch.patch import Patch
from portllm.running.examples import ExampleFormat, read_lines, read_prompts

PLAIN_SUFFIX = ".txt"


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


def read_domain(file: Path, patches: Sequence[Patch[TensorInfo]], *, template: str | None = None) -> list[str]:
    """The prompts in a file: the lines of a `.txt` file as they are, or rows of a JSONL file through a template.

    Args:
        file: The file.
        patches: Their records say how prompts are made, where `template` does not.
        template: For instance `"Question: {question}"`.

    Raises:
        DataError: Rows do not fit, or patches were trained on different prompts, or do not say on which.
    """
    if file.suffix == PLAIN_SUFFIX:
        if template is not None:
            raise DataError(
                f"'{file}': is plain text, one prompt per line; a template only applies to JSONL rows. Omit it."
            )
        return read_lines(file)
    templates = [template] if template is not None else sorted({recorded_prompt(patch) for patch in patches})
    if len(templates) > 1:
        raise DataError(
            f"the patches were trained on {len(templates)} different prompts: "
            f"{', '.join(map(repr, templates[:3]))}. Check them separately, or pass one --prompt for all."
        )
    return read_prompts(file, templates[0], completion=None)[0]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None
