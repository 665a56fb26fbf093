"""Imports beside other work."""

import sys

import pytest

from dppa_jax.runtime.ahead import imported_ahead

TAKES_ITS_PLACE = """
import sys, time, types
time.sleep(0.3)
sys.modules[__name__] = types.SimpleNamespace(known=1)  # as transformers does
"""


@pytest.fixture
def modules(tmp_path, monkeypatch):
    (tmp_path / "takes_its_place.py").write_text(TAKES_ITS_PLACE)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("takes_its_place", None)


def test_what_is_imported_ahead_is_complete_when_the_block_ends(modules):
    with imported_ahead("takes_its_place"):
        assert getattr(sys.modules.get("takes_its_place"), "known", None) is None, "the block does not wait"
    from takes_its_place import known

    assert known == 1


def test_a_module_that_cannot_be_imported_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="not_there"), imported_ahead("not_there"):
        pass
