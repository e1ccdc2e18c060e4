"""What info says of made and real files, and of everything that is no LoRA."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save

from lorafind.search.info import info
from tests.search.made_files import LAYERS, make, write

CORNER = "unet/down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "full"])
def test_norms(tmp_path: Path, family: str) -> None:
    tensors, dense = make(family, 3)
    row = info(write(tmp_path / "a.safetensors", tensors), modules=True)
    assert (row["outcome"], row["reason"], row["read"]) == ("lora", "", "all")
    assert (row["architecture"], row["spelling"]) == ("sd1", "kohya")
    assert (row["candidates"], row["parameters"]) == (["sd1"], 0)
    assert row["family"] == ("locon" if family == "lora" else family)
    assert (row["modules"], row["zero_modules"]) == (len(LAYERS), 0)
    norms = {m["name"]: m["norm"] for m in row["per_module"]}
    assert norms == pytest.approx({n: float(t.norm()) for n, t in dense.items()}, rel=1e-10)
    total = sum(float(t.square().sum()) for t in dense.values())
    assert row["norm"] == pytest.approx(total**0.5, rel=1e-10)
    for parts, of in (
        ("groups", lambda n: LAYERS[n][1]),
        ("components", lambda n: n.partition("/")[0]),
    ):
        for name, part in row[parts].items():
            square = [float(t.square().sum()) for n, t in dense.items() if of(n) == name]
            assert part["modules"] == len(square) > 0
            assert part["norm"] == pytest.approx(sum(square) ** 0.5, rel=1e-10)
            assert part["share"] == pytest.approx(sum(square) / total, rel=1e-10)
    if family == "full":
        assert (row["alpha"], row["alphas"], row["scale"]) == (None, {"none": len(LAYERS)}, 1)
    else:
        assert (row["rank"], row["ranks"]) == (3, {"3": len(LAYERS)})
        assert (row["alpha"], row["alphas"]) == (2, {"2": len(LAYERS)})
        assert row["scale"] == pytest.approx(2 / 3)
    assert info(tmp_path / "a.safetensors")["per_module"] == (
        [] if family != "full" else row["per_module"]
    )


def test_rank_and_alpha_per_module_where_they_vary(tmp_path: Path) -> None:
    names = list(LAYERS)
    tensors, dense = make("lora", 1, names[:3], rank=3)
    more, rest = make("lora", 2, names[3:], rank=8)
    dense |= rest
    tensors |= more
    tensors[f"{LAYERS[names[0]][0]}.alpha"] = torch.tensor(1.5)
    del tensors[f"{LAYERS[names[1]][0]}.alpha"]
    row = info(write(tmp_path / "a.safetensors", tensors))
    assert (row["rank"], row["alpha"], row["scale"]) == (None, None, None)
    assert row["ranks"] == {"3": 3, "8": 4}
    assert row["alphas"] == {"1.5": 1, "2": 5, "none": 1}
    found = {m["name"]: (m["rank"], m["alpha"], m["scale"]) for m in row["per_module"]}
    assert found == {
        names[0]: (3, 1.5, 0.5),
        names[1]: (3, None, 1),
        names[2]: (3, 2, pytest.approx(2 / 3)),
        **{n: (8, 2, 0.25) for n in names[3:]},
    }
    norms = {m["name"]: m["norm"] for m in row["per_module"]}
    assert norms[names[0]] == pytest.approx(float(dense[names[0]].norm()) * 0.5 / (2 / 3))


def test_a_bias_does_not_make_the_rank_vary(tmp_path: Path) -> None:
    tensors, dense = make("lora", 1)
    tensors[f"{LAYERS[CORNER][0]}.diff_b"] = torch.full((320,), 2.0)
    row = info(write(tmp_path / "a.safetensors", tensors))
    assert (row["rank"], row["modules"]) == (3, len(LAYERS) + 1)
    total = sum(float(t.square().sum()) for t in dense.values()) + 4 * 320
    assert row["norm"] == pytest.approx(total**0.5, rel=1e-10)


def test_dtypes(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    saved = {k: t.bfloat16().float() for k, t in tensors.items()}
    row = info(write(tmp_path / "a.safetensors", saved))
    assert (row["dtype"], row["effective_dtype"]) == ("F32", "BF16")
    row = info(write(tmp_path / "b.safetensors", tensors))
    assert (row["dtype"], row["effective_dtype"]) == ("F32", "F32")


def test_zero_modules_and_zero_files(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    tensors[f"{LAYERS[CORNER][0]}.lora_up.weight"].zero_()
    row = info(write(tmp_path / "a.safetensors", tensors))
    assert (row["outcome"], row["modules"], row["zero_modules"]) == ("lora", len(LAYERS), 1)
    for key in tensors:
        if "lora_up" in key:
            tensors[key].zero_()
    row = info(write(tmp_path / "z.safetensors", tensors))
    assert (row["outcome"], row["zero_modules"], row["norm"]) == ("zero", len(LAYERS), 0)
    assert row["groups"]["text"] == {"modules": 1, "norm": 0, "share": None}
    assert (row["rank"], row["alpha"], row["dtype"]) == (3, 2, "F32")
    assert (
        row["hashes"]["sha256"]
        == hashlib.sha256((tmp_path / "z.safetensors").read_bytes()).hexdigest()
    )


METADATA = {
    "ss_output_name": "watercolour",
    "ss_base_model_version": "sdxl_base_v1-0",
    "ss_sd_model_name": "base.safetensors",
    "ss_session_id": "123",
    "ss_seed": "42",
    "ss_epoch": "7",
    "ss_steps": "1400",
    "ss_network_dim": "16",
    "ss_network_alpha": "8",
    "modelspec.trigger_phrase": "wtrclr style",
    "ss_tag_frequency": '{"10_x": {"paper": 3, "brush": 5}}',
}


def test_training_facts_and_what_they_contradict(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    row = info(write(tmp_path / "a.safetensors", tensors, METADATA))
    facts = row["facts"]
    assert (facts["session_id"], facts["seed"], facts["epoch"], facts["steps"]) == (
        *("123", "42", 7, 1400),
    )
    assert facts["base_model_name"] == "base.safetensors"
    assert list(facts["trigger_words"]) == ["wtrclr style"]
    assert [list(t) for t in facts["tags"]] == [["brush", 5], ["paper", 3]]
    assert row["name"] == "watercolour"
    assert row["hints"] == {"architecture": "sdxl"}
    assert "the metadata says sdxl, but the weights are those of sd1" in row["notes"]
    assert "the metadata says rank 16, but the weights have 3" in row["notes"]
    right = METADATA | {"ss_base_model_version": "sd_v1", "ss_network_dim": "3"}
    assert info(write(tmp_path / "b.safetensors", tensors, right))["notes"] == []


def test_stale_hashes(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    data = save(tensors)
    start = 8 + int.from_bytes(data[:8], "little")
    model = hashlib.sha256(data[start:]).hexdigest()
    path = write(tmp_path / "a.safetensors", tensors, {"sshs_model_hash": model})
    row = info(path)
    assert row["hashes"]["sshs_model_hash"] == model
    assert row["hashes"]["autov3"] == model[:12]
    assert row["recorded"] == [{"name": "sshs_model_hash", "value": model, "stale": False}]
    assert row["notes"] == []
    tensors[f"{LAYERS[CORNER][0]}.lora_up.weight"] += 1
    write(path, tensors, {"sshs_model_hash": model})
    row = info(path)
    assert row["recorded"] == [{"name": "sshs_model_hash", "value": model, "stale": True}]
    assert row["notes"] == ["the recorded sshs_model_hash is not that of these bytes"]
    assert info(path, header_only=True)["recorded"][0]["stale"] is None


def test_sidecars(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    path = write(tmp_path / "a.safetensors", tensors)
    (tmp_path / "a.preview.png").write_bytes(b"")
    (tmp_path / "a.json").write_text('{"activation text": "wtrclr", "sd version": "SD1"}')
    (tmp_path / "a.civitai.info").write_text("{broken")
    (tmp_path / "a.metadata.json").write_text(
        json.dumps({"model_name": "Mine", "sha256": "0" * 64})
    )
    row = info(path)
    assert row["name"] == "Mine"
    assert row["sidecar"]["base_model"] == "SD1"
    assert list(row["sidecar"]["trigger_words"]) == ["wtrclr"]
    assert row["sidecar"]["preview"] == "a.preview.png"
    assert set(row["sidecar"]["files"]) == {"a.json", "a.metadata.json"}
    assert row["recorded"] == [{"name": "sidecar sha256", "value": "0" * 64, "stale": True}]
    assert "the sidecar a.civitai.info cannot be read: it is not JSON" in row["notes"]
    (tmp_path / "a.metadata.json").write_text(
        json.dumps({"sha256": hashlib.sha256(path.read_bytes()).hexdigest().upper()})
    )
    assert info(path)["recorded"][0]["stale"] is False


def test_embeddings_extras_and_what_is_not_understood(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    key = LAYERS[CORNER][0]
    tensors["bundle_emb.my.word.string_to_param.*"] = torch.ones(4, 768)
    tensors["bundle_emb.two.clip_l"] = torch.ones(2, 768)
    tensors["bundle_emb.two.clip_g"] = torch.ones(2, 1280)
    tensors[f"{key}.dora_scale"] = torch.ones(320, 1)
    foreign = "lora_unet_mid_block_resnets_1_conv1.vblora_logits_A"
    tensors[foreign] = torch.ones(2, 4, 4)
    tensors["_aux.slider"] = torch.ones(1)
    tensors["base_model.model.head.weight"] = torch.ones(3)
    tensors["lora_unet_mid_block_resnets_0_conv1.lora_up.weight"] = torch.ones(1280, 2, 1, 1)
    row = info(write(tmp_path / "a.safetensors", tensors), keys=True)
    found = {e["name"]: (e["vectors"], e["width"], len(e["tensors"])) for e in row["embeddings"]}
    assert found == {"my.word": (4, 768, 1), "two": (2, 1280, 2)}
    assert set(row["extras"].values()) == {"base_model.model.head.weight"}
    assert row["family"] == "dora"
    orphan = "lora_unet_mid_block_resnets_0_conv1.lora_up.weight"
    assert set(row["unknown_keys"]) == {foreign, orphan}
    assert row["keys"].keys() == tensors.keys()
    assert row["keys"][orphan] == "orphan"
    assert row["keys"][foreign] == "unknown"
    assert row["keys"][f"{key}.lora_up.weight"] == f"module:{CORNER}"
    assert row["keys"][f"{key}.dora_scale"] == f"extra:{CORNER}.dora_scale"
    assert row["keys"]["_aux.slider"] == "leftover"
    assert set(row["unread_keys"]) == {foreign, orphan}
    assert row["key_counts"] == {
        "module": 3 * len(LAYERS),
        "extra": 5,
        "leftover": 1,
        "orphan": 1,
        "unknown": 1,
    }
    assert row["tensors"][orphan] == {"dtype": "F32", "shape": [1280, 2, 1, 1], "bytes": 10240}
    assert not {"keys", "tensors"} & info(tmp_path / "a.safetensors").keys()


def test_magnitudes_are_shown_beside_the_direction(tmp_path: Path) -> None:
    tensors, dense = make("lora", 1)
    g = torch.Generator().manual_seed(5)
    norms = {}
    for name in (CORNER, next(n for n in LAYERS if "resnets" in n)):
        key, _, _, (o, _) = LAYERS[name]
        magnitude = torch.rand(o, 1, generator=g)
        tensors[f"{key}.dora_scale"] = (
            magnitude[..., None, None] if "resnets" in name else magnitude
        )
        norms[name] = (320, pytest.approx(float(magnitude.double().norm())))
    path = write(tmp_path / "a.safetensors", tensors)
    row = info(path, modules=True)
    assert {m["module"]: (m["numbers"], m["norm"]) for m in row["magnitudes"]} == norms
    assert row["extras"] == {}
    total = sum(float(t.square().sum()) for t in dense.values())
    assert row["norm"] == pytest.approx(total**0.5, rel=1e-10)
    shown = {m["name"]: m["magnitude"] for m in row["per_module"]}
    assert shown == {name: norms[name][1] if name in norms else None for name in LAYERS}
    quick = info(path, header_only=True)["magnitudes"]
    assert [(m["module"], m["numbers"], m["norm"]) for m in quick] == [
        (m["module"], 320, None) for m in row["magnitudes"]
    ]


def test_parameters_are_no_part_of_any_norm(tmp_path: Path) -> None:
    tensors, dense = make("lora", 1)
    stem = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors[f"{stem}.oft_blocks"] = torch.randn(8, 160, 160)
    row = info(write(tmp_path / "a.safetensors", tensors), modules=True)
    (module,) = [m for m in row["per_module"] if m["parameters"]]
    assert (module["family"], row["parameters"]) == ("oft", 1)
    assert module["name"].startswith("unet/mid_block.attentions.0.transformer_blocks.0.attn1.to_q")
    assert module["norm"] > 0
    total = sum(float(t.square().sum()) for t in dense.values())
    assert row["norm"] == pytest.approx(total**0.5, rel=1e-10)
    assert sum(part["share"] for part in row["groups"].values()) == pytest.approx(1)
    (said,) = [note for note in row["notes"] if "parameters" in note]
    assert said.startswith("1 modules (oft) hold parameters")


def test_a_fused_layer_is_shown_in_its_parts(tmp_path: Path) -> None:
    key = "diffusion_model.double_blocks.0.img_attn.qkv"
    tensors = {
        f"{key}.lora_A.weight": torch.randn(4, 3072),
        f"{key}.lora_B.weight": torch.randn(9216, 4),
    }
    row = info(write(tmp_path / "a.safetensors", tensors), keys=True, modules=True)
    block = "transformer/transformer_blocks.0.attn"
    parts = [f"{block}.to_{part}" for part in "qkv"]
    assert [m["name"] for m in row["per_module"]] == parts
    assert set(row["keys"].values()) == {f"module:{' + '.join(parts)}"}
    assert row["candidates"] == row["architecture"].split("-or-")
    assert {"flux1", "chroma"} <= set(row["candidates"])


def test_keys_of_a_file_that_is_no_adapter_are_unread(tmp_path: Path) -> None:
    path = write(tmp_path / "a.safetensors", {"emb_params": torch.ones(2, 768)})
    row = info(path, keys=True)
    assert (row["outcome"], row["keys"]) == ("embedding", {"emb_params": "unread"})
    assert row["tensors"]["emb_params"]["shape"] == [2, 768]


def test_numbers_beyond_float32_are_no_weights(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1)
    tensors[f"{LAYERS[CORNER][0]}.lora_up.weight"] *= 1e20
    row = info(write(tmp_path / "a.safetensors", tensors))
    assert row["outcome"] == "invalid" and CORNER in row["reason"]
    assert (row["norm"], row["effective_dtype"]) == (None, None)


def test_peft_scale_comes_from_its_configuration(tmp_path: Path) -> None:
    stem = "base_model.model.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {
        f"{stem}.lora_A.weight": torch.ones(4, 768),
        f"{stem}.lora_B.weight": torch.ones(320, 4),
    }
    path = write(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "base_model_name_or_path": "sd"}
    (tmp_path / "adapter_config.json").write_text(json.dumps({**config, "bias": "none"}))
    row = info(path)
    assert row["config"] == config
    assert (row["alpha"], row["scale"], row["spelling"]) == (None, 2, "peft")
    assert row["norm"] == pytest.approx(2 * 4 * (320 * 768) ** 0.5)
    assert row["name"] == tmp_path.name


def test_the_header_alone(tmp_path: Path) -> None:
    tensors, _ = make("lora", 1, rank=5)
    tensors["what.is_this"] = torch.ones(3)
    path = write(tmp_path / "a.safetensors", tensors, METADATA)
    whole, quick = info(path, keys=True, modules=True), info(path, header_only=True, keys=True)
    assert quick["read"] == "header"
    for name in (
        *("path", "outcome", "size", "name", "architecture", "family", "spelling", "rank", "ranks"),
        *("modules", "dtype", "facts", "hints", "unknown_keys", "keys", "notes", "sidecar"),
    ):
        assert quick[name] == whole[name], name
    for name in ("norm", "alpha", "scale", "zero_modules", "effective_dtype"):
        assert quick[name] is None
        assert whole[name] is not None
    assert quick["hashes"] == {}
    assert {g: p["modules"] for g, p in quick["groups"].items()} == {
        g: p["modules"] for g, p in whole["groups"].items()
    }
    assert quick["groups"]["text"]["norm"] is None
    # Truly nothing else: data that cannot be read does not matter to it.
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)
    path.write_bytes(data)
    assert info(path)["outcome"] == "invalid"
    assert info(path, header_only=True)["outcome"] == "lora"


def test_the_header_alone_needs_neither_torch_nor_numpy(tmp_path: Path) -> None:
    tensors, _ = make("lokr", 1)
    path = write(tmp_path / "a.safetensors", tensors)
    code = (
        "import sys; from lorafind.search.info import info;"
        "row = info(sys.argv[1], header_only=True);"
        "assert row['architecture'] == 'sd1', row; assert row['family'] == 'lokr';"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], check=True, timeout=60)


def outcomes(folder: Path, list_name: str) -> dict[str, str]:
    listed = json.loads((folder / list_name).read_text("utf-8"))
    if isinstance(listed, list):
        return {entry["file"]: entry["outcome"] for entry in listed}
    return {name: entry["outcome"] for name, entry in listed.items()}


def test_broken_files_are_named(shared: Path) -> None:
    folder = shared / "loras" / "malformed"
    for name, outcome in outcomes(folder, "EXPECTED.json").items():
        row = info(folder / name)
        assert row["outcome"] == outcome, name
        assert (row["reason"] == "") == (outcome == "lora"), name
        assert row["hashes"]["sha256"] == hashlib.sha256((folder / name).read_bytes()).hexdigest()
        json.dumps(row)
        quick = info(folder / name, header_only=True)["outcome"]
        assert quick == ("lora" if outcome in ("zero", "invalid") else outcome), name
    assert "alpha is 0" in " ".join(info(folder / "alpha_zero.safetensors")["notes"])
    assert "needs --allow-pickle" in info(folder / "evil.pt")["reason"]
    assert info(folder / "evil.pt", allow_pickle=True)["outcome"] == "pickle"


def test_real_files(shared: Path) -> None:
    folder = shared / "loras" / "real"
    for entry in json.loads((folder / "MANIFEST.json").read_text("utf-8")):
        row = info(folder / entry["file"], allow_pickle=True)
        assert row["hashes"]["sha256"] == entry["sha256"]
        assert row["size"] == entry["size"]
        if row["outcome"] in ("lora", "zero") and entry.get("n_modules"):
            assert row["modules"] == entry["n_modules"], entry["file"]
            norm = entry["deltaW_frobenius_norm"]
            # The list's LoKr products were rounded on the way.
            near = 5e-5 if row["family"] == "lokr" else 1e-9
            assert row["norm"] == pytest.approx(norm, rel=near, abs=1e-12), entry["file"]


def test_a_real_lokr(shared: Path) -> None:
    row = info(shared / "loras" / "real" / "sd1_lycoris-lokr_smart_falcon_4.safetensors")
    assert (row["family"], row["rank"], row["alpha"], row["zero_modules"]) == ("lokr", 4, 4, 3)
    assert [(r["name"], r["stale"]) for r in row["recorded"]] == [
        ("sshs_model_hash", False),
        ("sshs_legacy_hash", False),
    ]
    assert row["facts"]["session_id"] == "2097167670"


def test_real_tokens_are_embeddings(shared: Path) -> None:
    row = info(shared / "loras" / "real" / "sd1_cloneofsimo_lora_disney.safetensors")
    assert [(e["name"], e["vectors"], e["width"]) for e in row["embeddings"]] == [
        ("<s1>", 1, 768),
        ("<s2>", 1, 768),
    ]


def test_paths_that_hold_no_file(tmp_path: Path) -> None:
    row = info(tmp_path / "nothing.safetensors")
    assert (row["outcome"], row["size"], row["hashes"]) == ("vanished", None, {})
    row = info(tmp_path)
    assert (row["outcome"], row["hashes"]) == ("not-a-file", {})
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.safetensors")
        assert info(tmp_path / "pipe.safetensors")["outcome"] == "not-a-file"
