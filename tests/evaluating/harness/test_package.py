import importlib
import logging
import sys

import pytest

from portllm.errors import MissingExtraError


@pytest.mark.parametrize("missing", ["lm_eval", "datasets"])
def test_a_missing_extra_is_named_with_the_command_that_installs_it(monkeypatch, missing):
    for name in [name for name in sys.modules if name.split(".")[0] == missing]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, missing, None)
    monkeypatch.delitem(sys.modules, "portllm.evaluating.harness.package", raising=False)
    with pytest.raises(MissingExtraError, match=rf"'{missing}.*pip install .*'lm_eval>="):
        importlib.import_module("portllm.evaluating.harness.package")


def test_the_harness_is_quiet_inside_the_block_and_as_before_after_it():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed: pip install -e '.[eval]'")
    import datasets

    from portllm.evaluating.harness.package import quiet_harness

    logger = logging.getLogger("lm_eval")
    before = logger.level, datasets.is_progress_bar_enabled()
    with quiet_harness():
        assert not logger.isEnabledFor(logging.ERROR)
        assert not datasets.is_progress_bar_enabled()
    assert (logger.level, datasets.is_progress_bar_enabled()) == before
