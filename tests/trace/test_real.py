"""Merges of real files of several spellings and ranks, with and without loss."""

from __future__ import annotations

from pathlib import Path

import pytest

from lorafind.api import Index
from lorafind.trace.origin import Trace
from tests.trace import real
from tests.trace.real import SD1, SD1_TEXT, SD2, Case

RICK, LATE, EARLY, DISNEY, INPAINTING, ANALOG = SD1


@pytest.fixture(scope="session")
def folder(shared: Path) -> Path:
    return shared / "loras/real"


class Indexes:
    """An index of all real files but those that are missing, each made once."""

    def __init__(self, folder: Path, place: Path) -> None:
        self.folder, self.place = folder, place

    def without(self, missing: tuple[str, ...]) -> Path:
        gone = {*missing, *(name for name, same in real.SAME.items() if same in missing)}
        db = self.place / f"{'+'.join(sorted(gone))[:200] or 'all'}.db"
        if not db.exists():
            files = [f for f in sorted(self.folder.glob("sd*")) if f.name not in gone]
            with Index.open(db, write=True) as index:
                index.build(files, device="cpu", allow_pickle=True)
        return db


@pytest.fixture(scope="module")
def indexes(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Indexes:
    return Indexes(folder, tmp_path_factory.mktemp("real"))


def traced(case: Case, indexes: Indexes, path: Path) -> tuple[Trace, real.Weights]:
    weights = real.make(case, indexes.folder, path)
    with Index.open(indexes.without(case.missing)) as index:
        return index.trace(str(path)), weights


def original(path: str) -> str:
    """The name of a parent; of several files with its ΔW always the same."""
    return real.SAME.get(Path(path).name, Path(path).name)


def check(case: Case, found: Trace, weights: real.Weights, folder: Path) -> set[str]:
    """Every parent is one, with its weight within 2 %; the parents that were not found."""
    told = {original(p.path): p for p in found.parents}
    known = [name for name in case.parents if name not in case.missing]
    assert set(told) <= set(known), case
    for at, name in enumerate(case.parents):
        if name not in told:
            continue
        if isinstance(weights, tuple):
            assert told[name].weight == pytest.approx(weights[at], rel=0.02), case
        else:
            assert not isinstance(weights, list)
            own = {real.block(module) for module in real.factors(folder / name)}
            used = [w[at] for block, w in weights.items() if block in own]  # type: ignore[union-attr]
            assert told[name].low == pytest.approx(min(used), rel=0.02), case
            assert told[name].high == pytest.approx(max(used), rel=0.02), case
    return set(known) - set(told)


@pytest.mark.parametrize(
    "case",
    [
        Case((RICK, LATE, ANALOG), (0.3, 1.0, 0.7), "concatenated", "F16"),
        # Two states of one run and a third that the index lacks: BF16 hides their difference.
        Case((LATE, EARLY, DISNEY), (0.49, 0.41, 0.46), "concatenated", "F16", 0, (DISNEY,)),
        Case((RICK, INPAINTING), (0.8, 0.3), "concatenated", "BF16", 0, (INPAINTING,)),
        Case((RICK, EARLY, ANALOG), (0.87, 0.9, 0.13), "resized", "BF16", 5),
        Case(SD2, (0.61, 0.73), "svd", "F16", 6),
        # A text encoder alone beside a LoRA a hundred times as strong.
        Case(SD1_TEXT[0:3:2], (0.37, 0.88), "blocks", "F16"),
        Case((RICK, LATE, EARLY), (0.4, 0.9, 0.5), "blocks", "F16"),
        Case((DISNEY, INPAINTING, RICK), (0.9, 0.5, 0.3), "unet", "BF16"),
    ],
    ids=lambda case: f"{len(case.parents)}-{case.how}-{case.dtype}-{len(case.missing)}",
)
def test_parents_of_real_files(case: Case, indexes: Indexes, tmp_path: Path) -> None:
    found, weights = traced(case, indexes, tmp_path / "m.safetensors")
    assert check(case, found, weights, indexes.folder) == set()
    assert found.complete == (not case.missing)


def test_of_two_states_of_a_run_each_has_its_weight_in_bf16(
    indexes: Indexes, tmp_path: Path
) -> None:
    """They leave small singular values, which rounding lifts by 5 %: it is taken off again."""
    case = Case((LATE, EARLY, DISNEY), (0.49, 0.41, 0.46), "concatenated", "BF16", 0, (DISNEY,))
    found, weights = traced(case, indexes, tmp_path / "m.safetensors")
    assert check(case, found, weights, indexes.folder) == set()
    assert {p.kind for p in found.parents} == {"part"}


def test_what_a_resize_and_a_missing_parent_leave_is_an_estimate(
    indexes: Indexes, tmp_path: Path
) -> None:
    case = Case((RICK, LATE, INPAINTING), (0.3, 0.9, 0.1), "resized", "F16", 5, (INPAINTING,))
    found, _ = traced(case, indexes, tmp_path / "m.safetensors")
    assert found.parents == [] and not found.complete
    best = found.likely[0]
    assert original(best["path"]) == LATE
    assert best["weight"] == pytest.approx(0.9, rel=0.1) and best["explained"] > 0.5


def factor_sums() -> list[tuple[tuple[str, ...], tuple[float, ...], str]]:
    return [
        ((RICK, LATE), (0.6, 0.4), "F16"),
        ((RICK, EARLY), (0.7, 0.35), "BF16"),
        ((RICK, LATE, EARLY), (0.5, 0.3, -0.2), "F32"),
        (SD2, (0.7, 0.3), "F16"),
    ]


@pytest.mark.parametrize(("names", "ratios", "dtype"), factor_sums())
def test_cross_terms_of_real_files(
    names: tuple[str, ...],
    ratios: tuple[float, ...],
    dtype: str,
    indexes: Indexes,
    tmp_path: Path,
) -> None:
    """kohya's ``merge_lora.py``: both factors are sums."""
    parents = [real.factors(indexes.folder / name) for name in names]
    summed: real.Factors = {}
    for module in parents[0]:
        b = sum(abs(r) * p[module][0] for r, p in zip(ratios, parents, strict=True))
        a = sum(r * p[module][1] for r, p in zip(ratios, parents, strict=True))
        summed[module] = b, a  # type: ignore[assignment]
    real.write(tmp_path / "m.safetensors", summed, dtype)
    with Index.open(indexes.without(())) as index:
        found = index.trace(str(tmp_path / "m.safetensors"))
    assert {original(p.path): p.weight for p in found.parents} == {
        name: pytest.approx(r, rel=0.02) for name, r in zip(names, ratios, strict=True)
    }
    assert {p.kind for p in found.parents} == {"factor sum"}


@pytest.mark.slow
def test_all_pairs_and_triples(indexes: Indexes, tmp_path: Path) -> None:
    """Nothing but parents anywhere; all of them where nothing was lost."""
    missed = parents = 0
    for case in real.cases():
        found, weights = traced(case, indexes, tmp_path / "m.safetensors")
        lost = check(case, found, weights, indexes.folder)
        if case.how in ("concatenated", "svd") and not case.missing:
            parents += len(case.parents)
            missed += len(lost)
    assert parents > 100 and missed <= 0.05 * parents
