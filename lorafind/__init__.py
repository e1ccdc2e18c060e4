"""lorafind: find similar, duplicate and related LoRA files from their weights alone.

Index: an index, to build and to ask. read: one file, as an adapter or the honest word for what it
is. compare: two files, exactly, without an index.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafind.api import Index
    from lorafind.formats.read import read
    from lorafind.search.compare import compare

__all__ = ["Index", "__version__", "compare", "read"]
__version__ = "0.1.0"

#: Public name → where it is made; imported when it is first used, because torch is heavy.
_HOMES = {
    "Index": "lorafind.api",
    "read": "lorafind.formats.read",
    "compare": "lorafind.search.compare",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)
