"""A model run layer by layer: transformers' own forward pass is the oracle."""

import pytest
import torch

from portllm.capturing.stored_values import StoredValues
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import CheckpointError
from portllm.matching.changes import oriented
from portllm.patch.adapter_folder import load_patch
from portllm.porting.weights import PatchedWeights
from portllm.running.encoding import pad_left
from portllm.running.layers import LayeredModel
from portllm.running.spool import Spool
from portllm.running.writers import WEAK, Reader, Writer, find_spoken, watch
from portllm.running.writing import write_layered

CPU = torch.device("cpu")
ROWS = ((1, 5, 7, 9, 3), (4, 4), (8, 2, 11))
FLOAT32_LOGITS = 1e-5
"""Of logits of size 1 in float32, where sums of a batch with padding and of a row alone come in another order."""

TARGETS = {"llama": ["q_proj", "o_proj", "down_proj"], "gpt2": ["c_attn", "c_proj", "c_fc"]}


def layered(base, patch=None, **how):
    checkpoint = open_checkpoint(base)
    found = None if patch is None else oriented(load_patch(patch), checkpoint).mapped(StoredValues)
    return LayeredModel(base, PatchedWeights(checkpoint, found), device=CPU, longest=64, **how)


def next_logits(model):
    """The logits after each row, all rows in one padded batch."""
    batch = pad_left(ROWS, device=CPU)
    state = model.begin(batch, model.embed(batch.ids.flatten()).view(*batch.ids.shape, -1))
    for number in range(len(model.layers)):
        with model.filled(number):
            state = model.run(number, state, model.arguments(batch)[number])
    return model.logits(state[:, -1])


@pytest.mark.filterwarnings("ignore:fan_in_fan_out is set")
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True}])
def test_layer_by_layer_a_patched_model_gives_the_logits_of_transformers_and_peft(kind, lora, tmp_path):
    from tests.models import load_tuned, make_adapter, make_base

    base = make_base(tmp_path / "base", kind=kind, dtype=torch.float32)
    adapter = make_adapter(base, tmp_path / "adapter", target_modules=TARGETS[kind], **lora)
    found = next_logits(layered(base, adapter))
    whole = load_tuned(base, adapter, dtype=torch.float32)
    with torch.no_grad():
        expected = torch.stack([whole(torch.tensor([row])).logits[0, -1] for row in ROWS])
    assert (found - expected).abs().max() < FLOAT32_LOGITS * expected.abs().max()


def test_a_layer_has_its_weights_inside_the_block_and_none_outside(tiny):
    model = layered(tiny("base"))
    with model.filled(1) as layer:
        assert not any(parameter.is_meta for parameter in layer.parameters())
        assert all(parameter.is_meta for parameter in model.layers[0].parameters())
    assert all(parameter.is_meta for layer in model.layers for parameter in layer.parameters())


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("llama", ["model.layers.1.self_attn.o_proj", "model.layers.1.mlp.down_proj"]),
        ("gpt2", ["transformer.h.1.attn.c_proj", "transformer.h.1.mlp.c_proj"]),
    ],
)
def test_what_writes_to_the_residual_stream_is_found_on_the_layer(kind, names, tmp_path):
    from tests.models import make_base

    model = layered(make_base(tmp_path / "base", kind=kind, dtype=torch.float32))
    given = model.arguments(pad_left([[1, 2, 3]], device=CPU))[1]
    with model.filled(1):
        writers = find_spoken(model, 1, given, tokens=3)
    assert [writer.name for writer in writers] == names
    assert all(writer.scale == pytest.approx(1.0, abs=1e-5) and writer.gain is None for writer in writers)


def test_what_a_patch_changes_and_does_not_write_is_found_in_the_order_in_which_it_speaks(tiny):
    model = layered(tiny("base"))
    given = model.arguments(pad_left([[1, 2, 3]], device=CPU))[1]
    inside = ("mlp.up_proj", "self_attn.v_proj", "self_attn.q_proj")
    changed = {"lm_head", "model.layers.0.mlp.up_proj", *(f"model.layers.1.{name}" for name in inside)}
    with model.filled(1):
        spoken = find_spoken(model, 1, given, tokens=3, changed=changed)
    assert [each.name for each in spoken if isinstance(each, Reader) and each.follows] == [
        "model.layers.1.self_attn.v_proj"  # is given what q is, and k is not looked at
    ]
    assert [(each.name.rpartition(".")[2], type(each).__name__) for each in spoken] == [
        ("q_proj", "Reader"),
        ("v_proj", "Reader"),
        ("o_proj", "Writer"),
        ("up_proj", "Reader"),
        ("down_proj", "Writer"),
    ]


@pytest.mark.parametrize(
    ("kind", "name"), [("llama", "model.layers.1.mlp.down_proj"), ("gpt2", "transformer.h.1.mlp.c_proj")]
)
def test_the_weights_of_a_module_are_those_it_multiplies_by_whichever_way_round_they_are_stored(kind, name, tmp_path):
    from tests.models import make_base

    model = layered(make_base(tmp_path / "base", kind=kind, dtype=torch.float32))
    weight = model.weight(name)
    with model.filled(1), torch.no_grad():
        module = model.module(1, name)
        said = module(torch.eye(weight.shape[1])) - module(torch.zeros(1, weight.shape[1]))
    torch.testing.assert_close(said.T, weight)


@pytest.mark.parametrize("n_known", [1, 3, 6])
def test_what_is_known_of_a_layer_need_not_be_run_again_and_changes_nothing(tiny, n_known):
    model = layered(tiny("base"))
    given = model.arguments(pad_left([[1, 2, 3]], device=CPU))[1]
    state = torch.randn(1, 3, model.width, generator=torch.Generator().manual_seed(0))
    changed = [
        f"model.layers.1.{name}_proj" for name in ("self_attn.q", "self_attn.k", "self_attn.v", "mlp.gate", "mlp.up")
    ]
    with model.filled(1):
        spoken = find_spoken(model, 1, given, tokens=3, changed=changed)
        made = torch.Generator().manual_seed(1)
        extras = {each.name: made_extra(model.weight(each.name).shape, made) for each in spoken}
        found, after = watch(model, 1, spoken, state, given, extras)
        known = {each.name: output for each, (_, output) in zip(spoken[:n_known], found, strict=False)}
        for each in spoken[:n_known]:
            model.module(1, each.name).weight.data.fill_(torch.nan)  # whoever runs it is found out
        again, after_again = watch(model, 1, spoken, state, given, extras, known=known)
    assert after_again.equal(after)
    assert all(one[1].equal(other[1]) for one, other in zip(found, again, strict=True))


def test_a_module_that_a_layer_runs_twice_is_refused_where_the_patch_changes_it(tiny, monkeypatch):
    model = layered(tiny("base"))
    given = model.arguments(pad_left([[1, 2, 3]], device=CPU))[1]
    mlp = model.layers[1].mlp
    monkeypatch.setattr(mlp, "forward", lambda x: mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.gate_proj(x)))
    with model.filled(1):
        assert find_spoken(model, 1, given, tokens=3, changed=["model.layers.1.self_attn.q_proj"])
        with pytest.raises(CheckpointError, match="gate_proj': is run 2 times in its layer"):
            find_spoken(model, 1, given, tokens=3, changed=["model.layers.1.mlp.gate_proj"])


def made_extra(shape, generator):
    return torch.randn(2, shape[1], generator=generator), torch.randn(shape[0], 2, generator=generator)


def test_a_reader_is_to_say_what_is_said_in_its_place_and_adds_nothing_to_the_stream():
    before, there, wanted = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    reader = Reader("q_proj")
    error, counts = reader.error(reader.wanted(before, wanted), before, there)
    torch.testing.assert_close(there + error, wanted)
    assert (counts == 1).all()
    assert (before + reader.added(there)).equal(before)


def test_a_model_whose_weights_lack_a_tensor_of_a_layer_is_refused_by_its_name(tiny):
    class Lacking(PatchedWeights):
        def tensor(self, name):
            return None if name.endswith("1.mlp.up_proj.weight") else super().tensor(name)

    base = tiny("base")
    model = LayeredModel(base, Lacking(open_checkpoint(base), None), device=CPU, longest=64)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight' is missing"), model.filled(1):
        pass


@pytest.mark.parametrize(
    ("kind", "room", "mapped_bytes"), [("llama", 1 << 30, 1 << 30), ("llama", 1, 0), ("gpt2", 1 << 30, 0)]
)
def test_what_is_written_layer_by_layer_is_what_transformers_generates(kind, room, mapped_bytes, tmp_path, monkeypatch):
    from transformers import AutoModelForCausalLM

    from tests.models import make_base

    monkeypatch.setattr("portllm.running.writing.SPOOLED_BYTES", room)  # with one byte, each batch alone
    monkeypatch.setattr("portllm.running.spool.MAPPED_BYTES", mapped_bytes)  # with none, all on disk
    base = make_base(tmp_path / "base", kind=kind, dtype=torch.float32)
    by_layers = layered(base)
    how = {"most": 6, "ends": (2,), "pick": lambda logits: logits.argmax(dim=1), "batch_size": 2}
    written = write_layered(by_layers, ROWS, **how, spool=Spool(tmp_path))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    logits = torch.split(by_layers.logits(written.states), list(map(len, written.ids)))
    for row, tokens, ours in zip(ROWS, written.ids, logits, strict=True):
        ids = torch.tensor([row])
        with torch.no_grad():
            theirs = model(torch.tensor([[*row, *tokens[:-1]]])).logits[0, len(row) - 1 :]
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        output = model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=6, pad_token_id=0, eos_token_id=2
        )
        assert tokens == tuple(output[0, len(row) :].tolist())


@pytest.fixture(scope="module")
def gemma(tmp_path_factory):
    """A tiny Gemma 2: norms behind what writes, embeddings that are scaled, logits that are capped."""
    from transformers import Gemma2Config, Gemma2ForCausalLM

    from tests.models import fill_at_random

    config = Gemma2Config(
        vocab_size=31,
        hidden_size=12,
        intermediate_size=20,
        num_hidden_layers=2,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=6,
        max_position_embeddings=64,
        sliding_window=4,
        final_logit_softcapping=2.0,
    )
    model = Gemma2ForCausalLM(config).eval()
    fill_at_random(model.named_parameters(), seed=0, size=0.2)
    model.save_pretrained(folder := tmp_path_factory.mktemp("gemma"))
    return folder


def test_scaled_embeddings_sliding_windows_and_capped_logits_are_those_of_transformers(gemma):
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(gemma, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        expected = torch.stack([whole(torch.tensor([row])).logits[0, -1] for row in ROWS])
    assert (next_logits(layered(gemma)) - expected).abs().max() < FLOAT32_LOGITS * expected.abs().max()


def test_the_norm_behind_a_writer_is_found_and_what_it_lacks_is_said_in_front_of_it(gemma):
    model = layered(gemma)
    given = model.arguments(pad_left([[1, 2, 3]], device=CPU))[0]
    with model.filled(0):
        writers = find_spoken(model, 0, given, tokens=3)
    assert [writer.name.rpartition(".")[2] for writer in writers] == ["o_proj", "down_proj"]
    said, wanted = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(0))
    for writer in writers:
        reachable = writer.added(wanted)
        there = said
        for _ in range(4):  # the small part that is left for the sake of weak units is made up for the next time
            there = there + writer.error(reachable, torch.zeros_like(said), there)[0]
        assert (writer.added(there) - reachable).abs().max() < 1e-4


def test_units_that_a_norm_nearly_silences_are_not_made_up_for_by_an_output_that_drowns_the_others():
    gain = torch.tensor([2.0, 1.5, 1.0, 0.002, 0.0])
    writer = Writer("o_proj", gain=gain)
    said, wanted, before = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0))
    error, counts = writer.error(wanted, before, said)
    rms = said.pow(2).mean(dim=1, keepdim=True).sqrt()
    lacks, least = wanted - before - writer.added(said), WEAK * gain.pow(2).mean()
    steepest = gain * (gain * error / rms - lacks) + least * error / rms  # of (g δ / rms - m)² + ε (δ / rms)², by δ
    assert steepest.abs().max() < 1e-5
    assert error[:, 3:].abs().max() < 5 * error[:, :3].abs().max()  # 1 / g would be 500
    assert counts.isfinite().all()


def test_an_output_of_zeros_passes_a_norm_as_zeros():
    writer = Writer("o_proj", gain=torch.ones(5))
    error, counts = writer.error(torch.ones(1, 5), torch.zeros(1, 5), torch.zeros(1, 5))
    assert writer.added(torch.zeros(1, 5)).equal(torch.zeros(1, 5))
    assert error.isfinite().all()
    assert counts.isfinite().all()
