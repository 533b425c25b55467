"""Whether a runtime serves a patch is told by its log-probabilities, and what it does wrong is named."""

import contextlib
import functools
import json
from types import SimpleNamespace

import pytest
import torch
from msgspec import structs

import portllm
from portllm.errors import NotFoundError, PlanRefusedError, RuntimeFailedError
from portllm.exporting.export import export, given_of
from portllm.proving.decision import decide
from portllm.proving.prove import Endpoint, prove
from tests.models import HEAD_DIM, adapter_of, make_adapter, resized
from tests.proving.fake_server import FORMS, FakeRuntime, FakeServer

PROMPTS = ("Which kind of", "What causes measles?", "Question: what helps", "Is", "rest, tea", "who is at risk")
FLOAT32 = 1e-4
"""Rounding of float32 in log-probabilities of a tiny model, with room."""


@pytest.fixture(scope="module")
def adapter(reader, tmp_path_factory):
    """An adapter on all seven modules of the tiny model, with another alpha for one of them."""
    return make_adapter(
        reader, tmp_path_factory.mktemp("adapter"), alpha_pattern={"up_proj": 12}, rank_pattern={"v_proj": 2}
    )


@pytest.fixture
def served(reader, adapter):
    """`served(spoil=..., form=..., noise=...)` proves the adapter against a fake server; the proof."""

    def serve(*, spoil=None, noise=0.0, prompts=PROMPTS, patch=adapter, **server):
        with FakeServer(FakeRuntime(reader, patch, spoil=spoil, noise=noise), **server) as fake:
            return prove(patch, base=reader, runtime=Endpoint(fake.url, "base", "patch"), prompts=prompts)

    return serve


def each(model, wanted=""):
    """The LoRA layers whose names hold a text."""
    return [layer for name, layer in model.named_modules() if hasattr(layer, "lora_B") and wanted in name]


def scale(model, *, factor, wanted=""):
    """Another scale, or none at all."""
    for layer in each(model, wanted):
        layer.scaling["default"] *= factor


def ignore_patterns(model):
    for layer in each(model):
        layer.scaling["default"] = 6 / 4


def leave_unpermuted(model):
    """What a GGUF adapter computes whose rows of q stand as in the checkpoint."""
    for layer in each(model, "q_proj"):
        b = layer.lora_B["default"].weight
        b.copy_(b.view(-1, HEAD_DIM // 2, 2, b.shape[1]).transpose(1, 2).reshape(b.shape))


FAULTS = {
    "not loaded": functools.partial(scale, factor=0.0),
    "scale": functools.partial(scale, factor=1.7),
    "scale: patterns ignored": ignore_patterns,
    "without layer 1": functools.partial(scale, factor=0.0, wanted="layers.1."),
    "without k_proj": functools.partial(scale, factor=0.0, wanted="k_proj"),
    "q_proj not permuted": leave_unpermuted,
}


@pytest.mark.parametrize("form", FORMS)
def test_a_patch_that_is_served_as_it_is_is_proven_however_a_server_gives_log_probabilities(served, form):
    proof = served(form=form)

    assert proof.proven
    assert proof.noise < FLOAT32
    assert proof.error < FLOAT32 < min(proof.effect, *proof.null_errors)
    assert form == "texts" or proof.agreeing == len(PROMPTS)  # a text that several tokens say is no token's
    assert proof.changed > 0


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught_and_named(served, name):
    proof = served(spoil=FAULTS[name])

    assert proof.verdict == ("no effect" if name == "not loaded" else "wrong")
    assert proof.fault.name == name
    assert proof.fault.is_named


def test_the_factor_of_a_wrong_scale_is_found(served):
    assert "1.7 times" in served(spoil=FAULTS["scale"]).fault.text


def test_what_no_fault_explains_is_wrong_and_not_named(served):
    def shuffle(model):
        for layer in each(model):
            b = layer.lora_B["default"].weight
            b.copy_(b[torch.randperm(len(b), generator=torch.Generator().manual_seed(0))])

    proof = served(spoil=shuffle)

    assert proof.verdict == "wrong"
    assert proof.fault is None or not proof.fault.is_named


def test_a_fault_within_the_noise_of_the_bare_base_is_named_all_the_same(served):
    right, noise = served(), 0.25
    proof = served(spoil=FAULTS["without k_proj"], noise=noise)

    assert proof.error < proof.tolerance
    assert proof.verdict == "wrong"
    assert proof.fault.name == "without k_proj"
    assert right.proven
    assert served(noise=noise).proven


def test_an_effect_below_the_noise_is_neither_proven_nor_refuted(served):
    assert served(noise=5.0).verdict == "unclear"


def test_a_base_that_is_changed_beside_the_patch_is_told_from_noise(served):
    proof = served(noise=5.0)
    changed = structs.replace(proof, noise=0.101, effect=0.104, error=1.3e-5)

    assert "changed while the patch is loaded" not in " ".join(decide(proof).reasons)
    assert "changed while the patch is loaded" in " ".join(decide(changed).reasons)
    assert "merge the patch" in decide(changed).next


def test_a_server_that_allows_few_log_probabilities_is_asked_for_few(served):
    proof = served(most=5)

    assert proof.proven
    assert proof.n_log_probs == 2 * 5 * len(PROMPTS)


def test_prompts_that_a_server_reads_otherwise_are_counted(reader, adapter):
    runtime = FakeRuntime(reader, adapter)
    tokenize = runtime.tokenizer
    runtime.tokenizer = SimpleNamespace(decode=tokenize.decode)
    runtime.log_probs = functools.partial(read_with_a_mark, runtime, tokenize)
    with FakeServer(runtime) as fake:
        proof = prove(adapter, base=reader, runtime=Endpoint(fake.url, "base", "patch"), prompts=PROMPTS)

    assert proof.misread == len(PROMPTS)


def read_with_a_mark(runtime, tokenize, model, prompt):
    """A mark that the model's own tokenizer does not put before a text."""
    ids = torch.tensor([[1, *tokenize(prompt).input_ids]])
    off = runtime.model.disable_adapter() if model == "base" else contextlib.nullcontext()
    with torch.no_grad(), off:
        return runtime.model(ids).logits[0, -1].double().log_softmax(dim=-1), ids


@pytest.mark.parametrize(
    ("server", "said"),
    [({"form": None}, "gives no log-probabilities"), ({"status": 500}, "status 500: .*out of order")],
)
def test_a_server_that_cannot_be_compared_with_is_told(served, server, said):
    with pytest.raises(RuntimeFailedError, match=said):
        served(**server)


def test_a_model_that_the_server_does_not_have_is_told_with_those_that_it_has(reader, adapter):
    with FakeServer(FakeRuntime(reader, adapter)) as fake, pytest.raises(RuntimeFailedError, match="'base', 'patch'"):
        prove(adapter, base=reader, runtime=Endpoint(fake.url, "base", "mine"), prompts=PROMPTS)


def test_an_address_where_nothing_answers_is_told(reader, adapter):
    with FakeServer(FakeRuntime(reader, adapter)) as fake:
        gone = fake.url

    with pytest.raises(RuntimeFailedError, match="does not answer"):
        prove(adapter, base=reader, runtime=Endpoint(gone, "base", "patch"), prompts=PROMPTS)


def test_a_key_for_the_server_is_taken_from_the_environment(reader, adapter, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with FakeServer(FakeRuntime(reader, adapter)) as fake:
        prove(adapter, base=reader, runtime=Endpoint(fake.url, "base", "patch"), prompts=PROMPTS[:1])

    assert {key for key, _ in fake.asked} == {"Bearer secret"}


def test_a_patch_of_another_model_is_refused_before_anything_starts(reader, tiny):
    deeper = tiny("adapter", of=tiny("base", layers=3))

    with pytest.raises(PlanRefusedError):
        prove(deeper, base=reader, runtime=Endpoint("http://127.0.0.1:1", "base", "patch"))


def test_a_patch_with_added_tokens_is_refused_because_the_bare_base_has_no_rows_for_them(reader, tmp_path):
    rows = portllm.open_checkpoint(reader).embedding.shape[0]
    ids = [rows, rows + 1]
    adapter, _ = adapter_of(
        resized(reader, rows + 2), tmp_path / "adapter", trainable_token_indices={"embed_tokens": ids, "lm_head": ids}
    )
    tokenizer = json.loads((reader / "tokenizer.json").read_text())
    tokenizer["added_tokens"] += [{"id": row, "content": f"<{row}>", "special": True} for row in ids]
    (adapter / "tokenizer.json").write_text(json.dumps(tokenizer))
    patch = portllm.capture(adapter, base=reader, out=tmp_path / "patch")

    with pytest.raises(PlanRefusedError, match=r"added tokens give it \d+ rows.*nothing to compare with"):
        prove(patch, base=reader, runtime=Endpoint("http://127.0.0.1:1", "base", "patch"))


def test_a_runtime_that_is_not_known_is_refused_with_those_that_are(reader, adapter):
    with pytest.raises(NotFoundError, match="mistralrs, llamacpp"):
        prove(adapter, base=reader, runtime="other")


def test_a_runtime_that_is_not_installed_is_told_with_what_installs_it(reader, adapter):
    with pytest.raises(NotFoundError, match=r"make runtime-mistralrs(.|\n)*pip install mistralrs=="):
        prove(adapter, base=reader, runtime="mistralrs")


def test_the_command_prints_the_decision_and_exits_with_three_where_it_is_not_proven(
    reader, adapter, portllm, tmp_path
):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": prompt}) + "\n" for prompt in PROMPTS))
    options = ["--base", reader, "--base-name", "base", "--patch-name", "patch", "--data", rows, "--quiet"]
    patch = tmp_path / "patch"
    assert portllm("capture", "--adapter", adapter, "--base", reader, "-o", patch).status == 0
    with FakeServer(FakeRuntime(reader, adapter)) as fake:
        right = portllm("prove", patch, "--runtime", fake.url, *options, "--html", tmp_path / "page.html", "--card")
    with FakeServer(FakeRuntime(reader, adapter, spoil=FAULTS["not loaded"])) as fake:
        wrong = portllm("prove", adapter, "--runtime", fake.url, *options, "--json")

    assert right.status == 0
    assert right.out.startswith("Proven: ")
    assert "Proven" in (tmp_path / "page.html").read_text()
    assert "| `portllm prove: a server` | Proven: the server serves the patch" in (patch / "README.md").read_text()
    assert wrong.status == 3
    assert json.loads(wrong.out)["decision"]["proven"] is False
    assert "serves the bare base" in json.loads(wrong.out)["decision"]["text"]


def test_an_export_that_is_a_file_is_found_in_its_folder(reader, adapter, tmp_path):
    exported = export(adapter, runtime="openvino", out=tmp_path / "out", base=reader)

    assert given_of(tmp_path / "out") == exported.given
    assert given_of(adapter) == adapter
