"""What the classes that a model may be loaded into call its tensors, by the names that the model has for them."""

from collections.abc import Container, Mapping

from portllm.checkpoint.model.families import Family
from portllm.tensors.info import TensorInfo


def paths_in(
    family: Family, *, tensors: Mapping[str, TensorInfo], saved: Family | None, config: Mapping[str, object]
) -> dict[str, str]:
    """The current names by those of a class, of all that the class loads and of each path to that.

    Args:
        family: The class.
        tensors: The tensors of the model by current name.
        saved: The class that the model was saved from, whose names are the current ones.
        config: The configuration of the model.
    """
    paths: dict[str, str] = {}
    own_config = _config_of(family, config)
    for current, info in tensors.items():
        name = family.current_name(info.name) if family is not saved else current
        if not family.loads(name, own_config):
            continue
        while name and name not in paths:
            paths[name] = current
            # A tensor and its module end alike; what stands before that is theirs alone.
            if name.rpartition(".")[2] != current.rpartition(".")[2]:
                break
            name, current = name.rpartition(".")[0], current.rpartition(".")[0]
    return paths


def _config_of(family: Family, config: Mapping[str, object]) -> Mapping[str, object]:
    """The configuration as a class of its own type has it."""
    inner = config.get("text_config")
    is_inner = (
        family.id != config.get("model_type") and isinstance(inner, dict) and inner.get("model_type") == family.id
    )
    return inner if is_inner and isinstance(inner, dict) else config


def known_part(path: str, known: Container[str]) -> str:
    """The longest beginning of a path that is known; empty where none is."""
    while path and path not in known:
        path = path.rpartition(".")[0]
    return path
