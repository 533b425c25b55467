"""Real runtimes serve exports as PEFT computes them, and what is wrong with an export is caught in each of them.

They run where they are installed (`make runtime-NAME`). With `PORTLLM_RECORD=FILE`, what was measured is written to
that file, from which the table in `docs/how-to/serve.md` is made.
"""

import contextlib
import datetime
import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import pytest

from portllm.checkpoint.builtin import export_builtin, locate
from portllm.errors import NotFoundError, RuntimeFailedError
from portllm.exporting.export import export
from portllm.proving.prompts import PROMPTS
from portllm.proving.prove import prove
from portllm.proving.reference import Reference
from portllm.proving.runtimes.contract import Served
from portllm.proving.runtimes.server import Server
from portllm.proving.runtimes.table import RUNTIMES, python_of
from portllm.proving.runtimes.vllm import started_vllm
from portllm.proving.statistics import places
from portllm.running.encoding import Encoder, encode_prompts
from portllm.running.model import load_tokenizer
from tests.proving.exports import ADAPTERS, make_adapter, rename_tensors, spoiled, wide_gguf

pytestmark = pytest.mark.slow

FAULTS = ("without layer 7", "q_proj not permuted", "scale")
FLOAT32 = 1e-5
"""What rounding in float32 comes to in the log-probabilities of SmolLM2, whichever way it is computed."""

ASKED = PROMPTS[::4]


def where(runtime):
    """The Python that has a runtime, or why there is none; looked up before tests have a cache of their own."""
    try:
        return python_of(runtime)
    except NotFoundError as error:
        return str(error)


PYTHONS = {name: where(runtime) for name, runtime in RUNTIMES.items()}


@pytest.fixture(scope="module", params=RUNTIMES)
def runtime(request):
    """A row of the table whose runtime is installed."""
    if isinstance(PYTHONS[request.param], str):
        pytest.skip(f"{PYTHONS[request.param]}\nor: make runtime-{request.param}")
    return RUNTIMES[request.param]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "smollm2"
    export_builtin("smollm2-135m", folder)
    return folder


@pytest.fixture(scope="module")
def gguf(tmp_path_factory):
    return wide_gguf(locate("smollm2-135m"), tmp_path_factory.mktemp("gguf") / "smollm2.gguf")


@pytest.fixture(scope="module")
def adapters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    return {name: make_adapter(folder / name.replace(" ", "-"), **fields) for name, fields in ADAPTERS.items()}


@pytest.fixture(scope="module")
def record():
    """Writes down proofs, if there is a file to write them to."""
    rows = []
    yield rows.append
    if file := os.environ.get("PORTLLM_RECORD"):
        kept = json.loads(Path(file).read_text()) if Path(file).exists() else []
        new = {(row["runtime"], row["case"]) for row in rows}
        rows += [row for row in kept if (row["runtime"], row["case"]) not in new]
        rows.sort(key=lambda row: (list(RUNTIMES).index(row["runtime"]), row["is_broken"]))
        Path(file).write_text(json.dumps(rows, indent=1) + "\n")


@pytest.fixture
def proven(runtime, base, gguf, record):
    """`proven(patch, case, exported)` proves a patch in the runtime and writes down the result."""

    def run(patch, case, exported=None, *, is_broken=False):
        row = {
            "runtime": runtime.name,
            "profile": runtime.profile,
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "case": case,
            "is_broken": is_broken,
        }
        try:
            proof = prove(
                patch,
                base=base,
                runtime=runtime.name,
                export=exported,
                served_base=gguf if runtime.base == "gguf" else None,
                prompts=ASKED,
                python=PYTHONS[runtime.name],
            )
        except RuntimeFailedError:
            record(row | {"verdict": "refused"})
            raise
        told = {name: float(f"{getattr(proof, name):.3g}") for name in ("noise", "effect", "error", "gain")}
        fault = {} if proof.fault is None else {"fault": proof.fault.name}
        record(row | {"version": proof.version, "verdict": proof.verdict} | told | fault)
        return proof

    return run


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_export_gives_the_log_probabilities_of_peft(proven, adapters, name):
    proof = proven(adapters[name], name)

    assert proof.proven
    assert proof.error <= 2 * max(proof.noise, FLOAT32)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_wrong_export_is_caught_and_named(proven, runtime, base, adapters, tmp_path, fault):
    wrong = spoiled(adapters["plain"], tmp_path / "wrong", fault)
    exported = export(wrong, runtime=runtime.profile, out=tmp_path / "export", base=base)

    proof = proven(adapters["plain"], fault, exported.given, is_broken=True)

    assert proof.verdict == "wrong"
    assert proof.fault.name == fault
    assert proof.fault.is_named


def test_an_export_with_other_names_is_refused_or_has_no_effect(proven, runtime, base, adapters, tmp_path):
    exported = export(adapters["plain"], runtime=runtime.profile, out=tmp_path / "export", base=base)
    rename_tensors(exported.given)

    try:
        proof = proven(adapters["plain"], "renamed", exported.given, is_broken=True)
    except RuntimeFailedError as error:
        said, verdict = str(error), "no effect"
    else:
        said, verdict = proof.fault.name, proof.verdict

    assert verdict == "no effect"
    assert any(named in said for named in ("not loaded", "blocks", "bla."))


def test_llamacpp_serves_a_merged_file_that_is_made_of_safetensors(base, gguf, adapters, tmp_path):
    if isinstance(PYTHONS["llamacpp"], str):
        pytest.skip(f"{PYTHONS['llamacpp']}\nor: make runtime-llamacpp")
    old = locate("smollm2-135m")
    how = {"runtime": "ollama", "base": base, "gguf": old, "dtype": "float32", "out": tmp_path / "out"}
    exported = export(adapters["plain"], **how)

    proof = prove(
        adapters["plain"],
        base=base,
        runtime="llamacpp",
        export=exported.folder,
        served_base=gguf,
        prompts=ASKED,
        python=PYTHONS["llamacpp"],
    )

    assert proof.proven
    assert proof.served == str(exported.given)


def test_vllm_takes_another_patch_while_it_answers_with_the_first(base, adapters, tmp_path, monkeypatch):
    if isinstance(PYTHONS["vllm"], str):
        pytest.skip(f"{PYTHONS['vllm']}\nor: make runtime-vllm")
    monkeypatch.setenv("VLLM_ALLOW_RUNTIME_LORA_UPDATING", "True")
    first, second = (adapters["plain"], adapters["alpha pattern"])
    exported = [export(patch, runtime="vllm", out=tmp_path / patch.name, base=base) for patch in (first, second)]
    served = Served(base=base, patch=exported[0].given, python=PYTHONS["vllm"], max_tokens=64, ids_by_text=dict)

    with started_vllm(served) as running, ThreadPoolExecutor(1) as beside:
        asked = beside.submit(lambda: [running.ask("patch", prompt) for prompt in ASKED * 4])
        loading = {"lora_name": "second", "lora_path": str(exported[1].given)}
        loaded = httpx2.post(f"{running.url}/load_lora_adapter", json=loading, trust_env=False, timeout=60)
        with contextlib.closing(Server(running.url, names={"patch": "second"}, ids_by_text=dict)) as other:
            answers = [other.ask("patch", prompt) for prompt in ASKED]
        meanwhile = asked.result()

    assert loaded.status_code == httpx2.codes.OK
    for patch, answered in ((first, meanwhile), (second, answers)):
        rows, _ = encode_prompts(Encoder(load_tokenizer(base)), ASKED, room=64)
        here = Reference(base, patch, rows).patched()
        seen = places(answered)
        expected = here[seen.rows % len(ASKED), seen.tokens]
        assert abs(seen.served - expected).max() < 100 * FLOAT32
