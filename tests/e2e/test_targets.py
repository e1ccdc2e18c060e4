"""What a user may name for `similar`, what is shown then, and what is said where nothing can be."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from lorafind.index.store import Store
from tests.e2e import variants as v
from tests.e2e.tools import (
    age,
    command,
    copied,
    environment,
    index,
    lorafind,
    one_sentence,
    rows,
    told,
)

UP = ("lora_up.weight", "lora_B.weight")
FIELDS = {
    "query": str,
    "position": int,
    "path": str,
    "score": float,
    "relation": str,
    "variants": int,
    "name": str,
    "architecture": str,
    "family": str,
    "rank": str,
    "base_model": str,
    "trigger_words": list,
    "groups": list,
    "basis": str,
    "other_paths": list,
}


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """80 trained LoRAs, some copies and parts of the first, two of which name base models."""
    folder = tmp_path_factory.mktemp("targets")
    bench = shared / "loras/fontbench/wild"
    chosen = sorted(path.name for path in bench.glob("*-train-*.safetensors"))[::2]
    copied(bench, folder / "loras", chosen)
    first = load_file(bench / chosen[0])
    half = dict(list(first.items())[: len(first) // 2 // 2 * 2])
    v.write(folder / "loras/metadata.safetensors", first, {"ss_output_name": "Ünique Title"})
    v.write(folder / "loras/half.safetensors", half)
    for number, base in ((1, "pony"), (2, "pony"), (3, "illustrious")):
        tensors = load_file(bench / chosen[-number])
        scaled = {key: t / 2 if key.endswith(UP) else t for key, t in tensors.items()}
        metadata = {"ss_sd_model_name": f"{base}.safetensors"}
        v.write(folder / f"loras/base-{number}-{base}.safetensors", scaled, metadata)
    copied(
        shared / "loras/malformed", folder / "loras", ["all_zero.safetensors", "nan.safetensors"]
    )
    age(folder / "loras")
    index(folder / "i.db", folder / "loras")
    return folder


@pytest.fixture(scope="module")
def first(folder: Path) -> Path:
    return sorted((folder / "loras").glob("*-train-*"))[0]


def similar(folder: Path, *arguments: str | Path, code: int = 0, **more: Any) -> Any:
    return rows(lorafind("similar", *arguments, "--json", db=folder / "i.db", **more), code)


def test_fields_and_order(folder: Path, first: Path) -> None:
    found = similar(folder, first, "-k", "20")
    assert len(found) == 20
    for position, row in enumerate(found, 1):
        assert row["position"] == position
        assert Path(row["path"]).is_file() and row["query"] == str(first)
        for name, kind in FIELDS.items():
            assert isinstance(row[name], kind), name
        assert -1 <= row["score"] <= 1 and row["basis"].startswith("own:")
        # The attention-only layout has too few strangers for a spread.
        assert (row["z"] is None) is (row["chance"] is None)
    assert sum(row["z"] is not None for row in found) >= 10
    scores = [row["score"] for row in found]
    assert scores == sorted(scores, reverse=True)
    assert str(first) not in [row["path"] for row in found]
    # Its copies are one LoRA of the index, its parts one family with it.
    assert all("metadata" not in row["path"] for row in found)


def test_a_target_by_path_name_and_part(folder: Path, first: Path, tmp_path: Path) -> None:
    expected = [row["path"] for row in similar(folder, first)]

    def paths(*arguments: str, **more: Any) -> list[str]:
        return [row["path"] for row in similar(folder, *arguments, **more)]

    assert paths(f"loras/{first.name}") == expected
    assert paths(f"./{first.name}", cwd=folder / "loras") == expected
    assert paths(first.stem, cwd=tmp_path) == expected
    assert paths(first.name.upper(), cwd=tmp_path) == expected
    assert paths(first.stem[2:], cwd=tmp_path) == expected
    (tmp_path / "link.safetensors").symlink_to(first)
    assert paths("link.safetensors", cwd=tmp_path) == expected
    # The same content outside of the index is known by its content.
    shutil.copy(first, tmp_path / "elsewhere.safetensors")
    assert paths("elsewhere.safetensors", cwd=tmp_path) == expected


def test_targets_on_stdin_and_several(folder: Path, first: Path) -> None:
    second = sorted((folder / "loras").glob("*-train-*"))[9]
    one, two = (similar(folder, path, "-k", "3") for path in (first, second))
    both = similar(folder, first, second, "-k", "3")
    assert both == one + two
    for stdin in (
        f"{first}\n{second}\n".encode(),
        f"{first}\tof a table\t3\r\n{second}".encode(),
        f"{first}\0{second}\0".encode(),
    ):
        assert similar(folder, "-", "-k", "3", stdin=stdin) == both
    assert similar(folder, "-", stdin=b"") == []
    listed = lorafind("similar", first, "-k", "5", "-0", db=folder / "i.db").stdout
    assert listed.count(b"\0") == 5
    told(lorafind("similar", "-", "-k", "1", db=folder / "i.db", stdin=listed))


def test_a_file_that_is_not_indexed(folder: Path, shared: Path, tmp_path: Path) -> None:
    bench = shared / "loras/fontbench/wild"
    new = sorted(bench.glob("*-test_same-*"))[0]
    target = Path(shutil.copy(new, tmp_path / "new.safetensors"))
    before = (folder / "i.db").read_bytes()
    found = similar(folder, target)
    artist = new.name.partition("-test_same-")[0]
    assert Path(found[0]["path"]).name.startswith(artist)
    assert (folder / "i.db").read_bytes() == before
    # A copy at another strength is known to be likely one before anything is proved.
    first = sorted((folder / "loras").glob("*-train-*"))[0]
    tensors = load_file(first)
    for key in tensors:
        if key.endswith(UP):
            tensors[key] = tensors[key] * 0.5
    v.write(target, tensors)
    rows_ = similar(folder, target, "--all")
    assert Path(rows_[0]["path"]).name in (first.name, "metadata.safetensors")
    assert rows_[0]["relation"].startswith("~likely")


def test_what_cannot_be_compared_is_said(folder: Path, shared: Path, first: Path) -> None:
    malformed = shared / "loras/malformed"
    said: dict[str | Path, str] = {
        folder / "loras/all_zero.safetensors": "ΔW is zero",
        malformed / "all_zero.safetensors": "ΔW is zero",
        malformed / "nan.safetensors": "NaN",
        folder / "loras/nan.safetensors": "NaN",
        malformed / "embedding.safetensors": "embedding",
        malformed / "truncated_data.safetensors": "download",
        malformed / "evil.pt": "--allow-pickle",
        folder / "loras": "folder",
        folder / "nothing.safetensors": "neither a file nor a name",
        "train": "fits",
    }
    # One sentence for each; the others are answered, and the document is whole.
    done = lorafind("similar", first, *said, first, "-k", "2", "--json", db=folder / "i.db")
    assert len(rows(done, 3)) == 4
    lines = done.stderr.decode().splitlines()
    assert len(lines) == len(said)
    for line, words in zip(lines, said.values(), strict=True):
        assert line.startswith("warning: ") and words in line, line
    alone = lorafind("similar", folder / "nothing.safetensors", db=folder / "i.db")
    assert "neither a file" in told(alone, 3) and not alone.stdout
    other = shared / "loras/real/sd1_cloneofsimo_lora_disney.safetensors"
    done = lorafind("similar", other, db=folder / "i.db")
    assert "Nothing in the index" in told(done) and not done.stdout
    done = lorafind("similar", other, "--exit-code", db=folder / "i.db")
    assert done.returncode == 1


def test_kin_take_one_row_unless_all_are_asked_for(folder: Path, shared: Path) -> None:
    new = sorted((shared / "loras/fontbench/wild").glob("*-test_same-*"))[0]
    grouped = similar(folder, new, "-k", "500")
    every = similar(folder, new, "-k", "500", "--all")
    assert sum(1 + row["variants"] for row in grouped) == len(every)
    assert all(row["variants"] == 0 for row in every)
    assert len(grouped) < len(every) == _loras(folder)
    assert len({row["path"] for row in every}) == len(every)


def _loras(folder: Path) -> int:
    with Store.open(folder / "i.db") as store:
        (count,) = store.conn.execute("SELECT count(*) FROM loras").fetchone()
    return int(count)


def test_relations_are_shown(folder: Path, first: Path) -> None:
    every = {Path(r["path"]).stem: r for r in similar(folder, first, "--all", "-k", "500")}
    assert every["half"]["relation"].startswith("part: ")
    assert sum(bool(row["relation"]) for row in every.values()) < 10
    base = sorted((folder / "loras").glob("*-train-*"))[-1]
    found = similar(folder, base, "--all", "-k", "1")[0]
    assert Path(found["path"]).name == "base-1-pony.safetensors"
    assert found["relation"].startswith("scaled: ×")


def test_by_groups(folder: Path, first: Path) -> None:
    everything = similar(folder, first, "-k", "500", "--all")
    by_self = similar(folder, first, "-k", "500", "--all", "--by", "self")
    by_ff = similar(folder, first, "-k", "500", "--all", "--by", "ff")
    assert by_self[0]["groups"] == ["self_attn"] and by_ff[0]["groups"] == ["ff"]
    # Those without feed-forward cannot be compared by it.
    assert len(by_ff) < len(by_self) == len(everything)
    assert [r["path"] for r in by_self] != [r["path"] for r in everything]
    both = similar(folder, first, "-k", "500", "--all", "--by", "self,cross,ff")
    assert [r["path"] for r in both] == [r["path"] for r in everything]
    assert similar(folder, first, "--by", "text") == []
    said = one_sentence(lorafind("similar", first, "--by", "selves", db=folder / "i.db"), 2)
    assert "'selves' is no group" in said


def test_limits(folder: Path, first: Path) -> None:
    everything = similar(folder, first, "-k", "500", "--all")
    # What is shown is rounded.
    score = everything[7]["score"] - 6e-5
    found = similar(folder, first, "-k", "500", "--all", "--min-score", str(score))
    assert found == [row for row in everything if row["score"] >= score]
    z = 2.0
    found = similar(folder, first, "-k", "500", "--all", "--min-z", str(z))
    expected = [r["path"] for r in everything if r["z"] is not None and r["z"] >= z]
    assert [r["path"] for r in found] == expected and 0 < len(expected) < len(everything)
    assert similar(folder, first, "--min-score", "1.1") == []
    done = lorafind("similar", first, "--min-score", "1.1", "--exit-code", db=folder / "i.db")
    assert done.returncode == 1
    assert len(similar(folder, first, "-k", "1")) == 1
    one_sentence(lorafind("similar", first, "-k", "0", db=folder / "i.db"), 2)


def test_the_same_base_model(folder: Path, first: Path) -> None:
    found = similar(folder, "base-1-pony", "--same-base", "--all", "-k", "500")
    assert [Path(row["path"]).stem for row in found] == ["base-2-pony"]
    assert similar(folder, "base-3-illustrious", "--same-base") == []
    done = lorafind("similar", first, "--same-base", db=folder / "i.db")
    assert "Traceback" not in done.stderr.decode()


@pytest.mark.parametrize("flags", [(), ("--json",), ("-0",), ("--csv",)])
def test_a_reader_that_leaves_is_no_error(folder: Path, flags: tuple[str, ...]) -> None:
    """`lorafind similar … | head -1`: no complaint, whatever is still to be written."""
    names = [path.stem for path in sorted((folder / "loras").glob("*-train-*"))]
    process = subprocess.Popen(
        command("similar", *names, "-k", "500", "--all", *flags),
        env=environment(folder / "i.db"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.read(20)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 0


def test_names_that_are_not_text(folder: Path, tmp_path: Path, first: Path) -> None:
    raw = os.fsdecode(os.fsencode(tmp_path) + b"/\xfe folder/\xff\n\xe4.safetensors")
    os.mkdir(os.path.dirname(raw))
    shutil.copy(first, raw)
    db = tmp_path / "i.db"
    shutil.copy(folder / "i.db", db)
    told(lorafind("index", os.path.dirname(raw), db=db))
    for flags in ((), ("--json",), ("--csv",), ("-0",)):
        told(lorafind("similar", raw, *flags, db=db))
    done = lorafind("ls", "-0", db=db)
    assert os.fsencode(raw) in done.stdout.split(b"\0")
