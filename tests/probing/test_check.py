import pytest

import portllm
from portllm.errors import PortLLMError


@pytest.mark.parametrize(
    "given",
    [{"prompt": "{question}"}, {"settings": portllm.TextSettings()}, {"text": ["a", "b"], "prompt": "{question}"}],
    ids=["prompt", "settings", "prompt for texts"],
)
def test_what_goes_with_prompts_is_refused_without_them_and_not_left_unread(given):
    with pytest.raises(PortLLMError, match="requires text to be a file of prompts"):
        portllm.check("patch", base="base", evolved="evolved", **given)


def test_patches_and_models_by_their_places_are_found_to_be_what_they_are_opened(tiny, tmp_path):
    patch = portllm.capture(tiny("adapter"), base=tiny("base"), out=tmp_path / "patch")
    opened = {"base": portllm.open_checkpoint(tiny("base")), "evolved": portllm.open_checkpoint(tiny("evolved"))}
    places = {name: str(model.folder) for name, model in opened.items()}
    assert portllm.check(str(tmp_path / "patch"), **places) == portllm.check(patch, **opened)
