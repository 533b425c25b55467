"""Names as an older transformers or a wrapper spelled them: a captured or ported patch has those that PEFT finds."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.model_types import fill, logits, shrunk
from tests.models import adapter_of

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers and peft warn of tiny vocabularies and of patterns


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model of vision and text, whose text part had another name in transformers 4."""
    folder, kind = tmp_path_factory.mktemp("base"), transformers.CONFIG_MAPPING["qwen2_vl"]
    model = transformers.Qwen2VLForConditionalGeneration(kind(**shrunk(kind()))).eval().float()
    fill(model, 0, 0.15)
    model.save_pretrained(folder)
    return folder


def loaded(base):
    return transformers.Qwen2VLForConditionalGeneration.from_pretrained(base, dtype=torch.float32).eval()


WAYS = {
    "names": {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["norm"]},
    "patterns": {
        "target_modules": r"model\.language_model\.layers\.\d\.self_attn\.[qv]_proj",
        "rank_pattern": {r"model\.language_model\.layers\.1\.self_attn\.q_proj": 3},
        "alpha_pattern": {r"model\.language_model\.layers\.0\.self_attn\.v_proj": 5},
    },
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"model.language_model.embed_tokens": [3, 5]}},
}


@pytest.mark.parametrize("way", WAYS)
def test_a_patch_is_written_in_the_names_that_peft_finds(way, base, tmp_path):
    adapter, tuned = adapter_of(loaded(base), tmp_path / "adapter", **WAYS[way])
    expected = logits(tuned)
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    save_file({name.replace("model.language_model.", "model."): t for name, t in load_file(file).items()}, file)
    text = config.read_text().replace(r"model\\.language_model\\.", r"model\\.")
    config.write_text(text.replace("model.language_model.", "model."))
    patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / "patch")
    port(patch, evolved=base, base=base, out=tmp_path / "ported")
    for folder in ("patch", "ported"):
        found = logits(PeftModel.from_pretrained(loaded(base), tmp_path / folder).eval())
        assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert "language_model" in json.dumps([*load_file(tmp_path / "ported" / "adapter_model.safetensors")])
