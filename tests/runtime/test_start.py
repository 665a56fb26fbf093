"""Where compiled code is kept: machine code is run only from a directory in which nobody else can put any."""

import jax
import pytest

from dppa_jax.runtime import start


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The place of the cache; JAX keeps nothing yet."""
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("DPPA_JAX_CACHE", str(tmp_path / "cache"))
    yield tmp_path / "cache"
    jax.config.update("jax_compilation_cache_dir", before)


def test_compiled_functions_are_kept_in_a_directory_of_the_user(cache, caplog):
    start.keep_compilations()
    assert jax.config.jax_compilation_cache_dir == str(cache / "xla")
    assert (cache / "xla").stat().st_mode & 0o777 == 0o700
    assert not caplog.text


def test_a_link_is_the_users_choice(cache, tmp_path, caplog):
    (tmp_path / "large").mkdir(0o700)
    cache.symlink_to("large")
    start.keep_compilations()
    assert (tmp_path / "large" / "xla").is_dir()
    assert not caplog.text


def not_writable(cache, monkeypatch):
    cache.write_text("")


def writable_by_others(cache, monkeypatch):
    cache.mkdir()
    cache.chmod(0o777)


def with_a_part_writable_by_others(cache, monkeypatch):
    (cache / "xla").mkdir(parents=True, mode=0o700)
    (cache / "xla").chmod(0o770)


def of_another_user(cache, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr(start.os, "geteuid", lambda: cache.stat().st_uid + 1)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (not_writable, "File exists"),
        (writable_by_others, "can be written by others (chmod go-w it)"),
        (with_a_part_writable_by_others, "can be written by others (chmod go-w it)"),
        (of_another_user, "belongs to another user"),
    ],
)
def test_a_run_goes_on_without_a_cache_that_cannot_be_used_and_says_so(cache, monkeypatch, caplog, make, said):
    make(cache, monkeypatch)
    start.keep_compilations()
    assert jax.config.jax_compilation_cache_dir is None
    (line,) = caplog.messages
    assert line.startswith(f"compiled functions are not kept: {cache}")
    assert said in line
    assert "$DPPA_JAX_CACHE names another directory" in line
