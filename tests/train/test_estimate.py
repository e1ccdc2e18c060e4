"""What a training needs: by counting on the meta device, against real steps."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lorafind.train.cache import Prepared
from lorafind.train.engine import Engine
from lorafind.train.estimate import Estimate, estimate, seconds_per_step
from lorafind.train.model import Base
from lorafind.train.settings import Settings
from tests.train import oracle, tiny

SETTINGS = Settings(rank=4, resolution=64)
SD15: dict[str, Any] = {
    "sample_size": 64,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny model."""
    return oracle.base()


def test_numbers(base: Base) -> None:
    """Weights, LoRAs, gradients and moments, to the byte."""
    found = estimate(base, replace(SETTINGS, ema=0.9), runs=3)
    with Engine.on(base, [(oracle.prepared(), SETTINGS)]) as engine:
        parameters = engine.adapters.values.shape[1]
    assert (found.layers, found.parameters) == (tiny.LAYERS, parameters)
    assert found.weights == sum(4 * p.numel() for p in base.unet.parameters())
    assert found.adapters == found.gradients == 3 * 4 * parameters
    assert found.optimizer == 3 * found.adapters
    sizes = (found.weights, found.adapters, found.gradients, found.optimizer)
    assert found.memory == sum(sizes) + found.activations + found.encoders + found.program


def kept(base: Base, several: list[tuple[Prepared, Settings]]) -> int:
    """Bytes that autograd keeps between forward and backward of a real step, without weights."""
    known = {p.untyped_storage().data_ptr() for p in base.unet.parameters()}
    held: dict[int, Tensor] = {}

    def pack(tensor: Tensor) -> Tensor:
        held[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with Engine.on(base, several) as engine:
        known.add(engine.adapters.values.untyped_storage().data_ptr())
        with saved_tensors_hooks(pack, lambda tensor: tensor):
            engine.gradients(0)
    return sum(
        tensor.untyped_storage().nbytes() for key, tensor in held.items() if key not in known
    )


@pytest.mark.parametrize(
    ("over", "runs"), [({}, 1), ({"batch_size": 3}, 1), ({}, 4), ({"prior_weight": 0.0}, 2)]
)
def test_activations(base: Base, over: dict[str, Any], runs: int) -> None:
    """What a real step keeps, and a little for what lives for a moment only."""
    settings = replace(SETTINGS, **over)
    priors = 3 if settings.prior_weight else 0
    several = [(oracle.prepared(priors=priors), settings)] * runs
    found = estimate(base, settings, runs).activations
    wanted = kept(base, several)
    assert wanted <= found <= 1.15 * wanted


def test_checkpointing_takes_less() -> None:
    """At SD1.5's shape less than a third; half precision takes half."""
    plain = estimate(SD15, Settings())
    less = estimate(SD15, Settings(gradient_checkpointing=True))
    half = estimate(SD15, Settings(precision="bf16"))
    assert plain.layers == 160 and plain.parameters == 5_984_256
    assert less.activations < plain.activations / 3
    assert half.activations == pytest.approx(plain.activations / 2, rel=0.05)
    assert half.weights == plain.weights / 2


def test_encoders_count_where_they_are_needed(base: Base) -> None:
    """For sample pictures."""
    parts = (base.vae, base.text_encoder)
    wanted = sum(4 * p.numel() for part in parts for p in part.parameters())
    assert estimate(base, replace(SETTINGS, sample_prompts=("a",))).encoders == wanted
    assert estimate(base, SETTINGS).encoders == 0


def test_time_of_a_step(base: Base) -> None:
    """Positive, and the base is as it was."""
    names = list(base.unet.state_dict())
    assert 0 < seconds_per_step(base, replace(SETTINGS, warmup=5), runs=2) < 60
    assert list(base.unet.state_dict()) == names


def real(**settings: Any) -> tuple[Estimate, dict[str, float]]:
    """Estimate and measurement at SD1.5's shape with random weights, one step."""
    command = [sys.executable, "-m", "tests.train.realshape", json.dumps(settings)]
    root = Path(__file__).parents[2]
    told = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    return estimate(SD15, Settings(**settings)), json.loads(told.strip().splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_real_shape(checkpointing: bool) -> None:
    """160 layers, 5,984,256 parameters, all of them moved; the memory right within 20 %."""
    found, measured = real(gradient_checkpointing=checkpointing)
    assert measured["layers"] == found.layers == 160
    assert measured["parameters"] == found.parameters == 5_984_256
    assert measured["nonzero"] == 5_984_256
    assert found.memory == pytest.approx(measured["peak"], rel=0.2)
