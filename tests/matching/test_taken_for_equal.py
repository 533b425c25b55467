"""Plans read headers and samples; what they take for equal by these, the runs that depend on it compare whole."""

import json
from pathlib import Path

import pytest

from portllm.capturing.adapter import capture_adapter, plan_capture
from portllm.capturing.tuned import capture_tuned
from portllm.capturing.tuned_plan import plan_capture_tuned
from portllm.checking.check import check_weights
from portllm.checkpoint.open import open_checkpoint
from portllm.errors import PlanRefusedError
from portllm.inspecting.inspect import inspect
from portllm.matching.port_plan import plan_port
from portllm.matching.update import Update
from portllm.merging.in_place import merge_in_place, plan_in_place
from portllm.merging.manifest import MergeReport
from portllm.merging.merge import merge, merge_each
from portllm.merging.plan import plan_merge
from portllm.patch.adapter_folder import load_patch
from portllm.porting.port import port
from tests.safetensors_files import BYTES_OF, contents, count, write_tensors

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
QUERY = "model.layers.0.self_attn.q_proj"

TOKENS, WIDTH = 1 << 14, 16
UNSEEN = 5000
"""A row where no sample of a matrix of so many tokens lies."""

LARGE = 1 << 21
"""Tokens of a matrix of 64 MiB."""

READ_AT_MOST = 1 << 20
"""Headers, small files, the fingerprints' 4 KiB a tensor, and 16 windows of 8 KiB of head and embedding."""

IO = Path("/proc/self/io")


def write_model(folder, *, tokens=TOKENS, query=1, row=None, head_dtype="BF16", tied=True):
    """A tied model that stores its head beside its embedding: zeros, but for one row of the head, where that is given.

    `query` fills the query projection.
    """
    shape = (tokens, WIDTH)
    tensors = {
        EMBEDDING: ("BF16", shape, bytes(2 * count(shape))),
        HEAD: (head_dtype, shape, _zeros_but_for(row, BYTES_OF[head_dtype] * WIDTH, tokens)),
        f"{QUERY}.weight": ("BF16", (WIDTH, WIDTH), bytes([query, 60]) * WIDTH**2),
    }
    folder.mkdir()
    write_tensors(folder / "model.safetensors", tensors)
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": tied}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _zeros_but_for(row, size, tokens):
    if row is None:
        return bytes(size * tokens)
    return bytes(size * row) + b"\1" * size + bytes(size * (tokens - row - 1))


def write_adapter(folder, kind, *, tokens=TOKENS, copy_row=None):
    """An adapter of the query projection, and of what else its kind says, without a record."""
    factors = {
        "lora_A": ("F32", (1, WIDTH), bytes(range(4 * WIDTH))),
        "lora_B": ("F32", (WIDTH, 1), bytes(range(4 * WIDTH))),
    }
    tensors = {f"base_model.model.{QUERY}.{name}.weight": factor for name, factor in factors.items()}
    fields = {"peft_type": "LORA", "r": 1, "lora_alpha": 1, "target_modules": ["q_proj"]}
    match kind:
        case "query":
            pass
        case "head":
            fields["target_modules"] = ["q_proj", "lm_head"]
            tensors["base_model.model.lm_head.lora_A.weight"] = factors["lora_A"]
            tensors["base_model.model.lm_head.lora_B.weight"] = ("F32", (tokens, 1), bytes(4 * tokens))
            tensors["base_model.model.lm_head.base_layer.weight"] = (
                "BF16", (tokens, WIDTH), _zeros_but_for(copy_row, 2 * WIDTH, tokens),
            )  # fmt: skip
        case "rows":
            fields["trainable_token_indices"] = {"embed_tokens": [3]}
            rows = ("F32", (1, WIDTH), bytes(4 * WIDTH))
            tensors["base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"] = rows
    folder.mkdir()
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return load_patch(folder)


# ---- plans read headers and samples


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Two versions of a model that stores a tied head twice, and an adapter of the head with a copy of it."""
    folder = tmp_path_factory.mktemp("large")
    base = write_model(folder / "base", tokens=LARGE)
    evolved = write_model(folder / "evolved", tokens=LARGE, query=2)
    write_adapter(folder / "adapter", "head", tokens=LARGE)
    return base, evolved, folder / "adapter"


PLANS = {
    "port": lambda base, evolved, patch: plan_port(
        load_patch(patch), Update(open_checkpoint(base), open_checkpoint(evolved))
    ),
    "merge": lambda base, _, patch: plan_merge(load_patch(patch), into=open_checkpoint(base)),
    "merge in place": lambda base, _, patch: plan_in_place(load_patch(patch), base),
    "capture of an adapter": lambda base, _, patch: plan_capture(load_patch(patch), base=open_checkpoint(base)),
    "capture of a tuned model": lambda base, evolved, _: plan_capture_tuned(
        open_checkpoint(base), open_checkpoint(evolved)
    ),
    "check of a model": lambda base, evolved, _: check_weights(
        base=open_checkpoint(base), evolved=open_checkpoint(evolved)
    ),
    "inspect": lambda base, *_: inspect(base),
}


@pytest.mark.skipif(not IO.exists(), reason="the system does not count what a process reads")
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_reads_headers_and_samples_of_a_model_that_stores_its_head_twice(plan, large):
    PLANS[plan](*large)  # what it imports is read once
    before = _bytes_read()
    found = PLANS[plan](*large)
    assert _bytes_read() - before < READ_AT_MOST
    assert getattr(found, "tied_head", True)


def _bytes_read():
    return int(IO.read_text().split()[1])


# ---- runs compare whole


@pytest.fixture
def fine(tmp_path):
    return write_model(tmp_path / "fine")


@pytest.fixture
def untied(tmp_path):
    """Its configuration says that it is tied, and so do samples of its head; one row is another."""
    return write_model(tmp_path / "untied", row=UNSEEN)


REFUSED = "lm_head.weight: config.json of .* ties it to model.embed_tokens.weight, and .* the full matrices differ"


def test_samples_of_a_head_that_differs_in_one_row_say_nothing_of_it(fine, untied):
    assert all(open_checkpoint(folder).tied_embedding is not None for folder in (fine, untied))


@pytest.mark.parametrize("kind", ["head", "rows"])
def test_a_merge_that_depends_on_a_tie_is_refused_where_head_and_embedding_differ(kind, fine, untied, tmp_path):
    patch = write_adapter(tmp_path / "adapter", kind)
    merge(patch, into=open_checkpoint(fine), out=tmp_path / "good")
    with pytest.raises(PlanRefusedError, match=REFUSED):
        merge(patch, into=open_checkpoint(untied), out=tmp_path / "bad")
    assert {path.name for path in tmp_path.iterdir()} == {"adapter", "fine", "untied", "good"}


def test_a_merge_that_depends_on_no_tie_copies_a_head_that_differs(untied, tmp_path):
    report = merge(write_adapter(tmp_path / "adapter", "query"), into=open_checkpoint(untied), out=tmp_path / "out")
    merged = open_checkpoint(tmp_path / "out")
    start = merged.infos[HEAD].start + UNSEEN * 2 * WIDTH
    assert (tmp_path / "out" / "model.safetensors").read_bytes()[start : start + 2 * WIDTH] == b"\1" * 2 * WIDTH
    assert inspect(tmp_path / "out", with_digest=True).digest == report.output.digest
    assert inspect(untied, with_digest=True).digest == report.into.digest


def test_one_merge_of_several_that_depends_on_a_tie_fails_alone(untied, tmp_path):
    patches = {tmp_path / f"with-{kind}": write_adapter(tmp_path / kind, kind) for kind in ("query", "rows")}
    done = merge_each(patches, into=open_checkpoint(untied))
    assert [type(result) for result in done.values()] == [MergeReport, PlanRefusedError]


def test_a_merge_in_place_that_depends_on_a_tie_writes_nothing_where_head_and_embedding_differ(untied, tmp_path):
    before = contents(untied)
    with pytest.raises(PlanRefusedError, match=REFUSED):
        merge_in_place(write_adapter(tmp_path / "adapter", "rows"), untied)
    assert contents(untied) == before


def test_the_digest_of_what_a_merge_in_place_began_with_is_that_of_its_old_bytes(tmp_path):
    base = write_model(tmp_path / "base", head_dtype="F32")
    expected = inspect(base, with_digest=True).digest
    patch = write_adapter(tmp_path / "adapter", "rows")
    assert merge_in_place(patch, base).into.digest == expected


def test_a_port_of_rows_of_a_tied_embedding_is_refused_where_the_head_differs(fine, untied, tmp_path):
    patch = write_adapter(tmp_path / "adapter", "rows")
    port(patch, base=open_checkpoint(fine), evolved=open_checkpoint(fine), out=tmp_path / "good")
    for base, evolved in ((fine, untied), (untied, fine)):
        with pytest.raises(PlanRefusedError, match=REFUSED):
            port(patch, base=open_checkpoint(base), evolved=open_checkpoint(evolved), out=tmp_path / "bad")
    assert not (tmp_path / "bad").exists()


def test_a_capture_from_two_models_is_refused_where_a_head_differs_from_its_embedding(fine, untied, tmp_path):
    tuned = write_model(tmp_path / "tuned", query=2)
    capture_tuned(open_checkpoint(fine), open_checkpoint(tuned), out=tmp_path / "good", rank=1)
    with pytest.raises(PlanRefusedError, match=REFUSED):
        capture_tuned(open_checkpoint(untied), open_checkpoint(tuned), out=tmp_path / "bad", rank=1)
    assert not (tmp_path / "bad").exists()


def test_a_tie_that_the_configuration_takes_back_is_none(untied, tmp_path):
    config = json.loads((untied / "config.json").read_text())
    (untied / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    patch = write_adapter(tmp_path / "adapter", "head", copy_row=UNSEEN)
    merge(patch, into=open_checkpoint(untied), out=tmp_path / "out")


RUNS = {
    "capture": lambda patch, base, out: capture_adapter(patch, base=base, out=out),
    "port": lambda patch, base, out: port(patch, base=base, evolved=base, out=out),
    "merge": lambda patch, base, out: merge(patch, into=base, out=out),
}


@pytest.mark.parametrize("run", RUNS)
def test_a_copy_of_the_bases_weight_that_differs_where_no_sample_lies_is_refused(run, fine, tmp_path):
    patch = write_adapter(tmp_path / "adapter", "head", copy_row=UNSEEN)
    base = open_checkpoint(fine)
    assert plan_capture(patch, base=base).refusals == ()
    with pytest.raises(PlanRefusedError, match="lm_head: the adapter contains a copy of its base's weight"):
        RUNS[run](patch, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_check_of_every_weight_is_refused_where_a_head_differs_from_its_embedding(fine, untied):
    models = {"base": open_checkpoint(fine), "evolved": open_checkpoint(untied)}
    check_weights(**models)
    with pytest.raises(PlanRefusedError, match=REFUSED):
        check_weights(**models, full=True)
