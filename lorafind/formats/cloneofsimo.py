"""Files that number their modules instead of naming them (cloneofsimo/lora).

A ``.pt`` file is a bare list up₀, down₀, up₁, down₁ …; a safetensors file has the keys
``unet:<index>:up``. The index counts the linear layers (extended: convolutions too) inside the
targeted classes in the order in which torch registers them: down_blocks, up_blocks and mid_block
*last*, in a block attentions before resnets; CLIP layers hold k, v, q, out. Which layers were
targeted is not said, so each variant is laid beside the shapes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache

from lorafind.formats.names import clip, unet
from lorafind.formats.names.table import Shape

#: Architectures of that tool's time.
ARCHITECTURES = frozenset({"sd1", "sd2"})


def split(key: str) -> tuple[str, int, str] | None:
    """(part, index, role) of a positional key; part ``""`` for a bare list. None for any other."""
    if key.isdecimal():
        number = int(key)
        return "", number // 2, "down" if number % 2 else "up"
    part, _, rest = key.partition(":")
    index, _, role = rest.partition(":")
    if part in ("unet", "text_encoder") and index.isdecimal() and role in ("up", "down"):
        return part, int(index), role
    return None


def names(part: str, shapes: Sequence[Shape]) -> list[str] | None:
    """``component/path`` of the modules with these (o, n), in order; None where nothing fits."""
    for component, order in _orders(part):
        if tuple(shape for _, shape in order) == tuple(shapes):
            return [f"{component}/{path}" for path, _ in order]
    return None


def _orders(part: str) -> Iterator[tuple[str, Sequence[tuple[str, Shape]]]]:
    if part in ("", "text_encoder"):
        for component in ("te1", "te"):
            order = _text(component)
            yield component, order
            # Stable Diffusion 2 ships 23 of OpenCLIP-H's 24 layers.
            yield component, order[:-4]
    if part in ("", "unet"):
        for architecture in sorted(ARCHITECTURES):
            for resnets in (False, True):
                for feed in ("between", "last", "none"):
                    yield "unet", _unet(architecture, resnets, feed)


@cache
def _text(component: str) -> Sequence[tuple[str, Shape]]:
    return [(path, shape) for path, shape, _ in clip.layers(component) if "self_attn" in path]


@cache
def _unet(architecture: str, resnets: bool, feed: str) -> Sequence[tuple[str, Shape]]:
    """feed: where ``ff.net.0.proj`` (GEGLU) stands: between the attentions, last, or nowhere."""
    known = {layer.path: layer.shape for layer in unet.layers(unet.UNETS[architecture])}
    found: list[str] = []
    blocks = dict.fromkeys(_block(path) for path in known if "_block" in path)
    middle = [block for block in blocks if block == "mid_block"]
    for block in [b for b in blocks if b != "mid_block"] + middle:
        inside = [path for path in known if path.startswith(block + ".")]
        for root in dict.fromkeys(
            path.partition(".attn1")[0] for path in inside if ".attn1." in path
        ):
            attn1, attn2 = (
                [f"{root}.{attn}.to_{leaf}" for leaf in ("q", "k", "v", "out.0")]
                for attn in ("attn1", "attn2")
            )
            geglu = [f"{root}.ff.net.0.proj"]
            found += attn1 + (geglu if feed == "between" else []) + attn2
            found += geglu if feed == "last" else []
        if resnets:
            found += [p for p in inside if ".resnets." in p and ".norm" not in p]
    return [(path, known[path]) for path in found]


def _block(path: str) -> str:
    words = path.split(".")
    return words[0] if words[0] == "mid_block" else ".".join(words[:2])


def pairs(keys: Mapping[str, tuple[str, int, str]]) -> dict[tuple[str, int], dict[str, str]]:
    """(part, index) → role → key, in order."""
    found: dict[tuple[str, int], dict[str, str]] = {}
    for key, (part, index, role) in sorted(keys.items(), key=lambda item: item[1][:2]):
        found.setdefault((part, index), {})[role] = key
    return found
