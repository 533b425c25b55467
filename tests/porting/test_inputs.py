"""What a port method is given: weights in one shape, however a file stores them, and nothing it did not ask for."""

from dataclasses import replace

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.methods.contract import Inputs, Need
from portllm.methods.table import METHODS
from portllm.methods.values import whole
from portllm.patch.adapter_folder import load_patch
from portllm.porting.inputs import StoredValues, gather

READER = replace(METHODS["add"], id="reader", needs=frozenset({Need.WEIGHTS}))


@pytest.fixture
def reading(monkeypatch):
    """A method in the table that asks for weights."""
    monkeypatch.setitem(METHODS, READER.id, READER)
    return READER.id


def plan(base, evolved, adapter, method):
    return plan_port(load_patch(adapter), Update(open_checkpoint(base), open_checkpoint(evolved)), method=method)


def test_a_method_that_asks_for_nothing_is_given_nothing(tiny):
    patch, inputs = gather(plan(tiny("base"), tiny("evolved"), tiny("adapter"), "add"))
    assert inputs == Inputs()
    assert all(isinstance(delta.a, StoredValues) for delta in patch.deltas.values())


def test_a_method_that_asks_for_weights_is_given_those_of_what_the_patch_changes(reading, tiny):
    models = tiny("base"), tiny("evolved")
    patch, inputs = gather(plan(*models, tiny("adapter"), reading))
    names = {f"{module}.weight" for module in patch.deltas}
    assert inputs.base.keys() == inputs.evolved.keys() == names
    for folder, side in zip(models, (inputs.base, inputs.evolved), strict=True):
        stored = open_checkpoint(folder)
        assert all(whole(side[name]).equal(whole(StoredValues(stored.info(name)))) for name in names)


@pytest.mark.filterwarnings("ignore")  # transformers and peft warn of tiny vocabularies and of patterns
@pytest.mark.parametrize("current", [False, True], ids=["one by one", "fused"])
def test_the_experts_of_a_layer_are_one_tensor_however_a_file_stores_them(current, reading, tmp_path):
    from tests import families as tiny

    base = tiny.make_base("mixtral", tmp_path / "base", dtype=torch.float32, current=current)
    targets = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
    adapter = tiny.make_adapter("mixtral", base, tmp_path / "adapter", **targets)
    patch, inputs = gather(plan(base, base, adapter, reading))
    model = tiny.load("mixtral", base)
    assert len(patch.experts) == 4
    for name, delta in patch.experts.items():
        found = inputs.base[name]
        assert tuple(found.shape) == delta.shape
        assert whole(found).equal(model.get_parameter(name))
        assert found.rows(1, 2).equal(model.get_parameter(name)[1:2])
