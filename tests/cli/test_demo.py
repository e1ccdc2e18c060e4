"""``lorafind demo``: the collection is what it says, the commands run, nothing else is touched."""

import os
import re
import shlex
import struct
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from lorafind.bases.labels import read_labels
from lorafind.cli.demo import STEPS
from lorafind.demo.make import make
from lorafind.index.build import build
from lorafind.index.store import Store
from lorafind.search.dupes import Choice, Member, dupes
from tests.terminal import run_on_terminal

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 3_000_000


@pytest.fixture(scope="module")
def collection(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "collection"
    make(folder)
    return folder


def run(*arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """The program as a process in ``folder``, with a user's index that nothing may make."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "LORAFIND_DB": str(folder / "user.db"),
        "OMP_NUM_THREADS": "1",
    }
    return subprocess.run(
        [sys.executable, "-m", "lorafind", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        encoding="utf-8",
    )


# ---------------------------------------------------------------------------- the collection


def test_the_data_are_small_and_described() -> None:
    data = Path(str(files("lorafind.demo") / "data"))
    sizes = {path: path.stat().st_size for path in data.rglob("*") if path.is_file()}
    assert sum(sizes.values()) < LIMIT
    described = (data / "README.md").read_text("utf-8")
    for part in ("thin", "wild"):
        count = len(list((data / part).glob("*.safetensors")))
        assert re.search(rf"^\| `{part}` \| {count} \|", described, re.MULTILINE)
    assert sum(path.suffix == ".safetensors" for path in sizes) == 40
    assert len(sizes) == 41


def delta(path: Path) -> dict[str, np.ndarray]:
    """Flattened module name → ΔW, read with the safetensors library, by this test's own rules."""
    tensors = {key: t.double().numpy() for key, t in load_file(path).items()}
    found = {}
    for key, b in tensors.items():
        for up, down in (("lora_B", "lora_A"), ("lora_up", "lora_down")):
            if f".{up}." in key:
                a = tensors[key.replace(up, down)]
                name = key.split(f".{up}.")[0]
                alpha = tensors.get(f"{name}.alpha", np.float64(len(a)))
                found[name.removeprefix("lora_").replace(".", "_")] = float(alpha) / len(a) * b @ a
    return found


def rank(path: Path) -> int:
    """The largest rank of a module."""
    return max(np.linalg.matrix_rank(d) for d in delta(path).values())


def distance(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> float:
    """‖one − two‖ / ‖one‖ over the modules of ``two``, which ``one`` has all."""
    assert two.keys() <= one.keys()
    above = sum(float(((one[m] - two[m]) ** 2).sum()) for m in two)
    return (above / sum(float((one[m] ** 2).sum()) for m in two)) ** 0.5


def test_copies_are_what_they_are_said_to_be(collection: Path) -> None:
    thin, wild, copies = (collection / part for part in ("thin", "wild", "copies"))
    original = thin / "3dlet-train-01.safetensors"
    assert (copies / "untitled.safetensors").read_bytes() == original.read_bytes()

    original, copy = thin / "opensans-regular-train-01.safetensors", "opensans-titled.safetensors"
    one, two = load_file(original), load_file(copies / copy)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    with safe_open(copies / copy, "pt") as file:
        assert "modelspec.title" in file.metadata()

    lobster = wild / "lobster-train-02.safetensors"
    kohya = copies / "lobster-kohya.safetensors"
    assert not load_file(lobster).keys() & load_file(kohya).keys()
    assert distance(delta(lobster), delta(kohya)) == 0

    original, copy = (
        wild / "cabinsketch-regular-train-04.safetensors",
        "cabinsketch-fp16.safetensors",
    )
    assert {t.dtype for t in load_file(original).values()} == {torch.bfloat16}
    assert {t.dtype for t in load_file(copies / copy).values()} == {torch.float16}
    assert distance(delta(original), delta(copies / copy)) < 1e-3

    half = delta(copies / "ebgaramond12-half.safetensors")
    whole = delta(thin / "ebgaramond12-regular-train-01.safetensors")
    assert half.keys() == whole.keys()
    assert distance(whole, {m: 2 * d for m, d in half.items()}) < 1e-3

    part = delta(copies / "courier-prime-attention.safetensors")
    whole = delta(thin / "courier-prime-train-01.safetensors")
    assert {m for m in whole if "attn" in m} == part.keys()
    assert {m for m in whole if "_ff_" in m} == whole.keys() - part.keys() != set()
    assert distance(whole, part) == 0


def test_the_resize_is_the_best_of_its_rank(collection: Path) -> None:
    before = delta(collection / "wild/lobster-train-02.safetensors")
    resized = collection / "copies/lobster-rank2.safetensors"
    after = delta(resized)
    assert rank(resized) == 2
    assert before.keys() == after.keys()
    for name, matrix in before.items():
        tail = (np.linalg.svd(matrix, compute_uv=False)[2:] ** 2).sum()
        error = ((matrix - after[name]) ** 2).sum()
        # F16 adds about 2e-4 of the module, squared.
        assert tail <= error <= tail + 1e-6 * (matrix**2).sum()


def test_broken_and_unrelated_files(collection: Path) -> None:
    whole = (collection / "wild/lobster-train-02.safetensors").read_bytes()
    interrupted = (collection / "other/interrupted.safetensors").read_bytes()
    assert whole.startswith(interrupted)
    assert struct.unpack("<Q", interrupted[:8])[0] < len(interrupted) < len(whole)
    pointer = (collection / "other/pointer.safetensors").read_text("ascii")
    assert re.fullmatch(r"version https://git-lfs\S+\noid sha256:[0-9a-f]{64}\nsize \d+\n", pointer)
    assert len(delta(collection / "other/language-model.safetensors")) == 8


def test_it_is_the_same_every_time(collection: Path, tmp_path: Path) -> None:
    made = make(tmp_path / "again")

    def contents(folder: Path) -> dict[Path, bytes]:
        found = (path for path in folder.rglob("*") if path.is_file())
        return {path.relative_to(folder): path.read_bytes() for path in found}

    assert contents(tmp_path / "again") == contents(collection)
    assert {Path(path) for path in made} == {
        path for path in contents(collection) if path.parts[0] not in ("thin", "wild", "labels.csv")
    }


def test_its_labels_name_every_packaged_lora(collection: Path) -> None:
    labelled = read_labels(collection)
    packaged = {p for part in ("thin", "wild") for p in (collection / part).iterdir()}
    assert {one.path for one in labelled} == packaged
    assert all(one.path.name.startswith(one.artist) for one in labelled)
    for split in ("calibration", "validation", "test"):
        assert len({one.artist for one in labelled if one.split == split}) == 6


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    mine = tmp_path / "mine.safetensors"
    mine.write_bytes(b"mine")
    with pytest.raises(FileExistsError, match="not empty"):
        make(tmp_path)
    assert list(tmp_path.iterdir()) == [mine]
    assert mine.read_bytes() == b"mine"


@pytest.fixture(scope="module")
def members(collection: Path) -> dict[str, Member]:
    """File below the collection → what `dupes` says of it."""
    with Store.open(collection.parent / "index.db", "write") as store:
        build(store, [collection], device="cpu")
        found: Iterator[Member] = (m for group in dupes(store, Choice()) for m in group.files)
        return {Path(m.path).relative_to(collection).as_posix(): m for m in found}


def test_every_copy_is_proved_and_no_more(members: dict[str, Member]) -> None:
    grades = {path: m.grade for path, m in members.items() if m.grade != "keeper"}
    assert grades == {
        "copies/untitled.safetensors": "file",
        "copies/opensans-titled.safetensors": "tensors",
        "copies/lobster-kohya.safetensors": "weights",
        "copies/cabinsketch-fp16.safetensors": "weights",
        "copies/ebgaramond12-half.safetensors": "scaled",
        "copies/courier-prime-attention.safetensors": "part",
        "copies/lobster-rank2.safetensors": "resized",
    }
    assert {path for path, m in members.items() if m.removable} == {
        "copies/untitled.safetensors",
        "copies/opensans-titled.safetensors",
        "copies/lobster-kohya.safetensors",
        "copies/cabinsketch-fp16.safetensors",
    }


# ---------------------------------------------------------------------------- the command


def test_off_a_terminal_with_a_folder(tmp_path: Path) -> None:
    done = run("demo", "kept", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["kept"]
    folder = tmp_path / "kept"
    assert (folder / "index.db").is_file()
    commands = [line for line in done.stdout.splitlines() if line.startswith("$ ")]
    assert commands[0] == f"$ cd {shlex.quote(str(folder))}"
    assert len(commands) == 1 + len(STEPS)
    for step in STEPS:
        assert step.words in done.stdout
    # Six of one font, the copies of one of them in one line, and the next font far below.
    _, similar = done.stdout.split("$ lorafind similar thin/", 1)
    scores = [line.split("\t") for line in similar.splitlines()[1:9]]
    assert ["lobster" in Path(row[0]).name for row in scores] == [True] * 7 + [False]
    assert float(scores[6][1]) > 0.5 > float(scores[7][1])


@pytest.mark.skipif(os.name != "posix", reason="the commands are printed for this shell")
def test_the_commands_that_it_prints_can_be_pasted(tmp_path: Path) -> None:
    shown = run("demo", "kept", "--quiet", folder=tmp_path).stdout
    blocks = re.split(r"^\$ (lorafind .*)\n", shown, flags=re.MULTILINE)
    for command, printed in zip(blocks[1::2], blocks[2::2], strict=True):
        words = shlex.split(command)
        again = run(*words[1:], folder=tmp_path / "kept")
        assert again.returncode == (3 if words[1] == "index" else 0), again.stderr
        # Files are read side by side, so that refused ones come in any order.
        assert sorted(again.stdout.splitlines()) == sorted(printed.splitlines())


def test_quiet_leaves_the_sentences_out(tmp_path: Path) -> None:
    done = run("demo", "--quiet", folder=tmp_path)
    assert done.returncode == 0
    assert done.stderr == ""
    assert not any(step.words in done.stdout for step in STEPS)
    assert done.stdout.startswith("$ cd ")
    assert list(tmp_path.iterdir()) == []


def test_the_temporary_folder_is_removed(tmp_path: Path) -> None:
    done = run("demo", "--quiet", folder=tmp_path)
    place = re.match(r"\$ cd (\S+)", done.stdout)
    assert place
    assert Path(place[1]).name.startswith("lorafind-")
    assert not Path(place[1]).exists()


def test_a_folder_in_use_is_refused(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    done = run("demo", "full", folder=tmp_path)
    assert done.returncode == 4
    assert done.stdout == ""
    assert "the folder is not empty; name one that does not exist yet." in done.stderr


def test_options_without_a_meaning_do_not_exist(tmp_path: Path) -> None:
    done = run("demo", "--json", folder=tmp_path)
    assert done.returncode == 2
    assert "--json" in done.stderr


@pytest.mark.skipif(os.name != "posix", reason="needs a pseudo-terminal")
def test_on_a_terminal_results_are_tables(tmp_path: Path) -> None:
    environment = {"PYTHONPATH": str(ROOT), "NO_COLOR": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lorafind", "demo"]
    code, printed = run_on_terminal(command, tmp_path, environment)
    assert code == 0
    assert re.search(r"^File +Score +z +Chance", printed, re.MULTILINE)
    # What the commands say stands below the command, not before or after.
    order = [printed.index(word) for word in ("lorafind index", "added", "lorafind similar", "z ")]
    assert order == sorted(order)


@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_reader_that_has_seen_enough(tmp_path: Path) -> None:
    command = f"{shlex.quote(sys.executable)} -m lorafind demo | head -n 1"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert "Broken pipe" not in done.stderr
    assert "Traceback" not in done.stderr
