"""The file: names, numbers, metadata, hashes, and that others read it as it was meant."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from lorafind.files import hashes
from lorafind.files.safetensors import read_header
from lorafind.train import save
from lorafind.train.engine import Engine
from lorafind.train.loop import Output, Run, train, train_together
from lorafind.train.model import Base
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import SPELLINGS, Settings
from tests.train import oracle, tiny

SETTINGS = Settings(steps=3, rank=4, alpha=3.0, resolution=64, learning_rate=2e-2)


@pytest.fixture(scope="module")
def base() -> Base:
    """The tiny model."""
    return oracle.base()


@pytest.fixture(scope="module")
def trained() -> Iterator[Engine]:
    """A LoRA after three steps, in a U-Net of its own."""
    with Engine.on(oracle.base(), [(oracle.prepared(), SETTINGS)]) as engine:
        for step in range(SETTINGS.steps):
            engine.gradients(step)
            engine.update(step)
        yield engine


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Of a U-Net."""
    random = torch.Generator().manual_seed(3)
    noisy = torch.randn(2, 4, 8, 8, generator=random)
    return noisy, torch.tensor([10, 700]), torch.randn(2, 77, tiny.CONTEXT, generator=random)


def predicted(unet: Any) -> Tensor:
    """What a U-Net says to them."""
    with torch.no_grad():
        found: Tensor = unet(*inputs()).sample
    return found


def written(
    trained: Engine, out: Path, spelling: str = "kohya", dtype: torch.dtype = torch.float32
) -> Path:
    """The LoRA in a file."""
    told = save.metadata(trained.base, oracle.prepared(), SETTINGS, 3)
    save.save(out, trained.result(0), told, SETTINGS, spelling, dtype)
    return out


@pytest.mark.parametrize("spelling", ["kohya", "diffusers"])
def test_diffusers_gives_the_same_pictures(trained: Engine, tmp_path: Path, spelling: str) -> None:
    """The U-Net of a pipeline that loaded the file says what the trained one says."""
    from diffusers import StableDiffusionPipeline

    out = written(trained, tmp_path / "a.safetensors", spelling)
    fresh = tiny.pipeline()
    bare = predicted(fresh.unet)
    kind: Any = StableDiffusionPipeline
    pipeline = kind(
        vae=fresh.vae,
        text_encoder=fresh.text_encoder,
        tokenizer=fresh.tokenizer,
        unet=fresh.unet,
        scheduler=fresh.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.load_lora_weights(tmp_path, weight_name=out.name)
    wanted, found = predicted(trained.base.unet), predicted(pipeline.unet)
    assert float((wanted - bare).norm() / bare.norm()) > 0.01
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5)


def test_peft_reads_it(trained: Engine, tmp_path: Path) -> None:
    """As a folder with adapter_config.json."""
    from peft import PeftModel

    written(trained, tmp_path / "adapter_model.safetensors", "peft")
    loaded = PeftModel.from_pretrained(tiny.pipeline().unet, str(tmp_path))
    found, wanted = predicted(loaded), predicted(trained.base.unet)
    assert torch.allclose(found, wanted, rtol=0, atol=2e-5)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_change_of_weights(
    trained: Engine, tmp_path: Path, spelling: str, dtype: torch.dtype
) -> None:
    """lorafind itself reads alpha/rank · B·A of all layers, to the dtype's precision."""
    out = written(trained, tmp_path / "a.safetensors", spelling, dtype)
    with safe_open(out, "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert {t.dtype for t in tensors.values()} == {dtype}
    assert len(tensors) == tiny.LAYERS * (3 if spelling == "kohya" else 2)
    unit = torch.finfo(dtype).eps
    for name, a, b in trained.result(0):
        wanted = 0.75 * b.double() @ a.double()
        if spelling == "kohya":
            path = "lora_unet_" + name.replace(".", "_")
            low, up = tensors[f"{path}.lora_down.weight"], tensors[f"{path}.lora_up.weight"]
            scale = float(tensors[f"{path}.alpha"]) / 4
        else:
            path = ("unet." if spelling == "diffusers" else "base_model.model.") + name
            low, up = tensors[f"{path}.lora_A.weight"], tensors[f"{path}.lora_B.weight"]
            scale = 1.0
        found = scale * up.double() @ low.double()
        assert float((found - wanted).norm()) <= 2 * unit * float(wanted.norm()), name


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_hashes_recompute(trained: Engine, tmp_path: Path, spelling: str) -> None:
    """Those that the file claims are those of its bytes."""
    out = written(trained, tmp_path / "a.safetensors", spelling, torch.float16)
    header = read_header(out)
    found = hashes.hashes(out, header)
    claims = {k: v for k, v in header.metadata.items() if "hash" in k and "sd_model" not in k}
    wanted = {"sshs_model_hash": found.sshs_model_hash}
    wanted["modelspec.hash_sha256"] = f"0x{found.sshs_model_hash}"
    if found.sshs_legacy_hash is not None:
        wanted["sshs_legacy_hash"] = found.sshs_legacy_hash
    assert claims == wanted


def test_as_the_safetensors_library_writes(trained: Engine, tmp_path: Path) -> None:
    """The same tensors in the same places, so that programs that rewrite it keep its hash."""
    from safetensors.torch import load_file, save_file

    out = written(trained, tmp_path / "a.safetensors", dtype=torch.float16)
    save_file(load_file(out), tmp_path / "b.safetensors", {"format": "pt"})
    ours, theirs = read_header(out), read_header(tmp_path / "b.safetensors")
    assert list(ours.tensors) == list(theirs.tensors)
    data = [
        path.read_bytes()[header.data_start :]
        for path, header in ((out, ours), (tmp_path / "b.safetensors", theirs))
    ]
    assert data[0] == data[1]


def test_metadata(base: Base, tmp_path: Path) -> None:
    """What programs that know kohya's or ModelSpec's names read."""
    settings = replace(SETTINGS, seed=7, min_snr=5.0, ema=0.5)
    out = tmp_path / "a.safetensors"
    train(base, oracle.prepared(), settings, out, title="Rings")
    told = read_header(out).metadata
    assert (
        told.items()
        >= {
            "ss_network_module": "networks.lora",
            "ss_network_dim": "4",
            "ss_network_alpha": "3.0",
            "ss_base_model_version": "sd_v1",
            "ss_v2": "False",
            "ss_sd_model_name": "tiny",
            "ss_new_sd_model_hash": base.sha256,
            "ss_steps": "3",
            "ss_seed": "7",
            "ss_num_train_images": "4",
            "ss_num_reg_images": "3",
            "ss_learning_rate": "0.02",
            "ss_min_snr_gamma": "5.0",
            "ss_resolution": "(64, 64)",
            "modelspec.sai_model_spec": "1.0.0",
            "modelspec.architecture": "stable-diffusion-v1/lora",
            "modelspec.title": "Rings",
            "modelspec.trigger_phrase": "ohw",
            "modelspec.prediction_type": "epsilon",
            "modelspec.resolution": "64x64",
        }.items()
    )
    assert json.loads(told["ss_tag_frequency"]) == {
        "images": {"ohw a picture": 4, "red": 2, "green": 1, "blue": 1}
    }
    assert not any("time" in key or "_at" in key or "date" in key for key in told)


def test_session_id(base: Base, tmp_path: Path) -> None:
    """Shared by the files of one training, by no two trainings."""
    settings = replace(SETTINGS, save_every=2)
    train(base, oracle.prepared(), settings, tmp_path / "a.safetensors")
    runs = [
        Run(oracle.prepared(k), replace(settings, seed=k), tmp_path / f"b{k}.safetensors")
        for k in (1, 2)
    ]
    train_together(base, runs)
    found = {
        path.stem: read_header(path).metadata["ss_session_id"]
        for path in tmp_path.glob("*.safetensors")
    }
    assert len(found) == 6
    assert len(set(found.values())) == 3
    assert all(found[f"{name}-000002"] == found[name] for name in ("a", "b1", "b2"))


def test_alpha_where_it_is_folded(base: Base, tmp_path: Path) -> None:
    """The metadata say what the file holds."""
    for spelling in SPELLINGS:
        out = tmp_path / spelling / "adapter_model.safetensors"
        out.parent.mkdir()
        train(base, oracle.prepared(), SETTINGS, out, output=Output(spelling))
        told = read_header(out).metadata
        wanted = "3.0" if spelling == "kohya" else "4"
        assert (told["ss_network_dim"], told["ss_network_alpha"]) == ("4", wanted)


def test_companion_is_not_overwritten(base: Base, tmp_path: Path) -> None:
    """adapter_config.json of another LoRA."""
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(TrainProblem, match=r"adapter_config\.json exists"):
        train(base, oracle.prepared(), SETTINGS, tmp_path / "a.safetensors", output=Output("peft"))


def test_too_large_for_float16(trained: Engine, tmp_path: Path) -> None:
    """Never an infinity in a file."""
    factors = trained.result(0)
    with pytest.raises(TrainProblem, match="too large for F16"):
        save.save(
            tmp_path / "a.safetensors",
            [factors[0]._replace(b=factors[0].b * 1e9)],
            {},
            SETTINGS,
        )
    assert list(tmp_path.iterdir()) == []
