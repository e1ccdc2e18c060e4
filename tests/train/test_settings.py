"""Settings: the paper's by default, refused where they cannot be, and what their digest tells."""

from __future__ import annotations

import math
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings

#: A value unlike the default for every setting.
OTHER: dict[str, Any] = {
    "model": "some/where",
    "groups": ("ff",),
    "rank": 8,
    "alpha": 16.0,
    "steps": 10,
    "learning_rate": 1e-4,
    "optimizer": "adam8bit",
    "weight_decay": 0.01,
    "schedule": "cosine",
    "warmup": 5,
    "resolution": 256,
    "batch_size": 2,
    "accumulate": 2,
    "precision": "bf16",
    "seed": 1,
    "token": "sks",
    "prior_weight": 0.5,
    "prior_prompt": "a drawing",
    "class_images": Path("here"),
    "class_count": 7,
    "min_snr": 5.0,
    "offset_noise": 0.05,
    "gradient_checkpointing": True,
    "compile": True,
    "ema": 0.99,
    "save_every": 5,
    "save_from": 5,
    "keep_last": 2,
    "sample_prompts": ("a cat",),
    "sample_every": 3,
}
#: What a resumed run may change: places, whose contents have digests, and what only looks on.
FREE = {
    *("model", "class_images", "class_count", "gradient_checkpointing"),
    *("save_every", "save_from", "keep_last", "sample_prompts", "sample_every"),
}


def test_the_defaults_are_the_papers() -> None:
    paper = Settings()
    assert (paper.rank, paper.alpha, paper.steps, paper.learning_rate) == (16, 8.0, 1760, 5e-4)
    assert (paper.optimizer, paper.resolution, paper.prior_weight) == ("adam", 512, 1.0)
    assert paper.groups == ("self_attn", "cross_attn", "ff")


@pytest.mark.parametrize("name", [field.name for field in fields(Settings)])
def test_the_digest_tells_what_changes_the_weights(name: str) -> None:
    before = replace(Settings(), sample_prompts=("x",))
    after = replace(before, **{name: OTHER[name]})
    assert (after.digest() == before.digest()) == (name in FREE)
    assert after.digest() == replace(before, **{name: OTHER[name]}).digest()


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        *((n, 0, "at least 1") for n in ("rank", "steps", "batch_size", "accumulate")),
        *((n, 0, "at least 1") for n in ("class_count", "save_every", "keep_last", "resolution")),
        ("warmup", -1, "at least 0"),
        ("seed", -1, "at least 0"),
        ("warmup", 1761, "1760"),
        *(("learning_rate", v, "above 0") for v in (0.0, -1.0, math.nan, math.inf)),
        ("alpha", 0.0, "above 0"),
        ("min_snr", 0.0, "above 0"),
        ("prior_weight", -1.0, "0 or more"),
        ("offset_noise", math.nan, "0 or more"),
        ("ema", 1.0, "between 0 and 1"),
        ("resolution", 500, "multiple of 64"),
        ("groups", (), "self_attn, cross_attn, ff"),
        ("groups", ("attention",), "attention"),
        ("groups", ("ff", "ff"), "ff, ff"),
        ("optimizer", "sgd", "adam, adam8bit"),
        ("schedule", "linear", "constant, cosine"),
        ("precision", "fp8", "fp32, fp16, bf16"),
        ("prior_prompt", " ", "prior weight of 0"),
        ("sample_every", 5, "need a prompt"),
    ],
)
def test_what_cannot_be_is_refused(name: str, value: Any, said: str) -> None:
    with pytest.raises(TrainProblem, match=said) as refused:
        replace(Settings(), **{name: value})
    assert str(refused.value).count("\n") == 0


def test_an_empty_prompt_is_no_trouble_without_prior_preservation() -> None:
    assert Settings(prior_weight=0.0, prior_prompt="").prior_prompt == ""
