"""What every test can ask for: tiny checkpoints and adapters, written once in a run.

`tests.models` is imported when a fixture is first asked for and not before: transformers and peft take seconds, and a
run of the pure tests alone needs neither.
"""

import os

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes would compile what the tests run once

torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A folder of tiny checkpoints by kind, each written when first asked for; read them, do not write to them.

    `tiny("base")`, `tiny("base", tied=False, dtype=torch.float16)`, `tiny("evolved", drift=0.1)`,
    `tiny("adapter", r=2, use_rslora=True)`: keywords as for `make_base`, `make_evolved` and `make_adapter` of
    `tests.models`. An evolved model and an adapter are of the base `of`, by default `tiny("base")`.
    """
    from tests import models

    made = {}

    def make(kind, *, of=None, **how):
        key = (kind, str(of), repr(sorted(how.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(kind)
            match kind:
                case "base":
                    made[key] = models.make_base(folder, **how)
                case "evolved":
                    made[key] = models.make_evolved(of or make("base"), folder, **how)
                case "adapter":
                    made[key] = models.make_adapter(of or make("base"), folder, **how)
                case _:
                    raise ValueError(kind)
        return made[key]

    return make
