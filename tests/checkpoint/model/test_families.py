"""Families: what their files say is so in the models that transformers builds, and names mean the same tensor."""

import json
import tomllib
from importlib.resources import files

import pytest

from portllm.checkpoint.model.families import families, family_named, family_of
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError
from tests.safetensors_files import write_tensors

KINDS = (
    "llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "gpt2", "mixtral", "qwen2-moe", "qwen3-moe",
    "gemma3-vision", "qwen2-vision",
)  # fmt: skip

EXPERT_MATRICES = 2 * 3 * 3
"""In two layers of three experts, where each matrix of each expert is stored alone."""


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def tiny_families(tmp_path_factory):
    """The model of a kind, untied, and the folders of its two forms."""
    from tests import families as tiny

    made = {}

    def make(kind):
        if kind not in made:
            model = tiny.make_model(kind, tied=False)
            folders = [tmp_path_factory.mktemp(kind) for _ in range(2)]
            for folder, original in zip(folders, (True, False), strict=True):
                model.save_pretrained(folder, save_original_format=original)
            made[kind] = (model, *folders)
        return made[kind]

    return make


def model(folder, names, **config):
    folder.mkdir(exist_ok=True)
    write_tensors(folder / "model.safetensors", {name: ("BF16", (3, 2), bytes(12)) for name in names})
    (folder / "config.json").write_text(json.dumps(config))
    return open_checkpoint(folder)


def test_every_kind_of_tiny_model_is_of_a_family_and_every_family_has_one():
    from tests import families as tiny

    assert tuple(tiny.KINDS) == KINDS
    assert {kind.family for kind in tiny.KINDS.values()} == {family.id for family in families()}


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_is_found_by_model_type_and_by_architecture(kind, tiny_families):
    from tests import families as tiny

    config = json.loads((tiny_families(kind)[1] / "config.json").read_text())
    found = family_of(config)
    assert found.id == tiny.KINDS[kind].family
    assert family_of({"architectures": config["architectures"]}) is found


@pytest.mark.parametrize("kind", KINDS)
def test_the_linear_modules_of_a_family_are_those_of_the_model(kind, tiny_families):
    from torch.nn import Linear
    from transformers.pytorch_utils import Conv1D

    built, *_ = tiny_families(kind)
    family = family_of(built.config.to_dict())
    linear = {name for name, module in built.named_modules() if isinstance(module, Linear | Conv1D)}
    # A pooling head of torch's own, which no text model reads from and PEFT cannot put a LoRA on alone.
    linear = {name for name in linear if ".head.attention." not in name}
    named = {
        name.removesuffix(".weight")
        for name, parameter in built.named_parameters()
        if parameter.ndim == 2 and name.endswith(".weight") and family.is_linear(name.removesuffix(".weight"))
    }
    assert {name for name in named if ".head.attention." not in name} == linear


@pytest.mark.parametrize("kind", KINDS)
def test_the_transposed_modules_of_a_family_are_the_models_conv1d(kind, tiny_families):
    from transformers.pytorch_utils import Conv1D

    built, *_ = tiny_families(kind)
    family = family_of(built.config.to_dict())
    modules = dict(built.named_modules())
    assert {name for name in modules if family.is_transposed(name)} == {
        name for name, module in modules.items() if isinstance(module, Conv1D)
    }


@pytest.mark.parametrize("kind", KINDS)
def test_embedding_and_head_of_a_family_are_the_models(kind, tiny_families):
    built, *_ = tiny_families(kind)
    family = family_of(built.config.to_dict())
    names = {id(parameter): name for name, parameter in built.named_parameters()}
    assert family.embedding == names[id(built.get_input_embeddings().weight)]
    assert family.head == names[id(built.get_output_embeddings().weight)]


@pytest.mark.parametrize("kind", KINDS)
def test_current_names_are_those_of_the_model(kind, tiny_families):
    built, *folders = tiny_families(kind)
    family = family_of(built.config.to_dict())
    expected = {name for name, _ in built.named_parameters()}
    for folder in folders:
        names = open_checkpoint(folder).tensors
        experts = {name for name in expected for fused in family.experts if name.endswith(f"experts.{fused}")}
        single = {name for name in names if ".experts." in name and name.endswith(".weight")}
        assert set(names) - single - experts == expected - experts
        assert experts <= set(names) or len(single) == EXPERT_MATRICES


@pytest.mark.parametrize("kind", ["gemma3-vision", "qwen2-vision"])
def test_two_spellings_of_a_model_have_one_identity(kind, tiny_families):
    _, *folders = tiny_families(kind)
    old, new = (open_checkpoint(folder) for folder in folders)
    assert set(old.infos) != set(new.infos)
    assert (fingerprint(old), digest(old)) == (fingerprint(new), digest(new))


@pytest.mark.parametrize("kind", KINDS)
def test_every_tensor_is_found_by_all_its_names(kind, tiny_families):
    from tests import families as tiny

    _, folder, _ = tiny_families(kind)
    opened = open_checkpoint(folder)
    for name, info in opened.infos.items():
        others = [tiny.spelled(opened.family, name, spelling) for spelling in opened.family.spellings]
        assert {opened.stored(other) for other in (name, opened.current_name(name), *others)} == {info}


@pytest.mark.parametrize("family", [family.id for family in families()])
def test_names_stay_what_they_are_when_spelled_back(family):
    from tests import families as tiny

    family = family_named(family)
    for name in (family.embedding, family.head, "model.layers.0.input_layernorm.weight", "anything.else"):
        current = family.current_name(name)
        assert family.current_name(current) == current
        for spelling in family.spellings:
            assert family.current_name(tiny.spelled(family, name, spelling)) == current


@pytest.mark.parametrize("family", [family.id for family in families()])
def test_a_file_of_facts_has_no_fact_twice(family):
    text = files("portllm.checkpoint.model").joinpath("families", f"{family}.toml").read_text(encoding="utf-8")
    facts = tomllib.loads(text)
    assert facts["source"].startswith("https://")
    assert len(set(facts["linear"])) == len(facts["linear"])
    assert set(facts.get("transposed", [])) <= set(facts["linear"])
    assert {module for parts in facts.get("experts", {}).values() for module in parts} <= set(facts["linear"])


def test_no_model_type_is_of_two_families():
    types = [name for family in families() for name in (*family.model_types, *family.architectures)]
    assert len(set(types)) == len(types)


def test_a_model_that_is_not_known_has_no_family():
    assert family_of({"model_type": "bert", "architectures": ["LlamaForCausalLM"]}) is None
    assert family_of({}) is None
    assert family_of({"architectures": []}) is None
    assert family_of({"model_type": 3}) is None


def test_a_name_in_a_model_that_is_not_known_means_itself_alone(tmp_path):
    opened = model(tmp_path, ["h.0.x.weight"], model_type="bert")
    assert opened.stored("h.0.x.weight") is opened.infos["h.0.x.weight"]
    assert opened.stored("transformer.h.0.x.weight") is None


def test_a_tensor_of_exactly_the_name_is_taken_first(tmp_path):
    opened = model(tmp_path, ["h.0.x.weight", "transformer.h.0.x.weight"], model_type="gpt2")
    assert opened.stored("h.0.x.weight").name == "h.0.x.weight"


def test_a_name_that_could_mean_two_tensors_is_refused(tmp_path):
    names = ["language_model.model.norm.weight", "language_model.norm.weight"]
    opened = model(tmp_path, names, model_type="gemma3")
    with pytest.raises(CheckpointError) as caught:
        opened.stored("model.language_model.norm.weight")
    assert str(caught.value) == (
        f"'model.language_model.norm.weight': {tmp_path} has language_model.model.norm.weight and "
        "language_model.norm.weight, which are two names of the same tensor. Save the model again with only one "
        "of them."
    )
    with pytest.raises(CheckpointError, match="two names of the same tensor"):
        fingerprint(opened)


def test_a_name_that_means_nothing_is_not_found(tmp_path):
    assert model(tmp_path, ["h.0.x.weight"], model_type="gpt2").stored("h.1.x.weight") is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_head_of_its_own_is_found_in_every_family(kind, tiny_families):
    _, *folders = tiny_families(kind)
    for folder in folders:
        opened = open_checkpoint(folder)
        assert opened.tied_embedding is None
        assert opened.embedding.shape == opened.head.shape == (31, 12)
        assert opened.embedding != opened.head


def test_the_embedding_of_gpt2_serves_as_its_head_when_there_is_no_other(tmp_path):
    opened = model(tmp_path, ["wte.weight", "wpe.weight"], model_type="gpt2")
    assert opened.tied_embedding.name == "wte.weight"


def test_a_model_of_vision_and_text_may_say_in_the_part_about_text_that_it_is_tied(tmp_path):
    names = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
    tied = model(tmp_path / "tied", names, model_type="gemma3", text_config={"tie_word_embeddings": True})
    assert tied.tied_embedding.name == names[0]
    untied = model(tmp_path / "untied", names, model_type="gemma3", text_config={"tie_word_embeddings": False})
    assert untied.tied_embedding is None
    assert fingerprint(tied) != fingerprint(untied)
