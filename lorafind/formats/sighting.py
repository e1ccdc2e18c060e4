"""One module as a file shows it, before anything is known of the model."""

from __future__ import annotations

from dataclasses import dataclass

from lorafind.formats.names.table import Shape


@dataclass(frozen=True, slots=True)
class Sighting:
    """component and flat as in :class:`lorafind.formats.prefixes.Module`; shape: (o, n) of ΔW;
    dims: of the stored weight, 0 where that is not told; kind as in table.KINDS.
    """

    component: str
    flat: str
    shape: Shape
    dims: int = 0
    kind: str = "weight"

    @property
    def is_text(self) -> bool:
        """True where the prefix says that it is of a text encoder."""
        return self.component.startswith("te")
