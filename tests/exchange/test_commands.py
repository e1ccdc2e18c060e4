"""``lorafind merge``, ``export`` and ``import`` as a user sees them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lorafind.index.shard import META
from lorafind.index.store import Store
from tests.exchange.make import index
from tests.search import small


@pytest.fixture
def shards(tmp_path: Path) -> list[Path]:
    found = []
    for k in (1, 2):
        found.append(index(tmp_path / f"{k}.db", {f"{k}": (f"{k}", 1), "zero": (None, k)}))
        with Store.open(found[-1], "write") as store, store.batch():
            store.set_meta(META, [k, 3])
    return found


def test_merge(tmp_path: Path, shards: list[Path]) -> None:
    db = tmp_path / "all.db"
    done = small.run(db, "merge", "--header", "--no-relations", *map(str, shards))
    assert done.exit_code == 0
    assert done.stdout.splitlines() == [
        "path\tfiles\tchanged\tloras\trenewed\trelations",
        f"{shards[0]}\t2\t0\t1\t0\t0",
        f"{shards[1]}\t1\t1\t1\t0\t0",
    ]
    assert done.stderr == (
        "warning: shard 3 of 3 is missing: merge again when the index is there.\n"
    )
    listed = "".join(f"{path}\n" for path in shards)
    done = small.run(db, "merge", "--json", "--no-relations", "-", input=listed)
    assert [row["files"] for row in json.loads(done.stdout)] == [0, 0]
    assert done.stderr.startswith("The index held everything already: nothing was changed.\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["merge", "nowhere.db"], "There is no index at"),
        (["import", "nowhere"], "nowhere holds no export of lorafind"),
        (["import", "--lancedb", "nowhere"], "no LanceDB database at nowhere"),
    ],
)
def test_what_cannot_be_taken_in_makes_no_index(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], words: str
) -> None:
    pytest.importorskip("lancedb")
    monkeypatch.chdir(tmp_path)
    done = small.run(tmp_path / "all.db", *arguments)
    assert done.exit_code == 4 and words in done.stderr
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["folder", "lancedb"])
def test_export_and_import(tmp_path: Path, shards: list[Path], kind: str) -> None:
    pytest.importorskip("lancedb")
    place = [str(tmp_path / "out")] if kind == "folder" else ["--lancedb", str(tmp_path / "out")]
    done = small.run(shards[0], "export", *place)
    assert (done.exit_code, done.stderr) == (0, "")
    found = {line.split("\t")[1]: line.split("\t")[2] for line in done.stdout.splitlines()}
    assert found["files"] == "2" and found["loras"] == "1" and found["signatures"] == "1"
    done = small.run(shards[0], "export", *place)
    assert done.exit_code == 4 and "--force replaces it" in done.stderr
    done = small.run(tmp_path / "all.db", "import", *place, "--no-relations")
    assert done.stdout.endswith("\t2\t0\t1\t0\t0\n")
    # It is a shard, as the index was.
    assert "shards 2 and 3 of 3 are missing" in done.stderr


def test_wrong_use(tmp_path: Path, shards: list[Path]) -> None:
    for arguments in (["export"], ["import"], ["export", "a", "--lancedb", "b"]):
        done = small.run(shards[0], *arguments)
        assert done.exit_code == 2 and "either a folder or --lancedb" in done.stderr
    done = small.run(shards[0], "export", "s3://bucket/loras")
    assert done.exit_code == 4 and "is a URL" in done.stderr


def python(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60
    )


@pytest.mark.parametrize("package", ["pyarrow", "lancedb"])
def test_a_missing_extra_is_named(tmp_path: Path, shards: list[Path], package: str) -> None:
    code = (
        "import sys; sys.modules[sys.argv.pop(1)] = None\n"
        "from lorafind.__main__ import main; main()"
    )
    place = ["out"] if package == "pyarrow" else ["--lancedb", "out"]
    done = python(code, package, "--db", str(shards[0]), "export", *place)
    extra = "parquet" if package == "pyarrow" else "lancedb"
    assert done.returncode == 4
    assert f"This needs {package}, which the extra '{extra}' installs." in done.stderr


def test_merge_needs_no_extra(tmp_path: Path, shards: list[Path]) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(['pyarrow', 'lancedb', 'pandas']))\n"
        "from lorafind.__main__ import main; main()"
    )
    sources = list(map(str, shards))
    done = python(code, "--db", str(tmp_path / "all.db"), "merge", "--no-relations", *sources)
    assert done.returncode == 0, done.stderr
