"""``lorafind whatis`` as a user sees it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.search import small
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]
HERO = small.random(1)


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whatis")
    small.save(folder / "loras" / "hero.safetensors", HERO, {"ss_sd_model_name": "base"})
    small.save(folder / "loras" / "low.safetensors", small.resized(HERO, 2))
    (folder / "loras" / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    small.index(folder / "i.db", folder / "loras")
    return folder / "i.db"


def test_lines(db: Path) -> None:
    done = small.run(db, "whatis", "low", "page", "--header")
    folder = db.parent / "loras"
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        "path\toutcome\tarchitecture\tfamily\trank\tname\ttext\n"
        f"{folder}/low.safetensors\tlora\tsd1\tlora\t2\tlow\t"
        "It is a LoRA for sd1 (family lora, rank 2, F32, 12 modules). It is called 'low'. "
        "It is a resize of hero.safetensors (resized 4→2). "
        "Its likely base model: base, a guess from hero.safetensors (resized: resized 4→2).\n"
        f"{folder}/page.safetensors\thtml\t\t\t\t\t"
        "No usable LoRA (html): page.safetensors is a web page: download it again, signed in if "
        "asked.\n"
    )


def test_json(db: Path) -> None:
    (row,) = json.loads(small.run(db, "whatis", "low", "--json").stdout)
    assert sorted(row) == sorted(
        [
            "path",
            "outcome",
            "reason",
            "indexed",
            "presence",
            "architecture",
            "family",
            "rank",
            "dtype",
            "effective_dtype",
            "modules",
            "size",
            "name",
            "base_model",
            "trigger_words",
            "copies",
            "relations",
            "nearest",
            "likely_base",
            "likely_trigger_words",
            "missing",
            "text",
        ]
    )
    hero = str(db.parent / "loras" / "hero.safetensors")
    (relation,) = row["relations"]
    cosine = relation.pop("cosine")
    assert cosine == pytest.approx(small.cosine(HERO, small.resized(HERO, 2)), abs=1e-6)
    assert relation == {
        "path": hero,
        "name": "hero",
        "grade": "resized",
        "larger": "other",
        "steps": ["resized 4→2"],
        "factor": 1.0,
        "share": 1.0,
        "same_run": False,
        "text": "resized: resized 4→2",
    }
    assert row["likely_base"] == {
        "value": "base",
        "from": hero,
        "because": "resized: resized 4→2",
    }
    assert row["likely_trigger_words"] is None


def test_paths_and_stdin(db: Path) -> None:
    both = [db.parent / "loras" / f"{name}.safetensors" for name in ("low", "hero")]
    expected = b"".join(os.fsencode(path) + b"\0" for path in both)
    assert small.run(db, "whatis", "low", "hero", "-0").stdout_bytes == expected
    assert small.run(db, "whatis", "-", "-0", input=expected).stdout_bytes == expected


def test_exit_codes(db: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes((db.parent / "loras" / "hero.safetensors").read_bytes()[:-9])
    pickle = tmp_path / "a.pt"
    pickle.write_bytes(b"PK\3\4" + bytes(60))
    empty = small.save(tmp_path / "zero.safetensors", small.each(HERO, lambda m: 0 * m))
    assert small.run(db, "whatis", str(empty), str(tmp_path)).exit_code == 0
    for path, outcome in ((cut, "unreadable"), (pickle, "pickle")):
        done = small.run(db, "whatis", str(path), "hero", "--jsonl")
        assert done.exit_code == 3
        assert [json.loads(line)["outcome"] for line in done.stdout.splitlines()] == [
            outcome,
            "lora",
        ]
    nobody = small.run(db, "whatis", "nobody", "hero")
    assert (nobody.exit_code, nobody.stdout.count("\n")) == (3, 1)
    assert "'nobody' is neither a file nor a name in the index" in nobody.stderr
    assert small.run(db.parent / "none.db", "whatis", "hero").exit_code == 4


@pytest.mark.parametrize("copied", [False, True], ids=["indexed", "same bytes"])
def test_what_the_index_knows_needs_no_torch(db: Path, tmp_path: Path, copied: bool) -> None:
    target = db.parent / "loras" / "low.safetensors"
    if copied:
        target = Path(shutil.copy(target, tmp_path / "mystery.safetensors"))
    code = (
        "import atexit, sys; from lorafind.cli.app import run\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "run()"
    )
    command = [sys.executable, "-c", code, "--db", str(db), "whatis", str(target), "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "False\n"
    (row,) = json.loads(done.stdout)
    assert (row["indexed"], len(row["copies"])) == (not copied, int(copied))
    assert row["relations"][0]["grade"] == "resized"


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_people_get_sentences_by_topic(db: Path) -> None:
    command = [sys.executable, "-m", "lorafind", "--db", str(db), "whatis", "low", "page"]
    code, shown = run_on_terminal(command, ROOT, {"NO_COLOR": "1"}, columns=150)
    assert code == 0
    lines = [line.rstrip() for line in shown.splitlines()]
    folder = db.parent / "loras"
    assert lines == [
        f"File     {folder}/low.safetensors",
        "What     It is a LoRA for sd1 (family lora, rank 2, F32, 12 modules).",
        "Says     It is called 'low'.",
        "Related  It is a resize of hero.safetensors (resized 4→2).",
        "Likely   Its likely base model: base, a guess from hero.safetensors (resized: resized "
        "4→2).",
        "",
        f"File  {folder}/page.safetensors",
        "What  No usable LoRA (html): page.safetensors is a web page: download it again, signed in "
        "if asked.",
    ]
