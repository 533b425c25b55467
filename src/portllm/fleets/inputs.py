"""What a fleet's file names: the patches that are there, and the models, each with its identity."""

import re
from collections.abc import Callable, Sequence
from pathlib import Path

from portllm.checkpoint.model.hub_names import names_hub
from portllm.checkpoint.model.identity import fingerprint
from portllm.checkpoint.open import BUILTIN_PREFIX, open_checkpoint
from portllm.errors import FleetFileError, PortLLMError
from portllm.files.own_files import ignores_case
from portllm.fleets.file import FleetFile
from portllm.fleets.plan import ModelEntry, PatchEntry
from portllm.fleets.storage import find_patches, identify_patch, is_url, resolve


def find_inputs(asked: FleetFile) -> tuple[list[PatchEntry], list[ModelEntry], ModelEntry | None]:
    """The patches by name, the evolved models, and the base where one is named.

    Raises:
        FleetFileError: Something is not there, cannot be read, or two would be written to one folder; every problem.
    """
    problems: list[str] = []
    patches = _find(asked, problems)
    evolved = [entry for said in asked.evolved if (entry := _identify(said, asked, "evolved", problems)) is not None]
    base = None if asked.base is None else _identify(asked.base, asked, "base", problems)
    out = resolve(asked.output, asked.file.resolve().parent)
    letters = str.casefold if not is_url(out) and ignores_case(Path(out)) else str
    problems += [*_same_names(patches, "patches", letters), *_same_names(evolved, "evolved", letters)]
    if problems:
        raise FleetFileError("\n".join(f"'{asked.file}': {problem}" for problem in problems))
    return patches, evolved, base


def _find(asked: FleetFile, problems: list[str]) -> list[PatchEntry]:
    folder = asked.file.resolve().parent
    entries: dict[str, PatchEntry] = {}
    for pattern in asked.patches:
        try:
            found = find_patches(resolve(pattern, folder))
            if not found:
                problems.append(
                    f"patches, {pattern!r}: no patch found. A patch is a folder with adapter_config.json and "
                    "adapter_model.safetensors; pass it, a folder that contains such folders, or a glob."
                )
            for name, place in found.items():
                if place not in entries:
                    entries[place] = PatchEntry(name, place, *identify_patch(place))
        except (PortLLMError, OSError) as error:
            problems.append(f"patches, {pattern!r}: {error}")
    return sorted(entries.values(), key=lambda entry: entry.name)


def _identify(said: str, asked: FleetFile, key: str, problems: list[str]) -> ModelEntry | None:
    if is_url(said):
        problems.append(
            f"{key}, {said!r}: a model is read from this machine or from the Hugging Face Hub, not from a URL."
        )
        return None
    local = resolve(said, asked.file.resolve().parent)
    elsewhere = not Path(local).exists() and (names_hub(said) or said.startswith(BUILTIN_PREFIX))
    place = said if elsewhere else local
    try:
        model = open_checkpoint(place)
        name = re.sub(r"[^\w.@-]+", "--", said if elsewhere else Path(local).name)
        return ModelEntry(name, said, place, fingerprint(model), model.n_bytes)
    except PortLLMError as error:
        problems.append(f"{key}, {said!r}: {error}")
        return None


def _same_names(
    entries: Sequence[PatchEntry] | Sequence[ModelEntry], key: str, letters: Callable[[str], str]
) -> list[str]:
    places: dict[str, list[str]] = {}
    for entry in entries:
        places.setdefault(letters(entry.name), []).append(entry.place)
    return [
        f"{key}: {' and '.join(map(repr, same))} would both be written to '{name}'. Rename one."
        for name, same in places.items()
        if len(same) > 1
    ]
