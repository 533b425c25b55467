"""Prompts of the domain that patches are for, read before torch is loaded."""

from collections.abc import Sequence
from pathlib import Path

from portllm.checkpoint.tensor.info import TensorInfo
from portllm.errors import DataError
from portllm.patch.patch import Patch
from portllm.running.data import Data, read_data
from portllm.running.rows import read_lines

PLAIN_SUFFIX = ".txt"


def read_domain(file: Path, patches: Sequence[Patch[TensorInfo]], *, template: str | None = None) -> Data | list[str]:
    """The prompts in a file: the lines of a `.txt` file as they are, or the rows of a data file.

    Args:
        file: The file.
        patches: Their records say how prompts are made, where `template` does not.
        template: For instance `"Question: {question}"`.

    Raises:
        DataError: Rows do not fit, or patches were trained on different prompts, or do not say on which.
    """
    if file.suffix != PLAIN_SUFFIX:
        return read_data(file, *patches, prompt=template, answers=False)
    if template is not None:
        raise DataError(f"'{file}': is plain text, one prompt per line; a template only applies to rows. Omit it.")
    return read_lines(file)
