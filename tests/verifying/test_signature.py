"""Signatures with throwaway keys and certificates: who signed what, and everything that is not signed after all."""

import base64
import datetime
import json
import os
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.x509.oid import NameOID

from portllm.errors import MissingExtraError, OutputError, OutputExistsError, SignatureError
from portllm.patch.adapter_folder import load_patch
from portllm.verifying import signature as border
from portllm.verifying.sign import sign
from portllm.verifying.signature import CertificateSigner, Identity, KeySigner, PublicKey, Roots, SigstoreSigner
from portllm.verifying.verify import verify
from tests.safetensors_files import contents

PEM = serialization.Encoding.PEM


def write_private(file, key, *, password=None):
    hide = serialization.BestAvailableEncryption(password.encode()) if password else serialization.NoEncryption()
    file.write_bytes(key.private_bytes(PEM, serialization.PrivateFormat.PKCS8, hide))
    return file


def write_public(file, key):
    file.write_bytes(key.public_key().public_bytes(PEM, serialization.PublicFormat.SubjectPublicKeyInfo))
    return file


def make_certificate(name, key, *, issuer=None, issuer_key=None, for_signing=True):
    """A certificate of `key`, by itself or by another."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
        .add_extension(
            x509.KeyUsage(for_signing, *[False] * 4, *[issuer is None] * 2, *[False] * 2), critical=True
        )
    )  # fmt: skip
    return builder.sign(issuer_key or key, hashes.SHA256())


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    """Files of a key, of another one, and of a certificate under a root."""
    folder = tmp_path_factory.mktemp("keys")
    for name in ("mine", "other"):
        key = ec.generate_private_key(ec.SECP256R1())
        write_private(folder / f"{name}.key", key)
        write_public(folder / f"{name}.pub", key)
    write_private(folder / "hidden.key", hidden := ec.generate_private_key(ec.SECP384R1()), password="open sesame")
    write_public(folder / "hidden.pub", hidden)
    write_private(folder / "rsa.key", large := rsa.generate_private_key(65537, 2048))
    write_public(folder / "rsa.pub", large)
    for name in ("root", "other-root"):
        root_key = ec.generate_private_key(ec.SECP256R1())
        root = make_certificate(name, root_key)
        (folder / f"{name}.pem").write_bytes(root.public_bytes(PEM))
        leaf_key = ec.generate_private_key(ec.SECP256R1())
        write_private(folder / f"under-{name}.key", leaf_key)
        leaf = make_certificate(f"under {name}", leaf_key, issuer=root, issuer_key=root_key)
        (folder / f"under-{name}.pem").write_bytes(leaf.public_bytes(PEM))
    return folder


def wrong(verification):
    return [check.subject for check in verification.checks if not check.holds]


def statement_of(signature):
    return json.loads(base64.b64decode(json.loads(signature.read_text())["dsseEnvelope"]["payload"]))


# ---- what holds


@pytest.mark.parametrize("name", ["patch", "merged"])
def test_what_one_key_signed_is_verified_with_its_public_half_and_no_other(name, copy, keys):
    folder = copy(name)
    assert sign(folder, KeySigner(keys / "mine.key")) == folder / "model.sig"
    found = verify(folder, trust=PublicKey(keys / "mine.pub"))
    assert (found.verified, found.notes) == (True, ())
    assert wrong(verify(folder, trust=PublicKey(keys / "other.pub"))) == ["signature"]


def test_the_signed_statement_covers_every_file_and_so_the_base_and_the_ports(copy, keys):
    folder = copy()
    statement = statement_of(sign(folder, KeySigner(keys / "mine.key")))
    assert sorted(resource["name"] for resource in statement["predicate"]["resources"]) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "patch.json",
    ]  # fmt: skip
    record = load_patch(folder).record
    assert record.ports[0].target.fingerprint == record.base.fingerprint


def test_a_signature_stays_with_a_folder_that_moves(copy, keys, tmp_path):
    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"))
    assert verify(folder.rename(tmp_path / "moved"), trust=PublicKey(keys / "mine.pub")).verified


def test_a_signature_may_lie_elsewhere(copy, keys, tmp_path):
    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"), signature=tmp_path / "its.sig")
    assert not (folder / "model.sig").exists()
    assert verify(folder, trust=PublicKey(keys / "mine.pub"), signature=tmp_path / "its.sig").verified
    assert wrong(verify(folder, trust=PublicKey(keys / "mine.pub"))) == ["signature"]


def test_a_key_with_a_password_signs(copy, keys):
    folder = copy()
    sign(folder, KeySigner(keys / "hidden.key", "open sesame"))
    assert verify(folder, trust=PublicKey(keys / "hidden.pub")).verified


def test_a_certificate_is_verified_against_its_root_and_no_other(copy, keys):
    folder = copy()
    sign(folder, CertificateSigner(keys / "under-root.key", keys / "under-root.pem"))
    assert verify(folder, trust=Roots((keys / "root.pem",))).verified
    assert verify(folder, trust=Roots((keys / "other-root.pem", keys / "root.pem"))).verified
    assert wrong(verify(folder, trust=Roots((keys / "other-root.pem",)))) == ["signature"]
    with pytest.raises(ValueError, match="at least one"):
        Roots(())


def sign_by_the_librarys_program(folder, *options):
    """What `python -m model_signing sign key` does with a folder."""
    from model_signing._cli import main

    words = ["sign", "key", folder, "--signature", folder / "model.sig", *options]
    main([str(word) for word in words], standalone_mode=False)


def test_a_signature_of_the_librarys_own_program_is_accepted(copy, keys):
    folder = copy()
    sign_by_the_librarys_program(folder, "--private_key", keys / "mine.key")
    assert verify(folder, trust=PublicKey(keys / "mine.pub")).verified


# ---- what does not


def test_every_change_of_a_signed_file_even_with_a_new_seal_is_caught(copy, keys):
    from portllm.files.seal import render_sealed

    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"))
    values = json.loads((folder / "patch.json").read_text())
    values["base"]["name"] = "another"
    (folder / "patch.json").write_text(render_sealed(values))
    assert verify(folder).verified
    assert wrong(verify(folder, trust=PublicKey(keys / "mine.pub"))) == ["signature"]


def test_files_added_and_taken_away_are_caught(copy, keys):
    folder = copy("merged")
    sign(folder, KeySigner(keys / "mine.key"))
    (folder / "README.md").write_text("new")
    found = verify(folder, trust=PublicKey(keys / "mine.pub"))
    assert wrong(found) == ["signature"]
    assert "README.md" in found.checks[-1].finding


LATER = (
    ".git/hooks/post-checkout", ".github/workflows/x.yml", ".gitignore", ".gitattributes", ".hidden", "deep/er/file",
    "model.sig.bak", ".git/model.sig",
)  # fmt: skip


@pytest.mark.parametrize("name", LATER)
def test_a_file_that_came_later_is_named_whatever_its_name(name, copy, keys):
    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"))
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("came later")
    found = verify(folder, trust=PublicKey(keys / "mine.pub"))
    assert wrong(found) == ["signature"]
    assert name in found.checks[-1].finding


def test_what_git_left_in_a_folder_is_signed_with_the_rest(copy, keys):
    folder = copy()
    (folder / ".git").mkdir()
    for name in (".git/config", ".gitattributes"):
        (folder / name).write_text("as it was")
    sign(folder, KeySigner(keys / "mine.key"))
    assert verify(folder, trust=PublicKey(keys / "mine.pub")).verified
    (folder / ".git/config").write_text("as it is")
    assert wrong(verify(folder, trust=PublicKey(keys / "mine.pub"))) == ["signature"]


def test_a_signature_that_passes_over_gits_files_holds_where_there_are_none(copy, keys):
    """As the library makes them by default, and as `portllm sign` did."""
    import model_signing

    folder = copy()
    hashing = model_signing.hashing.Config().set_ignored_paths(paths=["model.sig"])
    config = model_signing.signing.Config().use_elliptic_key_signer(private_key=keys / "mine.key")
    config.set_hashing_config(hashing).sign(folder, folder / "model.sig")
    assert verify(folder, trust=PublicKey(keys / "mine.pub")).verified
    (folder / ".gitignore").write_text("*")
    found = verify(folder, trust=PublicKey(keys / "mine.pub"))
    assert "does not cover '.gitignore'" in found.checks[-1].finding


def test_a_folder_of_which_a_part_was_not_read_is_not_signed(copy, keys, monkeypatch):
    import model_signing

    folder = copy()
    passed_over = [".git", ".github", ".gitattributes", ".gitignore"]
    (folder / ".gitignore").write_text("*")
    monkeypatch.setattr(
        model_signing.hashing.Config,
        "set_ignored_paths",
        lambda self, *, paths, ignore_git_paths: self.use_file_serialization(ignore_paths=[*paths, *passed_over]),
    )
    with pytest.raises(SignatureError, match=r"\.gitignore': could not be read"):
        sign(folder, KeySigner(keys / "mine.key"))
    assert not (folder / "model.sig").exists()


def test_a_statement_that_leaves_out_the_record_is_no_signature(copy, keys):
    """Another program may sign a folder and ignore files of it; such a signature says nothing about them."""
    folder = copy()
    sign_by_the_librarys_program(folder, "--ignore-paths", folder / "patch.json", "--private_key", keys / "mine.key")
    found = verify(folder, trust=PublicKey(keys / "mine.pub"))
    assert wrong(found) == ["signature"]
    assert "does not cover 'patch.json'" in found.checks[-1].finding


def test_a_patch_without_a_signature_is_not_signed(copy, keys):
    found = verify(copy(), trust=PublicKey(keys / "mine.pub"))
    assert wrong(found) == ["signature"]
    assert "there is no" in found.checks[-1].finding


def test_damaged_signatures_hold_nothing(copy, keys):
    folder = copy()
    file = sign(folder, KeySigner(keys / "mine.key"))
    whole = file.read_bytes()
    for place in range(0, len(whole), 97):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
        found = verify(folder, trust=PublicKey(keys / "mine.pub"))
        # A byte of what nobody reads may change; then the statement is the same, and it is still signed.
        assert wrong(found) == ["signature"] or statement_of(file) is not None
    for damage in (b"", b"{}", b"[]", b"\xff", b'{"dsseEnvelope": 1}', whole[:-10]):
        file.write_bytes(damage)
        assert wrong(verify(folder, trust=PublicKey(keys / "mine.pub"))) == ["signature"]


def test_a_signature_too_large_to_be_one_is_not_read(copy, keys):
    folder = copy()
    with open(sign(folder, KeySigner(keys / "mine.key")), "ab") as stream:
        stream.truncate(10**12)
    found = verify(folder, trust=PublicKey(keys / "mine.pub"))
    assert "the limit for a signature" in next(check for check in found.checks if check.subject == "signature").finding


def test_a_signature_nobody_asked_about_is_noted(copy, keys):
    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"))
    found = verify(folder)
    assert found.verified
    assert "model.sig was not checked: name the expected signer, for example with --public-key FILE" in found.notes


# ---- what is not signed, and what cannot be checked


def test_what_does_not_verify_is_not_signed(copy, keys):
    folder = copy()
    (folder / "adapter_config.json").write_bytes(b"{}")
    with pytest.raises(SignatureError, match=r"does not verify, so it was not signed: adapter_config\.json"):
        sign(folder, KeySigner(keys / "mine.key"))
    assert not (folder / "model.sig").exists()


def test_what_is_no_signature_is_not_replaced_by_one(copy, keys):
    folder = copy()
    before = contents(folder)
    with pytest.raises(OutputExistsError, match="is not a signature"):
        sign(folder, KeySigner(keys / "mine.key"), signature=folder / "patch.json", overwrite=True)
    assert contents(folder) == before


def test_a_signature_is_not_written_through_a_link(copy, keys, tmp_path):
    folder, beside = copy(), tmp_path / "beside"
    beside.mkdir()
    (tmp_path / "mine").write_text("mine")
    for name in ("model.sig", ".model.sig.part"):
        (beside / name).symlink_to(tmp_path / "mine")
    with pytest.raises(OutputError, match="is a link"):
        sign(folder, KeySigner(keys / "mine.key"), signature=beside / "model.sig", overwrite=True)
    (beside / ".model.sig.part").unlink()
    sign(folder, KeySigner(keys / "mine.key"), signature=beside / "model.sig", overwrite=True)
    assert verify(folder, trust=PublicKey(keys / "mine.pub"), signature=beside / "model.sig").verified
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_signature_that_exists_is_replaced_only_when_told(copy, keys):
    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"))
    with pytest.raises(OutputExistsError):
        sign(folder, KeySigner(keys / "other.key"))
    assert verify(folder, trust=PublicKey(keys / "mine.pub")).verified
    sign(folder, KeySigner(keys / "other.key"), overwrite=True)
    assert verify(folder, trust=PublicKey(keys / "other.pub")).verified
    assert sorted(os.listdir(folder)) == [
        "README.md", "adapter_config.json", "adapter_model.safetensors", "model.sig", "patch.json",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "signer",
    [
        lambda keys: KeySigner(keys / "nothing.key"),
        lambda keys: KeySigner(keys / "mine.pub"),
        lambda keys: KeySigner(keys / "rsa.key"),
        lambda keys: KeySigner(keys / "hidden.key"),
        lambda keys: KeySigner(keys / "hidden.key", "wrong"),
        lambda keys: CertificateSigner(keys / "mine.key", keys / "under-root.pem"),
        lambda keys: CertificateSigner(keys / "under-root.key", keys / "mine.pub"),
    ],
    ids=["no file", "public half", "RSA", "no password", "wrong password", "another's certificate", "no certificate"],
)
def test_a_key_that_cannot_sign_is_an_error_and_leaves_nothing(signer, copy, keys):
    folder = copy()
    before = sorted(os.listdir(folder))
    with pytest.raises(SignatureError, match="could not be signed|no such file"):
        sign(folder, signer(keys))
    assert sorted(os.listdir(folder)) == before


def test_a_key_of_another_kind_is_called_what_it_is_with_the_line_that_makes_one_that_signs(copy, keys):
    from cryptography.hazmat.primitives.asymmetric import ed25519

    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"))
    made = {
        "RSA": rsa.generate_private_key(65537, 2048),
        "Ed25519": ed25519.Ed25519PrivateKey.generate(),
        "secp256k1": ec.generate_private_key(ec.SECP256K1()),
    }
    for kind, key in made.items():
        write_private(folder.parent / f"{kind}.key", key, password="secret")
        write_public(folder.parent / f"{kind}.pub", key)
        told = f"key of kind {kind}, and signatures are made with P-256, P-384, P-521. To make one: openssl"
        with pytest.raises(SignatureError, match=told):
            sign(folder, KeySigner(folder.parent / f"{kind}.key", "secret"), overwrite=True)
        with pytest.raises(SignatureError, match=told):
            verify(folder, trust=PublicKey(folder.parent / f"{kind}.pub"))


@pytest.mark.parametrize("trust", [PublicKey, lambda file: Roots((file,))])
@pytest.mark.parametrize("name", ["nothing.pub", "mine.key", "rsa.pub"])
def test_a_key_that_cannot_be_read_is_an_error_and_no_verdict(trust, name, copy, keys):
    folder = copy()
    sign(folder, KeySigner(keys / "mine.key"))
    with pytest.raises(SignatureError, match="cannot be checked against|no such file"):
        verify(folder, trust=trust(keys / name))


def test_sigstore_is_asked_for_the_identity_that_is_named(copy, keys, monkeypatch):
    """What is passed on; Sigstore itself needs the network."""
    import model_signing

    asked = []

    def note(self, **options):
        asked.append(options)
        raise ConnectionError("no route to the host")

    monkeypatch.setattr(model_signing.signing.Config, "use_sigstore_signer", note)
    monkeypatch.setattr(model_signing.verifying.Config, "use_sigstore_verifier", note)
    folder = copy()
    with pytest.raises(SignatureError, match="Sigstore needs the network"):
        sign(folder, SigstoreSigner("token", staging=True))
    with pytest.raises(SignatureError, match="Sigstore needs the network"):
        verify(folder, trust=Identity("me@example.org", "https://accounts.example.org"))
    assert asked == [
        {"identity_token": "token", "use_ambient_credentials": False, "use_staging": True},
        {"identity": "me@example.org", "oidc_issuer": "https://accounts.example.org", "use_staging": False},
    ]


def test_without_the_extra_the_way_to_it_is_told(copy, keys, monkeypatch):
    monkeypatch.setitem(sys.modules, "model_signing", None)
    folder = copy()
    for call in (
        lambda: sign(folder, KeySigner(keys / "mine.key")),
        lambda: verify(folder, trust=PublicKey(keys / "mine.pub")),
    ):
        with pytest.raises(MissingExtraError, match="pip install .*'model-signing>="):
            call()
    assert verify(folder).verified
    assert border.SIGNATURE_FILE == "model.sig"
