"""The file: what is written is read again, and what cannot be is named."""

import json

import pytest
from msgspec.structs import replace

from portllm.certifying.bounds import upper_bound
from portllm.certifying.certificate import (
    ASSUMES,
    AnswerRule,
    Certificate,
    Inputs,
    PatchFiles,
    Side,
    TokenCounts,
    arithmetic_problems,
    count_labels,
    read_certificate,
    write_certificate,
)
from portllm.errors import CertificateError
from portllm.files.record import encode
from portllm.files.seal import render_sealed
from portllm.patch.record import ModelIdentity

FILES = {"adapter_config.json": "a" * 64, "adapter_model.safetensors": "b" * 64}
WHOLE = Certificate(
    program="0.1.0",
    assumes=ASSUMES,
    specialist=Side(ModelIdentity("base", "s4k1:" + "0" * 40, None), PatchFiles("patch", FILES)),
    ported=Side(ModelIdentity("merged", "s4k1:" + "1" * 40, None, quantization="nf4"), None),
    inputs=Inputs(
        digest="blake3:" + "2" * 64, rows=50, prompt="{q}", completion="a", sample=40, seed=7, repeated=1, cut=2
    ),
    answers=AnswerRule(
        kind="choices",
        choices=("yes", "no"),
        choices_from="given",
        one_line=False,
        max_tokens=512,
        max_new_tokens=32,
        batch_size=16,
    ),
    confidence=0.95,
    n=40,
    k=3,
    differing=(3, 9, 50),
    bound=upper_bound(3, 40),
    wanted=0.2,
    labels=count_labels(1, 2, 30, 40, confidence=0.95),
    tokens=None,
    device="cpu",
)
FREE = replace(
    WHOLE,
    answers=replace(WHOLE.answers, kind="free", choices=(), choices_from=None),
    k=None,
    differing=None,
    bound=None,
    wanted=None,
    labels=None,
    tokens=TokenCounts(written=100, same=90, inputs_same=20),
)


@pytest.mark.parametrize(
    "certificate", [WHOLE, FREE, replace(WHOLE, k=0, differing=(), bound=upper_bound(0, 40), labels=None)]
)
def test_what_is_written_is_read_again(certificate, tmp_path):
    write_certificate(tmp_path, certificate)
    assert read_certificate(tmp_path) == certificate
    assert list(arithmetic_problems(certificate)) == []


def test_the_best_bound_decides_and_free_text_decides_nothing():
    assert WHOLE.loss_bound == upper_bound(1, 40) <= 0.2
    assert WHOLE.met is True
    assert replace(WHOLE, labels=None).met is (upper_bound(3, 40) <= 0.2)
    assert replace(WHOLE, wanted=0.01).met is False
    assert (FREE.loss_bound, FREE.met) == (None, None)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"bound": 0.01}, "does not follow from 3 of 40"),
        ({"bound": None}, "does not follow from 3 of 40"),
        ({"confidence": 0.9}, "does not follow from 3 of 40"),
        ({"n": 50}, "does not match the sample"),
        ({"differing": (3, 3, 9)}, "not distinct rows of the file"),
        ({"differing": (9, 3, 50)}, "not distinct rows of the file"),
        ({"differing": (3, 9, 51)}, "not distinct rows of the file"),
        ({"k": 1, "differing": (3,), "bound": upper_bound(1, 40)}, "the flips do not match"),
        ({"labels": replace(WHOLE.labels, bound=0.01)}, "do not follow from the flips"),
        ({"labels": replace(WHOLE.labels, ported_right=32)}, "do not follow from the flips"),
        ({"labels": replace(WHOLE.labels, change_low=0.0)}, "do not follow from the flips"),
        ({"answers": FREE.answers}, "the counts do not match"),
    ],
)
def test_what_does_not_follow_is_named_though_the_seal_fits(wrong, said, tmp_path):
    write_certificate(tmp_path, replace(WHOLE, **wrong))
    with pytest.raises(CertificateError, match=said):
        read_certificate(tmp_path)


@pytest.mark.parametrize(
    "wrong",
    [
        {"bound": 0.1},
        {"labels": WHOLE.labels},
        {"tokens": None},
        {"tokens": TokenCounts(written=5, same=6, inputs_same=0)},
    ],
)
def test_free_text_that_claims_more_is_refused(wrong, tmp_path):
    write_certificate(tmp_path, replace(FREE, **wrong))
    with pytest.raises(CertificateError, match=r"a bound is claimed|more tokens"):
        read_certificate(tmp_path)


def test_a_count_beside_other_rows_is_refused(tmp_path):
    (tmp_path / "certificate.json").write_text(render_sealed({**encode(WHOLE), "k": 0}))
    with pytest.raises(CertificateError, match="k is not the number of rows that differ"):
        read_certificate(tmp_path)


@pytest.mark.parametrize("key", [*encode(WHOLE), "seal"])
def test_no_key_may_be_missing(key, tmp_path):
    write_certificate(tmp_path, WHOLE)
    values = json.loads((tmp_path / "certificate.json").read_text())
    values.pop(key)
    (tmp_path / "certificate.json").write_text(json.dumps(values))
    with pytest.raises(CertificateError):
        read_certificate(tmp_path)


def test_a_number_that_is_written_without_a_point_is_one_and_a_count_with_a_point_is_none(tmp_path):
    certain = replace(WHOLE, k=0, differing=(), bound=1, labels=None)
    write_certificate(tmp_path, certain)
    with pytest.raises(CertificateError, match="the bound does not follow from 0 of 40"):
        read_certificate(tmp_path)
    (tmp_path / "certificate.json").write_text(render_sealed({**encode(WHOLE), "n": 40.0}))
    with pytest.raises(CertificateError, match=r"certificate\.json': n: is 40\.0; expected an integer from 1 to"):
        read_certificate(tmp_path)


def test_a_missing_file_is_an_error_of_ours(tmp_path):
    with pytest.raises(CertificateError, match="cannot be read"):
        read_certificate(tmp_path)
