"""The engine against the same training written plainly with diffusers and PEFT, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lorafind.train import loss
from lorafind.train.cache import Prepared
from lorafind.train.engine import Engine
from lorafind.train.model import Base, lora_layers
from lorafind.train.optimizer import rate
from lorafind.train.settings import Settings
from tests.train import oracle, tiny

SETTINGS = Settings(steps=20, rank=4, alpha=3.0, resolution=64)
CASES = {
    "prior": replace(SETTINGS, prior_weight=0.7),
    "accumulate": replace(
        SETTINGS,
        steps=6,
        prior_weight=0.0,
        batch_size=2,
        accumulate=2,
        warmup=2,
        schedule="cosine",
        learning_rate=5e-3,
    ),
}


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny model in float64, for all tests: the engine leaves it as it was."""
    return oracle.base(torch.float64)


def examples(settings: Settings, seed: int = 0) -> Prepared:
    """With class images where the settings ask for them."""
    return oracle.prepared(seed, priors=3 if settings.prior_weight else 0)


def batches(base: Base, prepared: Prepared, settings: Settings) -> Any:
    """What both sides are given."""

    def one(step: int, micro: int) -> loss.Batch:
        return loss.draw(base.scheduler, prepared, settings, step, micro, torch.float64)

    return one


def put(engine: Engine, j: int, values: dict[str, Tensor]) -> None:
    """Give LoRA j some values."""
    for name, a, b in engine.adapters.factors(engine.adapters.values[j]):
        a.copy_(values[f"{name}.lora_A.default.weight"])
        b.copy_(values[f"{name}.lora_B.default.weight"])


def flat(engine: Engine, rows: Tensor, j: int) -> dict[str, Tensor]:
    """Row j under PEFT's names."""
    found = {}
    for name, a, b in engine.adapters.factors(rows[j]):
        found[f"{name}.lora_A.default.weight"] = a.clone()
        found[f"{name}.lora_B.default.weight"] = b.clone()
    return found


def same(found: dict[str, Tensor], wanted: dict[str, Tensor], relative: float) -> None:
    """Every tensor, by its own norm.

    In the middle of the tiny U-Net there is one place, of which self-attention takes all whatever q
    and k: their gradients are rounding errors of 0.
    """
    assert found.keys() == wanted.keys()
    floor = 1e-6 * max(float(tensor.norm()) for tensor in wanted.values())
    for name, tensor in wanted.items():
        error = float((found[name] - tensor).norm()) / max(float(tensor.norm()), floor)
        assert error < relative, f"{name}: {error:.1e}"


@pytest.mark.parametrize("case", CASES)
def test_gradients(base: Base, case: str) -> None:
    """Loss and every gradient of one step at equal parameters."""
    settings, prepared = CASES[case], examples(CASES[case])
    with Engine.on(base, [(prepared, settings)]) as engine:
        names = engine.adapters.names
        values = oracle.start(names, _bare(base), settings.rank, 1, 0.1)
        put(engine, 0, values)
        found_loss = float(engine.gradients(0)[0])
        found = flat(engine, engine.adapters.gradients, 0)
    plain = oracle.base(torch.float64).unet
    oracle.with_peft(plain, names, settings, values)
    draw = batches(base, prepared, settings)
    wanted_loss = 0.0
    for micro in range(settings.accumulate):
        batch = draw(0, micro)
        one = oracle.plain_loss(plain, batch, settings, settings.batch_size) / settings.accumulate
        one.backward()
        wanted_loss += float(one.detach())
    wanted = {n: p.grad for n, p in plain.named_parameters() if "lora_" in n}
    assert sum(float(gradient.norm()) > 1e-6 for gradient in wanted.values()) > 300
    assert found_loss == pytest.approx(wanted_loss, rel=1e-12)
    same(found, wanted, 1e-10)


def _bare(base: Base) -> Any:
    """A U-Net of the same shapes without LoRA layers."""
    return tiny.pipeline().unet


@pytest.mark.parametrize("case", CASES)
def test_twenty_steps(base: Base, case: str) -> None:
    """Losses and weights of twenty steps of Adam."""
    settings, prepared = CASES[case], examples(CASES[case])
    with Engine.on(base, [(prepared, settings)]) as engine:
        names = engine.adapters.names
        values = oracle.start(names, _bare(base), settings.rank, 1, 0.02)
        put(engine, 0, values)
        losses = []
        for step in range(settings.steps):
            losses.append(float(engine.gradients(step)[0]))
            engine.update(step)
        found = flat(engine, engine.adapters.values, 0)
    plain = oracle.base(torch.float64).unet
    oracle.with_peft(plain, names, settings, values)
    wanted_losses = oracle.plain_training(
        plain, settings, batches(base, prepared, settings), lambda k: rate(settings, k)
    )
    assert losses == pytest.approx(wanted_losses, rel=1e-10)
    wanted = {n: p.detach() for n, p in plain.named_parameters() if "lora_" in n}
    same(found, wanted, 1e-8)
    moved = [float((wanted[n] - values[n]).norm() / values[n].norm()) for n in values]
    assert sum(share > 1e-3 for share in moved) > 300


def four(settings: Settings) -> Iterator[tuple[Prepared, Settings]]:
    """Four trainings of other pictures with other seeds."""
    for seed in range(4):
        yield oracle.prepared(seed, instances=3 + seed), replace(settings, seed=seed)


def test_parallel_equals_single(base: Base) -> None:
    """Four LoRAs in one pass are those of four trainings, after every step."""
    settings = replace(SETTINGS, steps=4, min_snr=5.0, offset_noise=0.1, ema=0.9)
    runs = list(four(settings))

    def course(some: list[tuple[Prepared, Settings]]) -> tuple[list[Tensor], list[Tensor]]:
        with Engine.on(base, some) as engine:
            losses, values = [], []
            for step in range(settings.steps):
                losses.append(engine.gradients(step))
                engine.update(step)
                results = [engine.result(j) for j in range(len(some))]
                both = [torch.cat([t.flatten() for f in one for t in f[1:]]) for one in results]
                values.append(torch.cat([torch.stack(both), engine.adapters.values], 1).clone())
            return losses, values

    losses, values = course(runs)
    for j, run in enumerate(runs):
        alone_losses, alone_values = course([run])
        for step in range(settings.steps):
            assert torch.allclose(losses[step][j], alone_losses[step][0], rtol=1e-12, atol=0)
            error = (values[step][j] - alone_values[step][0]).norm()
            assert error / alone_values[step][0].norm() < 1e-9, f"run {j}, step {step + 1}"


def test_no_run_touches_another(base: Base) -> None:
    """The gradients of one LoRA do not hang on the others' weights or pictures."""
    settings = replace(SETTINGS, steps=1)
    runs = list(four(settings))[:2]
    found = []
    for seed in (5, 6):
        with Engine.on(base, runs) as engine:
            bare = _bare(base)
            put(engine, 0, oracle.start(engine.adapters.names, bare, settings.rank, 1, 0.1))
            put(engine, 1, oracle.start(engine.adapters.names, bare, settings.rank, seed, 0.1))
            engine.gradients(0)
            found.append(engine.adapters.gradients.clone())
    assert torch.equal(found[0][0], found[1][0])
    assert not torch.equal(found[0][1], found[1][1])


def test_base_is_left_as_it_was(base: Base, tmp_path: Path) -> None:
    """After a training the U-Net has its own layers, untouched."""
    before = {k: t.clone() for k, t in base.unet.state_dict().items()}
    for runs in (list(four(SETTINGS))[:1], list(four(SETTINGS))[:2]):
        with Engine.on(base, runs) as engine:
            engine.gradients(0)
            engine.update(0)
            names = engine.adapters.names
        after = base.unet.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(after[k], t) for k, t in before.items())
        assert list(names) == lora_layers(base.unet, SETTINGS.groups)
        assert not any(p.requires_grad or p.grad is not None for p in base.unet.parameters())
        assert not hasattr(base.unet, "peft_config")
