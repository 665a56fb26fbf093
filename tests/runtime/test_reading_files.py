"""Small files that someone else has written: a value of the declared shape or a message, never a traceback."""

import os
import re
import socket

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dppa_jax.runtime import reading
from dppa_jax.runtime.reading import open_regular, parse_json, read_bytes, read_json, read_json_lines, read_text


class Model(msgspec.Struct):
    """A shape."""

    layers: int
    name: str = "none"


@pytest.fixture
def file(tmp_path):
    return tmp_path / "config.json"


def make_fifo(file):
    os.mkfifo(file)


def make_directory(file):
    file.mkdir()


def make_socket(file):
    socket.socket(socket.AF_UNIX).bind(os.path.relpath(file))


def make_loop(file):
    file.symlink_to(file.name)


def make_link_to_a_device(file):
    file.symlink_to("/dev/zero")


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (make_fifo, "is a pipe in place of a file"),
        (make_directory, "is a directory in place of a file"),
        (make_socket, "is a socket in place of a file"),
        (make_loop, "is a link that leads back to itself"),
        (make_link_to_a_device, "is a device in place of a file"),
    ],
)
def test_what_is_no_file_is_refused_before_it_is_read(file, make, said, monkeypatch):
    monkeypatch.chdir(file.parent)
    make(file)
    with pytest.raises(ValueError, match=f"{file} {said}"):
        read_bytes(file)


def test_a_name_with_a_zero_byte_is_refused():
    with pytest.raises(ValueError, match=r"^a\\x00b: a zero byte cannot be part of a file's name"):
        open_regular("a\0b")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(FileNotFoundError, match=r"nowhere\.json"):
        read_bytes("nowhere.json")


@pytest.mark.parametrize("grows", [False, True])
def test_a_larger_file_than_can_be_meant_is_refused(file, monkeypatch, grows):
    """A file that grows while it is read is cut off at the limit."""
    file.write_bytes(b" " * 1001)
    if grows:
        monkeypatch.setattr(reading.os, "fstat", lambda descriptor: os.stat_result([0o100644, *[0] * 9]))
    with pytest.raises(ValueError, match=f"{file}: 1001 bytes, and such a file has at most 1000. Shorten it."):
        read_bytes(file, 1000, fix="Shorten it.")
    assert read_bytes(file, 1001) == b" " * 1001


def test_a_file_that_cannot_be_read_is_named(file, monkeypatch):
    def fail(*_):
        raise OSError(5, "Input/output error")

    file.write_text("{}")
    monkeypatch.setattr(reading.os, "read", fail)
    with pytest.raises(OSError, match=re.escape(f"[Errno 5] Input/output error: '{file}'")):
        read_bytes(file)


def test_text_that_is_not_utf8_is_told_with_its_line(file):
    file.write_bytes("one\ntwo\ncafé".encode("latin-1"))
    with pytest.raises(ValueError, match=rf"{file}:3: not UTF-8 \(.*\)\. Save it as UTF-8\."):
        read_text(file)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"\xff\xfe{", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"layers": ' + b"[" * 900 + b"]" * 900 + b"}", "Expected `int`, got `array`"),
        (b"[]", "Expected `object`, got `array`"),
        (b"{}", "missing required field `layers`"),
        (b'{"layers": "5"}', "Expected `int`, got `str`"),
        (b'{"layers": 5, "name": null}', "Expected `str`, got `null`"),
        (b'{"layers": 1e400}', "Expected `int`, got `float`"),
        (b'{"layers": 1' + b"0" * 5000 + b"}", "is not JSON"),
    ],
)
def test_json_of_another_shape_is_told_with_the_file_and_the_fix(file, text, said):
    file.write_bytes(text)
    with pytest.raises(ValueError, match=rf"(?s)^{file}.*{re.escape(said)}.* Give layers\.$"):
        read_json(file, Model, fix="Give layers.")


def test_json_of_the_shape_is_converted_to_it(file):
    file.write_text('{"layers": 5, "more": [1]}')
    assert read_json(file, Model) == Model(5)


def test_lines_are_told_by_their_number(file):
    file.write_text('{"layers": 5}\n\n{"layers": 6, "name": "a\u2028b"}\n5\n')
    lines = read_json_lines(file, Model)
    assert [next(lines), next(lines)] == [(1, Model(5)), (3, Model(6, "a\u2028b"))]
    with pytest.raises(ValueError, match=f"{file}:4: Expected `object`, got `int`"):
        next(lines)


@settings(max_examples=60, deadline=None)
@given(st.one_of(st.binary(max_size=40), st.text(alphabet='{}[]":,0123456789eE.-layersnm\\u ', max_size=40)))
def test_no_bytes_give_anything_but_the_shape_or_a_message(text):
    try:
        right = isinstance(parse_json(text, "file", Model), Model)
    except ValueError as error:
        right = str(error).startswith("file")
    assert right
