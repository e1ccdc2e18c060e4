"""One ΔW, written in every spelling, is read as one and the same adapter."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lorafind.formats.read import read
from tests.formats import writers


@pytest.mark.parametrize("writer", list(writers.WRITERS), ids=lambda w: w.__name__)
def test_every_spelling_means_the_same(writer, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    spelling, everything = writers.WRITERS[writer]
    shapes = writers.SD1 | writers.TE1 | (writers.FEED if everything else {})
    found = writers.factors(shapes)
    path = tmp_path / "x.safetensors"
    save_file({k: t.clone() for k, t in writer(found).items()}, path)

    reading = read(path)

    assert (reading.outcome, reading.reason) == ("lora", "")
    assert reading.plan is not None and reading.adapter is not None
    assert reading.plan.architecture == "sd1"
    assert reading.plan.spelling == spelling
    assert reading.plan.family == "lora"
    assert {m.name for m in reading.plan.modules} == set(shapes)
    assert not reading.plan.unknown_keys
    for name, (up, down) in found.items():
        delta = reading.adapter.modules[name]
        torch.testing.assert_close(delta.dense(), up.double() @ down.double())
        assert delta.shape == shapes[name]


def test_two_spellings_in_one_file_are_mixed(tmp_path: Path) -> None:
    first = writers.factors(writers.SD1)
    names = list(first)
    tensors = writers.kohya({n: first[n] for n in names[:2]})
    tensors |= writers.diffusers({n: first[n] for n in names[2:]})
    save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "x.safetensors")
    plan = read(tmp_path / "x.safetensors").plan
    assert plan is not None
    assert plan.spelling == "mixed"
    assert {m.name for m in plan.modules} == set(names)


def test_a_module_written_twice_is_read_once_and_said(tmp_path: Path) -> None:
    found = writers.factors(writers.SD1)
    tensors = writers.kohya(found) | writers.diffusers(found)
    save_file({k: t.clone() for k, t in tensors.items()}, tmp_path / "x.safetensors")
    plan = read(tmp_path / "x.safetensors").plan
    assert plan is not None
    assert len(plan.modules) == len(found)
    assert plan.unknown_keys == []
    assert set(plan.unread_keys) == {key for key in tensors if key.startswith("lora_unet_")}
    assert all(plan.keys[key].startswith("leftover:unet.") for key in plan.unread_keys)
    assert any("does already" in note for note in plan.notes)
    assert set(plan.keys) == set(tensors)


def test_unknown_models_meet_in_their_flattened_names(tmp_path: Path) -> None:
    """Dots, underscores, prefixes and half-flattened names of one strange transformer."""
    names = [f"blocks.{i}.self_attn.{leaf}" for i in range(3) for leaf in ("to_q", "to_k")]
    tensors = {
        name: {
            "flat": f"lora_unet_{name.replace('.', '_')}",
            "dotted": f"diffusion_model.{name}",
            "half": f"lora_unet_{name.replace('.', '_', 1)}",
            "peft": f"base_model.model.{name}",
            "bare": name,
            "tail": f"lora_unet_{name.replace('.', '_')}_",
        }
        for name in names
    }
    seen = set()
    for kind in ("flat", "dotted", "half", "peft", "bare", "tail"):
        path = tmp_path / f"{kind}.safetensors"
        file = {}
        for forms in tensors.values():
            file[forms[kind] + ".lora_down.weight"] = torch.ones(2, 48)
            file[forms[kind] + ".lora_up.weight"] = torch.ones(96, 2)
        save_file(file, path)
        plan = read(path).plan
        assert plan is not None
        seen.add((plan.architecture, tuple(sorted(m.name for m in plan.modules))))
    assert len(seen) == 1
    architecture, modules = seen.pop()
    assert architecture.startswith("other:") and len(architecture) == 14
    assert modules[0] == "model/blocks_0_self_attn_to_k"


def test_attention_processors_of_unknown_models_meet_the_others(tmp_path: Path) -> None:
    stem = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
    seen = []
    for key in (
        f"{stem}.processor.to_out_lora.{{}}.weight",
        f"unet.{stem}.to_out.0.lora.{{}}.weight",
    ):
        tensors = {key.format("down"): torch.ones(2, 48), key.format("up"): torch.ones(48, 2)}
        save_file(tensors, tmp_path / "x.safetensors")
        plan = read(tmp_path / "x.safetensors").plan
        assert plan is not None
        seen.append((plan.architecture, plan.modules[0].name))
    assert seen[0] == seen[1]
    assert seen[0][1].endswith("attn1_to_out_0")


def test_less_modules_are_the_same_unknown_model(tmp_path: Path) -> None:
    """An attention-only adapter must be comparable with the full one."""

    def file(leaves: list[str]) -> str:
        tensors = {}
        for leaf in leaves:
            tensors[f"lora_unet_layers_0_{leaf}.lora_down.weight"] = torch.ones(2, 48)
            tensors[f"lora_unet_layers_0_{leaf}.lora_up.weight"] = torch.ones(96, 2)
        path = tmp_path / f"{len(leaves)}.safetensors"
        save_file(tensors, path)
        plan = read(path).plan
        assert plan is not None
        return plan.architecture

    full = file(["attn_q_proj", "attn_v_proj", "mlp_fc1"])
    assert full == file(["attn_q_proj", "attn_v_proj"])
    assert full != file(["mlp_fc1"])
