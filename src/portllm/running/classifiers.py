"""What a model with a classifier's head is to transformers: its class, and the names of its tensors."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from portllm.errors import CheckpointError, PortLLMError
from portllm.foreign import CLASSIFIERS, CONFIG_MAPPING, foreign, quiet

TASKS = tuple(CLASSIFIERS)
"""PEFT's `task_type` of adapters with a head of their own."""


@dataclass(frozen=True, slots=True)
class Classifier:
    """A class of transformers, for a configuration.

    Attributes:
        name: As it stands among the `architectures` of a `config.json`.
        tensors: The names of all of its tensors.
    """

    name: str
    tensors: frozenset[str]


def classifier_of(config: Mapping[str, object], *, task: str, n_labels: int) -> Classifier | None:
    """The class for a task of the model type that a configuration names; None where transformers has none.

    Raises:
        CheckpointError: It cannot be built.
    """
    kind = config.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        return None

    def unbuilt(why: str) -> PortLLMError:
        return CheckpointError(f"config.json: transformers cannot build a classifier of it: {why}")

    with foreign(unbuilt), quiet():
        settings = CONFIG_MAPPING[kind].from_dict({**config, "num_labels": n_labels})
        found = CLASSIFIERS[task].get(type(settings), None)
        if found is None:
            return None
        with torch.device("meta"):
            model = found(settings)
        return Classifier(found.__name__, frozenset(model.state_dict()))
