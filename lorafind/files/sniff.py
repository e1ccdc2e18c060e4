"""What a file is that bears a weight file's name and is none."""

from __future__ import annotations

import json
import os
from pathlib import PurePath

from lorafind.files.outcome import NotAnAdapter

#: Bytes from the start of a file that :func:`sniff` wants to see.
SAMPLE = 4096

#: Endings of PyTorch files.
PICKLED = frozenset({".pt", ".bin", ".ckpt", ".pth"})

MAGIC = {
    b"PK\x03\x04": "a ZIP archive (a PyTorch file is one: rename it to .pt)",
    b"PK\x05\x06": "an empty ZIP archive",
    b"GGUF": "a GGUF model",
    b"\x1f\x8b": "a gzip archive",
    b"7z\xbc\xaf": "a 7-Zip archive",
    b"Rar!": "a RAR archive",
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"RIFF": "a RIFF file (a WebP picture or a sound)",
}


def is_pickled(path: str | os.PathLike[str]) -> bool:
    """True where the name's ending is that of a PyTorch file."""
    return PurePath(path).suffix.lower() in PICKLED


def sniff(sample: bytes, size: int, path: str | os.PathLike[str]) -> NotAnAdapter | None:
    """What else the file is, judged by its first bytes; None where nothing is recognised.

    sample: its first :data:`SAMPLE` bytes (all of them where it is smaller); size: its length.
    """
    name = PurePath(path).name
    if sample[8:9] == b"{" and sample[5:8] == b"\0\0\0":
        return None  # a safetensors file, however broken
    if sample.startswith(b"version https://git-lfs"):
        return NotAnAdapter(
            "lfs-pointer", f"{name} is a Git LFS pointer: fetch the file itself with `git lfs pull`"
        )
    start = sample.lstrip(b"\xef\xbb\xbf \t\r\n")
    if start[:15].lower().startswith((b"<!doctype html", b"<html", b"<head", b"<?xml")):
        return NotAnAdapter("html", f"{name} is a web page: download it again, signed in if asked")
    if start[:1] in (b"{", b"[") and _is_json(sample, size):
        return NotAnAdapter("json", f"{name} is a JSON text (an error message?): download it again")
    for magic, what in MAGIC.items():
        if sample.startswith(magic):
            return NotAnAdapter("unreadable", f"{name} is {what}, not a safetensors file")
    if sample[:1] == b"\x80" and sample[1:2] in b"\x02\x03\x04\x05":
        return NotAnAdapter(
            "pickle", f"{name} is a pickle under another name: rename it to .pt to read it"
        )
    if _is_text(sample, size):
        return NotAnAdapter("text", f"{name} is a text: read it, it may say where the file is")
    return None


def _is_json(sample: bytes, size: int) -> bool:
    if size <= len(sample):
        try:
            json.loads(sample)
        except (ValueError, RecursionError):
            return False
        return True
    return _is_text(sample, size) and sample.lstrip()[1:].lstrip()[:1] in (b'"', b"{", b"[")


def _is_text(sample: bytes, size: int) -> bool:
    """True for UTF-8 with nothing but printable characters and white space."""
    if size < 16:
        return False
    try:
        text = sample.decode("utf-8")
    except UnicodeDecodeError as error:
        # A sample of a longer text may end inside a character.
        if size <= len(sample) or error.start < len(sample) - 3:
            return False
        text = sample[: error.start].decode("utf-8")
    return all(c.isprintable() or c in "\t\r\n\f\ufeff" for c in text)
