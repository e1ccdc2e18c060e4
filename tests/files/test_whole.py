"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from lorafind.files.scan import ScanReport, Target, scan
from lorafind.files.whole import whole


def test_the_old_file_stays_until_the_new_one_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.safetensors"
    target.write_bytes(b"old")
    with whole(target) as part:
        part.write_bytes(b"new")
        assert target.read_bytes() == b"old" and part.parent == tmp_path
        report = ScanReport()
        found = scan([Target(os.fsencode(tmp_path))], report)
        assert [item.path for item in found] == [b"a.safetensors"]
        assert report.passed == [os.fsencode(part)]
    assert target.read_bytes() == b"new" and os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.skipif(os.name != "posix", reason="rights of POSIX")
def test_rights_are_those_of_any_new_file(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        with whole(tmp_path / "a") as part:
            part.write_bytes(b"x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


@pytest.mark.parametrize("error", [ValueError("mine"), KeyboardInterrupt(), OSError(28, "full")])
def test_nothing_is_left_of_what_failed(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a"
    target.write_bytes(b"old")
    with pytest.raises(type(error)) as caught, whole(target) as part:
        part.write_bytes(b"half")
        raise error
    assert target.read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    if isinstance(caught.value, OSError):
        assert (caught.value.errno, caught.value.filename) == (28, str(target))


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    target = tmp_path / "away" / "a"
    with pytest.raises(FileNotFoundError) as caught, whole(target) as part:
        part.write_bytes(b"x")
    assert caught.value.filename == str(target)
