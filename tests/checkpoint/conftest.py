"""A hub on this machine, and proof that nothing else is reached."""

import socket
import ssl
from functools import cache

import huggingface_hub
import pytest
from huggingface_hub import constants

from portllm.tensors import ranges as remote
from tests.hub import TOKEN, FakeHub


@pytest.fixture
def waits(monkeypatch):
    """The seconds that would have been waited between attempts."""
    waited = []
    monkeypatch.setattr(remote, "pause", waited.append)
    return waited


@cache
def certificates():
    """Those of this machine, read once: each client reads them anew."""
    return ssl.create_default_context()


@pytest.fixture
def hub(monkeypatch, tmp_path, waits):
    """An empty hub that huggingface_hub takes for the real one, with a token, an empty cache and no other way out."""
    connect = socket.socket.connect

    def connect_here(self, address):
        assert address[0] == "127.0.0.1", f"a test reached for {address}"
        return connect(self, address)

    context = certificates()
    monkeypatch.setattr(ssl, "create_default_context", lambda **_: context)
    server = FakeHub()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(socket.socket, "connect", connect_here)
    monkeypatch.setattr(constants, "ENDPOINT", server.address())
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address() + "/{repo_id}/resolve/{revision}/{filename}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("PORTLLM_CACHE", str(tmp_path / "portllm-cache"))
    remote.forget()
    huggingface_hub.close_session()
    yield server
    huggingface_hub.close_session()
    remote.forget()
    server.close()
