"""Which indexed LoRAs a LoRA outside of the index may be related to, by the sketches alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorafind.index.classes import series_of
from lorafind.index.relate import identities
from lorafind.index.store import Store
from lorafind.relations.candidates import candidates, estimate

if TYPE_CHECKING:
    from lorafind.index.examine import Lora


def likely(store: Store, lora: Lora) -> dict[int, float]:
    """LoRA id → estimated cosine over the modules in common, of every candidate."""
    assert lora.modules is not None and lora.norms is not None and lora.identity is not None
    known, layouts = identities(store, series_of(lora.architecture))
    if not len(known.ids):
        return {}
    layouts[-1] = [m.name for m in lora.modules]
    known.ids = np.append(known.ids, -1)
    known.layouts = np.append(known.layouts, -1)
    known.sketch = np.concatenate([known.sketch, lora.identity["sketch"][None]])
    known.norms = np.concatenate([known.norms, lora.identity["norms"][None]])
    known.modules.append(lora.norms)
    last = len(known.ids) - 1
    pairs = [p for block in candidates(known, layouts, np.array([last])) for p in block.tolist()]
    found = {i if j == last else j for i, j in pairs}
    return {int(known.ids[k]): estimate(known, layouts, k, last) for k in found}
