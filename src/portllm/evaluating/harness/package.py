"""What is used of lm-evaluation-harness: the only module that imports lm_eval and datasets."""

from contextlib import AbstractContextManager
from pathlib import Path

from portllm.errors import MissingExtraError
from portllm.installed import why_not

try:
    import lm_eval.tasks
    from datasets import Dataset
    from lm_eval.api.instance import Instance
    from lm_eval.api.model import CacheHook
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
except ImportError as missing:
    raise MissingExtraError(
        f"tasks of lm-evaluation-harness need its packages; {why_not(missing, 'eval')}"
    ) from missing

__all__ = ["HFLM", "TASK_FILES", "CacheHook", "ConfigurableTask", "Dataset", "Instance", "TaskManager", "quiet_harness"]

TASK_FILES = Path(lm_eval.tasks.__file__).parent
"""The folder of the harness's task files."""


def quiet_harness() -> AbstractContextManager[None]:
    """The messages, warnings and progress bars of lm_eval and datasets are off inside the block."""
    from portllm.running.hub_rows import quiet_datasets  # names another extra, where datasets is missing

    return quiet_datasets("lm_eval")
