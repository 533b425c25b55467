"""The folder on disk that a model is run from, and whether it can be run at all."""

from pathlib import Path

from portllm.checkpoint.model.checkpoint import Checkpoint
from portllm.checkpoint.open import on_disk
from portllm.checkpoint.safetensors.names import GGUF_SUFFIX
from portllm.checkpoint.vocabulary import TOKENIZER_FILE
from portllm.errors import CheckpointError, NotFoundError
from portllm.progress import Progress, silent


def model_folder(checkpoint: Checkpoint, *, progress: Progress = silent) -> Path:
    """The folder of a checkpoint that is to run; a model that stays on the hub is downloaded.

    Raises:
        NotFoundError: It is a single file, without configuration and tokenizer.
        RemoteError: It cannot be downloaded.
    """
    check_runnable(checkpoint)
    folder = on_disk(checkpoint, progress=progress).folder
    if folder is None:
        raise AssertionError("what can run has a folder once it is on disk")
    return folder


def check_runnable(checkpoint: Checkpoint) -> None:
    """See to it that there is all that running a model takes, before anything of it is loaded.

    Raises:
        NotFoundError: It is a single file, without configuration and tokenizer, or a GGUF file.
        CheckpointError: Its folder has no tokenizer.
    """
    if any(str(file).endswith(GGUF_SUFFIX) for file in checkpoint.files):
        raise NotFoundError(
            f"'{checkpoint.name}': is a GGUF file, which can be read but not run here. Pass the folder of the "
            "model that it was made from."
        )
    if checkpoint.folder is None and not checkpoint.is_remote:
        raise NotFoundError(
            f"'{checkpoint.name}': is a single file; running a model also needs its configuration and tokenizer. "
            "Pass the folder that contains them."
        )
    if checkpoint.folder is not None and not (checkpoint.folder / TOKENIZER_FILE).is_file():
        raise CheckpointError(
            f"'{checkpoint.folder}': has no '{TOKENIZER_FILE}', so it cannot be run on text. Copy it and "
            "'tokenizer_config.json' from the model's own folder."
        )
