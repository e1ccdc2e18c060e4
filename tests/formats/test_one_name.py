"""One ΔW in every spelling of every table: the same names, the same signature, `weights`."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lorafind.formats.adapter import Adapter
from lorafind.formats.architectures import candidates
from lorafind.formats.names.table import flatten
from lorafind.formats.names.tables import tables
from lorafind.relations.verify import prove
from tests.formats import made

TABLES = tables()
MODELS = [owner for owner in TABLES if not owner.startswith("te_")]

Write = Callable[[str, Tensor, Tensor], dict[str, Tensor]]


def _kohya(prefix: str, tail: str = "") -> Write:
    def write(name: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
        # alpha = 2r with half the up matrix: the same ΔW.
        return made.kohya(prefix + flatten(name) + tail, up / 2, down, 2.0 * down.shape[0])

    return write


def _dotted(prefix: str) -> Write:
    return lambda name, up, down: made.peft(prefix + name, up, down)


def _half(name: str, up: Tensor, down: Tensor) -> dict[str, Tensor]:
    """Dots and underscores in one name, as WanVideoWrapper's issue 869 shows."""
    head, dot, tail = name.partition(".")
    return made.kohya(f"lora_unet_{head}{'_' if dot else ''}{tail}", up, down, None)


#: How modules are called, whatever the spelling of their names.
WRITERS: dict[str, Write] = {
    "transformer.": _dotted("transformer."),
    "diffusion_model.": _dotted("diffusion_model."),
    "none": _dotted(""),
    "base_model.model.": _dotted("base_model.model."),
    "base_model.model.transformer.": _dotted("base_model.model.transformer."),
    "transformer.base_model.model.": _dotted("transformer.base_model.model."),
    "unet.base_model.model.": _dotted("unet.base_model.model."),
    "model.diffusion_model.": _dotted("model.diffusion_model."),
    "conditional_transformer.": _dotted("conditional_transformer."),
    "lora_unet_": _kohya("lora_unet_"),
    "lora_unet__": _kohya("lora_unet__"),
    "lora_transformer_": _kohya("lora_transformer_"),
    "lora_prior_unet_": _kohya("lora_prior_unet_"),
    "lycoris_": _kohya("lycoris_"),
    "trailing underscore": _kohya("lora_unet_", "_"),
    "half flattened": _half,
}


def written(
    chosen: made.Sample, factors: made.Factors, spelling: str, write: Write
) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for name, paths in made.named(chosen, spelling):
        tensors |= write(name, *made.fused(factors[path] for path in paths))
    return tensors


def names(adapter: Adapter) -> set[str]:
    return {module.name for module in adapter.plan.modules}


@pytest.mark.parametrize("owner", MODELS)
def test_every_spelling_and_prefix_has_the_same_names(owner: str) -> None:
    """From names and shapes alone; every spelling of the table under every prefix."""
    chosen = made.sample(TABLES[owner])
    factors = made.factors(chosen.layers, rank=1)
    true = {f"transformer/{path}" for path in chosen.layers}
    for spelling, (how, write) in itertools.product(chosen.names, WRITERS.items()):
        adapter = made.adapter(written(chosen, factors, spelling, write))
        assert owner in candidates(adapter.plan.architecture), (spelling, how)
        assert names(adapter) == true, (spelling, how)
        assert not adapter.plan.unread_keys, (spelling, how)


def reduced(owner: str, most: int) -> made.Sample:
    """The fused layers of a table, and some others."""
    chosen = made.sample(TABLES[owner])
    stacks = [
        entry.parts
        for entries in chosen.names.values()
        for entry in entries.values()
        if len(entry.parts) > 1
    ]
    kept: dict[str, tuple[int, int]] = {}
    for parts in sorted(stacks, key=len, reverse=True):
        if len(kept) < most:
            kept |= {layer.path: layer.shape for layer in parts}
    for path, shape in chosen.layers.items():
        if len(kept) < most:
            kept.setdefault(path, shape)
    inside = {
        spelling: {
            name: entry
            for name, entry in entries.items()
            if all(layer.path in kept for layer in entry.parts)
        }
        for spelling, entries in chosen.names.items()
    }
    return made.Sample(kept, inside)


@pytest.mark.parametrize("owner", MODELS)
def test_every_spelling_is_the_same_change(owner: str) -> None:
    chosen = reduced(owner, 8)
    factors = made.factors(chosen.layers)
    how = {"": "transformer.", "native": "lora_unet_", "onetrainer": "transformer."}
    adapters = {
        spelling: made.adapter(
            written(chosen, factors, spelling, WRITERS[how.get(spelling, "diffusion_model.")])
        )
        for spelling in chosen.names
    }
    adapters["flattened"] = made.adapter(written(chosen, factors, "", WRITERS["lora_unet_"]))
    for path, (up, down) in factors.items():
        for adapter in adapters.values():
            delta = adapter.modules[f"transformer/{path}"]
            assert delta.shape == chosen.layers[path]
            for rows in (slice(0, 1), slice(len(up) - 1, len(up))):
                truth = up[rows].double() @ down.double()
                torch.testing.assert_close(delta.rows(rows.start, rows.stop).dense(), truth)
    for one, two in itertools.combinations(adapters.values(), 2):
        assert made.apart(one, two) < 1e-6
        relation = prove(one, two)
        assert relation is not None and relation.grade == "weights"
        assert relation.dominates == (True, True)
