"""Shapes that contradict each other, and shapes that would take all memory: refused by their size.

Nothing is bound here: a Form is made of shapes alone, so that no shape can cost more than its text.
"""

from __future__ import annotations

import resource
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import TensorInfo
from lorafind.files.tensors import DTYPES
from lorafind.formats import families, keys
from lorafind.formats.adapter import Plan
from lorafind.formats.delta import ROUNDING, Skew
from lorafind.formats.families import Form, Scale
from lorafind.formats.families.common import LARGEST, LARGEST_DENSE, LARGEST_RANK, Stored
from lorafind.formats.plan import understand
from tests.formats.one_module import deltas_of

Shapes = dict[str, tuple[int, ...]]


def forms(parts: Shapes, dtype: str = "F32") -> list[Form]:
    """The Forms of a module from the shapes of its tensors by suffix."""
    named = {f"net.layer.{suffix}": shape for suffix, shape in parts.items()}
    roles = {
        part.role: Stored(key, dtype, named[key])
        for key, part in keys.split_all(named).items()
        if not part.role.startswith("plain")
    }
    return families.find_all(roles, Scale("net.layer.alpha" if "alpha" in parts else None))


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_up.weight": (6, 3), "lora_down.weight": (4, 5)},
        {"lora_up.weight": (6, 0), "lora_down.weight": (0, 5)},
        {"lora_up.weight": (0, 3), "lora_down.weight": (3, 5)},
        {"lora_up.weight": (6, 3), "lora_down.weight": (3, 0)},
        {"lora_up.weight": (6,), "lora_down.weight": (1, 5)},
        {"lora_up.weight": (), "lora_down.weight": (1, 5)},
        {"lora_up.weight": (6, 1), "lora_down.weight": (1, 5), "alpha": (2,)},
        {"lora_up.weight": (6, 1), "lora_down.weight": (1, 5), "alpha": (1, 0)},
        {"lora_up.weight": (6, 1), "lora_down.weight": (1, 5), "scale": (3,)},
        {"lora_up.weight": (6, 3), "lora_down.weight": (4, 5), "lora_mid.weight": (3, 3, 3, 3)},
        {"lora_up.weight": (6, 3), "lora_down.weight": (3, 5), "lora_mid.weight": (3, 3)},
        {"lora_up.weight": (6, 3), "lora_down.weight": (3, 5), "lora_mid.weight": (3, 3, 0, 3)},
        {"lora_embedding_A": (3, 50), "lora_embedding_B": (8, 2)},
        {"hada_w1_a": (6, 3), "hada_w1_b": (3, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 4)},
        {"hada_w1_a": (6, 3), "hada_w1_b": (2, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 5)},
        {"hada_w1_a": (6, 0), "hada_w1_b": (0, 5), "hada_w2_a": (6, 3), "hada_w2_b": (3, 5)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 3), "lokr_w2_b": (2, 5)},
        {"lokr_w1": (2,), "lokr_w2": (4, 3)},
        {"lokr_w1": (2, 0), "lokr_w2": (4, 3)},
        {"diff": (0, 4)},
        {"a1.weight": (4, 2), "a2.weight": (3, 4), "b1.weight": (6, 2), "b2.weight": (2, 4)},
        {"a1.weight": (4,), "a2.weight": (2, 4), "b1.weight": (6, 2), "b2.weight": (2, 4)},
        {"lora_A": (2, 4), "lora_B": (4, 2), "lora_E": (3, 1)},
        {"lora_A": (2, 4), "lora_B": (4, 2), "lora_E": (2, 1), "ranknum": (2,)},
        {"lora_up.weight": (4, 2), "lora_down.weight": (2, 4), "bias_values": (3,)},
        {
            "lora_up.weight": (4, 2),
            "lora_down.weight": (2, 4),
            "bias_values": (3,),
            "bias_indices": (2, 4),
            "bias_size": (2,),
        },
        {"oft_blocks": (4, 3, 2)},
        {"oft_blocks": (4, 4)},
        {"oft_diag": (4,)},
        {"oft_R.weight": (4, 4)},
        {"oft_R.weight": (4, 0)},
        {"oft_R.weight": (4,)},
        {"boft_R": (4, 2, 2)},
        {"boft_R": (1, 2, 2, 2), "boft_s": (2, 2)},
        {"oft_blocks": (4, 2, 2), "rescale": (2, 4)},
        {"ia3_l": (4,)},
        {"ia3_l": (4, 2)},
        {"weight": (4, 2), "on_input": ()},
        {"weight": (4,), "on_input": (4,)},
        {"vera_lambda_b": (4, 2)},
        {"fourierft_spectrum": (4, 2)},
        {"hra_u": (4,)},
        {"randlora_lambda": (4,)},
    ],
)
def test_contradictions(parts: Shapes) -> None:
    with pytest.raises(NotAnAdapter) as refused:
        forms(parts)
    assert refused.value.outcome == "invalid"
    assert "net.layer" in refused.value.reason


@pytest.mark.parametrize(
    ("parts", "outcome"),
    [
        ({"lora_up.weight": (10**9, 1), "lora_down.weight": (1, 10**9)}, "unsupported"),
        ({"lora_up.weight": (1, 10**9), "lora_down.weight": (10**9, 1)}, "invalid"),
        ({"lora_up.weight": (10**9, 0), "lora_down.weight": (0, 10**9)}, "invalid"),
        ({"lokr_w1": (60000, 60000), "lokr_w2": (60000, 60000)}, "unsupported"),
        (
            {
                "lokr_w1_a": (10**6, 1),
                "lokr_w1_b": (1, 10**6),
                "lokr_w2_a": (1, 1),
                "lokr_w2_b": (1, 1),
            },
            "unsupported",
        ),
        (
            {f"hada_w{i}_{s}": (10**6, 1) if s == "a" else (1, 10**6) for i in "12" for s in "ab"},
            "unsupported",
        ),
        (
            # Tucker: o is small, but the core and the inputs make a large right side.
            {
                "lora_up.weight": (1, 4000, 1, 1),
                "lora_mid.weight": (4000, 1, 1, 1),
                "lora_down.weight": (1, 200_000, 1, 1),
            },
            "unsupported",
        ),
        (
            {
                **{f"hada_w{i}_a": (4000, 1) for i in "12"},
                **{f"hada_w{i}_b": (1, 200_000) for i in "12"},
                **{f"hada_t{i}": (4000, 1, 1, 1) for i in "12"},
            },
            "unsupported",
        ),
        ({"diff": (10**6, 10**6)}, "unsupported"),
        ({"oft_R.weight": (1, 10**9 * (10**9 - 1) // 2)}, "unsupported"),
        (
            {"a1.weight": (10**6, 2), "a2.weight": (2, 10**6), "b1.weight": (6, 2)}
            | {"b2.weight": (2, 10**6)},
            "unsupported",
        ),
        (
            {
                "lora_up.weight": (10**5, 2),
                "lora_down.weight": (2, 10**4),
                "bias_values": (3,),
                "bias_indices": (2, 3),
                "bias_size": (2,),
            },
            "invalid",  # indices that are no integers
        ),
    ],
)
def test_what_would_not_fit_in_memory(parts: Shapes, outcome: str) -> None:
    with pytest.raises(NotAnAdapter) as refused:
        forms(parts)
    assert refused.value.outcome == outcome
    assert "net.layer" in refused.value.reason


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_up.weight": (256_000, 8), "lora_down.weight": (8, 4608)},  # an embedding
        {"lora_up.weight": (6144, 128), "lora_down.weight": (128, 64)},  # rank above the layer
        {"lokr_w1": (16, 16), "lokr_w2": (3456, 384)},  # linear1 of Flux.2
        {"diff": (55_296, 6144)},
    ],
)
def test_the_largest_real_layers_are_read(parts: Shapes) -> None:
    (form,) = forms(parts)
    assert form.shape[0] * form.shape[1] <= LARGEST


SUFFIXES = st.sampled_from(
    [
        *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "scale", "dora_scale"),
        *(f"hada_w{i}_{s}" for i in "12" for s in "ab"),
        *("hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a"),
        *("lokr_w2_b", "lokr_t2", "diff", "diff_b", "diff_m", "set_weight", "w_norm", "b_norm"),
        *("a1.weight", "a2.weight", "b1.weight", "b2.weight", "bm.weight", "reshape_weight"),
        *("oft_blocks", "rescale", "oft_diag", "oft_R.weight", "oft_R.scaled_oft", "oft_r"),
        *("boft_R", "boft_s", "ia3_l", "weight", "on_input", "lora_E", "ranknum", "hra_u"),
        *("vera_lambda_b", "vera_lambda_d", "vera_A", "vera_B", "fourierft_spectrum"),
        *("randlora_lambda", "randlora_gamma", "lora_embedding_A", "lora_embedding_B"),
        *("bias_indices", "bias_values", "bias_size", "lora_B.bias"),
    ]
)
SIZES = st.one_of(st.integers(0, 4), st.sampled_from([10**3, 10**5, 2**31, 10**9, 2**62]))


@settings(max_examples=400, deadline=None)
@given(
    parts=st.dictionaries(SUFFIXES, st.lists(SIZES, max_size=5).map(tuple), max_size=8),
    dtype=st.sampled_from(["F32", "F16", "I64", "BOOL", "C64", "F8_E4M3", "F4"]),
)
def test_any_shapes_make_forms_or_a_reason(parts: Shapes, dtype: str) -> None:
    """Never another error, and never a Form of more numbers than memory holds."""
    try:
        found = forms(parts, dtype)
    except NotAnAdapter as refused:
        assert refused.outcome in ("invalid", "unsupported") and refused.reason
        return
    for form in found:
        o, n = form.shape
        low = form.family in ("lora", "glora", "adalora", "full")
        assert 0 < o * n <= (LARGEST if low else LARGEST_DENSE)
        assert form.rank <= max(LARGEST_RANK, o, n) or form.family in ("loha", "lokr")


def test_refusing_costs_neither_time_nor_memory() -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    for _ in range(100):
        with pytest.raises(NotAnAdapter):
            forms({"lokr_w1": (60000, 60000), "lokr_w2": (60000, 60000)})
    assert time.perf_counter() - start < 1.0
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000


KINDS = st.sampled_from(["F32", "F16", "BF16", "F64", "F8_E4M3", "F8_E5M2", "I64", "BOOL", "U8"])


@settings(max_examples=400, deadline=None)
@given(
    parts=st.dictionaries(
        SUFFIXES,
        st.tuples(st.lists(st.integers(1, 3), max_size=5).map(tuple), KINDS),
        min_size=1,
        max_size=8,
    ),
    fill=st.sampled_from([0.0, 1.0, -1.0, 3e4, float("nan"), float("inf")]),
)
def test_whatever_has_a_form_can_be_computed(
    parts: dict[str, tuple[tuple[int, ...], str]], fill: float
) -> None:
    """Small shapes of any dtype: all numbers of a ΔW come without an error."""
    tensors = {
        f"net.layer.{suffix}": torch.full(shape, fill).to(DTYPES[dtype])
        for suffix, (shape, dtype) in parts.items()
    }
    try:
        found = deltas_of(tensors, stem="net.layer") if _has(tensors) else {}
    except NotAnAdapter as refused:
        assert refused.outcome in ("invalid", "unsupported")
        return
    for delta in found.values():
        o, _ = delta.shape
        assert delta.dense().shape == delta.shape
        assert isinstance(delta.is_zero, bool) and isinstance(delta.is_finite(), bool)
        if delta.is_finite():
            assert delta.squared_norm() >= 0.0
            assert delta.squared_rounding(ROUNDING["F16"]) >= 0.0
        if o > 1 and not isinstance(delta, Skew):
            assert delta.rows(0, 1).dense().shape == (1, delta.shape[1])


def _has(tensors: dict[str, torch.Tensor]) -> bool:
    return any(part.stem == "net.layer" for part in keys.split_all(tensors).values())


def test_large_tucker_cores_are_refused() -> None:
    def plan(width: int) -> Plan:
        shapes = {
            "lokr_w1": (1, 1),
            "lokr_w2_a": (4, width),
            "lokr_w2_b": (4, 2560),
            "lokr_t2": (4, 4, 3, 3),
        }
        stem = "lora_unet_net_0_layer"
        headers = {f"{stem}.{k}": TensorInfo("F16", s, 0, 0) for k, s in shapes.items()}
        return understand(headers, {})

    assert plan(1280).modules[0].shape == (1280, 23040)
    with pytest.raises(NotAnAdapter, match="larger than the layers of known models"):
        plan(12800)


def test_magnitudes_that_cannot_be_read_are_said_at_once() -> None:
    shapes = {"lora_up.weight": (6, 2), "lora_down.weight": (2, 5), "dora_scale": (6, 1)}
    headers = {
        f"lora_unet_net_layer.{k}": TensorInfo("F8_E8M0" if k == "dora_scale" else "F16", s, 0, 0)
        for k, s in shapes.items()
    }
    with pytest.raises(NotAnAdapter, match="F8_E8M0, which is not read yet"):
        understand(headers, {})


@pytest.mark.parametrize(
    "parts",
    [
        {"lora_up.weight": (6, 0), "lora_down.weight": (0, 5)},
        {"lora_embedding_A": (0, 50), "lora_embedding_B": (8, 0)},
        {"hada_w1_a": (6, 0), "hada_w1_b": (0, 5), "hada_w2_a": (6, 0), "hada_w2_b": (0, 5)},
        {"lokr_w1": (2, 2), "lokr_w2_a": (4, 0), "lokr_w2_b": (0, 5)},
        {"lora_A": (0, 5), "lora_B": (6, 0), "lora_E": (0, 1)},
    ],
)
def test_rank_0_under_a_configured_alpha(parts: Shapes) -> None:
    named = {f"net.layer.{suffix}": shape for suffix, shape in parts.items()}
    roles = {
        part.role: Stored(key, "F32", named[key]) for key, part in keys.split_all(named).items()
    }
    with pytest.raises(NotAnAdapter) as caught:
        families.find_all(roles, Scale(None, 2.0))
    assert caught.value.outcome == "invalid"
