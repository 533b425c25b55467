"""What an aligned port is compared with is what it says it is; dense algebra is the oracle."""

import json

import pytest
import torch

from portllm.checkpoint.open import open_checkpoint
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.methods.values import whole
from portllm.patch.adapter_folder import load_patch
from portllm.porting.inputs import gather
from portllm.study.definition.settings import RowsTask
from portllm.study.parts.ported_by import PortedBy
from portllm.study.parts.rivals import DISTILLED, RIVALS, UNMEASURED
from portllm.study.run import run_study
from tests.study.small import KINDS, write_study


def deltas(patch):
    return {
        name: delta.scale * whole(delta.b).double() @ whole(delta.a).double() for name, delta in patch.deltas.items()
    }


def ported(tiny, rival):
    from dataclasses import replace

    plan = plan_port(load_patch(tiny("adapter")), Update(*(open_checkpoint(tiny(n)) for n in ("base", "evolved"))))
    patch, inputs = gather(replace(plan, method=RIVALS[rival]))
    return deltas(patch), deltas(RIVALS[rival].port(patch, inputs).patch), inputs


def test_a_random_patch_has_the_norms_of_the_one_it_stands_for_and_nothing_else_of_it(tiny):
    before, after, _ = ported(tiny, "random")
    assert before.keys() == after.keys()
    for name, delta in before.items():
        assert after[name].norm() == pytest.approx(float(delta.norm()), rel=1e-5)
        assert abs(float((after[name] * delta).sum() / delta.norm() ** 2)) < 0.9


def test_a_truncated_patch_is_the_nearest_of_its_rank_to_the_old_specialist(tiny):
    before, after, inputs = ported(tiny, "truncated")
    for name, delta in before.items():
        old, new = (whole(side[f"{name}.weight"]).double() for side in (inputs.base, inputs.evolved))
        wanted = old + delta - new
        rank = torch.linalg.matrix_rank(after[name], rtol=1e-4)
        left = torch.linalg.svdvals(wanted)[rank:].norm()
        assert (wanted - after[name]).norm() == pytest.approx(float(left), rel=1e-4)


def test_rivals_that_run_models_are_known_as_such():
    assert {name: PortedBy.read(name).reads_prompts for name in ("add", "align", *RIVALS, DISTILLED)} == {
        "add": False, "align": True, "random": False, "random-align": True, "truncated": False, "distilled": True,
    }  # fmt: skip


def test_rows_to_port_on_are_those_behind_the_rows_to_train_on():
    from portllm.errors import PortLLMError

    with pytest.raises(PortLLMError, match="port_rows is 4; expected 0 without train_rows"):
        RowsTask(train="a", score="b", prompt="{q}", completion="a", port_rows=4)


@pytest.mark.slow
def test_a_study_runs_every_rival_and_says_what_each_reached(reader, tmp_path):
    methods = ["add", "align", "align@16", "align@drawn-24", *RIVALS, DISTILLED]
    file = write_study(
        tmp_path,
        reader,
        top=f"methods = {json.dumps(methods)}",
        replace={
            "score_rows = 9": "score_rows = 9\ntrain_rows = 12\nport_rows = 20",
            "links = 2": "links = 1",
            "[0, 1]": "[0]",
        },
    )
    rows = [{"text": f"what helps against {n} colds?", "kind": KINDS[n % 3]} for n in range(32)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    results = run_study(file, out=tmp_path / "out", data=tmp_path, device="cpu")
    assert [row.method for row in results.tasks] == methods
    assert results.n_done == results.n_steps
    assert all(0 <= row.agreement.value <= 1 for row in results.tasks)
    measured = {row.method: row.measured for row in results.tasks if "divergence" in row.measured}
    assert set(measured) == set(methods) - {"add"}
    # What a rival is compared with is what the aligned port was compared with: the same rows, the same answers.
    same = ("divergence_added", "agreement_added", "general_nats", "general_nats_added", "prompts_report")
    for rival in UNMEASURED:
        expected = [measured["align"][name] for name in same]
        assert [measured[rival][name] for name in same] == pytest.approx(expected, rel=1e-4), rival
    assert measured["align@16"]["prompts_fit"] == 8
    assert "prompts_drawn" in measured["align@drawn-24"]
