"""What stands beside a weight file, and in its header, for people: shown, never trusted.

Sidecars share the file's stem: webui ``.json``, Civitai Helper ``.civitai.info``, Lora-Manager
``.metadata.json``, Stability Matrix ``.cm-info.json``, ``.txt``, previews; PEFT puts
``adapter_config.json`` into the same folder.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from lorafind.files.opening import read_at_most
from lorafind.files.outcome import NotAnAdapter
from lorafind.files.place import beside, folder_of, is_remote

#: A sidecar longer than this is not read.
MAX_SIDECAR = 8 * 2**20
#: A header text longer than this is not parsed as JSON.
MAX_TEXT = 4 * 2**20
#: Of one text and of one list no more is kept: characters, entries.
MAX_WORD, MAX_WORDS = 64 * 1024, 256

PICTURES = ("png", "jpg", "jpeg", "webp", "gif", "avif", "jxl", "mp4", "webm")
PREVIEWS = tuple(f"{before}.{ending}" for before in (".preview", "") for ending in PICTURES)

#: PEFT's settings, which belong to ``adapter_model.*`` in the same folder.
CONFIG = "adapter_config.json"

#: Stems that say nothing: the folder's name stands for the file.
GENERIC = frozenset(
    {"adapter_model", "pytorch_lora_weights", "diffusion_pytorch_model", "model", "lora"}
)


@dataclass(frozen=True)
class Sidecar:
    """What the files beside a weight file say of it.

    sha256: a hash that one of them claims, in lower case hex; files: the names read; broken: name
    and reason of those that could not be.
    """

    name: str | None = None
    base_model: str | None = None
    trigger_words: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    preview: str | None = None
    notes: str | None = None
    weight: float | None = None
    sha256: str | None = None
    files: tuple[str, ...] = ()
    broken: tuple[tuple[str, str], ...] = ()


def read_sidecars(path: str | os.PathLike[str], names: set[str] | None = None) -> Sidecar:
    """All sidecars of a weight file together; the user's own words win over a site's.

    names: of the files in its folder, where the caller has listed it already. Never raises.
    """
    own = os.path.basename(os.fspath(path))
    stem = _stem(own)
    if names is None:
        folder = folder_of(path)
        try:
            names = names_in(folder)
        except OSError as error:
            return Sidecar(broken=((os.path.basename(folder), _why(error)),))
    found = Sidecar()
    for suffix, take in READERS:
        name = stem + suffix
        if name not in names or name == own:
            continue
        try:
            part = take(_text(beside(path, name)))
        except (OSError, ValueError, RecursionError) as error:
            found = replace(found, broken=(*found.broken, (name, _why(error))))
            continue
        found = _merge(found, replace(part, files=(name,)))
    if stem == "adapter_model" and CONFIG in names:
        try:
            _object(_text(beside(path, CONFIG)))
        except (OSError, ValueError, RecursionError) as error:
            found = replace(found, broken=(*found.broken, (CONFIG, _why(error))))
    preview = next((stem + p for p in PREVIEWS if stem + p in names), None)
    return replace(found, preview=preview)


def names_in(folder: str) -> set[str]:
    """What stands in a folder, or below a URL; raises OSError."""
    if is_remote(folder):
        from lorafind.files import remote

        return {entry.name for entry in remote.listing(folder)}
    return set(os.listdir(folder or os.curdir))


def _stem(name: str) -> str:
    return os.path.splitext(name)[0]


def _merge(first: Sidecar, second: Sidecar) -> Sidecar:
    """Each fact from the first of the two that has it."""
    facts = ("name", "base_model", "trigger_words", "tags", "notes", "weight", "sha256")
    chosen = {f: getattr(first, f) or getattr(second, f) for f in facts}
    return Sidecar(**chosen, files=first.files + second.files, broken=first.broken + second.broken)


def _text(path: str) -> str:
    data = read_at_most(path, MAX_SIDECAR + 1)
    if len(data) > MAX_SIDECAR:
        raise ValueError(f"it is longer than {MAX_SIDECAR:,} bytes")
    return data.decode("utf-8-sig")


def _why(error: Exception) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    return "it is not JSON" if isinstance(error, json.JSONDecodeError) else str(error)


# ---------------------------------------------------------------------------- one reader each


def _webui(text: str) -> Sidecar:
    found = _object(text)
    weight = found.get("preferred weight")
    return Sidecar(
        base_model=_word(found.get("sd version"), unless="Unknown"),
        trigger_words=_words(found.get("activation text")),
        notes=_word(found.get("notes")) or _word(found.get("description")),
        weight=float(weight) if isinstance(weight, int | float) and 0 < abs(weight) < 1e6 else None,
    )


def _civitai(text: str) -> Sidecar:
    found = _object(text)
    title, version = _word(_get(found, "model", "name")), _word(found.get("name"))
    hashes = [
        _word(_get(file, "hashes", "SHA256"))
        for file in _list(found.get("files"))
        if _get(file, "primary") is not False
    ]
    return Sidecar(
        name=f"{title} {version}" if title and version else title or version,
        base_model=_word(found.get("baseModel")),
        trigger_words=_words(found.get("trainedWords")),
        tags=_words(_get(found, "model", "tags")),
        notes=_word(found.get("description")),
        sha256=_hex(next((h for h in hashes if h), None)),
    )


def _lora_manager(text: str) -> Sidecar:
    found = _object(text)
    words = _words(found.get("trainedWords")) or _words(_get(found, "civitai", "trainedWords"))
    return Sidecar(
        name=_word(found.get("model_name")),
        base_model=_word(found.get("base_model"), unless="Unknown"),
        trigger_words=words,
        tags=_words(found.get("tags")),
        notes=_word(found.get("notes")),
        sha256=_hex(found.get("sha256")),
    )


def _stability_matrix(text: str) -> Sidecar:
    found = _object(text)
    title, version = _word(found.get("ModelName")), _word(found.get("VersionName"))
    return Sidecar(
        name=f"{title} {version}" if title and version else title,
        base_model=_word(found.get("BaseModel")),
        trigger_words=_words(found.get("TrainedWords")),
        tags=_words(found.get("Tags")),
        sha256=_hex(_get(found, "Hashes", "SHA256")),
    )


def _plain_text(text: str) -> Sidecar:
    return Sidecar(notes=_word(text[:4096]))


READERS: tuple[tuple[str, Callable[[str], Sidecar]], ...] = (
    (".json", _webui),
    (".metadata.json", _lora_manager),
    (".civitai.info", _civitai),
    (".cm-info.json", _stability_matrix),
    (".txt", _plain_text),
)


def _object(text: str) -> dict[str, Any]:
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("it is no JSON object")
    return found


def _get(found: object, *path: str) -> Any:
    for name in path:
        found = found.get(name) if isinstance(found, dict) else None
    return found


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _word(value: object, unless: str | None = None) -> str | None:
    text = value[:MAX_WORD].strip() if isinstance(value, str) else ""
    return text if text and text != unless else None


def _words(value: object) -> tuple[str, ...]:
    """Trigger words of a list, or of one text with commas."""
    pieces = value[:MAX_WORD].split(",") if isinstance(value, str) else _list(value)
    return tuple(dict.fromkeys(word for p in pieces if (word := _word(p))))[:MAX_WORDS]


def _hex(value: object) -> str | None:
    text = value.lower().removeprefix("0x") if isinstance(value, str) else ""
    return text if len(text) == 64 and not set(text) - set("0123456789abcdef") else None


# ---------------------------------------------------------------------------- PEFT


def adapter_config(path: str | os.PathLike[str]) -> dict[str, Any] | None:
    """``adapter_config.json`` beside ``adapter_model.*``, which holds the scale; else None.

    A broken one is as none (:func:`read_sidecars` tells of it): the weights can be read without.
    Raises NotAnAdapter where a store does not answer, since the scale may be there.
    """
    if _stem(os.path.basename(os.fspath(path))) != "adapter_model":
        return None
    try:
        return _object(_text(beside(path, CONFIG)))
    except OSError as error:
        if is_remote(path) and not isinstance(error, FileNotFoundError):
            raise NotAnAdapter("inaccessible", f"{CONFIG} cannot be read: {_why(error)}") from error
        return None
    except (ValueError, RecursionError):
        return None


# ---------------------------------------------------------------------------- the header's texts


@dataclass(frozen=True)
class Facts:
    """What a trainer wrote into the header. Every field may be stale or wrong."""

    title: str | None = None
    output_name: str | None = None
    base_model: str | None = None
    base_model_name: str | None = None
    base_model_hash: str | None = None
    prediction: str | None = None
    network_module: str | None = None
    dim: str | None = None
    alpha: str | None = None
    trigger_words: tuple[str, ...] = ()
    tags: tuple[tuple[str, int], ...] = ()
    session_id: str | None = None
    seed: str | None = None
    steps: int | None = None
    epoch: int | None = None
    started_at: float | None = None
    finished_at: float | None = None
    comment: str | None = None
    merged_from: str | None = None
    claimed_hashes: dict[str, str] = field(default_factory=dict)


def facts_from_metadata(metadata: Mapping[str, str]) -> Facts:
    """The Facts of a header's texts (sd-scripts ``ss_*``, ModelSpec, diffusers). Never raises."""

    def first(*names: str) -> str | None:
        values = (_word(metadata.get(name), unless="None") for name in names)
        return next((value for value in values if value), None)

    tags = _top_tags(metadata.get("ss_tag_frequency"))
    return Facts(
        title=first("modelspec.title"),
        output_name=first("ss_output_name"),
        base_model=first("ss_base_model_version", "modelspec.architecture")
        or ("sd_v2" if metadata.get("ss_v2") == "True" else None),
        base_model_name=first("ss_sd_model_name"),
        base_model_hash=first("ss_new_sd_model_hash", "ss_sd_model_hash"),
        prediction=first("modelspec.prediction_type"),
        network_module=first("ss_network_module"),
        dim=first("ss_network_dim"),
        alpha=first("ss_network_alpha"),
        trigger_words=_words(first("modelspec.trigger_phrase", "modelspec.usage_hint"))
        or _folder_words(metadata),
        tags=tags,
        session_id=first("ss_session_id"),
        seed=first("ss_seed"),
        steps=_integer(first("ss_steps")),
        epoch=_integer(first("ss_epoch")),
        started_at=_real(first("ss_training_started_at")),
        finished_at=_real(first("ss_training_finished_at")),
        comment=first("ss_training_comment"),
        merged_from=first("modelspec.merged_from"),
        claimed_hashes={
            name: value
            for name in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
            if (value := first(name))
        },
    )


def display_name(path: str | os.PathLike[str], sidecar: Sidecar, facts: Facts) -> str:
    """What a file is called: sidecar, title, output name, stem; the folder for generic stems."""
    stem = _stem(os.path.basename(os.fspath(path)))
    if stem in GENERIC:
        stem = os.path.basename(folder_of(path)) or stem
    return sidecar.name or facts.title or facts.output_name or stem


#: What texts say of the base model → our word for the architecture. Longer ones first.
BASES = (
    ("stable-diffusion-xl-v1-refiner", "sdxl-refiner"),
    ("stable-diffusion-xl", "sdxl"),
    ("stable-diffusion-v1", "sd1"),
    ("stable-diffusion-v2", "sd2"),
    ("sdxl", "sdxl"),
    ("sd_v1", "sd1"),
    ("sd_v2", "sd2"),
    ("flux", "flux1"),
    ("sd3", "sd3"),
)


def hints(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The architecture that the texts suggest, under ``architecture``; shown, never trusted."""
    for name in ("modelspec.architecture", "ss_base_model_version"):
        text = metadata.get(name, "").lower()
        for sign, architecture in BASES:
            if text.startswith(sign):
                return {"architecture": architecture}
    return {"architecture": "sd2"} if metadata.get("ss_v2") == "True" else {}


def _top_tags(text: str | None, count: int = 20) -> tuple[tuple[str, int], ...]:
    total: Counter[str] = Counter()
    for folder in _parsed(text).values():
        for tag, number in folder.items() if isinstance(folder, dict) else ():
            if isinstance(number, int) and 0 <= number < 2**53:
                total[tag.strip()] += number
    return tuple(total.most_common(count))


def _folder_words(metadata: Mapping[str, str]) -> tuple[str, ...]:
    """sd-scripts names a folder ``<repeats>_<token> <class>``; a data set may list class tokens."""
    words = []
    for folder in _parsed(metadata.get("ss_dataset_dirs")):
        repeats, _, name = folder.partition("_")
        words.append(name if repeats.isdecimal() and name else folder)
    for dataset in _list(_json(metadata.get("ss_datasets"))):
        for subset in _list(_get(dataset, "subsets")):
            words.append(_get(subset, "class_tokens") or "")
    return _words(words)


def _parsed(text: str | None) -> dict[str, Any]:
    found = _json(text)
    return found if isinstance(found, dict) else {}


def _json(text: str | None) -> Any:
    if not text or len(text) > MAX_TEXT:
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _integer(text: str | None) -> int | None:
    return int(text) if text is not None and text.isdecimal() and len(text) < 19 else None


def _real(text: str | None) -> float | None:
    try:
        value = float(text) if text is not None else None
    except ValueError:
        return None
    # Of the years 1970 to 9999, which every system can write as a date.
    return value if value is not None and 0 <= value < 253_402_300_800 else None
