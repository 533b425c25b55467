"""Every feature against whole activations and autograd in float64, and the laws that they keep."""

import gc
import json
import math
import shutil
import weakref

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.special import softmax
from scipy.stats import entropy
from transformers import AutoModelForCausalLM

from portllm.capturing.adapter import capture_adapter
from portllm.checking.check import check_weights
from portllm.checking.forecast import expect
from portllm.checking.report import patch_to_json
from portllm.checking.verdict import with_answers
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import DataError, NonFiniteError, PlanRefusedError, PortLLMError
from portllm.measures.similarity import linear_cka
from portllm.measures.thresholds import AGREEMENT
from portllm.patch.adapter_folder import load_patch
from portllm.probing.check import check
from portllm.probing.probe import measure_text
from portllm.probing.settings import TextSettings
from portllm.running.encoding import Encoder
from portllm.running.model import load_model, load_tokenizer
from portllm.running.observation import spread_positions
from tests.language import make_reader
from tests.models import load_tuned, make_adapter, make_evolved

SCALE = 1.5
FLOAT32 = 2e-3
"""Ours runs in float32, the reference in float64, on divergences of some hundredths of a nat."""

PROMPTS = [
    "what causes measles? Kind:",
    "how is a fever treated? Kind:",
    "is measles inherited? Kind:",
    "who is at risk",
    "tea",
    "What are the symptoms of measles? What are the treatments for measles? Answer:",
]
SETTINGS = TextSettings(positions=5, batch_size=4, sketch=8)


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    """A base, an evolved model, and two patches of the base."""
    folder = tmp_path_factory.mktemp("story")
    base = make_reader(folder / "base", dtype=torch.float32)
    return {
        "base": base,
        "evolved": evolve(base, folder / "evolved"),
        "patch": make_adapter(base, folder / "patch", size=0.2),
        "other": make_adapter(base, folder / "other", size=0.2, seed=4, r=2, target_modules=["q_proj", "up_proj"]),
    }


def evolve(base, folder, *, drift=0.03):
    made = make_evolved(base, folder, drift=drift)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(base / name, made / name)
    return made


def measure(story, *names, evolved="evolved", prompts=PROMPTS, settings=SETTINGS, **how):
    models = (open_checkpoint(story["base"]), open_checkpoint(story[evolved]))
    patches = [load_patch(story[name]) for name in names or ("patch",)]
    return measure_text(*models, patches, prompts, settings=settings, device="cpu", **how)


@pytest.fixture(scope="module")
def measured(story):
    return measure(story)[0]


@pytest.fixture(scope="module")
def with_gradients(story):
    return measure(story, settings=TextSettings(positions=5, batch_size=4, sketch=8, gradients=True))[0]


@pytest.fixture(scope="module")
def seen(story):
    """Whole activations of the four models in float64, prompt by prompt."""
    rows = [Encoder(load_tokenizer(story["base"])).encode_text(prompt) for prompt in PROMPTS]
    found = {}
    for name, folder in (("base", "base"), ("evolved", "evolved")):
        model = AutoModelForCausalLM.from_pretrained(story[folder], dtype=torch.float64).eval()
        patched = load_tuned(story[folder], story["patch"], dtype=torch.float64)
        found[name] = [alone(model, row) for row in rows]
        found[f"{name} + patch"] = [alone(patched, row) for row in rows]
    return found


def alone(model, row):
    inputs, states, handles = {}, [], []
    for name, module in model.named_modules():
        if name.endswith("_proj"):
            handles.append(
                module.register_forward_pre_hook(lambda _m, args, name=name: inputs.update({name: args[0][0].numpy()}))
            )
        elif name.split(".")[-2:-1] == ["layers"]:
            handles.append(module.register_forward_hook(lambda _m, _a, out: states.append(out[0, -1].numpy())))
    with torch.no_grad():
        logits = model(torch.tensor([row])).logits[0, -1].numpy()
    for handle in handles:
        handle.remove()
    return inputs, states, logits


def dense_deltas(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    factors = {n: [tensors[f"base_model.model.{n}.lora_{side}.weight"].double() for side in "AB"] for n in names}
    return {name: (SCALE * b @ a, a) for name, (a, b) in factors.items()}


# ---- against whole activations


def test_the_outputs_are_compared_as_distributions(measured, seen):
    p = {name: softmax(np.stack([logits for _, _, logits in rows]), axis=1) for name, rows in seen.items()}
    found = measured.features()
    pairs = {
        "patch": ("base + patch", "base"),
        "update": ("base", "evolved"),
        "evolved": ("base + patch", "evolved"),
        "ported": ("base + patch", "evolved + patch"),
    }
    for name, (one, other) in pairs.items():
        assert found[f"{name}_kl"] == pytest.approx(entropy(p[one], p[other], axis=1).mean(), rel=FLOAT32), name
        assert found[f"{name}_agreement"] == (p[one].argmax(axis=1) == p[other].argmax(axis=1)).mean(), name
    assert found["ported_patch_kl"] == pytest.approx(
        entropy(p["evolved + patch"], p["evolved"], axis=1).mean(), rel=FLOAT32
    )
    assert found["effect_kept"] == pytest.approx(1 - found["ported_kl"] / found["evolved_kl"])


def test_the_fidelity_of_every_module_is_that_of_the_dense_delta_on_whole_activations(story, measured, seen):
    deltas = dense_deltas(story["patch"])
    assert measured.modules.keys() == deltas.keys()
    for name, (delta, a) in deltas.items():
        x, moved = (
            np.concatenate([row[0][name][spread_positions(len(row[0][name]), 5)] for row in seen[model]])
            for model in ("base", "evolved")
        )
        old, new = x @ delta.numpy().T, moved @ delta.numpy().T
        read, reads = x @ a.numpy().T, moved @ a.numpy().T
        cosines = (read * reads).sum(axis=1) / np.linalg.norm(read, axis=1) / np.linalg.norm(reads, axis=1)
        found = measured.modules[name]
        assert found.read_cosine == pytest.approx(cosines.mean(), rel=FLOAT32)
        assert found.read_ratio == pytest.approx(np.linalg.norm(reads) / np.linalg.norm(read), rel=FLOAT32)
        assert found.effect_change == pytest.approx(np.linalg.norm(new - old) / np.linalg.norm(old), rel=FLOAT32)
        assert found.effect_ratio == pytest.approx(np.linalg.norm(new) / np.linalg.norm(old), rel=FLOAT32)
        norms = np.linalg.norm(old) * np.linalg.norm(new)
        assert found.effect_cosine == pytest.approx((old * new).sum() / norms, rel=FLOAT32)
        assert found.effect_change <= found.change_bound
    assert measured.n_tokens == len(x)


def test_similarity_is_that_of_the_last_states(measured, seen):
    for number, value in enumerate(measured.similarity):
        states = [np.stack([row[1][number] for row in seen[model]]) for model in ("base", "evolved")]
        assert value == pytest.approx(linear_cka(*states), rel=FLOAT32)
    assert len(measured.similarity) == 2


def test_the_first_order_gains_are_autograds(story, with_gradients, seen):
    """`-<∇L, Δ>` with L the cross-entropy to the specialist's distribution: the gates of all components at once."""
    taught = torch.tensor(softmax(np.stack([logits for _, _, logits in seen["base + patch"]]), axis=1))
    rows = [Encoder(load_tokenizer(story["base"])).encode_text(prompt) for prompt in PROMPTS]
    deltas = dense_deltas(story["patch"])
    for name in ("base", "evolved"):
        model = AutoModelForCausalLM.from_pretrained(story[name], dtype=torch.float64).eval()
        answers = torch.stack([model(torch.tensor([row])).logits[0, -1].log_softmax(dim=-1) for row in rows])
        (-(taught * answers).sum(dim=1)).mean().backward()
        gain = 0.0
        for module, (delta, _) in deltas.items():
            inner = float((model.get_submodule(module).weight.grad * delta).sum())
            assert getattr(with_gradients.terms[module], f"first_order_{name}") == pytest.approx(
                inner, rel=FLOAT32, abs=1e-5
            )
            gain -= inner
        assert with_gradients.features()[f"gain_on_{name}"] == pytest.approx(gain, rel=FLOAT32)


@pytest.mark.slow
def test_the_first_order_gain_is_the_slope_along_the_patch(story, with_gradients, tmp_path):
    """A thousandth of the patch gains a thousandth of `gain_on_evolved`, up to the second order."""
    part = 1e-3
    tensors = load_file(story["patch"] / "adapter_model.safetensors")
    small = shutil.copytree(story["patch"], tmp_path / "small")
    save_file({n: t * part if "lora_B" in n else t for n, t in tensors.items()}, small / "adapter_model.safetensors")
    (whole,), (little,) = measure(story), measure({**story, "small": small}, "small")
    rows = [Encoder(load_tokenizer(story["base"])).encode_text(prompt) for prompt in PROMPTS]
    p = softmax(
        np.stack([alone(load_tuned(story["base"], story["patch"], dtype=torch.float64), r)[2] for r in rows]), axis=1
    )
    evolved = AutoModelForCausalLM.from_pretrained(story["evolved"], dtype=torch.float64).eval()
    losses = [
        entropy(p, softmax(np.stack([alone(model, row)[2] for row in rows]), axis=1), axis=1).mean()
        for model in (evolved, load_tuned(story["evolved"], small, dtype=torch.float64))
    ]
    assert with_gradients.features()["gain_on_evolved"] == pytest.approx((losses[0] - losses[1]) / part, rel=0.01)
    assert little.modules.keys() == whole.modules.keys()


def test_interference_is_that_of_the_expansion(story, with_gradients):
    total = with_gradients.total
    found = with_gradients.features()
    assert found["interference"] == total.interference != 0.0
    norms = math.sqrt(total.patch_curvature * total.drift_curvature)
    assert found["interference_cosine"] == pytest.approx(total.interference / norms)
    assert abs(found["interference_cosine"]) < 1


# ---- laws


def test_on_the_same_model_nothing_changes(story):
    settings = TextSettings(batch_size=4, gradients=True)
    (same,) = measure(story, evolved="base", settings=settings)
    found = same.features()
    for name in ("update_kl", "ported_kl", "effect_change", "change_bound", "interference"):
        assert found[name] == 0.0, name
    for name in ("effect_kept", "ported_agreement", "update_agreement", "read_ratio", "effect_ratio", "shift_ratio"):
        assert found[name] == pytest.approx(1.0), name
    for name in ("read_cosine", "effect_cosine", "shift_cosine", "cka", "cka_least", "read_cosine_worst"):
        assert found[name] == pytest.approx(1.0, abs=1e-6), name
    assert found["evolved_kl"] == found["patch_kl"] == found["ported_patch_kl"]
    assert found["gain_on_evolved"] == pytest.approx(found["gain_on_base"])
    assert "interference_cosine" not in found


def test_a_patch_that_does_nothing_has_no_effect_to_keep_or_to_change(story, tmp_path):
    tensors = load_file(story["patch"] / "adapter_model.safetensors")
    idle = shutil.copytree(story["patch"], tmp_path / "idle")
    save_file({n: 0 * t if "lora_B" in n else t for n, t in tensors.items()}, idle / "adapter_model.safetensors")
    (found,) = measure({**story, "idle": idle}, "idle", evolved="base")
    assert found.modules == {}
    assert found.features().keys().isdisjoint({"effect_kept", "shift_cosine", "effect_change"})
    assert found.features()["ported_kl"] == 0.0


def same_but_for_rounding(one, other):
    one, other = one.features(), other.features()
    # Labels of the curvature are drawn batch by batch: with other batches, other labels.
    names = one.keys() - {"interference", "interference_cosine"}
    assert other.keys() == one.keys()
    assert {name: other[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=FLOAT32)


def test_batches_change_nothing_but_rounding(story, with_gradients):
    (other,) = measure(story, settings=TextSettings(positions=5, batch_size=1, sketch=8, gradients=True))
    same_but_for_rounding(with_gradients, other)


@pytest.mark.slow
def test_threads_change_nothing_but_rounding(story, with_gradients):
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        (other,) = measure(story, settings=TextSettings(positions=5, batch_size=4, sketch=8, gradients=True))
    finally:
        torch.set_num_threads(threads)
    same_but_for_rounding(with_gradients, other)


def test_the_order_of_the_prompts_does_not_matter(story, measured):
    (other,) = measure(story, prompts=PROMPTS[::-1])
    assert other.features() == pytest.approx(measured.features(), rel=FLOAT32)


def test_patches_together_are_measured_as_if_alone_and_models_run_bare_once(story, measured, monkeypatch):
    loads = watch_loads(monkeypatch)
    rows = []
    together = measure(story, "other", "patch", progress=lambda label, done, total, unit: rows.append((done, total)))
    assert len(loads) == 2
    assert together[1].features() == measured.features()
    assert together[0].features() == measure(story, "other")[0].features()
    assert rows[-1] == (6 * len(PROMPTS), 6 * len(PROMPTS))  # two models without a patch, and with either of two


def watch_loads(monkeypatch):
    """Weak references to the models that are loaded; no other may be alive when one is."""
    loads = []

    def load(*arguments, **options):
        gc.collect()
        assert [model for model in loads if model() is not None] == []
        model = load_model(*arguments, **options)
        loads.append(weakref.ref(model))
        return model

    monkeypatch.setattr("portllm.probing.passes.load_model", load)
    return loads


def test_prompts_that_come_twice_count_twice(story, with_gradients):
    settings = TextSettings(positions=5, batch_size=4, gradients=True)
    (twice,), (more,) = (measure(story, prompts=PROMPTS + extra, settings=settings) for extra in (PROMPTS, PROMPTS[:1]))
    gain = with_gradients.features()["gain_on_evolved"]
    assert twice.features()["gain_on_evolved"] == pytest.approx(gain, rel=FLOAT32)
    assert abs(more.features()["gain_on_evolved"] - gain) > FLOAT32 * abs(gain)


def test_rows_of_the_vocabulary_that_were_added_to_the_evolved_model_do_not_count(story, measured, tmp_path):
    wider = shutil.copytree(story["evolved"], tmp_path / "wider")
    model = AutoModelForCausalLM.from_pretrained(wider)
    model.resize_token_embeddings(model.config.vocab_size + 7, mean_resizing=False)
    model.save_pretrained(wider)
    settings = TextSettings(positions=5, batch_size=4, sketch=8, gradients=True)
    (found,) = measure({**story, "wider": wider}, evolved="wider", settings=settings)
    expected = measured.features()
    assert {name: found.features()[name] for name in expected} == pytest.approx(expected, rel=FLOAT32)


def test_longer_prompts_are_cut_from_the_left_and_counted(story):
    (found,) = measure(story, settings=TextSettings(max_tokens=8))
    lengths = [len(Encoder(load_tokenizer(story["base"])).encode_text(prompt)) for prompt in PROMPTS]
    assert found.n_cut == sum(length > 8 for length in lengths) > 0
    assert found.n_tokens == sum(min(length, 8) for length in lengths)


@pytest.mark.parametrize(
    "lora",
    [
        {"use_dora": True},
        pytest.param({"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}, marks=pytest.mark.slow),
        pytest.param({"target_modules": ["q_proj", "embed_tokens"]}, marks=pytest.mark.slow),
        pytest.param(
            {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7]}}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda lora: "-".join(lora),
)
@pytest.mark.filterwarnings("ignore")  # peft warns of shapes that it wrote itself, and of tied embeddings
def test_every_kind_of_patch_is_measured_and_leaves_the_model_as_it_was(lora, story, tmp_path, monkeypatch):
    watch_loads(monkeypatch)
    adapter, odd = make_adapter(story["base"], tmp_path / "adapter", size=0.2, **lora), tmp_path / "odd"
    capture_adapter(load_patch(adapter), base=open_checkpoint(story["base"]), out=odd)
    settings = TextSettings(positions=5, batch_size=4, sketch=8, gradients=True)
    found, after = measure({**story, "odd": odd}, "odd", "patch", settings=settings)
    assert found.features()["patch_kl"] > 0
    assert found.modules
    assert found.terms is None
    assert "embed_tokens" not in " ".join(found.modules)
    (alone,) = measure(story, settings=settings)
    assert after.features() == pytest.approx(alone.features(), rel=FLOAT32)


# ---- the report


def test_a_report_has_the_measures_and_the_doubts_that_they_raise(story, tmp_path):
    models = {"base": open_checkpoint(story["base"]), "evolved": open_checkpoint(story["evolved"])}
    unfit = make_adapter(make_reader(tmp_path / "reader", tied=False), tmp_path / "unfit", target_modules=["q_proj"])
    config = json.loads((unfit / "adapter_config.json").read_text())
    (unfit / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["k_proj"]}))
    patches = [load_patch(story["patch"]), load_patch(unfit)]
    report = check_weights(*patches, **models)
    more = check(*patches, **models, text=PROMPTS, settings=SETTINGS, device="cpu")
    agreement = more.patches[0].text.features()["ported_agreement"]
    assert agreement < AGREEMENT.value
    assert more.patches[0].verdict == with_answers(report.patches[0].verdict, agreement=agreement, n_prompts=6)
    assert more.patches[1].verdict == report.patches[1].verdict
    assert more.patches[0].forecast == expect(report.update, more.patches[0])
    assert (report.patches[0].forecast.rests_on, more.patches[0].forecast.rests_on) == ("weights", "text")
    assert more.patches[0].text.features() == measure(story)[0].features()
    assert more.patches[1].text is None
    found = json.loads(json.dumps(patch_to_json(more.patches[0]), allow_nan=False))["text"]
    assert (found["prompts"], found["features"]["cka"]) == (len(PROMPTS), more.patches[0].text.features()["cka"])
    assert len(found["modules"]) == 14
    assert patch_to_json(more.patches[1])["text"] is None


# ---- what is refused


def test_too_few_prompts_are_refused(story):
    with pytest.raises(DataError, match="1 were given; expected at least 2"):
        measure(story, prompts=PROMPTS[:1])


def test_a_prompt_without_tokens_is_refused(story):
    with pytest.raises(DataError, match="prompt 2: has no tokens"):
        measure(story, prompts=["who?", ""])


def test_models_of_different_tokenizers_are_refused(story, tmp_path):
    other = shutil.copytree(story["evolved"], tmp_path / "other")
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + "\n")
    with pytest.raises(DataError, match="different tokenizers"):
        measure({**story, "changed": other}, evolved="changed")


def test_a_patch_that_does_not_fit_is_refused_with_every_reason(story):
    wide = {**story, "wide": shutil.copytree(story["patch"], story["patch"].parent / "wide", dirs_exist_ok=True)}
    config = json.loads((wide["wide"] / "adapter_config.json").read_text())
    (wide["wide"] / "adapter_config.json").write_text(json.dumps({**config, "target_modules": ["q_proj"]}))
    with pytest.raises(PlanRefusedError, match="does not name it") as refused:
        measure(wide, "wide")
    assert len(refused.value.refusals) == 12


def test_a_model_that_answers_with_no_number_is_named(story, tmp_path):
    broken = shutil.copytree(story["evolved"], tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = math.inf
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(NonFiniteError, match="broken': outputs an infinity or NaN"):
        measure({**story, "broken": broken}, evolved="broken")


def test_settings_out_of_range_are_refused_together():
    with pytest.raises(PortLLMError, match=r"max_tokens is 1; .* positions is 0; "):
        TextSettings(max_tokens=1, positions=0)
