"""Heads that are one matrix with something else than the input embedding, or have other rows than that."""

import pytest

from portllm.checkpoint.model.families import family_of
from tests.model_types import RIGHT, Sweep

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of tiny vocabularies and of patterns


@pytest.mark.parametrize("field", ["target_modules", "modules_to_save"])
def test_a_head_that_is_one_with_the_embedding_of_a_decoder_is_not_changed_alone(field, tmp_path):
    sweep = Sweep(family_of({"model_type": "t5gemma"}), tmp_path)
    how = {"target_modules": sweep.linear()[:1]}
    how[field] = [*how.get(field, []), "lm_head.out_proj"]
    assert "PEFT changes only one of them" in sweep.merged("head", how)


def test_a_head_may_have_fewer_rows_than_the_embedding(tmp_path):
    sweep = Sweep(family_of({"model_type": "moshi"}), tmp_path)
    assert sweep.base.embedding.shape != sweep.base.head.shape
    assert sweep.merged("head", {"target_modules": [*sweep.linear()[:1], "lm_head"]}) == RIGHT
