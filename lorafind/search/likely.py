"""Which indexed LoRAs a LoRA outside of the index may be related to, by the sketches alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafind.index.classes import series_of
from lorafind.index.store import Store

if TYPE_CHECKING:
    from lorafind.index.examine import Lora


def likely(store: Store, lora: Lora) -> dict[int, float]:
    """LoRA id → estimated cosine over the modules in common, of every candidate."""
    from lorafind.index.pairs import Alone, relatives

    assert lora.modules is not None and lora.norms is not None and lora.identity is not None
    alone = Alone(lora.identity, [m.name for m in lora.modules], lora.norms)
    return dict(relatives(store, series_of(lora.architecture), alone))
