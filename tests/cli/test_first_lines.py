"""What every verb says first: a sentence to act on, and a next command that exists with its options."""

import re
import shlex

import pytest

from portllm.cli.commands import COMMANDS as VERBS
from tests.models import make_adapter, make_base, make_evolved


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """What the commands below name; each finds what those before it wrote."""
    here = tmp_path_factory.mktemp("first")
    base = make_base(here / "base")
    make_evolved(base, here / "evolved")
    make_adapter(base, here / "adapter")
    make_adapter(base, here / "other", seed=2)
    return here


COMMANDS = (
    ("capture --adapter adapter --base base -o patch", "Captured adapter as patch, a patch of base."),
    ("capture --adapter other --base base -o second", "Captured other as second, a patch of base."),
    ("capture --tuned evolved --base base -o update", "Captured evolved as update, a patch of base."),
    ("check patch --base base --evolved evolved", "uncertain: patch on evolved; measure it before you ship it"),
    ("check patch second --base base --evolved evolved", "2 patches on evolved: 2 uncertain"),
    (
        "port patch --evolved evolved -o ported",
        "Ported patch to evolved by addition; whether it holds was not checked.",
    ),
    ("port patch second --evolved evolved -o both", "Ported 2 of 2 patches: 2 not checked."),
    ("merge ported --into evolved -o merged", r"Merged ported into evolved; \d+\.\d % of the patch survives rounding"),
    ("merge both/patch both/second --into evolved -o each", "Merged 2 of 2 patches, each into weights of its own."),
    ("merge both/patch --into each/second --in-place --allow-other-base", "Merged patch in place;"),
    ("merge --undo each/second", "Undone: each/second is as it was before the merge; 14 tensors were restored"),
    ("combine patch second -o sum", "Combined patch and second into one patch of base, their exact sum."),
    (
        "combine patch second -o small --rank 1",
        r"Combined .* of base; \d+\.\d % of its size was cut off with the rank.",
    ),
    ("export ported --for vllm --base evolved -o served", "Exported all of ported for vllm: 14 modules."),
    ("verify ported --base evolved", "verified: patch ported"),
    ("verify ported --base base", r"not verified \(base\): patch ported"),
    ("doctor", "(Well|Not well): "),
)


def test_every_verb_opens_with_a_sentence_and_the_next_command_exists(place, portllm, monkeypatch):
    monkeypatch.chdir(place)
    for command, first in COMMANDS:
        done = portllm(*shlex.split(command))
        assert done.status in (0, 3), (command, done.err)
        assert re.match(first, done.out), (command, done.out)
        following = [line.strip() for line in done.out.splitlines() if line.startswith("  portllm ")]
        if "\nNext: " in done.out and "\n  portllm" in done.out:
            assert following[0].split()[1] in VERBS, command
            given = portllm(following[0].split()[1], "--help").out
            assert all(word in given for word in following[0].split() if word.startswith("--")), following
