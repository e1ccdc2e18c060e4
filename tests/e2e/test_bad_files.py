"""Whatever lies in a folder: every file has an honest outcome, and none stops a run."""

from __future__ import annotations

import io
import json
import math
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save

from lorafind.files.outcome import MAX_REASON, OUTCOMES
from lorafind.index.build import build
from lorafind.index.progress import Silent
from lorafind.index.store import Store
from tests.e2e.tools import (
    OLD_NS,
    age,
    command,
    environment,
    files,
    healthy,
    index,
    lorafind,
    rows,
    told,
)
from tests.unprivileged import needs_permissions, open_folder, unprivileged

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="FIFOs, links and odd names")
#: In KiB, as getrusage counts on Linux.
GIB = 2**20

Tensors = dict[str, torch.Tensor]
STEM = "lora_unet_down_blocks_0_attentions_{}_transformer_blocks_0_attn1_to_q"


def lora(seed: int = 0, rank: int = 2) -> Tensors:
    """A small LoRA of Stable Diffusion 1."""
    g = torch.Generator().manual_seed(seed)
    tensors: Tensors = {}
    for i in range(2):
        stem = STEM.format(i)
        tensors[f"{stem}.lora_up.weight"] = torch.randn(320, rank, generator=g)
        tensors[f"{stem}.lora_down.weight"] = torch.randn(rank, 320, generator=g)
        tensors[f"{stem}.alpha"] = torch.tensor(1.0)
    return tensors


def changed(end: str, change: Callable[[torch.Tensor], torch.Tensor]) -> bytes:
    """A LoRA in which the first tensor whose name ends so is another."""
    tensors = lora()
    name = next(name for name in tensors if name.endswith(end))
    return save(tensors | {name: change(tensors[name])})


def written(value: float) -> Callable[[torch.Tensor], torch.Tensor]:
    """Replaces the first number."""

    def change(t: torch.Tensor) -> torch.Tensor:
        t = t.clone()
        t.view(-1)[0] = value
        return t

    return change


def stored(header: Any, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def tensor(begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F16", "shape": [(end - begin) // 2], "data_offsets": [begin, end]}


GOOD = save(lora())
UP = f"{STEM.format(0)}.lora_up.weight"

#: What stands in a file → the outcome.
CONTENTS: dict[str, tuple[bytes, str]] = {
    "good": (GOOD, "lora"),
    "rank above the layer": (save(lora(1, rank=400)), "lora"),
    "猫 é": (save(lora(2)), "lora"),
    "bundle": (save(lora(3) | {"bundle_emb.word.string_to_param.*": torch.ones(1, 768)}), "lora"),
    "orphan": (save({k: t for k, t in lora(4).items() if k != UP}), "lora"),
    "nothing": (b"", "unreadable"),
    "seven": (b"1234567", "unreadable"),
    "truncated in the data": (GOOD[:-100], "unreadable"),
    "truncated in the header": (GOOD[:100], "unreadable"),
    "trailing": (GOOD + b"x", "unreadable"),
    "length": ((2**62).to_bytes(8, "little") + GOOD[8:], "unreadable"),
    "beyond": ((10**8).to_bytes(8, "little") + GOOD[8:], "unreadable"),
    "overlap": (stored({"a": tensor(0, 8), "b": tensor(4, 12)}, bytes(12)), "unreadable"),
    "hole": (stored({"a": tensor(0, 4), "b": tensor(8, 12)}, bytes(12)), "unreadable"),
    "twice": (stored(b'{"a":{},"a":{}}'), "unreadable"),
    "bomb of lists": (stored(b'{"a":[' + b"[]," * 2_000_000 + b"[]]}"), "unsupported"),
    "bomb of depth": (stored(b"[" * 1_000_000), "unreadable"),
    "bomb of names": (
        stored(b"{" + b",".join(b'"%x":0' % i for i in range(1_600_000)) + b"}"),
        "unsupported",
    ),
    "bomb of digits": (
        stored(b'{"a":{"dtype":"U8","shape":[' + b",".join([b"9" * 4200] * 500) + b"]}}"),
        "unreadable",
    ),
    "long name": (stored(b'{"' + b"n" * 1_000_000 + b'":{}}'), "unreadable"),
    "long note": (save(lora(5), {"note": "x" * 5_000_000 + "😀"}), "lora"),
    "nan": (changed(".lora_up.weight", written(math.nan)), "invalid"),
    "inf": (changed(".lora_down.weight", written(-math.inf)), "invalid"),
    "alpha nan": (changed(".alpha", written(math.nan)), "invalid"),
    "alpha inf": (changed(".alpha", written(math.inf)), "invalid"),
    "large": (changed(".lora_up.weight", lambda t: t * 1e12), "invalid"),
    "larger": (changed(".lora_up.weight", lambda t: t.double() * 1e300), "invalid"),
    "two alphas": (changed(".alpha", lambda t: torch.ones(3)), "invalid"),
    "ranks": (changed(".lora_up.weight", lambda t: torch.ones(320, 3)), "invalid"),
    "zero": (save({k: t * (".lora_up." not in k) for k, t in lora().items()}), "zero"),
    "empty": (stored({"__metadata__": {"format": "pt"}}), "empty"),
    "embedding": (save({"emb_params": torch.ones(2, 768)}), "embedding"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\n", "lfs-pointer"),
    "page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "html"),
    "error": (b'{"error": "not found"}', "json"),
    "words": (b"This file has been removed by its owner.", "text"),
    "archive": (b"PK\x03\x04" + bytes(40), "unreadable"),
    "zeros": (bytes(10_000), "unreadable"),
    "ones": (b"\xff" * 10_000, "unreadable"),
}
#: Bytes of names that are no text, or no line.
NAMES = {
    b"caf\xe9\xff": (save(lora(6)), "lora"),
    b"broken\xe9\xff": (b"", "unreadable"),
    b"two\nlines\t\x1b[31m": (save(lora(7)), "lora"),
    b"broken\nlines": (b"123", "unreadable"),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All of these, and what is no file at all."""
    place = tmp_path_factory.mktemp("bad") / "loras"
    place.mkdir()
    for name, (data, _) in CONTENTS.items():
        (place / f"{name}.safetensors").write_bytes(data)
    for odd, (data, _) in NAMES.items():
        with open(os.fsencode(place) + b"/" + odd + b".safetensors", "wb") as file:
            file.write(data)
    (place / "folder.safetensors").mkdir()
    (place / "dangling.safetensors").symlink_to(place / "absent")
    (place / "loop.safetensors").symlink_to(place / "loop.safetensors")
    (place / "device.safetensors").symlink_to("/dev/zero")
    (place / "round").mkdir()
    (place / "round/again").symlink_to(place)
    os.mkfifo(place / "fifo.safetensors")
    # What stands beside a file is read too.
    for beside in ("good.json", "good.txt", "adapter_config.json"):
        os.mkfifo(place / beside)
    (place / "rank above the layer.json").symlink_to("/dev/zero")
    (place / "adapter_model.safetensors").write_bytes(save(lora(8)))
    age(place)
    return place


def expected(folder: Path) -> dict[str, str]:
    """Path → outcome."""
    found = {str(folder / f"{name}.safetensors"): told for name, (_, told) in CONTENTS.items()}
    found |= {
        os.fsdecode(os.fsencode(folder) + b"/" + name + b".safetensors"): outcome
        for name, (_, outcome) in NAMES.items()
    }
    no_files = ("folder", "dangling", "loop", "device", "fifo")
    found |= {str(folder / f"{name}.safetensors"): "not-a-file" for name in no_files}
    return found | {str(folder / "adapter_model.safetensors"): "lora"}


#: A process counts the memory of the one that it was forked from: so it is forked from a small one.
MEASURED = """
import resource, subprocess, sys
code = subprocess.run(sys.argv[1:]).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss, file=sys.stderr)
sys.exit(code)
"""


def test_every_file_has_an_honest_outcome_and_none_stops_the_run(
    folder: Path, tmp_path: Path
) -> None:
    db = tmp_path / "i.db"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command("index", folder, "--json")],
        env=environment(db),
        capture_output=True,
        timeout=120,
    )
    if sys.platform == "linux":
        assert int(done.stderr.split()[-1]) < GIB
    assert b"Warning" not in done.stderr
    wanted = expected(folder)
    found = rows(done, 3)
    refused = {row["path"]: row["outcome"] for row in found["refused"]}
    assert refused == {path: outcome for path, outcome in wanted.items() if outcome != "lora"}
    for row in found["refused"]:
        assert row["reason"].isprintable() and len(row["reason"]) <= MAX_REASON, row
        assert "Error" not in row["reason"] and row["outcome"] in OUTCOMES, row
    assert {path: facts["status"] for path, facts in files(db).items()} == wanted
    healthy(db)
    again = rows(lorafind("index", "--json", db=db), 3)
    assert again["bytes"] == again["added"] == again["refreshed"] == 0
    assert {row["path"]: row["outcome"] for row in again["refused"]} == refused
    # Every path can be asked for, whatever is in its name; none of them is a copy of another.
    names = b"\0".join(os.fsencode(path) for path in wanted)
    asked = lorafind("info", "-", "--jsonl", "--keys", "--modules", db=db, stdin=names)
    told(asked, 3)
    said = [json.loads(line) for line in asked.stdout.splitlines()]
    assert {row["path"]: row["outcome"] for row in said} == wanted
    assert all((row["reason"] == "") == (row["outcome"] == "lora") for row in said)
    assert rows(lorafind("dupes", "--grade", "all", "--json", db=db)) == []
    good = str(folder / "good.safetensors")
    near = rows(lorafind("similar", good, "--json", "--all", db=db))
    assert {row["path"] for row in near} == {
        path for path, outcome in wanted.items() if outcome == "lora" and path != good
    }


def test_a_bad_target_is_one_sentence(folder: Path, tmp_path: Path) -> None:
    db = tmp_path / "i.db"
    index(db, folder / "good.safetensors")
    names = ("nan", "zero", "truncated in the data", "bomb of lists", "page", "fifo", "folder")
    paths = [folder / f"{name}.safetensors" for name in names]
    done = lorafind("similar", *paths, "--json", db=db)
    said = told(done, 3).strip().splitlines()
    assert len(said) == len(names)
    assert all(path.name in sentence for path, sentence in zip(paths, said, strict=True))
    assert json.loads(done.stdout) == []


def test_a_socket_and_a_device(tmp_path: Path) -> None:
    loras = tmp_path / "loras"
    loras.mkdir()
    names = {"socket"}
    with socket.socket(socket.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(loras)
        try:
            server.bind("socket.safetensors")
        finally:
            os.chdir(here)
        try:
            os.mknod(loras / "null.safetensors", 0o20666, os.makedev(1, 3))
            names.add("null")
        except PermissionError:
            # Only root makes devices; a link to one is in the folder above.
            assert os.geteuid() != 0
        index(tmp_path / "i.db", loras)
    reasons = {Path(p).stem: f["reason"] for p, f in files(tmp_path / "i.db").items()}
    assert reasons.keys() == names
    assert reasons["socket"] == "it is a socket"


@needs_permissions
def test_what_may_not_be_read_is_kept_and_tried_again() -> None:
    with open_folder() as place, unprivileged():
        loras, db = place / "loras", place / "i.db"
        (loras / "closed").mkdir(parents=True)
        for path in (loras / "a.safetensors", loras / "closed/b.safetensors"):
            path.write_bytes(GOOD)
        age(loras)
        index(db, loras)
        (loras / "c.safetensors").write_bytes(save(lora(1)))
        (loras / "c.safetensors").chmod(0)
        (loras / "closed").chmod(0)
        summary = index(db)
        assert [(Path(os.fsdecode(r.path)).name, r.outcome) for r in summary.refused] == [
            ("c.safetensors", "inaccessible")
        ]
        found = {Path(path).name: facts for path, facts in files(db).items()}
        assert found["b.safetensors"]["presence"] == "offline"
        assert found["b.safetensors"]["status"] == "lora"
        (loras / "closed").chmod(0o700)
        (loras / "c.safetensors").chmod(0o600)
        summary = index(db)
        assert (summary.refused, summary.unchanged) == ([], 2)
        found = {Path(path).name: facts for path, facts in files(db).items()}
        assert {(facts["status"], facts["presence"]) for facts in found.values()} == {
            ("lora", "here")
        }


# ---------------------------------------------------------------------------- the moving world


class Meanwhile(Silent):
    """Does something between the look at the folders and the reading of the files."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.action = action

    def stage(self, title: str, files: int, size: int) -> None:
        if title == "Reading":
            self.action()


def run(db: Path, *paths: Path, meanwhile: Callable[[], object]) -> dict[str, str]:
    """One run of ``index``; outcomes of what was refused, by stem."""
    with Store.open(db, "write") as store:
        summary = build(store, paths, device="cpu", progress=Meanwhile(meanwhile))
    return {Path(os.fsdecode(row.path)).stem: row.outcome for row in summary.refused}


def statuses(db: Path) -> dict[str, str]:
    return {Path(path).stem: facts["status"] for path, facts in files(db).items()}


def content(db: Path, name: str) -> str:
    return next(f["content"] for path, f in files(db).items() if Path(path).stem == name)


@pytest.fixture
def loras(tmp_path: Path) -> Path:
    place = tmp_path / "loras"
    place.mkdir()
    (place / "other.safetensors").write_bytes(save(lora(9)))
    age(place)
    return place


def test_files_that_vanish_or_change_their_nature_before_they_are_read(
    loras: Path, tmp_path: Path
) -> None:
    db = tmp_path / "i.db"
    paths = [loras / f"{name}.safetensors" for name in ("gone", "fifo", "folder", "link")]
    for seed, path in enumerate(paths):
        path.write_bytes(save(lora(seed)))

    def meanwhile() -> None:
        for path in paths:
            path.unlink()
        os.mkfifo(paths[1])
        paths[2].mkdir()
        paths[3].symlink_to("/dev/zero")

    refused = run(db, loras, meanwhile=meanwhile)
    assert refused == {
        "gone": "vanished",
        "fifo": "not-a-file",
        "folder": "not-a-file",
        "link": "not-a-file",
    }
    summary = index(db)
    assert summary.gone == 1
    assert {Path(os.fsdecode(r.path)).stem for r in summary.refused} == {"fifo", "folder", "link"}
    for path in paths[1:]:
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
    for seed, path in enumerate(paths):
        path.write_bytes(save(lora(seed)))
    index(db)
    assert set(statuses(db).values()) == {"lora"}


@pytest.mark.parametrize("stamped", [False, True], ids=["times of now", "time of the server"])
@pytest.mark.parametrize("reserved", [False, True], ids=["growing", "reserved"])
def test_a_download_is_what_it_is_only_when_it_is_finished(
    loras: Path, tmp_path: Path, reserved: bool, stamped: bool
) -> None:
    """In every state it is read as it stands, and read again when it has changed."""
    db, path = tmp_path / "i.db", loras / "coming.safetensors"
    whole = save(lora(1, rank=8))
    index(db, loras)
    seen = set()
    for part in (0, 5, 500, len(whole) // 2, len(whole) - 1):
        with path.open("wb") as file:
            file.write(whole[:part])
            file.truncate(len(whole) if reserved else part)
        index(db)
        seen.add(statuses(db)["coming"])
        if statuses(db)["coming"] == "lora":
            # A file that is reserved already: the rest of its numbers is zero.
            assert reserved and content(db, "coming") != content(db, "other")
    assert "unreadable" in seen and (reserved or seen == {"unreadable"})
    path.write_bytes(whole)
    if stamped:
        os.utime(path, ns=(OLD_NS, OLD_NS))
    assert index(db).refused == []
    (loras / "copy.safetensors").write_bytes(whole)
    index(db)
    assert content(db, "coming") == content(db, "copy")
    assert len(files(db)) == 3


class Drive:
    """Files that are read as from a slow drive: in small pieces, late, or not before a word."""

    def __init__(self) -> None:
        self.delay = 0.0
        self.waiting = threading.Event()
        self.word = threading.Event()
        self.word.set()
        self.before: Callable[[str], object] = lambda name: None

    def open(self, fd: int, mode: str, buffering: int) -> Any:
        drive = self
        name = os.readlink(f"/proc/self/fd/{fd}")

        class Slow(io.FileIO):
            def readinto(self, buffer: Any) -> int | None:
                drive.before(name)
                if name.endswith("slow.safetensors"):
                    drive.waiting.set()
                    drive.word.wait(30)
                    time.sleep(drive.delay)
                    buffer = memoryview(buffer)[:4096]
                count: int | None = super().readinto(buffer)
                return count

        return Slow(fd, mode)


@pytest.fixture
def drive(monkeypatch: pytest.MonkeyPatch) -> Iterator[Drive]:
    if sys.platform != "linux":
        pytest.skip("the name of an open file is asked of Linux")
    slow = Drive()
    monkeypatch.setattr("lorafind.files.opening.open", slow.open, raising=False)
    yield slow
    slow.word.set()


@pytest.mark.parametrize("change", ["grows", "shrinks", "is touched", "is replaced"])
def test_a_file_that_changes_while_it_is_read(
    loras: Path, tmp_path: Path, drive: Drive, change: str
) -> None:
    db, path = tmp_path / "i.db", loras / "slow.safetensors"
    whole = save(lora(1, rank=32))
    path.write_bytes(whole)
    os.utime(path, ns=(OLD_NS, OLD_NS))
    reads = 0

    def before(name: str) -> None:
        nonlocal reads
        reads += name.endswith("slow.safetensors")
        # Of some forty pieces.
        if reads != 20:
            return
        if change == "grows":
            with path.open("ab") as file:
                file.write(b"x")
        elif change == "shrinks":
            os.truncate(path, len(whole) - 1000)
        elif change == "is touched":
            os.utime(path, ns=(OLD_NS, OLD_NS + 1))
        else:
            (tmp_path / "new").write_bytes(save(lora(2, rank=32)))
            os.replace(tmp_path / "new", path)

    drive.before = before
    summary = index(db, loras)
    outcomes = {Path(os.fsdecode(row.path)).stem: row.outcome for row in summary.refused}
    assert reads >= 20
    # Who holds an open file reads on in it, though its name leads to another by now.
    assert outcomes == ({} if change == "is replaced" else {"slow": "changing"})
    assert statuses(db)["other"] == "lora"
    drive.before = lambda name: None
    path.write_bytes(whole)
    os.utime(path, ns=(OLD_NS, OLD_NS))
    if change == "is touched":
        # As it was when it was found: an outcome that may pass is not taken for the last word.
        assert index(db).refreshed == 1
    else:
        index(db)
    (loras / "copy.safetensors").write_bytes(whole)
    index(db)
    assert content(db, "slow") == content(db, "copy")


def test_a_slow_drive_holds_up_nobody_else(loras: Path, tmp_path: Path, drive: Drive) -> None:
    db = tmp_path / "i.db"
    (loras / "slow.safetensors").write_bytes(save(lora(1, rank=64)))
    for seed in range(12):
        (loras / f"fast {seed}.safetensors").write_bytes(save(lora(20 + seed)))
    drive.word.clear()
    ticks = []

    class Clock(Silent):
        def advance(self, files: int, size: int) -> None:
            ticks.append(files)

    ended = []

    def work() -> None:
        with Store.open(db, "write") as store:
            ended.append(build(store, [loras], device="cpu", progress=Clock()))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    assert drive.waiting.wait(30)
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline and (not db.exists() or len(known(db)) < 13):
        time.sleep(0.1)
    # The others are in the index, where readers find them, while one is waited for.
    assert not ended
    assert {name.partition(" ")[0] for name in known(db)} == {"fast", "other"}
    assert len(rows(lorafind("ls", "--json", db=db))) == 13
    near = rows(lorafind("similar", loras / "other.safetensors", "--json", db=db))
    assert near
    # And the clock goes on.
    before = len(ticks)
    while time.monotonic() < deadline and len(ticks) == before:
        time.sleep(0.1)
    assert len(ticks) > before and not ended
    drive.delay = 0.001
    drive.word.set()
    thread.join(60)
    assert ended and ended[0].added == 14 and not ended[0].refused
    assert statuses(db)["slow"] == "lora"


def known(db: Path) -> dict[str, str]:
    with Store.open(db) as store:
        return {Path(os.fsdecode(row.path)).stem: row.status for row in store.known()}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="counts memory as Linux does")
def test_a_file_beyond_two_gigabytes(loras: Path, tmp_path: Path) -> None:
    """A LoRA with a tensor of 2.5 GB beside it, of which nothing needs to be held."""
    size = 5 * 2**29
    tensors = lora(1)
    described: dict[str, Any] = {}
    data = io.BytesIO()
    for name, t in tensors.items():
        begin = data.tell()
        data.write(t.numpy().tobytes())
        described[name] = {"dtype": "F32", "shape": t.shape, "data_offsets": [begin, data.tell()]}
    begin = data.tell()
    whole = {"dtype": "U8", "shape": [size], "data_offsets": [begin, begin + size]}
    path = loras / "large.safetensors"
    with path.open("wb") as file:
        file.write(stored({**described, "model.embed_tokens.weight": whole}, data.getvalue()))
        file.truncate(file.tell() + size)
    db = tmp_path / "i.db"
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *command("index", loras, "--json")],
        env=environment(db),
        capture_output=True,
    )
    assert int(done.stderr.split()[-1]) < GIB
    assert rows(done)["added"] == 2
    assert statuses(db) == {"large": "lora", "other": "lora"}
