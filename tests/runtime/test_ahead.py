"""Imports beside other work."""

import sys
import threading

import pytest

from dppa_jax.runtime.ahead import imported_ahead

TAKES_ITS_PLACE = """
import sys, types
sys.may_end.wait(60)
sys.modules[__name__] = types.SimpleNamespace(known=1)  # as transformers does
"""


@pytest.fixture
def may_end(tmp_path, monkeypatch):
    """Until this is set, the module's import goes on."""
    (tmp_path / "takes_its_place.py").write_text(TAKES_ITS_PLACE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "may_end", threading.Event(), raising=False)
    yield sys.may_end
    sys.modules.pop("takes_its_place", None)


def test_a_block_does_not_wait_for_an_import_that_is_complete_when_it_ends(may_end):
    with imported_ahead("takes_its_place"):
        assert not hasattr(sys.modules.get("takes_its_place"), "known")
        may_end.set()
    from takes_its_place import known

    assert known == 1


def test_a_module_that_cannot_be_imported_is_an_error():
    with pytest.raises(ModuleNotFoundError, match="not_there"), imported_ahead("not_there"):
        pass
