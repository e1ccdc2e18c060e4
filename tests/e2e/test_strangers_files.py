"""Files that strangers made, and broken ones, through the whole program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.tools import copied, files, healthy, index, lorafind, relations, rows, told

#: What MANIFEST.json calls each kind → our word, for files that are no LoRA.
NO_LORA = {
    "textual inversion embedding": "embedding",
    "plain network weights, no adapter": "checkpoint",
    "LoRA for a vision transformer, not for a text-to-image model": "unsupported",
    "truncated safetensors": "unreadable",
    "git LFS pointer": "lfs-pointer",
    "text file": "text",
    "refused: unsafe pickle": "pickle",
    "valid safetensors without tensors": "empty",
}


@pytest.fixture(scope="module")
def manifest(shared: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((shared / "loras/real/MANIFEST.json").read_text())
    return found


@pytest.fixture(scope="module")
def real(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the real files, in a folder of their copies."""
    folder = copied(shared / "loras/real", tmp_path_factory.mktemp("real") / "loras")
    db = folder.parent / "i.db"
    found = rows(lorafind("index", folder, "--allow-pickle", "--json", db=db), 3)
    assert found["added"] + len(found["refused"]) == len(list(folder.iterdir()))
    return db


def expected(entry: dict[str, Any]) -> str:
    if entry.get("all_zero"):
        return "zero"
    if entry["outcome"].startswith("PEFT"):
        return "unsupported" if "unilora" in entry["format"] else "lora"
    return "lora" if entry["outcome"] == "indexed" else NO_LORA[entry["outcome"]]


def test_every_real_file_is_what_its_manifest_says(
    real: Path, manifest: list[dict[str, Any]]
) -> None:
    found = {Path(path).name: facts for path, facts in files(real).items()}
    assert found.keys() == {entry["file"] for entry in manifest}
    loras = 0
    for entry in manifest:
        facts = found[entry["file"]]
        assert facts["status"] == expected(entry), entry["file"]
        assert bool(facts["reason"]) == (facts["status"] != "lora"), entry["file"]
        if facts["status"] != "lora":
            assert facts["content"] is None
            continue
        loras += 1
        # An IA3 vector is one number per feature of a layer.
        assert facts["ranks"] == entry.get("ranks", {"1": 1}), entry["file"]
        families = [name for name in ("lokr", "ia3") if name in entry["format"].lower()]
        assert facts["family"] == (families or ["lora"])[0]
        architecture = {"SD1": "sd1", "SD2": "sd2", "lan": "other:"}[entry["architecture"][:3]]
        assert facts["architecture"].startswith(architecture), entry["file"]
        dtypes = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        assert facts["effective_dtype"] in {dtypes[name] for name in entry["dtypes"]}
    assert loras == 18


def test_the_relations_of_the_manifest_and_no_others(
    real: Path, manifest: list[dict[str, Any]]
) -> None:
    stated = {
        frozenset((entry["file"], other["file"])): other.get(
            "cosine_of_shared_part", other["cosine"]
        )
        for entry in manifest
        for other in entry["relations"]
        # What was trained apart is no relation of weights, and the manifest says so.
        if "cosine" in other and "NOT by" not in other["kind"]
    }
    found = relations(real)
    assert found.keys() == stated.keys()
    for pair, cosine in stated.items():
        assert round(found[pair]["cosine"], 3) == round(cosine, 3), pair
    assert len(found) == 5


def test_the_grades_of_real_relations(real: Path) -> None:
    grades = {tuple(sorted(pair)): found["grade"] for pair, found in relations(real).items()}
    older, newer, converted = (
        "sd1_diffusers_timohavdk_earlier-step.safetensors",
        "sd1_diffusers_timohavdk_2100-lora.safetensors",
        "sd1_kohya-doubled-prefix_timohavdk_new.safetensors",
    )
    assert grades[newer, converted] == "weights"
    assert grades[newer, older] == grades[older, converted] == "kin"
    assert grades["peft_mlp_adapter_model.bin", "peft_mlp_modules_to_save_adapter_model.bin"] == (
        "part"
    )
    # Its factors were computed in F16, not cast to it, so that no proof of a part can hold.
    whole, half = "analog_svd_rank4.safetensors", "analog_svd_distill.text_encoder.pt"
    assert grades[f"sd1_cloneofsimo_{half}", f"sd1_cloneofsimo_{whole}"] in ("near", "part")


def test_dupes_shows_the_converted_file_alone(real: Path) -> None:
    groups = rows(lorafind("dupes", "--grade", "file,tensors,weights", "--json", db=real))
    (group,) = groups
    names = {Path(row["path"]).name: row["grade"] for row in group["files"]}
    assert len(names) == 2 and set(names.values()) == {"keeper", "weights"}
    assert all("timohavdk" in name for name in names)


# ---------------------------------------------------------------------------- broken files


@pytest.mark.parametrize("allow", [(), ("--allow-pickle",)], ids=["plain", "allow-pickle"])
def test_broken_files_are_named_and_stop_nothing(
    shared: Path, tmp_path: Path, allow: tuple[str, ...]
) -> None:
    folder = copied(shared / "loras/malformed", tmp_path / "loras")
    told_by_file = json.loads((shared / "loras/malformed/EXPECTED.json").read_text())
    expected = {str(folder / name): entry["outcome"] for name, entry in told_by_file.items()}
    db = tmp_path / "work/i.db"
    db.parent.mkdir()
    done = lorafind("index", folder, *allow, "--json", db=db)
    refused = {row["path"]: row for row in rows(done, 3)["refused"]}
    assert {path: row["outcome"] for path, row in refused.items()} == {
        path: outcome for path, outcome in expected.items() if outcome != "lora"
    }
    for path, row in refused.items():
        assert row["reason"] and "\n" not in row["reason"], path
        assert "Error" not in row["reason"], row["reason"]
    assert {path: facts["status"] for path, facts in files(db).items()} == expected
    good, other_name = (
        files(db)[str(folder / name)]["content"]
        for name in ("good.safetensors", "nonascii_猫_é.safetensors")
    )
    assert good == other_name
    # evil.pt writes into the working folder or its own, were it ever executed.
    left = {path.name for place in (db.parent, folder) for path in place.iterdir()}
    assert not any("pwned" in name for name in left)
    again = lorafind("index", folder, *allow, db=db)
    assert "not indexed" in told(again, 3)
    healthy(db)


def test_evil_pickles_as_targets_are_never_executed(shared: Path, tmp_path: Path) -> None:
    copied(shared / "loras/malformed", tmp_path, ["good.safetensors", "evil.pt"])
    db = tmp_path / "i.db"
    index(db, tmp_path / "good.safetensors")
    for name in ("similar", "info", "whatis", "compare"):
        targets = [tmp_path / "evil.pt"] * (2 if name == "compare" else 1)
        done = lorafind(name, *targets, "--allow-pickle", "--json", db=db)
        said = done.stderr + done.stdout
        assert b"Traceback" not in done.stderr
        assert b"evil.pt" in said and b"refused" in said, (name, said)
    assert not (tmp_path / "lorafind_pwned").exists()
