"""vLLM: its server is started on this machine alone, with the patch as one of its LoRA modules."""

import contextlib
import json
import socket
import time
from collections.abc import Iterator, Mapping

import httpx2

from portllm.errors import RuntimeFailedError
from portllm.proving.runtimes.contract import Model, Running, Served
from portllm.proving.runtimes.program import started_process
from portllm.proving.runtimes.server import Server
from portllm.serving.runtime import runtimes

START_SECONDS = 1200.0
"""How long it may take to load a model; on two slow cores a small one takes a minute."""

POLL_SECONDS = 0.5


@contextlib.contextmanager
def started_vllm(served: Served) -> Iterator[Running]:
    """The server with base and patch; it and its workers are gone after the block.

    Raises:
        RuntimeFailedError: It ends before it answers.
    """
    port = _free_port()
    command = [str(served.python), "-m", "vllm.entrypoints.openai.api_server", "--host", "127.0.0.1"]
    command += ["--port", str(port), "--model", str(served.base), "--served-model-name", "base", "--enforce-eager"]
    command += ["--dtype", "float32", "--max-model-len", str(served.max_tokens), "--max-num-seqs", "4"]
    command += ["--enable-lora", "--max-lora-rank", str(_room(served)), "--lora-modules", f"patch={served.patch}"]
    url = f"http://127.0.0.1:{port}"
    names: Mapping[Model, str] = {"base": "base", "patch": "patch"}
    with started_process(command, environment={"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}) as process:
        deadline = time.monotonic() + START_SECONDS
        version = ""
        while not version:
            if process.popen.poll() is not None:
                raise process.ended("vllm")
            if time.monotonic() > deadline:
                raise RuntimeFailedError(f"vllm: did not answer within {START_SECONDS:.0f} s.{process.last_lines()}")
            with contextlib.suppress(httpx2.HTTPError):
                if httpx2.get(f"{url}/health", trust_env=False).status_code == httpx2.codes.OK:
                    version = httpx2.get(f"{url}/version", trust_env=False).json()["version"]
                    break
            time.sleep(POLL_SECONDS)
        endpoint = Server(f"{url}/v1", names=names, ids_by_text=served.ids_by_text, version=version, name="vllm")
        with contextlib.closing(endpoint):
            yield endpoint


def _room(served: Served) -> int:
    """The smallest rank that it makes room for and that the patch fits in."""
    with contextlib.suppress(OSError, ValueError, TypeError, AttributeError):
        config = json.loads((served.patch / "adapter_config.json").read_bytes())
        rank = max(int(config["r"]), *map(int, (config.get("rank_pattern") or {"": 0}).values()))
        return runtimes()["vllm"].rank_for(rank) or rank
    return runtimes()["vllm"].ranks[0]


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
    return port
