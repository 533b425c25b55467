"""The shapes are those of the models: as many parameters as published, and the tensors that transformers expects."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from bench.shapes import PAPER, SHAPES

PUBLISHED = {
    "mistral-7b": 7_241_732_096,
    "llama2-7b": 6_738_415_616,
    "llama3.1-8b": 8_030_261_248,
    "gemma2-9b": 9_241_705_984,
}
"""Parameters, as the weight files' headers on the Hugging Face Hub add up to."""


def on_no_device(shape):
    """The model as transformers builds it from the configuration, without memory for its weights."""
    keys = {key: value for key, value in shape.config.items() if key not in ("model_type", "dtype")}
    config = AutoConfig.for_model(shape.config["model_type"], **keys)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_shape_has_as_many_parameters_as_its_model(name):
    assert PAPER[name].n_params == PUBLISHED[name]


def test_a_patch_of_rank_8_on_mistral_has_as_many_parameters_as_the_paper_says():
    assert PAPER["mistral-7b"].n_factors(8) == 20_971_520


@pytest.mark.parametrize("shape", [*PAPER.values(), SHAPES["tiny"]], ids=lambda shape: shape.name)
def test_transformers_expects_the_tensors_of_a_shape(shape):
    small = replace(shape, layers=2)
    model = on_no_device(small)
    expected = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    assert small.tensors == expected
    assert type(model).__name__ == shape.family.architecture
