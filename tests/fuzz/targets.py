"""From bytes to one of the things that are tried: what a fuzzer calls."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from tests.fuzz import grammar, subject
from tests.fuzz.source import Source

#: The first byte of an input chooses the target.
TARGETS = ("names", "header", "text", "file", "names", "made", "raw", "pickle")
#: A file's data section is made as long as its header says, up to this.
MOST_DATA = 2**18

_OFFSETS = re.compile(rb'"data_offsets":\s*\[\s*\d+\s*,\s*(\d{1,9})\s*\]')
_PLACE = tempfile.TemporaryDirectory(prefix="lorafind-fuzz-")


def one(data: bytes) -> str:
    """Try one input; returns the target and the outcome, raises what must not be."""
    kind = TARGETS[data[0] % len(TARGETS)] if data else "header"
    rest = data[1:]
    if kind == "names":
        return f"names {subject.names(Source(rest))}"
    if kind == "header":
        return f"header {subject.bytes_of_header(rest)}"
    if kind == "text":
        return f"text {subject.bytes_of_header(whole(rest))}"
    name = "x.pt" if kind == "pickle" else "x.safetensors"
    path = Path(_PLACE.name) / name
    content = {"file": whole, "made": made}.get(kind, bytes)(rest)
    path.write_bytes(content)
    return f"{kind} {subject.file(path, allow_pickle=True)}"


def whole(text: bytes) -> bytes:
    """A file with this header, its length before it and as much data behind it as it asks for."""
    ends = [int(found[1]) for found in _OFFSETS.finditer(text)]
    size = min(max(ends, default=0), MOST_DATA)
    numbers = (text[-64:] or b"\0") * (size // 64 + 64)
    return len(text).to_bytes(8, "little") + text + numbers[:size]


def made(choices: bytes) -> bytes:
    """A file of made-up tensors, at times with a few bytes that are others."""
    source = Source(choices)
    tensors = grammar.tensors(source)
    while sum(subject.length(*info) for info in tensors.values()) > MOST_DATA:
        del tensors[max(tensors, key=lambda name: subject.length(*tensors[name]))]
    text = header(tensors)
    texts = grammar.metadata(source)
    if texts:
        text = b'{"__metadata__":' + json.dumps(texts).encode() + b"," * bool(tensors) + text[1:]
    size = sum(subject.length(*info) for info in tensors.values())
    data = subject.numbers(size)
    content = bytearray(len(text).to_bytes(8, "little") + text + data)
    if source.seldom(3):
        for _ in range(source.number(1, 4)):
            content[source.number(0, len(content) - 1)] = source.byte()
    return bytes(content)


def seeds() -> Iterator[bytes]:
    """Inputs to begin with: every family and spelling as a header, as a file and as choices."""
    for number, (family, make) in enumerate(grammar.FAMILIES.items()):
        for k in range(3):
            prefix = grammar.PREFIXES[(number + 5 * k) % len(grammar.PREFIXES)]
            body, _, _ = grammar.BODIES[(7 * number + k) % len(grammar.BODIES)]
            stem = prefix + (body.replace(".", "_") if k else body)
            text = header(
                {
                    stem + suffix: grammar.Described(("F32", "F16", "BF16")[k], shape)
                    for suffix, shape in make(
                        16, 8, 2, (3, 3) if family == "tucker" else ()
                    ).items()
                }
            )
            yield bytes([2 + (k == 1)]) + text
            yield bytes([5 * (k == 2), *((number * 37 + k * 11 + i * i) % 256 for i in range(200))])
    yield b"\x01" + whole(b'{"__metadata__":{"format":"pt"}}')
    yield b"\x06version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 3\n"
    yield b"\x06<!DOCTYPE html><html></html>"
    yield b"\x07" + _pickled()


def header(tensors: grammar.Tensors) -> bytes:
    """The JSON of a header, tensors one after the other."""
    described: dict[str, object] = {}
    at = 0
    for name, (dtype, shape) in tensors.items():
        length = subject.length(dtype, shape)
        described[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + length]}
        at += length
    return json.dumps(described, separators=(",", ":")).encode()


def words() -> list[str]:
    """What a fuzzer should put together."""
    parts = [*grammar.SUFFIXES, *grammar.PREFIXES, *(body for body, _, _ in grammar.BODIES)]
    parts += [name for name, _ in grammar.ALONE] + [*grammar.DTYPES, *grammar.RARE_DTYPES]
    parts += ['"dtype":"', '"shape":[', '"data_offsets":[', "__metadata__", '":{', "[]", "\\u0000"]
    return sorted({part for part in parts if part})


def _pickled() -> bytes:
    import io

    import torch

    buffer = io.BytesIO()
    stem = "lora_unet_conv_in"
    made = {
        f"{stem}.lora_up.weight": torch.ones(3, 1),
        f"{stem}.lora_down.weight": torch.ones(1, 2),
    }
    torch.save(made, buffer, _use_new_zipfile_serialization=False)
    return buffer.getvalue()
