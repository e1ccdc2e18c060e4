"""One file → what the index keeps: in one pass or in several, and whatever happens meanwhile."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafind.files.scan import ScanReport, Target, scan
from lorafind.formats import read as reading
from lorafind.index import examine as module
from lorafind.index.examine import Examined, examine


def look(path: Path) -> Examined:
    (found,) = scan([Target(os.fsencode(path), b"", True)], ScanReport())
    return examine(
        found,
        (),
        device=torch.device("cpu"),
        allow_pickle=False,
        buffer=bytearray(),
        gate=nullcontext(),
        is_known=lambda content: False,
    )


def fused(path: Path) -> Path:
    """A layer of three parts with magnitudes for each row, and what acts beside."""
    g = torch.Generator().manual_seed(1)
    stem = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {
        f"{stem}.lora_A.weight": torch.randn(4, 3072, generator=g),
        f"{stem}.lora_B.weight": torch.randn(9216, 4, generator=g),
        f"{stem}.dora_scale": torch.rand(9216, 1, generator=g).half(),
        "bundle_emb.word.clip_l": torch.randn(2, 768, generator=g),
        "bundle_emb.word.number": torch.tensor(3.0),
        "base_model.model.head.weight": torch.randn(7, 5, generator=g).bfloat16(),
    }
    save_file(tensors, path)
    return path


def test_what_acts_beside_has_one_digest_however_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fused(tmp_path / "x.safetensors")
    whole = look(path).lora
    for place in (module, reading):
        monkeypatch.setattr(place, "STREAM_ABOVE", 0)
    streamed = look(path).lora
    assert whole is not None and streamed is not None
    assert whole.extras == streamed.extras
    assert len(whole.extras) == 6 and len(set(whole.extras.values())) == 6
    assert whole.content == streamed.content


def test_a_large_file_that_changes_after_its_pass_is_changing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is read again for its digest may be another file by then."""
    path = fused(tmp_path / "x.safetensors")
    for place in (module, reading):
        monkeypatch.setattr(place, "STREAM_ABOVE", 0)
    real = torch.equal

    def late(x: torch.Tensor, y: torch.Tensor) -> bool:
        os.utime(path, ns=(0, 12345))
        return real(x, y)

    # The last thing that is done with the numbers of a file: do they round-trip?
    monkeypatch.setattr(torch, "equal", late)
    found = look(path)
    assert (found.outcome, found.lora) == ("changing", None)
    assert "changed while it was read" in found.reason


def test_what_lorafind_fails_on_is_named_and_stops_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = fused(tmp_path / "x.safetensors")

    def fail(*_: object) -> None:
        raise MemoryError("no room\nat all")

    monkeypatch.setattr(torch, "stack", fail)
    found = look(path)
    assert (found.outcome, found.lora) == ("failed", None)
    assert found.reason == r"lorafind failed on x.safetensors: MemoryError: no room\nat all"
