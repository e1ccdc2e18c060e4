"""`index --engine ray` gives what one machine gives, whatever becomes of its workers."""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lorafind.api import Index
from lorafind.demo.make import make
from lorafind.files.scan import ScanReport, Target, scan
from lorafind.index.problem import IndexProblem
from lorafind.index.ray_engine import TRIES, examined
from lorafind.index.reconcile import Read
from lorafind.index.store import Store
from lorafind.signatures.constants import VERSION
from tests.index.same import dump, same

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="needs SIGKILL and /proc"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]

#: A worker dies as it opens a file whose name holds one of these: once, or every time.
ONCE, ALWAYS = "dies-once", "dies-always"
ROOT = Path(__file__).resolve().parents[2]


#: Runs in every process of the cluster: workers die of certain files as of a fault in a library.
MORTAL = f"""
import os, signal, sys
def heard(event, arguments):
    if event != "open" or not isinstance(arguments[0], (str, bytes)):
        return
    path = os.fsdecode(arguments[0])
    if not path.endswith(".safetensors"):
        return
    if {ONCE!r} in path:
        try:
            os.mkdir(path + ".died")
        except FileExistsError:
            return
        os.kill(os.getpid(), signal.SIGKILL)
    if {ALWAYS!r} in path:
        os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(heard)
"""


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """One cluster for all tests here."""
    folder = tmp_path_factory.mktemp("site")
    (folder / "sitecustomize.py").write_text(MORTAL)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(folder), str(ROOT)]))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        ray.init(
            "local",
            num_cpus=2,
            object_store_memory=80 * 2**20,
            include_dashboard=False,
            log_to_driver=False,
            logging_level=logging.CRITICAL,
        )
        yield
        ray.shutdown()


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's files, of which two cannot be indexed."""
    folder = tmp_path_factory.mktemp("ray") / "loras"
    make(folder)
    for path in folder.rglob("*.safetensors"):
        os.utime(path, (1_600_000_000, 1_600_000_000))
    return folder


@pytest.fixture(scope="module")
def local(collection: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What one machine makes of the collection."""
    return build(tmp_path_factory.mktemp("local") / "x.db", [collection])


def build(db: Path, paths: list[Path], **options: Any) -> dict[str, Any]:
    with Index.open(db, write=True) as index:
        index.build(paths, device="cpu", **options)
        return dump(index.store)


def workers() -> list[int]:
    """Processes of Ray that examine files."""
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if b"Examiner" in (folder / "cmdline").read_bytes():
                found.append(int(folder.name))
        except OSError:
            continue
    return found


class Watch:
    """Calls a function as the first results are there."""

    def __init__(self, call: Any) -> None:
        self.call = call
        self.after = 0

    def stage(self, title: str, files: int, size: int) -> None: ...

    def advance(self, files: int, size: int) -> None:
        if not files:
            return
        if self.call is not None:
            call, self.call = self.call, None
            call()
        else:
            self.after += files

    def note(self, sentence: str) -> None: ...


def test_the_index_is_that_of_one_machine(
    nodes: None, collection: Path, local: dict[str, Any], tmp_path: Path
) -> None:
    with Index.open(tmp_path / "x.db", write=True) as index:
        summary = index.build([collection], engine="ray")
        same(dump(index.store), local)
        assert summary.added == sum(row[-1] is not None for row in local["files"].values())
        assert len(summary.refused) == len(local["files"]) - summary.added > 0
        again = index.build(engine="ray")
        assert (again.added, again.refreshed, again.bytes) == (0, 0, 0)
        assert again.unchanged == summary.added


def test_workers_that_die_are_replaced(
    nodes: None,
    collection: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With LoRAs that have no relatives, so that the basis is compared too."""
    folders = [collection / "thin", collection / "wild"]
    one = build(tmp_path / "one.db", folders)
    assert one["bases"] and not one["families"]
    monkeypatch.setattr("lorafind.index.build.COMMIT_SECONDS", 0.0)
    killed = []

    def kill() -> None:
        for pid in workers():
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)

    watch = Watch(kill)
    found = build(tmp_path / "x.db", folders, engine="ray", progress=watch)
    assert killed and watch.after
    same(found, one)


@pytest.mark.slow
def test_a_file_that_ends_its_worker_every_time_is_told_from_its_neighbours(
    nodes: None, collection: Path, local: dict[str, Any], tmp_path: Path
) -> None:
    files = tmp_path / "l"
    files.mkdir()
    sources = sorted((collection / "thin").iterdir())[:6]
    names = ["a", "b", ONCE, "c", ALWAYS, "d"]
    for name, source in zip(names, sources, strict=True):
        (files / f"{name}.safetensors").write_bytes(source.read_bytes())
    found = build(tmp_path / "x.db", [files], engine="ray", relate=False)
    assert len(found["files"]) == len(names)
    for name, source in zip(names, sources, strict=True):
        *_, status, reason, _, _, presence, content = found["files"][
            str(files / f"{name}.safetensors")
        ]
        if name == ALWAYS:
            assert (status, content, presence) == ("failed", None, "here")
            assert f"each of the {2 * TRIES} Ray workers" in reason and ALWAYS in reason
        else:
            assert status == "lora", (name, reason)
            assert content == local["files"][str(source)][-1]
    assert (files / f"{ONCE}.safetensors.died").is_dir()


def test_what_is_known_is_not_computed_again(nodes: None, collection: Path, tmp_path: Path) -> None:
    with Store.open(tmp_path / "x.db", "write") as store, Index(store) as index:
        index.build([collection / "wild"], device="cpu", relate=False)
        contents = store.contents(VERSION)
    found = scan([Target(os.fsencode(collection))], ScanReport())
    reads = [Read(item, "new") for item in found if b"wild/" in item.path or b"-01" in item.path]
    with examined(reads, contents, lambda: None, False) as results:
        made = {done.found: done.lora for done in results}
    assert made.keys() == {read.found for read in reads}
    for item, lora in made.items():
        assert lora is not None
        assert (lora.modules is None) == (lora.content in contents)
        assert (lora.modules is None) or b"wild/" not in item.path
    assert {lora is not None and lora.modules is None for lora in made.values()} == {True, False}


def test_a_file_that_a_node_does_not_see_is_not_lost(
    nodes: None, collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each process has a working folder of its own: the driver's is not the workers'."""
    monkeypatch.chdir(collection / "wild")
    found = build(tmp_path / "x.db", [Path("/proc/self/cwd")], engine="ray", relate=False)
    assert len(found["files"]) == 4
    for *_, status, reason, _, _, _, content in found["files"].values():
        assert (status, content) == ("vanished", None)
        assert "no longer there, on the node that was to read it" in reason


@pytest.mark.slow
def test_an_interrupted_run_keeps_what_it_has_and_goes_on(
    nodes: None,
    collection: Path,
    local: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lorafind.index.build.COMMIT_SECONDS", 0.0)

    def interrupt() -> None:
        raise KeyboardInterrupt

    with Index.open(tmp_path / "x.db", write=True) as index:
        with pytest.raises(KeyboardInterrupt):
            index.build([collection], engine="ray", progress=Watch(interrupt))
        kept = len(dump(index.store)["files"])
        assert 0 < kept < len(local["files"])
        again = index.build(device="cpu")
        assert again.added + len(again.refused) - again.known_refused + kept == len(local["files"])
        same(dump(index.store), local)
    assert ray.is_initialized()


@pytest.mark.slow
def test_a_node_with_another_lorafind_is_told(
    nodes: None, collection: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafind.index.ray_engine.VERSION", VERSION + 1)
    with (
        Index.open(tmp_path / "x.db", write=True) as index,
        pytest.raises(IndexProblem, match=r"Ray gave up: .*another lorafind.*on every node"),
    ):
        index.build([collection / "wild"], engine="ray")
