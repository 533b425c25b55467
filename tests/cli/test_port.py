"""inspect, capture, port and merge as a user calls them: what they print, what they write, how they refuse."""

import json
import shutil

import pytest
import torch

from portllm.patch.adapter_folder import read_record


@pytest.fixture
def patch(tiny, tmp_path, portllm):
    """A captured patch of the tiny base."""
    result = portllm("capture", "--adapter", tiny("adapter"), "--base", tiny("base"), "-o", tmp_path / "patch")
    assert result.status == 0, result.err
    return tmp_path / "patch"


def test_inspect_describes_a_checkpoint(portllm, tiny):
    result = portllm("inspect", tiny("base"))
    assert result.status == 0
    assert "LlamaForCausalLM" in result.out
    assert "tied to the embedding" in result.out
    assert "2 q_proj 18x12" in result.out


def test_inspect_as_json_holds_the_fingerprint_and_the_digest_when_asked(portllm, tiny):
    from portllm.checkpoint.model.identity import digest, fingerprint
    from portllm.checkpoint.open import open_checkpoint

    base = open_checkpoint(tiny("base"))
    summary = json.loads(portllm("inspect", tiny("base"), "--digest", "--json", "--quiet").out)
    assert (summary["fingerprint"], summary["digest"]) == (fingerprint(base), digest(base))


def test_inspect_tells_an_adapter_from_a_patch(portllm, tiny, patch):
    assert json.loads(portllm("inspect", tiny("adapter"), "--json").out)["kind"] == "adapter"
    assert json.loads(portllm("inspect", patch, "--json").out)["kind"] == "patch"


def test_port_prints_its_plan_and_writes_a_patch_of_the_evolved_model(portllm, tiny, patch, tmp_path):
    result = portllm("port", patch, "--evolved", tiny("evolved"), "--base", tiny("base"), "-o", tmp_path / "ported")
    assert result.status == 0, result.err
    assert "14 modules, every tensor accounted for" in result.out
    assert "(estimated from samples)" in result.out
    record = read_record(tmp_path / "ported")
    assert [step.method for step in record.ports] == ["add"]


def test_a_dry_run_writes_nothing(portllm, tiny, patch, tmp_path):
    for command in (
        ("port", patch, "--evolved", tiny("evolved")),
        ("merge", patch, "--into", tiny("base")),
        ("capture", "--adapter", tiny("adapter"), "--base", tiny("base")),
    ):
        result = portllm(*command, "-o", tmp_path / "out", "--dry-run")
        assert result.status == 0, result.err
        assert str(tmp_path / "out") in result.out
        assert not (tmp_path / "out").exists()


def test_merge_says_what_rounding_takes_and_how_to_keep_it(portllm, tiny, patch, tmp_path):
    result = portllm("merge", patch, "--into", tiny("base"), "-o", tmp_path / "merged")
    assert result.status == 0, result.err
    assert "of the patch survives rounding to BF16" in result.out
    manifest = json.loads((tmp_path / "merged" / "portllm.json").read_text())
    assert manifest["tensors_changed"] == 14


def test_merge_warns_of_a_patch_too_small_for_the_dtype_and_names_remedies_that_exist(portllm, tiny, tmp_path):
    adapter = tiny("adapter", size=0.005)
    small = portllm("merge", adapter, "--into", tiny("base"), "-o", tmp_path / "small")
    assert "loses changes smaller than half a step" in small.out
    for remedy in (("--dtype", "F32"), ("--rounding", "stochastic")):
        assert remedy[0] in small.out
        kept = portllm("merge", adapter, "--into", tiny("base"), "-o", tmp_path / remedy[1], *remedy)
        assert kept.status == 0, kept.err
        assert "warning" not in kept.out


def test_merge_as_json_is_the_manifest(portllm, tiny, patch, tmp_path):
    result = portllm("merge", patch, "--into", tiny("base"), "-o", tmp_path / "merged", "--json")
    assert json.loads(result.out) == json.loads((tmp_path / "merged" / "portllm.json").read_text())


@pytest.mark.parametrize("command", ["merge", "port", "capture"])
@pytest.mark.parametrize(
    ("model", "adapter_of", "told"),
    [
        ({"inner": 24}, {}, "the delta is (out=20, in=12), but its weight in"),
        ({"layers": 1}, {"layers": 2}, "has no such module"),
        ({"layers": 3}, {"layers": 2}, "the patch has no tensors for it"),
    ],
    ids=["another width", "shallower", "deeper"],
)
def test_an_adapter_of_another_model_is_refused_and_nothing_is_written(
    portllm, tiny, tmp_path, command, model, adapter_of, told
):
    adapter, out = tiny("adapter", of=tiny("base", **adapter_of)), tmp_path / "out"
    calls = {
        "merge": ("merge", adapter, "--into", tiny("base", **model)),
        "port": ("port", adapter, "--evolved", tiny("base", **model), "--base", tiny("base", **adapter_of)),
        "capture": ("capture", "--adapter", adapter, "--base", tiny("base", **model)),
    }
    result = portllm(*calls[command], "-o", out)
    assert result.status == 1
    assert told in result.err
    assert "Traceback" not in result.err
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_refused_and_left_as_it_is(portllm, tiny, patch, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep me")
    for command in (("merge", patch, "--into", tiny("base")), ("port", patch, "--evolved", tiny("evolved"))):
        result = portllm(*command, "-o", out)
        assert result.status == 1
        assert "--overwrite" in result.err
        assert [file.name for file in out.iterdir()] == ["mine.txt"]


def test_a_missing_shard_is_named(portllm, tiny, patch, tmp_path):
    from tests.models import SEVERAL_SHARDS

    broken = tmp_path / "broken"
    shutil.copytree(tiny("base", max_shard_size=SEVERAL_SHARDS), broken)
    shard = sorted(broken.glob("model-*.safetensors"))[1]
    shard.unlink()
    result = portllm("merge", patch, "--into", broken, "-o", tmp_path / "out")
    assert result.status == 1
    assert shard.name in result.err
    assert not (tmp_path / "out").exists()


def test_a_pickled_adapter_is_refused_with_a_command_that_converts_it(portllm, tiny, tmp_path):
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    shutil.copytree(tiny("adapter"), pickled)
    torch.save(load_file(pickled / "adapter_model.safetensors"), pickled / "adapter_model.bin")
    (pickled / "adapter_model.safetensors").unlink()
    result = portllm("inspect", pickled)
    assert result.status == 1
    assert "adapter_model.bin" in result.err
    code = result.err.split('python -c "', 1)[1].rsplit('"', 1)[0]
    exec(compile(code, "the command that the message gives", "exec"), {})  # noqa: S102 (that it works is the test)
    assert portllm("inspect", pickled).status == 0


def test_a_patch_is_not_merged_into_a_base_that_is_not_its_own_unless_it_is_meant(portllm, tiny, patch, tmp_path):
    refused = portllm("merge", patch, "--into", tiny("evolved"), "-o", tmp_path / "out")
    assert refused.status == 1
    assert "--allow-other-base" in refused.err
    meant = portllm("merge", patch, "--into", tiny("evolved"), "-o", tmp_path / "out", "--allow-other-base")
    assert meant.status == 0, meant.err


def test_wrong_usage_ends_with_two(portllm):
    assert portllm("merge").status == 2
    assert portllm("no-such-command").status == 2


def test_what_is_not_there_is_said_without_a_traceback(portllm, tmp_path):
    result = portllm("inspect", tmp_path / "nothing")
    assert result.status == 1
    assert "no such file or folder" in result.err


def port_by_auto(portllm, tiny, patch, out, *more, **evolved):
    to = tiny("base", **evolved) if "seed" in evolved else tiny("evolved", **evolved)
    return portllm("port", patch, "--base", tiny("base"), "--evolved", to, "--method", "auto", "-o", out, *more)


def test_port_by_auto_shows_the_verdict_and_inspect_remembers_it(portllm, tiny, patch, tmp_path):
    result = port_by_auto(portllm, tiny, patch, tmp_path / "ported", drift=0.00003)
    assert (result.status, result.err) == (0, "")
    first, second, *_ = result.out.splitlines()
    assert first.startswith("Ported patch to ")
    assert first.endswith("by addition, which is known to hold for so short an update.")
    assert second.startswith("  - the weights that the patch changes drifted by")
    assert f"  portllm merge {tmp_path / 'ported'} --into " in result.out
    assert "chosen: the verdict was 'holds'" in portllm("inspect", tmp_path / "ported").out


def test_port_by_auto_says_first_what_is_uncertain_and_how_to_measure_it(portllm, tiny, patch, tmp_path):
    result = port_by_auto(portllm, tiny, patch, tmp_path / "ported", drift=0.02)
    assert (result.status, result.err) == (0, "")
    assert result.out.splitlines()[0].endswith("whether it holds is uncertain, so measure it before you ship it.")
    assert f"  portllm evaluate --base {tiny('base')} --patch {patch} --evolved " in result.out
    told = port_by_auto(portllm, tiny, patch, tmp_path / "json", "--json", drift=0.02)
    assert "uncertain; measure the ported patch with 'portllm evaluate'" in told.err


def test_port_by_auto_refuses_what_will_not_hold_unless_forced(portllm, tiny, patch, tmp_path):
    refused = port_by_auto(portllm, tiny, patch, tmp_path / "ported", seed=7)
    assert refused.status == 1
    assert "docs/refresh.md" in refused.err
    assert refused.out == ""
    assert not (tmp_path / "ported").exists()
    forced = port_by_auto(portllm, tiny, patch, tmp_path / "ported", "--force", seed=7)
    assert forced.status == 0
    assert forced.out.splitlines()[0].endswith("by addition by force: it will not hold.")
    assert "by force: the verdict was 'will not hold'" in portllm("inspect", tmp_path / "ported").out


def test_force_without_auto_is_a_wrong_call(portllm, tiny, patch, tmp_path):
    result = portllm("port", patch, "--evolved", tiny("evolved"), "--force", "-o", tmp_path / "ported")
    assert result.status == 2
    assert "--method auto" in result.err
