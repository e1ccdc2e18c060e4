"""Sketches against a dense float64 computation, and their statistics."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lorafind.formats.adapter import Place
from lorafind.formats.delta import Delta, Full, Hadamard, Kronecker, LowRank
from lorafind.signatures import sketch as module
from lorafind.signatures.constants import SEGMENTS
from lorafind.signatures.features import Signature, signature
from lorafind.signatures.sketch import Sketcher, segment
from tests.signatures import dense

CPU = torch.device("cpu")


def sketch(*modules: tuple[Place, Delta], device: torch.device = CPU) -> Signature:
    sketcher = Sketcher(device)
    sketcher.add(modules)
    return signature(sketcher)


def random_delta(kind: str, o: int, n: int, seed: int, rank: int = 4) -> Delta:
    g = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=g)

    if kind == "lora":
        return LowRank(rand(o, rank), rand(rank, n), 0.5)
    if kind == "loha":
        return Hadamard(rand(o, rank), rand(rank, n), rand(o, rank), rand(rank, n), 0.25)
    if kind == "lokr":
        return Kronecker(w1=rand(4, 4), w2_a=rand(o // 4, rank), w2_b=rand(rank, n // 4), scale=2.0)
    return Full(rand(o, n))


@pytest.mark.parametrize("kind", ["lora", "loha", "lokr", "full"])
@pytest.mark.parametrize(("o", "n"), [(8, 320), (320, 64), (600, 768)])
@pytest.mark.parametrize("group", ["self_attn", "cross_attn"])
def test_equals_the_dense_formula(kind: str, o: int, n: int, group: str) -> None:
    places = [Place(f"unet/block.{i}", group, late=False) for i in range(3)]
    deltas = [random_delta(kind, o, n, seed) for seed in range(3)]
    got = sketch(*zip(places, deltas, strict=True))

    identity, style, norm = np.zeros(128), np.zeros(32768), 0.0
    for place, delta in zip(places, deltas, strict=True):
        x = delta.dense().numpy()
        identity += dense.identity_fold(dense.grid(place.name, x))
        norm += float((x**2).sum())
        if group == "cross_attn":
            k = x @ x.T
            k -= np.eye(o) * np.trace(k) / o
            style += dense.style_fold(dense.gram_grid(place.name, x)) / np.linalg.norm(k)
        else:
            style += dense.style_fold(dense.grid(place.name, x)) / np.linalg.norm(x)
    row = segment(places[0])
    np.testing.assert_allclose(got.segment_norms[row], math.sqrt(norm), rtol=1e-6)
    np.testing.assert_allclose(got.identity[row], identity / math.sqrt(norm), atol=2e-6)
    # Grids of dense modules are kept in float16, whose roundoff is 2⁻¹¹; all else is float32.
    roundoff = 2.0**-11 if kind in ("loha", "full", "lokr") else 2.0**-18
    np.testing.assert_allclose(got.style[group], style, atol=roundoff * np.abs(style).max())
    assert got.votes[group] == pytest.approx(3.0)
    np.testing.assert_allclose(
        sorted(got.norms), sorted(d.squared_norm() for d in deltas), rtol=2e-6
    )


@pytest.mark.parametrize("kind", ["full", "lokr", "rows"])
@pytest.mark.parametrize("o", [200, 264, 1600])
def test_large_layers_are_the_same_a_few_rows_at_a_time(
    kind: str, o: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Place("unet/a", "ff", late=True)
    delta = random_delta("full", o, 96, 3)
    if kind != "full":
        g = torch.Generator().manual_seed(4)
        w1, w2 = torch.randn(8, 8, generator=g), torch.randn(o // 8, 48, generator=g)
        delta = Kronecker(w1, w2=w2, scale=0.5)
        if kind == "rows":
            delta = delta.rows(3, o - 30)
    whole = sketch((place, Full(delta.dense(torch.float32))))
    monkeypatch.setattr(module, "LARGE", 10_000)
    parts = sketch((place, delta))
    np.testing.assert_allclose(parts.identity, whole.identity, atol=1e-6)
    # Grids of a high rank are kept in half precision.
    np.testing.assert_allclose(parts.style["ff"], whole.style["ff"], atol=2e-5)
    np.testing.assert_allclose(parts.norms, whole.norms, rtol=1e-6)


def test_tucker_equals_its_dense_form() -> None:
    g = torch.Generator().manual_seed(0)
    delta = LowRank(
        torch.randn(64, 4, 1, 1, generator=g),
        torch.randn(4, 32, 1, 1, generator=g),
        0.5,
        torch.randn(4, 4, 3, 3, generator=g),
    )
    place = Place("unet/conv", "conv", late=True)
    got = sketch((place, delta))
    expected = dense.style_fold(dense.grid(place.name, delta.dense().numpy()))
    np.testing.assert_allclose(
        got.style["conv"], expected / math.sqrt(delta.squared_norm()), atol=2e-6
    )


def _pair(o: int, n: int, seed: int, r: int, q: int) -> tuple[LowRank, LowRank]:
    """Two adapters of ranks r and q that share a part, so that their inner product is not 0."""
    g = torch.Generator().manual_seed(seed)
    up, down = torch.randn(o, r, generator=g), torch.randn(r, n, generator=g)
    k = min(r, q)
    up2, down2 = torch.randn(o, q, generator=g), torch.randn(q, n, generator=g)
    up2[:, :k] += up[:, :k]
    down2[:k] += down[:k]
    return LowRank(up, down), LowRank(up2, down2)


@pytest.mark.parametrize(("r", "q"), [(1, 1), (4, 16)])
def test_identity_is_unbiased_and_as_spread_as_predicted(r: int, q: int) -> None:
    trials, o, n = 400, 512, 768
    errors = []
    for seed in range(trials):
        x, y = _pair(o, n, seed, r, q)
        place = Place(f"unet/m.{seed}", "ff", late=False)
        a, b = sketch((place, x)), sketch((place, y))
        exact = float((x.dense() * y.dense()).sum()) / math.sqrt(
            x.squared_norm() * y.squared_norm()
        )
        got = float((a.identity[segment(place)] * b.identity[segment(place)]).sum())
        errors.append((got - exact, exact))
    error = np.array([e for e, _ in errors])
    cosines = np.array([c for _, c in errors])
    assert abs(error.mean()) < 3 * error.std() / math.sqrt(trials)
    # A signed fold to D numbers gives an inner product of unit vectors the variance (1 + c²)/D;
    # the two sides add at most about (1/251 each) times the same, for rank 1.
    predicted = math.sqrt(((1 + cosines**2) * (1 / 128 + 2 / 251)).mean())
    floor = math.sqrt(((1 + cosines**2) / 128).mean())
    assert 0.85 * floor < error.std() < 1.1 * predicted


def test_rank_one_norm_has_the_spread_of_its_two_sides() -> None:
    """The relative variance of ‖grid‖² of u·vᵀ is (1 + v_o)(1 + v_n) − 1 with v_w = 2Σu_i²u_j².

    For dense signs v would be 2/256 on both sides (relative sd 0.13); the stride fold is below.
    """
    trials, o, n = 1500, 2560, 1280
    got, theory = [], []
    for seed in range(trials):
        g = torch.Generator().manual_seed(seed)
        u, v = torch.randn(o, 1, generator=g), torch.randn(1, n, generator=g)
        place = Place(f"unet/m.{seed}", "ff", late=False)
        sketcher = Sketcher(CPU)
        sketcher.add([(place, LowRank(u, v))])
        (part,) = sketcher.parts["ff"]
        assert part.left is not None and part.right is not None
        norm = float(part.left.square().sum() * part.right.square().sum())
        got.append(norm / float(u.square().sum() * v.square().sum()))
        spread = []
        for side in (u.flatten(), v.flatten()):
            p = (side.square() / side.square().sum()).double()
            pad = torch.nn.functional.pad(p, (0, -len(p) % 251)).view(-1, 251)
            spread.append(2 * float((pad.sum(0).square() - pad.square().sum(0)).sum()))
        theory.append((1 + spread[0]) * (1 + spread[1]) - 1)
    assert np.mean(got) == pytest.approx(1.0, abs=float(3 * np.std(got)) / math.sqrt(trials))
    predicted = math.sqrt(np.mean(theory))
    # sd of an empirical sd is about sd·√(1/(2·trials)) for normal data; the product is heavier.
    assert np.std(got) == pytest.approx(predicted, rel=0.12)
    assert predicted < math.sqrt((1 + 2 / 256) ** 2 - 1)


@pytest.mark.parametrize("group", ["self_attn", "cross_attn", "ff"])
def test_style_is_unbiased(group: str) -> None:
    trials, o, n = 300, 320, 256
    errors = []
    for seed in range(trials):
        x, y = _pair(o, n, seed, 2, 8)
        place = Place(f"unet/m.{seed}", group, late=False)
        a, b = sketch((place, x)), sketch((place, y))
        p, q = x.dense(), y.dense()
        if group == "cross_attn":
            p, q = (k - torch.eye(o) * k.trace() / o for k in (p @ p.T, q @ q.T))
        exact = float((p * q).sum() / (p.norm() * q.norm()))
        errors.append(float(a.style[group] @ b.style[group]) - exact)
    assert abs(np.mean(errors)) < 3 * np.std(errors) / math.sqrt(trials)
    assert np.std(errors) < 0.05


@pytest.mark.parametrize("group", ["self_attn", "cross_attn", "text"])
def test_strangers_of_every_rank_and_family_score_zero(group: str) -> None:
    """Without its trace part a Gram matrix of rank 128 would agree with strangers by 0.26."""
    kinds = [("lora", 1), ("lora", 16), ("lora", 128), ("loha", 4), ("full", 1)]
    scores = []
    for seed in range(40):
        places = [Place(f"unet/s{seed}.{i}", group, late=False) for i in range(2)]
        made = []
        for k, (kind, rank) in enumerate(kinds):
            deltas = [
                random_delta(kind, 320, 320, 1000 * seed + 10 * k + i, rank) for i in range(2)
            ]
            made.append(sketch(*zip(places, deltas, strict=True)).style[group])
        scores += [
            float(made[i] @ made[j] / (np.linalg.norm(made[i]) * np.linalg.norm(made[j])))
            for i in range(len(made))
            for j in range(i)
        ]
    assert abs(np.mean(scores)) < 3 * np.std(scores) / math.sqrt(len(scores))


def test_identity_is_linear_in_delta() -> None:
    g = torch.Generator().manual_seed(5)
    place = Place("unet/m", "self_attn", late=True)
    b1, a1 = torch.randn(300, 4, generator=g), torch.randn(4, 400, generator=g)
    b2, a2 = torch.randn(300, 8, generator=g), torch.randn(8, 400, generator=g)
    merged = LowRank(torch.cat([0.7 * b1, -0.3 * b2], 1), torch.cat([a1, a2]))
    row = segment(place)

    def raw(delta: Delta) -> np.ndarray:
        s = sketch((place, delta))
        return s.identity[row] * s.segment_norms[row]

    expected = 0.7 * raw(LowRank(b1, a1)) - 0.3 * raw(LowRank(b2, a2))
    np.testing.assert_allclose(raw(merged), expected, atol=1e-4 * np.abs(expected).max())


def test_style_does_not_change_with_the_way_delta_is_written() -> None:
    """Scale, sign of the factors, refactoring and padding of the rank leave ΔW's style alone."""
    g = torch.Generator().manual_seed(7)
    b, a = torch.randn(320, 4, generator=g), torch.randn(4, 768, generator=g)
    mix = torch.randn(4, 4, generator=g, dtype=torch.float64)
    place = Place("unet/m", "self_attn", late=False)
    base = sketch((place, LowRank(b, a))).style["self_attn"]
    refactored = LowRank((b.double() @ mix).float(), (torch.linalg.inv(mix) @ a.double()).float())
    for other in (LowRank(b, a, 3.0), refactored, Full(b @ a)):
        np.testing.assert_allclose(sketch((place, other)).style["self_attn"], base, atol=1e-5)


def test_faint_modules_lose_their_vote_in_proportion() -> None:
    places = [Place(f"unet/m{i}", "ff", late=False) for i in range(5)]
    deltas = [random_delta("lora", 64, 64, i) for i in range(5)]
    faint = deltas[4]
    assert isinstance(faint, LowRank)
    median = sorted(d.squared_norm() for d in deltas)[2]
    target = 0.001 * math.sqrt(median)
    deltas[4] = LowRank(
        faint.up, faint.down, faint.scale * target / math.sqrt(faint.squared_norm())
    )
    got = sketch(*zip(places, deltas, strict=True))
    group = sorted(math.sqrt(d.squared_norm()) for d in deltas)[2]
    assert got.votes["ff"] == pytest.approx(4 + (target / (0.01 * group)) ** 2, rel=1e-4)


@pytest.mark.parametrize("group", ["ff", "cross_attn"])
def test_high_ranks_are_kept_as_grids_of_equal_value(
    group: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    places = [Place(f"unet/m{i}", group, late=False) for i in range(3)]
    deltas = [random_delta("lora", 320, 300, i, 160) for i in range(3)]
    deltas[1] = LowRank(torch.randn(320, 160) * 1e3, torch.randn(160, 300) * 1e3)
    kept = sketch(*zip(places, deltas, strict=True))
    monkeypatch.setattr("lorafind.signatures.sketch.RANK", 1000)
    base = sketch(*zip(places, deltas, strict=True))
    step = np.abs(base.style[group]).max() / 127
    assert np.abs(kept.style[group] - base.style[group]).max() < step / 4
    np.testing.assert_allclose(kept.identity, base.identity, atol=1e-6)


def test_vectors_count_for_identity_and_not_for_style() -> None:
    got = sketch((Place("unet/m.bias", "ff", late=False, vector=True), Full(torch.ones(64))))
    assert got.style == {}
    assert got.segment_norms[SEGMENTS.index("ff/early")] == pytest.approx(8.0)


def test_threads_and_batches_change_nothing_visible() -> None:
    places = [Place(f"unet/m{i}", "self_attn", late=False) for i in range(24)]
    deltas = [random_delta("lora", 640, 640, i, 16) for i in range(24)]
    base = sketch(*zip(places, deltas, strict=True))
    single = Sketcher(CPU)
    for pair in zip(places, deltas, strict=True):
        single.add([pair])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one = signature(single)
    finally:
        torch.set_num_threads(threads)
    rms = float(np.sqrt((base.identity**2).mean()))
    np.testing.assert_allclose(one.identity, base.identity, atol=rms * 2.0**-11)
    step = np.abs(base.style["self_attn"]).max() / 127
    assert np.abs(one.style["self_attn"] - base.style["self_attn"]).max() < step / 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")
def test_cuda_equals_cpu() -> None:
    places = [Place(f"unet/m{i}", "cross_attn", late=False) for i in range(24)]
    deltas = [random_delta("lora", 640, 768, i, 16) for i in range(24)]
    cpu = sketch(*zip(places, deltas, strict=True))
    gpu = sketch(*zip(places, deltas, strict=True), device=torch.device("cuda"))
    rms = float(np.sqrt((cpu.identity**2).mean()))
    np.testing.assert_allclose(gpu.identity, cpu.identity, atol=rms * 2.0**-11)
    step = np.abs(cpu.style["cross_attn"]).max() / 127
    assert np.abs(gpu.style["cross_attn"] - cpu.style["cross_attn"]).max() < step
