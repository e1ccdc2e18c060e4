"""One word for how a file writes its names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from lorafind.formats.grouping import Found
from lorafind.formats.names.table import Entry

#: What a suffix says where there is no prefix.
STYLES = {"diffusers-old": "diffusers-old", "diffusers": "diffusers", "peft": "peft"}
#: Suffixes that say everything.
TELLING = ("cloneofsimo", "diffusers-old", "lora-vit")
#: Names of layers that one tool alone writes.
BODIES = ("sgm", "xlabs", "onetrainer", "diffsynth", "lightx2v", "sat")


def spelling(found: Sequence[Found], entries: Sequence[Entry | None]) -> str:
    """``kohya``, ``sgm``, ``diffusers``, … as in :class:`Plan`; ``mixed`` where there are several.

    found, entries: in one order.
    """
    main: Counter[str] = Counter()
    text: Counter[str] = Counter()
    for f, entry in zip(found, entries, strict=True):
        if f.sighting.is_text:
            text[_word(f, "")] += 1
        else:
            main[_word(f, entry.spelling if entry is not None else "")] += 1
    if "onetrainer" in text:
        return "onetrainer"
    telling = [word for word in main if word in BODIES and word != "sgm"]
    if len(telling) == 1:
        # The layers that all tools call alike do not make it a mixed one.
        return telling[0]
    # Nor do the text encoders, which have one name everywhere.
    if set(main) == {"sgm"} and set(text) <= {"kohya"}:
        return "sgm"
    spellings = set(main) | set(text)
    return spellings.pop() if len(spellings) == 1 else "mixed"


def _word(f: Found, body: str) -> str:
    group = f.group
    if group.style in TELLING:
        return group.style
    if body in BODIES:
        return body
    writer = group.module.writer
    if body and writer in ("", "diffusers"):
        return "native"
    return writer or STYLES.get(group.style, "bare")
