"""The relations of real files, as their manifest states them."""

from __future__ import annotations

import itertools
import json
import pathlib

import pytest
import torch

from lorafind.formats.adapter import Adapter
from lorafind.formats.read import read
from lorafind.relations.grades import Relation
from lorafind.relations.verify import Evidence, prove
from tests.relations.made import adapter, cast, kept, resized

DIFFUSERS = "sd1_diffusers_timohavdk_2100-lora.safetensors"
KOHYA = "sd1_kohya-doubled-prefix_timohavdk_new.safetensors"
EARLIER = "sd1_diffusers_timohavdk_earlier-step.safetensors"
WHOLE = "sd1_cloneofsimo_analog_svd_rank4.safetensors"
HALF = "sd1_cloneofsimo_analog_svd_distill.text_encoder.pt"
MLP = "peft_mlp_adapter_model.bin"
MLP_SAVED = "peft_mlp_modules_to_save_adapter_model.bin"


@pytest.fixture(scope="module")
def adapters(shared: pathlib.Path) -> dict[str, Adapter]:
    found = {}
    for path in sorted((shared / "loras/real").iterdir()):
        if path.suffix not in (".json", ".md"):
            reading = read(path, allow_pickle=True)
            if reading.adapter is not None:
                found[path.name] = reading.adapter
    return found


@pytest.fixture(scope="module")
def relations(adapters: dict[str, Adapter]) -> dict[frozenset[str], Relation]:
    found = {}
    for x, y in itertools.combinations(adapters, 2):
        if adapters[x].plan.architecture == adapters[y].plan.architecture:
            relation = prove(adapters[x], adapters[y])
            if relation is not None:
                found[frozenset((x, y))] = relation
    return found


def test_no_relation_but_those_of_the_manifest(
    relations: dict[frozenset[str], Relation],
) -> None:
    assert {pair: relation.grade for pair, relation in relations.items()} == {
        frozenset((DIFFUSERS, KOHYA)): "weights",
        frozenset((DIFFUSERS, EARLIER)): "kin",
        frozenset((KOHYA, EARLIER)): "kin",
        frozenset((WHOLE, HALF)): "near",
        frozenset((MLP, MLP_SAVED)): "part",
    }


def test_cosines_are_those_of_the_manifest(
    shared: pathlib.Path, adapters: dict[str, Adapter]
) -> None:
    manifest = json.loads((shared / "loras/real/MANIFEST.json").read_text())
    checked = 0
    for entry in manifest:
        for other in entry.get("relations", []):
            if "cosine" not in other:
                continue
            if entry["file"] > other["file"]:  # each pair stands in the manifest twice
                continue
            found = Evidence(adapters[entry["file"]], adapters[other["file"]])
            expected = other.get("cosine_of_shared_part", other["cosine"])
            assert found.cosine == pytest.approx(expected, abs=5e-4)
            whole = found.cosine * (found.shares[0] * found.shares[1]) ** 0.5
            assert whole == pytest.approx(other["cosine"], abs=5e-4)
            checked += 1
    assert checked == 7


def test_a_copy_under_other_names(relations: dict[frozenset[str], Relation]) -> None:
    relation = relations[frozenset((DIFFUSERS, KOHYA))]
    assert relation.dominates == (True, True)
    assert relation.differs == {"spelling": ["diffusers", "kohya"]}
    assert relation.margin < 1e-6


def test_the_half_of_a_file(relations: dict[frozenset[str], Relation]) -> None:
    # The F16 file was not cast from the F32 one: its factors were computed in F16, and are off by
    # up to 1.8 units in the last place where a cast gives at most 0.5.
    relation = relations[frozenset((WHOLE, HALF))]
    assert relation.cosine == pytest.approx(1.0, abs=2e-7)
    assert relation.shares == pytest.approx((1.0, 0.0476), abs=1e-3)
    assert relation.removable("x") == relation.removable("y") == "never"


def test_one_more_saved_module(
    relations: dict[frozenset[str], Relation], adapters: dict[str, Adapter]
) -> None:
    relation = prove(adapters[MLP_SAVED], adapters[MLP])
    assert relation is not None
    assert (relation.larger, relation.dominates) == ("x", (True, False))
    assert [step.words for step in relation.steps] == ["2 extra tensors dropped"]


@pytest.mark.parametrize("name", [DIFFUSERS, WHOLE, "sd1_cloneofsimo_lora_disney.safetensors"])
def test_made_from_real_files(adapters: dict[str, Adapter], name: str) -> None:
    whole = adapters[name]
    modules = kept(dict(whole.modules), lambda n: "blocks.1." not in n and "blocks.2." not in n)
    modules = {key: delta for key, delta in modules.items() if max(delta.shape) < 1500}
    extras = {extra: whole.extra(extra) for extra in whole.plan.extras}
    x = adapter(modules, extras=extras)

    def grade(y: Adapter) -> str | None:
        relation = prove(x, y)
        return None if relation is None else relation.grade

    assert grade(adapter(cast(modules, torch.bfloat16), extras=extras)) == "weights"
    assert grade(adapter(cast(modules, torch.float8_e4m3fn), extras=extras)) == "cast"
    if any(delta.rank > 1 for delta in modules.values()):
        small = resized(modules, lambda s: 2, torch.float16)
        assert grade(adapter(small, extras=extras)) == "resized"
        late = kept(small, lambda n: "attn1" in n)
        assert grade(adapter(late, extras=extras)) == "resized"
    late = kept(modules, lambda n: "up_blocks" in n)
    assert grade(adapter(cast(late, torch.float16), extras=extras)) == "part"
