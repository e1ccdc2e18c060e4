"""A collection over many days: files come, change, move, go and come back."""

from __future__ import annotations

import os
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafind.index.store import Store
from tests.e2e import variants as v
from tests.e2e.content import content, same
from tests.e2e.tools import OLD_NS, age, files, index, lorafind, relations, rows, told
from tests.relations import made
from tests.relations.made import Modules

SHAPES = {
    name: shape for name, shape in v.kohya_layout("sd1").items() if "attn1" in name or "te" in name
}


def lora(path: Path, seed: int, c: float = 1.0, dtype: torch.dtype = torch.float32) -> Path:
    """A small LoRA, long past."""
    path.parent.mkdir(parents=True, exist_ok=True)
    modules: Modules = made.cast(made.scaled(made.trained(SHAPES, 2, seed=seed), c), dtype)
    v.write(path, v.kohya(modules), {"ss_output_name": f"seed {seed}"})
    os.utime(path, ns=(OLD_NS, OLD_NS + seed * 10**9))
    return path


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    """Six LoRAs in two folders; `a` and `copy` are one, `cast` is its F16."""
    folder = tmp_path / "loras"
    lora(folder / "a.safetensors", 1)
    shutil.copy2(folder / "a.safetensors", folder / "copy.safetensors")
    lora(folder / "sub/cast.safetensors", 1, dtype=torch.float16)
    for seed in (2, 3, 4):
        lora(folder / f"sub/{seed}.safetensors", seed)
    index(tmp_path / "i.db", folder)
    return folder


@pytest.fixture
def db(loras: Path) -> Path:
    return loras.parent / "i.db"


def run(db: Path, *paths: Path, **options: Any) -> dict[str, Any]:
    """One run of ``index``, in the fields of its JSON."""
    summary = index(db, *paths, **options)
    offline = {os.fsdecode(root): why for root, why in summary.offline.items()}
    return {**asdict(summary), "offline": offline}


def fresh(db: Path, *roots: Path) -> None:
    """Fails unless the index holds what a new one of the same folders would."""
    other = db.parent / "fresh.db"
    other.unlink(missing_ok=True)
    index(other, *roots)
    with Store.open(db) as store:
        gone = [row for row in store.known() if row.presence != "here"]
    assert not gone
    same(content(db), content(other))


def test_a_second_run_reads_nothing(db: Path, loras: Path) -> None:
    before = content(db)
    for arguments in ((), (loras,), (loras / "sub",)):
        found = run(db, *arguments)
        assert (found["added"], found["refreshed"], found["moved"], found["bytes"]) == (0, 0, 0, 0)
        assert found["unchanged"] == (4 if arguments == (loras / "sub",) else 6)
    same(content(db), before)


def test_new_changed_and_overwritten_files(db: Path, loras: Path) -> None:
    lora(loras / "new.safetensors", 9)
    # Another LoRA under a known name, of the same size, in place.
    lora(loras / "sub/4.safetensors", 7)
    found = run(db)
    assert (found["added"], found["refreshed"], found["unchanged"]) == (1, 1, 5)
    assert found["bytes"] == 2 * (loras / "new.safetensors").stat().st_size
    fresh(db, loras)
    # Touched, but the same: read once more, and nothing changes.
    before = content(db)
    os.utime(loras / "sub/2.safetensors", ns=(OLD_NS, OLD_NS + 10**12))
    assert run(db)["refreshed"] == 1
    after = content(db)
    assert after["loras"].keys() == before["loras"].keys()
    assert after["relations"] == before["relations"]
    # A LoRA turns into something else, and back.
    data = (loras / "sub/3.safetensors").read_bytes()
    (loras / "sub/3.safetensors").write_bytes(b"<!DOCTYPE html><html>log in</html>")
    (refused,) = rows(lorafind("index", "--json", db=db))["refused"]
    assert (Path(refused["path"]).name, refused["outcome"]) == ("3.safetensors", "html")
    (loras / "sub/3.safetensors").write_bytes(data)
    age(loras / "sub")
    assert run(db)["refused"] == []
    fresh(db, loras)


def test_renamed_and_moved_files_are_not_read_again(db: Path, loras: Path, tmp_path: Path) -> None:
    before = relations(db)
    os.rename(loras / "a.safetensors", loras / "renamed ü.safetensors")
    os.rename(loras / "sub", loras / "moved")
    found = run(db)
    assert (found["moved"], found["added"], found["bytes"], found["gone"]) == (5, 0, 0, 0)
    fresh(db, loras)
    # To another root, which the same run gets to know.
    other = tmp_path / "other"
    other.mkdir()
    os.rename(loras / "moved/2.safetensors", other / "2.safetensors")
    found = run(db, loras, other)
    assert (found["moved"], found["added"], found["bytes"]) == (1, 0, 0)
    fresh(db, loras, other)
    assert len(relations(db)) == len(before)
    assert {r["grade"] for r in relations(db).values()} == {"weights"}


def test_gone_pruned_and_back(db: Path, loras: Path) -> None:
    gone = loras / "sub/2.safetensors"
    data = gone.read_bytes()
    gone.unlink()
    found = run(db)
    assert (found["gone"], found["pruned"]) == (1, 0)
    assert files(db)[str(gone)]["presence"] == "gone"
    # It is still known, by name, and comes back without being read.
    told(lorafind("similar", "sub/2", db=db))
    gone.write_bytes(data)
    age(loras / "sub")
    assert files(db)[str(gone)]["presence"] == "gone"
    gone.unlink()
    assert run(db, prune=True)["pruned"] == 1
    assert str(gone) not in files(db)
    fresh(db, loras)


def test_pruning_over_half_wants_yes(db: Path, loras: Path) -> None:
    for path in (loras / "sub").iterdir():
        path.unlink()
    lorafind("index", db=db)
    done = lorafind("index", "--prune", db=db)
    said = told(done)
    assert "4 of 6 files" in said and "--yes" in said
    assert len(files(db)) == 6
    assert run(db, prune=True, force_prune=True)["pruned"] == 4
    assert {Path(path).name for path in files(db)} == {"a.safetensors", "copy.safetensors"}


def test_a_removed_root_is_offline(db: Path, loras: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    lora(other / "9.safetensors", 9)
    index(db, other)
    before = content(db)
    os.rename(loras, tmp_path / "away")
    found = run(db, prune=True, force_prune=True)
    assert set(found["offline"]) == {str(loras)} and found["pruned"] == found["gone"] == 0
    presence = {path: facts["presence"] for path, facts in files(db).items()}
    assert {presence[path] for path in presence if path.startswith(f"{loras}/")} == {"offline"}
    assert presence[str(other / "9.safetensors")] == "here"
    # What is offline is found and compared, but may not go.
    assert rows(lorafind("similar", loras / "a.safetensors", "--json", db=db))
    assert rows(lorafind("dupes", "--json", db=db))
    assert lorafind("dupes", "-0", "--others", db=db).stdout == b""
    # An empty mount point in its place is no deletion either.
    loras.mkdir()
    assert set(run(db, prune=True, force_prune=True)["offline"]) == {str(loras)}
    loras.rmdir()
    os.rename(tmp_path / "away", loras)
    found = run(db)
    assert (found["added"], found["bytes"], found["offline"]) == (0, 0, {})
    same(content(db), before)


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights on Windows")
def test_links(db: Path, loras: Path, tmp_path: Path) -> None:
    os.link(loras / "sub/2.safetensors", loras / "hard.safetensors")
    (loras / "soft.safetensors").symlink_to(loras / "sub/3.safetensors")
    (loras / "dangling.safetensors").symlink_to(loras / "nowhere.safetensors")
    (loras / "loop").symlink_to(loras)
    (tmp_path / "far").mkdir()
    lora(tmp_path / "far/far.safetensors", 8)
    (loras / "far").symlink_to(tmp_path / "far")
    found = run(db)
    assert (found["linked"], found["added"]) == (2, 1)
    assert found["bytes"] == (tmp_path / "far/far.safetensors").stat().st_size
    names = {os.path.relpath(path, loras) for path in files(db)}
    assert "loop/a.safetensors" not in names
    assert {"hard.safetensors", "soft.safetensors", "far/far.safetensors"} <= names
    again = run(db)
    assert (again["added"], again["linked"], again["bytes"]) == (0, 0, 0)
    # The original goes, the link stays the same LoRA.
    (loras / "sub/2.safetensors").unlink()
    assert run(db)["bytes"] == 0
    assert files(db)[str(loras / "hard.safetensors")]["presence"] == "here"


def test_folders_within_folders(db: Path, loras: Path, tmp_path: Path) -> None:
    """Naming a part, or what lies around a root, makes no second copy of any row."""
    before = set(files(db))
    run(db, loras / "sub")
    assert set(files(db)) == before
    lora(tmp_path / "outside.safetensors", 30)
    found = run(db, tmp_path)
    assert (found["added"], found["unchanged"]) == (1, 6)
    assert set(files(db)) == before | {str(tmp_path / "outside.safetensors")}
    one = run(db, loras / "a.safetensors")
    assert one["unchanged"] == 1


def test_pickles_wait_for_permission(db: Path, loras: Path, shared: Path, tmp_path: Path) -> None:
    name = "sd1_cloneofsimo_lora_kiriko2.text_encoder.pt"
    shutil.copy(shared / "loras/real" / name, loras / name)
    age(loras)
    (row,) = run(db)["refused"]
    assert row["outcome"] == "pickle" and "--allow-pickle" in row["reason"]
    assert run(db, allow_pickle=True)["refused"] == []
    assert files(db)[str(loras / name)]["status"] == "lora"
    # Once read it stays, as long as it is the same.
    assert run(db)["refused"] == []
    assert files(db)[str(loras / name)]["status"] == "lora"


def test_many_files_of_one_run_and_their_copies(tmp_path: Path) -> None:
    """In a large family the epochs are not compared all with all, yet every copy is found."""
    start = made.trained(SHAPES, 4, seed=1)
    end = made.trained(SHAPES, 4, seed=2)
    folder = tmp_path / "loras"
    folder.mkdir()
    epochs = []
    for epoch in range(1, 25):
        share = 0.6 * epoch / 24
        modules: Modules = {}
        for (name, x), (_, y) in zip(made.lows(start), made.lows(end), strict=True):
            modules[name] = made.copy(x, up=(1 - share) * x.up + share * y.up)
        epochs.append(modules)
        v.write(folder / f"run-{epoch:06}.safetensors", v.kohya(modules))
    last, middle = epochs[-1], epochs[12]
    expected = {
        "f16": (middle, made.cast(middle, torch.float16), "weights", 13),
        "f8": (middle, made.cast(middle, torch.float8_e5m2), "cast", 13),
        "half": (last, made.scaled(last, 0.5), "scaled", 24),
        "part": (last, made.kept(last, lambda n: n.startswith("unet/")), "part", 24),
        "small": (middle, v.small_svd(middle, lambda s: 2, torch.float32), "resized", 13),
    }
    for name, (_, modules, _, _) in expected.items():
        v.write(folder / f"{name}.safetensors", v.kohya(modules))
    age(folder)
    index(tmp_path / "i.db", folder)
    found = relations(tmp_path / "i.db")
    for name, (_, _, grade, epoch) in expected.items():
        pair = frozenset((f"{name}.safetensors", f"run-{epoch:06}.safetensors"))
        assert found.get(pair, {}).get("grade") == grade, name
