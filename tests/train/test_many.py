"""Training the LoRAs of a data set: labels, interruptions, failures, other settings."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorafind.bases.labels import read_labels
from lorafind.train.cache import prepare
from lorafind.train.captions import gather
from lorafind.train.dataset import Share, plan
from lorafind.train.loop import Output, Quiet, Stopped, train
from lorafind.train.many import Outcome, train_many
from lorafind.train.model import Base, load_base
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from lorafind.train.subsets import Wanted
from tests.train import tiny

#: Five LoRAs of an artist.
WANTED = Wanted(train=2, size=2, calibration=1, queries=1, few=1, held=2)
SETTINGS = Settings(resolution=tiny.RESOLUTION, steps=3, rank=2, prior_weight=0)


def shares_of(root: Path, settings: Settings = SETTINGS) -> list[Share]:
    return plan(root, WANTED, settings, lambda folder: gather([folder], resolution=64))


def files(shares: Sequence[Share]) -> list[str]:
    return [lora.file for share in shares for lora in share.loras]


def contents(folder: Path) -> dict[str, bytes]:
    found = sorted(folder.rglob("*.safetensors"))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in found}


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "labels.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def record(folder: Path) -> Any:
    return json.loads((folder / "train-many.json").read_text("utf-8"))


class Interrupted(Quiet):
    """Somebody who presses Ctrl-C after some steps."""

    def __init__(self, steps: int) -> None:
        self.left, self.training = steps, False

    def stage(self, title: str, files: int, size: int) -> None:
        self.training = "Training" in title

    def advance(self, files: int, size: int) -> None:
        self.left -= self.training
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two artists of one genre with eight pictures each; not to be written to."""
    root: Path = tmp_path_factory.mktemp("many") / "root"
    for style in tiny.STYLES:
        tiny.paint(root / "plain" / style, style, range(8))
    return root


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> Base:
    """Loaded once, as train-many does."""
    return load_base(str(tiny_folder))


@pytest.fixture(scope="module")
def whole(
    made: Path, model: Base, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Share], Outcome]:
    """All trained without a disturbance, three at once; not to be written to."""
    out: Path = tmp_path_factory.mktemp("whole")
    shares = shares_of(made)
    return out, shares, train_many(model, shares, out, parallel=3)


def test_every_lora_and_its_label(whole: tuple[Path, list[Share], Outcome]) -> None:
    out, shares, outcome = whole
    assert outcome == Outcome(files(shares), files(shares))
    assert list(contents(out)) == sorted(files(shares)) and len(files(shares)) == 10
    labelled = read_labels(out)
    assert sorted(one.path.relative_to(out).as_posix() for one in labelled) == sorted(files(shares))
    by_split = {(one.artist, one.genre, one.split, one.images) for one in labelled}
    assert by_split == {
        (style, "plain", split, images)
        for style in tiny.STYLES
        for split, images in (("train", 2), ("calibration", 1), ("validation", 1), ("test", 1))
    }
    assert {row["setup"] for row in rows(out) if row["split"] == "train"} == {"same"}
    assert {row["setup"] for row in rows(out) if row["split"] != "train"} == {"diff"}


def test_every_lora_has_its_seed_word_and_pictures(
    whole: tuple[Path, list[Share], Outcome],
) -> None:
    from safetensors import safe_open

    out, shares, _ = whole
    own = record(out)["loras"]
    every = {lora.file: lora for share in shares for lora in share.loras}
    for row in rows(out):
        with safe_open(out / row["file"], "pt") as file:
            said = file.metadata()
        lora = every[row["file"]]
        assert said["ss_seed"] == row["seed"] == str(lora.settings.seed)
        assert said["modelspec.trigger_phrase"] == row["word"] == own[row["file"]]["word"]
        assert said["modelspec.title"] == lora.title
        assert said["ss_num_train_images"] == row["images"]
        named = [f"{lora.artist.name}/{picture.path.name}" for picture in lora.pictures]
        assert own[row["file"]]["pictures"] == named
        prompts = json.loads(said["ss_tag_frequency"])["images"]
        expected = {f"{row['word']} {picture.caption}" for picture in lora.pictures}
        assert set(prompts) == expected
    assert len({row["word"] for row in rows(out)}) > 1


def test_a_lora_is_what_train_makes_of_the_same_pictures(
    made: Path, model: Base, tmp_path: Path
) -> None:
    share = shares_of(made)[0]
    lora = share.loras[1]
    train_many(model, [replace(share, loras=[lora])], tmp_path)
    settings = replace(lora.settings, token=record(tmp_path)["loras"][lora.file]["word"])
    alone = tmp_path / "alone.safetensors"
    train(model, prepare(model, lora.pictures, settings), settings, alone, title=lora.title)
    assert alone.read_bytes() == (tmp_path / lora.file).read_bytes()


@pytest.mark.parametrize("steps", [5, 6])
def test_an_interruption_changes_nothing(
    whole: tuple[Path, list[Share], Outcome], model: Base, tmp_path: Path, steps: int
) -> None:
    """Within the second pass, and before its files are written."""
    out, shares, _ = whole
    with pytest.raises(Stopped, match=f"{3 * ((steps - 1) // 3)} of 10 LoRAs are done"):
        train_many(model, shares, tmp_path, Interrupted(steps), parallel=3)
    before = contents(tmp_path)
    assert [row["file"] for row in rows(tmp_path)] == files(shares)[: len(before)]
    outcome = train_many(model, shares, tmp_path, parallel=3)
    assert outcome.trained == files(shares)[len(before) :]
    assert contents(tmp_path) == contents(out)
    assert rows(tmp_path) == rows(out)
    assert not list(tmp_path.rglob("*.state"))


def test_what_is_done_is_not_done_again(
    whole: tuple[Path, list[Share], Outcome], model: Base
) -> None:
    out, shares, _ = whole
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.safetensors")}
    outcome = train_many(model, shares, out, parallel=3)
    assert outcome.trained == [] and outcome.done == files(shares)
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_an_artist_who_comes_later_changes_nothing_of_the_others(
    whole: tuple[Path, list[Share], Outcome], made: Path, model: Base, tmp_path: Path
) -> None:
    first = [share for share in whole[1] if share.artist.name == "stripes"]
    train_many(model, first, tmp_path, parallel=5)
    before = contents(tmp_path)
    outcome = train_many(model, whole[1], tmp_path, parallel=5)
    assert len(outcome.trained) == 5 and len(outcome.done) == 10
    assert contents(tmp_path).items() > before.items()


def test_a_failure_of_one_is_recorded_and_the_others_go_on(
    made: Path, model: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What is in the cache needs no picture any more.
    monkeypatch.setenv("LORAFIND_CACHE", str(tmp_path / "cache"))
    root = shutil.copytree(made, tmp_path / "root")
    shares = shares_of(root)
    broken = shares[0].loras[3].pictures[0].path
    broken.write_bytes(b"changed since")
    touched = [lora.file for lora in shares[0].loras if broken in {p.path for p in lora.pictures}]
    out = tmp_path / "out"
    out.mkdir()
    outcome = train_many(model, shares, out, parallel=4)
    assert list(outcome.failed) == touched == list(record(out)["failed"])
    assert all(f"{broken} has changed" in why for why in outcome.failed.values())
    done = [file for file in files(shares) if file not in touched]
    assert sorted(outcome.done) == sorted(done) == sorted(row["file"] for row in rows(out))
    # Repaired, only these are trained.
    shutil.copy(made / "plain" / "rings" / broken.name, broken)
    again = train_many(model, shares_of(root), out, parallel=4)
    assert again.trained == touched and again.failed == {} == record(out)["failed"]


def test_an_artist_with_nothing_to_train_stands_in_the_record(
    made: Path, model: Base, tmp_path: Path
) -> None:
    shares = [replace(shares_of(made)[0], loras=[], reason="Its pictures are odd.")]
    outcome = train_many(model, shares, tmp_path)
    assert outcome.failed == {"rings": "Its pictures are odd."} == record(tmp_path)["failed"]


def test_a_loss_that_is_no_number_fails_that_lora(made: Path, model: Base, tmp_path: Path) -> None:
    wild = replace(SETTINGS, learning_rate=1e30)
    shares = shares_of(made, wild)[:1]
    outcome = train_many(model, shares, tmp_path, parallel=2)
    assert outcome.done == [] and list(outcome.failed) == files(shares)
    assert rows(tmp_path) == []


def test_other_settings_never_overwrite_without_force(
    whole: tuple[Path, list[Share], Outcome], made: Path, model: Base, tmp_path: Path
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    before = contents(out)
    longer = shares_of(made, replace(SETTINGS, steps=4))
    for shares, output in ((longer, Output()), (whole[1], Output(spelling="diffusers"))):
        with pytest.raises(TrainProblem, match="made of other pictures or captions, or with other"):
            train_many(model, shares, out, output=output, parallel=3)
    assert contents(out) == before and rows(out) == rows(whole[0])
    outcome = train_many(model, longer, out, output=Output(force=True), parallel=5)
    assert outcome.trained == files(longer)
    assert all(found != before[file] for file, found in contents(out).items())
    # What was trained with force is known the next time.
    assert train_many(model, longer, out).trained == []


def test_interrupted_with_force_an_old_file_never_passes_for_a_new_one(
    whole: tuple[Path, list[Share], Outcome], made: Path, model: Base, tmp_path: Path
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    old = contents(out)
    longer, force = shares_of(made, replace(SETTINGS, steps=4)), Output(force=True)
    with pytest.raises(Stopped):
        train_many(model, longer, out, Interrupted(2), force, parallel=5)
    train_many(model, longer, out, output=force, parallel=5)
    assert set(contents(out)) == set(old)
    assert not set(contents(out).values()) & set(old.values())


def test_files_of_others_are_not_overwritten(made: Path, model: Base, tmp_path: Path) -> None:
    shares = shares_of(made)
    (tmp_path / "labels.csv").write_text("mine")
    with pytest.raises(TrainProblem, match=r"labels.csv is there already"):
        train_many(model, shares, tmp_path)
    (tmp_path / "labels.csv").unlink()
    (tmp_path / "train-many.json").write_text("mine")
    with pytest.raises(TrainProblem, match=r"train-many.json cannot be read"):
        train_many(model, shares, tmp_path)
    assert (tmp_path / "train-many.json").read_text() == "mine"


def test_what_an_earlier_run_left_is_told(
    whole: tuple[Path, list[Share], Outcome], model: Base, tmp_path: Path
) -> None:
    out = shutil.copytree(whole[0], tmp_path / "out")
    outcome = train_many(model, whole[1][:1], out)
    assert outcome.strangers == sorted(files(whole[1][1:]))
    assert [row["file"] for row in rows(out)] == files(whole[1][:1])
