"""verify and sign as a user calls them: what they print, their exit status, and which options go together."""

import json

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


@pytest.fixture
def patch(tiny, tmp_path, portllm):
    """A captured patch of the tiny base."""
    result = portllm("capture", "--adapter", tiny("adapter"), "--base", tiny("base"), "-o", tmp_path / "patch")
    assert result.status == 0, result.err
    return tmp_path / "patch"


@pytest.fixture
def keys(tmp_path):
    """The files of a private key with a password, of the password, and of the public half."""
    key = ec.generate_private_key(ec.SECP256R1())
    hide = serialization.BestAvailableEncryption(b"open sesame")
    private, public, password = tmp_path / "key.pem", tmp_path / "key.pub", tmp_path / "password"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, hide))
    public.write_bytes(
        key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    )
    password.write_text("open sesame\n")
    return private, password, public


def test_a_whole_patch_is_told_line_by_line(portllm, tiny, patch):
    result = portllm("verify", patch, "--base", tiny("base"))
    assert result.status == 0, result.err
    lines = result.out.splitlines()
    assert lines[0] == f"verified: patch {patch}"
    assert all(line.startswith("  ok  ") for line in lines[1:-1])
    assert lines[-1] == "  note: not covered by the record: README.md"


def test_a_damaged_patch_is_named_and_the_status_is_three(portllm, patch):
    file = patch / "adapter_config.json"
    file.write_bytes(file.read_bytes().replace(b'"r": 4', b'"r": 5'))
    result = portllm("verify", patch)
    assert (result.status, result.err) == (3, "")
    assert "NO  adapter_config.json        its bytes differ from those that were written" in result.out
    assert result.out.startswith("not verified (adapter_config.json, adapter): patch ")
    told = json.loads(portllm("verify", patch, "--json").out)
    assert told["verified"] is False
    assert [check["subject"] for check in told["checks"] if not check["holds"]] == ["adapter_config.json", "adapter"]


def test_another_base_gives_status_three(portllm, tiny, patch):
    assert portllm("verify", patch, "--base", tiny("evolved")).status == 3


def test_what_cannot_be_read_gives_status_one(portllm, tiny, patch, tmp_path):
    (patch / "patch.json").write_text("{")
    for place in (patch, tiny("adapter"), tmp_path / "nothing"):
        result = portllm("verify", place)
        assert (result.status, result.out) == (1, "")
        assert result.err.startswith("portllm: '")


def test_a_merged_model_is_verified(portllm, tiny, patch, tmp_path):
    assert portllm("merge", patch, "--into", tiny("base"), "-o", tmp_path / "merged").status == 0
    result = portllm("verify", tmp_path / "merged", "--base", tiny("base"))
    assert result.status == 0, result.out
    assert result.out.startswith("verified: checkpoint ")


def test_a_patch_is_signed_and_its_signature_checked(portllm, patch, keys):
    private, password, public = keys
    signed = portllm("sign", patch, "--key", private, "--password-file", password)
    assert signed.status == 0, signed.err
    assert str(patch / "model.sig") in signed.out
    result = portllm("verify", patch, "--public-key", public)
    assert result.status == 0, result.out
    assert f"by the key of {public}, over every file" in result.out
    again = portllm("sign", patch, "--key", private, "--password-file", password, "--overwrite", "--json")
    assert json.loads(again.out) == {"path": str(patch), "signature": str(patch / "model.sig")}
    (patch / "README.md").write_text("new")
    assert portllm("verify", patch, "--public-key", public).status == 3
    assert portllm("verify", patch).status == 0


@pytest.mark.parametrize(
    "options",
    [
        ("sign",),
        ("sign", "--key", "k", "--sigstore"),
        ("sign", "--sigstore", "--password-file", "p"),
        ("sign", "--sigstore", "--certificate", "c"),
        ("sign", "--key", "k", "--identity-token", "t"),
        ("sign", "--key", "k", "--certificate-chain", "c"),
        ("sign", "--key", "k", "--certificate", "c", "--password-file", "p"),
        ("verify", "--public-key", "k", "--certificate-chain", "c"),
        ("verify", "--identity", "me"),
        ("verify", "--identity-provider", "them"),
        ("verify", "--public-key", "k", "--staging"),
        ("verify", "--signature", "s"),
    ],
    ids=" ".join,
)
def test_options_that_do_not_go_together_are_wrong_usage(options, portllm, patch):
    command, *rest = options
    assert portllm(command, patch, *rest).status == 2


def test_a_password_file_that_is_not_there_is_told(portllm, patch, keys, tmp_path):
    result = portllm("sign", patch, "--key", keys[0], "--password-file", tmp_path / "none")
    assert result.status == 1
    assert "none': cannot be read" in result.err
