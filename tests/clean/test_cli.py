"""``dupes --plan``, ``apply`` and ``undo`` as processes: what they ask and say, exit codes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.clean.conftest import Shelf, snapshot

ROOT = Path(__file__).resolve().parents[2]


def run(shelf: Shelf, *arguments: str | Path, stdin: str = "") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lorafind", "--db", str(shelf.db), *map(str, arguments)]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        input=stdin,
        cwd=shelf.top,
        env={**os.environ, "PYTHONPATH": str(ROOT), "XDG_DATA_HOME": str(shelf.top / "data")},
        timeout=60,
    )
    assert "Traceback" not in done.stderr
    return done


def test_from_dupes_to_undo(shelf: Shelf) -> None:
    before = snapshot(shelf.loras)
    done = run(shelf, "dupes", "--plan", "plan.json")
    assert done.returncode == 0 and len(done.stdout.splitlines()) == 6
    assert "lets 4 files of 2 groups go" in done.stderr
    assert "try: lorafind apply plan.json --to-trash" in done.stderr

    done = run(shelf, "apply", "plan.json", "--to-trash", stdin="y\n")
    assert done.returncode == 2 and "--yes" in done.stderr and not done.stdout
    assert snapshot(shelf.loras) == before

    done = run(shelf, "apply", "plan.json", "--to-trash", "--yes", "--json")
    rows = json.loads(done.stdout)
    assert done.returncode == 0 and [row["outcome"] for row in rows] == ["trashed"] * 4
    assert set(rows[0]) == {"path", "outcome", "to", "bytes", "keeper", "reason", "with_it"}
    assert "4 trashed" in done.stderr and "lorafind undo" in done.stderr
    assert all(os.path.isfile(row["to"]) for row in rows)

    (listed,) = json.loads(run(shelf, "undo", "--list", "--json").stdout)
    assert (listed["files"], listed["how"]) == (4, "trash")
    done = run(shelf, "undo", listed["path"], "--tsv")
    assert done.returncode == 0 and done.stdout.count("\tback\t") == 10
    assert snapshot(shelf.loras) == before
    done = run(shelf, "undo")
    assert done.returncode == 4 and "nothing to undo" in done.stderr


def test_paths_of_what_went_and_codes(shelf: Shelf) -> None:
    run(shelf, "dupes", "--plan", "plan.json")
    (shelf.loras / "0/copy.safetensors").unlink()
    (shelf.loras / "0/copy.safetensors").write_text("other")
    done = run(shelf, "apply", "plan.json", "--move", "out", "--yes", "-0")
    assert done.returncode == 0
    assert len(done.stdout.split("\0")) == 3 + 1
    assert "3 moved" in done.stderr and "1 stay" in done.stderr


@pytest.mark.parametrize("options", [(), ("--link", "--to-trash"), ("--move", "x", "--link")])
def test_one_thing_to_do(options: tuple[str, ...], shelf: Shelf) -> None:
    run(shelf, "dupes", "--plan", "plan.json")
    done = run(shelf, "apply", "plan.json", "--yes", *options)
    assert done.returncode == 2 and "one of --to-trash" in done.stderr


def test_a_plan_that_removes_all(shelf: Shelf) -> None:
    def all_gone(plan: dict[str, Any]) -> None:
        for row in plan["groups"][0]["files"]:
            row["act"] = "remove"

    before = snapshot(shelf.loras)
    done = run(shelf, "apply", shelf.edit(all_gone), "--link", "--yes")
    assert done.returncode == 4 and len(done.stderr.splitlines()) == 1
    assert "would lose all of its files" in done.stderr and "Nothing was done" in done.stderr
    assert snapshot(shelf.loras) == before


def test_no_plan_and_no_index(shelf: Shelf) -> None:
    done = run(shelf, "apply", "none.json", "--link", "--yes")
    assert done.returncode == 2 and "no file or folder none.json" in done.stderr
    plan = shelf.plan()
    shelf.db.unlink()
    done = run(shelf, "apply", plan, "--link", "--yes")
    assert done.returncode == 4 and "lorafind index" in done.stderr
    assert not shelf.db.exists()


@pytest.mark.skipif(sys.platform == "win32", reason="there is no pty module on Windows")
@pytest.mark.parametrize("answer", ["y", "n"])
def test_it_asks_on_a_terminal(answer: str, shelf: Shelf) -> None:
    import pty

    run(shelf, "dupes", "--plan", "plan.json")
    before = snapshot(shelf.loras)
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "lorafind", "--db", str(shelf.db)),
            *("apply", "plan.json", "--move", "out"),
        ],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        cwd=shelf.top,
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )
    os.close(theirs)
    shown = b""
    try:
        while data := os.read(ours, 65536):
            shown += data
            if b"[y/N]" in shown and answer:
                os.write(ours, f"{answer}\n".encode())
                answered, answer = answer, ""
    except OSError:
        # So Linux says that the other end is closed.
        pass
    os.close(ours)
    assert process.wait() == 0
    assert f"Move 4 files to {shelf.out}?" in shown.decode()
    assert (snapshot(shelf.loras) == before) == (answered == "n")
    assert ("Nothing was done" in shown.decode()) == (answered == "n")
