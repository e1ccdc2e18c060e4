"""The hashes by which sites and tools know a file, and those that it claims for itself.

AutoV1, AutoV2, AutoV3: stable-diffusion-webui and Civitai. ``sshs_model_hash`` and
``sshs_legacy_hash``: kohya-ss/sd-scripts (``precalculate_safetensors_hashes``).
``modelspec.hash_sha256``: Stability-AI/ModelSpec, OneTrainer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from lorafind.files.safetensors import CHUNK, Header, Opened, Path, fetch_from

#: The order in which the safetensors writer puts dtypes, the last first.
WRITTEN = (
    *("BOOL", "F4", "F6_E2M3", "F6_E3M2", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0"),
    *("F8_E4M3FNUZ", "F8_E5M2FNUZ", "I16", "U16", "F16", "BF16"),
    *("I32", "U32", "F32", "C64", "F64", "I64", "U64"),
)
#: The bytes that the old short hashes look at.
WINDOW = (0x100000, 0x110000)


@dataclass(frozen=True)
class Hashes:
    """What a file's hashes are, in lower case hex, computed from its bytes.

    sha256: of the file; autov1: first 8 of SHA-256 over bytes 0x100000 to 0x110000; autov2: first
    10 of sha256; autov3: first 12 of sshs_model_hash; sshs_model_hash: SHA-256 of the data section;
    sshs_legacy_hash: AutoV1 of the file as kohya's trainer would write it with its ``ss_`` texts
    alone. The last three are None where the file is no safetensors file, the last one also where
    the window reaches into the header, whose order is not defined.
    """

    sha256: str
    autov1: str
    sshs_model_hash: str | None = None
    sshs_legacy_hash: str | None = None

    @property
    def autov2(self) -> str:
        """Civitai's AutoV2."""
        return self.sha256[:10]

    @property
    def autov3(self) -> str | None:
        """Civitai's AutoV3."""
        return None if self.sshs_model_hash is None else self.sshs_model_hash[:12]

    def to_json(self) -> dict[str, str | None]:
        """All of them by name."""
        names = ("sha256", "autov1", "autov2", "autov3", "sshs_model_hash", "sshs_legacy_hash")
        return {name: getattr(self, name) for name in names}


def hashes(
    path: Path,
    header: Header | None = None,
    sha256: str | None = None,
    data_sha256: str | None = None,
) -> Hashes:
    """The hashes of a file.

    header: of a safetensors file; sha256, data_sha256: of file and data section where they are
    known already. Raises NotAnAdapter where the file cannot be read.
    """
    with Opened(path) as opened:
        if header is not None and header.mtime_ns not in (None, opened.before.st_mtime_ns):
            raise opened.changed()
        if sha256 is None:
            sha256, data_sha256 = _digests(opened, header)
        begin, end = (min(edge, opened.size) for edge in WINDOW)
        opened.seek(begin)
        window = memoryview(bytearray(end - begin))
        opened.fill(window)
        opened.settle()
    autov1 = hashlib.sha256(window).hexdigest()[:8]
    legacy = _legacy(path, header) if header is not None else None
    return Hashes(sha256, autov1, data_sha256, legacy)


def _digests(opened: Opened, header: Header | None) -> tuple[str, str | None]:
    """SHA-256 of the file and, where there is a header, of its data section."""
    start = opened.size if header is None else header.data_start
    whole, data = hashlib.sha256(), hashlib.sha256()
    for begin in range(0, opened.size, CHUNK):
        piece = memoryview(bytearray(min(CHUNK, opened.size - begin)))
        opened.fill(piece)
        whole.update(piece)
        data.update(piece[min(len(piece), max(0, start - begin)) :])
    return whole.hexdigest(), None if header is None else data.hexdigest()


def canonical(header: Header) -> list[str]:
    """The names of the tensors in the order in which the safetensors writer puts them."""
    return sorted(header.tensors, key=lambda k: (-WRITTEN.index(header.tensors[k].dtype), k))


def _legacy(path: Path, header: Header) -> str | None:
    """kohya's legacy hash: of the window of a file that is written anew, as _written says."""
    begin, end = (edge - _written(header) for edge in WINDOW)
    if begin < 0:
        return None
    digest = hashlib.sha256()
    fetch = fetch_from(path, header)
    position = 0
    for key in canonical(header):
        info = header.tensors[key]
        length = info.end - info.begin
        first, last = max(0, begin - position), min(length, end - position)
        if first < last:
            digest.update(fetch(key)[first:last])
        position += length
    return digest.hexdigest()[:8]


def _written(header: Header) -> int:
    """Where the data would begin if the tensors were written with the ``ss_`` texts alone."""
    texts = {key: text for key, text in header.metadata.items() if key.startswith("ss_")}
    described: dict[str, object] = {"__metadata__": texts}
    position = 0
    for key in canonical(header):
        info = header.tensors[key]
        end = position + info.end - info.begin
        described[key] = {
            "dtype": info.dtype,
            "shape": info.shape,
            "data_offsets": (position, end),
        }
        position = end
    text = json.dumps(described, ensure_ascii=False, separators=(",", ":"))
    length = len(text.encode())
    return 8 + length + -length % 8


# ---------------------------------------------------------------------------- recorded hashes


@dataclass(frozen=True)
class Recorded:
    """A hash that the file or its sidecar claims.

    stale: True where it does not belong to these bytes (any more), None where that cannot be told.
    """

    name: str
    value: str
    stale: bool | None

    def to_json(self) -> dict[str, str | bool | None]:
        """The fields by name."""
        return {"name": self.name, "value": self.value, "stale": self.stale}


def recorded(
    claims: Mapping[str, str],
    found: Hashes | None,
    by_name: Callable[[], str | None] = lambda: None,
) -> list[Recorded]:
    """Each claim beside the bytes.

    claims: name → hash; names are those of :class:`Hashes`, ``modelspec.hash_sha256``, and
    ``<sidecar> sha256``. by_name: gives the SHA-256 over the tensors sorted by name
    (:func:`by_sorted_name`), asked for only where nothing else fits.
    """
    return [
        Recorded(name, text, _stale(name, text, found, by_name)) for name, text in claims.items()
    ]


def _stale(
    name: str, text: str, found: Hashes | None, by_name: Callable[[], str | None]
) -> bool | None:
    if found is None:
        return None
    value = text.strip().lower().removeprefix("0x")
    if name == "sshs_legacy_hash":
        return None if found.sshs_legacy_hash is None else value != found.sshs_legacy_hash
    if name.endswith("sha256") and name != "modelspec.hash_sha256":
        return value != found.sha256
    if found.sshs_model_hash is None:
        return None
    if value == found.sshs_model_hash:
        return False
    if name == "modelspec.hash_sha256":
        return value != by_name()
    # LyCORIS hashes the tensors in the order of its modules, which no file keeps.
    return None if text.startswith("0x") else True


def by_sorted_name(path: Path, header: Header) -> str:
    """SHA-256 over the bytes of all tensors, sorted by name (OneTrainer's ModelSpec hash)."""
    digest = hashlib.sha256()
    fetch = fetch_from(path, header)
    for key in sorted(header.tensors):
        digest.update(fetch(key))
    return digest.hexdigest()
