"""``lorafind ls`` as a user sees it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lorafind.index.store import Store
from lorafind.search.ls import Filters, listing
from tests.index import make
from tests.search import small
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def db(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ls")
    told = {"modelspec.title": "Rainy Day", "modelspec.trigger_phrase": "rainpic, wet street"}
    small.save(folder / "loras" / "rain.safetensors", small.random(1), told)
    small.save(folder / "loras" / "sun.safetensors", small.random(2, 8))
    (folder / "loras" / "page.safetensors").write_text("<!DOCTYPE html><html></html>")
    small.index(folder / "i.db", folder / "loras")
    return folder / "i.db"


def test_lines(db: Path) -> None:
    folder = db.parent / "loras"
    size = (folder / "rain.safetensors").stat().st_size
    bigger = (folder / "sun.safetensors").stat().st_size
    done = small.run(db, "ls")
    assert (done.exit_code, done.stderr) == (0, "")
    assert done.stdout == (
        f"{folder}/rain.safetensors\tsd1\tlora\t4\tF32\t{size}\tRainy Day\t"
        '["rainpic", "wet street"]\t\tlora\t\n'
        f"{folder}/sun.safetensors\tsd1\tlora\t8\tF32\t{bigger}\tsun\t[]\t\tlora\t\n"
    )
    assert small.run(db, "ls", "--header", "--rank", "64-").stdout == (
        "path\tarchitecture\tfamily\trank\tdtype\tsize\tname\ttrigger_words\tbase_model\tstatus\t"
        "reason\n"
    )


def test_json_and_paths(db: Path) -> None:
    rows = json.loads(small.run(db, "ls", "--json", "--status", "all").stdout)
    assert [row["status"] for row in rows] == ["html", "lora", "lora"]
    assert sorted(rows[0]) == sorted(
        [
            "path",
            "architecture",
            "family",
            "rank",
            "dtype",
            "size",
            "name",
            "trigger_words",
            "base_model",
            "status",
            "outcome",
            "reason",
            "effective_dtype",
            "spelling",
            "sha256",
            "content",
            "link",
        ]
    )
    assert "web page" in rows[0]["reason"]
    paths = small.run(db, "ls", "-0", "--rank", "5-").stdout_bytes
    assert paths == os.fsencode(db.parent / "loras" / "sun.safetensors") + b"\0"


def test_nothing_found(db: Path) -> None:
    none = small.run(db, "ls", "--rank", "99", "--exit-code")
    assert (none.exit_code, none.stdout, none.stderr) == (1, "", "")
    typo = small.run(db, "ls", "--arch", "sd2", "--family", "lor", "--status", "html,checkpnt")
    assert typo.exit_code == 0
    assert typo.stderr == (
        "Nothing here has the architecture 'sd2'; there is sd1. Did you mean sd1?\n"
        "Nothing here has the family 'lor'; there is lora. Did you mean lora?\n"
        "Nothing here has the status 'checkpnt'; there is html, lora.\n"
    )
    # Words that only happen to have no rows are no mistakes.
    assert small.run(db, "ls", "--status", "gone,offline").stderr == ""
    wrong = small.run(db, "ls", "--rank", "many")
    assert wrong.exit_code == 2
    assert "'many' is no rank: write 16, 8-32, 64- or -8" in wrong.stderr
    missing = small.run(db.parent / "none.db", "ls")
    assert missing.exit_code == 4
    assert "run `lorafind index FOLDER` first" in missing.stderr


def test_ten_thousand_rows_without_torch(tmp_path: Path) -> None:
    with Store.open(tmp_path / "i.db", "write") as store, store.batch():
        store.conn.execute("INSERT INTO roots (path, single) VALUES (?, 0)", (b"/r",))
        for number in range(10_000):
            facts = {"name": f"n{number}", "sidecar": {"notes": "x" * 1000}}
            lora = make.lora(store, f"c{number}", ranks={"16": 2}, facts=facts)
            store.put_file(make.found(b"%05d" % number), make.facts(lora_id=lora))
    steps = 0

    def step() -> None:
        nonlocal steps
        steps += 1

    with Store.open(tmp_path / "i.db") as store:
        store.conn.set_progress_handler(step, 1000)
        rows = listing(store, Filters())
        assert next(rows)["path"] == "/r/00000"
        # The first row does not wait for the others.
        assert steps == 0
        assert sum(1 for _ in rows) == 9_999
        assert steps > 100
    code = (
        "import sys; from lorafind.cli.app import run\n"
        "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
        "run()"
    )
    command = [sys.executable, "-c", code, "--db", str(tmp_path / "i.db"), "ls"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stderr == "False\n"
    assert done.stdout.count("\n") == 10_000


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_a_long_table_has_one_heading_and_straight_columns(tmp_path: Path) -> None:
    with Store.open(tmp_path / "i.db", "write") as store, store.batch():
        store.conn.execute("INSERT INTO roots (path, single) VALUES (?, 0)", (b"/r",))
        for number in range(1_100):
            facts = {"name": "n" * (number % 5)}
            lora = make.lora(store, f"c{number}", ranks={"16": 2}, facts=facts)
            store.put_file(make.found(b"%05d" % number), make.facts(lora_id=lora))
    command = [sys.executable, "-m", "lorafind", "--db", str(tmp_path / "i.db"), "ls"]
    code, shown = run_on_terminal(command, ROOT, {"NO_COLOR": "1"}, columns=150)
    header, *lines = shown.splitlines()
    assert code == 0 and len(lines) == 1_100
    assert header.startswith("File") and "Architecture" in header
    assert {line.index("sd1") for line in lines} == {header.index("Architecture")}
    assert {line.rindex("lora") for line in lines} == {header.index("Status")}
