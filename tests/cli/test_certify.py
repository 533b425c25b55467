"""certify as a user calls it: what it prints, its exit status, what goes together, and verify after it."""

import json
import re
import shutil
from pathlib import Path

import pytest

from portllm.certifying.bounds import upper_bound
from portllm.show.numbers import upper_percent
from tests.certifying.certified import CHOICES, make_story, write_questions


@pytest.fixture(scope="module")
def story(tmp_path_factory):
    return make_story(tmp_path_factory.mktemp("story"))


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    return write_questions(tmp_path_factory.mktemp("questions") / "unlabeled.jsonl")


@pytest.fixture
def certify(portllm, story, questions, tmp_path):
    """`certify("--bound", "0.5")` calls the command for the story's port."""

    def call(*options, ported=("--evolved", "--ported")):
        given = [part for name in ported for part in (name, getattr(story, name.removeprefix("--")))]
        return portllm(
            "certify", "--base", story.base, "--patch", story.patch, *given, "--data", questions, "--device", "cpu",
            "--choices", ",".join(CHOICES), "-o", tmp_path / "certificate", *options,
        )  # fmt: skip

    return call


def test_the_bound_is_told_with_what_it_holds_for(certify, tmp_path):
    result = certify("--bound", "0.9")
    assert result.status == 0, result.err
    told = json.loads((tmp_path / "certificate" / "certificate.json").read_text())
    assert told["bound"] == upper_bound(told["k"], 30)
    assert f"{told['k']} of 30 (rows {told['differing'][0]}," in result.out
    assert "score(ported) >= score(old specialist) - " in result.out
    assert "if the inputs are independent draws" in result.out
    assert "your limit of 90 points" in result.out.splitlines()[0]


def test_a_bound_that_is_not_met_gives_status_three(certify, tmp_path):
    result = certify("--bound", "0.1", "--json")
    assert result.status == 3
    assert json.loads(result.out)["wanted"] == 0.1
    assert json.loads(result.out)["bound"] > 0.1
    assert (tmp_path / "certificate" / "certificate.json").is_file()


def test_a_limit_in_points_is_the_bound(certify, tmp_path):
    assert certify("--max-loss", "10").status == 3
    assert json.loads((tmp_path / "certificate" / "certificate.json").read_text())["wanted"] == 0.1
    assert certify("--max-loss", "10", "--bound", "0.1").status == 2


def test_free_text_says_that_no_bound_follows(certify):
    result = certify("--answers", "free", "--max-new-tokens", "4")
    assert result.status == 0, result.err
    assert result.out.startswith("Gives no bound on the loss")
    assert ">=" not in result.out


def test_a_dry_run_loads_no_model_and_writes_nothing(certify, tmp_path):
    result = certify("--dry-run")
    assert result.status == 0, result.err
    assert (
        "would ask base + patch and evolved + ported 30 questions; the first:\nwhat causes measles? Kind:" in result.out
    )
    assert "the bound would be 9.51 % if every answer is the same" in result.out
    assert not (tmp_path / "certificate").exists()


def test_a_plan_needs_no_model(portllm):
    result = portllm("certify", "--plan", "--bound", "0.02", "--expected-disagreement", "0.005")
    assert result.status == 0, result.err
    assert result.out.startswith(
        "456 inputs are needed to rule out a loss of more than 2.00 % with 95.0 % confidence; at most 4"
    )
    told = json.loads(portllm("certify", "--plan", "--bound", "0.02", "--json").out)
    assert (told["n_inputs"], told["n_allowed"]) == (149, 0)


def test_the_page_has_the_answers_that_differ(certify, tmp_path):
    result = certify("--html", tmp_path / "page.html", "--json")
    assert result.status == 0, result.err
    told, page = json.loads(result.out), (tmp_path / "page.html").read_text()
    assert f"{told['k']} of 30; at most {upper_percent(told['bound'])}" in page
    assert f">Row {told['differing'][0]}<" in page


def test_a_page_that_is_there_is_refused_before_a_model_is_loaded(certify, tmp_path):
    (tmp_path / "page.html").write_text("old")
    result = certify("--html", tmp_path / "page.html")
    assert (result.status, (tmp_path / "certificate").exists()) == (1, False)
    assert "page.html': already exists" in result.err


@pytest.mark.parametrize(
    "options",
    [
        ("--plan",),
        ("--plan", "--bound", "0.02", "--html", "page.html"),
        ("--plan", "--bound", "2"),
        ("--plan", "--bound", "0.02", "--expected-disagreement", "0.02"),
        ("--base", "b", "--patch", "p", "--data", "d"),
        ("--base", "b", "--patch", "p", "--data", "d", "-o", "o"),
        ("--base", "b", "--patch", "p", "--data", "d", "-o", "o", "--evolved", "e"),
        ("--base", "b", "--patch", "p", "--data", "d", "-o", "o", "--evolved", "e", "--ported", "q", "--merged", "m"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(portllm, options):
    assert portllm("certify", *options).status == 2


def test_the_table_of_the_page_shows_the_bounds_that_the_program_shows():
    page = (Path(__file__).parents[2] / "docs" / "certify.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| (\d+) \| (.*) \|$", page, flags=re.MULTILINE)
    expected = [(str(n), [upper_percent(upper_bound(k, n)) for k in (0, 1, 3, 10)]) for n in (100, 300, 1000)]
    assert [(n, cells.split(" | ")) for n, cells in shown] == expected


# ---- verify


@pytest.fixture
def certified(certify, tmp_path):
    assert certify().status == 0
    return tmp_path / "certificate"


def everything(story, questions):
    return (
        "--base", story.base, "--evolved", story.evolved, "--patch", story.patch, "--ported", story.ported, "--data",
        questions,
    )  # fmt: skip


def test_a_certificate_verifies_alone_and_says_what_was_not_compared(portllm, certified):
    result = portllm("verify", certified)
    assert result.status == 0, result.err
    assert result.out.splitlines()[0] == f"verified: certificate {certified}"
    assert "the bound follows from" in result.out
    assert "note: not compared, since not given: --base, --patch, --evolved, --ported, --data" in result.out


def test_a_certificate_verifies_against_all_that_it_is_about(portllm, certified, story, questions):
    result = portllm("verify", certified, *everything(story, questions))
    assert result.status == 0, result.out
    assert result.out.count("  ok  ") == 9
    assert "note" not in result.out


@pytest.mark.parametrize(
    ("option", "shown", "subject"),
    [
        ("--base", "evolved", "base"),
        ("--evolved", "base", "evolved"),
        ("--patch", "merged", "patch/adapter_config.json"),
        ("--ported", "patch", "ported/adapter_config.json"),
    ],
)
def test_what_it_is_not_about_is_named(portllm, certified, story, option, shown, subject):
    result = portllm("verify", certified, option, getattr(story, shown))
    assert result.status == 3
    assert f"NO  {subject}" in result.out


def test_other_inputs_are_named(portllm, certified, questions, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text(questions.read_text() + "\n")
    result = portllm("verify", certified, "--data", other)
    assert result.status == 3
    assert "NO  data" in result.out


def test_a_bound_that_was_bettered_by_hand_is_caught_with_and_without_a_new_seal(portllm, certified):
    from portllm.files.seal import render_sealed

    file = certified / "certificate.json"
    values = json.loads(file.read_text())
    bettered = {**values, "bound": values["bound"] / 2}
    file.write_text(json.dumps(bettered, indent=2) + "\n")
    assert portllm("verify", certified).out.startswith("not verified (certificate.json, arithmetic): ")
    file.write_text(render_sealed(bettered))
    assert portllm("verify", certified).out.startswith("not verified (arithmetic): ")


def test_options_of_a_certificate_are_refused_for_a_patch(portllm, story, questions):
    result = portllm("verify", story.patch, "--data", questions)
    assert result.status == 1
    assert "is not a certificate" in result.err


def test_a_certificate_is_signed_like_a_patch(portllm, certified, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    private, public = tmp_path / "key.pem", tmp_path / "key.pub"
    pem, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    private.write_bytes(key.private_bytes(pem, serialization.PrivateFormat.PKCS8, plain))
    public.write_bytes(key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo))
    assert portllm("sign", certified, "--key", private).status == 0
    assert portllm("verify", certified, "--public-key", public).status == 0
    shutil.copy(public, certified / "certificate.json")
    assert portllm("verify", certified, "--public-key", public).status in (1, 3)
