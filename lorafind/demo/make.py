"""Makes the demo collection: the packaged LoRAs, and copies of them as collections have them."""

from __future__ import annotations

import errno
import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import torch
from torch import Tensor

from lorafind.files.safetensors import load
from lorafind.files.tensors import NAMES, fetch_stored

LOBSTER = "wild/lobster-train-02.safetensors"
LFS_POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:7fb41f8c2a5e5eb38a5c6a8d0a7a9e0f5e8f7e3b0a2f8c4d1b6e9d3c5a7f1e20\n"
    b"size 37861176\n"
)

#: Of a font the second, fourth and sixth LoRA; all others train.
_SPLITS = {1: "calibration", 3: "validation", 5: "test"}


@dataclass(frozen=True)
class Opened:
    """A file in memory: its tensors by key, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


def make(folder: Path) -> dict[str, str]:
    """Write the collection into ``folder``; returns path below it → what was made there.

    ``thin`` and ``wild`` hold the packaged LoRAs, ``copies`` and ``other`` what is made of them,
    ``labels.csv`` says of which font each of the packaged ones is; it is the same every time.
    Raises FileExistsError where the folder is not empty: nothing is ever overwritten.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(
            errno.EEXIST, "the folder is not empty; name one that does not exist yet", str(folder)
        )
    for part in ("thin", "wild"):
        (folder / part).mkdir()
        for item in (files("lorafind.demo") / "data" / part).iterdir():
            _create(folder / part / item.name, item.read_bytes())
    _create(folder / "labels.csv", _labels(folder).encode())
    made = {}
    for path, (source, what, change) in _COPIES.items():
        (folder / path).parent.mkdir(exist_ok=True)
        _create(folder / path, change(folder / source))
        made[path] = what.format(source.removesuffix(".safetensors"))
    return made


def _labels(folder: Path) -> str:
    """Path, font and split of every packaged LoRA."""
    lines, count = ["file,artist,split"], Counter[str]()
    for path in sorted(folder.glob("*/*.safetensors")):
        font = path.name.partition("-")[0]
        split = _SPLITS.get(count[font], "train")
        count[font] += 1
        lines.append(f"{path.relative_to(folder).as_posix()},{font},{split}")
    return "\n".join(lines) + "\n"


def serialize(opened: Opened) -> bytes:
    """The bytes of a safetensors file with these tensors, in their order."""
    header: dict[str, object] = {"__metadata__": opened.metadata} if opened.metadata else {}
    body = bytearray()
    for key, tensor in opened.tensors.items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [len(body), len(body) + len(raw)],
        }
        body += raw
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    return len(head).to_bytes(8, "little") + head + bytes(body)


def _create(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)


def _open(path: Path) -> Opened:
    stored = load(path)
    fetch = fetch_stored(stored)
    tensors = {key: fetch(key).clone() for key in stored.header.tensors}
    return Opened(tensors, stored.header.metadata)


def _changed(change: Callable[[Opened], Mapping[str, Tensor]]) -> Callable[[Path], bytes]:
    """A change of the tensors; the metadata stays."""

    def apply(path: Path) -> bytes:
        opened = _open(path)
        return serialize(Opened(dict(change(opened)), opened.metadata))

    return apply


def _dotted(tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Module → (B, A) of a file in the dotted spelling."""
    end = ".lora_B.weight"
    names = [key.removesuffix(end) for key in tensors if key.endswith(end)]
    return {n: (tensors[f"{n}{end}"], tensors[f"{n}.lora_A.weight"]) for n in names}


def _as_kohya(path: Path) -> bytes:
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in _dotted(_open(path).tensors).items():
        flat = "lora_" + name.replace(".", "_")
        tensors[f"{flat}.alpha"] = torch.tensor(float(len(a)), dtype=a.dtype)
        tensors[f"{flat}.lora_down.weight"] = a
        tensors[f"{flat}.lora_up.weight"] = b
    return serialize(Opened(tensors, {"ss_network_module": "networks.lora"}))


def _resized(opened: Opened, rank: int = 2) -> dict[str, Tensor]:
    """Every ΔW = B·A replaced by the nearest of a lower rank (Eckart, Young), in its dtype."""
    tensors: dict[str, Tensor] = {}
    for name, (b, a) in _dotted(opened.tensors).items():
        u, s, vh = torch.linalg.svd(b.double() @ a.double(), full_matrices=False)
        root = s[:rank].sqrt()
        tensors[f"{name}.lora_A.weight"] = (root[:, None] * vh[:rank]).to(a.dtype)
        tensors[f"{name}.lora_B.weight"] = (u[:, :rank] * root).to(b.dtype)
    return tensors


def _halved(opened: Opened) -> dict[str, Tensor]:
    return {
        key: t * 0.5 if key.endswith((".lora_B.weight", ".lora_up.weight")) else t
        for key, t in opened.tensors.items()
    }


def _attention_only(opened: Opened) -> dict[str, Tensor]:
    return {key: t for key, t in opened.tensors.items() if "_attn" in key or ".attn" in key}


def _titled(path: Path) -> bytes:
    opened = _open(path)
    return serialize(
        Opened(opened.tensors, {**opened.metadata, "modelspec.title": "Clean headlines, final"})
    )


def _language_model(path: Path) -> bytes:
    """An adapter as one of a language model looks; its numbers are random."""
    random = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(4):
        for part in ("q_proj", "v_proj"):
            name = f"base_model.model.model.layers.{layer}.self_attn.{part}"
            tensors[f"{name}.lora_A.weight"] = torch.randn(4, 96, generator=random)
            tensors[f"{name}.lora_B.weight"] = torch.randn(96, 4, generator=random)
    return serialize(Opened(tensors, {"format": "pt"}))


def _half_of_the_bytes(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: len(content) // 2]


#: path → (what it is made of, what was done, how)
_COPIES: dict[str, tuple[str, str, Callable[[Path], bytes]]] = {
    "copies/untitled.safetensors": (
        "thin/3dlet-train-01.safetensors",
        "{}, renamed",
        Path.read_bytes,
    ),
    "copies/opensans-titled.safetensors": (
        "thin/opensans-regular-train-01.safetensors",
        "{} with a title in its metadata",
        _titled,
    ),
    "copies/lobster-kohya.safetensors": (LOBSTER, "{} in the kohya spelling", _as_kohya),
    "copies/cabinsketch-fp16.safetensors": (
        "wild/cabinsketch-regular-train-04.safetensors",
        "{}, which is BF16, as F16",
        _changed(lambda opened: {k: t.half() for k, t in opened.tensors.items()}),
    ),
    "copies/ebgaramond12-half.safetensors": (
        "thin/ebgaramond12-regular-train-01.safetensors",
        "{} times 0.5",
        _changed(_halved),
    ),
    "copies/courier-prime-attention.safetensors": (
        "thin/courier-prime-train-01.safetensors",
        "{} without its feed-forward layers",
        _changed(_attention_only),
    ),
    "copies/lobster-rank2.safetensors": (
        LOBSTER,
        "{}, which has rank 4, resized to rank 2 by SVD",
        _changed(_resized),
    ),
    "other/interrupted.safetensors": (LOBSTER, "the first half of {}", _half_of_the_bytes),
    "other/pointer.safetensors": (LOBSTER, "a Git LFS pointer", lambda path: LFS_POINTER),
    "other/language-model.safetensors": (
        LOBSTER,
        "an adapter of a language model, with random numbers",
        _language_model,
    ),
}
