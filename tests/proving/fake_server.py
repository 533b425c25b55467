"""A server on this machine with OpenAI's completions API, whose patch can be served wrongly on purpose."""

import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch
from transformers import AutoTokenizer

from tests.models import load_tuned

FORMS = ("ids", "texts", "content")
"""How servers give log-probabilities: by ids as vLLM can, by texts as OpenAI's old form, as a list like llama.cpp."""


class FakeRuntime:
    """What a runtime makes of a base and of an adapter folder; `spoil` changes the adapter's model in memory."""

    def __init__(self, base, adapter, *, spoil=None, noise=0.0):
        self.tokenizer = AutoTokenizer.from_pretrained(base)
        self.model = load_tuned(base, adapter, dtype=torch.float32)
        if spoil is not None:
            with torch.no_grad():
                spoil(self.model)
        self.noise, self.generator = noise, torch.Generator().manual_seed(0)

    def log_probs(self, model, prompt):
        """Log-probabilities of all tokens, and the ids of the prompt."""
        ids = self.tokenizer(prompt, return_tensors="pt").input_ids
        off = self.model.disable_adapter() if model == "base" else contextlib.nullcontext()
        with torch.no_grad(), off:
            logits = self.model(ids).logits[0, -1].double()
        logits += self.noise * torch.randn(logits.shape, generator=self.generator)
        return logits.log_softmax(dim=-1), ids


class FakeServer:
    """Serves a `FakeRuntime` until the block ends; `url` is its address.

    Args:
        runtime: What answers.
        form: One of `FORMS`, or None for no log-probabilities.
        most: More of them are refused with status 400.
        status: Of every answer.
    """

    def __init__(self, runtime, *, form="ids", most=20, status=200):
        self.runtime, self.form, self.most, self.status = runtime, form, most, status
        self.asked = []

    def __enter__(self):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # head and body go out as one, or each answer waits for the receipt of its head

            def do_GET(self):
                self.reply(200, {"data": [{"id": "base"}, {"id": "patch"}]})

            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                fake.asked.append((self.headers["Authorization"], request))
                if fake.status != 200:
                    self.reply(fake.status, {"error": "out of order"})
                elif request["model"] not in ("base", "patch"):
                    self.reply(404, {"error": "no such model"})
                elif request["logprobs"] > fake.most:
                    self.reply(400, {"error": f"at most {fake.most} log-probabilities"})
                else:
                    self.reply(200, fake.answer(request))

            def reply(self, status, value):
                body = json.dumps(value).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def answer(self, request):
        values, ids = self.runtime.log_probs(request["model"], request["prompt"])
        best = values.topk(request["logprobs"])
        pairs = list(zip(best.indices.tolist(), best.values.tolist(), strict=True))
        decode = self.runtime.tokenizer.decode
        said = {
            "ids": {"top_logprobs": [{f"token_id:{token}": value for token, value in pairs}]},
            "texts": {"top_logprobs": [{decode([token]): value for token, value in pairs}]},
            "content": {
                "content": [
                    {"top_logprobs": [{"id": token, "token": decode([token]), "logprob": v} for token, v in pairs]}
                ]
            },
            None: None,
        }[self.form]
        choice = {"text": decode([pairs[0][0]]), "logprobs": said}
        return {"choices": [choice], "usage": {"prompt_tokens": ids.shape[1]}}
