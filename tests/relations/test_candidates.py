"""Candidates: what the README guarantees is found, and strangers are not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lorafind.formats.adapter import Place
from lorafind.formats.delta import LowRank
from lorafind.relations import candidates as module
from lorafind.relations.candidates import Identities, candidates, estimate
from lorafind.signatures.constants import DIMENSIONS, SEGMENTS
from lorafind.signatures.features import signature
from lorafind.signatures.sketch import Sketcher

CPU = torch.device("cpu")
GROUPS = ("self_attn", "cross_attn", "ff", "other")


def place(k: int) -> Place:
    return Place(f"unet/m{k:03}", GROUPS[k % 4], late=k >= 32)


def random_lora(seed: int, modules: int = 64, rank: int = 4) -> dict[int, LowRank]:
    g = torch.Generator().manual_seed(seed)
    return {
        k: LowRank(
            torch.randn(96, rank, generator=g) * float(torch.rand(1, generator=g) + 0.5),
            torch.randn(rank, 80, generator=g),
        )
        for k in range(modules)
    }


def collect(loras: list[dict[int, LowRank]]) -> tuple[Identities, dict[int, list[str]]]:
    names: dict[tuple[str, ...], int] = {}
    rows = []
    for lora in loras:
        sketcher = Sketcher(CPU)
        sketcher.add((place(k), delta) for k, delta in lora.items())
        made = signature(sketcher)
        order = sorted(range(len(made.places)), key=lambda i: made.places[i].name)
        layout = tuple(made.places[i].name for i in order)
        number = names.setdefault(layout, len(names))
        rows.append((number, made.identity, made.segment_norms, made.norms[order]))
    known = Identities(
        np.arange(len(loras)),
        np.array([row[0] for row in rows]),
        np.array([row[1] for row in rows]).astype(np.float16),
        np.array([row[2] for row in rows]),
        [row[3].astype(np.float32) for row in rows],
    )
    return known, {number: list(layout) for layout, number in names.items()}


def test_models_that_share_nothing_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their LoRAs stand in one series, mixed: the same pairs are found, and fewer tiles made."""
    first = [random_lora(seed) for seed in range(8)]
    second = [random_lora(seed) for seed in range(20, 28)]
    first[5], second[3] = first[2], second[6]
    mixed = [lora for pair in zip(first, second, strict=True) for lora in pair]
    known, layouts = collect(mixed)
    known.layouts[1::2] = 1
    layouts[1] = [name.replace("unet", "transformer") for name in layouts[0]]
    tiles = []
    monkeypatch.setattr(module, "_TILE", 2)
    monkeypatch.setattr(module, "_NAMES", 50)
    real = module._tile

    def counted(known, layouts, left, right, holders):  # type: ignore[no-untyped-def]
        tiles.append((set(left.layouts.tolist()), set(right.layouts.tolist())))
        return real(known, layouts, left, right, holders)

    monkeypatch.setattr(module, "_tile", counted)
    assert pairs(known, layouts) == {frozenset((4, 10)), frozenset((7, 13))}
    assert all(left & right for left, right in tiles)
    common = module._Common(known, layouts)
    assert common.shared.tolist() == [[64, 0], [0, 64]]


def pairs(known: Identities, layouts: dict[int, list[str]], new: np.ndarray | None = None) -> set:
    found = [p for block in candidates(known, layouts, new) for p in block.tolist()]
    assert len(found) == len({frozenset(p) for p in found}), "a pair came twice"
    return {frozenset(p) for p in found}


def mixed(a: dict[int, LowRank], b: dict[int, LowRank], cosine: float) -> dict[int, LowRank]:
    """A LoRA whose ΔW agree with those of ``a`` by a cosine in every module."""
    out = {}
    for k, x in a.items():
        y = b[k]
        scale = (x.squared_norm() / y.squared_norm()) ** 0.5
        out[k] = LowRank(
            torch.cat([cosine * x.up, (1 - cosine**2) ** 0.5 * scale * y.up], 1),
            torch.cat([x.down, y.down]),
        )
    return out


@pytest.mark.parametrize("share", [0.5, 0.25, 0.125, 0.09375])
def test_parts_are_found_down_to_a_few_modules(share: float) -> None:
    """By their norms, whatever the sketch says: 6 of 64 modules are 9 % of them."""
    loras = []
    rng = np.random.default_rng(int(share * 1000))
    for seed in range(12):
        whole = random_lora(seed)
        kept = sorted(rng.permutation(64)[: round(64 * share)].tolist())
        part = {k: LowRank(whole[k].up.half(), whole[k].down.half(), 0.5) for k in kept}
        loras += [whole, part]
    found = pairs(*collect(loras))
    assert {frozenset((2 * i, 2 * i + 1)) for i in range(12)} <= found


def test_parts_of_five_percent_of_the_energy_are_found() -> None:
    loras = []
    for seed in range(12):
        whole = random_lora(100 + seed)
        part = {k: whole[k] for k in range(8)}
        energy = sum(d.squared_norm() for d in part.values())
        rest = sum(d.squared_norm() for k, d in whole.items() if k >= 8)
        strong = (energy / 0.05 - energy) / rest
        whole = {
            k: LowRank(d.up * (1.0 if k < 8 else strong**0.5), d.down) for k, d in whole.items()
        }
        loras += [whole, part]
    found = pairs(*collect(loras))
    assert {frozenset((2 * i, 2 * i + 1)) for i in range(12)} <= found


@pytest.mark.parametrize("cosine", [0.45, 0.6, -0.6, 0.95])
def test_spread_agreement_is_found(cosine: float) -> None:
    loras = []
    for seed in range(10):
        a, b = random_lora(200 + seed), random_lora(300 + seed)
        loras += [a, mixed(a, b, cosine)]
    known, layouts = collect(loras)
    found = pairs(known, layouts)
    assert {frozenset((2 * i, 2 * i + 1)) for i in range(10)} <= found
    guesses = [estimate(known, layouts, 2 * i, 2 * i + 1) for i in range(10)]
    # sd of one guess is at most 1/√128 for one segment and falls with the number of segments.
    assert np.mean(guesses) == pytest.approx(cosine, abs=0.08)


def test_one_copied_segment_is_found() -> None:
    loras = []
    for seed in range(10):
        a, b = random_lora(400 + seed), random_lora(500 + seed)
        weak = {k: LowRank(d.up * (0.05 if k % 4 == 0 else 1.0), d.down) for k, d in a.items()}
        other = {k: weak[k] if k % 4 == 0 else b[k] for k in a}
        loras += [weak, other]
    found = pairs(*collect(loras))
    assert {frozenset((2 * i, 2 * i + 1)) for i in range(10)} <= found


def test_strangers_are_not_candidates() -> None:
    loras = [random_lora(1000 + s, rank=1 + s % 16) for s in range(60)]
    loras += [{k: d for k, d in random_lora(2000 + s).items() if k < 40} for s in range(40)]
    assert pairs(*collect(loras)) == set()


def test_a_million_pairs_of_strangers() -> None:
    """Random sketches of 2,000 LoRAs, in several layouts: 2·10⁶ pairs and hardly a candidate."""
    rng = np.random.default_rng(9)
    n, segments = 2000, len(SEGMENTS)
    sketch = rng.standard_normal((n, segments, DIMENSIONS)) / DIMENSIONS**0.5
    norms = rng.uniform(0.1, 2.0, (n, segments))
    layouts = rng.integers(0, 3, n)
    norms[layouts == 1, 8:] = 0
    sketch[norms == 0] = 0
    names = {0: [f"m{k}" for k in range(90)], 1: [f"m{k}" for k in range(60)]}
    names[2] = [f"m{k}" for k in range(30, 120)]
    modules = [rng.lognormal(size=len(names[int(k)])).astype(np.float32) for k in layouts]
    known = Identities(np.arange(n), layouts, sketch.astype(np.float16), norms, modules)
    assert len(pairs(known, names)) <= 1


def test_only_pairs_with_new_ones_are_asked_for() -> None:
    a = random_lora(1)
    known, layouts = collect([a, random_lora(2), a, a])
    everything = {frozenset(p) for p in ((0, 2), (0, 3), (2, 3))}
    assert pairs(known, layouts) == everything
    assert pairs(known, layouts, np.array([3])) == {frozenset((0, 3)), frozenset((2, 3))}
    assert pairs(known, layouts, np.array([1])) == set()


def test_threads_and_tiles_do_not_change_the_answer() -> None:
    """More LoRAs than a tile holds: every copy is found once, across tiles."""
    rng = np.random.default_rng(4)
    n = 1300
    sketch = rng.standard_normal((n, len(SEGMENTS), DIMENSIONS)) / DIMENSIONS**0.5
    twins = rng.permutation(n)[:200].reshape(-1, 2)
    sketch[twins[:, 1]] = sketch[twins[:, 0]]
    norms = np.ones((n, len(SEGMENTS)))
    modules = [np.ones(1, np.float32)] * n
    known = Identities(
        np.arange(n), np.zeros(n, np.int64), sketch.astype(np.float16), norms, modules
    )
    assert pairs(known, {0: ["m"]}) == {frozenset(t) for t in twins.tolist()}
    new = twins[:, 1]
    assert pairs(known, {0: ["m"]}, new) == {frozenset(t) for t in twins.tolist()}
