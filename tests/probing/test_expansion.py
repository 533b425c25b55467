import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy

from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
from portllm.patch.adapter_folder import load_patch
from portllm.patch.low_rank import load_delta
from portllm.probing import expansion as module
from portllm.probing.expansion import expand
from portllm.running.encoding import Encoder
from portllm.running.examples import Example
from portllm.running.model import load_model, load_tokenizer
from portllm.running.moments import gather_moments
from portllm.training.lora import encode_all
from tests.language import make_reader
from tests.models import make_adapter, make_evolved

CPU = torch.device("cpu")
FLOAT32_NOISE = 1e-4
EXAMPLES = [
    Example(prompt="what causes measles? Kind:", completion="cause"),
    Example(prompt="how is a fever treated? Kind:", completion="treatment"),
    Example(prompt="is measles inherited? Kind:", completion="symptoms"),
]
SCALE = 1.5


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("expansion")
    base = make_reader(folder / "base", dtype=torch.float32)
    evolved = make_evolved(base, folder / "evolved", drift=0.05)
    load_tokenizer(base).save_pretrained(evolved)
    return {"base": base, "evolved": evolved, "patch": make_adapter(base, folder / "patch", size=0.1)}


@pytest.fixture(scope="module")
def measured(folders):
    with pytest.MonkeyPatch.context() as patcher:
        patcher.setattr(module, "BLOCK_ELEMENTS", 50)  # several blocks of rows
        return expand(
            open_checkpoint(folders["base"]),
            open_checkpoint(folders["evolved"]),
            load_patch(folders["patch"]),
            EXAMPLES,
            batch_size=2,
            sketch=400,
            device="cpu",
        )


def dense_deltas(folder):
    tensors = load_file(folder / "adapter_model.safetensors")
    names = {name.removeprefix("base_model.model.").rsplit(".lora_", 1)[0] for name in tensors}
    factors = {n: [tensors[f"base_model.model.{n}.lora_{side}.weight"] for side in "AB"] for n in names}
    return {name: SCALE * b @ a for name, (a, b) in factors.items()}


def encoded(folder):
    return encode_all(Encoder(load_tokenizer(folder)), EXAMPLES, max_tokens=512)


def summed_loss(model, row):
    """The completion's nats of one row alone, without padding."""
    ids = torch.tensor([row.prompt + row.completion])
    logits = model(ids).logits[0, len(row.prompt) - 1 : -1]
    return cross_entropy(logits, ids[0, len(row.prompt) :], reduction="sum")


def test_the_first_order_gains_are_autograds(folders, measured):
    deltas = dense_deltas(folders["patch"])
    for model_name, term in (("base", "first_order_base"), ("evolved", "first_order_evolved")):
        rows = encoded(folders[model_name])
        model = load_model(folders[model_name], device=CPU)
        sum(summed_loss(model, row) for row in rows).backward()
        n_targets = sum(len(row.completion) for row in rows)
        for name, delta in deltas.items():
            gradient = model.get_submodule(name).weight.grad
            expected = float((gradient * delta).sum()) / n_targets
            assert getattr(measured.modules[name], term) == pytest.approx(expected, rel=FLOAT32_NOISE, abs=1e-6)


def test_the_losses_are_those_of_the_rows_alone(folders, measured):
    rows = encoded(folders["base"])
    with torch.no_grad():
        nats = float(sum(summed_loss(load_model(folders["base"], device=CPU), row) for row in rows))
    assert measured.losses["base"] == pytest.approx(nats / sum(len(row.completion) for row in rows), rel=FLOAT32_NOISE)
    assert len(set(measured.losses.values())) == 4


def test_interference_and_curvature_are_dense_arithmetic_on_autograds_tensors(folders, measured, monkeypatch):
    # The labels that the model would draw are those of the rows, so that autograd can be asked for the same gradients.
    monkeypatch.setattr("portllm.running.moments._draw", lambda logits, targets, generator: targets)
    found = expand(
        open_checkpoint(folders["base"]),
        open_checkpoint(folders["evolved"]),
        load_patch(folders["patch"]),
        EXAMPLES,
        batch_size=2,
        sketch=2000,
        device="cpu",
    )
    rows, model = encoded(folders["base"]), load_model(folders["base"], device=CPU)
    old, new = (load_file(folders[name] / "model.safetensors") for name in ("base", "evolved"))
    seen = {name: ([], []) for name in measured.modules}
    handles = []
    for name, (inputs, gradients) in seen.items():

        def hook(_module, args, output, inputs=inputs, gradients=gradients):
            inputs.append(args[0].detach()[0].double())
            output.register_hook(lambda gradient: gradients.append(gradient[0].double()))

        handles.append(model.get_submodule(name).register_forward_hook(hook))
    for row in rows:
        loss = summed_loss(model, type(row)(row.prompt, row.completion))
        loss.backward()
    n_targets = sum(len(row.completion) for row in rows)
    for name, delta in dense_deltas(folders["patch"]).items():
        x, grads = (torch.cat(parts) for parts in seen[name])
        # The last token is a target and never an input in ours; no gradient reaches it.
        keep = torch.cat([torch.arange(len(r.prompt) + len(r.completion)) for r in rows]) < torch.cat(
            [torch.full((len(r.prompt) + len(r.completion),), len(r.prompt) + len(r.completion) - 1) for r in rows]
        )
        x, grads = x[keep], grads[keep]
        second_x, second_g = x.T @ x / len(x), grads.T @ grads / n_targets
        drift = (new[f"{name}.weight"] - old[f"{name}.weight"]).double()
        terms, delta = found.modules[name], delta.double()
        size = float(torch.trace(second_g @ delta @ second_x @ delta.T))
        assert terms.patch_curvature == pytest.approx(size, rel=FLOAT32_NOISE)
        drift_size = float(torch.trace(second_g @ drift @ second_x @ drift.T))
        both = float(torch.trace(second_g @ drift @ second_x @ delta.T))
        assert terms.interference == pytest.approx(both, rel=FLOAT32_NOISE, abs=1e-4 * (size * drift_size) ** 0.5)
        assert terms.drift_curvature == pytest.approx(drift_size, rel=6 * (4 / 2000) ** 0.5)
        assert abs(terms.cosine) <= 1


def test_drawn_labels_are_the_models_own(folders):
    model = load_model(folders["base"], device=CPU)
    deltas = {n: load_delta(delta) for n, delta in load_patch(folders["patch"]).deltas.items()}
    how = {"device": CPU, "sketch": 4, "curvature": True}
    batches = [encoded(folders["base"])]
    one, again, other = (gather_moments(model, deltas, batches, seed=seed, **how) for seed in (0, 0, 1))
    name = next(iter(deltas))
    assert torch.equal(one.modules[name].gradients, again.modules[name].gradients)
    assert not torch.equal(one.modules[name].gradients, other.modules[name].gradients)
    assert one.modules[name].first_order == other.modules[name].first_order


def test_without_drift_nothing_interferes(folders):
    base = open_checkpoint(folders["base"])
    total = expand(base, base, load_patch(folders["patch"]), EXAMPLES, device="cpu").to_json()["total"]
    assert (total["interference"], total["drift_curvature"], total["interference_cosine"]) == (0.0, 0.0, None)
    assert total["lost_gain"] == 0.0


def test_half_a_small_drift_takes_half_as_much_of_the_gain(folders, tmp_path):
    """`<g1, Δ> - <g0, Δ>` is `<D, HΔ>` to second order, here for a drift along the patch."""
    lost = []
    for part in (0.02, 0.01):
        evolved = make_reader(tmp_path / str(part), dtype=torch.float32)
        model = load_model(folders["base"], device=CPU)
        with torch.no_grad():
            for name, delta in dense_deltas(folders["patch"]).items():
                model.get_submodule(name).weight += part * delta
        model.save_pretrained(evolved)
        models = map(open_checkpoint, (folders["base"], evolved))
        total = expand(*models, load_patch(folders["patch"]), EXAMPLES, device="cpu").to_json()["total"]
        assert total["interference_cosine"] == pytest.approx(1.0, rel=6 * (4 / 32) ** 0.5)
        lost.append(total["lost_gain"])
    assert lost[1] == pytest.approx(lost[0] / 2, rel=0.05)


def test_a_patch_of_more_than_lora_is_refused(folders, tmp_path):
    patch = load_patch(make_adapter(folders["base"], tmp_path / "dora", use_dora=True))
    with pytest.raises(PlanRefusedError, match="plain LoRA"):
        expand(*[open_checkpoint(folders["base"])] * 2, patch, EXAMPLES, device="cpu")
