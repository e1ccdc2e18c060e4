"""Base models from folders and from the Hub's cache, the layers trained, and what is refused."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafind.train.model import load_base, lora_layers
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import GROUPS
from tests.train import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def copy(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny pipeline, to be spoilt."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def refused(name: Path | str, **how: Any) -> str:
    with pytest.raises(TrainProblem) as found:
        load_base(str(name), **how)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_a_folder(tiny_folder: Path) -> None:
    from diffusers import StableDiffusionPipeline

    base = load_base(str(tiny_folder))
    theirs: Any = StableDiffusionPipeline.from_pretrained(tiny_folder)
    for part in ("unet", "vae", "text_encoder"):
        ours = getattr(base, part)
        weights = getattr(theirs, part).state_dict()
        assert ours.state_dict().keys() == weights.keys()
        assert all(torch.equal(t, weights[k]) for k, t in ours.state_dict().items())
        assert not ours.training and not any(p.requires_grad for p in ours.parameters())
    torch.testing.assert_close(base.scheduler.alphas_cumprod, theirs.scheduler.alphas_cumprod)
    assert base.tokenizer("a red ring").input_ids == theirs.tokenizer("a red ring").input_ids
    assert (base.name, base.prediction_type) == (str(tiny_folder), "epsilon")
    content = (tiny_folder / "unet" / WEIGHTS).read_bytes()
    assert base.sha256 == hashlib.sha256(content).hexdigest()
    base.drop_encoders()
    assert base.vae is None and base.text_encoder is None


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16)]
)
def test_only_the_unet_is_of_low_precision(
    tiny_folder: Path, tiny_file: Path, precision: str, dtype: torch.dtype
) -> None:
    for name, words in ((tiny_folder, None), (tiny_file, tiny_folder)):
        base = load_base(str(name), precision, tokenizer=words)
        assert {p.dtype for p in base.unet.parameters()} == {dtype}
        for part in (base.vae, base.text_encoder):
            assert {p.dtype for p in part.parameters()} == {torch.float32}


def test_a_folder_with_half_precision_files_alone(copy: Path, tiny_folder: Path) -> None:
    for part in ("unet", "vae", "text_encoder"):
        file = next((copy / part).glob("*.safetensors"))
        half = {k: t.half() if t.is_floating_point() else t for k, t in load_file(file).items()}
        save_file(half, file.with_suffix(".fp16.safetensors"), metadata={"format": "pt"})
        file.unlink()
    base, whole = load_base(str(copy)), load_base(str(tiny_folder))
    weights = base.unet.state_dict()
    for name, tensor in whole.unet.state_dict().items():
        assert torch.equal(weights[name], tensor.half().float())
    assert base.unet.dtype == torch.float32


def test_a_model_in_the_cache_of_the_hub_needs_no_network(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--someone--tiny-sd"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    shutil.copytree(tiny_folder, repository / "snapshots" / COMMIT)
    local = load_base(str(tiny_folder))
    for name in ("someone/tiny-sd", "hf:someone/tiny-sd", f"someone/tiny-sd@{COMMIT}"):
        base = load_base(name, offline=True)
        assert (base.name, base.sha256) == (name, local.sha256)
    shutil.rmtree(repository / "snapshots" / COMMIT / "vae")
    assert refused("someone/tiny-sd", offline=True).startswith(
        "someone/tiny-sd is not complete: it has no vae;"
    )


def test_names_of_nothing() -> None:
    assert "is no file or folder here, and no name on the Hub" in refused("/no/such/model")
    said = refused("nobody/nothing", offline=True)
    assert "not in the cache of the Hub" in said and "--model" in said


def _config(part: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: edit(folder / part / "config.json", **changes)


def _index(name: str) -> Callable[[Path], None]:
    return lambda folder: edit(folder / "model_index.json", _class_name=name)


def _lacking(folder: Path) -> None:
    weights = load_file(folder / "unet" / WEIGHTS)
    weights.pop("conv_out.weight")
    save_file(weights, folder / "unet" / WEIGHTS, metadata={"format": "pt"})


def _cut(folder: Path) -> None:
    file = folder / "vae" / WEIGHTS
    file.write_bytes(file.read_bytes()[:-1000])


def _pickled(folder: Path) -> None:
    file = folder / "unet" / WEIGHTS
    file.rename(file.with_suffix(".bin"))


def _flux(folder: Path) -> None:
    (folder / "unet").rename(folder / "transformer")
    edit(folder / "model_index.json", _class_name="FluxPipeline")


SPOILT: dict[str, tuple[Callable[[Path], object], str]] = {
    "SDXL": (_index("StableDiffusionXLPipeline"), "is an SDXL model"),
    "SDXL unet": (
        _config("unet", addition_embed_type="text_time", cross_attention_dim=2048),
        "is an SDXL model",
    ),
    "refiner": (
        _config("unet", addition_embed_type="text_time", cross_attention_dim=1280),
        "is an SDXL refiner",
    ),
    "inpainting": (_index("StableDiffusionInpaintPipeline"), "is an inpainting model"),
    "inpainting unet": (_config("unet", in_channels=9), "is an inpainting model"),
    "pix2pix": (_config("unet", in_channels=8), "is an InstructPix2Pix model"),
    "SD2": (_config("unet", cross_attention_dim=1024), "is a Stable Diffusion 2 model"),
    "SD3": (_index("StableDiffusion3Pipeline"), "is a Stable Diffusion 3 model"),
    "Flux": (_flux, "is a Flux model"),
    "LoRA": (lambda f: (f / "adapter_config.json").write_text("{}"), "is a LoRA, not a base"),
    "no vae": (lambda f: shutil.rmtree(f / "vae"), "is not complete: it has no vae;"),
    "no text": (lambda f: shutil.rmtree(f / "text_encoder"), "it has no text_encoder;"),
    "no unet": (lambda f: shutil.rmtree(f / "unet"), "is no diffusers folder: it has no unet"),
    "lacking": (_lacking, r"the weights in unet lack conv_out\.weight and 0 more"),
    "cut": (_cut, "its last .* bytes are missing"),
    "pickled": (_pickled, "has no weights of its unet as safetensors"),
    "no JSON": (
        lambda f: (f / "unet" / "config.json").write_text("{"),
        r"config\.json cannot be read",
    ),
    "other shapes": (_config("vae", block_out_channels=[32] * 4), "cannot be read as a base"),
    "sample": (
        lambda f: edit(f / "scheduler" / "scheduler_config.json", prediction_type="sample"),
        "predicts 'sample'",
    ),
    "no words": (
        lambda f: (f / "tokenizer" / "merges.txt").unlink(),
        "is no tokenizer of this model",
    ),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_folders_that_cannot_be_trained_on(kind: str, copy: Path) -> None:
    spoil, said = SPOILT[kind]
    spoil(copy)
    with pytest.raises(TrainProblem, match=said):
        load_base(str(copy), offline=True)


def test_a_text_encoder_of_another_model(copy: Path) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    size = len(tiny.tokenizer())
    marks: dict[str, Any] = {
        "bos_token_id": size - 2,
        "eos_token_id": size - 1,
        "pad_token_id": size - 1,
    }
    narrow: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    config = CLIPTextConfig(vocab_size=size, num_attention_heads=1, **narrow, **marks)
    CLIPTextModel(config).save_pretrained(copy / "text_encoder")
    assert "gives 32 numbers per word, its U-Net wants 64" in refused(copy)


def test_a_model_that_predicts_velocities(copy: Path) -> None:
    edit(copy / "scheduler" / "scheduler_config.json", prediction_type="v_prediction")
    assert load_base(str(copy)).prediction_type == "v_prediction"


def test_the_layers_of_stable_diffusion_15() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)
    # DESIGN section 4: 160 layers, and trained numbers by group at rank 16.
    expected = {
        "self_attn": (64, 1_597_440),
        "cross_attn": (64, 1_591_296),
        "ff": (32, 2_795_520),
    }
    for group, (count, numbers) in expected.items():
        layers = [unet.get_submodule(name) for name in lora_layers(unet, (group,))]
        assert len(layers) == count
        assert sum(16 * (m.in_features + m.out_features) for m in layers) == numbers
    every = lora_layers(unet, GROUPS)
    assert len(set(every)) == 160
    kinds = Counter(name.partition("transformer_blocks.0.")[2] for name in every)
    assert set(kinds.values()) == {16} and len(kinds) == 10
    with pytest.raises(TrainProblem, match="no linear layers in text"):
        lora_layers(unet, ("text",))


def test_the_tiny_one_has_the_same_layers(base: Any) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        real: Any = UNet2DConditionModel(cross_attention_dim=768)
    assert lora_layers(base.unet, GROUPS) == lora_layers(real, GROUPS)
    assert len(lora_layers(base.unet, GROUPS)) == tiny.LAYERS
