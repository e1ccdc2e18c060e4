"""Σ w·ΔW as one LoRA file in kohya's names.

``<prefix>_<layer with underscores>.lora_up.weight`` [o, r(, 1, 1)], ``….lora_down.weight``
[r, i(, kh, kw)] and ``….alpha`` = r, so that the scale is 1 and ΔW = up·down. Weights, alphas and
scales of the ingredients are all in ``up``.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

import lorafind
from lorafind.formats.names.table import flatten
from lorafind.formats.read import open_adapter
from lorafind.index.problem import IndexProblem
from lorafind.index.progress import Progress, Silent
from lorafind.mix.mix import text
from lorafind.mix.total import Sum, Term, check, reduced, total

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
#: Component → kohya's prefix; ``te1`` is ``te`` where the model has one text encoder.
_PREFIX = {
    "unet": "lora_unet",
    "transformer": "lora_transformer",
    "model": "lora_unet",
    "te": "lora_te",
}


@dataclass(frozen=True)
class Merged:
    """What was written. modules: their number; ranks: the lowest and the highest; lost: the share
    of ‖Σ w·ΔW‖² that ``rank`` left out, 0 without it; size: bytes of the file."""

    path: str
    modules: int
    ranks: tuple[int, int]
    lost: float
    size: int


def merge(
    terms: Sequence[Term],
    out: str | os.PathLike[str],
    rank: int | None = None,
    dtype: str = "F32",
    force: bool = False,
    keep: Sequence[str] = (),
    said: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> Merged:
    """Write Σ w·ΔW of the terms to ``out``, one module in memory at a time.

    rank: at most this one, by the best approximation; None: ranks side by side, which changes
    nothing. dtype: of DTYPES; in F32 every number is off by at most 2⁻²⁴ of itself. force: in the
    place of a file that is there, but never of one of ``keep``. said: metadata beside what the
    file was made of.

    The file appears when it is complete and has been read again: with every module under its own
    name. Raises IndexProblem where ``out`` is there, numbers do not fit the dtype, or kohya's names
    cannot say a module; OSError.
    """
    target = Path(out).expanduser().absolute()
    watch = progress or Silent()
    refuse_taken(target, force, keep)
    for term in terms:
        check(term)
    encoders = {m.place.component for t in terms for m in t.adapter.plan.modules} - {"unet"}
    several = "te2" in encoders or any(t.adapter.plan.architecture == "sdxl" for t in terms)
    names = {m.name for t in terms for m in t.adapter.plan.modules}
    watch.stage("Merging", len(names), 0)
    header: dict[str, object] = {}
    end, ranks = 0, []
    whole = lost = 0.0
    written: list[str] = []
    with tempfile.TemporaryDirectory(
        prefix=f".{target.name}.", suffix=".part", dir=target.parent
    ) as work:
        with open(Path(work, "data"), "wb") as data:
            for one in total(terms):
                watch.advance(1, 0)
                if rank is not None and one.a.shape[0] > rank:
                    before = one
                    one, size, left = reduced(before, rank)
                    whole, lost = whole + size, lost + left
                elif rank is not None:
                    whole += one.delta.squared_norm()
                written.append(one.place.name)
                ranks.append(one.a.shape[0])
                stem = f"{_prefix(one.place.component, several)}_{_flat(one.place.name)}"
                for key, tensor in _tensors(one):
                    end = _append(data, header, f"{stem}.{key}", tensor, dtype, end)
        if not ranks:
            raise IndexProblem(f"{target.name} was not written: the sum is zero.")
        part = Path(work, "whole.safetensors")
        _assemble(part, Path(work, "data"), header, {**(said or {}), **_made_of(terms, ranks)})
        _look_again(part, terms, written, target.name)
        size_ = part.stat().st_size
        _publish(part, target, force)
    share = lost / whole if whole else 0.0
    return Merged(str(target), len(ranks), (min(ranks), max(ranks)), share, size_)


def refuse_taken(target: Path, force: bool, keep: Sequence[str] = ()) -> None:
    """Raises IndexProblem where a file cannot be written to ``target``; see :func:`merge`."""
    if not target.parent.is_dir():
        raise IndexProblem(f"There is no folder {target.parent} to write to.")
    if target.is_dir():
        raise IndexProblem(f"{target} is a folder: name a file in it.")
    if not force and os.path.lexists(target):
        raise IndexProblem(f"{target} is there already: choose another name, or give --force.")
    if any(target.exists() and os.path.exists(p) and target.samefile(p) for p in keep):
        raise IndexProblem(
            f"{target} is itself the target or a part of the mix, which --force does not replace: "
            "choose another name."
        )


def _prefix(component: str, several: bool) -> str:
    if component == "te1":
        return "lora_te1" if several else "lora_te"
    return _PREFIX.get(component, f"lora_{component}")


def _flat(name: str) -> str:
    return flatten(name.partition("/")[2])


def _tensors(one: Sum) -> list[tuple[str, Tensor]]:
    r = one.a.shape[0]
    tail = (1,) * (len(one.kernel) - 1)
    return [
        ("alpha", torch.tensor(float(r))),
        ("lora_down.weight", one.a.reshape(r, *one.kernel)),
        ("lora_up.weight", one.b.reshape(-1, r, *tail)),
    ]


def _append(
    data: BinaryIO, header: dict[str, object], key: str, tensor: Tensor, dtype: str, begin: int
) -> int:
    stored = tensor.to(DTYPES[dtype]).contiguous()
    if not bool(stored.isfinite().all()):
        raise IndexProblem(f"The sum does not fit {dtype} ({key}): give --dtype F32.")
    data.write(stored.reshape(-1).view(torch.uint8).numpy().data)
    end = begin + stored.nbytes
    header[key] = {"dtype": dtype, "shape": list(stored.shape), "data_offsets": [begin, end]}
    return end


def _assemble(
    part: Path, data: Path, header: Mapping[str, object], metadata: Mapping[str, str]
) -> None:
    whole = {"__metadata__": dict(sorted(metadata.items())), **header}
    words = json.dumps(whole, separators=(",", ":")).encode()
    words += b" " * (-len(words) % 8)
    with part.open("wb") as file, data.open("rb") as source:
        file.write(len(words).to_bytes(8, "little") + words)
        shutil.copyfileobj(source, file, 2**20)
        file.flush()
        os.fsync(file.fileno())


def _made_of(terms: Sequence[Term], ranks: Sequence[int]) -> dict[str, str]:
    """What the file says of itself; names and weights, no paths."""
    recipe = [{"name": t.name, "weight": t.weight} for t in terms]
    one = str(max(ranks))
    return {
        "lorafind_version": lorafind.__version__,
        "lorafind_mix": json.dumps(recipe),
        "ss_network_module": "networks.lora",
        "ss_network_dim": one if len(set(ranks)) == 1 else "Dynamic",
        "ss_network_alpha": one if len(set(ranks)) == 1 else "Dynamic",
        "ss_training_comment": "mix of " + ", ".join(f"{text(t.weight)} × {t.name}" for t in terms),
    }


def _look_again(part: Path, terms: Sequence[Term], written: Sequence[str], name: str) -> None:
    """Every module must be read back under its own name."""
    found = open_adapter(part).plan
    if sorted(m.name for m in found.modules) == sorted(written) and not found.unread_keys:
        return
    kind = terms[0].adapter.plan.architecture
    raise IndexProblem(
        f"{name} was not written: kohya's names cannot say the layers of these LoRAs ({kind})."
    )


def _publish(part: Path, target: Path, force: bool) -> None:
    """Give the complete file its name; without ``force`` never in the place of another."""
    if force:
        os.replace(part, target)
        return
    try:
        # Unlike renaming, a link fails where something has come there meanwhile.
        os.link(part, target)
    except FileExistsError as error:
        raise IndexProblem(
            f"{target} is there already: choose another name, or give --force."
        ) from error
    except OSError:
        # A file system without links.
        if os.path.lexists(target):
            raise
        os.rename(part, target)
