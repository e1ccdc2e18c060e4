"""Image encoders, the rivals of a LoRA's weights: CLIP, DINO, DINOv2 and CSD.

What is taken as the feature of an image (float32, one row per image):

- ``clip``: the image embedding in the space that CLIP shares with text (Radford et al., arXiv
  2103.00020), as ``CLIPModel.get_image_features`` gives it;
- ``dino``: the class token after the last normalisation (Caron et al., arXiv 2104.14294);
- ``dinov2``: the same (Oquab et al., arXiv 2304.07193);
- ``csd``: the style descriptor, at unit length (Somepalli et al., arXiv 2404.01292).

The others are not brought to unit length. An encoder is written ``NAME`` for the published model or
``NAME=SOURCE``, where the source is a folder (for CSD a file too) or a name on the Hub,
``owner/name`` or ``owner/name@revision``. Images are prepared as the model's own
``preprocessor_config.json`` says; where it has none, by :class:`Plain`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafind.bases.problem import BasisProblem
from lorafind.evaluation.csd import PICKLES, load_csd

if TYPE_CHECKING:
    from PIL.Image import Image

#: Raised when the meaning of a feature changes, so that no stored one is taken for it.
VERSION = 1
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
PREPROCESSOR = "preprocessor_config.json"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")
_CLIP_MEAN, _CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
_IMAGENET_MEAN, _IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Prepare = Callable[["Image"], np.ndarray]


@dataclass(frozen=True)
class Kind:
    """What is known of a kind of encoder.

    hub: the published model; models: the ``model_type`` values that its config may have; border:
    shorter side after resizing ÷ side of the crop, largest: side of the largest crop, and mean and
    std per channel, for models without a preprocessor config.
    """

    hub: str
    models: tuple[str, ...]
    border: float
    mean: tuple[float, ...]
    std: tuple[float, ...]
    largest: int = 10_000


#: Border, mean and std are those of the authors' own evaluation.
KINDS = {
    "clip": Kind(
        "openai/clip-vit-large-patch14", ("clip", "clip_vision_model"), 1.0, _CLIP_MEAN, _CLIP_STD
    ),
    "dino": Kind("facebook/dino-vitb16", ("vit",), 256 / 224, _IMAGENET_MEAN, _IMAGENET_STD),
    # The positions of DINOv2 are stored for 518 pixels, its evaluation is at 224.
    "dinov2": Kind(
        "facebook/dinov2-base", ("dinov2",), 256 / 224, _IMAGENET_MEAN, _IMAGENET_STD, largest=224
    ),
    "csd": Kind("tomg-group-umd/CSD-ViT-L", (), 1.0, _CLIP_MEAN, _CLIP_STD),
}


@dataclass(frozen=True)
class Plain:
    """Shorter side to ``edge`` (bicubic), the middle ``crop`` × ``crop``, then (x/255 − mean)/std.

    Rounding of sides and of the crop's place as in torchvision, which the models were trained with.
    """

    edge: int
    crop: int
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, image: Image) -> np.ndarray:
        """An RGB image → 3 × crop × crop float32."""
        from PIL.Image import Resampling

        width, height = image.size
        shorter = min(width, height)
        size = (self.edge * width // shorter, self.edge * height // shorter)
        left, top = (round((side - self.crop) / 2) for side in size)
        image = image.resize(size, Resampling.BICUBIC)
        image = image.crop((left, top, left + self.crop, top + self.crop))
        mean, std = np.array([self.mean, self.std], np.float32)
        pixels = (np.asarray(image, np.float32) / np.float32(255) - mean) / std
        return np.ascontiguousarray(pixels.transpose(2, 0, 1))


@dataclass
class Encoder:
    """An image encoder; its weights are read (or fetched) when the first image comes.

    name: of :data:`KINDS`; source: the folder or file, or the repository with its commit;
    identity: hex digest of what its features are a function of (for local files their names, sizes
    and times, for the Hub the commit); device: as in :func:`lorafind.signatures.device.choose`.
    """

    name: str
    source: str
    identity: str
    device: str
    _files: Callable[[], tuple[Path, Path | None]] = field(repr=False)

    def load(self) -> None:
        """Read (or fetch) the weights now; not safe from several threads at once.

        Raises BasisProblem where they cannot be had or are no such model, ValueError where the
        device is not there.
        """
        _ = self._loaded

    def prepare(self, image: Image) -> np.ndarray:
        """An RGB image → the numbers that the model takes, 3 × height × width float32."""
        return self._loaded[1](image)

    def encode(self, prepared: Sequence[np.ndarray]) -> np.ndarray:
        """Prepared images, n of them at once → features, n × D float32.

        Raises BasisProblem where the model gives something that is no number.
        """
        import torch

        model, device = self._loaded[0], self._where
        with torch.inference_mode():
            given = model(pixel_values=torch.from_numpy(np.stack(prepared)).to(device))
            if self.name in ("dino", "dinov2"):
                out = given.last_hidden_state[:, 0]
            else:
                out = given.image_embeds
            if self.name == "csd":
                out = torch.nn.functional.normalize(out, dim=1)
            rows = out.float().cpu().numpy()
        if not np.isfinite(rows).all():
            raise BasisProblem(f"{self.source} gives features that are no numbers.")
        return np.ascontiguousarray(rows)

    @cached_property
    def _where(self) -> Any:
        from lorafind.signatures.device import choose

        return choose(self.device)

    @cached_property
    def _loaded(self) -> tuple[Any, Prepare]:
        where = self._where
        weights, preprocessor = self._files()
        with _quiet():
            if self.name == "csd":
                model = load_csd(weights)
            else:
                model = _load_transformers(self.name, weights)
            prepare = _preparation(KINDS[self.name], model.config, preprocessor)
        return model.to(where).eval(), prepare


def open_encoder(spec: str, device: str = "cpu") -> Encoder:
    """``NAME`` or ``NAME=SOURCE`` → an encoder; see the top of this module.

    Raises BasisProblem where the name is unknown, the source is neither here nor on the Hub, or
    the extra ``images`` is not installed.
    """
    name, _, source = spec.partition("=")
    if name not in KINDS:
        raise BasisProblem(
            f"{spec} is no image encoder: choose one of {', '.join(KINDS)}, or name a model of "
            "such a kind, as in clip=FOLDER or clip=owner/name."
        )
    _need_extra()
    source = source or KINDS[name].hub
    path = Path(source).expanduser()
    if path.exists():
        return _local(name, path, device)
    if _HUB_NAME.fullmatch(source.removeprefix("hf:")):
        return _from_hub(name, source.removeprefix("hf:"), device)
    raise BasisProblem(f"{source} is neither a folder nor a name on the Hub (owner/name).")


def _need_extra() -> None:
    try:
        import PIL.Image  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as error:
        raise BasisProblem(
            "Image features need Pillow and transformers: pip install 'lorafind[images]'."
        ) from error


def _local(name: str, path: Path, device: str) -> Encoder:
    path = path.resolve()
    if name == "csd":
        weights = path if path.is_file() else _csd_weights(path)
    elif not (path / "config.json").is_file():
        raise BasisProblem(
            f"{path} holds no model for {name}: a folder with config.json and weights is expected, "
            "as transformers saves it."
        )
    else:
        weights = path
    beside = path if path.is_dir() else path.parent
    preprocessor = beside / PREPROCESSOR if (beside / PREPROCESSOR).is_file() else None
    facts = []
    for one in [weights, preprocessor] if weights.is_file() else sorted(beside.iterdir()):
        if one is not None and one.suffix.lower() in (".json", ".safetensors", *PICKLES):
            state = one.stat()
            facts.append((one.name, state.st_size, state.st_mtime_ns))
    identity = _digest(name, str(path), facts)
    return Encoder(name, str(path), identity, device, lambda: (weights, preprocessor))


def _csd_weights(folder: Path) -> Path:
    """The checkpoint in a folder: by its usual name, or the only one."""
    usual = [folder / file for file in WEIGHTS if (folder / file).is_file()]
    found = usual or [p for p in folder.iterdir() if p.suffix in (".safetensors", *PICKLES)]
    if not usual and len(found) != 1:
        raise BasisProblem(
            f"{folder} holds {len(found) or 'no'} files that may be CSD's checkpoint: name the "
            "file, as in csd=FILE."
        )
    return found[0]


def _from_hub(name: str, source: str, device: str) -> Encoder:
    repository, _, revision = source.partition("@")
    config = _fetch(repository, "config.json", revision or "main")
    if config is None:
        raise BasisProblem(
            f"{repository} on the Hub is no model for {name}: it has no config.json."
        )
    # The cache of the Hub: …/snapshots/<commit>/config.json.
    commit = config.parent.name

    def files() -> tuple[Path, Path | None]:
        preprocessor = _fetch(repository, PREPROCESSOR, commit)
        weights = next((p for f in WEIGHTS if (p := _fetch(repository, f, commit))), None)
        if weights is None:
            raise BasisProblem(f"{repository} on the Hub has neither {' nor '.join(WEIGHTS)}.")
        return (weights if name == "csd" else weights.parent), preprocessor

    return Encoder(name, f"{repository}@{commit}", _digest(name, repository, commit), device, files)


def _fetch(repository: str, file: str, revision: str) -> Path | None:
    """A file of the Hub, from its cache where it is there; None where the repository lacks it."""
    from huggingface_hub import _CACHED_NO_EXIST, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
    )

    try:
        if try_to_load_from_cache(repository, file, revision=revision) is _CACHED_NO_EXIST:
            return None
        return Path(hf_hub_download(repository, file, revision=revision))
    except (EntryNotFoundError, HfHubHTTPError, HFValidationError) as error:
        # "Local": neither in the cache nor to be reached; nothing is known of the repository.
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise BasisProblem(
            f"{repository} is no folder here, and {file} cannot be had from the Hub: {said}."
        ) from error


def _load_transformers(name: str, folder: Path) -> Any:
    import torch
    import transformers
    from safetensors import SafetensorError

    try:
        config = transformers.AutoConfig.from_pretrained(folder)
        if config.model_type not in KINDS[name].models:
            raise BasisProblem(
                f"{folder} holds a model of type {config.model_type}; {name} needs "
                f"{' or '.join(KINDS[name].models)}."
            )
        extra: dict[str, Any] = {}
        model_class: Any
        if name == "clip":
            model_class = transformers.CLIPVisionModelWithProjection
            if config.model_type == "clip":
                # The tower's own config may have kept its default where the whole model's counts.
                width, config = config.projection_dim, config.vision_config
                config.projection_dim = width
        elif name == "dino":
            # Its pooler is not part of DINO.
            model_class, extra = transformers.ViTModel, {"add_pooling_layer": False}
        else:
            model_class = transformers.Dinov2Model
        model, report = model_class.from_pretrained(
            folder, config=config, dtype=torch.float32, output_loading_info=True, **extra
        )
    except (
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        pickle.UnpicklingError,
        SafetensorError,
    ) as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise BasisProblem(f"{folder} cannot be read as a model for {name}: {said}.") from error
    if report["missing_keys"]:
        raise BasisProblem(
            f"{folder} lacks weights for {name}: {sorted(report['missing_keys'])[0]} and "
            f"{len(report['missing_keys']) - 1} more."
        )
    return model


def _preparation(kind: Kind, config: Any, preprocessor: Path | None) -> Prepare:
    """How images are made ready: as the model's config says, or plainly."""
    if preprocessor is None:
        stored = config.image_size
        crop = min(stored if isinstance(stored, int) else stored[0], kind.largest)
        return Plain(round(crop * kind.border), crop, kind.mean, kind.std)

    from transformers import AutoImageProcessor

    try:
        # One backend, so that features do not depend on whether torchvision is installed.
        processor = AutoImageProcessor.from_pretrained(preprocessor.parent, backend="pil")
    except (OSError, ValueError, KeyError) as error:
        said = str(error).strip().partition("\n")[0].rstrip(".")
        raise BasisProblem(f"{preprocessor} cannot be used to prepare images: {said}.") from error

    def prepare(image: Image) -> np.ndarray:
        pixels = processor(images=image, return_tensors="np")["pixel_values"][0]
        return np.ascontiguousarray(pixels, np.float32)

    return prepare


@contextmanager
def _quiet() -> Iterator[None]:
    """transformers without its report on every load."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _digest(*facts: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, *facts]).encode()).hexdigest()
