"""Captions by BLIP (Li et al., arXiv 2201.12086), each written once.

A caption is kept in the cache, ``captions/<key>.txt``, where the key is the picture's bytes, the
model's weights and the way of searching: the same picture is described once.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lorafind.index.progress import Progress, Silent
from lorafind.train.cache import VERSION, digest, fingerprint, root, touch, write
from lorafind.train.images import Picture, decode
from lorafind.train.model import explained, from_hub, quiet
from lorafind.train.problem import TrainProblem

MODEL = "Salesforce/blip-image-captioning-base"
#: Beam search as in the authors' own demonstration; nothing in it is random.
SEARCH = {"num_beams": 3, "min_length": 5, "max_length": 30, "do_sample": False}
_FILES = ("*.json", "*.txt", "model.safetensors")


class Blip:
    """A captioner; the model is read (or fetched) when the first picture comes.

    name: a folder as transformers saves it, or a name on the Hub; device: of the model; offline:
    take from the Hub's cache alone; cache: a folder, None for :func:`lorafind.train.cache.root`.
    """

    def __init__(
        self,
        name: str = MODEL,
        device: str | torch.device = "cpu",
        offline: bool = False,
        cache: Path | None = None,
    ) -> None:
        self.name, self._device, self._offline = name, device, offline
        self._folder = (cache or root()) / "train" / "captions"

    def caption(self, pictures: Sequence[Picture], watch: Progress | None = None) -> list[str]:
        """A caption per picture, in one line; one picture is in memory at a time.

        Raises TrainProblem where the model cannot be had or says nothing of a picture.
        """
        watch = watch or Silent()
        model, images, words = self._load()
        way = [VERSION, fingerprint(model), images.to_dict(), SEARCH]
        watch.stage("Captions (BLIP)", len(pictures), 0)
        found = []
        for picture in pictures:
            file = self._folder / f"{digest(picture.digest, *way)}.txt"
            text = _known(file)
            if not text:
                text = self._describe(picture, model, images, words)
                write(file, text.encode())
            found.append(text)
            watch.advance(1, 0)
        return found

    def _describe(self, picture: Picture, model: Any, images: Any, words: Any) -> str:
        try:
            image = decode(picture.path.read_bytes())
        except (OSError, ValueError) as error:
            raise TrainProblem(f"{picture.path} cannot be read any more: {error}.") from error
        given = images(images=image, return_tensors="pt").to(self._device)
        with torch.inference_mode(), quiet():
            out = model.generate(pixel_values=given.pixel_values, **SEARCH)
        text = " ".join(words.decode(out[0], skip_special_tokens=True).split())
        if not text:
            raise TrainProblem(
                f"BLIP ({self.name}) says nothing of {picture.path}: write a caption into "
                f"{picture.path.with_suffix('.txt').name} beside it."
            )
        return text

    def _load(self) -> tuple[Any, Any, Any]:
        """Model, what prepares images, and tokenizer."""
        with quiet():
            from transformers import (
                AutoImageProcessor,
                AutoTokenizer,
                BlipForConditionalGeneration,
            )

        folder = Path(self.name).expanduser()
        if not folder.is_dir():
            folder = from_hub(self.name, _FILES, self._offline, "BLIP's folder (--blip)")
        if not (folder / "model.safetensors").is_file():
            raise TrainProblem(
                f"{self.name} holds no BLIP: config.json, model.safetensors and a tokenizer are "
                "expected, as transformers saves them."
            )
        with quiet(), explained(self.name, "BLIP"):
            kind: Any = BlipForConditionalGeneration
            model, report = kind.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                local_files_only=True,
                output_loading_info=True,
            )
            if missing := sorted(report["missing_keys"]):
                raise ValueError(f"its weights lack {missing[0]} and {len(missing) - 1} more")
            # One backend, so that captions do not hang on whether torchvision is installed.
            images = AutoImageProcessor.from_pretrained(folder, backend="pil")
            words = AutoTokenizer.from_pretrained(folder)
        return model.to(self._device).eval(), images, words


def _known(file: Path) -> str:
    """The caption in a file; empty where there is none."""
    try:
        text = file.read_text("utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        return ""
    touch(file)
    return text if re.search(r"\S", text) else ""
