"""Families: what their files say is so in the models that transformers builds, and names mean the same tensor."""

import json
from importlib.resources import files

import pytest

from portllm.checkpoint.model import families
from portllm.checkpoint.model.families import FILE, SHARED, families_of, family_of
from portllm.checkpoint.model.identity import digest, fingerprint
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError
from tests.safetensors_files import write_tensors

KINDS = (
    "llama", "mistral", "gemma2", "gemma3", "qwen2", "qwen3", "phi3", "gpt2", "mixtral", "qwen2-moe", "qwen3-moe",
    "gemma3-vision", "qwen2-vision",
)  # fmt: skip

MODEL_TYPES = sorted(json.loads(files("portllm.checkpoint.model").joinpath(FILE).read_text("utf-8")).keys() - {SHARED})
NOT_WITHOUT_HEAD = ("UnlimitedOcrForConditionalGeneration",)
"""Classes that transformers itself cannot load from a file that was saved without the head."""

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


def test_every_kind_of_tiny_model_is_of_a_family():
    from tests import families as tiny

    assert tuple(tiny.KINDS) == KINDS
    assert {kind.family for kind in tiny.KINDS.values()} <= set(MODEL_TYPES)


@pytest.mark.parametrize("kind", KINDS)
def test_the_family_is_found_by_model_type_and_by_architecture(kind, tiny_families):
    from tests import families as tiny

    config = json.loads((tiny_families(kind)[1] / "config.json").read_text())
    found = family_of(config)
    assert found.id == tiny.KINDS[kind].family
    assert family_of({"architectures": config["architectures"]}).name == found.name


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
    prefix = f"{opened.family.prefix}."
    for name, info in opened.infos.items():
        current = opened.current_name(name)
        others = [tiny.spelled_of_old(kind, current)] if kind in tiny.OLD else []
        assert {opened.stored(other) for other in (name, current, current.removeprefix(prefix), *others)} == {info}


@pytest.mark.parametrize("model_type", MODEL_TYPES)
def test_current_names_stay_what_they_are_and_names_without_the_head_become_them(model_type):
    for family in families_of({"model_type": model_type}):
        for name in filter(None, (family.embedding, family.head, "anything.else")):
            assert family.current_name(name) == name
        bare = (family.embedding or "").removeprefix(f"{family.prefix}.")
        if bare.partition(".")[0] in family.inner and family.name not in NOT_WITHOUT_HEAD:
            assert family.current_name(bare) == family.current_name(family.embedding)


def test_a_class_is_of_one_model_type_first_and_the_class_that_a_model_names_comes_first():
    config = {"model_type": "llama", "architectures": ["LlamaForTokenClassification"]}
    found = families_of(config)
    assert found[0].name == "LlamaForTokenClassification"
    assert {family.name for family in found} == {family.name for family in families_of({"model_type": "llama"})}


def test_a_text_model_reads_the_names_of_the_model_of_vision_and_text(tmp_path):
    names = ["model.language_model.layers.0.mlp.up_proj.weight", "model.visual.merger.norm.weight", "mtp.fc.weight"]
    config = {"model_type": "qwen3_5", "architectures": ["Qwen3_5ForConditionalGeneration"]}
    opened = model(tmp_path, names, **config, text_config={"num_hidden_layers": 1})
    text = "model.layers.0.mlp.up_proj"
    assert opened.current_name(text) == "model.language_model.layers.0.mlp.up_proj"
    assert opened.stored(f"{text}.weight") is opened.infos[names[0]]
    assert set(opened.running([f"{text}.weight"])) >= {f"{text}.weight"}
    assert not {name for name in opened.running([text]) if "visual" in name or "mtp" in name}
    assert {names[0], names[1]} <= set(opened.running(names))
    assert names[2] not in opened.running(names)


def test_layers_beyond_those_of_the_configuration_are_not_loaded(tmp_path):
    names = [f"model.layers.{layer}.self_attn.o_proj.weight" for layer in range(3)]
    opened = model(tmp_path, names, model_type="glm4_moe", num_hidden_layers=2)
    assert set(opened.tensors) == set(names)
    assert {name for name in opened.running(names) if "layers" in name} == set(names[:2])


def test_what_transformers_takes_apart_has_no_current_name(tmp_path):
    stored = "gte.encoder.layer.0.attention.qkv_proj.weight"
    opened = model(tmp_path, [stored], model_type="gte", architectures=["GteForSequenceClassification"])
    assert set(opened.tensors) == {stored}
    assert set(opened.converted.values()) == {stored}
    assert len(opened.converted) == 3


def test_a_model_that_is_not_known_has_no_family():
    assert family_of({"model_type": "foreign", "architectures": ["LlamaForCausalLM"]}) is None
    assert family_of({}) is None
    assert family_of({"architectures": []}) is None
    assert family_of({"model_type": 3}) is None


def test_a_name_in_a_model_that_is_not_known_means_itself_alone(tmp_path):
    opened = model(tmp_path, ["h.0.x.weight"], model_type="foreign")
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
    names = ["model.embed_tokens.weight", "lm_head.weight"]
    tied = model(tmp_path / "tied", names, model_type="qwen2_vl", text_config={"tie_word_embeddings": True})
    assert tied.tied_embedding.name == names[0]
    untied = model(tmp_path / "untied", names, model_type="qwen2_vl", text_config={"tie_word_embeddings": False})
    assert untied.tied_embedding is None
    assert fingerprint(tied) != fingerprint(untied)


@pytest.mark.parametrize(
    ("model_type", "class_name"),
    [("llama", "LlamaForSequenceClassification"), ("gpt2", "GPT2ForTokenClassification")],
)
def test_a_classifier_has_no_head_and_is_not_tied(model_type, class_name, tmp_path):
    embedding = family_of({"model_type": model_type, "architectures": [class_name]}).embedding
    opened = model(tmp_path, [embedding, "score.weight"], model_type=model_type, architectures=[class_name])
    assert (opened.embedding.name, opened.head, opened.tied_embedding) == (embedding, None, None)
    assert not {module for module in opened.matrices if "lm_head" in module}


def test_a_head_that_the_configuration_denies_is_not_there(tmp_path):
    names = ["language_model.model.embed_tokens.weight"]
    opened = model(tmp_path, names, model_type="llama4", text_config={"tie_word_embeddings": False})
    assert (opened.embedding.name, opened.tied_embedding) == (names[0], None)


def test_a_type_that_is_in_no_table_is_asked_of_transformers(monkeypatch, tmp_path):
    names = ["model.embed_tokens.weight", "layers.0.self_attn.q_proj.weight", "lm_head.weight"]
    config = {"model_type": "qwen3", "num_hidden_layers": 1, "tie_word_embeddings": False}
    known = model(tmp_path / "known", names, **config)
    lines = families._line
    monkeypatch.setattr(families, "_line", lambda key: None if key == "qwen3" else lines(key))
    monkeypatch.setattr(families, "_classes", families._classes.__wrapped__)
    asked = model(tmp_path / "asked", names, **config)
    assert asked.family == known.family
    assert set(asked.tensors) == set(known.tensors)
    assert asked.tied_embedding is None
    identity = fingerprint(asked), digest(asked)
    monkeypatch.setattr(families.importlib.util, "find_spec", lambda name: None)
    alone = model(tmp_path / "alone", names, **config)
    assert alone.family is None
    assert (fingerprint(alone), digest(alone)) == identity  # which does not depend on what is installed


def test_a_type_that_neither_knows_has_no_family_and_a_name_of_a_path_is_none():
    assert families_of({"model_type": "foreign"}) == ()
    assert families_of({"model_type": "../auto"}) == ()
