"""Noise, times, targets and weights against their formulas."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lorafind.train import loss
from lorafind.train.cache import Prepared
from lorafind.train.loss import Batch
from lorafind.train.randomness import generator, pick
from lorafind.train.settings import Settings
from tests.train import oracle

SETTINGS = Settings(resolution=64, batch_size=3)


def scheduler(prediction: str = "epsilon") -> object:
    """SD1.5's noise schedule."""
    from diffusers import DDPMScheduler

    return DDPMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type=prediction,
    )


def draw(
    settings: Settings,
    step: int = 0,
    micro: int = 0,
    prediction: str = "epsilon",
    prepared: Prepared | None = None,
) -> Batch:
    """A batch in float64."""
    prepared = prepared or oracle.prepared()
    return loss.draw(scheduler(prediction), prepared, settings, step, micro, torch.float64)


def test_batch_is_instances_then_priors() -> None:
    """Three of each, with the prompts of the pictures that are due."""
    prepared = oracle.prepared(instances=4, priors=5)
    batch = draw(SETTINGS, step=2, prepared=prepared)
    places = pick(0, "instance", 6, 3, 4), pick(0, "prior", 6, 3, 5)
    wanted = [prepared.instance[i].prompt for i in places[0]]
    wanted += [prepared.prior[i].prompt for i in places[1]]
    assert torch.equal(batch.prompts, torch.stack(wanted).double())
    assert batch.times.unique().numel() > 1
    assert int(batch.times.min()) >= 0 and int(batch.times.max()) < 1000


def test_noisy_latents() -> None:
    """√ᾱ·(mean + std·ε₁) + √(1 − ᾱ)·ε₂; ε₂ is what is to be predicted."""
    prepared = oracle.prepared()
    batch = draw(SETTINGS, prepared=prepared)
    random = generator(0, "batch", 0, 0)
    spread = torch.randn(batch.noisy.shape, generator=random).double()
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32).double() ** 2
    alphas = torch.cumprod(1 - betas, 0)[batch.times][:, None, None, None]
    places = pick(0, "instance", 0, 3, 4), pick(0, "prior", 0, 3, 3)
    examples = [prepared.instance[i] for i in places[0]] + [prepared.prior[i] for i in places[1]]
    means = torch.stack([e.mean for e in examples]).double()
    stds = torch.stack([e.std for e in examples]).double()
    wanted = alphas.sqrt() * (means + stds * spread) + (1 - alphas).sqrt() * batch.target
    # The schedule is kept in float32.
    assert torch.allclose(batch.noisy, wanted, rtol=0, atol=2e-5)
    assert batch.target.std() == pytest.approx(1, abs=0.1)


def test_velocity_target() -> None:
    """v = √ᾱ·ε − √(1 − ᾱ)·x₀ (Salimans and Ho 2022), with the noise of the ε model's batch."""
    noise, batch = draw(SETTINGS).target, draw(SETTINGS, prediction="v_prediction")
    alphas = loss_alphas()[batch.times][:, None, None, None]
    clean = (batch.noisy - (1 - alphas).sqrt() * noise) / alphas.sqrt()
    wanted = alphas.sqrt() * noise - (1 - alphas).sqrt() * clean
    assert torch.allclose(batch.target, wanted, rtol=0, atol=1e-4)


def loss_alphas() -> torch.Tensor:
    """ᾱ, from the betas as published."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, 0).double()


def test_offset_noise() -> None:
    """Every channel of every sample gets one more number, of the given strength."""
    plain, moved = draw(SETTINGS), draw(replace(SETTINGS, offset_noise=0.3))
    offset = moved.target - plain.target
    assert torch.allclose(offset, offset[:, :, :1, :1].expand_as(offset), atol=1e-12)
    each = offset[:, :, 0, 0].flatten() / 0.3
    assert each.unique().numel() == 24
    assert 0.6 < float(each.std()) < 1.5


def test_prior_weight() -> None:
    """The mean of the instances' errors and prior_weight times the mean of the priors'."""
    batch = draw(replace(SETTINGS, prior_weight=0.25))
    predicted = torch.randn(batch.target.shape, generator=torch.Generator().manual_seed(1))
    errors = (predicted - batch.target) ** 2
    wanted = errors[:3].mean() + 0.25 * errors[3:].mean()
    found = loss.losses(predicted, batch, 1)
    assert found.tolist() == pytest.approx([float(wanted)], rel=1e-12)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_min_snr(prediction: str) -> None:
    """The weights of Hang et al. 2023, of instances and priors, with diffusers' SNR."""
    from diffusers.training_utils import compute_snr

    settings = replace(SETTINGS, min_snr=5.0, prior_weight=0.5)
    batch = draw(settings, prediction=prediction)
    snr = compute_snr(scheduler(prediction), batch.times).double()
    weights = torch.minimum(snr, torch.tensor(5.0)) / (snr if prediction == "epsilon" else snr + 1)
    wanted = weights * torch.tensor([1, 1, 1, 0.5, 0.5, 0.5]) / 3
    assert torch.allclose(batch.weights, wanted, rtol=1e-5)
    assert batch.weights.unique().numel() > 2


def test_min_snr_at_pure_noise() -> None:
    """Schedules with SNR = 0 at the end give no 0/0."""
    alphas = torch.tensor([0.0, 0.5], dtype=torch.float64)
    assert loss.min_snr(alphas, 5.0, False).tolist() == [1, 1]
    assert loss.min_snr(alphas, 5.0, True).tolist() == [0, 0.5]


def test_draws_hang_on_seed_step_and_pass_alone() -> None:
    """The same again for the same, other ones for others, whatever torch drew in between."""
    first = draw(SETTINGS, 3, 1)
    torch.manual_seed(5)
    torch.randn(7)
    before = torch.get_rng_state()
    again = draw(SETTINGS, 3, 1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(_parts(first), _parts(again), strict=True))
    for other in (
        draw(SETTINGS, 4, 1),
        draw(SETTINGS, 3, 0),
        draw(replace(SETTINGS, seed=1), 3, 1),
    ):
        assert not torch.equal(other.target, first.target)


def _parts(batch: Batch) -> list[torch.Tensor]:
    return [batch.noisy, batch.times, batch.prompts, batch.target, batch.weights]


def test_together() -> None:
    """The losses of several runs are their own."""
    batches = [draw(replace(SETTINGS, seed=seed)) for seed in range(3)]
    random = torch.Generator().manual_seed(2)
    predicted = [torch.randn(b.target.shape, generator=random) for b in batches]
    alone = [float(loss.losses(p, b, 1)) for p, b in zip(predicted, batches, strict=True)]
    found = loss.losses(torch.cat(predicted), loss.together(batches), 3)
    assert found.tolist() == pytest.approx(alone, rel=1e-12)
    assert len(set(alone)) == 3


def test_every_pass_takes_every_example() -> None:
    """Whole passes, in orders of their own, across the ends of steps."""
    walk = [i for start in range(0, 35, 5) for i in pick(3, "instance", start, 5, 7)]
    passes = [walk[start : start + 7] for start in range(0, 35, 7)]
    assert all(sorted(one) == list(range(7)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1
    assert pick(3, "instance", 9, 1, 7) == [walk[9]]
