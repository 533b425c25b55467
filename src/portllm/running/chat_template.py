"""A model's chat template, as its folder has it: what makes one text of a conversation. Nothing is run here."""

from pathlib import Path

from blake3 import blake3

from portllm.errors import DataError
from portllm.files.input_file import read_input
from portllm.files.json_file import read_config

TEMPLATE_FILE = "chat_template.jinja"
TOKENIZER_CONFIG_FILE = "tokenizer_config.json"

MAX_TEMPLATE_BYTES = 1_000_000


def read_chat_template(folder: Path) -> str:
    """The template that transformers' `apply_chat_template` uses.

    Args:
        folder: Of a model, or of a patch that it was saved with.

    Raises:
        DataError: There is none, or it cannot be read.
    """
    template = _template(folder)
    if template is None:
        raise DataError(
            f"'{folder}': its tokenizer has no chat template, so no text can be made of messages. Copy "
            f"'{TEMPLATE_FILE}' from the model's chat version into the folder, or write the rows as 'prompt' and "
            "'completion' texts."
        )
    return template


def has_chat_template(folder: Path) -> bool:
    """Whether there is one in a folder; errors as `read_chat_template`."""
    return _template(folder) is not None


def _template(folder: Path) -> str | None:
    file, config = folder / TEMPLATE_FILE, folder / TOKENIZER_CONFIG_FILE
    try:
        if file.is_file():
            return read_input(file, most=MAX_TEMPLATE_BYTES).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"'{file}': cannot be read: {error}. Copy it from the model's own folder.") from error
    listed = read_config(config).get("chat_template") if config.is_file() else None
    if isinstance(listed, list):  # several, by name
        listed = {one.get("name"): one.get("template") for one in listed if isinstance(one, dict)}.get("default")
    return listed if isinstance(listed, str) else None


def template_digest(template: str) -> str:
    """What a record says of a chat template.

    Example:
        >>> template_digest("{{ messages }}")[:11]
        'blake3:9f04'
    """
    return f"blake3:{blake3(template.encode()).hexdigest()}"
