"""Hashes against the definitions of those who use them."""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save
from torch import Tensor

from lorafind.files.hashes import by_sorted_name, hashes, recorded
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import read_header

METADATA = {
    "ss_network_dim": "4",
    "ss_tag_frequency": '{"1_猫": {"a \\"quoted\\" tag": 3}}',
    "ss_comment": "tab\there, bell\x07, newline\n, delete\x7f",
    "modelspec.title": "not kohya's " * 40,
    "sshs_model_hash": "f" * 64,
}


def tensors(rows: int = 300) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    found = {f"m{i}.lora_up.weight": torch.randn(rows, 900, generator=g) for i in range(3)}
    found |= {f"m{i}.lora_down.weight": torch.randn(4, 900, generator=g).half() for i in range(3)}
    return found | {f"m{i}.alpha": torch.tensor(2) for i in range(3)}


def kohya(found: dict[str, Tensor], metadata: dict[str, str]) -> tuple[str, str]:
    """What sd-scripts' trainer records: (model hash, legacy hash)."""
    texts = {k: v for k, v in metadata.items() if k.startswith("ss_")}
    b = io.BytesIO(save(found, texts))
    n = int.from_bytes(b.read(8), "little")
    b.seek(8 + n)
    model = hashlib.sha256(b.read()).hexdigest()
    b.seek(0x100000)
    return model, hashlib.sha256(b.read(0x10000)).hexdigest()[:8]


@pytest.mark.parametrize("metadata", [{}, METADATA])
@pytest.mark.parametrize("rows", [300, 4])
def test_every_hash(tmp_path: Path, metadata: dict[str, str], rows: int) -> None:
    data = save(tensors(rows), metadata)
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    found = hashes(path, read_header(path))
    start = 8 + int.from_bytes(data[:8], "little")
    model, legacy = kohya(tensors(rows), metadata)
    assert found.to_json() == {
        "sha256": hashlib.sha256(data).hexdigest(),
        "autov1": hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8],
        "autov2": hashlib.sha256(data).hexdigest()[:10],
        "autov3": hashlib.sha256(data[start:]).hexdigest()[:12],
        "sshs_model_hash": model,
        "sshs_legacy_hash": legacy,
    }
    assert model == hashlib.sha256(data[start:]).hexdigest()
    assert (legacy == "e3b0c442") == (rows == 4)
    # What the reader has found out already is not computed again.
    assert hashes(path, read_header(path), found.sha256, found.sshs_model_hash) == found


def test_legacy_hash_of_a_file_in_another_order(tmp_path: Path) -> None:
    stored = tensors()
    header: dict[str, object] = {"__metadata__": METADATA}
    data = b""
    for key in sorted(stored):
        raw = stored[key].numpy().tobytes()
        dtype = {"torch.float32": "F32", "torch.float16": "F16", "torch.int64": "I64"}
        header[key] = {
            "dtype": dtype[str(stored[key].dtype)],
            "shape": list(stored[key].shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    found = hashes(path, read_header(path))
    assert found.sshs_legacy_hash == kohya(stored, METADATA)[1]
    assert found.sshs_model_hash == hashlib.sha256(data).hexdigest()
    assert by_sorted_name(path, read_header(path)) == hashlib.sha256(data).hexdigest()


def test_a_header_beyond_the_window_leaves_the_legacy_hash_open(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(tensors(), {"ss_tag_frequency": "x" * 0x100000}))
    assert hashes(path, read_header(path)).sshs_legacy_hash is None


def test_of_what_is_no_safetensors_file(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"some text")
    found = hashes(path)
    assert found.sha256 == hashlib.sha256(b"some text").hexdigest()
    assert (found.autov3, found.sshs_model_hash, found.sshs_legacy_hash) == (None, None, None)
    with pytest.raises(NotAnAdapter):
        hashes(tmp_path / "nothing")


def test_recorded(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(save(tensors(), METADATA))
    header = read_header(path)
    found = hashes(path, header)
    model, legacy = kohya(tensors(), METADATA)
    sorted_digest = hashlib.sha256()
    for key in sorted(tensors()):
        sorted_digest.update(tensors()[key].numpy().tobytes())

    def stale(name: str, value: str) -> bool | None:
        claims = recorded({name: value}, found, lambda: by_sorted_name(path, header))
        return claims[0].stale

    assert stale("sshs_model_hash", model) is False
    assert stale("sshs_model_hash", "0x" + model) is False
    assert stale("sshs_model_hash", "a" * 64) is True
    # LyCORIS: over the modules in an order that the file does not keep.
    assert stale("sshs_model_hash", "0x" + "a" * 64) is None
    assert stale("sshs_legacy_hash", legacy) is False
    assert stale("sshs_legacy_hash", "e3b0c442") is True
    assert sorted_digest.hexdigest() != model
    assert stale("modelspec.hash_sha256", "0x" + model.upper()) is False
    assert stale("modelspec.hash_sha256", "0x" + sorted_digest.hexdigest()) is False
    assert stale("modelspec.hash_sha256", "0x" + "a" * 64) is True
    assert stale("sidecar sha256", found.sha256) is False
    assert stale("sidecar sha256", model) is True
    assert recorded({"sshs_model_hash": model}, None)[0].stale is None
