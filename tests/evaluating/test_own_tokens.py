"""A patch with tokens of its own is run as its merge is: on a resized model, with the patch's tokenizer."""

import json
from functools import cache

import pytest
import torch

from portllm.capturing.adapter import capture_adapter
from portllm.certifying.certify import certify
from portllm.certifying.inputs import CertifySettings
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
from portllm.evaluating.evaluate import evaluate
from portllm.evaluating.own_tokens import load_patched
from portllm.matching.side_files import PLAIN_TOKEN
from portllm.merging.merge import merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from portllm.probing.check import check
from tests.matching.test_added_tokens import CALL, KINDS, N_RESIZED, assert_close, give_tokens, loaded, logits
from tests.models import adapter_of, make_base, make_evolved, resized

pytestmark = [
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:.*tie"),
    pytest.mark.filterwarnings("ignore:Model has"),
]


def speak(folder):
    """Has a folder's tokenizer split texts at blanks, and gives it an end mark."""
    values = json.loads((folder / "tokenizer.json").read_text())
    values["added_tokens"] = [{**PLAIN_TOKEN, **entry} for entry in values["added_tokens"]]
    (folder / "tokenizer.json").write_text(
        json.dumps({"version": "1.0", **values, "pre_tokenizer": {"type": "WhitespaceSplit"}})
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "t1", "pad_token": "t2"})
    )
    return folder


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A base, an evolved model, and a patch of each kind, ported too."""
    folder = tmp_path_factory.mktemp("own")

    @cache
    def make(kind):
        lora, tied = KINDS[kind]
        out = folder / kind.replace(" ", "-").replace(",", "")
        out.mkdir()
        base = speak(give_tokens(make_base(out / "base", tied=tied, dtype=torch.float32)))
        evolved = speak(give_tokens(make_evolved(base, out / "evolved")))
        adapter, _ = adapter_of(resized(base, N_RESIZED), out / "adapter", **lora)
        speak(give_tokens(adapter, "<call>", "<end>"))
        patch = capture_adapter(load_patch(adapter), base=open_checkpoint(base), out=out / "patch")
        return base, evolved, patch, port(patch, base=base, evolved=evolved, out=out / "ported"), out

    return make


@pytest.mark.parametrize("kind", ["frozen, tied", "rows of old and new", "factors"])
def test_a_patch_on_its_model_computes_what_its_merge_does(kind, made):
    base, _, patch, _, out = made(kind)
    merge(patch, into=base, out=out / "merged")
    model, encoder = load_patched(base, out / "patch", device=torch.device("cpu"), longest=64)
    assert_close(logits(model), logits(loaded(out / "merged")))
    assert encoder.encode_text("t5 <call>") == (5, CALL)


@pytest.fixture(scope="module")
def asked(made):
    """What `evaluate` and `certify` are given."""
    base, evolved, patch, ported, out = made("rows of old and new")
    merge(ported, into=evolved, out=out / "merged-evolved")
    rows = [{"prompt": f"t{n} <call> t{n + 1}", "completion": f" {('<end>', 't7')[n % 2]}"} for n in range(6)]
    (out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return {"base": base, "patch": patch, "evolved": evolved, "ported": ported}, out


def test_evaluate_scores_the_ported_patch_as_its_merge(asked):
    given, out = asked
    comparison = evaluate(out / "rows.jsonl", **given, merged=out / "merged-evolved", device="cpu")
    ported, merged = (comparison.row(f"evolved + ported{name}").scores for name in ("", ", merged"))
    assert ported.losses == pytest.approx(merged.losses, abs=1e-4)
    assert ported.answers == merged.answers
    assert comparison.row("evolved").scores.losses != pytest.approx(ported.losses, abs=1e-2)


def test_certify_asks_it_too(asked):
    given, out = asked
    certificate = certify(**given, data=out / "rows.jsonl", out=out / "certificate", device="cpu")
    assert certificate.inputs.rows == 6


def test_check_does_not_compare_tokens_that_neither_model_has(asked):
    given, _ = asked
    with pytest.raises(PlanRefusedError, match="has tokens of its own, which neither model has"):
        check(given["patch"], base=given["base"], evolved=given["evolved"], text=["t5 t6", "t7 t8"], device="cpu")


def test_tokens_that_have_other_rows_are_not_compared_one_by_one(asked):
    given, out = asked
    del given["ported"], given["evolved"]
    with pytest.raises(PlanRefusedError, match="different tokenizers"):
        certify(
            **given, merged=out / "merged-evolved", data=out / "rows.jsonl", out=out / "free", device="cpu",
            settings=CertifySettings(kind="free"),
        )  # fmt: skip
