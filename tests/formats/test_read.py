"""The ways to read a file agree, and none of them raises for bad input."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from lorafind.files.outcome import NotAnAdapter
from lorafind.formats import read as module
from lorafind.formats.adapter import ModulePlan
from lorafind.formats.delta import Delta
from lorafind.formats.read import Reading, open_adapter, read
from tests.formats import writers


def tensors() -> dict[str, torch.Tensor]:
    """A file of several families, with a bias that its module's alpha scales."""
    found = writers.kohya(writers.factors(writers.SD1 | writers.TE1))
    g = torch.Generator().manual_seed(5)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    found |= {
        f"{stem}.lora_B.weight": torch.randn(1280, 2, generator=g),
        f"{stem}.lora_B.bias": torch.randn(1280, generator=g),
        f"{stem}.lora_A.weight": torch.randn(2, 1280, generator=g),
        f"{stem}.alpha": torch.tensor(6.0),
        "lora_unet_conv_out.diff": torch.randn(4, 320, 3, 3, generator=g),
    }
    return {key: t.half().contiguous() for key, t in found.items()}


def dense(reading_or_modules: object) -> dict[str, torch.Tensor]:
    modules = reading_or_modules
    assert hasattr(modules, "items")
    return {name: delta.dense() for name, delta in modules.items()}


def test_whole_streamed_and_positional_reading_agree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.safetensors"
    save_file(tensors(), path)

    def reading() -> tuple[Reading, dict[str, torch.Tensor]]:
        seen: dict[str, torch.Tensor] = {}

        def visit(plan: ModulePlan, delta: Delta) -> None:
            assert plan.name not in seen
            seen[plan.name] = delta.dense()

        return read(path, visit=visit), seen

    whole, seen = reading()
    assert whole.adapter is not None and whole.plan is not None
    truth = dense(whole.adapter.modules)
    monkeypatch.setattr(module, "STREAM_ABOVE", 0)
    streamed, seen_in_stream = reading()
    assert streamed.adapter is not None
    for found in (
        seen,
        seen_in_stream,
        dense(streamed.adapter.modules),
        dense(open_adapter(path).modules),
    ):
        assert set(found) == set(truth)
        assert all(torch.equal(found[name], truth[name]) for name in truth)
    for a, b in ((whole, streamed),):
        assert a.outcome == b.outcome == "lora"
        assert (a.sha256, a.data_sha256, a.content) == (b.sha256, b.data_sha256, b.content)
        assert a.plan == b.plan
    bias = truth["unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q.bias"]
    stored = tensors()[
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q.lora_B.bias"
    ]
    assert torch.equal(bias[:, 0], stored.double() * 3)


@pytest.mark.parametrize("streamed", [False, True])
def test_values_are_judged_in_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, streamed: bool
) -> None:
    if streamed:
        monkeypatch.setattr(module, "STREAM_ABOVE", 0)
    path = tmp_path / "x.safetensors"
    found = tensors()
    found["lora_unet_conv_out.diff"][3, 319, 2, 2] = math.nan
    save_file(found, path)
    reading = read(path)
    assert reading.outcome == "invalid" and "unet/conv_out" in reading.reason
    assert reading.adapter is None and reading.content is not None
    zero = {
        k: torch.zeros_like(t) if "up" in k or "diff" in k or "lora_B" in k else t
        for k, t in tensors().items()
    }
    save_file(zero, path)
    reading = read(path)
    assert reading.outcome == "zero"
    assert reading.adapter is not None
    assert all(delta.is_zero for delta in reading.adapter.modules.values())


def test_pytorch_files_hold_the_same(tmp_path: Path) -> None:
    save_file(tensors(), tmp_path / "x.safetensors")
    torch.save(tensors(), tmp_path / "x.pt")
    one = read(tmp_path / "x.safetensors")
    two = read(tmp_path / "x.pt", allow_pickle=True)
    assert one.content == two.content
    assert one.plan == two.plan
    assert one.adapter is not None and two.adapter is not None
    truth = dense(one.adapter.modules)
    for adapter in (two.adapter, open_adapter(tmp_path / "x.pt", allow_pickle=True)):
        found = dense(adapter.modules)
        assert all(torch.equal(found[name], truth[name]) for name in truth)
    assert read(tmp_path / "x.pt").outcome == "pickle"
    with pytest.raises(NotAnAdapter):
        open_adapter(tmp_path / "x.pt")


def test_names_are_looked_up_once_per_layout(tmp_path: Path) -> None:
    for i in range(2):
        shapes = writers.factors(writers.SD1, seed=i)
        save_file(
            {k: t.clone() for k, t in writers.kohya(shapes).items()},
            tmp_path / f"{i}.safetensors",
            {"ss_seed": str(i), "ss_base_model_version": "sd_v1" if i else "sd_v2"},
        )
    one, two = (read(tmp_path / f"{i}.safetensors").plan for i in range(2))
    assert one is not None and two is not None
    assert one.modules is two.modules
    assert (one.hints, two.hints) == ({"architecture": "sd2"}, {"architecture": "sd1"})


def test_dtypes_are_told(tmp_path: Path) -> None:
    found = {k: t.bfloat16().float() for k, t in tensors().items()}
    save_file(found, tmp_path / "x.safetensors")
    reading = read(tmp_path / "x.safetensors")
    opened = open_adapter(tmp_path / "x.safetensors")
    assert reading.adapter is not None
    for adapter in (reading.adapter, opened):
        assert (adapter.dtype, adapter.effective_dtype) == ("F32", "BF16")


def test_an_alpha_that_is_finer_does_not_count(tmp_path: Path) -> None:
    found = {k: t.float() if k.endswith("alpha") else t for k, t in tensors().items()}
    found[next(k for k in found if k.endswith("alpha"))] = torch.tensor(1 / 3)
    save_file(found, tmp_path / "x.safetensors")
    reading = read(tmp_path / "x.safetensors")
    assert reading.adapter is not None
    assert (reading.adapter.dtype, reading.adapter.effective_dtype) == ("F16", "F16")


def test_bundled_embeddings_and_saved_modules_are_extras(tmp_path: Path) -> None:
    found = tensors() | {
        "bundle_emb.krk.string_to_param.*": torch.ones(2, 768),
        "base_model.model.head.weight": torch.ones(3, 3),
        "<s1>": torch.ones(768),
        "_aux.slider": torch.ones(1),
    }
    save_file(found, tmp_path / "x.safetensors")
    plan = read(tmp_path / "x.safetensors").plan
    assert plan is not None
    assert set(plan.extras.values()) == {
        "bundle_emb.krk.string_to_param.*",
        "base_model.model.head.weight",
        "<s1>",
    }
    assert plan.keys["_aux.slider"] == "leftover"
    assert plan.unknown_keys == []


def test_what_is_not_understood_is_listed(tmp_path: Path) -> None:
    found = tensors() | {
        "lora_unet_conv_in.lora_up.weight": torch.ones(320, 2),
        "lora_unet_conv_in.vblora_logits_A": torch.ones(2, 2, 2),
        "lora_unet_conv_out.reshape_weight": torch.ones(2, dtype=torch.int64),
    }
    save_file(found, tmp_path / "x.safetensors")
    plan = read(tmp_path / "x.safetensors").plan
    assert plan is not None
    reshaped = "lora_unet_conv_out.reshape_weight"
    assert set(plan.unknown_keys) == set(found) - set(tensors()) - {reshaped}
    assert plan.extras == {"unet/conv_out.reshape_weight": reshaped}
    assert any("VB-LoRA" in note for note in plan.notes)
    assert set(plan.keys) == set(found)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_reading_never_raises(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = bytearray(save({k: t[:4] if t.dim() else t for k, t in tensors().items()}))
    for _ in range(data.draw(st.integers(0, 4))):
        good[data.draw(st.integers(0, 2000))] = data.draw(st.integers(0, 255))
    path = tmp_path_factory.mktemp("fuzz") / "x.safetensors"
    path.write_bytes(
        good[: data.draw(st.integers(0, len(good)))] if data.draw(st.booleans()) else good
    )
    reading = read(path)
    assert reading.outcome and isinstance(reading.reason, str)
    assert (reading.outcome in ("lora", "zero")) == (reading.adapter is not None)


def test_missing_files_are_vanished(tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.pt"):
        assert read(tmp_path / name, allow_pickle=True).outcome == "vanished"
    (tmp_path / "d.safetensors").mkdir()
    assert read(tmp_path / "d.safetensors").outcome == "not-a-file"
