"""Whatever people do to a LoRA file, `index` and `dupes` find it and say what was done."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lorafind.index.store import Store
from lorafind.relations.grades import GRADES
from lorafind.search.dupes import Choice, dupes
from tests.e2e import variants as v
from tests.e2e.tools import age, index, relations
from tests.relations import made
from tests.relations.made import Modules

REAL = "loras/real"
EARLIER = "sd1_diffusers_timohavdk_earlier-step.safetensors"
DOUBLED = "sd1_kohya-doubled-prefix_timohavdk_new.safetensors"
ATTN = "sd1_diffusers-attnproc_qwerty-aditya_rick-and-morty.safetensors"
BF16 = "sd2_diffusers_vfph55_naruto_bf16.safetensors"
LOKR = "sd1_lycoris-lokr_smart_falcon_4.safetensors"
STRANGER = "sd1_cloneofsimo_lora_disney.safetensors"
STRANGERS = {BF16: "sd1_lycoris-lokr_smart_falcon_16.safetensors"}
METADATA = {"ss_output_name": "renamed", "ss_seed": "7", "note": "é"}


@dataclass(frozen=True)
class Parent:
    """A file and the low-rank changes that stand in it (None for other families)."""

    path: Path
    modules: Modules | None
    dtype: torch.dtype


def _kohya(model: str, rank: int, alpha: float) -> Callable[[Path, Path], Parent]:
    def make(_: Path, folder: Path) -> Parent:
        trained = made.trained(v.kohya_layout(model), rank, seed=3, alpha=alpha, decay=0.9)
        modules = made.cast(trained, torch.float16)
        path = v.write(folder / "made.safetensors", v.kohya(modules), {"ss_seed": "1"})
        return Parent(path, modules, torch.float16)

    return make


def _of_diffusers(name: str, dtype: torch.dtype) -> Callable[[Path, Path], Parent]:
    return lambda shared, _: Parent(
        shared / REAL / name, v.of_diffusers(shared / REAL / name), dtype
    )


def _doubled(shared: Path, _: Path) -> Parent:
    path = shared / REAL / DOUBLED
    like = v.of_diffusers(shared / REAL / EARLIER)
    return Parent(path, v.of_doubled_prefix(path, like), torch.float32)


def _attention_processors(shared: Path, _: Path) -> Parent:
    path = shared / REAL / ATTN
    return Parent(path, v.of_attention_processors(path), torch.float32)


PARENTS: dict[str, Callable[[Path, Path], Parent]] = {
    "kohya-like": _doubled,
    "diffusers": _of_diffusers(EARLIER, torch.float32),
    "attn-procs": _attention_processors,
    "sd2-bf16": _of_diffusers(BF16, torch.bfloat16),
    "made-sd1": _kohya("sd1", 16, 6.0),
    "made-sdxl": _kohya("sdxl", 8, 8.0),
}
LOKR_FIRST = ("spelled-sgm", "cast-F8", "no-text", "reweighted", "three")

SETS: dict[str, Callable[[Modules, torch.dtype], v.Variants]] = {
    "copies": v.copies,
    "casts": v.casts,
    "parts": lambda modules, _: v.parts(modules),
    "resizes": v.resizes,
}
#: In rank, layout and dtype these are as the attention processors.
SLOW = {"kohya-like": ("casts", "parts", "resizes"), "diffusers": tuple(SETS)}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        pytest.param(name, kind, marks=[pytest.mark.slow] if kind in SLOW.get(name, ()) else [])
        for name in PARENTS
        for kind in SETS
    ],
)
def test_made_from_one_file(name: str, kind: str, shared: Path, tmp_path: Path) -> None:
    parent = PARENTS[name](shared, tmp_path)
    assert parent.modules is not None
    _check(parent.path, SETS[kind](parent.modules, parent.dtype), shared, tmp_path)


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_made_from_a_lokr_file(every: bool, shared: Path, tmp_path: Path) -> None:
    path = shared / REAL / LOKR
    chosen = (pair for pair in v.of_lokr(load_file(path)) if every or pair[0] in LOKR_FIRST)
    _check(path, chosen, shared, tmp_path)


def _check(parent: Path, variants: v.Variants, shared: Path, tmp_path: Path) -> None:
    """Index the parent, all variants and a stranger; every variant has its grade and steps."""
    folder = tmp_path / "loras"
    folder.mkdir()
    shutil.copyfile(parent, folder / "parent.safetensors")
    stranger = STRANGERS.get(parent.name, STRANGER)
    shutil.copyfile(shared / REAL / stranger, folder / "stranger.safetensors")
    stored = load_file(parent)
    expected = {
        name: variant
        for name, variant in variants
        # The parent's own spelling gives the parent again.
        if list(variant.tensors) != list(stored) or not name.startswith("spelled")
    }
    expected["reordered"] = v.variant(dict(reversed(stored.items())), "tensors")
    for name, variant in expected.items():
        v.write(folder / f"{name}.safetensors", variant.tensors)
    v.write(folder / "metadata.safetensors", stored, METADATA)
    age(folder)
    db = tmp_path / "i.db"
    summary = index(db, folder)
    assert not summary.refused and summary.added == len(expected) + 3

    found = relations(db)
    wrong = []
    for name, variant in expected.items():
        relation = found.get(frozenset(("parent.safetensors", f"{name}.safetensors")))
        if relation is None:
            wrong.append(f"{name}: nothing instead of {variant.grade}")
            continue
        kinds = frozenset(step["kind"] for step in relation["steps"])
        words = ", ".join(step["words"] for step in relation["steps"])
        if (relation["grade"], kinds) != (variant.grade, variant.kinds):
            wrong.append(
                f"{name}: {relation['grade']} ({words}), not {variant.grade} {set(variant.kinds)}"
            )
        if not all(word in words for word in variant.words):
            wrong.append(f"{name}: {words!r} lacks {variant.words}")
    assert not wrong, "\n".join(wrong)
    assert not [pair for pair in found if "stranger.safetensors" in pair]
    _check_groups(db, expected)


def _check_groups(db: Path, expected: dict[str, v.Variant]) -> None:
    """`dupes` shows all of them in groups with keepers that hold them."""
    choice = Choice(grades=GRADES, keep="*/parent.safetensors")
    with Store.open(db) as store:
        groups = list(dupes(store, choice))
    shown = {Path(row.path).stem: (row, group) for group in groups for row in group.files}
    assert shown.keys() == {*expected, "parent", "metadata"}
    # Edited metadata and another order of the keys leave the tensors as they are.
    with Store.open(db) as store:
        (group,) = dupes(store, Choice(grades=("tensors",), keep="*/parent.safetensors"))
    assert Path(group.keeper).stem == "parent"
    same = {Path(row.path).stem: (row.grade, row.removable) for row in group.files}
    assert same == {
        "parent": ("keeper", False),
        "metadata": ("tensors", True),
        "reordered": ("tensors", True),
    }
    for name, (row, group) in shown.items():
        if Path(group.keeper).stem == "parent" and name in expected:
            assert row.grade == expected[name].grade, name
            assert row.removable <= (row.grade in ("file", "tensors", "weights")), name
    for group in groups:
        (keeper,) = [row for row in group.files if row.grade == "keeper"]
        assert keeper.path == group.keeper and not keeper.removable
