"""A server with the completions API of OpenAI: it runs already, or was started here."""

import os
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx2

from portllm.errors import RuntimeFailedError
from portllm.proving.runtimes.contract import TOP, Answer, Model

FEW = 5
"""Most log-probabilities that OpenAI's own API allows."""

KEY_VARIABLE = "OPENAI_API_KEY"

REPLY_SECONDS = 300.0
"""How long a server may take for one token; the first one can include compiling."""

_BY_ID = re.compile(r"token_id:(\d+)")


class Server:
    """Asks a server.

    Args:
        url: Of its API, such as `http://localhost:8000/v1`.
        names: What it calls base and patch.
        ids_by_text: The tokens by what they say, for servers that name them by that.
        version: Of the runtime, where it is known.
        name: For messages.
    """

    def __init__(
        self,
        url: str,
        *,
        names: Mapping[Model, str],
        ids_by_text: Callable[[], Mapping[str, int]],
        version: str = "",
        name: str = "",
    ) -> None:
        self.version = version
        self.url = url.rstrip("/")
        self._names, self._ids_by_text, self._name = names, ids_by_text, name or url
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx2.Client(
            timeout=REPLY_SECONDS, headers={"Authorization": f"Bearer {key}"} if key else {}, trust_env=False
        )
        self._extra: dict[str, object] = {"logprobs": TOP, "return_tokens_as_token_ids": True}  # ids: vLLM

    def close(self) -> None:
        """Close its connections."""
        self._client.close()

    def ask(self, model: Model, prompt: str) -> Answer:
        """What comes after a prompt.

        Raises:
            RuntimeFailedError: The server cannot be reached, refuses, or gives no log-probabilities.
        """
        body = {"model": self._names[model], "prompt": prompt, "max_tokens": 1, "temperature": 0}
        response = self._post({**body, **self._extra})
        if response.status_code in (400, 422) and self._extra["logprobs"] != FEW:
            self._extra = {"logprobs": FEW}  # what every server takes that has the API
            response = self._post({**body, **self._extra})
        if response.status_code != httpx2.codes.OK:
            raise self._refused(response, self._names[model])
        try:
            said = response.json()
            tokens = list(_tokens(said["choices"][0]["logprobs"]))
        except (ValueError, KeyError, IndexError, TypeError, AttributeError):
            tokens, said = [], {}
        if not tokens:
            raise RuntimeFailedError(
                f"{self._name}: gives no log-probabilities for completions, so nothing can be compared. Start it with "
                "them allowed, or prove the patch in another runtime."
            )
        return Answer(dict(self._identified(tokens)), (said.get("usage") or {}).get("prompt_tokens"))

    def _post(self, body: Mapping[str, object]) -> httpx2.Response:
        try:
            return self._client.post(f"{self.url}/completions", json=body)
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise RuntimeFailedError(
                f"{self._name}: does not answer: {str(error) or type(error).__name__}. Start the server, or correct "
                "the address; that of the API usually ends in /v1."
            ) from error

    def _refused(self, response: httpx2.Response, model: str) -> RuntimeFailedError:
        there = ""
        try:
            listed = [each["id"] for each in self._client.get(f"{self.url}/models").json()["data"]]
            if model not in listed:
                there = f" It has no model '{model}', but {', '.join(map(repr, listed))}."
        except (httpx2.HTTPError, ValueError, KeyError, TypeError):
            pass
        said = " ".join(response.text.split())[:300]
        return RuntimeFailedError(f"{self._name}: refuses with status {response.status_code}: {said}{there}")

    def _identified(self, tokens: "list[tuple[int | str, float]]") -> Iterator[tuple[int, float]]:
        """By ids; a text that several tokens say, or none, is passed over."""
        for token, value in tokens:
            number = token if isinstance(token, int) else self._ids_by_text().get(token)
            if number is not None:
                yield number, value


def _tokens(said: Any) -> Iterator[tuple[int | str, float]]:  # noqa: ANN401 (what a server has sent)
    """The likeliest tokens in either of the two forms that servers have, and what they are called there."""
    if "content" in said:
        for each in said["content"][0]["top_logprobs"]:
            yield each.get("id", each["token"]), float(each["logprob"])
        return
    for token, value in said["top_logprobs"][0].items():
        found = _BY_ID.fullmatch(token)
        yield int(found[1]) if found else token, float(value)
