"""The log, moves and the trash by themselves."""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lorafind.clean import log as logs
from lorafind.clean import moves, trash
from lorafind.clean.beside import beside
from lorafind.clean.log import Step
from lorafind.clean.problem import CleanProblem


def steps(n: int) -> list[Step]:
    return [Step(f"/a/{n}\udcff\n", f"/b/{n}", f"t{n}", "00", n, 1, 0o644)]


def made(folder: Path) -> logs.Log:
    log = logs.create(folder / "i.db", "/plan", "move")
    for n in range(3):
        act = log.begin("move", steps(n))
        if n < 2:
            log.mark(act.number, "done")
    return log


def test_a_log_reads_as_it_was_written(tmp_path: Path) -> None:
    written = made(tmp_path)
    (found,) = logs.logs(tmp_path / "i.db")
    assert (found.acts, found.state) == (written.acts, written.state)
    assert [act.number for act in found.open] == [3, 2, 1]
    assert [act.number for act in found.unfinished] == [3]


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.floats(0, 1))
def test_a_log_that_was_cut_anywhere(tmp_path: Path, share: float) -> None:
    """Whole lines count; and it can be gone on with."""
    path = made(tmp_path).path
    whole = path.read_bytes()
    data = whole[: round(share * len(whole))]
    path.write_bytes(data)
    lines = [line for line in data.split(b"\n") if line]
    complete = [line for line in lines if line in whole.split(b"\n")]
    found = logs.read(path)
    if found is None:
        assert not complete
        path.unlink()
        return
    acts = sum(b'"steps"' in line for line in complete)
    assert len(found.acts) == acts
    found.begin("move", steps(9))
    again = logs.read(path)
    path.unlink()
    assert again is not None
    assert again.acts == found.acts and len(again.acts) == acts + 1
    assert again.state == found.state


def test_what_is_no_log(tmp_path: Path) -> None:
    (tmp_path / "x").write_text('{"a": 1}\n{"b": 2}\n')
    with pytest.raises(CleanProblem, match="no undo log"):
        logs.read(tmp_path / "x")
    (tmp_path / "x").write_text('{"lorafind_undo": 2}\n{}\n')
    with pytest.raises(CleanProblem, match="newer lorafind"):
        logs.read(tmp_path / "x")
    with pytest.raises(CleanProblem, match="cannot be read"):
        logs.read(tmp_path / "none")


def test_a_move_never_replaces(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    for target in ("b", "a"):
        with pytest.raises(FileExistsError):
            moves.move(str(tmp_path / "a"), str(tmp_path / target), "t", "")
    (tmp_path / "link").symlink_to("nothing")
    with pytest.raises(FileExistsError):
        moves.move(str(tmp_path / "a"), str(tmp_path / "link"), "t", "")
    assert (tmp_path / "a").read_text() == "a" and (tmp_path / "b").read_text() == "b"


def test_a_drive_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    (tmp_path / "a").write_text("a")
    (tmp_path / "b").write_text("b")
    with pytest.raises(FileExistsError):
        moves.rename(str(tmp_path / "a"), str(tmp_path / "b"))
    moves.rename(str(tmp_path / "a"), str(tmp_path / "c"))
    assert sorted(os.listdir(tmp_path)) == ["b", "c"]
    assert (tmp_path / "b").read_text() == "b" and (tmp_path / "c").read_text() == "a"


def test_a_copy_that_is_not_the_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    with pytest.raises(moves.Changed):
        moves.copy(str(tmp_path / "a"), str(tmp_path / "part"), hashlib.sha256(b"b").hexdigest())
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize(
    ("path", "inside"),
    [
        ("/x/.Trash-1000/files/a.safetensors", True),
        ("/x/.Trash/1000/files/a.safetensors", True),
        ("/home/u/.local/share/Trash/files/a.safetensors", True),
        ("/x/$RECYCLE.BIN/a.safetensors", True),
        ("/x/.lm-pending-delete/a.safetensors", True),
        ("/x/trash/a.safetensors", False),
        ("/x/Trash-art/.trash", False),
    ],
)
def test_what_lies_in_a_trash(path: str, inside: bool) -> None:
    assert trash.in_trash(path) == inside


def test_a_link_into_a_trash(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    (tmp_path / "data/Trash/files").mkdir(parents=True)
    (tmp_path / "door").symlink_to(tmp_path / "data/Trash/files")
    assert trash.in_trash(str(tmp_path / "door/a.safetensors"))
    assert not trash.in_trash(str(tmp_path / "data/a.safetensors"))


def test_a_record_of_another_file_is_left(tmp_path: Path) -> None:
    info = tmp_path / "a.trashinfo"
    trash.record(str(info), "[Trash Info]\nPath=/a\n")
    with pytest.raises(FileExistsError):
        trash.record(str(info), "[Trash Info]\nPath=/b\n")
    trash.forget(str(info), "[Trash Info]\nPath=/b\n")
    assert info.exists()
    trash.forget(str(info), "[Trash Info]\nPath=/a\n")
    assert not info.exists()
    trash.forget(str(info), "[Trash Info]\nPath=/a\n")


def test_a_system_without_such_a_trash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.platform", "darwin")
    with pytest.raises(CleanProblem, match="--move DIR"):
        trash.supported()


def test_the_settings_of_a_peft_folder(tmp_path: Path) -> None:
    for name in ("adapter_model.safetensors", "adapter_config.json", "README.md", "other.json"):
        (tmp_path / name).write_text("{}")
    own, stay = beside(str(tmp_path / "adapter_model.safetensors"))
    assert own == [str(tmp_path / "adapter_config.json")] and not stay
    (tmp_path / "adapter_model.bin").write_text("")
    own, stay = beside(str(tmp_path / "adapter_model.safetensors"))
    assert not own and stay == ["adapter_config.json"]
