import json

import pytest

from portllm.running.model import load_tokenizer
from tests.language import make_reader
from tests.models import make_evolved

ROWS = [{"question": "what causes measles?", "kind": "cause"}, {"question": "how is it treated?", "kind": "treatment"}]
ASKED = ("--prompt", "{question} Kind:", "--completion", "kind")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    evolved = make_evolved(make_reader(folder / "base"), folder / "evolved")
    load_tokenizer(folder / "base").save_pretrained(evolved)
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def test_a_patch_is_trained_ported_and_refreshed(portllm, world, tmp_path):
    data = ("--data", world / "rows.jsonl", "--device", "cpu", "--steps", "2", "--quiet")
    first = portllm("train", "--base", world / "base", *data, *ASKED, "--rank", "2", "-o", tmp_path / "patch")
    assert first.status == 0, first.err
    assert portllm("port", tmp_path / "patch", "--evolved", world / "evolved", "-o", tmp_path / "ported").status == 0
    how = ("--init-from", tmp_path / "ported", "--teacher", tmp_path / "patch", "--teacher-base", world / "base")
    preview = portllm("train", "--base", world / "evolved", *data, *how, "-o", tmp_path / "new", "--dry-run")
    assert preview.status == 0, preview.err
    assert "beginning with" in preview.out
    assert "what causes measles? Kind:" in preview.out
    assert not (tmp_path / "new").exists()
    refreshed = portllm("train", "--base", world / "evolved", *data, *how, "-o", tmp_path / "new", "--json")
    assert refreshed.status == 0, refreshed.err
    assert json.loads(refreshed.out)["training"]["steps"] == 2
    record = json.loads((tmp_path / "new" / "patch.json").read_text())
    assert {"init_from", "teacher"} <= record["capture"]["settings"].keys()
    assert record["capture"]["settings"]["rank"] == 2


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--prompt", "{q}"), "--prompt and --completion together"),
        (("--teacher", "p", "--prompt", "{q}"), "must be used together"),
        (("--max-new-tokens", "3", *ASKED), "requires --teacher"),
        (("--teacher", "p", "--teacher-base", "b", *ASKED), "cannot be used with --teacher"),
        (("--init-from", "p", "--rank", "4"), "--rank"),
        (("--init-from", "p", "--target-modules", "q_proj"), "--target-modules"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(portllm, world, tmp_path, options, said):
    found = portllm("train", "--base", world / "base", "--data", world / "rows.jsonl", "-o", tmp_path / "p", *options)
    assert found.status == 2
    assert said in " ".join(found.err.replace("│", " ").split())
