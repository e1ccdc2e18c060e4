"""Checkpoints in one file, and the tokenizers that they do not bring."""

from __future__ import annotations

import gzip
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lorafind.train.model import load_base
from lorafind.train.problem import TrainProblem
from lorafind.train.singlefile import TEXT, UNET, VAE, unet_config, vae_config
from lorafind.train.tokenizer import rare_word
from tests.train import tiny

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def tensors(tiny_file: Path) -> Tensors:
    return load_file(tiny_file)


def write(path: Path, tensors: Tensors, **metadata: str) -> Path:
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata=metadata or None)
    return path


def assert_same(one: Any, two: Any) -> None:
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = getattr(one, part).state_dict(), getattr(two, part).state_dict()
        assert ours.keys() == theirs.keys()
        for name, tensor in ours.items():
            assert torch.equal(tensor, theirs[name])


def test_a_file_is_the_same_model_as_its_folder(tiny_file: Path, tiny_folder: Path) -> None:
    base = load_base(str(tiny_file), tokenizer=tiny_folder, offline=True)
    folder = load_base(str(tiny_folder))
    assert_same(base, folder)
    assert base.sha256 == hashlib.sha256(tiny_file.read_bytes()).hexdigest()
    assert base.prediction_type == "epsilon"
    torch.testing.assert_close(base.scheduler.alphas_cumprod, folder.scheduler.alphas_cumprod)
    assert base.unet.config.attention_head_dim == 8
    assert base.vae.config.scaling_factor == 0.18215
    # What the configurations say beside the weights shows in what comes out.
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    pixels = torch.rand(1, 3, 64, 64, generator=generator) * 2 - 1
    words = base.tokenizer("a red ring", padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        for give in (
            lambda b: b.text_encoder(words).last_hidden_state,
            lambda b: b.vae.encode(pixels).latent_dist.mean,
            lambda b: b.unet(latents, 7, b.text_encoder(words).last_hidden_state).sample,
        ):
            torch.testing.assert_close(give(base), give(folder), rtol=0, atol=0)


def test_half_precision_and_older_spellings(
    tensors: Tensors, tiny_folder: Path, tmp_path: Path
) -> None:
    half = {k: t.half() if t.is_floating_point() else t for k, t in tensors.items()}
    old = {
        k.replace(f"{TEXT}text_model.", TEXT): t
        for k, t in half.items()
        if not k.endswith("position_ids")
    }
    # Leftovers of trainers and mergers.
    old[f"{TEXT}embeddings.position_ids"] = torch.arange(77).half()[None]
    old["model_ema.decay"] = torch.tensor(0.9999)
    one = write(tmp_path / "one.safetensors", half)
    two = write(tmp_path / "two.safetensors", old, format="pt")
    bases = [load_base(str(p), tokenizer=tiny_folder, offline=True) for p in (one, two)]
    assert_same(*bases)
    whole = load_base(str(tiny_folder))
    weights = bases[0].unet.state_dict()
    for name, tensor in whole.unet.state_dict().items():
        assert torch.equal(weights[name], tensor.half().float())
    assert bases[0].unet.dtype == torch.float32


def test_files_that_predict_velocities(tensors: Tensors, tiny_folder: Path, tmp_path: Path) -> None:
    marked = write(tmp_path / "a.safetensors", tensors | {"v_pred": torch.zeros(0)})
    said = write(tmp_path / "b.safetensors", tensors, **{"modelspec.prediction_type": "v"})
    for path in (marked, said):
        base = load_base(str(path), tokenizer=tiny_folder)
        assert base.prediction_type == base.scheduler.config.prediction_type == "v_prediction"


def test_configurations_at_the_real_shape() -> None:
    from diffusers import AutoencoderKL, UNet2DConditionModel

    with torch.device("meta"):
        unet: Any = UNet2DConditionModel(cross_attention_dim=768)
        vae: Any = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512),
            down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4,
            layers_per_block=2,
        )
    shapes = {UNET + k: tuple(t.shape) for k, t in tiny.original_unet(unet)}
    shapes |= {VAE + k: tuple(t.shape) for k, t in tiny.original_vae(vae)}
    for config, model in ((unet_config(shapes, ""), unet), (vae_config(shapes, ""), vae)):
        for key, value in config.items():
            if key != "_class_name":
                wanted = model.config[key]
                assert value == (list(wanted) if isinstance(wanted, tuple) else wanted), key


# ---------------------------------------------------------------------------- refusals


def _reshaped(name: str, *shape: int) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {name: torch.zeros(*shape)}


def _without(start: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {k: t for k, t in tensors.items() if not k.startswith(start)}


def _only(start: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        k.removeprefix(start): t for k, t in tensors.items() if k.startswith(start)
    }


def _named(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: torch.zeros(4, 4) for name in names}


FIRST = f"{UNET}input_blocks.0.0.weight"
KEYS = f"{UNET}input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"
LORA = "lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"
SPOILT: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "kohya LoRA": (_named(LORA), "is a LoRA, not a base model"),
    "PEFT LoRA": (_named("unet.down_blocks.0.attn1.to_q.lora_A.weight"), "is a LoRA"),
    "SDXL": (
        _named(KEYS, "conditioner.embedders.0.transformer.x", "conditioner.embedders.1.model.x"),
        "is an SDXL model",
    ),
    "SDXL unet": (_reshaped(KEYS, 32, 2048), "is an SDXL model"),
    "refiner": (_named(KEYS, "conditioner.embedders.0.model.x"), "is an SDXL refiner"),
    "SD2": (_named(KEYS, "cond_stage_model.model.ln_final.weight"), "is a Stable Diffusion 2"),
    "SD2 unet": (_reshaped(KEYS, 32, 1024), "is a Stable Diffusion 2"),
    "SD3": (_named("model.diffusion_model.joint_blocks.0.x"), "is a Stable Diffusion 3"),
    "Flux": (_named("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"), "a Flux model"),
    "Flux diffusers": (_named("single_transformer_blocks.0.attn.to_q.weight"), "a Flux model"),
    "inpainting": (_reshaped(FIRST, 32, 9, 3, 3), "is an inpainting model"),
    "pix2pix": (_reshaped(FIRST, 32, 8, 3, 3), "is an InstructPix2Pix model"),
    "ControlNet": (_named("control_model.input_blocks.0.0.weight"), "is a ControlNet"),
    "VAE": (_only(VAE), "is a VAE alone"),
    "U-Net": (_only(UNET), "is a U-Net alone"),
    "U-Net of diffusers": (_named("down_blocks.0.resnets.0.conv1.weight"), "is a U-Net alone"),
    "text encoder": (_named("text_model.embeddings.x"), "is a text encoder alone"),
    "embedding": (_named("emb_params"), "is a textual inversion embedding"),
    "anything": (_named("x"), "is no checkpoint of the original layout"),
    "no VAE": (_without(VAE), "has no VAE in it"),
    "no text encoder": (_without("cond_stage_model."), "has no text encoder in it"),
    "a layer less": (_without(f"{UNET}middle_block.1.proj_in"), r"lacks 1 layers, .*proj_in"),
    "a bias less": (_without(f"{UNET}out.2.bias"), "cannot be read as a base model"),
    "half a VAE": (_without(f"{VAE}decoder.up.3"), "cannot be read as a base model"),
    "other VAE": (_reshaped(f"{VAE}quant_conv.weight", 32, 32, 1, 1), "a VAE that is not"),
    "a text layer less": (
        _without(f"{TEXT}text_model.final_layer_norm"),
        "cannot be read as a base model",
    ),
    "no vocabulary": (_without(f"{TEXT}text_model.embeddings"), "has a text encoder that is not"),
    "no text layers": (_without(f"{TEXT}text_model.encoder"), "cannot be read as a base model"),
}


@pytest.mark.parametrize("kind", SPOILT)
def test_files_that_cannot_be_trained_on(
    kind: str, tensors: Tensors, tiny_folder: Path, tmp_path: Path
) -> None:
    spoil, said = SPOILT[kind]
    path = write(tmp_path / "file.safetensors", spoil(dict(tensors)))
    with pytest.raises(TrainProblem, match=said) as refused:
        load_base(str(path), tokenizer=tiny_folder, offline=True)
    assert "file.safetensors" in str(refused.value) and "\n" not in str(refused.value)


def test_files_that_are_no_safetensors(tiny_file: Path, tmp_path: Path) -> None:
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(tiny_file.read_bytes()[:-5000])
    pointer = tmp_path / "pointer.safetensors"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    pickled = tmp_path / "model.ckpt"
    torch.save({"state_dict": {}}, pickled)
    for path, said in (
        (cut, "its last .* bytes are missing"),
        (pointer, "is a Git LFS pointer"),
        (pickled, "is a PyTorch file, which can hold programs.*convert it"),
    ):
        with pytest.raises(TrainProblem, match=said):
            load_base(str(path), offline=True)


# ---------------------------------------------------------------------------- tokenizers


def _merges(folder: Path) -> bytes:
    """The tiny vocabulary as CLIP's authors publish theirs, with lines that are not used."""
    lines = (folder / "tokenizer" / "merges.txt").read_text().split("\n")
    return gzip.compress("\n".join([*lines[:-1], "no merge", "of this model"]).encode())


PLACES = {
    "beside": ("m/model.safetensors", "m"),
    "a diffusers folder beside": ("m/model.safetensors", "m/other/tokenizer"),
    "ComfyUI": ("ui/models/checkpoints/sd15/model.safetensors", "ui/comfy/sd1_tokenizer"),
    "ComfyUI portable": ("models/x/model.safetensors", "ComfyUI/comfy/sd1_tokenizer"),
}


@pytest.mark.parametrize("place", PLACES)
def test_tokenizers_are_found_around_the_file(
    place: str, tiny_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    file, home = (tmp_path / name for name in PLACES[place])
    file.parent.mkdir(parents=True)
    shutil.copy(tiny_file, file)
    shutil.copytree(tiny_folder / "tokenizer", home, dirs_exist_ok=True)
    base = load_base(str(file), offline=True)
    assert base.tokenizer("a red ring").input_ids == tiny.tokenizer()("a red ring").input_ids


def test_the_vocabulary_of_the_web_ui(tiny_file: Path, tiny_folder: Path, tmp_path: Path) -> None:
    packages = tmp_path / "webui/venv/lib/python3.10/site-packages/open_clip"
    packages.mkdir(parents=True)
    (packages / "bpe_simple_vocab_16e6.txt.gz").write_bytes(_merges(tiny_folder))
    file = tmp_path / "webui/models/Stable-diffusion/model.safetensors"
    file.parent.mkdir(parents=True)
    shutil.copy(tiny_file, file)
    words = load_base(str(file), offline=True).tokenizer
    assert words.get_vocab() == tiny.tokenizer().get_vocab()
    text = "A round PAINTING, of bdw ring’s 12 日本!"
    how: dict[str, Any] = {"padding": "max_length", "max_length": 77, "truncation": True}
    assert words(text, **how).input_ids == tiny.tokenizer()(text, **how).input_ids
    given = packages / "bpe_simple_vocab_16e6.txt.gz"
    base = load_base(str(tiny_file), tokenizer=given, offline=True)
    assert base.tokenizer.get_vocab() == words.get_vocab()


def test_the_vocabulary_in_the_cache_of_the_hub(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    # Another model's vocabulary is passed over; another padding is not taken.
    other = tmp_path / "models--a--gpt" / "snapshots" / "1" / "tokenizer"
    other.mkdir(parents=True)
    (other / "vocab.json").write_text('{"a": 0, "b": 1}')
    (other / "merges.txt").write_text("#version: 0.2\na b\n")
    found = tmp_path / "models--b--sd" / "snapshots" / "1" / "tokenizer"
    shutil.copytree(tiny_folder / "tokenizer", found)
    config = found / "tokenizer_config.json"
    config.write_text(
        config.read_text().replace('"pad_token": "<|endoftext|>"', '"pad_token": "!"')
    )
    assert '"!"' in config.read_text()
    words = load_base(str(tiny_file), offline=True).tokenizer
    assert words.get_vocab() == tiny.tokenizer().get_vocab()
    assert words.pad_token_id == len(words) - 1
    with pytest.raises(TrainProblem, match="is no tokenizer of this model"):
        load_base(str(tiny_file), tokenizer=other)


def test_a_tokenizer_as_newer_programs_save_it(
    tiny_file: Path, tiny_folder: Path, tmp_path: Path
) -> None:
    tiny.tokenizer().save_pretrained(tmp_path)
    assert not (tmp_path / "vocab.json").exists()
    for place in (tmp_path, tiny_folder / "tokenizer"):
        base = load_base(str(tiny_file), tokenizer=place, offline=True)
        assert base.tokenizer.get_vocab() == tiny.tokenizer().get_vocab()
    # A word more than the text encoder knows; no vocabulary at all.
    more = tiny.tokenizer()
    more.add_tokens(["zzz"])
    more.save_pretrained(tmp_path / "more")
    (tmp_path / "none").mkdir()
    (tmp_path / "none" / "tokenizer.json").write_text('{"model": {"vocab": []}}')
    for place in (tmp_path / "more", tmp_path / "none"):
        with pytest.raises(TrainProblem, match="is no tokenizer of this model"):
            load_base(str(tiny_file), tokenizer=place)


def test_no_tokenizer(tiny_file: Path, tmp_path: Path) -> None:
    for offline in (True, False):
        with pytest.raises(TrainProblem, match=r"model\.safetensors brings no tok.*--tokenizer"):
            load_base(str(tiny_file), offline=offline)
    short = tmp_path / "merges.txt.gz"
    short.write_bytes(gzip.compress(b"#version: 0.2\na b"))
    for given in (tmp_path, tmp_path / "nowhere", tiny_file, short):
        with pytest.raises(TrainProblem, match="is no tokenizer of this model: a folder is exp"):
            load_base(str(tiny_file), tokenizer=given)


# ---------------------------------------------------------------------------- rare words


def test_rare_words() -> None:
    words = tiny.tokenizer()
    drawn = [rare_word(words, seed) for seed in range(40)]
    assert drawn == [rare_word(words, seed) for seed in range(40)]
    assert len(set(drawn)) > 20 and set(drawn) <= set(tiny.RARE)
    for word in drawn:
        # Start, one token, end.
        assert len(words(f"{word}").input_ids) == 3
    assert rare_word(words, 0, {drawn[0]}) != drawn[0]
    every = set(tiny.RARE)
    made = [rare_word(words, seed, every) for seed in range(5)]
    assert len(set(made)) == 5 and not every & set(made)
    assert all(len(word) == 5 and word.isalpha() for word in made)
