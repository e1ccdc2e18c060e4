"""What is no copy is never called one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from lorafind.formats.adapter import Adapter
from lorafind.formats.delta import LowRank
from lorafind.index.store import Store
from lorafind.relations.candidates import Identities, candidates
from lorafind.relations.grades import GRADES
from lorafind.relations.verify import prove
from lorafind.search.dupes import Choice, dupes
from lorafind.signatures.features import signature
from lorafind.signatures.sketch import Sketcher
from tests.e2e import variants as v
from tests.e2e.tools import age, index, lorafind, relations, rows
from tests.relations import made
from tests.relations.made import Modules, lows

EARLIER = "loras/real/sd1_diffusers_timohavdk_earlier-step.safetensors"
LATER = "loras/real/sd1_diffusers_timohavdk_2100-lora.safetensors"
ATTN = "loras/real/sd1_diffusers-attnproc_qwerty-aditya_rick-and-morty.safetensors"
F8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def grades(folder: Path, collection: dict[str, Modules]) -> dict[tuple[str, ...], str]:
    """Index files in kohya names and tell what was found, by pairs of names in order."""
    (folder / "loras").mkdir()
    for name, modules in collection.items():
        v.write(folder / f"loras/{name}.safetensors", v.kohya(modules))
    age(folder)
    index(folder / "i.db", folder / "loras")
    return {
        tuple(sorted(Path(name).stem for name in pair)): relation["grade"]
        for pair, relation in relations(folder / "i.db").items()
    }


def removable(db: Path, *named: str) -> set[str]:
    """Stems of the files that may go when these grades are asked for."""
    with Store.open(db) as store:
        groups = list(dupes(store, Choice(grades=GRADES, named=named)))
    return {Path(row.path).stem for group in groups for row in group.files if row.removable}


@pytest.mark.parametrize("dtype", F8, ids=str)
def test_two_epochs_in_f8_are_no_casts_of_each_other(
    dtype: torch.dtype, shared: Path, tmp_path: Path
) -> None:
    epochs = {"a": v.of_diffusers(shared / EARLIER), "b": v.of_diffusers(shared / LATER)}
    # A step so small that most numbers round to the same eight bits.
    epochs["c"] = made.noisy(epochs["b"], 0.002)
    coarse = {f"{name}8": made.cast(modules, dtype) for name, modules in epochs.items()}
    same = [
        float(torch.cat([(x.up == y.up).flatten().float() for (_, x), (_, y) in pairs]).mean())
        for pairs in [list(zip(lows(coarse["b8"]), lows(coarse["c8"]), strict=True))]
    ]
    assert same[0] > 0.9
    found = grades(tmp_path, epochs | coarse)
    casts = {pair for pair, grade in found.items() if grade == "cast"}
    expected = {(name, f"{name}8") for name in epochs}
    assert casts == {pair for pair in expected if found.get(pair)}
    assert ("b", "b8") in casts
    assert {grade for pair, grade in found.items() if pair not in casts} <= {"near", "kin"}
    assert removable(tmp_path / "i.db", *GRADES) <= {f"{name}8" for name in epochs}


@pytest.mark.parametrize("orthogonal", [False, True])
def test_a_merge_is_no_parent_of_its_ingredient(
    orthogonal: bool, shared: Path, tmp_path: Path
) -> None:
    y = v.of_diffusers(shared / LATER)
    z = v.of_attention_processors(shared / ATTN)
    if orthogonal:
        # Then ⟨X, Y⟩ = ‖Y‖², as it would be for a true resize.
        z = {
            name: LowRank(d.up - o.up @ torch.linalg.lstsq(o.up, d.up).solution, d.down)
            for (name, d), (_, o) in zip(lows(z), lows(y), strict=True)
        }
    merge = made.merged(y, z, 0.5)
    found = grades(tmp_path, {"y": y, "z": z, "merge": merge})
    assert found.get(("merge", "y"), "") in ("", "near", "kin")
    assert found.get(("merge", "z"), "") in ("", "near", "kin")
    assert ("y", "z") not in found
    # What a merge is rounded to is its own copy all the same.
    assert removable(tmp_path / "i.db", *GRADES) == set()


def test_one_a_under_two_b_is_nothing(shared: Path, tmp_path: Path) -> None:
    y = v.of_diffusers(shared / LATER)
    g = torch.Generator().manual_seed(1)
    for_one_seed: dict[str, Modules] = {"y": y}
    for number in range(3):
        for_one_seed[f"b{number}"] = {
            name: LowRank(torch.randn(d.up.shape, generator=g) * d.up.std(), d.down)
            for name, d in lows(y)
        }
    frozen: Modules = {
        name: LowRank(d.up, torch.randn(d.down.shape, generator=g) * d.down.std())
        for name, d in lows(y)
    }
    assert grades(tmp_path, {**for_one_seed, "frozen": frozen}) == {}


def test_two_parts_of_one_are_not_copies_of_each_other(shared: Path, tmp_path: Path) -> None:
    a = v.of_diffusers(shared / LATER)
    b = made.kept(a, lambda name: "up_blocks" in name)
    c = made.kept(a, lambda name: "down_blocks" in name)
    overlapping = made.kept(a, lambda name: "up_blocks.2" in name or "down_blocks" in name)
    collection = {"a": a, "b": b, "c": c, "d": overlapping}
    found = grades(tmp_path, collection)
    assert {pair: found[pair] for pair in (("a", "b"), ("a", "c"), ("a", "d"), ("c", "d"))} == {
        ("a", "b"): "part",
        ("a", "c"): "part",
        ("a", "d"): "part",
        ("c", "d"): "part",
    }
    assert ("b", "c") not in found
    # Their common modules are equal, but each holds what the other lacks.
    assert found.get(("b", "d"), "") in ("", "near")
    db = tmp_path / "i.db"
    assert removable(db) == set()
    assert removable(db, "part") == {"b", "c", "d"}
    (tmp_path / "loras/a.safetensors").unlink()
    index(db)
    assert removable(db, "part") == {"c"}
    groups = rows(lorafind("dupes", "--json", db=db))
    assert [{Path(r["path"]).stem for r in group["files"]} for group in groups] == [{"c", "d"}]


def test_two_routes_to_one_file_are_no_duplicates(shared: Path, tmp_path: Path) -> None:
    y = v.of_diffusers(shared / LATER)
    loras, other = tmp_path / "loras", tmp_path / "other"
    for folder in (loras / "sub", other):
        folder.mkdir(parents=True)
    v.write(loras / "y.safetensors", v.kohya(y))
    age(loras)
    os.link(loras / "y.safetensors", loras / "sub/hard.safetensors")
    (loras / "soft.safetensors").symlink_to(loras / "y.safetensors")
    os.link(loras / "y.safetensors", other / "second root.safetensors")
    (other / "folder").symlink_to(loras / "sub")
    db = tmp_path / "i.db"
    summary = index(db, loras, other)
    assert summary.added >= 4 and summary.bytes == (loras / "y.safetensors").stat().st_size
    with Store.open(db) as store:
        for keep in ("oldest", "shortest-path", "*/other/*"):
            members = [
                row for group in dupes(store, Choice(GRADES, GRADES, keep)) for row in group.files
            ]
            assert not any(row.removable or row.grade not in ("keeper", "link") for row in members)
    done = lorafind("dupes", "--others", "--exit-code", "--grade", "all", db=db)
    assert (done.returncode, done.stdout) == (1, b"")
    # A true copy may go, while all paths to the original stay.
    (other / "copy.safetensors").write_bytes((loras / "y.safetensors").read_bytes())
    index(db)
    done = lorafind("dupes", "-0", "--others", db=db)
    assert done.stdout == os.fsencode(other / "copy.safetensors") + b"\0"


# ---------------------------------------------------------------------------- very many strangers


def adapters(count: int) -> Iterator[Adapter]:
    """Unrelated small adapters, dozens to each initialisation of A, of many ranks and layouts."""
    shapes = made.layout(width=32, context=24, text=24)
    attention = {name: shape for name, shape in shapes.items() if "attn" in name}
    for seed in range(count):
        rank = (1, 2, 4, 8, 24)[seed % 5]
        layout = attention if seed % 3 == 0 else shapes
        if seed % 7 == 6:
            # So small that chance alone gives cosines of one half.
            layout, rank = dict(list(shapes.items())[:1]), 1
        modules = made.trained(layout, rank, seed=seed, seed_a=10_000 + seed % 40)
        yield made.adapter(modules)


@pytest.mark.parametrize("count", [1_450, pytest.param(5_000, marks=pytest.mark.slow)])
def test_a_million_pairs_of_strangers(count: int) -> None:
    strangers = list(adapters(count))
    names: dict[tuple[str, ...], int] = {}
    layouts, sketches, norms, modules = [], [], [], []
    for adapter in strangers:
        sketcher = Sketcher(torch.device("cpu"))
        sketcher.add((m.place, adapter.modules[m.name]) for m in adapter.plan.modules)
        found = signature(sketcher)
        order = sorted(range(len(found.places)), key=lambda i: found.places[i].name)
        layout = tuple(found.places[i].name for i in order)
        layouts.append(names.setdefault(layout, len(names)))
        sketches.append(found.identity.astype(np.float16))
        norms.append(found.segment_norms)
        modules.append(found.norms[order].astype(np.float32))
    known = Identities(
        np.arange(count), np.array(layouts), np.array(sketches), np.array(norms), modules
    )
    blocks = candidates(known, {number: list(layout) for layout, number in names.items()})
    pairs = [(i, j) for block in blocks for i, j in block.tolist()]
    assert count * (count - 1) // 2 > 1_000_000
    # Few get as far as a proof, and no proof calls them anything.
    assert len(pairs) < count / 10
    assert [pair for pair in pairs if prove(strangers[pair[0]], strangers[pair[1]])] == []
