"""CSD's checkpoint against its definition written out."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.encoders import Plain, open_encoder

SIDE, PATCH, WIDTH, WIDE, BLOCKS = 32, 8, 128, 96, 2
NORMAL = Plain(
    SIDE, SIDE, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
)


def pictures(n: int) -> list[Image.Image]:
    rng = np.random.default_rng(0)
    blocks = [Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8)) for _ in range(n)]
    return [one.resize((45 + 4 * i, 38)) for i, one in enumerate(blocks)]


def csd_weights() -> dict[str, torch.Tensor]:
    """A random tower under the names of OpenAI's CLIP, and CSD's two heads."""
    torch.manual_seed(1)
    width, wide = WIDTH, WIDE
    cells = (SIDE // PATCH) ** 2
    shapes: dict[str, tuple[int, ...]] = {
        "class_embedding": (width,),
        "positional_embedding": (cells + 1, width),
        "conv1.weight": (width, 3, PATCH, PATCH),
    }
    norms = ["ln_pre", "ln_post"]
    for i in range(BLOCKS):
        block = f"transformer.resblocks.{i}."
        norms += [f"{block}ln_1", f"{block}ln_2"]
        shapes |= {
            f"{block}attn.in_proj_weight": (3 * width, width),
            f"{block}attn.in_proj_bias": (3 * width,),
            f"{block}attn.out_proj.weight": (width, width),
            f"{block}attn.out_proj.bias": (width,),
            f"{block}mlp.c_fc.weight": (wide, width),
            f"{block}mlp.c_fc.bias": (wide,),
            f"{block}mlp.c_proj.weight": (width, wide),
            f"{block}mlp.c_proj.bias": (width,),
        }
    weights = {f"backbone.{n}": 0.2 * torch.randn(s) for n, s in shapes.items()}
    for norm in norms:
        weights[f"backbone.{norm}.weight"] = 1 + 0.2 * torch.randn(width)
        weights[f"backbone.{norm}.bias"] = 0.2 * torch.randn(width)
    for head in ("style", "content"):
        weights[f"last_layer_{head}"] = torch.randn(width, 24)
    return weights


def csd_by_hand(w: dict[str, torch.Tensor], x: torch.Tensor) -> np.ndarray:
    """The descriptor from its definition: CLIP's image tower, then the style head, unit length."""

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        scale, shift = w[f"backbone.{name}.weight"], w[f"backbone.{name}.bias"]
        x = x - x.mean(-1, keepdim=True)
        return x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * scale + shift

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ w[f"{name}weight"].T + w[f"{name}bias"]

    n, width = len(x), WIDTH
    cells = torch.nn.functional.conv2d(x, w["backbone.conv1.weight"], stride=PATCH)
    first = w["backbone.class_embedding"].expand(n, 1, width)
    x = torch.cat([first, cells.flatten(2).transpose(1, 2)], 1)
    x = norm(x + w["backbone.positional_embedding"], "ln_pre")
    for i in range(BLOCKS):
        block = f"transformer.resblocks.{i}."
        q, k, v = linear(norm(x, f"{block}ln_1"), f"backbone.{block}attn.in_proj_").chunk(3, -1)
        heads = [t.reshape(n, -1, width // 64, 64).transpose(1, 2) for t in (q, k, v)]
        mixed = (heads[0] @ heads[1].transpose(2, 3) / 8).softmax(-1) @ heads[2]
        mixed = mixed.transpose(1, 2).reshape(n, -1, width)
        x = x + linear(mixed, f"backbone.{block}attn.out_proj.")
        inner = linear(norm(x, f"{block}ln_2"), f"backbone.{block}mlp.c_fc.")
        x = x + linear(inner * (1.702 * inner).sigmoid(), f"backbone.{block}mlp.c_proj.")
    style = norm(x[:, 0], "ln_post") @ w["last_layer_style"]
    return np.asarray(style / style.norm(dim=1, keepdim=True))


def training_checkpoint(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    """As the published file: the weights of a data-parallel run beside the state of training."""
    return {
        "model_state_dict": {f"module.{name}": t for name, t in weights.items()},
        "opt_bb": {"state": {0: torch.zeros(3)}, "param_groups": [{"lr": np.float64(1e-3)}]},
        "iter": np.int64(80000),
        "args": argparse.Namespace(arch="vit_large", lr=1e-3, scale=np.float32(2)),
    }


CSD_FORMS: dict[str, Callable[[dict[str, torch.Tensor], Path], Any]] = {
    "pytorch_model.bin": lambda weights, path: torch.save(training_checkpoint(weights), path),
    "old.pth": lambda weights, path: torch.save(
        training_checkpoint(weights), path, _use_new_zipfile_serialization=False
    ),
    "style.pt": lambda weights, path: torch.save(weights, path),
    "model.safetensors": lambda weights, path: save_file(weights, path),
}


@pytest.mark.parametrize("form", CSD_FORMS)
def test_csd_is_its_definition_in_every_form_of_file(tmp_path: Path, form: str) -> None:
    weights = csd_weights()
    CSD_FORMS[form](weights, tmp_path / form)
    given = pictures(3)
    expected = csd_by_hand(weights, torch.from_numpy(np.stack([NORMAL(one) for one in given])))
    for source in (tmp_path, tmp_path / form):
        encoder = open_encoder(f"csd={source}")
        got = encoder.encode([encoder.prepare(one) for one in given])
        assert got.shape == (3, 24) and got.dtype == np.float32
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(got, axis=1), 1, atol=1e-5)
    # Different images, different descriptors: else the comparison above would mean little.
    assert (got @ got.T)[np.triu_indices(3, 1)].max() < 0.99


def test_a_pickle_runs_no_code(tmp_path: Path) -> None:
    class Trap:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "sprung"),)

    torch.save(training_checkpoint(csd_weights()) | {"trap": Trap()}, tmp_path / "bad.pt")
    with pytest.raises(BasisProblem, match=r"bad\.pt cannot be read as .* holds more than weights"):
        open_encoder(f"csd={tmp_path / 'bad.pt'}").load()
    assert not (tmp_path / "sprung").exists()


def test_what_is_no_csd_checkpoint_is_refused(tmp_path: Path) -> None:
    weights = csd_weights()
    without = {n: t for n, t in weights.items() if n != "last_layer_style"}
    short = {n: t for n, t in weights.items() if "resblocks.1.mlp.c_fc" not in n}
    surplus = weights | {"backbone.proj": torch.zeros(4)}
    for i, wrong in enumerate((without, short, surplus)):
        path = tmp_path / f"{i}.safetensors"
        save_file(wrong, path)
        with pytest.raises(BasisProblem, match=f"{i}.safetensors is no CSD checkpoint"):
            open_encoder(f"csd={path}").load()
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(BasisProblem, match="holds no table of weights"):
        open_encoder(f"csd={tmp_path / 'list.pt'}").load()
    (tmp_path / "text.safetensors").write_text("<html>")
    with pytest.raises(BasisProblem, match="cannot be read as safetensors"):
        open_encoder(f"csd={tmp_path / 'text.safetensors'}").load()
    (tmp_path / "cut.bin").write_bytes((tmp_path / "list.pt").read_bytes()[:300])
    with pytest.raises(BasisProblem, match=r"cut\.bin cannot be read .* it is damaged"):
        open_encoder(f"csd={tmp_path / 'cut.bin'}").load()
    with pytest.raises(BasisProblem, match="6 files that may be CSD's checkpoint"):
        open_encoder(f"csd={tmp_path}")


def test_weights_that_give_no_numbers_are_refused(tmp_path: Path) -> None:
    weights = csd_weights()
    weights["last_layer_style"][0, 0] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    encoder = open_encoder(f"csd={tmp_path}")
    with pytest.raises(BasisProblem, match="features that are no numbers"):
        encoder.encode([NORMAL(one) for one in pictures(1)])
