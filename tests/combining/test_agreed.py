"""What combined patches have besides deltas goes along where they agree, and is refused by name where they do not."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter
from portllm.checkpoint.open import open_checkpoint
from portllm.combining.combine import combine
from portllm.errors import PlanRefusedError
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch
from portllm.running.chat_template import read_chat_template
from portllm.verifying.verify import verify
from tests.matching.test_added_tokens import CALL, END, N_RESIZED, give_tokens, in_peft, loaded, logits
from tests.models import adapter_of, make_base, resized

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie"),
    pytest.mark.filterwarnings("ignore:Model has"),
]
ROWS = {"trainable_token_indices": {"embed_tokens": [CALL, END], "lm_head": [CALL, END]}}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an adapter with two more tokens, another one with the same rows, and one without."""
    folder = tmp_path_factory.mktemp("agreed")
    base = give_tokens(make_base(folder / "base", dtype=torch.float32))
    grown = resized(base, N_RESIZED)
    one, _ = adapter_of(grown, folder / "one", **ROWS)
    two = shutil.copytree(one, folder / "two")
    plain, _ = adapter_of(loaded(base), folder / "plain", target_modules=["q_proj"], seed=3)
    tensors = load_file(two / "adapter_model.safetensors")
    save_file({n: t * 0.5 if ".lora_B" in n else t for n, t in tensors.items()}, two / "adapter_model.safetensors")
    for adapter in (one, two):
        give_tokens(adapter, "<call>", "<end>")
    give_tokens(plain)
    return base, {folder.name: folder for folder in (one, two, plain)}


def captured(made, out, *names, change=lambda name, folder: None):
    base, adapters = made
    patches = []
    for name in names:
        folder = shutil.copytree(adapters[name], out / f"adapter-{name}")
        change(name, folder)
        patches.append(capture_adapter(load_patch(folder), base=open_checkpoint(base), out=out / name))
    return patches


@pytest.mark.parametrize("names", [("one", "plain"), ("plain", "one"), ("one", "two")])
def test_added_tokens_and_their_tokenizer_go_along(names, made, tmp_path):
    base, adapters = made
    patches = captured(made, tmp_path, *names)
    combine(patches, out=tmp_path / "both")
    both = load_patch(tmp_path / "both")
    assert both.record.added_tokens == {"<call>": CALL, "<end>": END}
    assert (tmp_path / "both" / "tokenizer.json").read_bytes() == (adapters["one"] / "tokenizer.json").read_bytes()
    assert verify(tmp_path / "both").verified
    merge(both, into=base, out=tmp_path / "merged")
    found = logits(loaded(tmp_path / "merged"))
    assert (found - in_peft(base, tmp_path / "both")).abs().max() < 1e-5 * found.abs().max()


def test_two_values_of_one_tokens_row_are_refused(made, tmp_path):
    def change(name, folder):
        if name == "two":
            file = folder / "adapter_model.safetensors"
            save_file({n: t + 1 if "tokens_delta" in n else t for n, t in load_file(file).items()}, file)

    patches = captured(made, tmp_path, "one", "two", change=change)
    with pytest.raises(PlanRefusedError, match="'<call>'.*two such rows do not add up"):
        combine(patches, out=tmp_path / "both")


def test_rows_of_tokens_that_the_base_has_are_no_deltas(made, tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    adapters = tiny("adapter", of=base), tiny("adapter", of=base, seed=2, trainable_token_indices=[3])
    patches = [
        capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=tmp_path / str(number))
        for number, adapter in enumerate(adapters)
    ]
    with pytest.raises(PlanRefusedError, match="trainable_token_indices"):
        combine(patches, out=tmp_path / "both")


def _other_token(name, folder):
    if name == "plain":
        give_tokens(folder, "<other>")


def _other_rule(name, folder):
    if name == "plain":
        values = json.loads((folder / "tokenizer.json").read_text())
        (folder / "tokenizer.json").write_text(json.dumps({**values, "normalizer": {"type": "Lowercase"}}))


def _other_template(name, folder):
    (folder / "chat_template.jinja").write_text(name)


def _other_template_inside(name, folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": name}))


def _templates_in_two_places(name, folder):
    (_other_template if name == "one" else _other_template_inside)(name, folder)


def _other_head(name, folder):
    save_file({"v_head.summary.weight": torch.full((1, 20), float(len(name)))}, folder / "value_head.safetensors")


@pytest.mark.parametrize(
    ("change", "told"),
    [(_other_token, "'<other>' in row"), (_other_rule, "reads text otherwise"), (_other_template, "chat template"),
     (_other_template_inside, "chat template"), (_templates_in_two_places, "chat template"),
     (_other_head, "value head")],
)  # fmt: skip
def test_what_differs_is_named(change, told, made, tmp_path):
    patches = captured(made, tmp_path, "one", "plain", change=change)
    with pytest.raises(PlanRefusedError, match=told):
        combine(patches, out=tmp_path / "both")


@pytest.mark.parametrize("place", [_other_template, _other_template_inside])
@pytest.mark.parametrize("name", ["one", "plain"])
def test_what_one_patch_alone_has_goes_along(name, place, made, tmp_path):
    def change(patch, folder):
        if patch == name:
            place(patch, folder)
            _other_head(patch, folder)

    combine(captured(made, tmp_path, "plain", "one", change=change), out=tmp_path / "both")
    assert read_chat_template(tmp_path / "both") == name
    assert (tmp_path / "both" / "value_head.safetensors").is_file()
