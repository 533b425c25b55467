"""The tiny model with a tokenizer, and files with rows that it can read."""

import pytest

from tests.clusters import cluster, environment  # noqa: F401 (fixtures)
from tests.language import make_reader


@pytest.fixture(scope="session")
def reader(tmp_path_factory):
    """Folder of a tiny bfloat16 model with a tokenizer; read it, do not write to it."""
    return make_reader(tmp_path_factory.mktemp("reader"))
