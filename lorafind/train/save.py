"""The file that a training makes: names, numbers, and what it says about itself.

Names: kohya-ss/sd-scripts (``lora_unet_…``), diffusers (``unet.….lora_A.weight``), PEFT
(``base_model.model.…`` with adapter_config.json beside it). Metadata: the ``ss_`` texts of
sd-scripts, ModelSpec 1.0.0 of Stability AI. No time of day, no name of the file and nothing that
differs between two runs of one training goes in, so that these give the same bytes.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import lorafind
from lorafind.files import hashes
from lorafind.files.safetensors import read_header
from lorafind.files.whole import whole
from lorafind.train.adapters import Factors
from lorafind.train.cache import Prepared
from lorafind.train.model import Base
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings

#: What trainers and sites expect, and half of float32.
DTYPE = torch.float16
_NAMES = {torch.float16: "F16", torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64"}
_MIXED = {"fp32": "no", "fp16": "fp16", "bf16": "bf16"}


def save(
    out: Path,
    factors: Iterable[Factors],
    metadata: Mapping[str, str],
    settings: Settings,
    spelling: str = "kohya",
    dtype: torch.dtype = DTYPE,
) -> None:
    """Write a LoRA, in the place of a file that is there only when it is complete.

    spelling: of :data:`lorafind.train.settings.SPELLINGS`. kohya's names come with alpha; in the
    others, whose readers do not all ask for it, alpha/rank is multiplied into B. ``sshs_`` hashes
    are added to the metadata.

    Raises TrainProblem where numbers do not fit the dtype, OSError with the name of ``out``.
    """
    tensors = {k: t.to("cpu", dtype).contiguous() for k, t in _named(factors, settings, spelling)}
    if not all(bool(t.isfinite().all()) for t in tensors.values()):
        raise TrainProblem(
            f"{out.name} was not written: its numbers are too large for {_NAMES[dtype]}; train "
            "with a lower learning rate."
        )
    if spelling != "kohya":
        metadata = {**metadata, "ss_network_alpha": str(settings.rank)}
    with whole(out) as part:
        _write(part, tensors, metadata)
        found = hashes.hashes(part, read_header(part))
        claims = {
            "sshs_model_hash": found.sshs_model_hash,
            "sshs_legacy_hash": found.sshs_legacy_hash,
            "modelspec.hash_sha256": f"0x{found.sshs_model_hash}",
        }
        _write(part, tensors, {**metadata, **{k: v for k, v in claims.items() if v is not None}})
    if spelling == "peft":
        _configure(out, list(tensors), settings)


def companion(out: Path, spelling: str) -> Path | None:
    """The file beside ``out`` that a spelling needs, None for most."""
    return out.with_name("adapter_config.json") if spelling == "peft" else None


def metadata(
    base: Base, prepared: Prepared, settings: Settings, step: int, title: str = ""
) -> dict[str, str]:
    """What the file says about itself after ``step`` steps; title: its name for people."""
    images, priors = len(prepared.instance), len(prepared.prior)
    samples = step * settings.batch_size * settings.accumulate
    side, rate = settings.resolution, str(settings.learning_rate)
    velocity = base.prediction_type == "v_prediction"
    eight = settings.optimizer == "adam8bit"
    facts: dict[str, Any] = {
        "lorafind_version": lorafind.__version__,
        "ss_base_model_version": "sd_v1",
        "ss_v2": False,
        "ss_sd_model_name": Path(base.name).name,
        "ss_new_sd_model_hash": base.sha256,
        "ss_network_module": "networks.lora",
        "ss_network_dim": settings.rank,
        "ss_network_alpha": settings.alpha,
        "ss_network_args": {"groups": ",".join(settings.groups)},
        "ss_steps": step,
        "ss_max_train_steps": settings.steps,
        "ss_num_epochs": -(-samples // images),
        "ss_seed": settings.seed,
        "ss_num_train_images": images,
        "ss_num_reg_images": priors,
        "ss_total_batch_size": settings.batch_size,
        "ss_gradient_accumulation_steps": settings.accumulate,
        "ss_gradient_checkpointing": settings.gradient_checkpointing,
        "ss_learning_rate": rate,
        "ss_unet_lr": rate,
        "ss_text_encoder_lr": None,
        "ss_optimizer": "bitsandbytes.optim.AdamW8bit" if eight else "torch.optim.AdamW",
        "ss_optimizer_args": f"weight_decay={settings.weight_decay}",
        "ss_lr_scheduler": settings.schedule,
        "ss_lr_warmup_steps": settings.warmup,
        "ss_mixed_precision": _MIXED[settings.precision],
        "ss_resolution": (side, side),
        "ss_noise_offset": settings.offset_noise or None,
        "ss_min_snr_gamma": settings.min_snr,
        "ss_prior_loss_weight": settings.prior_weight if priors else None,
        "ss_cache_latents": True,
        "ss_session_id": _session(base, prepared, settings),
        "ss_tag_frequency": {"images": _tags(prepared.prompts)},
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": "stable-diffusion-v1/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "v" if velocity else "epsilon",
        "modelspec.resolution": f"{side}x{side}",
    }
    if title:
        facts["modelspec.title"] = title
    if prepared.token:
        facts["modelspec.trigger_phrase"] = prepared.token
    if settings.ema is not None:
        facts["ss_training_comment"] = f"moving average of the weights, decay {settings.ema}"
    return {k: json.dumps(v) if isinstance(v, dict) else str(v) for k, v in facts.items()}


def _session(base: Base, prepared: Prepared, settings: Settings) -> int:
    """A number that files of one training share, and no others."""
    said = "/".join((settings.digest(), prepared.digest, base.sha256))
    return int.from_bytes(hashlib.sha256(said.encode()).digest()[:4], "little")


def _tags(prompts: Sequence[str]) -> dict[str, int]:
    """How often each part between commas occurs."""
    tags = (tag.strip() for prompt in prompts for tag in prompt.split(","))
    return dict(Counter(tag for tag in tags if tag))


def _named(
    factors: Iterable[Factors], settings: Settings, spelling: str
) -> Iterable[tuple[str, Tensor]]:
    scale = settings.alpha / settings.rank
    for name, a, b in factors:
        if spelling == "kohya":
            path = "lora_unet_" + name.replace(".", "_")
            yield f"{path}.lora_down.weight", a
            yield f"{path}.lora_up.weight", b
            yield f"{path}.alpha", torch.tensor(settings.alpha)
        else:
            path = ("unet." if spelling == "diffusers" else "base_model.model.") + name
            yield f"{path}.lora_A.weight", a
            yield f"{path}.lora_B.weight", b * scale


def _write(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """As the safetensors library orders tensors, but with the metadata always in one order."""
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))}
    end = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        begin, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            file.write(tensors[name].flatten().view(torch.uint8).numpy().data)


def _configure(out: Path, keys: Sequence[str], settings: Settings) -> None:
    """adapter_config.json, which PEFT reads."""
    from peft import LoraConfig

    names = {key.removeprefix("base_model.model.").partition(".lora_")[0] for key in keys}
    config = LoraConfig(
        r=settings.rank, lora_alpha=settings.rank, base_model_name_or_path=settings.model
    ).to_dict()
    config["target_modules"] = sorted(names)
    place = companion(out, "peft")
    assert place is not None
    with whole(place) as part:
        part.write_text(json.dumps(config, indent=2, sort_keys=True, default=sorted), "utf-8")
