"""Headers, digests, and reading while the world moves."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import sys
import threading
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lorafind.files import hashes
from lorafind.files import safetensors as ours
from lorafind.files.opening import NotAFile, open_regular
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.scan import probe
from tests.unprivileged import needs_permissions, open_folder, unprivileged

GOOD = {
    "b.weight": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a.weight": torch.arange(4, dtype=torch.float32),
    "alpha": torch.tensor(2.0),
    "none": torch.zeros(0, 3),
}


def build(header: Any, data: bytes = b"", pad: int = 0) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    text += b" " * pad
    return len(text).to_bytes(8, "little") + text + data


def tensor(shape: list[Any], begin: Any, end: Any, dtype: str = "F16") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def outcome(data: bytes) -> str:
    try:
        ours.parse_header(data, len(data))
    except NotAnAdapter as error:
        return error.outcome
    return "fine"


def test_a_header_is_read_as_the_reference_reads_it() -> None:
    data = save(GOOD, {"format": "pt", "note": "猫 \u0000"})
    header = ours.parse_header(data, len(data))
    assert header.metadata == {"format": "pt", "note": "猫 \u0000"}
    assert {k: list(i.shape) for k, i in header.tensors.items()} == {
        k: list(t.shape) for k, t in GOOD.items()
    }
    reference = dict(safetensors.deserialize(data))
    for key, info in header.tensors.items():
        begin = header.data_start + info.begin
        assert data[begin : header.data_start + info.end] == bytes(reference[key]["data"])
        assert info.dtype == reference[key]["dtype"]
    begins = [info.begin for info in header.tensors.values()]
    assert begins == sorted(begins)


@pytest.mark.parametrize(
    "data",
    [
        build({"a": tensor([2], 0, 4)}, bytes(3)),
        build({"a": tensor([2], 0, 4)}, bytes(5)),
        build({"a": tensor([2], 2, 6)}, bytes(6)),
        build({"a": tensor([2], 4, 0)}, bytes(4)),
        build({"a": tensor([2], -4, 0)}, bytes(4)),
        build({"a": tensor([2], 0, 4), "b": tensor([2], 2, 6)}, bytes(6)),
        build({"a": tensor([2], 0, 4), "b": tensor([2], 6, 10)}, bytes(10)),
        build({"a": tensor([3], 0, 4)}, bytes(4)),
        build({"a": tensor([2**62, 4, 0], 0, 0)}),
        build({"a": tensor([2**32, 2**32], 0, 4)}, bytes(4)),
        build({"a": tensor([-2, -1], 0, 4)}, bytes(4)),
        build({"a": tensor([2.0], 0, 4)}, bytes(4)),
        build({"a": tensor([True, 2], 0, 4)}, bytes(4)),
        build({"a": tensor([2], 0.0, 4)}, bytes(4)),
        build({"a": tensor([1], 0, 1, "F4")}, bytes(1)),
        build({"a": tensor([2], 0, 4, "Q4")}, bytes(4)),
        build({"a": {"dtype": "F16", "shape": [2]}}, bytes(4)),
        build({"a": {"dtype": ["F16"], "shape": [2], "data_offsets": [0, 4]}}, bytes(4)),
        build({"a": tensor("2", 0, 4)}, bytes(4)),  # type: ignore[arg-type]
        build({"a": [1, 2]}, bytes(4)),
        build({"a": None}),
        build({"__metadata__": {"n": 1}, "a": tensor([2], 0, 4)}, bytes(4)),
        build({"__metadata__": ["n"], "a": tensor([2], 0, 4)}, bytes(4)),
        build(b'{"a":{"dtype":"F16","shape":[2],"data_offsets":[0,4]},"a":1}', bytes(4)),
        build(b'{"a":{"dtype":"F16","dtype":"F16","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        build(b'{"\\ud800":{"dtype":"F16","shape":[2],"data_offsets":[0,4]}}', bytes(4)),
        build(b'{"a":{"dtype":"F16","shape":[NaN],"data_offsets":[0,4]}}', bytes(4)),
        build(b"[" * 100_000),
        build(b'{"a":' * 50_000),
        build(b"null"),
        build(b"7"),
        build(b'"text"'),
        build(b""),
        (2**63).to_bytes(8, "little") + b"{}",
        (ours.MAX_HEADER + 1).to_bytes(8, "little") + b"{}",
        b"",
        b"1234567",
    ],
)
def test_what_breaks_the_format_is_unreadable(data: bytes) -> None:
    assert outcome(data) == "unreadable"


def test_what_the_format_allows_is_read() -> None:
    two = {"b": tensor([2], 4, 8), "__metadata__": None, "a": tensor([1, 2], 0, 4)}
    assert outcome(build(two, bytes(8), pad=5)) == "fine"
    assert outcome(build({"a": tensor([], 0, 2)}, bytes(2))) == "fine"
    assert outcome(build({"a": tensor([3, 0], 0, 0), "b": tensor([1], 0, 2)}, bytes(2))) == "fine"
    assert outcome(build({})) == "empty"
    assert outcome(build({"__metadata__": {"format": "pt"}})) == "empty"


def test_a_long_header_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((ours.MAX_HEADER + 8).to_bytes(8, "little"))
        file.truncate(4 * ours.MAX_HEADER)
    with pytest.raises(NotAnAdapter, match="limit"):
        ours.load(path)


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_what_is_accepted_the_reference_accepts(data: st.DataObject) -> None:
    """Bytes flipped in a good file: never another exception, never more lenient."""
    good = bytearray(save(GOOD, {"format": "pt"}))
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(good) - 1))
        good[at] = data.draw(st.integers(0, 255))
    if outcome(bytes(good)) == "fine":
        safetensors.deserialize(bytes(good))


@pytest.mark.parametrize(
    ("start", "found"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n", "lfs-pointer"),
        (b"\n <!DOCTYPE html><html><body>Sign in", "html"),
        (b'{"error": "Repository not found"}', "json"),
        (b'{"error": "' + b"x" * 9000 + b'"}', "json"),
        ("模型太大,请从此处下载: https://example.org/x\n".encode(), "text"),
        ("é".encode() * 5000, "text"),
        (b"PK\x03\x04" + bytes(64), "unreadable"),
        (b"\x80\x02}q\x00." + bytes(64), "pickle"),
        (b"GGUF" + bytes(64), "unreadable"),
        (bytes(range(256)), "unreadable"),
    ],
)
def test_other_files_under_the_name_are_named(tmp_path: Path, start: bytes, found: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(start)
    with pytest.raises(NotAnAdapter) as caught:
        ours.load(path)
    assert caught.value.outcome == found
    assert "x.safetensors" in caught.value.reason


def test_a_broken_safetensors_file_is_not_taken_for_a_pickle(tmp_path: Path) -> None:
    """A header of 0x0380 bytes begins as a pickle does."""
    text = json.dumps({"a": tensor([2], 0, 4)}).encode()
    data = build(text, bytes(3), pad=0x0380 - len(text))
    assert data[:2] == b"\x80\x03"
    assert outcome(data) == "unreadable"


# ---------------------------------------------------------------------------- digests


def stored(tmp_path: Path) -> tuple[Path, bytes]:
    path = tmp_path / "x.safetensors"
    g = torch.Generator().manual_seed(1)
    big = {f"t{i}": torch.randn(300, 1000, generator=g) for i in range(3)}
    save_file(GOOD | big, path, {"a": "b"})
    return path, path.read_bytes()


def test_digests_are_those_of_hashlib(tmp_path: Path) -> None:
    path, data = stored(tmp_path)
    start = 8 + int.from_bytes(data[:8], "little")
    found = ours.load(path)
    assert found.sha256 == hashlib.sha256(data).hexdigest()
    assert found.data_sha256 == hashlib.sha256(data[start:]).hexdigest()
    assert bytes(found.data) == data[start:]
    text = (found.data_sha256 + found.header.names_digest).encode()
    assert found.content == hashlib.sha256(text).hexdigest()


def test_content_forgets_the_metadata_and_nothing_else() -> None:
    def content(tensors: dict[str, torch.Tensor], **metadata: str) -> str:
        data = save(tensors, metadata)
        header = ours.parse_header(data, len(data))
        return header.content(hashlib.sha256(data[header.data_start :]).hexdigest())

    one = content(GOOD, a="b")
    assert one == content(GOOD) == content(GOOD, a="c", d="e" * 1000)
    assert one != content({f"x{k}": t for k, t in GOOD.items()})
    assert one != content(GOOD | {"alpha": torch.tensor([2.0])})
    assert one != content(GOOD | {"alpha": torch.tensor(3.0)})
    assert one != content(GOOD | {"alpha": torch.tensor(1 << 30, dtype=torch.int32)})


def test_stream_and_positions_give_the_same_bytes_as_load(tmp_path: Path) -> None:
    path, _ = stored(tmp_path)
    whole = ours.load(path)
    stream = ours.stream(path)
    with pytest.raises(RuntimeError):
        _ = stream.sha256
    pieces = {key: bytes(raw) for key, raw in stream}
    fetch = ours.fetch_from(path, whole.header)
    assert list(pieces) == list(whole.header.tensors)
    for key in pieces:
        assert pieces[key] == bytes(whole.raw(key)) == bytes(fetch(key))
    assert (stream.sha256, stream.data_sha256) == (whole.sha256, whole.data_sha256)
    assert stream.content == whole.content


def test_a_buffer_is_reused_and_grown(tmp_path: Path) -> None:
    path, data = stored(tmp_path)
    small = tmp_path / "small.safetensors"
    save_file({"a": torch.ones(4)}, small)
    buffer = bytearray()
    first = ours.load(path, buffer)
    del first
    size = len(buffer)
    second = ours.load(small, buffer)
    assert len(buffer) == size
    assert bytes(buffer[:16]) == bytes(second.data) == torch.ones(4).numpy().tobytes()
    held = ours.load(small, buffer := bytearray())
    again = ours.load(path, buffer)
    assert bytes(held.data) == torch.ones(4).numpy().tobytes()
    assert bytes(again.data) == data[again.header.data_start :]


# ---------------------------------------------------------------------------- the moving world


def refused(action: Callable[[], object]) -> str:
    with pytest.raises(NotAnAdapter) as caught:
        action()
    assert caught.value.reason
    return caught.value.outcome


def test_a_file_that_changes_is_changing(tmp_path: Path) -> None:
    path, data = stored(tmp_path)

    def grow(_: ours.Header) -> None:
        with path.open("ab") as file:
            file.write(b"x")

    def shrink(_: ours.Header) -> None:
        os.truncate(path, len(data) - 1000)

    def touch(_: ours.Header) -> None:
        os.utime(path, ns=(0, 12345))

    for change in (grow, shrink, touch):
        path.write_bytes(data)
        assert refused(partial(ours.load, path, None, change)) == "changing"

    path.write_bytes(data)
    fetch = ours.fetch_from(path, ours.read_header(path))
    stream = iter(ours.stream(path))
    next(stream)
    grow(ours.read_header(path))
    assert refused(lambda: fetch("alpha")) == "changing"
    assert refused(lambda: list(stream)) == "changing"


def test_what_is_no_regular_file(tmp_path: Path) -> None:
    folder = tmp_path / "x.safetensors"
    folder.mkdir()
    assert refused(lambda: ours.load(folder)) == "not-a-file"
    assert refused(lambda: ours.load(tmp_path / "absent")) == "vanished"
    (tmp_path / "dangling").symlink_to(tmp_path / "absent")
    assert refused(lambda: ours.load(tmp_path / "dangling")) == "not-a-file"
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    assert refused(lambda: ours.load(tmp_path / "loop")) == "not-a-file"


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs and sockets in folders")
def test_fifos_and_sockets_do_not_block(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    here = socket.socket(socket.AF_UNIX)
    name = os.path.relpath(tmp_path / "socket")
    if len(name) < 100:
        here.bind(name)
    for path in tmp_path.iterdir():
        found: list[str] = []

        def look(path: Path = path, found: list[str] = found) -> None:
            found.append(refused(lambda: ours.load(path)))

        thread = threading.Thread(target=look, daemon=True)
        thread.start()
        thread.join(5)
        assert found == ["not-a-file"]
    here.close()


@needs_permissions
def test_a_file_without_permission_is_inaccessible() -> None:
    with open_folder() as folder, unprivileged():
        path, _ = stored(folder)
        path.chmod(0)
        assert refused(lambda: ours.load(path)) == "inaccessible"


def test_a_file_beyond_two_gigabytes_is_read_by_position(tmp_path: Path) -> None:
    size = 2**31 + 2**20
    header = {"hole": tensor([size], 0, size, "U8"), "end": tensor([2], size, size + 4)}
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write(build(header))
        start = file.tell()
        file.seek(start + size)
        file.write(b"abcd")
    found = ours.read_header(path)
    assert bytes(ours.fetch_from(path, found)("end")) == b"abcd"


def test_what_is_not_wanted_passes_by(tmp_path: Path) -> None:
    path, data = stored(tmp_path)
    stream = ours.stream(path)
    found = {key: bytes(raw) for key, raw in stream.read({"t1", "alpha"})}
    assert found.keys() == {"t1", "alpha"}
    assert found == {key: bytes(ours.load(path).raw(key)) for key in found}
    assert stream.sha256 == hashlib.sha256(data).hexdigest()


def test_a_file_in_anothers_place_is_changing(tmp_path: Path) -> None:
    """The same length, another time: what was read of the first says nothing of the second."""
    path, data = stored(tmp_path)
    fetch = ours.fetch_from(path, ours.read_header(path))
    fetch("alpha")
    (tmp_path / "other").write_bytes(data)
    os.utime(tmp_path / "other", ns=(0, 12345))
    os.replace(tmp_path / "other", path)
    assert refused(lambda: fetch("alpha")) == "changing"
    with pytest.raises(NotAnAdapter, match="changed"):
        hashes.hashes(path, replace(ours.read_header(path), mtime_ns=1))


@pytest.mark.skipif(sys.platform == "win32", reason="no FIFOs in folders")
def test_only_regular_files_are_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to("/dev/zero")
    for path in (tmp_path, tmp_path / "fifo", tmp_path / "link", "/dev/null"):
        with pytest.raises(NotAFile):
            open_regular(path)
        with pytest.raises(NotAFile):
            probe(path)
