"""Further parents of a merge with block weights, after the pursuit over sketches.

One weight per LoRA leaves much of a merge whose weights differ from layer to layer, and in what it
leaves a weak parent does not show. Here the LoRAs that were taken get a weight of their own in
every module before the next is looked for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np

from lorafind.formats.adapter import Adapter
from lorafind.trace.fit import coefficients
from lorafind.trace.numbers import Table, measure, scores
from lorafind.trace.pursuit import LEAST, STEPS, Found
from lorafind.trace.reading import Target

#: Weights by module must leave less than this share of what one weight leaves; siblings of a
#: parent gain some of it by chance.
GAIN = 0.5


def by_modules(target: Adapter, found: Found, table: Table, tick: Callable[[], None]) -> Found:
    """``found`` with what weights by module bring to light; itself where that is nothing.

    table: of the target and those taken. Candidates are those that were measured before.
    """
    if not found.ids or _left(table) > GAIN * found.left * float(table.tt.sum()):
        return found
    ids, adapters = list(found.ids), list(found.adapters)
    goal = Target(target)
    allowed = float(table.t_error.sum())
    while len(ids) < STEPS:
        left = _left(table)
        rest = {k: adapter for k, adapter in found.listed.items() if k not in ids}
        if left <= allowed or not rest:
            break
        c = coefficients(table.tangent, table.h)
        score, own, remains = scores(goal, list(rest.values()), adapters, c, tick)
        gain = np.divide(score**2, own, out=np.zeros_like(score), where=own > 0).sum(0)
        gain[gain < LEAST * (remains @ (own > 0))] = 0.0
        best = int(gain.argmax())
        if not gain[best]:
            break
        number = list(rest)[best]
        ids.append(number)
        adapters.append(rest[number])
        table = measure(target, adapters)
    return found if len(ids) == len(found.ids) else replace(found, ids=ids, adapters=adapters)


def _left(t: Table) -> float:
    """‖T‖² that weights by module leave."""
    return max(0.0, float(t.tt.sum() - (coefficients(t.tangent, t.h) * t.h).sum()))
