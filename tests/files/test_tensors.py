"""Bytes as tensors, and the precision that they really have."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafind.files import safetensors as files
from lorafind.files.header import READABLE
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import TensorInfo
from lorafind.files.tensors import (
    DTYPES,
    all_finite,
    as_tensor,
    effective_dtype,
    fetch_stored,
    runs,
)

G = torch.Generator().manual_seed(3)


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=G)


@pytest.mark.parametrize("name", sorted(set(DTYPES) - {"C64"}))
def test_every_dtype_is_what_the_reference_reads(tmp_path: Path, name: str) -> None:
    dtype = DTYPES[name]
    whole = dtype.is_floating_point or dtype == torch.bool
    source = rand(3, 5) if whole else torch.arange(15).reshape(3, 5)
    path = tmp_path / "x.safetensors"
    save_file({"a": source.to(dtype), "b": torch.ones(1, dtype=torch.uint8)}, path)
    stored = files.load(path)
    reference = load_file(path)["a"]
    for found in (
        fetch_stored(stored)("a"),
        as_tensor(stored.header.tensors["a"], stored.raw("a")),
    ):
        assert found.dtype == dtype and found.shape == (3, 5)
        assert torch.equal(found.view(torch.uint8), reference.view(torch.uint8))


def test_unaligned_and_empty_tensors_are_read() -> None:
    raw = memoryview(bytearray(b"x" + torch.tensor([1.0, 2.0]).numpy().tobytes()))
    found = as_tensor(TensorInfo("F32", (2,), 1, 9), raw[1:])
    assert found.tolist() == [1.0, 2.0]
    assert as_tensor(TensorInfo("F16", (0, 4), 0, 0), raw[:0]).shape == (0, 4)


def test_tensors_look_into_the_buffer(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": rand(4)}, path)
    buffer = bytearray(16)
    stored = files.load(path, buffer)
    found = fetch_stored(stored)("a")
    buffer[:] = bytes(16)
    assert found.tolist() == [0.0] * 4


def test_dtypes_that_torch_lacks_are_named() -> None:
    with pytest.raises(NotAnAdapter, match="F4") as caught:
        as_tensor(TensorInfo("F4", (2,), 0, 1), bytearray(1))
    assert caught.value.outcome == "unsupported"


@pytest.mark.parametrize(
    ("through", "stored", "found"),
    [
        (torch.float32, torch.float32, "F32"),
        (torch.float16, torch.float32, "F16"),
        (torch.bfloat16, torch.float32, "BF16"),
        (torch.float8_e4m3fn, torch.float32, "F8_E4M3"),
        (torch.float8_e5m2, torch.float16, "F8_E5M2"),
        (torch.float8_e4m3fn, torch.bfloat16, "F8_E4M3"),
        (torch.bfloat16, torch.bfloat16, "BF16"),
        (torch.float16, torch.float16, "F16"),
        (torch.float32, torch.float64, "F32"),
        (torch.float64, torch.float64, "F64"),
    ],
)
def test_the_effective_dtype_is_the_coarsest(
    through: torch.dtype, stored: torch.dtype, found: str
) -> None:
    source = [torch.randn(n, 40, generator=G, dtype=torch.float64) for n in (5, 200, 33)]
    tensors = [t.to(through).to(stored) for t in source]
    names = {dtype: name for name, dtype in DTYPES.items()}
    assert effective_dtype(tensors, names[stored]) == found


def test_one_number_decides_even_where_no_sample_looks() -> None:
    tensors = [rand(500, 500).bfloat16().float() for _ in range(40)]
    assert effective_dtype(tensors, "F32") == "BF16"
    tensors[37][499, 498] = 1 + 2**-20
    assert effective_dtype(tensors, "F32") == "F32"


def test_the_order_between_both_eights_and_halves() -> None:
    """BF16 keeps a range that F16 loses, F16 digits that BF16 loses."""
    assert effective_dtype([torch.tensor([2.0**-100])], "F32") == "BF16"
    assert effective_dtype([torch.tensor([1 + 2**-9])], "F32") == "F16"
    assert effective_dtype([torch.tensor([1 + 2**-9, 2.0**-100])], "F32") == "F32"


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite(dtype: torch.dtype, value: float) -> None:
    t = rand(1001).to(dtype)
    assert all_finite(t)
    largest = min(torch.finfo(dtype).max, torch.finfo(torch.float32).max)
    assert all_finite(torch.full((9,), largest, dtype=dtype))
    t[500] = value
    assert not all_finite(t)


def test_what_float32_cannot_hold_is_not_finite() -> None:
    largest = torch.finfo(torch.float32).max
    assert not all_finite(torch.tensor([1.0, largest * 1.1], dtype=torch.float64))
    assert not all_finite(torch.tensor([1.0, -1e300], dtype=torch.float64))
    assert all_finite(torch.tensor([1e-300], dtype=torch.float64))


def test_not_finite_in_eight_bits() -> None:
    assert all_finite(torch.tensor([448.0]).to(torch.float8_e4m3fn))
    assert not all_finite(torch.tensor([math.nan]).to(torch.float8_e4m3fn))
    assert not all_finite(torch.tensor([math.inf]).to(torch.float8_e5m2))


def test_runs_join_neighbours_of_one_dtype(tmp_path: Path) -> None:
    tensors = {"a": rand(3).half(), "b": rand(2, 2).half(), "c": rand(4), "d": torch.arange(3)}
    path = tmp_path / "x.safetensors"
    save_file(tensors, path)
    stored = files.load(path)
    found = runs(stored.header, stored.data, tensors)
    assert sorted((str(t.dtype), t.numel()) for t in found) == [
        ("torch.float16", 7),
        ("torch.float32", 4),
    ]
    half = next(t for t in found if t.dtype == torch.float16)
    assert torch.equal(half, torch.cat([tensors["a"], tensors["b"].reshape(-1)]))
    assert len(runs(stored.header, stored.data, ["a", "c"])) == 2


def test_runs_leave_out_what_was_not_asked_for(tmp_path: Path) -> None:
    save_file({n: torch.full((2,), i + 1.0) for i, n in enumerate("abc")}, tmp_path / "x")
    stored = files.load(tmp_path / "x")
    assert [t.tolist() for t in runs(stored.header, stored.data, "ca")] == [[1, 1], [3, 3]]


def test_readable_dtypes_are_those_that_torch_has() -> None:
    assert DTYPES.keys() == READABLE
