"""Interrupting, going on, and what is refused."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorafind.train import checkpoint
from lorafind.train.checkpoint import undisturbed
from lorafind.train.loop import Quiet, Run, Stopped, Trained, train, train_together
from lorafind.train.model import Base
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from tests.train import oracle

SETTINGS = Settings(steps=6, rank=2, resolution=64, ema=0.9, warmup=2, schedule="cosine")


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny model."""
    return oracle.base()


class CtrlC(Quiet):
    """Presses Ctrl-C after some steps."""

    def __init__(self, after: int) -> None:
        self._left = after

    def advance(self, files: int, size: int) -> None:
        """A step is done."""
        self._left -= files
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGINT)


@pytest.fixture(scope="module")
def wanted(base: Base, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The training that nobody interrupts."""
    out = tmp_path_factory.mktemp("wanted") / "whole.safetensors"
    return train(base, oracle.prepared(), SETTINGS, out)


def test_interrupted_twice(base: Base, wanted: Trained, tmp_path: Path) -> None:
    """Stopped after two steps and after two more, it ends with the same bytes."""
    out = tmp_path / "a.safetensors"
    for resume in (False, True):
        with pytest.raises(Stopped, match=r"of 6; it is kept in .*a\.safetensors\.state") as told:
            train(base, oracle.prepared(), SETTINGS, out, CtrlC(2), resume=resume)
        assert isinstance(told.value, KeyboardInterrupt)
        assert not out.exists()
    done = train(base, oracle.prepared(), SETTINGS, out, resume=True)
    assert out.read_bytes() == wanted.out.read_bytes()
    assert done.losses == wanted.losses and len(done.losses) == 6
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_same_state_twice(base: Base, wanted: Trained, tmp_path: Path) -> None:
    """Going on from one state once more gives the same bytes once more."""
    out, again = tmp_path / "a.safetensors", tmp_path / "again.safetensors"
    with pytest.raises(Stopped):
        train(base, oracle.prepared(), SETTINGS, out, CtrlC(3))
    shutil.copy(checkpoint.path(out), checkpoint.path(again))
    for path in (out, again):
        train(base, oracle.prepared(), SETTINGS, path, resume=True)
        assert path.read_bytes() == wanted.out.read_bytes()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_goes_on(tmp_path: Path, precision: str) -> None:
    """The state of the gradient scaler is part of it."""
    dtypes = {"fp16": torch.float16, "bf16": torch.bfloat16}
    model, prepared = oracle.base(dtypes[precision]), oracle.prepared()
    settings = replace(SETTINGS, steps=3, precision=precision)
    whole, out = tmp_path / "whole.safetensors", tmp_path / "a.safetensors"
    train(model, prepared, settings, whole)
    with pytest.raises(Stopped):
        train(model, prepared, settings, out, CtrlC(1))
    train(model, prepared, settings, out, resume=True)
    assert out.read_bytes() == whole.read_bytes()


def test_several_at_once_go_on(base: Base, tmp_path: Path) -> None:
    """Also where they were killed with states of different steps."""
    settings = replace(SETTINGS, steps=4)

    def runs(folder: str) -> list[Run]:
        (tmp_path / folder).mkdir()
        return [
            Run(
                oracle.prepared(seed),
                replace(settings, seed=seed),
                tmp_path / folder / f"{seed}.safetensors",
            )
            for seed in range(2)
        ]

    whole, interrupted, uneven = runs("whole"), runs("interrupted"), runs("uneven")
    train_together(base, whole)
    with pytest.raises(Stopped):
        train_together(base, interrupted, CtrlC(1))
    first = checkpoint.path(interrupted[0].out).read_bytes()
    with pytest.raises(Stopped):
        train_together(base, interrupted, CtrlC(1))
    checkpoint.path(uneven[0].out).write_bytes(first)
    shutil.copy(checkpoint.path(interrupted[1].out), checkpoint.path(uneven[1].out))
    train_together(base, interrupted)
    for one, other in zip(whole, interrupted, strict=True):
        assert one.out.read_bytes() == other.out.read_bytes()
    # Alone, a LoRA's sums have other last bits than in a stack.
    results = train_together(base, uneven)
    assert [len(r.losses) for r in results if isinstance(r, Trained)] == [4, 4]
    assert all(run.out.exists() for run in uneven)


def test_what_is_not_gone_on_with(base: Base, tmp_path: Path) -> None:
    """Other settings, pictures or base, a broken state, nothing: a sentence, and nothing lost."""
    out, prepared = tmp_path / "a.safetensors", oracle.prepared()
    with pytest.raises(TrainProblem, match="nothing to go on with"):
        train(base, prepared, SETTINGS, out, resume=True)
    with pytest.raises(Stopped):
        train(base, prepared, SETTINGS, out, CtrlC(1))
    kept = checkpoint.path(out)
    before = kept.read_bytes()
    other = replace(SETTINGS, learning_rate=1e-3, steps=7)
    with pytest.raises(TrainProblem, match=r"steps 6, not 7; learning_rate 0\.0005, not 0\.001"):
        train(base, prepared, other, out, resume=True)
    with pytest.raises(TrainProblem, match="other pictures"):
        train(base, oracle.prepared(1), SETTINGS, out, resume=True)
    with pytest.raises(TrainProblem, match="another base model"):
        train(replace(base, sha256="1" * 64), prepared, SETTINGS, out, resume=True)
    with pytest.raises(TrainProblem, match="interrupted is kept"):
        train(base, prepared, SETTINGS, out)
    assert kept.read_bytes() == before
    for broken in (before[:1000], b"", b"PK no state"):
        kept.write_bytes(broken)
        with pytest.raises(TrainProblem, match="cannot be read"):
            train(base, prepared, SETTINGS, out, resume=True)
    kept.write_bytes(before)
    # What only looks on or saves may change.
    train(base, prepared, replace(SETTINGS, save_every=4), out, resume=True)


def test_before_the_first_step(base: Base, tmp_path: Path) -> None:
    """Ctrl-C before anything was trained leaves nothing behind."""

    class Impatient(Quiet):
        def stage(self, title: str, files: int, size: int) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(base, oracle.prepared(), SETTINGS, tmp_path / "a.safetensors", Impatient())
    assert list(tmp_path.iterdir()) == []


def test_ctrl_c_waits() -> None:
    """It comes after the update, not in its middle, and is not forgotten."""
    done = []
    with pytest.raises(KeyboardInterrupt), undisturbed():
        os.kill(os.getpid(), signal.SIGINT)
        done.append("update")
    assert done == ["update"]
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        done.append("not reached")


@contextmanager
def full_disk(size: int) -> Iterator[None]:
    """No file can grow beyond ``size`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk(base: Base, tmp_path: Path) -> None:
    """The old file stays, the error has a name, and when there is room again nothing is lost."""
    out, prepared = tmp_path / "a.safetensors", oracle.prepared()
    out.write_bytes(b"the LoRA of yesterday")
    with pytest.raises(Stopped):
        train(base, prepared, SETTINGS, tmp_path / "b.safetensors", CtrlC(3))
    shutil.copy(tmp_path / "b.safetensors.state", checkpoint.path(out))
    warned: list[str] = []

    class Listening(Quiet):
        def warn(self, sentence: str) -> None:
            warned.append(sentence)

    from lorafind.train.loop import Output

    force = Output(force=True)
    with full_disk(50_000), pytest.raises(OSError) as told:
        train(base, prepared, SETTINGS, out, Listening(), force, resume=True)
    assert told.value.errno == errno.EFBIG and told.value.filename == str(out)
    assert len(warned) == 1 and "a.safetensors.state could not be written" in warned[0]
    assert out.read_bytes() == b"the LoRA of yesterday"
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.safetensors",
        "a.safetensors.state",
        "b.safetensors.state",
    ]
    train(base, prepared, SETTINGS, out, output=force, resume=True)
    train(base, prepared, SETTINGS, tmp_path / "b.safetensors", resume=True)
    assert out.read_bytes() == (tmp_path / "b.safetensors").read_bytes()
