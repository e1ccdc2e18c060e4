"""The training as a whole: files, losses, and what goes wrong."""

from __future__ import annotations

import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from lorafind.train import loss
from lorafind.train.adapters import inject
from lorafind.train.engine import Engine
from lorafind.train.loop import Failed, Output, Quiet, Run, Trained, train, train_together
from lorafind.train.model import Base, lora_layers
from lorafind.train.optimizer import rate
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from tests.train import oracle

SETTINGS = Settings(steps=4, rank=2, alpha=1.0, resolution=64)


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny model."""
    return oracle.base()


def test_same_seed_same_file(base: Base, tmp_path: Path) -> None:
    """Bit for bit, under any name and whatever torch drew before; another seed, another file."""
    first, again, other = (tmp_path / f"{name}.safetensors" for name in "abc")
    train(base, oracle.prepared(), SETTINGS, first)
    torch.manual_seed(9)
    train(base, oracle.prepared(), SETTINGS, again)
    train(base, oracle.prepared(), replace(SETTINGS, seed=1), other)
    assert first.read_bytes() == again.read_bytes()
    assert not torch.equal(
        *(torch.cat([t.flatten() for t in load_file(p).values()]) for p in (first, other))
    )


def test_loss_falls(base: Base, tmp_path: Path) -> None:
    """On two pictures, at fixed noise and times, to less than 0.8 of what it was."""
    settings = replace(
        SETTINGS, steps=60, rank=8, learning_rate=1e-2, prior_weight=0.0, batch_size=4
    )
    prepared = oracle.prepared(instances=2, priors=0)
    fixed = [
        loss.draw(base.scheduler, prepared, replace(settings, seed=99), k, 0) for k in range(4)
    ]

    def judged(engine: Engine) -> float:
        with torch.no_grad():
            return sum(
                float(loss.losses(base.unet(b.noisy, b.times, b.prompts).sample, b, 1)[0])
                for b in fixed
            ) / len(fixed)

    with Engine.on(base, [(prepared, settings)]) as engine:
        before = judged(engine)
        for step in range(settings.steps):
            engine.gradients(step)
            engine.update(step)
        after = judged(engine)
    assert after < 0.8 * before


def test_numbered_files(base: Base, tmp_path: Path) -> None:
    """Every two steps from step 4 on, the two newest; each is the LoRA of its step."""
    settings = replace(SETTINGS, steps=9, save_every=2, save_from=4, keep_last=2)
    train(base, oracle.prepared(), settings, tmp_path / "a.safetensors")
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["a-000006.safetensors", "a-000008.safetensors", "a.safetensors"]
    short = replace(settings, steps=6, save_every=None)
    train(base, oracle.prepared(), short, tmp_path / "b.safetensors")
    wanted = load_file(tmp_path / "b.safetensors")
    found = load_file(tmp_path / "a-000006.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[k], t) for k, t in wanted.items())


@pytest.mark.parametrize("there", ["a.safetensors", "a-000002.safetensors"])
def test_nothing_is_overwritten(base: Base, tmp_path: Path, there: str) -> None:
    """Neither the result nor what is saved on the way, unless asked; before any work."""
    settings, out = replace(SETTINGS, save_every=2), tmp_path / "a.safetensors"
    (tmp_path / there).write_bytes(b"old")

    class Busy(Quiet):
        def stage(self, title: str, files: int, size: int) -> None:
            raise AssertionError("it began")

    with pytest.raises(TrainProblem, match=rf"{there} exists"):
        train(base, oracle.prepared(), settings, out, Busy())
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    train(base, oracle.prepared(), settings, out, output=Output(force=True))
    assert (tmp_path / there).read_bytes() != b"old"


def test_no_folder_to_write_to(base: Base, tmp_path: Path) -> None:
    """Said before any work."""
    with pytest.raises(TrainProblem, match="There is no folder"):
        train(base, oracle.prepared(), SETTINGS, tmp_path / "no" / "a.safetensors")


def poisoned(seed: int) -> Any:
    """Pictures of which one is no number."""
    prepared = oracle.prepared(seed)
    prepared.instance[2].mean[0, 0, 0] = torch.nan
    return prepared


def test_no_number_stops(base: Base, tmp_path: Path) -> None:
    """With words; nothing is written."""
    with pytest.raises(
        TrainProblem, match=r"a\.safetensors was stopped: its loss at step \d is nan"
    ):
        train(base, poisoned(0), SETTINGS, tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_one_of_several_fails(base: Base, tmp_path: Path) -> None:
    """The others become what they would have been without it."""
    whole = train(base, oracle.prepared(1), replace(SETTINGS, seed=1), tmp_path / "b.safetensors")
    runs = [
        Run(poisoned(0), SETTINGS, tmp_path / "bad.safetensors"),
        Run(oracle.prepared(1), replace(SETTINGS, seed=1), tmp_path / "good.safetensors"),
    ]
    bad, good = train_together(base, runs)
    assert isinstance(bad, Failed) and "its loss at step" in bad.reason
    assert isinstance(good, Trained)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.safetensors", "good.safetensors"]
    assert good.losses == pytest.approx(whole.losses, rel=1e-4)


def test_runs_must_be_alike(base: Base, tmp_path: Path) -> None:
    """Other settings than seed and words cannot share a pass."""
    runs = [
        Run(oracle.prepared(), SETTINGS, tmp_path / "a.safetensors"),
        Run(oracle.prepared(), replace(SETTINGS, rank=4), tmp_path / "b.safetensors"),
    ]
    with pytest.raises(ValueError, match="differ in more"):
        train_together(base, runs)
    runs[1] = Run(oracle.prepared(priors=0), SETTINGS, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="differ in more"):
        train_together(base, runs)


@pytest.mark.parametrize(
    ("over", "advice"),
    [
        ({}, "turn on gradient checkpointing"),
        (
            {"gradient_checkpointing": True, "precision": "bf16", "batch_size": 2},
            "take a smaller batch",
        ),
    ],
)
def test_out_of_memory(tmp_path: Path, over: dict[str, Any], advice: str) -> None:
    """Says what can still be lowered, and leaves the base as it was."""
    model = oracle.base()

    def huge(*args: object, **kwargs: object) -> None:
        torch.empty(2**50)

    handle = model.unet.mid_block.register_forward_hook(huge)
    before = list(model.unet.state_dict())
    with pytest.raises(TrainProblem, match=f"not enough memory for this training: {advice}"):
        train(model, oracle.prepared(), replace(SETTINGS, **over), tmp_path / "a.safetensors")
    handle.remove()
    assert list(model.unet.state_dict()) == before
    assert list(tmp_path.iterdir()) == []


def test_other_errors_are_not_memory(tmp_path: Path) -> None:
    """A bug keeps its name."""
    model = oracle.base()

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("shapes do not fit")

    model.unet.mid_block.register_forward_hook(broken)
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        train(model, oracle.prepared(), SETTINGS, tmp_path / "a.safetensors")


def values(model: Base, settings: Settings, steps: int) -> torch.Tensor:
    """The trained numbers after some steps."""
    with Engine.on(model, [(oracle.prepared(), settings)]) as engine:
        for step in range(steps):
            engine.gradients(step)
            engine.update(step)
        return engine.adapters.values[0].clone()


def test_gradient_checkpointing(base: Base) -> None:
    """The same numbers, bit for bit, and it is off afterwards."""
    wanted = values(base, SETTINGS, 2)
    found = values(base, replace(SETTINGS, gradient_checkpointing=True), 2)
    assert torch.equal(found, wanted)
    assert not base.unet.is_gradient_checkpointing


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision(base: Base, precision: str) -> None:
    """Gradients point where those of float32 point."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[precision]
    found = {}
    for model, settings in (
        (base, SETTINGS),
        (oracle.base(dtype), replace(SETTINGS, precision=precision)),
    ):
        with Engine.on(model, [(oracle.prepared(), settings)]) as engine:
            engine.gradients(0)
            assert engine.adapters.gradients.dtype is torch.float32
            found[settings.precision] = engine.adapters.gradients[0].clone()
    one, other = found["fp32"], found[precision]
    least = {"bf16": 0.7, "fp16": 0.99}[precision]
    assert float(torch.cosine_similarity(one, other, dim=0)) > least


def test_moving_average(base: Base, tmp_path: Path) -> None:
    """What is saved is the mean with weights d = min(decay, (1 + k)/(10 + k))."""
    settings = replace(SETTINGS, ema=0.3, learning_rate=0.1)
    names = lora_layers(base.unet, settings.groups)
    adapters = inject(base.unet, names, settings.rank, settings.alpha, [0])
    adapters.remove()
    mean = adapters.values[0].double()
    for step in range(3):
        d = min(0.3, (1 + step) / (10 + step))
        mean = d * mean + (1 - d) * values(base, settings, step + 1).double()
    with Engine.on(base, [(oracle.prepared(), settings)]) as engine:
        for step in range(3):
            engine.gradients(step)
            engine.update(step)
        found = torch.cat([t.flatten() for f in engine.result(0) for t in f[1:]])
    assert torch.allclose(found.double(), mean, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_learning_rate(schedule: str) -> None:
    """As diffusers' schedules."""
    from diffusers.optimization import get_scheduler

    settings = replace(SETTINGS, steps=20, warmup=5, schedule=schedule, learning_rate=0.3)
    adam = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=0.3)
    name = "constant_with_warmup" if schedule == "constant" else schedule
    theirs: Any = get_scheduler(name, adam, num_warmup_steps=5, num_training_steps=20)
    for step in range(20):
        assert rate(settings, step) == pytest.approx(adam.param_groups[0]["lr"], abs=1e-12)
        adam.step()
        theirs.step()


def test_eight_bit_adam_is_not_there(base: Base, tmp_path: Path) -> None:
    """Said with the command that installs it."""
    if importlib.util.find_spec("bitsandbytes"):
        pytest.skip("it is there")
    settings = replace(SETTINGS, optimizer="adam8bit")
    with pytest.raises(TrainProblem, match="pip install bitsandbytes"):
        train(base, oracle.prepared(), settings, tmp_path / "a.safetensors")


def test_progress(base: Base, tmp_path: Path) -> None:
    """A stage of as many steps as are to come, each with a loss."""
    told: list[Any] = []

    class Listening(Quiet):
        def stage(self, title: str, files: int, size: int) -> None:
            told.append((title, files, size))

        def advance(self, files: int, size: int) -> None:
            told.append((files, size))

        def loss(self, value: float) -> None:
            told.append(value)

    done = train(base, oracle.prepared(), SETTINGS, tmp_path / "a.safetensors", Listening())
    assert told[0] == ("Training", 4, 0)
    assert told[1::2] == list(done.losses)
    assert told[2::2] == [(1, 0)] * 4
