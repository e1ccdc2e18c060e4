"""The names of architectures (without torch, so that queries can use them).

What cannot be told apart is written as all that it may be: ``sd1-or-sd2``, ``flux1-or-chroma``.
"""

from __future__ import annotations

from collections.abc import Iterable

_OR = "-or-"
#: The order in which candidates are written; a table that is not in it comes after those that are.
ORDER = (
    *("sd1", "sd2", "sdxl", "sdxl-refiner"),
    *("flux1", "chroma", "flux2-dev", "flux2-klein-9b", "flux2-klein-4b"),
    *("hunyuanvideo", "hunyuanvideo-1.5", "hunyuanimage"),
    *("sd3", "sd3.5-medium", "sd3.5-large", "auraflow", "pixart"),
    *("sana-0.6b", "sana-1.6b", "sana-4.8b", "hidream", "hunyuan-dit"),
    *("cascade", "cascade-lite", "ideogram4"),
    *("cogvideox-2b", "cogvideox-5b", "z-image", "lumina2", "qwen-image"),
    *("wan-1.3b", "wan-5b", "wan-14b", "ltxv-2b", "ltxv-13b", "ltx-2", "ltx-2.3"),
    "krea2",
    *("anima", "cosmos-predict2-2b", "cosmos-predict2-14b", "cosmos1-7b", "cosmos1-14b"),
)


def candidates(architecture: str) -> tuple[str, ...]:
    """What a LoRA of this architecture may be for; one name where that is known."""
    return tuple(architecture.split(_OR))


def ordered(names: Iterable[str]) -> list[str]:
    """Architectures in the order in which candidates are written."""
    place = {name: i for i, name in enumerate(ORDER)}
    return sorted(set(names), key=lambda name: (place.get(name, len(place)), name))


def joined(names: Iterable[str]) -> str:
    """The architecture of a LoRA that may be for any of these, at least one."""
    return _OR.join(ordered(names))
