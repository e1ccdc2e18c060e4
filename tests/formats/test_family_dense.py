"""ΔW of the families that a file writes whole: against the formula in float64, over all shapes.

Ranks, shapes, dtypes, linear layers, convolutions (two and three dimensions) and Tucker forms come
from Hypothesis; inner products go through the factors and must agree with the dense ones.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

from lorafind.formats.delta import Delta
from lorafind.formats.read import read
from lorafind.signatures.products import gram_inner, inner, products
from tests.formats.one_module import STEM, close, deltas_of, f64, forms_of, module

ALL = settings(max_examples=60, deadline=None)
KERNELS = st.sampled_from([(), (1, 1), (3, 3), (1, 3), (3, 1, 1), (2, 3, 3)])
Parts = dict[str, Tensor]


class Numbers:
    """Random tensors from a seed, of one stored dtype."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        self.generator = torch.Generator().manual_seed(seed)
        self.dtype = dtype

    def __call__(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator).to(self.dtype)


@st.composite
def numbers(draw: st.DrawFn) -> Numbers:
    dtype = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.float64]))
    return Numbers(draw(st.integers(0, 2**32 - 1)), dtype)


@st.composite
def alphas(draw: st.DrawFn) -> tuple[Parts, Callable[[int], float]]:
    """The parts of a module that say its scale, and that scale for a rank."""
    value = draw(st.sampled_from([None, 1.0, 4.0, 0.5, -2.0, 16.0]))
    if value is None:
        return {}, lambda rank: 1.0
    stored = torch.tensor(value)
    if draw(st.booleans()):
        stored = stored.reshape(1)
    kind = draw(st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
    if value == int(value) and draw(st.booleans()):
        kind = torch.int64
    return {"alpha": stored.to(kind)}, lambda rank: value / rank


Alphas = tuple[Parts, Callable[[int], float]]
DIMS = st.integers(1, 9)
RANKS = st.integers(1, 6)


def only(parts: Parts, family: str, rank: int, dims: int | None = None) -> Delta:
    """The one ΔW of a module, and that its Form says what it is."""
    tensors = module(parts)
    (form,) = forms_of(tensors)
    assert (form.family, form.rank, form.suffix, form.parameters) == (family, rank, "", False)
    assert form.layer == form.shape
    assert dims is None or form.dims == dims
    assert form.scaled or "alpha" not in parts or family in ("full", "lokr")
    return deltas_of(tensors)[""]


def lora(g: Numbers, o: int, i: int, r: int, kernel: tuple[int, ...]) -> tuple[Parts, np.ndarray]:
    ones = (1,) * len(kernel)
    up, down = g(o, r, *ones), g(r, i, *kernel)
    dense = np.einsum("or,r...->o...", f64(up).reshape(o, r), f64(down))
    return {"lora_up.weight": up, "lora_down.weight": down}, dense


@ALL
@given(numbers(), DIMS, DIMS, RANKS, KERNELS, alphas())
def test_lora(g: Numbers, o: int, i: int, r: int, kernel: tuple[int, ...], alpha: Alphas) -> None:
    parts, dense = lora(g, o, i, r, kernel)
    close(only(parts | alpha[0], "lora", r, 2 + len(kernel)), alpha[1](r) * dense)


@ALL
@given(numbers(), DIMS, DIMS, RANKS, RANKS, KERNELS.filter(bool), alphas())
def test_locon_tucker(
    g: Numbers, o: int, i: int, r: int, q: int, kernel: tuple[int, ...], alpha: Alphas
) -> None:
    ones = (1,) * len(kernel)
    up, mid, down = g(o, q, *ones), g(q, r, *kernel), g(r, i, *ones)
    parts = {"lora_up.weight": up, "lora_mid.weight": mid, "lora_down.weight": down}
    dense = np.einsum(
        "om,mn...,ni->oi...", f64(up).reshape(o, q), f64(mid), f64(down).reshape(r, i)
    )
    close(only(parts | alpha[0], "lora", r), alpha[1](r) * dense)


@ALL
@given(numbers(), DIMS, DIMS, RANKS, RANKS, KERNELS, alphas())
def test_loha(
    g: Numbers, o: int, i: int, r: int, q: int, kernel: tuple[int, ...], alpha: Alphas
) -> None:
    n = i * math.prod(kernel)
    parts = {
        "hada_w1_a": g(o, r),
        "hada_w1_b": g(r, n),
        "hada_w2_a": g(o, q),
        "hada_w2_b": g(q, n),
    }
    w1a, w1b, w2a, w2b = map(f64, parts.values())
    close(only(parts | alpha[0], "loha", r), alpha[1](r) * (w1a @ w1b) * (w2a @ w2b))


@ALL
@given(numbers(), DIMS, DIMS, RANKS, KERNELS.filter(bool), alphas())
def test_loha_tucker(
    g: Numbers, o: int, i: int, r: int, kernel: tuple[int, ...], alpha: Alphas
) -> None:
    parts: Parts = {}
    halves = []
    for half in "12":
        a, b, t = g(r, o), g(r, i), g(r, r, *kernel)
        parts |= {f"hada_w{half}_a": a, f"hada_w{half}_b": b, f"hada_t{half}": t}
        halves.append(np.einsum("mn...,mo,ni->oi...", f64(t), f64(a), f64(b)))
    close(only(parts | alpha[0], "loha", r), alpha[1](r) * halves[0] * halves[1])


SECONDS = ("whole", "factored", "tucker")


@pytest.mark.parametrize("second", SECONDS)
@pytest.mark.parametrize("first", ["whole", "factored"])
@settings(max_examples=25, deadline=None)
@given(numbers(), st.lists(st.integers(1, 5), min_size=6, max_size=6), KERNELS, alphas())
def test_lokr(
    first: str, second: str, g: Numbers, sizes: list[int], kernel: tuple[int, ...], alpha: Alphas
) -> None:
    """r is the rows of w2_b, else of w1_b; whole factors know no α (FORMATS-SD 3.3)."""
    a, c, b, d, r1, r2 = sizes
    parts: Parts = {}
    if first == "whole":
        parts["lokr_w1"] = g(a, c)
        one = f64(parts["lokr_w1"])
    else:
        parts |= {"lokr_w1_a": g(a, r1), "lokr_w1_b": g(r1, c)}
        one = f64(parts["lokr_w1_a"]) @ f64(parts["lokr_w1_b"])
    if second == "whole":
        parts["lokr_w2"] = g(b, d, *kernel)
        two = f64(parts["lokr_w2"])
    elif second == "factored":
        n = d * math.prod(kernel)
        parts |= {"lokr_w2_a": g(b, r2), "lokr_w2_b": g(r2, n)}
        two = (f64(parts["lokr_w2_a"]) @ f64(parts["lokr_w2_b"])).reshape(b, d, *kernel)
    else:
        kernel = kernel or (1, 1)
        parts |= {"lokr_w2_a": g(r2, b), "lokr_w2_b": g(r2, d), "lokr_t2": g(r2, r2, *kernel)}
        two = np.einsum(
            "mn...,mb,nd->bd...",
            *(f64(parts[k]) for k in ("lokr_t2", "lokr_w2_a", "lokr_w2_b")),
        )
    rank = r2 if second != "whole" else r1 if first == "factored" else None
    dense = np.kron(one.reshape(a, c, *(1,) * len(kernel)), two)
    scale = 1.0 if rank is None else alpha[1](rank)
    delta = only(parts | alpha[0], "lokr", rank or min(a * b, c * d * math.prod(kernel)))
    close(delta, scale * dense)


@ALL
@given(numbers(), DIMS, DIMS, KERNELS, alphas())
def test_full(g: Numbers, o: int, i: int, kernel: tuple[int, ...], alpha: Alphas) -> None:
    """α says nothing about a difference that is written out."""
    diff = g(o, i, *kernel)
    delta = only({"diff": diff} | alpha[0], "full", min(o, i * math.prod(kernel)))
    close(delta, f64(diff))


def test_a_norm_that_is_written_twice_is_read_once() -> None:
    """``diff`` of a vector is a norm's weight, as ``w_norm`` is."""
    tensors = module({"diff": torch.ones(4), "w_norm": torch.ones(4) * 2, "b_norm": torch.ones(4)})
    found = deltas_of(tensors)
    assert found.keys() == {"weight", "bias"}
    close(found["weight"], torch.ones(4))


@ALL
@given(numbers(), DIMS, DIMS, RANKS, st.booleans(), alphas())
def test_glora(g: Numbers, o: int, i: int, r: int, old: bool, alpha: Alphas) -> None:
    """Both layouts: the b part is ΔW, the a part is compared as it stands."""
    assume(r <= min(o, i))  # of two readings of a square layer the one of lower rank is taken
    new = {"a1": (i, r), "a2": (r, i), "b1": (o, r), "b2": (r, i)}
    shapes = {"a1": (r, i), "a2": (i, r), "b1": (r, i), "b2": (o, r)} if old else new
    parts = {f"{k}.weight": g(*shape) for k, shape in shapes.items()}
    a1, a2, b1, b2 = (f64(t) for t in parts.values())
    if old and r == i == o:
        old = False  # nothing tells them apart
    found = deltas_of(module(parts | alpha[0]))
    s = alpha[1](r)
    close(found[""], s * (b2 @ b1 if old else b1 @ b2))
    close(found["glora_a"], s * (a2 @ a1 if old else a1 @ a2))


@ALL
@given(numbers(), DIMS, DIMS, RANKS, st.integers(1, 20))
def test_a_sparse_residual_is_added_before_the_scale(
    g: Numbers, o: int, i: int, r: int, count: int
) -> None:
    parts, dense = lora(g, o, i, r, ())
    count = min(count, o * i)
    places = torch.randperm(o * i, generator=g.generator)[:count]
    indices, values = torch.stack([places // i, places % i]).short(), g(count).half()
    dense[indices[0].numpy(), indices[1].numpy()] += f64(values)
    parts |= {
        "alpha": torch.tensor([2.0 * r]),
        "bias_indices": indices,
        "bias_values": values,
        "bias_size": torch.tensor([o, i], dtype=torch.int16),
    }
    tensors = module(parts)
    (form,) = forms_of(tensors)
    assert set(form.beside) == {"bias_indices", "bias_size"}
    close(deltas_of(tensors)[""], 2.0 * dense)


@pytest.mark.parametrize(
    ("rows", "columns", "size"),
    [([4], [0], [4, 5]), ([-1], [0], [4, 5]), ([0], [5], [4, 5]), ([0], [0], [5, 4])],
)
def test_a_residual_of_another_shape_is_refused(
    tmp_path: Path, rows: list[int], columns: list[int], size: list[int]
) -> None:
    parts = {
        "lora_up.weight": torch.ones(4, 2),
        "lora_down.weight": torch.ones(2, 5),
        "bias_indices": torch.tensor([rows, columns], dtype=torch.int16),
        "bias_values": torch.ones(1),
        "bias_size": torch.tensor(size, dtype=torch.int16),
    }
    save_file(module(parts), tmp_path / "x.safetensors")
    reading = read(tmp_path / "x.safetensors")
    assert reading.outcome == "invalid"
    assert "sparse residual" in reading.reason and STEM in reading.reason


MAKERS: dict[str, Callable[[Numbers], Parts]] = {
    "lora": lambda g: {"lora_up.weight": g(24, 2), "lora_down.weight": g(2, 36)},
    "wide": lambda g: {"lora_up.weight": g(24, 30), "lora_down.weight": g(30, 36)},
    "conv": lambda g: {"lora_up.weight": g(24, 2, 1, 1), "lora_down.weight": g(2, 4, 3, 3)},
    "tucker": lambda g: {
        "lora_up.weight": g(24, 2, 1, 1),
        "lora_mid.weight": g(2, 2, 3, 3),
        "lora_down.weight": g(2, 4, 1, 1),
    },
    "loha": lambda g: {
        f"hada_w{i}_{s}": g(*((24, 3) if s == "a" else (3, 36))) for i in "12" for s in "ab"
    },
    "lokr": lambda g: {"lokr_w1": g(4, 6), "lokr_w2": g(6, 6)},
    "lokr_low": lambda g: {"lokr_w1": g(2, 2), "lokr_w2_a": g(12, 2), "lokr_w2_b": g(2, 18)},
    "full": lambda g: {"diff": g(24, 4, 3, 3)},
    "glora": lambda g: {
        "a1.weight": g(36, 2),
        "a2.weight": g(2, 36),
        "b1.weight": g(24, 2),
        "b2.weight": g(2, 36),
    },
    "adalora": lambda g: {"lora_A": g(3, 36), "lora_B": g(24, 3), "lora_E": g(3, 1)},
    "sparse": lambda g: {
        "lora_up.weight": g(24, 2),
        "lora_down.weight": g(2, 36),
        "bias_indices": torch.tensor([[0, 23], [35, 1]], dtype=torch.int16),
        "bias_values": g(2),
        "bias_size": torch.tensor([24, 36], dtype=torch.int16),
    },
}


@pytest.mark.parametrize("second", MAKERS)
@pytest.mark.parametrize("first", MAKERS)
def test_inner_products(first: str, second: str) -> None:
    """⟨X, Y⟩, the norms and ⟨XXᵀ, YYᵀ⟩ of every pair of families."""
    g = Numbers(len(first) * 31 + len(second), torch.float32)
    x, y = (deltas_of(module(MAKERS[name](g)))[""] for name in (first, second))
    a, b = x.dense(), y.dense()
    size = float(a.norm() * b.norm())
    assert abs(inner(x, y) - float((a * b).sum())) <= 1e-12 * size
    assert gram_inner(x, y) == pytest.approx(float((a.T @ b).square().sum()), rel=1e-9)
    found = products(x, y)
    assert found.xx == pytest.approx(float(a.square().sum()), rel=1e-12)
    assert found.yy == pytest.approx(float(b.square().sum()), rel=1e-12)
