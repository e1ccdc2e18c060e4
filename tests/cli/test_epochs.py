"""``lorafind epochs`` as a user sees it."""

import json
import os
import sys
from pathlib import Path

import pytest

from tests.search import small
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]
NOTE = "This is a proposal by the direction of ΔW alone (see --help); nothing is deleted.\n"
LAST = "the last of the series"
MOST = "the most like it of those kept"


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("epochs")
    last, other = small.random(1), small.random(2)
    for name, angle in {"s-000001": 40, "s-000002": 10, "s": 0}.items():
        told = {"ss_session_id": "7", "ss_output_name": "s"}
        found = small.turned(last, other, angle)
        small.save(folder / "loras" / f"{name}.safetensors", found, told)
    small.save(folder / "loras" / "t-000001.safetensors", small.turned(last, other, 80))
    small.save(folder / "loras" / "page.safetensors", small.each(last, lambda m: 0 * m))
    small.index(folder / "i.db", folder / "loras")
    return folder / "i.db"


def test_lines(db: Path) -> None:
    done = small.run(db, "epochs", "--header")
    assert (done.exit_code, done.stderr) == (0, NOTE)
    header, *lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert header == [
        "path",
        "series",
        "at",
        "norm",
        "cosine",
        "change",
        "proposal",
        "reason",
        "estimated",
    ]
    folder = db.parent / "loras"
    last, other = small.random(1), small.random(2)
    first = small.turned(last, other, 40)
    second = small.turned(last, other, 10)
    a, b, c = (
        f"{small.cosine(*pair):.6f}" for pair in ((first, last), (second, last), (first, second))
    )
    why = (
        f"really different: cosine {float(a):.3f} to s.safetensors, the most like it of those kept"
    )
    like = f"much like s.safetensors: cosine {float(b):.3f}"
    changes = [f"{1 - float(c):.6f}", f"{1 - float(b):.6f}"]
    assert [line[:3] + line[4:] for line in lines] == [
        [f"{folder}/s-000001.safetensors", "s", "epoch 1", a, "", "keep", why, "[]"],
        [f"{folder}/s-000002.safetensors", "s", "epoch 2", b, changes[0], "—", like, "[]"],
        [f"{folder}/s.safetensors", "s", "last", "1.000000", changes[1], "keep", LAST, "[]"],
    ]
    assert float(lines[0][3]) == pytest.approx(small.norm(first), rel=1e-5)


def test_kept_paths_and_json(db: Path) -> None:
    kept = [db.parent / "loras" / f"{name}.safetensors" for name in ("s-000001", "s")]
    done = small.run(db, "epochs", "--kept", "-0")
    assert done.stdout_bytes == b"".join(os.fsencode(path) + b"\0" for path in kept)
    rows = json.loads(small.run(db, "epochs", "--json", "--threshold", "0.7").stdout)
    assert [row["proposal"] for row in rows] == ["—", "—", "keep"]
    assert sorted(rows[0]) == sorted(
        [
            "path",
            "series",
            "position",
            "of",
            "at",
            "epoch",
            "step",
            "norm",
            "cosine",
            "change",
            "proposal",
            "reason",
            "estimated",
            "presence",
            "name",
            "architecture",
            "by",
            "session",
            "other_paths",
        ]
    )


def test_targets(db: Path) -> None:
    one = small.run(db, "epochs", "s-000002")
    assert one.stdout.count("\n") == 3
    assert small.run(db, "epochs", "-", input="s-000002\tx\n").stdout == one.stdout
    none = small.run(db, "epochs", "t-000001", "--exit-code")
    assert (none.exit_code, none.stdout) == (1, "")
    assert none.stderr == "No two LoRAs here are of one training run, as far as can be seen.\n"
    wrong = small.run(db, "epochs", "page", "nobody")
    assert wrong.exit_code == 3
    assert "page: its ΔW is zero" in wrong.stderr
    assert "'nobody' is neither a file nor a name in the index" in wrong.stderr
    assert small.run(db, "epochs", "--threshold", "2").exit_code == 2


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_estimates_are_marked_for_people(db: Path, tmp_path: Path) -> None:
    small.index(tmp_path / "i.db", db.parent / "loras", relate=False)
    command = [sys.executable, "-m", "lorafind", "--db", str(tmp_path / "i.db")]
    code, shown = run_on_terminal([*command, "epochs"], ROOT, {"NO_COLOR": "1"}, columns=240)
    assert code == 0
    header, first, _, last = shown.splitlines()[:4]
    assert header.split() == [
        "File",
        "Series",
        "Epoch,",
        "step",
        "‖ΔW‖",
        "To",
        "the",
        "last",
        "Change",
        "Proposal",
        "Why",
    ]
    assert " ~0.7" in first or " ~0.8" in first
    assert " 1.000 " in last and "~1.000" not in last
