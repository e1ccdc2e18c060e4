"""Pictures on the way."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lorafind.train.engine import Engine
from lorafind.train.loop import Run, train, train_together
from lorafind.train.model import Base
from lorafind.train.problem import TrainProblem
from lorafind.train.sample import Sampler
from lorafind.train.settings import Settings
from tests.train import oracle

SETTINGS = Settings(
    steps=2,
    rank=2,
    resolution=64,
    learning_rate=0.05,
    sample_prompts=("ohw a red ring", "ein Bild von Käthe"),
    sample_every=1,
)


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny model."""
    return oracle.base()


def pixels(path: Path) -> np.ndarray:
    """Of a picture."""
    with Image.open(path) as picture:
        return np.asarray(picture.convert("RGB")).astype(int)


def test_pictures_on_the_way(base: Base, tmp_path: Path) -> None:
    """One per prompt and interval, with prompt and seed inside; the training is not disturbed."""
    out, plain = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    train(base, oracle.prepared(), replace(SETTINGS, seed=4), out)
    without = replace(SETTINGS, seed=4, sample_prompts=(), sample_every=None)
    train(base, oracle.prepared(), without, plain)
    assert out.read_bytes() == plain.read_bytes()
    found = sorted((tmp_path / "a-samples").iterdir())
    names = ["000001-1.png", "000001-2.png", "000002-1.png", "000002-2.png"]
    assert [p.name for p in found] == names
    for path, prompt, seed in zip(found, SETTINGS.sample_prompts * 2, (4, 5, 4, 5), strict=True):
        with Image.open(path) as picture:
            assert picture.size == (64, 64)
            told = picture.info["parameters"]
        assert told.startswith(prompt + "\n") and f"Seed: {seed}," in told
    assert (pixels(found[0]) != pixels(found[2])).any()


def test_at_the_end_alone(base: Base, tmp_path: Path) -> None:
    """Prompts without an interval."""
    settings = replace(SETTINGS, sample_every=None, sample_prompts=("a red ring",))
    train(base, oracle.prepared(), settings, tmp_path / "a.safetensors")
    assert [p.name for p in (tmp_path / "a-samples").iterdir()] == ["000002-1.png"]


def test_each_of_several(base: Base, tmp_path: Path) -> None:
    """A LoRA among several draws what it draws alone."""
    one = replace(SETTINGS, sample_every=None, sample_prompts=("a red ring",))
    runs = [
        Run(oracle.prepared(k), replace(one, seed=k), tmp_path / f"m{k}.safetensors")
        for k in range(2)
    ]
    train_together(base, runs)
    train(base, oracle.prepared(1), replace(one, seed=1), tmp_path / "alone.safetensors")
    found = pixels(tmp_path / "m1-samples" / "000002-1.png")
    wanted = pixels(tmp_path / "alone-samples" / "000002-1.png")
    other = pixels(tmp_path / "m0-samples" / "000002-1.png")
    assert np.abs(found - wanted).max() <= 2
    assert np.abs(other - wanted).max() > 20


def test_moving_average_is_shown(base: Base) -> None:
    """What is drawn is what will be saved; afterwards the training goes on with its own."""
    settings = replace(SETTINGS, ema=0.5)
    with Engine.on(base, [(oracle.prepared(), settings)]) as engine:
        for step in range(2):
            engine.gradients(step)
            engine.update(step)
        before = engine.adapters.values.clone()
        wanted = [f.b.clone() for f in engine.result(0)]
        with engine.showing(0):
            shown = engine.adapters.factors(engine.adapters.values[0])
            assert all((one.b == b).all() for one, b in zip(shown, wanted, strict=True))
            assert (engine.adapters.values != before).any()
        assert (engine.adapters.values == before).all()


def test_without_encoders(base: Base) -> None:
    """They may have been dropped."""
    dropped = replace(base, vae=None, text_encoder=None)
    with pytest.raises(TrainProblem, match="VAE"):
        Sampler(dropped, ["a"], 64)
