"""CLIP text encoders: CLIP-L (``te1``), OpenCLIP-H (``te``), CLIP-bigG (``te2``).

Structure: transformers ``CLIPTextModelWithProjection``.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

from lorafind.formats.names.places import LAYERS
from lorafind.formats.names.table import Entry, Index, Layer, Shape

WIDTHS = {"te1": 768, "te": 1024, "te2": 1280}
VOCABULARY, POSITIONS = 49408, 77


def layers(component: str) -> Iterator[tuple[str, Shape, bool]]:
    """(name, shape, is a norm) of every layer with a weight."""
    w = WIDTHS[component]
    yield "text_model.embeddings.token_embedding", (VOCABULARY, w), False
    yield "text_model.embeddings.position_embedding", (POSITIONS, w), False
    for n in range(LAYERS[component]):
        layer = f"text_model.encoder.layers.{n}"
        for name in ("k", "v", "q", "out"):
            yield f"{layer}.self_attn.{name}_proj", (w, w), False
        yield f"{layer}.layer_norm1", (w, 1), True
        yield f"{layer}.mlp.fc1", (4 * w, w), False
        yield f"{layer}.mlp.fc2", (w, 4 * w), False
        yield f"{layer}.layer_norm2", (w, 1), True
    yield "text_model.final_layer_norm", (w, 1), True
    yield "text_projection", (w, w), False


@cache
def index() -> Index:
    """All names of the three encoders, with and without ``text_model.``."""
    found = Index()
    for component in WIDTHS:
        for path, shape, norm in layers(component):
            names = {path, path.removeprefix("text_model."), f"text_model.{path}"}
            found.add(Entry(component, component, (Layer(path, shape, norm),)), names)
    return found
