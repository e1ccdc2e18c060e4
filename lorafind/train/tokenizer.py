"""Tokenizers for checkpoints that bring none, and rare words in their vocabulary.

A checkpoint in the original layout holds weights alone; the vocabulary, the same for every Stable
Diffusion 1.x, is a part of the programs that run it. It is taken from wherever this machine has it.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import re
from collections.abc import Collection, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

from lorafind.train.problem import TrainProblem

#: The vocabulary as CLIP's authors publish it: a line of words, then one merge a line.
MERGES = "bpe_simple_vocab_16e6.txt.gz"
#: A repository of the Hub that has it, for when there is a connection.
HUB = "openai/clip-vit-large-patch14"
START, END = "<|startoftext|>", "<|endoftext|>"
#: How many folders above a checkpoint a program's own folder can be.
_ABOVE = 5
_PROGRAMS = (
    "comfy/sd1_tokenizer",
    "ComfyUI/comfy/sd1_tokenizer",
    f"venv/lib/python3*/site-packages/*clip/{MERGES}",
    f"venv/Lib/site-packages/*clip/{MERGES}",
)
_RARE = re.compile("[a-z]{3}</w>")


def find_tokenizer(given: Path | None, near: Path, size: int, offline: bool) -> Any:
    """The CLIPTokenizer of a text encoder.

    given: a folder with vocab.json and merges.txt or tokenizer.json, a diffusers folder, or CLIP's
    own file of merges; None searches the folders around ``near`` (ComfyUI's and the web UI's own
    among them), installed packages, the Hub's cache and, unless ``offline``, the Hub.
    size: of the encoder's vocabulary, which the tokenizer's must have.

    Raises TrainProblem where there is none, or the given one is not the encoder's.
    """
    if given is not None:
        found = _open(given, size)
        if found is None:
            raise TrainProblem(
                f"{given} is no tokenizer of this model: a folder is expected with vocab.json and "
                f"merges.txt or tokenizer.json for {size:,} tokens, or {MERGES}."
            )
        return found
    for place in _places(near):
        found = _open(place, size)
        if found is not None:
            return _padded(found)
    if not offline and (fetched := _fetch()) is not None:
        found = _open(fetched, size)
        if found is not None:
            return _padded(found)
    raise TrainProblem(
        f"{near.name} brings no tokenizer, and none is beside it, in a ComfyUI or web UI around "
        "it, or in the Hub's cache: name one with --tokenizer (a diffusers folder of any Stable "
        "Diffusion 1.5, or a folder with vocab.json and merges.txt)."
    )


def rare_word(tokenizer: Any, seed: int, taken: Collection[str] = ()) -> str:
    """A word of three letters that is one rare token, drawn by the seed.

    As in DreamBooth (Ruiz et al., arXiv 2208.12242, 4.1 "Rare-token identifiers"): a short token
    far down the vocabulary, which is in the order of frequency, so that the model knows little of
    it. taken: words that it must not be, in lower case.
    """
    vocabulary = tokenizer.get_vocab()
    frequent = len(vocabulary) * 4 // 5
    words = sorted(
        token.removesuffix("</w>")
        for token, number in vocabulary.items()
        if number >= frequent and _RARE.fullmatch(token)
    )
    words = [w for w in words if w not in taken and len(tokenizer.tokenize(w)) == 1]
    number = int.from_bytes(hashlib.sha256(f"lorafind/token/{seed}".encode()).digest())
    if words:
        return words[number % len(words)]
    letters = "bcdfghjklmnpqrstvwxz"
    while (word := _spell(number, letters)) in taken:
        number += 1
    return word


def _spell(number: int, letters: str) -> str:
    return "".join(letters[number // len(letters) ** i % len(letters)] for i in range(5))


# ---------------------------------------------------------------------------- search


def _places(near: Path) -> Iterator[Path]:
    """Where a vocabulary may be, the nearest first."""
    from lorafind.hub.cache import root

    near = near.resolve()
    folder = near if near.is_dir() else near.parent
    yield folder
    yield from sorted(folder.glob("*/tokenizer"))
    for above in islice((folder, *folder.parents), _ABOVE):
        for pattern in _PROGRAMS:
            yield from sorted(above.glob(pattern))
    for package in ("open_clip", "clip"):
        spec = importlib.util.find_spec(package)
        for home in (spec.submodule_search_locations or ()) if spec else ():
            yield Path(home) / MERGES
    for pattern in ("tokenizer", "."):
        yield from sorted(root().glob(f"models--*/snapshots/*/{pattern}"))


def _fetch() -> Path | None:
    """The vocabulary's folder from the Hub; None where it cannot be had."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

    try:
        paths = [Path(hf_hub_download(HUB, file)) for file in ("vocab.json", "merges.txt")]
    except (EntryNotFoundError, HfHubHTTPError, OSError):
        return None
    return paths[0].parent


# ---------------------------------------------------------------------------- opening


def _open(place: Path, size: int) -> Any | None:
    """The tokenizer at a place; None where there is none for ``size`` tokens.

    A vocabulary is looked at before it is loaded: places are guessed and may hold any model's, and
    merges of another kind bring the tokenizers library down.
    """
    from transformers import CLIPTokenizer

    from lorafind.train.model import quiet

    try:
        if place.is_file():
            return CLIPTokenizer(**_vocabulary(place, size), model_max_length=77)
        if (place / "tokenizer").is_dir():
            place = place / "tokenizer"
        known = _words(place)
        if len(known) != size or (known.get(START), known.get(END)) != (size - 2, size - 1):
            return None
        with quiet():
            return CLIPTokenizer.from_pretrained(place, local_files_only=True)
    # The tokenizers library raises Exception itself.
    except Exception:
        return None


def _words(place: Path) -> dict[str, int]:
    """The vocabulary in a folder, token → number; empty where it has none."""
    if (place / "vocab.json").is_file() and (place / "merges.txt").is_file():
        return dict(json.loads((place / "vocab.json").read_bytes()))
    if (place / "tokenizer.json").is_file():
        found = json.loads((place / "tokenizer.json").read_bytes())
        added = {row["content"]: row["id"] for row in found.get("added_tokens", ())}
        return {**found["model"]["vocab"], **added}
    return {}


def _vocabulary(path: Path, size: int) -> dict[str, Any]:
    """CLIP's own file → vocab and merges: letters, letters that end a word, merges, two marks."""
    from tokenizers.pre_tokenizers import ByteLevel

    content = path.read_bytes()
    if content[:2] == b"\x1f\x8b":
        content = gzip.decompress(content)
    letters = sorted(ByteLevel.alphabet())
    count = size - 2 * len(letters) - 2
    lines = content.decode("utf-8").split("\n")[1 : count + 1]
    merges = [tuple(line.split()) for line in lines]
    if len(merges) != count or not all(len(pair) == 2 for pair in merges):
        raise ValueError(f"{path} does not hold {count} merges")
    tokens = [*letters, *(f"{c}</w>" for c in letters), *("".join(m) for m in merges), START, END]
    return {"vocab": {token: i for i, token in enumerate(tokens)}, "merges": merges}


def _padded(tokenizer: Any) -> Any:
    """Padded as Stable Diffusion 1.x is; the vocabulary of others is the same, the padding not."""
    tokenizer.pad_token = END
    return tokenizer
