"""Answers requests on stdin, a line of JSON each, with the runtime whose file is named; run as `python -I programs`.

The Python is that of the runtime's own environment: nothing of PortLLM and nothing that is not in the standard library
is imported here. A runtime's file has `load(base, patch, top, max_tokens)`, which returns its version and what answers
a request.
"""

import importlib
import json
import os
import sys


def main() -> None:
    """Load, then answer until stdin ends."""
    # What the runtime prints goes to stderr: stdout is for the answers.
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)

    def reply(value: object) -> None:
        replies.write(json.dumps(value) + "\n")
        replies.flush()

    try:
        version, ask = importlib.import_module(sys.argv[1]).load(**json.loads(sys.stdin.readline()))
        reply({"version": version})
        for line in sys.stdin:
            request = json.loads(line)
            top, n_prompt_tokens = ask(request["model"], request["prompt"])
            reply({"top": top, "n_prompt_tokens": n_prompt_tokens})
    except Exception as error:  # the runtime's own words are what the user needs
        reply({"error": f"{type(error).__name__}: {error}"})


main()
