"""CSD, the style descriptor of images: from its published checkpoint to a model.

Somepalli et al., Measuring Style Similarity in Diffusion Models, arXiv 2404.01292: the image tower
of OpenAI's CLIP ViT-L/14, trained on by style, with its projection taken off and two heads in its
place; the descriptor is the style head's output at unit length. The checkpoint
(``tomg-group-umd/CSD-ViT-L``, ``pytorch_model.bin``) is that of a training run: the weights lie
under ``model_state_dict`` beside the optimiser's state, every name begins with ``module.``; inside,
``backbone.`` with the names of OpenAI's CLIP, ``last_layer_style`` and ``last_layer_content``
(width × d, applied as x·W, without bias).
"""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafind.bases.problem import BasisProblem

if TYPE_CHECKING:
    import torch

#: Files that hold PyTorch pickles; they are read with ``weights_only=True``.
PICKLES = (".pt", ".pth", ".bin")
STYLE_HEAD = "last_layer_style"
#: OpenAI's CLIP makes heads of 64 numbers whatever the width; no tensor tells their number.
HEAD = 64

#: Names outside of the blocks: OpenAI's → those of transformers.
_OUTSIDE = {
    "class_embedding": "vision_model.embeddings.class_embedding",
    "positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "conv1.weight": "vision_model.embeddings.patch_embedding.weight",
    "ln_pre.weight": "vision_model.pre_layrnorm.weight",
    "ln_pre.bias": "vision_model.pre_layrnorm.bias",
    "ln_post.weight": "vision_model.post_layernorm.weight",
    "ln_post.bias": "vision_model.post_layernorm.bias",
}
#: Parts of a block.
_INSIDE = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
    "attn.out_proj": "self_attn.out_proj",
}
_BLOCKS = "transformer.resblocks."
#: What the pickle of a training run holds beside tensors: its arguments and NumPy scalars.
_BESIDE = (
    "argparse.Namespace",
    "numpy.dtype",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
)


class _Ignored:
    """Stands for what is not needed of a pickle: it takes any arguments and keeps none."""

    def __init__(self, *given: object) -> None:
        """Nothing."""

    def __setstate__(self, state: object) -> None:
        """Nothing."""


def load_csd(path: Path) -> Any:
    """A checkpoint → ``CLIPVisionModelWithProjection``, float32, on the CPU.

    Its projection is the style head; ``image_embeds`` at unit length is the descriptor. Raises
    BasisProblem where the file cannot be read or is no CSD checkpoint.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    weights = read_weights(path)
    tower = {n[9:]: t for n, t in weights.items() if n.startswith("backbone.")}
    try:
        style = weights[STYLE_HEAD]
        width = tower["class_embedding"].shape[0]
        patch = tower["conv1.weight"].shape[-1]
        cells = tower["positional_embedding"].shape[0] - 1
        blocks = {n[len(_BLOCKS) :].partition(".")[0] for n in tower if n.startswith(_BLOCKS)}
        config = CLIPVisionConfig(
            hidden_size=width,
            intermediate_size=tower[f"{_BLOCKS}0.mlp.c_fc.weight"].shape[0],
            projection_dim=style.shape[1],
            num_hidden_layers=len(blocks),
            num_attention_heads=max(width // HEAD, 1),
            image_size=patch * round(cells**0.5),
            patch_size=patch,
            hidden_act="quick_gelu",
            layer_norm_eps=1e-5,
        )
        model = CLIPVisionModelWithProjection(config)
        model.load_state_dict(_renamed(tower) | {"visual_projection.weight": style.T})
    except (KeyError, IndexError, RuntimeError, ValueError) as error:
        said = " ".join(str(error).split())[:200]
        raise BasisProblem(
            f"{path} is no CSD checkpoint: CLIP's image tower and {STYLE_HEAD} are expected "
            f"({said})."
        ) from error
    return model.float()


def read_weights(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, without the prefix of data-parallel training."""
    held: Any = _unpickled(path) if path.suffix.lower() in PICKLES else _safe(path)
    for key in ("model_state_dict", "state_dict"):
        if isinstance(held, Mapping) and key in held:
            held = held[key]
    if not isinstance(held, Mapping):
        raise BasisProblem(f"{path} is no CSD checkpoint: it holds no table of weights.")
    return {str(name).removeprefix("module."): tensor for name, tensor in held.items()}


def _safe(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise BasisProblem(f"{path} cannot be read as safetensors: {error}.") from error


def _unpickled(path: Path) -> Any:
    import torch

    try:
        # mmap leaves the optimiser's state, two thirds of the file, on the disk.
        with torch.serialization.safe_globals([(_Ignored, name) for name in _BESIDE]):
            return torch.load(
                path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path)
            )
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        said = "it is damaged"
        if isinstance(error, pickle.UnpicklingError):
            said = "it is damaged, or holds more than weights"
        elif isinstance(error, OSError):
            said = error.strerror or str(error)
        raise BasisProblem(f"{path} cannot be read as a PyTorch checkpoint: {said}.") from error


def _renamed(tower: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names of OpenAI's CLIP → those of transformers; queries, keys and values taken apart."""
    out = {}
    for name, tensor in tower.items():
        if name in _OUTSIDE:
            out[_OUTSIDE[name]] = tensor
            continue
        block, _, part = name.removeprefix(_BLOCKS).partition(".")
        here = f"vision_model.encoder.layers.{block}."
        part, _, kind = part.rpartition(".")
        if kind.startswith("in_proj_"):
            for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                out[f"{here}self_attn.{letter}_proj.{kind[8:]}"] = piece
        elif part in _INSIDE:
            out[f"{here}{_INSIDE[part]}.{kind}"] = tensor
        else:
            raise KeyError(f"unknown tensor {name}")
    return out
