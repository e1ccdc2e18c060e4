"""The exception by which a file says that it holds no adapter that can be read."""

from __future__ import annotations

import re

#: Every word that a file's outcome can be.
OUTCOMES = {
    "lora": "an adapter that can be compared",
    "zero": "an adapter whose ΔW is zero",
    "invalid": "an adapter with NaN, infinities or shapes that contradict each other",
    "empty": "no tensor in it",
    "embedding": "a textual inversion",
    "checkpoint": "a model or a part of one",
    "vae": "a VAE",
    "hypernetwork": "a hypernetwork",
    "controlnet": "a ControlNet",
    "unsupported": "an adapter of a kind that is not read, or nothing that is known",
    "unreadable": "breaks the format: truncated, overlapping, not JSON …",
    "pickle": "a PyTorch file, which needs a word of its owner, or is refused even so",
    "lfs-pointer": "a Git LFS pointer",
    "html": "a web page",
    "json": "a JSON text",
    "text": "a text",
    "changing": "changed while it was read: still downloading",
    "vanished": "no longer there",
    "inaccessible": "cannot be opened or read",
    "not-a-file": "a folder, FIFO, socket or device, or a link to nothing",
    "failed": "lorafind failed on it",
}
#: The longest reason that is kept, in characters.
MAX_REASON = 500

_BREAKS = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class NotAnAdapter(Exception):
    """A file is no readable adapter.

    outcome: one word of the index (``unreadable``, ``embedding``, ``checkpoint``, ``pickle``, …).
    reason: one sentence for people: what it is, and what to do where something can be done. What
    of a file's own words stands in it is made one line of bounded length.
    """

    def __init__(self, outcome: str, reason: str) -> None:
        reason = one_line(reason)
        super().__init__(reason)
        self.outcome = outcome
        self.reason = reason

    def __reduce__(self) -> tuple[type[NotAnAdapter], tuple[str, str]]:
        return type(self), (self.outcome, self.reason)


def one_line(text: str) -> str:
    """``text`` cut to :data:`MAX_REASON` characters, control characters and bytes as escapes."""
    if len(text) > MAX_REASON:
        text = text[: MAX_REASON - 1] + "…"
    return _BREAKS.sub(lambda found: repr(found[0])[1:-1], text)


def shown(name: object, most: int = 80) -> str:
    """A name or value out of a file for a sentence: quoted, escaped, the middle left out."""
    text = name if isinstance(name, str) else str(type(name).__name__)
    if len(text) > most:
        text = f"{text[: most // 2]}…{text[-most // 2 :]}"
    return repr(text)
