"""Adapters that began with a part of their base: converted as PEFT converts them, or by computing that part anew."""

import json
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from portllm.capturing.adapter import capture_adapter, plan_capture
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import AdapterFormatError, OutputError, PlanRefusedError
from portllm.inspecting.inspect import inspect
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch, open_adapter
from portllm.patch.adapter_start import BASE_PRESERVING_INITS
from tests.adapter_matrix import CONVERTED, QVOU
from tests.safetensors_files import contents

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT warns of what it cannot convert, and of DoRA

F32_TOLERANCE = 5e-5
"""Of the largest value: W - s·B0·A0 + s·B·A in float32, summed in another order, and B0·A0 from another
decomposition, whose error of 1e-7 counts up to 100 times where singular values are close."""
BF16_TOLERANCE = 2.0**-7
"""Of the largest value: PEFT rounds what is left of a weight, the delta and their sum to bfloat16, half a step each."""


@dataclass(frozen=True)
class Trained:
    """An adapter that PEFT trained from a part of its base.

    Attributes:
        base: The base as it was.
        initial: The adapter before training, saved as PEFT's recipe says.
        adapter: The adapter after training, as it is.
        converted: The adapter as PEFT converts it, or None where PEFT cannot.
        merged: The weights that PEFT's merge gives it, on the base that PEFT changed.
    """

    base: Path
    initial: Path
    adapter: Path
    converted: Path | None
    merged: dict[str, torch.Tensor]


def prepared(model, config):
    """What CorDA and LoRA-GA look at before they begin."""
    from peft.tuners.lora.corda import preprocess_corda
    from peft.tuners.lora.loraga import preprocess_loraga

    ids = torch.arange(28).reshape(4, 7) % 31
    if config.init_lora_weights == "corda":
        preprocess_corda(model, config, run_model=lambda: model(ids[:1]))
    elif config.init_lora_weights == "lora_ga":
        preprocess_loraga(model, config, train_step=lambda: model(input_ids=ids, labels=ids).loss.backward())


def quantize(weight, num_bits, reduced_rank, num_iter):
    """LoftQ's beginning with a plain grid: PEFT's own needs a GPU and another library for its grid."""
    quantized = (weight * 4).round() / 4
    u, s, vt = torch.linalg.svd(weight - quantized, full_matrices=False)
    return quantized, vt[:reduced_rank], (u * s)[:, :reduced_rank]


def weights_of(tuned):
    """The weights that a model of PEFT has now, by the names of its base."""
    with torch.no_grad():
        return {
            f"{name.removeprefix('base_model.model.')}.weight": layer.base_layer.weight
            + layer.get_delta_weight("default")
            for name, layer in tuned.named_modules()
            if hasattr(layer, "lora_A")
        }


def train(base, folder, *, seed=3, size=0.05, **lora):
    """Begin as PEFT does, save, move every trained number a little, save again."""
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.config import CordaConfig, LoraGAConfig
    from transformers import AutoModelForCausalLM

    from tests.models import save_adapter

    torch.manual_seed(0)
    settings = {
        "corda": {"corda_config": CordaConfig()},
        "lora_ga": {"lora_ga_config": LoraGAConfig()},
        "loftq": {"loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    }
    fields = {"target_modules": QVOU, "r": 4, "lora_alpha": 6, **lora, **settings.get(lora["init_lora_weights"], {})}
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    config = LoraConfig(task_type="CAUSAL_LM", **fields)
    prepared(model, config)
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr("peft.tuners.lora.layer.loftq_init", quantize)
        tuned = get_peft_model(model, config)
    began = weights_of(tuned)
    tuned.peft_config["default"].init_lora_weights = True
    save_adapter(tuned, folder / "initial")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(tuned.named_parameters(), key=lambda pair: pair[0]):
            if parameter.requires_grad:
                parameter += torch.randn(parameter.shape, generator=generator) * size
    tuned.peft_config["default"].init_lora_weights = fields["init_lora_weights"]
    save_adapter(tuned, folder / "adapter")
    is_converted_by_peft = not (fields.get("use_rslora") and ("rank_pattern" in fields or "alpha_pattern" in fields))
    if is_converted_by_peft:
        tuned.save_pretrained(folder / "peft", path_initial_model_for_weight_conversion=str(folder / "initial"))
    merged = {name: value.clone() for name, value in tuned.merge_and_unload().state_dict().items()}
    if fields["init_lora_weights"] == "loftq":  # what training changed, without the error of the quantization
        was = load_file(base / "model.safetensors")
        merged |= {name: merged[name] - value + was[name] for name, value in began.items()}
    return Trained(
        Path(base),
        folder / "initial",
        folder / "adapter",
        folder / "peft" if is_converted_by_peft else None,
        merged,
    )


COMPUTED = [case for case, row in CONVERTED.items() if row.is_computed]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A trained adapter of each case, made once."""
    from tests import models

    kept = {}

    def make(case, dtype=torch.float32, **more):
        key = (case, dtype, repr(more))
        if key not in kept:
            folder = tmp_path_factory.mktemp("trained")
            how = {"tied": False} if more.get("kind") != "gpt2" else {}
            base = models.make_base(folder / "base", dtype=dtype, **how, **more)
            lora = dict(CONVERTED[case].lora)
            if more.get("kind") == "gpt2":
                lora["target_modules"] = ["c_attn", "c_fc"]
            kept[key] = train(base, folder, **lora)
        return kept[key]

    return make


def captured(case, out, *, initial):
    before = open_adapter(case.initial) if initial else None
    return capture_adapter(open_adapter(case.adapter), base=open_checkpoint(case.base), initial=before, out=out)


def merged(patch, case, out):
    merge(patch, into=open_checkpoint(case.base), out=out)
    return load_file(out / "model.safetensors")


def assert_near(found, expected, base, tolerance):
    """Every tensor is as PEFT has it, to a share of its largest value; and something was learned."""
    for name, value in found.items():
        error = (value.float() - expected[name].float()).abs().max()
        assert error <= tolerance * expected[name].float().abs().max(), name
    moved = [name for name, value in found.items() if (value.float() - base[name].float()).abs().max() > 0.02]
    assert len(moved) >= 2 * len(QVOU)


WAYS = [*((case, True) for case in CONVERTED), *((case, False) for case in COMPUTED)]


@pytest.mark.parametrize(("case", "initial"), WAYS)
def test_a_converted_adapter_makes_the_tuned_model_of_the_base_as_it_was(case, initial, made, tmp_path):
    trained = made(case)
    patch = captured(trained, tmp_path / "patch", initial=initial)
    found = merged(patch, trained, tmp_path / "merged")
    assert_near(found, trained.merged, load_file(trained.base / "model.safetensors"), F32_TOLERANCE)


@pytest.mark.parametrize("case", [case for case in CONVERTED if case != "pissa, both" and case != "olora, both"])
def test_with_the_initial_adapter_the_tensors_are_those_that_peft_converts_to(case, made, tmp_path):
    trained = made(case)
    captured(trained, tmp_path / "patch", initial=True)
    ours, theirs = (
        load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "patch", trained.converted)
    )
    factors = {name for name in theirs if "lora_A" in name or "lora_B" in name}
    assert {name for name in ours if "lora_A" in name or "lora_B" in name} == factors
    assert [name for name in factors if not ours[name].equal(theirs[name])] == []
    mine, others = (load_patch(folder) for folder in (tmp_path / "patch", as_plain(trained.converted, tmp_path)))
    assert {name: delta.scale for name, delta in mine.deltas.items()} == pytest.approx(
        {name: delta.scale for name, delta in others.deltas.items()}
    )


def as_plain(converted, tmp_path):
    """PEFT leaves out all but the factors when it converts, though they are in its configuration."""
    folder = tmp_path / "plain"
    shutil.copytree(converted, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    dropped = {
        "use_dora": False,
        "modules_to_save": None,
        "corda_config": None,
        "lora_ga_config": None,
        "loftq_config": None,
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **dropped}))
    return folder


@pytest.mark.parametrize(("case", "initial"), [("pissa", True), ("pissa", False), ("olora", True), ("olora", False)])
def test_in_bfloat16_it_is_the_tuned_model_but_for_what_peft_rounds_away(case, initial, made, tmp_path):
    trained = made(case, torch.bfloat16)
    patch = captured(trained, tmp_path / "patch", initial=initial)
    found = merged(patch, trained, tmp_path / "merged")
    assert_near(found, trained.merged, load_file(trained.base / "model.safetensors"), BF16_TOLERANCE)


@pytest.mark.parametrize("initial", [True, False])
def test_weights_that_are_stored_the_other_way_round(initial, made, tmp_path):
    trained = made("pissa", kind="gpt2")
    found = merged(captured(trained, tmp_path / "patch", initial=initial), trained, tmp_path / "merged")
    for name, value in found.items():
        expected = trained.merged[name]
        assert (value - expected).abs().max() <= F32_TOLERANCE * expected.abs().max(), name


@pytest.mark.parametrize("case", ["pissa", "pissa, both", "olora", "pissa, dora"])
def test_peft_loads_what_is_converted_on_the_base_as_it_was(case, made, tmp_path):
    from tests.models import load_tuned, logits

    trained = made(case)
    captured(trained, tmp_path / "patch", initial=False)
    found = logits(load_tuned(trained.base, tmp_path / "patch"))
    # PEFT takes the part out again when it loads the adapter as it is.
    expected = logits(load_tuned(trained.base, trained.adapter))
    assert (found - expected).abs().max() < 1e-4 * expected.abs().max()


def test_the_record_says_how_it_was_converted(made, tmp_path):
    trained = made("pissa")
    computed = captured(trained, tmp_path / "computed", initial=False).record.capture
    assert (computed.method, computed.settings["began_with"]) == ("adapter", "pissa")
    assert computed.settings["initial"] == "computed from the base"
    assert 0 < computed.settings["known_to"] < 1e-3
    given = captured(trained, tmp_path / "given", initial=True).record.capture.settings
    assert (given["began_with"], given["initial"]["name"]) == ("pissa", str(trained.initial))
    assert set(given) == {"began_with", "initial"}


def test_converting_again_gives_the_same_bytes(made, tmp_path):
    for name in ("first", "second"):
        captured(made("olora"), tmp_path / name, initial=False)
    assert contents(tmp_path / "first") == contents(tmp_path / "second")


# ---- refused


def test_an_adapter_that_was_not_converted_is_refused_with_the_command_that_does_it(made):
    for case, option in (("pissa", ""), ("olora", ""), ("pissa_niter_4", " --initial START"), ("corda", " --initial")):
        trained = made(case)
        with pytest.raises(AdapterFormatError) as error:
            load_patch(trained.adapter)
        assert f"'init_lora_weights' is '{case}'" in str(error.value)
        assert f"portllm capture --adapter {trained.adapter} --base BASE{option}" in str(error.value)
    assert inspect(trained.adapter).changed_base == "corda"


def test_settings_of_such_a_beginning_tell_of_it_though_the_beginning_was_overwritten(made):
    with pytest.raises(AdapterFormatError, match="it has a 'corda_config'.*If PEFT has already converted it, remove"):
        load_patch(made("corda").initial)


def reasons(trained, *, adapter=None, initial=None, base=None):
    refusals = plan_capture(
        open_adapter(adapter or trained.adapter),
        base=open_checkpoint(base or trained.base),
        initial=None if initial is None else open_adapter(initial),
    ).refusals
    return {refusal.where: refusal.reason for refusal in refusals}


@pytest.mark.parametrize("case", ["pissa_niter_4", "corda", "lora_ga", "loftq"])
def test_what_does_not_follow_from_the_base_needs_the_initial_adapter(case, made, tmp_path):
    trained = made(case)
    assert "where START is the adapter as saved before training" in reasons(trained)["--initial"]
    with pytest.raises(PlanRefusedError):
        captured(trained, tmp_path / "patch", initial=False)
    assert not (tmp_path / "patch").exists()


def rewritten(source, folder, *, tensors=None, **fields):
    shutil.copytree(source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **fields}))
    if tensors is not None:
        save_file(tensors(load_file(source / "adapter_model.safetensors")), folder / "adapter_model.safetensors")
    return folder


def test_another_adapter_than_the_initial_one_is_refused(made, tmp_path):
    trained = made("pissa")
    assert "it was not trained" in reasons(trained, initial=trained.adapter)["--initial"]
    zero = rewritten(
        trained.initial,
        tmp_path / "zero",
        tensors=lambda t: {name: torch.zeros_like(v) if "lora_B" in name else v for name, v in t.items()},
    )
    assert "nothing was subtracted from the base" in reasons(trained, initial=zero)["--initial"]
    scaled = rewritten(trained.initial, tmp_path / "scaled", lora_alpha=7)
    assert len(reasons(trained, initial=scaled)) == 2 * len(QVOU)
    fewer = rewritten(
        trained.initial,
        tmp_path / "fewer",
        target_modules=["q_proj"],
        tensors=lambda t: {name: v for name, v in t.items() if "q_proj" in name},
    )
    assert len(reasons(trained, initial=fewer)) == 2 * len(QVOU) - 2
    plain = rewritten(trained.adapter, tmp_path / "plain", init_lora_weights="gaussian")
    assert "does not change the base" in reasons(trained, adapter=plain, initial=trained.initial)["--initial"]


def test_an_adapter_saved_by_peft_as_if_it_were_plain_is_converted_with_its_initial_one(made, tmp_path):
    trained = made("olora")
    hidden = rewritten(trained.adapter, tmp_path / "hidden", init_lora_weights=True)
    found = merged(captured(replace(trained, adapter=hidden), tmp_path / "p", initial=True), trained, tmp_path / "out")
    assert_near(found, trained.merged, load_file(trained.base / "model.safetensors"), F32_TOLERANCE)


def test_a_head_that_is_tied_cannot_be_converted(tiny, tmp_path):
    base = tiny("base", dtype=torch.float32)
    trained = train(base, tmp_path, init_lora_weights="pissa", target_modules=["q_proj", "lm_head"])
    embedding = "model.embed_tokens.weight"
    # The embedding, which the adapter does not touch, is another one since PEFT took a part out of the head.
    assert not trained.merged[embedding].equal(load_file(base / "model.safetensors")[embedding])
    assert set(reasons(trained)) == set(reasons(trained, initial=trained.initial)) == {"lm_head"}


def test_olora_of_weights_that_are_stored_the_other_way_round_is_refused(tmp_path):
    from tests.models import make_adapter, make_base

    base = make_base(tmp_path / "base", kind="gpt2", dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "made", target_modules=["c_attn"])
    adapter = rewritten(adapter, tmp_path / "adapter", init_lora_weights="olora")
    found = reasons(Trained(base, adapter, adapter, None, {}))
    assert len(found) == 2
    assert all("PEFT's OLoRA ignores" in reason for reason in found.values())


@pytest.mark.parametrize("init", ["pissa", "olora"])
def test_where_the_weights_do_not_determine_the_beginning_it_is_refused(init, made, tmp_path):
    trained = made(init)
    shutil.copytree(trained.base, tmp_path / "base")
    weights = load_file(trained.base / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    u, s, vt = torch.linalg.svd(weights[name], full_matrices=False)
    if init == "pissa":
        s[4] = s[3]
        weights[name] = (u * s) @ vt
    else:
        weights[name][:, 1] = weights[name][:, 0] * (1 + 1e-7)
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(PlanRefusedError) as error:
        captured(replace(trained, base=tmp_path / "base"), tmp_path / "patch", initial=False)
    assert [refusal.where for refusal in error.value.refusals] == [name.removesuffix(".weight")]
    assert "--initial" in error.value.refusals[0].reason
    assert not (tmp_path / "patch").exists()
    captured(replace(trained, base=tmp_path / "base"), tmp_path / "patch", initial=True)


def test_a_conversion_never_replaces_the_initial_adapter(made):
    trained = made("pissa")
    before = contents(trained.initial)
    with pytest.raises(OutputError, match="which is an input"):
        capture_adapter(
            open_adapter(trained.adapter),
            base=open_checkpoint(trained.base),
            initial=open_adapter(trained.initial),
            out=trained.initial,
            overwrite=True,
        )
    assert contents(trained.initial) == before


@pytest.mark.parametrize("init", [True, False, *BASE_PRESERVING_INITS])
def test_the_other_starts_of_peft_leave_the_base_as_it_was(init, tiny):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = tiny("base", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
    get_peft_model(model, LoraConfig(target_modules=QVOU, r=4, init_lora_weights=init)).unload()
    before = load_file(base / "model.safetensors")
    assert [
        name for name, value in model.state_dict().items() if name in before and not value.equal(before[name])
    ] == []
