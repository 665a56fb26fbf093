"""Files that outlive a run: whole or not at all, never through a link."""

import re

import pytest

from dppa_jax.runtime import files
from dppa_jax.runtime.files import kept_directory, write_whole


def test_a_link_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "mine").write_text("precious")
    (tmp_path / "plan.json").symlink_to("mine")
    write_whole(tmp_path / "plan.json", "{}")
    assert (tmp_path / "plan.json").read_text() == "{}"
    assert not (tmp_path / "plan.json").is_symlink()
    assert (tmp_path / "mine").read_text() == "precious"


def test_a_failed_write_leaves_the_old_file_and_names_it(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, "No space left on device")

    file = tmp_path / "plan.json"
    write_whole(file, "old")
    monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match=re.escape(f"[Errno 28] No space left on device: '{file}'")):
        write_whole(file, "new")
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
    assert file.read_text() == "old"


def test_a_name_that_is_not_utf8_is_written_as_an_escape(tmp_path):
    write_whole(tmp_path / "README.md", "é caf\udce9")
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "é caf\\udce9"


def test_where_nothing_can_be_kept_the_variable_that_helps_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match=rf"{tmp_path}/file/cache: Not a directory; \$DPPA_JAX_CACHE names another"):
        kept_directory(tmp_path / "file" / "cache")
    assert kept_directory(tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700
    assert list((tmp_path / "a" / "b").iterdir()) == []
