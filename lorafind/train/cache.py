"""Latents and text embeddings on disk, each computed once.

One safetensors file per content, in a folder of the user's cache: ``latents/<key>`` (``mean`` and
``std``, 4 × h × w float32) and ``prompts/<key>`` (``prompt``, 77 × c float32). A key is the SHA-256
of all that the numbers are a function of: the picture's bytes or the prompt's tokens, size and
way of cropping, the weights of VAE or text encoder, and what computes (device, threads, PyTorch,
Pillow), so that a cached run and one without give the same bits. Names and positions are no part
of it. A file is written under another name and then renamed: two processes may work in one folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import overload

import torch

from lorafind.files.whole import whole
from lorafind.index.progress import Progress, Silent
from lorafind.train.captions import Gathered
from lorafind.train.images import Picture, square
from lorafind.train.model import Base
from lorafind.train.problem import TrainProblem
from lorafind.train.settings import Settings
from lorafind.train.tokenizer import rare_word

#: Raised when the meaning of what is stored changes.
VERSION = 1
#: Days after which a file that nobody has asked for is deleted.
KEPT_DAYS = 30
#: Examples that stay in memory: a small set is read once, a large one again and again.
_HELD = 256


@dataclass(frozen=True)
class Example:
    """A picture and its prompt as the U-Net sees them, float32, on the CPU.

    mean, std: 4 × h × w, of the VAE's posterior, in the U-Net's units (scaling factor applied), so
    that a latent is mean + std·ε with ε ~ N(0, 1); prompt: 77 × c, the last hidden state of the
    text encoder; name: of the picture's file.
    """

    mean: torch.Tensor
    std: torch.Tensor
    prompt: torch.Tensor
    name: str


class Stored(Sequence[Example]):
    """Examples that are read from the cache when they are asked for; a few of them are held."""

    def __init__(self, rows: Sequence[tuple[Path, Path, str]]) -> None:
        self._rows = rows
        self._read = lru_cache(_HELD)(self._load)

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | Sequence[Example]:
        if isinstance(index, slice):
            return Stored(self._rows[index])
        return self._read(range(len(self))[index])

    def _load(self, index: int) -> Example:
        latent, prompt, name = self._rows[index]
        found = {**(_read(latent) or {}), **(_read(prompt) or {})}
        if len(found) < 3:
            raise TrainProblem(
                f"What was cached of {name} is gone from {latent.parents[1]}: run the same command "
                "again, and it is computed anew."
            )
        return Example(found["mean"], found["std"], found["prompt"], name)


@dataclass(frozen=True)
class Prepared:
    """What is trained on.

    instance, prior: read from the cache one by one as they are asked for, so that thousands need
    no more memory than a few; prior is empty where prior preservation is off. token: the word [V],
    empty where there is none; prompts: of the instances, with [V]; digest: SHA-256 (hex) of all
    pictures, prompts and encoders, the pictures in their order; warnings: sentences for the user.
    """

    instance: Sequence[Example]
    prior: Sequence[Example]
    token: str
    prompts: Sequence[str]
    digest: str
    warnings: tuple[str, ...] = ()


def root() -> Path:
    """Where the cache lies: ``LORAFIND_CACHE``, by default the user's cache folder."""
    if given := os.environ.get("LORAFIND_CACHE"):
        return Path(given).expanduser()
    import platformdirs

    return platformdirs.user_cache_path("lorafind", appauthor=False)


def prepare(
    base: Base,
    pictures: Sequence[Picture],
    settings: Settings,
    watch: Progress | None = None,
    cache: Path | None = None,
) -> Prepared:
    """Encode pictures and prompts, and make or read class images where settings ask for them.

    base: with VAE and text encoder, which may be dropped afterwards; cache: a folder, None for
    :func:`root`. Pictures go through the VAE one at a time, in float32, so that what is stored of
    one does not hang on the others.

    Raises TrainProblem where a picture has gone or changed since it was looked at, the VAE gives
    no numbers for it, or class images cannot be had; OSError where the cache cannot be written.
    """
    from lorafind.train.prior import class_pictures

    watch = watch or Silent()
    cache = (cache or root()) / "train"
    token = settings.token
    if token is None:
        words = {word for p in pictures for word in re.findall(r"\w+", p.caption.lower())}
        token = rare_word(base.tokenizer, settings.seed, words)
    prompts = [" ".join(filter(None, (token, p.caption))) for p in pictures]
    prior = class_pictures(base, settings, cache, watch) if settings.prior_weight else Gathered([])
    encoder = _Encoder(base, settings, cache)
    every = [*pictures, *prior.pictures]
    texts = [*prompts, *(settings.prior_prompt for _ in prior.pictures)]
    said = encoder.prompts(texts, watch)
    latents = encoder.latents(every, watch)
    forget(cache)
    rows = [
        (latent, said[text], picture.path.name)
        for latent, text, picture in zip(latents, texts, every, strict=True)
    ]
    count = len(pictures)
    contents = [[p.digest, tokenize(base, t)] for p, t in zip(every, texts, strict=True)]
    facts = [VERSION, count, settings.resolution, encoder.vae, encoder.text, contents]
    return Prepared(
        Stored(rows[:count]),
        Stored(rows[count:]),
        token,
        prompts,
        digest(*facts),
        (*prior.warnings, *encoder.warnings),
    )


class _Encoder:
    """VAE and text encoder with their cache. vae, text: digests of their weights."""

    def __init__(self, base: Base, settings: Settings, cache: Path) -> None:
        if base.vae is None or base.text_encoder is None:
            raise ValueError("the base's VAE and text encoder were dropped already")
        self._base, self._model, self._text = base, base.vae, base.text_encoder
        self._side, self._cache = settings.resolution, cache
        self._scale = float(base.vae.config.scaling_factor)
        self.vae, self.text = fingerprint(base.vae), fingerprint(base.text_encoder)
        self.warnings: list[str] = []

    def latents(self, pictures: Sequence[Picture], watch: Progress) -> list[Path]:
        """The file of each picture's posterior."""
        import PIL

        way = [VERSION, "fit, Lanczos, on white", self._side, self._scale, self.vae]
        way += [*computer(self._base.device), PIL.__version__]
        files = [self._cache / "latents" / digest(p.digest, *way) for p in pictures]
        shape = (4, self._side // 8, self._side // 8)
        todo = dict(zip(files, pictures, strict=True))
        _fill(
            "Latents",
            todo,
            {"mean": shape, "std": shape},
            lambda file: self._posterior(todo[file]),
            watch,
        )
        return files

    def _posterior(self, picture: Picture) -> dict[str, torch.Tensor]:
        try:
            content = picture.path.read_bytes()
            if hashlib.sha256(content).hexdigest() != picture.digest:
                raise TrainProblem(
                    f"{picture.path} has changed since it was looked at: run the same command "
                    "again."
                )
            pixels = torch.from_numpy(square(content, self._side))
        except (OSError, ValueError) as error:
            raise TrainProblem(f"{picture.path} cannot be read any more: {error}.") from error
        values = (pixels.permute(2, 0, 1)[None].float() / 127.5 - 1).to(self._model.device)
        with torch.inference_mode():
            posterior = self._model.encode(values).latent_dist
        found = {
            "mean": posterior.mean[0].float().cpu() * self._scale,
            "std": posterior.std[0].float().cpu() * self._scale,
        }
        if not all(torch.isfinite(t).all() for t in found.values()):
            raise TrainProblem(
                f"The VAE of {self._base.name} gives no numbers for {picture.path}: the model's "
                "file is damaged, or of another kind."
            )
        return found

    def prompts(self, texts: Sequence[str], watch: Progress) -> dict[str, Path]:
        """The file of each text's embedding, by text."""
        length = self._text.config.max_position_embeddings
        tokens = {text: tokenize(self._base, text) for text in dict.fromkeys(texts)}
        long = [t for t in tokens if len(self._base.tokenizer(t).input_ids) > length]
        if long:
            self.warnings.append(
                f"{len(long):,} of {len(tokens):,} prompts have more than {length - 2} tokens; the "
                f"rest is not seen, as in “{long[0][:60]}…”."
            )
        way = [VERSION, self.text, *computer(self._base.device)]
        files = {t: self._cache / "prompts" / digest(n, *way) for t, n in tokens.items()}
        spelt = {file: text for text, file in files.items()}
        shape = (length, self._text.config.hidden_size)
        _fill(
            "Prompts",
            spelt,
            {"prompt": shape},
            lambda file: {"prompt": embed(self._base, spelt[file])[0].cpu()},
            watch,
        )
        return files


def tokenize(base: Base, text: str) -> list[int]:
    """The tokens of a prompt, cut or filled up to the text encoder's length."""
    length = base.text_encoder.config.max_position_embeddings
    given = base.tokenizer(text, padding="max_length", max_length=length, truncation=True)
    return list(given.input_ids)


def embed(base: Base, text: str) -> torch.Tensor:
    """The embedding of a prompt, 1 × 77 × c float32, on the device of the text encoder."""
    numbers = torch.tensor([tokenize(base, text)], device=base.text_encoder.device)
    with torch.inference_mode():
        return base.text_encoder(numbers).last_hidden_state.float()


# ---------------------------------------------------------------------------- keys


def digest(*facts: object) -> str:
    """SHA-256 (hex) of facts as JSON."""
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def fingerprint(module: torch.nn.Module) -> str:
    """SHA-256 (hex) of a module's tensors, with their names, dtypes and shapes."""
    found = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def computer(device: torch.device) -> list[str | int]:
    """What the last bits of a result hang on: PyTorch, the device and, on a CPU, its threads."""
    if device.type == "cuda":
        return [torch.__version__, torch.cuda.get_device_name(device)]
    return [torch.__version__, device.type, torch.get_num_threads()]


# ---------------------------------------------------------------------------- files


def _fill(
    title: str,
    files: Iterable[Path],
    shapes: Mapping[str, tuple[int, ...]],
    make: Callable[[Path], dict[str, torch.Tensor]],
    watch: Progress,
) -> None:
    """Make the files that are not there, or not whole."""
    from safetensors.torch import save

    unique = list(dict.fromkeys(files))
    watch.stage(title, len(unique), 0)
    for file in unique:
        if not _whole(file, shapes):
            write(file, save(make(file)))
        watch.advance(1, 0)


def _whole(file: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True where a file holds what it should; then it counts as used today."""
    found = _read(file)
    if found is None or {name: tuple(t.shape) for name, t in found.items()} != shapes:
        return False
    if not all(t.dtype == torch.float32 and torch.isfinite(t).all() for t in found.values()):
        return False
    touch(file)
    return True


def _read(file: Path) -> dict[str, torch.Tensor] | None:
    """The tensors of a file; None where it is gone or damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(file.read_bytes())
    except (FileNotFoundError, SafetensorError):
        return None


def write(file: Path, content: bytes) -> None:
    """Write a file whole or not at all. Raises OSError."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with whole(file) as part:
        part.write_bytes(content)


def touch(file: Path) -> None:
    """Say that a file is in use. A cache that may only be read is used all the same."""
    try:
        os.utime(file)
    except OSError:
        return


def forget(cache: Path, days: float = KEPT_DAYS) -> None:
    """Delete latents and embeddings that no run has used for some days. Class images stay."""
    oldest = time.time() - days * 86400
    for folder in ("latents", "prompts"):
        for file in (cache / folder).glob("*"):
            try:
                if file.stat().st_mtime < oldest:
                    file.unlink()
            # Another process has taken it away, or it is not ours to delete.
            except OSError:
                continue
