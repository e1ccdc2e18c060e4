"""Where encoders come from: folders, the Hub's cache, and what is said when they do not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.encoders import KINDS, open_encoder

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def dino(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import ViTConfig, ViTModel

    torch.manual_seed(0)
    shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    config = ViTConfig(**shape, num_attention_heads=2, image_size=32, patch_size=8)
    place: Path = tmp_path_factory.mktemp("model") / "dino"
    ViTModel(config).save_pretrained(place)
    return place


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the Hub, and no network."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def one_image() -> Image.Image:
    blocks = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((40, 36))


def test_nothing_heavy_is_imported_before_an_encoder_is_opened() -> None:
    code = (
        "import sys, lorafind.evaluation.images\n"
        "heavy = {'torch', 'transformers', 'PIL', 'huggingface_hub', 'sklearn'}\n"
        "print(*heavy & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize("package", ["transformers", "PIL.Image"])
def test_without_the_extra_one_sentence(
    dino: Path, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(BasisProblem, match=r"pip install 'lorafind\[images\]'"):
        open_encoder(f"dino={dino}")


def test_a_model_in_the_cache_of_the_hub_needs_no_network(dino: Path, hub_cache: Path) -> None:
    repository = hub_cache / "models--someone--dino-tiny"
    snapshot = repository / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / ".no_exist" / COMMIT).mkdir(parents=True)
    (repository / ".no_exist" / COMMIT / "preprocessor_config.json").touch()
    for file in dino.iterdir():
        (snapshot / file.name).symlink_to(file)
    local = open_encoder(f"dino={dino}")
    image = local.prepare(one_image())
    for spec in (
        "dino=someone/dino-tiny",
        "dino=hf:someone/dino-tiny",
        f"dino=someone/dino-tiny@{COMMIT}",
    ):
        encoder = open_encoder(spec)
        assert encoder.source == f"someone/dino-tiny@{COMMIT}"
        np.testing.assert_array_equal(encoder.prepare(one_image()), image)
        np.testing.assert_allclose(encoder.encode([image]), local.encode([image]), atol=1e-6)
    # While it is not known whether the model has a preprocessor config, none is made up.
    (repository / ".no_exist" / COMMIT / "preprocessor_config.json").unlink()
    with pytest.raises(BasisProblem, match=r"preprocessor_config\.json cannot be had"):
        open_encoder("dino=someone/dino-tiny").load()


def test_what_is_neither_here_nor_on_the_hub(hub_cache: Path) -> None:
    with pytest.raises(BasisProblem, match=r"^nobody/nothing is no folder here, and config\.json"):
        open_encoder("clip=nobody/nothing")
    with pytest.raises(BasisProblem, match=r"neither a folder nor a name on the Hub"):
        open_encoder("clip=/no/such/folder")
    with pytest.raises(
        BasisProblem, match=r"siglip is no image encoder: .*clip, dino, dinov2, csd"
    ):
        open_encoder("siglip")
    for name, kind in KINDS.items():
        with pytest.raises(BasisProblem, match=kind.hub):
            open_encoder(name)


def test_a_folder_that_holds_no_such_model(dino: Path, tmp_path: Path) -> None:
    with pytest.raises(BasisProblem, match=r"holds no model for clip: .*config\.json"):
        open_encoder(f"clip={tmp_path}")
    with pytest.raises(BasisProblem, match="type vit; clip needs clip or clip_vision_model"):
        open_encoder(f"clip={dino}").load()
    (tmp_path / "config.json").write_bytes((dino / "config.json").read_bytes())
    with pytest.raises(BasisProblem, match="cannot be read as a model for dino"):
        open_encoder(f"dino={tmp_path}").load()
    weights = load_file(dino / "model.safetensors")
    kept = {name: t for name, t in weights.items() if "layernorm_after" not in name}
    assert len(kept) < len(weights)
    save_file(kept, tmp_path / "model.safetensors", metadata={"format": "pt"})
    # transformers would fill these with random numbers and go on.
    with pytest.raises(BasisProblem, match=r"lacks weights for dino: .*layernorm_after.* 1 more"):
        open_encoder(f"dino={tmp_path}").load()


def test_the_identity_tells_models_apart(dino: Path, tmp_path: Path) -> None:
    same = [open_encoder(f"dino={dino}").identity for _ in range(2)]
    assert same[0] == same[1]
    for file in dino.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    copied = open_encoder(f"dino={tmp_path}").identity
    (tmp_path / "preprocessor_config.json").write_text("{}")
    assert len({same[0], copied, open_encoder(f"dino={tmp_path}").identity}) == 3


def test_a_device_that_is_not_there(dino: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    with pytest.raises(ValueError, match="no CUDA device"):
        open_encoder(f"dino={dino}", "cuda").load()
