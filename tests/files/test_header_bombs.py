"""Headers that are small where they are stored and huge where they are parsed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import pytest

from lorafind.files import header as ours
from lorafind.files.outcome import MAX_REASON, NotAnAdapter
from lorafind.files.safetensors import read_header

MB = 1_000_000


def stored(text: bytes, data: bytes = b"") -> bytes:
    return len(text).to_bytes(8, "little") + text + data


def described(shape: str = "[0]", dtype: str = "U8", begin: int = 0, end: int = 0) -> str:
    return f'{{"dtype":"{dtype}","shape":{shape},"data_offsets":[{begin},{end}]}}'


def listed(entries: Iterator[str]) -> bytes:
    return ("{" + ",".join(entries) + "}").encode()


def numbered(count: int, what: str) -> Iterator[str]:
    return (f'"{i:x}":{what}' for i in range(count))


BOMBS = {
    "lists": lambda: b'{"a":[' + b"[]," * 4 * MB + b"[]]}",
    "objects": lambda: b'{"a":[' + b"{}," * 4 * MB + b"{}]}",
    "nesting": lambda: b"[" * 5 * MB,
    "nesting of objects": lambda: b'{"a":' * 2 * MB,
    "entries": lambda: listed(numbered(2 * MB, "0")),
    "tensors": lambda: listed(numbered(MB // 4, described())),
    "texts": lambda: b'{"__metadata__":' + listed(numbered(2 * MB, '""')) + b"}",
    "one name again and again": lambda: listed(chain(numbered(1, "0"), ['"0":0'] * 2 * MB)),
}
#: What a bomb may cost: MiB beside the interpreter, seconds of the processor.
MIB, SECONDS = 400, 10.0

MEASURE = """
import resource, sys, time
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import read_header
before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
try:
    read_header(sys.argv[1])
except NotAnAdapter as error:
    print(error.outcome)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, time.process_time() - began)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
@pytest.mark.parametrize("kind", BOMBS)
def test_a_bomb_is_refused_before_it_goes_off(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(stored(BOMBS[kind]()))
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    outcome, kib, seconds = done.stdout.split()
    assert outcome == "unsupported"
    assert int(kib) / 1024 < MIB
    assert float(seconds) < SECONDS


def outcome(data: bytes) -> str:
    try:
        ours.parse_header(data, len(data), "x")
    except NotAnAdapter as error:
        assert len(error.reason) <= MAX_REASON
        return error.outcome
    return "fine"


def test_punctuation_in_texts_is_no_bomb() -> None:
    """kohya's trainers write JSON of any length into a text."""
    text = json.dumps({"a" * i: [[], {}] for i in range(3)})[:-1] + ', "b": "' + "[,{" * MB + '"}'
    whole = {"__metadata__": {"ss_tag_frequency": text}, "a": json.loads(described())}
    data = stored(json.dumps(whole).encode())
    assert sum(data.count(c) for c in (b"[", b",", b"{")) > ours.MAX_PARTS
    assert ours.parse_header(data, len(data)).metadata["ss_tag_frequency"] == text


def test_the_most_that_is_read() -> None:
    """A language model with very many experts."""
    experts = MB // 20
    data = stored(
        listed(
            f'"model.layers.{i // 128}.mlp.experts.{i % 128}.up_proj.lora_A.weight":'
            + described("[1,1]", "U8", i, i + 1)
            for i in range(experts)
        ),
        bytes(experts),
    )
    assert len(ours.parse_header(data, len(data)).tensors) == experts


@pytest.mark.parametrize(
    ("entry", "found"),
    [
        (described("[" + ",".join(["9" * 4200] * 4000) + "]"), "unreadable"),
        (described("[" + ",".join(["9" * 4200] * 60) + "]"), "unreadable"),
        (described("[" + ",".join(["9223372036854775807"] * 64) + "]"), "unreadable"),
        (described("[" + ",".join(["1"] * 65) + "]", end=1), "unreadable"),
        (described("[" + ",".join(["1"] * 64) + "]", end=1), "fine"),
        (described("[1" + "0" * 5000 + "]"), "unreadable"),
        ('{"dtype":"U8","shape":[1],"data_offsets":[false,true]}', "unreadable"),
        ('{"dtype":"' + "Q" * MB + '","shape":[1],"data_offsets":[0,1]}', "unreadable"),
    ],
)
def test_hostile_shapes_take_no_time(entry: str, found: str) -> None:
    began = time.process_time()
    assert outcome(stored(listed(iter([f'"a":{entry}'])), b"1")) == found
    assert time.process_time() - began < 1


def test_a_name_of_any_length_gives_a_short_sentence() -> None:
    name = "n" * MB
    assert outcome(stored(listed(iter([f'"{name}":{described(dtype="Q")}'])))) == "unreadable"
    assert outcome(stored(listed(iter([f'"{name}":{described()}'])))) == "unsupported"
    assert outcome(stored(listed(iter([f'"{name}":1', f'"{name}":1'])))) == "unreadable"
    short = "n" * ours.MAX_NAME
    assert outcome(stored(listed(iter([f'"{short}":{described()}'])))) == "fine"


def test_a_sentence_is_one_line_whatever_the_names() -> None:
    data = stored(b'{"a\\nb\\u2028\\u001b[31m":1}')
    with pytest.raises(NotAnAdapter) as caught:
        ours.parse_header(data, len(data), "file\nwith\x1b[0m.safetensors")
    assert caught.value.reason.isprintable()
    assert "file\\nwith" in caught.value.reason


def test_bytes_after_a_header_without_tensors_are_no_empty_file() -> None:
    assert outcome(stored(b"{}")) == "empty"
    assert outcome(stored(b"{}", b"data")) == "unreadable"


def test_a_long_header_is_read_once_into_place(tmp_path: Path) -> None:
    """A header longer than the first look at a file."""
    note = "x" * 3 * MB
    text = json.dumps({"__metadata__": {"note": note}, "a": json.loads(described("[2]", end=2))})
    path = tmp_path / "x.safetensors"
    path.write_bytes(stored(text.encode(), b"12"))
    found = read_header(path)
    assert (found.metadata, found.data_start) == ({"note": note}, 8 + len(text))
    assert found.mtime_ns == path.stat().st_mtime_ns
