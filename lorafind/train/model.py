"""The base model: where it comes from, what it must be, and which of its layers are trained.

Three sources: a folder in diffusers' layout, one file in the layout of the original code
(``singlefile.py``), and the Hub, which gives such a folder. Only safetensors files are opened.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorafind.bases.problem import BasisProblem
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.safetensors import read_header
from lorafind.formats.names.places import place
from lorafind.hub.address import Address
from lorafind.train.problem import TrainProblem

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PREDICTIONS = ("epsilon", "v_prediction")
#: What a diffusers folder must have: part → its weights without the ending, empty for none.
PARTS = {
    "unet": "diffusion_pytorch_model",
    "vae": "diffusion_pytorch_model",
    "text_encoder": "model",
    "scheduler": "",
}
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_ENDINGS = (".safetensors", ".fp16.safetensors")
#: Words in the name of a pipeline's class → what it is.
_PIPELINES = {
    "XL": "an SDXL model",
    "Inpaint": "an inpainting model",
    "InstructPix2Pix": "an InstructPix2Pix model",
    "Depth2Img": "a depth-to-image model",
    "StableDiffusion3": "a Stable Diffusion 3 model",
    "Flux": "a Flux model",
}
#: What is trained on, for sentences that say that something else is not.
WANTED = "training needs a text-to-image model of Stable Diffusion 1.5's kind"


@dataclass
class Base:
    """A base model, frozen, in evaluation mode, on one device.

    unet (UNet2DConditionModel): in the dtype of the precision; vae (AutoencoderKL), text_encoder
    (CLIPTextModel): float32 whatever the precision, None once they were dropped; tokenizer
    (CLIPTokenizer); scheduler (DDPMScheduler): the noise schedule of the training; name: as asked
    for; sha256: hex, of the checkpoint file, or of the U-Net's weights file in a folder;
    prediction_type: of PREDICTIONS.
    """

    unet: Any
    vae: Any
    text_encoder: Any
    tokenizer: Any
    scheduler: Any
    name: str
    sha256: str
    prediction_type: str

    @property
    def device(self) -> torch.device:
        """Where the U-Net is."""
        found: torch.device = self.unet.device
        return found

    def drop_encoders(self) -> None:
        """Free the memory of VAE and text encoder: what they say is in the cache by now."""
        self.vae = self.text_encoder = None


def load_base(
    name: str,
    precision: str = "fp32",
    device: str | torch.device = "cpu",
    offline: bool = False,
    tokenizer: Path | None = None,
) -> Base:
    """Load a base model.

    name: a diffusers folder, a .safetensors checkpoint in the original layout, or
    ``owner/name[@revision]`` on the Hub; precision: of DTYPES, for the U-Net; offline: take from
    the Hub's cache alone; tokenizer: see :func:`lorafind.train.tokenizer.find_tokenizer`, for
    models that bring none.

    Raises TrainProblem where there is no such model, or where it is another kind of model;
    ModuleNotFoundError where the extra ``train`` is not installed.
    """
    # Without it diffusers fills missing weights at random.
    importlib.import_module("accelerate")

    path = Path(name).expanduser()
    if path.is_file():
        from lorafind.train.singlefile import load_single

        base = load_single(path, DTYPES[precision], offline, tokenizer)
    elif path.is_dir():
        base = _from_folder(path, DTYPES[precision], offline, tokenizer)
    elif _HUB_NAME.fullmatch(name.removeprefix("hf:")):
        folder = _from_the_hub(name, offline)
        base = _from_folder(folder, DTYPES[precision], offline, tokenizer, said=name)
    else:
        raise TrainProblem(
            f"{name} is no file or folder here, and no name on the Hub (owner/name): name a "
            "diffusers folder, a .safetensors checkpoint, or a model on the Hub."
        )
    base.name = name
    for part in (base.unet, base.vae, base.text_encoder):
        _settle(part.requires_grad_(False).eval(), torch.device(device))
    return base


def lora_layers(unet: torch.nn.Module, groups: Sequence[str]) -> list[str]:
    """The names of the linear layers of some groups, in the order of the network's modules.

    groups: ``self_attn``, ``cross_attn``, ``ff``, as the index calls them. SD1.5 has 64, 64 and 32.
    Raises TrainProblem where there are none.
    """
    found = [
        name
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and place(f"unet/{name}").group in groups
    ]
    if not found:
        raise TrainProblem(f"The U-Net has no linear layers in {', '.join(groups)}.")
    return found


def _settle(part: torch.nn.Module, device: torch.device) -> None:
    """Move to a device, out of the file's pages: whatever happens to the file, the weights stay,
    and sums do not hang on where in the file a tensor begins."""
    for tensor in (*part.parameters(), *part.buffers()):
        tensor.data = tensor.data.to(device, copy=True)


# ---------------------------------------------------------------------------- folders


def _from_folder(
    folder: Path,
    dtype: torch.dtype,
    offline: bool,
    tokenizer: Path | None,
    said: str = "",
) -> Base:
    """said: what the folder is called in sentences, where its path says nothing to the user."""
    from diffusers import AutoencoderKL, DDPMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel

    from lorafind.train.tokenizer import find_tokenizer

    said = said or str(folder)
    _check_folder(folder, said)
    variant = {part: _variant(folder, part, said) for part, file in PARTS.items() if file}
    weights = _weights(folder, "unet", variant["unet"])
    with quiet(), explained(said):
        unet = _whole(UNet2DConditionModel, folder, "unet", variant, torch_dtype=dtype)
        vae = _whole(AutoencoderKL, folder, "vae", variant, torch_dtype=torch.float32)
        text = _whole(CLIPTextModel, folder, "text_encoder", variant, dtype=torch.float32)
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    width = text.config.hidden_size
    if width != unet.config.cross_attention_dim:
        raise TrainProblem(
            f"{said} cannot be used: its text encoder gives {width} numbers per word, its U-Net "
            f"wants {unet.config.cross_attention_dim}."
        )
    prediction = scheduler.config.prediction_type
    if prediction not in PREDICTIONS:
        raise TrainProblem(
            f"{said} predicts {prediction!r}; models that predict {' or '.join(PREDICTIONS)} can "
            "be trained on."
        )
    own = folder / "tokenizer"
    words = find_tokenizer(
        tokenizer or (own if own.is_dir() else None), folder, text.config.vocab_size, offline
    )
    return Base(unet, vae, text, words, scheduler, said, sha256(weights), prediction)


def _whole(
    kind: Any, folder: Path, part: str, variant: Mapping[str, str | None], **dtype: torch.dtype
) -> Any:
    """A part with all its weights; what its file lacks would be filled at random."""
    place = {"subfolder": part, "variant": variant[part]}
    found, report = kind.from_pretrained(
        folder,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **place,
        **dtype,
    )
    if missing := sorted(report["missing_keys"]):
        raise ValueError(f"the weights in {part} lack {missing[0]} and {len(missing) - 1} more")
    return found


def _check_folder(folder: Path, said: str) -> None:
    """Refuse, by its configurations, what is no complete Stable Diffusion 1.x."""
    if (folder / "adapter_config.json").is_file():
        raise TrainProblem(f"{said} is a LoRA, not a base model: name the model it was made for.")
    if not (folder / "unet").is_dir():
        index = _json(folder / "model_index.json", said) if _has_index(folder) else {}
        if kind := _pipeline(str(index.get("_class_name", ""))):
            raise TrainProblem(f"{said} is {kind}; {WANTED}.")
        files = sorted(p.name for p in folder.glob("*.safetensors"))
        more = f"; name a file in it, such as {files[0]}" if files else ""
        raise TrainProblem(f"{said} is no diffusers folder: it has no unet in it{more}.")
    if _has_index(folder):
        name = str(_json(folder / "model_index.json", said).get("_class_name", ""))
        if kind := _pipeline(name):
            raise TrainProblem(f"{said} is {kind} ({name}); {WANTED}.")
    config = _json(folder / "unet" / "config.json", said)
    if kind := _unet_kind(config):
        raise TrainProblem(f"{said} is {kind}; {WANTED}.")
    missing = [part for part in PARTS if not (folder / part).is_dir()]
    if missing:
        raise TrainProblem(
            f"{said} is not complete: it has no {' and no '.join(missing)}; download it again."
        )


def _has_index(folder: Path) -> bool:
    return (folder / "model_index.json").is_file()


def _pipeline(name: str) -> str:
    return next((what for word, what in _PIPELINES.items() if word in name), "")


def _unet_kind(config: Mapping[str, Any]) -> str:
    """What a U-Net is that is not of Stable Diffusion 1.x; empty for one that is."""
    channels, context = config.get("in_channels", 4), config.get("cross_attention_dim")
    if config.get("addition_embed_type") == "text_time":
        return "an SDXL refiner" if context == 1280 else "an SDXL model"
    return unet_kind(channels, context if isinstance(context, int) else 0)


def unet_kind(channels: int, context: int) -> str:
    """What a U-Net is that is not of Stable Diffusion 1.x; empty for one that is.

    channels: that go into it; context: width of its prompt's vectors.
    """
    if context == 2048:
        return "an SDXL model"
    if context == 1280:
        return "an SDXL refiner"
    known = {9: "an inpainting model", 8: "an InstructPix2Pix model", 5: "a depth-to-image model"}
    if channels != 4:
        return known.get(channels, f"a model with {channels} input channels")
    if context == 1024:
        return "a Stable Diffusion 2 model"
    return ""


def _variant(folder: Path, part: str, said: str) -> str | None:
    """None for the usual weights, ``fp16`` where a folder has only these."""
    for ending in _ENDINGS:
        for path in sorted((folder / part).glob(f"{PARTS[part]}*{ending}")):
            if ending == ".safetensors" and path.name.endswith(".fp16.safetensors"):
                continue
            header(path)
            return None if ending == ".safetensors" else "fp16"
    raise TrainProblem(
        f"{said} has no weights of its {part} as safetensors; other files are not opened, since "
        "they can hold programs. Convert the model, or take a copy with safetensors files."
    )


def _weights(folder: Path, part: str, variant: str | None) -> list[Path]:
    ending = _ENDINGS[0] if variant is None else _ENDINGS[1]
    return [
        path
        for path in sorted((folder / part).glob(f"{PARTS[part]}*{ending}"))
        if variant or not path.name.endswith(_ENDINGS[1])
    ]


def _json(path: Path, said: str) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TrainProblem(f"{said} cannot be used: {path.name} cannot be read: {error}.") from None
    return found if isinstance(found, dict) else {}


# ---------------------------------------------------------------------------- the Hub


def _from_the_hub(name: str, offline: bool) -> Path:
    """A model of the Hub as a folder in its cache; raises TrainProblem."""
    plain = ["model_index.json", "*/config.json", "scheduler/*", "tokenizer/*"]
    for ending in _ENDINGS:
        weights = [f"{part}/{file}{ending}" for part, file in PARTS.items() if file]
        folder = from_hub(name, (*plain, *weights), offline, "a folder or checkpoint (--model)")
        if (folder / weights[0]).is_file():
            break
    return folder


def from_hub(name: str, files: Sequence[str], offline: bool, instead: str) -> Path:
    """Some files of a repository as a folder in the Hub's cache.

    name: ``owner/name[@revision]``; files: patterns; instead: what the user can name, for the
    sentence that says why not. Raises TrainProblem.
    """
    from huggingface_hub import constants, get_token, snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    from lorafind.hub.client import Hub
    from lorafind.hub.problem import explained as hub_explained

    repository, _, revision = name.removeprefix("hf:").partition("@")
    fetch = partial(
        snapshot_download, repository, revision=revision or None, allow_patterns=list(files)
    )
    if offline or constants.HF_HUB_OFFLINE:
        try:
            return Path(fetch(local_files_only=True))
        except LocalEntryNotFoundError as error:
            raise TrainProblem(
                f"{name} is no folder here and not in the cache of the Hub, which is not asked "
                f"(offline): name {instead}, or run the same command again with a connection."
            ) from error
    try:
        address = Address(repository, revision)
        with hub_explained(Hub().host, address, token=get_token() is not None):
            return Path(fetch())
    except BasisProblem as error:
        raise TrainProblem(f"{name} is no folder here. {error} Or name {instead}.") from error


# ---------------------------------------------------------------------------- shared


def header(path: Path) -> dict[str, tuple[int, ...]]:
    """The shapes in a safetensors file by name; raises TrainProblem where it is broken."""
    try:
        return {name: info.shape for name, info in read_header(path).tensors.items()}
    except NotAnAdapter as error:
        raise TrainProblem(f"{path} cannot be used: {error.reason}.") from error


def sha256(paths: Sequence[Path]) -> str:
    """Of files one after the other, hex."""
    digest = hashlib.sha256()
    for path in paths:
        with path.open("rb") as file:
            while piece := file.read(2**20):
                digest.update(piece)
    return digest.hexdigest()


@contextmanager
def explained(said: str, wanted: str = "a base model") -> Iterator[None]:
    """What diffusers and transformers raise over unfit files, as a TrainProblem."""
    from safetensors import SafetensorError

    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, SafetensorError) as error:
        why = str(error).strip().partition("\n")[0].rstrip(".")
        raise TrainProblem(f"{said} cannot be read as {wanted}: {why}.") from error


@contextmanager
def quiet() -> Iterator[None]:
    """diffusers and transformers without their bars and reports."""
    from diffusers.utils import logging as ours
    from transformers.utils import logging as theirs

    levels = ours.get_verbosity(), theirs.get_verbosity()
    bars = theirs.is_progress_bar_enabled()
    ours.set_verbosity_error()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        yield
    finally:
        ours.set_verbosity(levels[0])
        theirs.set_verbosity(levels[1])
        if bars:
            theirs.enable_progress_bar()
