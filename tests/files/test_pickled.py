"""PyTorch files: read only when allowed, and never executed."""

from __future__ import annotations

import collections
import hashlib
import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from lorafind.files import pickled
from lorafind.files import safetensors as files
from lorafind.files.outcome import NotAnAdapter

TENSORS = {
    "b": torch.arange(6, dtype=torch.float16).reshape(2, 3),
    "a": torch.arange(4, dtype=torch.float32),
    "c": torch.tensor(2, dtype=torch.int64),
    "d": torch.ones(3, 2, dtype=torch.bfloat16).T,
    "e": torch.zeros(0, 2, dtype=torch.float16),
}


class Command:
    """What a wicked file holds."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, ("touch pwned",)


def test_needs_to_be_allowed(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(TENSORS, path)
    with pytest.raises(NotAnAdapter, match="--allow-pickle") as caught:
        pickled.load(path)
    assert caught.value.outcome == "pickle"


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("old", [False, True])
def test_never_executes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, protocol: int, old: bool
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "x.pt"
    if old:
        path.write_bytes(pickle.dumps({"a": Command()}, protocol))
    else:
        torch.save({"a": Command()}, path, pickle_protocol=protocol)
    with pytest.raises(NotAnAdapter) as caught:
        pickled.load(path, allow_pickle=True)
    assert caught.value.outcome == "pickle"
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("zipped", [True, False])
def test_the_same_tensors_have_the_same_content_as_safetensors(
    tmp_path: Path, zipped: bool
) -> None:
    torch.save(TENSORS, tmp_path / "x.pt", _use_new_zipfile_serialization=zipped)
    save_file({k: t.contiguous() for k, t in TENSORS.items()}, tmp_path / "x.safetensors")
    one = pickled.load(tmp_path / "x.pt", allow_pickle=True)
    two = files.load(tmp_path / "x.safetensors")
    assert one.content == two.content
    assert one.data_sha256 == two.data_sha256
    assert one.sha256 == hashlib.sha256((tmp_path / "x.pt").read_bytes()).hexdigest()
    assert list(one.tensors) == list(two.header.tensors)
    for key, t in TENSORS.items():
        assert torch.equal(one.tensors[key], t)


@pytest.mark.parametrize(
    ("saved", "names"),
    [
        ([torch.ones(2), torch.zeros(3)], ["0", "1"]),
        ([torch.nn.Parameter(torch.ones(2))], ["0"]),
        (collections.OrderedDict(a=torch.ones(2)), ["a"]),
        ({"state_dict": {"a": torch.ones(2)}, "epoch": 3}, ["a"]),
        ({"string_to_param": {"*": torch.ones(2)}, "name": "x"}, ["string_to_param.*"]),
        ({768: (torch.ones(2), torch.ones(2))}, ["768.0", "768.1"]),
    ],
)
def test_containers(tmp_path: Path, saved: Any, names: list[str]) -> None:
    torch.save(saved, tmp_path / "x.pt")
    found = pickled.load(tmp_path / "x.pt", allow_pickle=True)
    assert sorted(found.tensors) == names
    assert not any(t.requires_grad for t in found.tensors.values())


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (b"", "unreadable"),
        (b"PK\x03\x04 and nothing more of it", "unreadable"),
        (bytes(range(200)), "pickle"),
        (b"version https://git-lfs.github.com/spec/v1\n", "lfs-pointer"),
        (b"<html><body>Not found</body></html>", "html"),
        (b'{"error": "not found"}', "json"),
    ],
)
def test_broken_ones_are_named(tmp_path: Path, data: bytes, found: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(data)
    with pytest.raises(NotAnAdapter) as caught:
        pickled.load(path, allow_pickle=True)
    assert caught.value.outcome == found


def test_nothing_in_it_is_empty(tmp_path: Path) -> None:
    torch.save({"epoch": 3}, tmp_path / "x.pt")
    with pytest.raises(NotAnAdapter) as caught:
        pickled.load(tmp_path / "x.pt", allow_pickle=True)
    assert caught.value.outcome == "empty"


# ---------------------------------------------------------------------------- hostile ones


def _holding_itself() -> dict[str, Any]:
    found: dict[str, Any] = {"t": torch.ones(2)}
    found["self"] = found
    return found


def _deep() -> Any:
    found: Any = torch.ones(2)
    for _ in range(40):
        found = {"a": found}
    return found


HOSTILE: dict[str, Callable[[], Any]] = {
    "one number in any shape": lambda: {"a": torch.ones(1).expand(200_000, 200_000)},
    "one tensor very often": lambda: {"a": [torch.ones(1000)] * 5000},
    "itself": _holding_itself,
    "depth": _deep,
    "one name twice": lambda: {1: torch.ones(2), "1": torch.zeros(2)},
    "one name in two ways": lambda: {"a.b": torch.ones(2), "a": {"b": torch.zeros(2)}},
    "no numbers": lambda: {"a": torch.ones(2, device="meta")},
    "half a character": lambda: {"\ud800": torch.ones(2)},
    "a long name": lambda: {"n" * 5000: torch.ones(2)},
    "names of other kinds": lambda: {(1, 2): torch.ones(2)},
    "sparse": lambda: {"a": torch.ones(2, 2).to_sparse()},
    "quantised": lambda: {"a": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8)},
}


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", HOSTILE)
def test_what_no_file_can_honestly_hold_is_not_read(tmp_path: Path, kind: str) -> None:
    torch.save(HOSTILE[kind](), tmp_path / "x.pt")
    with pytest.raises(NotAnAdapter, match=r"^x\.pt is not read: ") as caught:
        pickled.load(tmp_path / "x.pt", allow_pickle=True)
    assert caught.value.outcome == "unsupported"


def test_an_archive_that_unpacks_to_more_than_itself(tmp_path: Path) -> None:
    torch.save({"a": torch.zeros(2**22)}, tmp_path / "whole.pt")
    with (
        zipfile.ZipFile(tmp_path / "whole.pt") as source,
        zipfile.ZipFile(tmp_path / "x.pt", "w", zipfile.ZIP_DEFLATED) as target,
    ):
        for entry in source.infolist():
            target.writestr(entry.filename, source.read(entry))
    assert (tmp_path / "x.pt").stat().st_size < 2**16
    with pytest.raises(NotAnAdapter, match="unpacks to") as caught:
        pickled.load(tmp_path / "x.pt", allow_pickle=True)
    assert caught.value.outcome == "unsupported"


def test_tied_and_negated_tensors_are_read(tmp_path: Path) -> None:
    tied = torch.arange(6.0).reshape(2, 3)
    whole = torch.randn(2, 3, dtype=torch.complex64)
    torch.save({"a": tied, "b": tied, "c": tied.T, "d": whole.conj().imag}, tmp_path / "x.pt")
    found = pickled.load(tmp_path / "x.pt", allow_pickle=True).tensors
    assert torch.equal(found["a"], tied) and torch.equal(found["b"], tied)
    assert torch.equal(found["c"], tied.T) and torch.equal(found["d"], -whole.imag)
