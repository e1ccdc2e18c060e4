"""Merges of real files as the usual tools make them, exact in float64 through the factors."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafind.formats.names.table import flatten
from lorafind.formats.read import open_adapter

#: The files of an architecture that have modules in common, one of each ΔW.
SD1 = (
    "sd1_diffusers-attnproc_qwerty-aditya_rick-and-morty.safetensors",
    "sd1_diffusers_timohavdk_2100-lora.safetensors",
    "sd1_diffusers_timohavdk_earlier-step.safetensors",
    "sd1_cloneofsimo_lora_disney.safetensors",
    "sd1_cloneofsimo_lora_disney_inpainting.safetensors",
    "sd1_cloneofsimo_analog_svd_rank4.safetensors",
)
SD1_TEXT = (
    "sd1_cloneofsimo_lora_kiriko2.text_encoder.pt",
    "sd1_cloneofsimo_lora_disney.safetensors",
    "sd1_cloneofsimo_lora_disney_inpainting.safetensors",
    "sd1_cloneofsimo_analog_svd_rank4.safetensors",
)
SD2 = (
    "sd2_cloneofsimo_lora_kiriko_unet.pt",
    "sd2_diffusers_vfph55_naruto_bf16.safetensors",
)
#: Files that hold the ΔW of another of these under other names.
SAME = {
    "sd1_kohya-doubled-prefix_timohavdk_new.safetensors": SD1[1],
    "sd1_cloneofsimo_analog_svd_distill.text_encoder.pt": SD1[5],
}
DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_PREFIX = {"unet": "lora_unet", "te1": "lora_te", "te": "lora_te"}

Factors = dict[str, tuple[Tensor, Tensor]]
Weights = Sequence[float] | Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Case:
    """One merge. how: ``concatenated``, ``svd`` to ``rank``, ``resized`` (both, one after the
    other), ``blocks`` (concatenated, a weight per block), ``unet`` (concatenated, without text
    encoders). missing: parents that no index has."""

    parents: tuple[str, ...]
    weights: tuple[float, ...]
    how: str
    dtype: str
    rank: int = 0
    missing: tuple[str, ...] = ()


def factors(path: Path) -> Factors:
    """Module → (B, A) with ΔW = B·A, float64; of linear layers alone."""
    adapter = open_adapter(path, allow_pickle=True)
    made: Factors = {}
    for plan in adapter.plan.modules:
        if plan.place.group == "conv":
            continue
        pair = adapter.modules[plan.name].factors()
        assert pair is not None, f"{plan.name} of {path.name} has no factors"
        made[plan.name] = pair
    return made


def block(name: str) -> str:
    """``down_blocks.1`` and the like."""
    parts = name.partition("/")[2].split(".")
    return ".".join(parts[:2]) if parts[0] != "text_model" else ".".join(parts[:4])


def concatenated(parents: Sequence[Factors], weights: Weights) -> Factors:
    """[w₁B₁ w₂B₂ …]·[A₁; A₂; …]."""
    made: Factors = {}
    for name in sorted({name for parent in parents for name in parent}):
        own = weights[block(name)] if isinstance(weights, Mapping) else weights
        pairs = [
            (w * p[name][0], p[name][1]) for w, p in zip(own, parents, strict=True) if name in p
        ]
        made[name] = torch.cat([b for b, _ in pairs], 1), torch.cat([a for _, a in pairs])
    return made


def resized(whole: Factors, rank: int) -> Factors:
    """The best approximation of ``rank``, singular values shared out evenly."""
    made: Factors = {}
    for name, (b, a) in whole.items():
        q, r = torch.linalg.qr(b)
        p, t = torch.linalg.qr(a.T)
        u, s, vt = torch.linalg.svd(r @ t.T)
        k = min(rank, len(s))
        root = s[:k].sqrt()
        made[name] = (q @ u[:, :k]) * root, root[:, None] * (vt[:k] @ p.T)
    return made


def rounded(whole: Factors, dtype: str) -> Factors:
    """As a file of this dtype has them."""
    kind = DTYPES[dtype]
    return {n: (b.to(kind).double(), a.to(kind).double()) for n, (b, a) in whole.items()}


def write(path: Path, whole: Factors, dtype: str) -> None:
    """In kohya's names, alpha at the rank."""
    tensors = {}
    for name, (b, a) in whole.items():
        component, _, _ = name.partition("/")
        stem = f"{_PREFIX[component]}_{flatten(name.partition('/')[2])}"
        tensors[f"{stem}.lora_up.weight"] = b.to(DTYPES[dtype]).contiguous()
        tensors[f"{stem}.lora_down.weight"] = a.to(DTYPES[dtype]).contiguous()
        tensors[f"{stem}.alpha"] = torch.tensor(float(a.shape[0]))
    save_file(tensors, path)


def block_weights(case: Case, names: Sequence[str]) -> dict[str, tuple[float, ...]]:
    """Weights per block about those of the case, 0.5 to 1.5 times."""
    chooser = random.Random(str(case))
    return {
        b: tuple(round(w * chooser.uniform(0.5, 1.5), 3) for w in case.weights)
        for b in sorted({block(name) for name in names})
    }


def make(case: Case, folder: Path, path: Path) -> Weights:
    """Write the merge; the weights that were used."""
    parents = [factors(folder / name) for name in case.parents]
    weights: Weights = case.weights
    if case.how == "blocks":
        weights = block_weights(case, [name for parent in parents for name in parent])
    whole = concatenated(parents, weights)
    if case.how == "unet":
        whole = {name: pair for name, pair in whole.items() if name.startswith("unet/")}
    if case.how == "resized":
        whole = rounded(whole, case.dtype)
    if case.rank:
        whole = resized(whole, case.rank)
    write(path, whole, case.dtype)
    return weights


def cases(count: int | None = None) -> Iterator[Case]:
    """All pairs and triples of the real files, in every way; ``count``: so many, drawn."""
    chooser = random.Random(12)
    every: list[Case] = []
    for names in (SD1, SD2, SD1_TEXT):
        for size in (2, 3):
            for chosen in itertools.combinations(names, size):
                for how, rank in (("concatenated", 0), ("svd", 6), ("blocks", 0), ("resized", 5)):
                    dtype = chooser.choice(("F16", "BF16"))
                    weights = tuple(round(chooser.uniform(0.1, 1.0), 2) for _ in chosen)
                    case = Case(chosen, weights, how, dtype, rank)
                    every.append(case)
                    if how in ("concatenated", "resized"):
                        every.append(replace(case, missing=(chosen[-1],)))
    chooser.shuffle(every)
    yield from every[:count]
