"""What is asked of a training. The defaults are the paper's."""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from lorafind.train.problem import TrainProblem

MODEL = "stable-diffusion-v1-5/stable-diffusion-v1-5"
GROUPS = ("self_attn", "cross_attn", "ff")
OPTIMIZERS = ("adam", "adam8bit")
SCHEDULES = ("constant", "cosine")
PRECISIONS = ("fp32", "fp16", "bf16")
#: How names in the file are written.
SPELLINGS = ("kohya", "diffusers", "peft")
#: Three halvings in the VAE and three in the U-Net.
RESOLUTION_STEP = 64

#: What leaves the trained weights as they are, or is covered by the digests of base and pictures.
_NOT_COUNTED = frozenset(
    {
        *("model", "class_images", "class_count", "gradient_checkpointing"),
        *("save_every", "save_from", "keep_last", "sample_prompts", "sample_every"),
    }
)


@dataclass(frozen=True)
class Settings:
    """All that a training hangs on beside its base model's weights and its pictures.

    model: a diffusers folder, a single-file checkpoint (.safetensors) or a Hub id; groups: of
    GROUPS, the parts of the U-Net that get a LoRA; rank, alpha: ΔW = alpha/rank · B·A.

    steps: of the optimiser; learning_rate; optimizer: of OPTIMIZERS; weight_decay; schedule: of
    SCHEDULES, after ``warmup`` steps in which the rate rises linearly from 0; resolution: side of
    the square that pictures are cropped to, pixels; batch_size: pictures per forward pass;
    accumulate: passes per step; precision: of the frozen weights and activations, of PRECISIONS
    (the LoRA itself stays float32); seed: of everything that is random.

    token: the word [V] before every caption; None draws a rare one from the seed, empty is none.
    prior_weight: of DreamBooth's prior preservation loss, 0 turns it off; prior_prompt: what
    class images show; class_images: a folder of them, None generates ``class_count`` with the base.

    min_snr: γ of min-SNR weighting; offset_noise: strength; gradient_checkpointing: less memory for
    more time; compile: torch.compile; ema: decay of a moving average of the LoRA's weights, which
    is then what is saved. save_every: steps between two saved LoRAs, from step save_from on, of
    which the keep_last newest stay; sample_every: steps between pictures of sample_prompts. None
    turns each of these off.

    Raises TrainProblem for values that cannot be.
    """

    model: str = MODEL
    groups: tuple[str, ...] = GROUPS
    rank: int = 16
    alpha: float = 8.0
    steps: int = 1760
    learning_rate: float = 5e-4
    optimizer: str = "adam"
    weight_decay: float = 0.0
    schedule: str = "constant"
    warmup: int = 0
    resolution: int = 512
    batch_size: int = 1
    accumulate: int = 1
    precision: str = "fp32"
    seed: int = 0
    token: str | None = None
    prior_weight: float = 1.0
    prior_prompt: str = "a painting"
    class_images: Path | None = None
    class_count: int = 100
    min_snr: float | None = None
    offset_noise: float = 0.0
    gradient_checkpointing: bool = False
    compile: bool = False
    ema: float | None = None
    save_every: int | None = None
    save_from: int = 0
    keep_last: int | None = None
    sample_prompts: tuple[str, ...] = ()
    sample_every: int | None = None

    def __post_init__(self) -> None:
        self._choices()
        self._numbers()
        if self.warmup > self.steps:
            _wrong("warmup", self.warmup, f"at most the number of steps, {self.steps}")
        if self.resolution % RESOLUTION_STEP:
            _wrong("resolution", self.resolution, f"a multiple of {RESOLUTION_STEP}")
        if self.prior_weight > 0 and not self.prior_prompt.strip():
            raise TrainProblem(
                "Prior preservation needs a prompt that says what class images show; give one, or "
                "turn it off with a prior weight of 0."
            )
        if self.sample_every is not None and not self.sample_prompts:
            raise TrainProblem("Sample pictures need a prompt: give one, or leave them out.")

    def _choices(self) -> None:
        unknown = [group for group in self.groups if group not in GROUPS]
        if unknown or not self.groups or len(set(self.groups)) < len(self.groups):
            said = ", ".join(self.groups) or "nothing"
            _wrong("groups", said, f"one or several of {', '.join(GROUPS)}")
        for name, known in (
            ("optimizer", OPTIMIZERS),
            ("schedule", SCHEDULES),
            ("precision", PRECISIONS),
        ):
            if getattr(self, name) not in known:
                _wrong(name, getattr(self, name), f"one of {', '.join(known)}")

    def _numbers(self) -> None:
        for name, least in (
            *((name, 1) for name in ("rank", "steps", "resolution", "batch_size", "accumulate")),
            *((name, 0) for name in ("warmup", "seed", "save_from")),
            *((name, 1) for name in ("class_count", "save_every", "keep_last", "sample_every")),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                _wrong(name, value, f"at least {least}")
        for name in ("alpha", "learning_rate", "min_snr"):
            value = getattr(self, name)
            if value is not None and not (math.isfinite(value) and value > 0):
                _wrong(name, value, "above 0")
        for name in ("weight_decay", "prior_weight", "offset_noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                _wrong(name, value, "0 or more")
        if self.ema is not None and not 0 < self.ema < 1:
            _wrong("ema", self.ema, "between 0 and 1")

    def digest(self) -> str:
        """SHA-256 (hex) of all that changes the trained weights, for resuming.

        Left out: where the model and the class images lie (their contents have digests of their
        own), what only looks on or saves, and gradient checkpointing, which repeats the same sums.
        """
        counted = {k: v for k, v in asdict(self).items() if k not in _NOT_COUNTED}
        return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def _wrong(name: str, value: object, wanted: str) -> NoReturn:
    raise TrainProblem(f"The setting {name} is {value}; it must be {wanted}.")
