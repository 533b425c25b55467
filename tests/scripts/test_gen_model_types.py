"""What is known of model types is what the installed transformers says, and names are renamed as it renames them."""

import json
from importlib.resources import files

import pytest
import torch

from portllm.checkpoint.model.asked import classes_of, configured
from portllm.checkpoint.model.families import FILE, SHARED, families_of
from portllm.foreign import (
    CONFIG_MAPPING,
    WeightConverter,
    WeightRenaming,
    get_model_conversion_mapping,
    quiet,
    rename_source_key,
    transformers,
)
from scripts.gen_model_types import OPEN, gather, render

KEPT = json.loads(files("portllm.checkpoint.model").joinpath(FILE).read_text(encoding="utf-8"))
SOME = ("gpt2", "laguna", "llava", "qwen3_5")
"""A model of text, one whose names could be renamed twice, and two of vision and text."""


@pytest.mark.slow
def test_the_file_is_what_the_installed_transformers_says():
    found, _ = gather()
    said = json.loads(render(found))
    assert {key for key in said if KEPT.get(key) != said[key]} == set()
    assert KEPT.keys() == said.keys()


def built(model_type, name):
    """A class on the meta device, from the first configuration that builds it."""
    cls = getattr(transformers, name)
    for fields in OPEN:
        try:
            config, _ = configured(CONFIG_MAPPING[model_type](**fields), cls)
            with torch.device("meta"), quiet():
                return cls(config)
        except (TypeError, AttributeError, ValueError, KeyError):
            continue
    return None


@pytest.mark.parametrize(
    "model_type", [*SOME, *(pytest.param(name, marks=pytest.mark.slow) for name in KEPT if name not in (SHARED, *SOME))]
)
@pytest.mark.filterwarnings("ignore")
def test_what_transformers_saves_is_renamed_as_transformers_renames_it(model_type):
    known = {family.name: family for family in families_of({"model_type": model_type})}
    names = [name for name, _ in classes_of(model_type)]
    for name in [name for name in names if name in known]:
        model, family = built(model_type, name), known[name]
        stored = model.state_dict()
        steps = get_model_conversion_mapping(model, add_legacy=False)
        renames = [step for step in steps if isinstance(step, WeightRenaming)]
        converters = [step for step in steps if isinstance(step, WeightConverter)]
        back = [step.reverse_transform() for step in reversed(renames)]
        prefix = model.base_model_prefix
        for current in stored:
            saved = current
            for step in back:
                saved, _ = step.rename_source_key(saved)
            for spelled in {current, saved, current.removeprefix(f"{prefix}.")}:
                expected, source = rename_source_key(spelled, renames, converters, prefix, stored)
                if expected not in stored and spelled in stored:
                    expected = spelled
                made = family.conversion_of(spelled) or family.conversion_of(family.current_name(spelled))
                if source is None and made is None and expected in stored:
                    assert family.current_name(spelled) == expected, (name, spelled)
                    assert family.loads(expected, {}), (name, expected)
