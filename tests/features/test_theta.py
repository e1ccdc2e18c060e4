"""θ against the stored tensors themselves, laid end to end by numpy."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafind.bases.problem import BasisProblem
from lorafind.features.opening import Opened, open_feature
from lorafind.features.theta import Frame, Theta
from lorafind.formats.groups import GROUPS
from lorafind.formats.names import unet
from tests.search.made_files import LAYERS, make, write

#: Layers of the U-Net that are no convolution.
LINEAR = [name for name in LAYERS if name.startswith("unet") and "resnets" not in name]


def lora(place: Path, rank: int = 3, seed: int = 0, names: list[str] | None = None) -> Path:
    return write(place, make("lora", seed, names or LINEAR, rank)[0])


def factors(tensors: dict[str, Tensor], name: str) -> tuple[np.ndarray, np.ndarray]:
    """(A, B) of a layer as they are stored."""
    key = LAYERS[name][0]
    down, up = tensors[f"{key}.lora_down.weight"], tensors[f"{key}.lora_up.weight"]
    return down.float().numpy(), up.float().numpy()


def in_order(names: list[str], group: str) -> list[str]:
    return sorted(name for name in names if LAYERS[name][1] == group)


def rows(opened: Opened) -> np.ndarray:
    """All columns of all groups, n × d."""
    m = opened.matrix
    return np.concatenate([m.columns(g, slice(0, m.widths[g])) for g in m.groups], 1)


def paper_lora() -> tuple[dict[str, Tensor], dict[str, list[Tensor]]]:
    """SD1.5 at rank 16 on the paper's layers: (tensors, group → its tensors in θ's order)."""
    g = torch.Generator().manual_seed(0)
    tensors: dict[str, Tensor] = {}
    groups: dict[str, dict[str, list[Tensor]]] = {"self_attn": {}, "cross_attn": {}, "ff": {}}
    signs = {".attn1.": "self_attn", ".attn2.": "cross_attn", ".ff.": "ff"}
    for layer in unet.layers(unet.UNETS["sd1"]):
        group = next((name for sign, name in signs.items() if sign in layer.path), None)
        if group is None:
            continue
        o, n = layer.shape
        a, b = torch.randn(16, n, generator=g).half(), torch.randn(o, 16, generator=g).half()
        stem = "lora_unet_" + layer.path.replace(".", "_")
        tensors |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        tensors[f"{stem}.alpha"] = torch.tensor(8.0)
        groups[group]["unet/" + layer.path] = [a, b]
    found = {k: [t for name in sorted(own) for t in own[name]] for k, own in groups.items()}
    return tensors, found


def test_the_papers_lora_has_5_984_256_numbers(tmp_path: Path) -> None:
    tensors, expected = paper_lora()
    assert len(tensors) == 3 * 160
    save_file(tensors, tmp_path / "x.safetensors")
    matrix = open_feature("theta", [tmp_path / "x.safetensors"], ["self", "cross", "ff"]).matrix
    assert matrix.widths == {"self_attn": 1_597_440, "cross_attn": 1_591_296, "ff": 2_795_520}
    assert sum(matrix.widths.values()) == 5_984_256
    shares = [round(width / 5_984_256, 2) for width in matrix.widths.values()]
    assert shares == [0.27, 0.27, 0.47]
    for group, own in expected.items():
        whole = torch.cat([t.ravel() for t in own]).float().numpy()
        # Two tiles that meet inside a layer.
        for tile in (slice(0, 777_777), slice(777_777, len(whole))):
            np.testing.assert_array_equal(matrix.columns(group, tile)[0], whole[tile])


def test_the_tables_give_the_layers_that_files_have() -> None:
    from tests.benchmarks.files import modules

    made = {name: (o, n) for name, o, n in modules("sd1") if "transformer_blocks" in name}
    known = {layer.path.replace(".", "_"): layer.shape for layer in unet.layers(unet.UNETS["sd1"])}
    assert len(made) == 160
    assert {name: known[name] for name in made} == made


def test_any_columns_are_those_of_the_whole(tmp_path: Path) -> None:
    """Every stored dtype, and pieces that begin and end anywhere."""
    paths, expected = [], []
    for k, dtype in enumerate((torch.float32, torch.float16, torch.bfloat16, torch.float64)):
        tensors = {key: t.to(dtype) for key, t in make("lora", k, LINEAR)[0].items()}
        paths.append(write(tmp_path / f"{k}.safetensors", tensors))
        ordered = in_order(LINEAR, "cross_attn")
        expected.append(
            np.concatenate([x.ravel() for name in ordered for x in factors(tensors, name)])
        )
    matrix = open_feature("theta", paths).matrix
    whole = np.array(expected)
    rng = np.random.default_rng(0)
    for start, stop in np.sort(rng.integers(0, whole.shape[1], (40, 2))).tolist():
        found = matrix.columns("cross_attn", slice(start, stop + 1))
        np.testing.assert_array_equal(found, whole[:, start : stop + 1])
    assert found.dtype == np.float32


def test_convolutions_are_laid_flat(tmp_path: Path) -> None:
    (name,) = [name for name in LAYERS if "resnets" in name]
    path = lora(tmp_path / "x.safetensors", names=[name])
    a, b = factors(load_file(path), name)
    np.testing.assert_array_equal(
        rows(open_feature("theta", [path]))[0], np.concatenate([a.ravel(), b.ravel()])
    )


def test_two_passes_read_every_byte_twice(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = sorted((shared / "loras/fontbench/fixed").glob("*-train-*.safetensors"))[:24]
    stored = [load_file(path) for path in paths]
    payload = sum(t.nbytes for x in stored for key, t in x.items() if "weight" in key)
    names = sorted({key.rpartition(".lora_")[0] for key in stored[0] if "lora_" in key})
    matrix = open_feature("theta", paths).matrix
    assert isinstance(matrix, Theta)
    assert matrix.payload == payload and matrix.read_bytes == 0
    # Tiles that cut most layers.
    monkeypatch.setattr("lorafind.features.matrix.TILE", 4 * len(paths) * 1000)
    grams = {g: matrix.gram(g) for g in matrix.groups}
    assert matrix.read_bytes == payload
    again = {g: np.concatenate([x for _, x in matrix.walk(g)], 1) for g in matrix.groups}
    assert matrix.read_bytes == 2 * payload
    for group, part in (("self_attn", "attn1"), ("cross_attn", "attn2"), ("ff", "_ff_")):
        x = np.array(
            [
                np.concatenate(
                    [
                        one[f"{name}.lora_{way}.weight"].float().numpy().ravel()
                        for name in names
                        if part in name
                        for way in ("down", "up")
                    ]
                )
                for one in stored
            ]
        )
        np.testing.assert_array_equal(again[group], x)
        wide = x.astype(np.float64)
        scale = np.linalg.norm(wide, axis=1).max() ** 2
        np.testing.assert_allclose(grams[group], wide @ wide.T, atol=1e-6 * scale)


# ---------------------------------------------------------------------------- what does not fit


def test_other_ranks_and_layouts_are_told(tmp_path: Path) -> None:
    usual = [lora(tmp_path / f"{k}.safetensors", seed=k) for k in range(3)]
    thick = lora(tmp_path / "thick.safetensors", rank=5)
    with pytest.raises(BasisProblem, match=r"^thick.* has rank 5 where the others have 3.*1 of 4"):
        open_feature("theta", [*usual, thick])
    small = lora(tmp_path / "small.safetensors", names=LINEAR[1:])
    with pytest.raises(BasisProblem, match=r"^small.* lacks 1 of the 5 modules"):
        open_feature("theta", [*usual, small])
    large = lora(tmp_path / "large.safetensors", names=[n for n in LAYERS if n.startswith("unet")])
    with pytest.raises(BasisProblem, match=r"^large.* has 1 modules that the others lack"):
        open_feature("theta", [*usual, large])
    # Without convolutions it is as the others.
    assert open_feature("theta", [*usual, large], ["self", "cross"]).matrix.count == 4
    lokr = write(tmp_path / "lokr.safetensors", make("lokr", 0, LINEAR)[0])
    with pytest.raises(BasisProblem, match=r"^lokr.* writes .* as lokr"):
        open_feature("theta", [*usual, lokr])


def test_padding_fills_up_with_zeros(tmp_path: Path) -> None:
    paths = [
        lora(tmp_path / "a.safetensors", rank=2),
        lora(tmp_path / "b.safetensors", rank=5),
        lora(tmp_path / "c.safetensors", rank=3, names=LINEAR[:2]),
        write(tmp_path / "d.safetensors", make("loha", 0, LINEAR)[0]),
    ]
    opened = open_feature("theta", paths, pad=True)
    assert opened.rows == [0, 1, 2]
    assert [(os.path.basename(p), "as loha" in why) for p, why in opened.refused] == [
        ("d.safetensors", True)
    ]
    expected = []
    for path in paths[:3]:
        tensors, blocks = load_file(path), []
        for name in (n for g in GROUPS for n in in_order(LINEAR, g)):
            o, n = LAYERS[name][3]
            a, b = np.zeros((5, n), np.float32), np.zeros((o, 5), np.float32)
            if f"{LAYERS[name][0]}.alpha" in tensors:
                own_a, own_b = factors(tensors, name)
                a[: len(own_a)], b[:, : len(own_a)] = own_a, own_b
            blocks += [a.ravel(), b.ravel()]
        expected.append(np.concatenate(blocks))
    whole = np.array(expected)
    np.testing.assert_array_equal(rows(opened), whole)
    width = opened.matrix.widths["self_attn"]
    for start, stop in ((1, width - 1), (1603, 1604), (1600, 3111), (width - 7, width)):
        found = opened.matrix.columns("self_attn", slice(start, stop))
        np.testing.assert_array_equal(found, whole[:, start:stop])
    assert opened.matrix.present["cross_attn"].tolist() == [True, True, False]
    assert opened.matrix.present["self_attn"].all()


def test_a_frame_takes_what_fits(tmp_path: Path) -> None:
    first = [lora(tmp_path / f"{k}.safetensors", seed=k) for k in range(2)]
    opened = open_feature("theta", first)
    assert opened.frame is not None
    frame = Frame.from_json(opened.frame.to_json())
    assert (frame, frame.digest, frame.rank) == (opened.frame, opened.frame.digest, 3)
    other = [
        lora(tmp_path / "thin.safetensors", rank=1),
        lora(tmp_path / "thin2.safetensors", rank=1),
        first[1],
    ]
    later = open_feature("theta", other, frame=frame)
    assert later.rows == [2]
    assert [why for _, why in later.refused] == [
        f"{name} has rank 1 where the others have 3, at {in_order(LINEAR, 'self_attn')[0]}"
        for name in ("thin.safetensors", "thin2.safetensors")
    ]
    np.testing.assert_array_equal(rows(later)[0], rows(opened)[1])
    with pytest.raises(BasisProblem, match="None of 2 files can be used: thin"):
        open_feature("theta", other[:2], frame=frame)


def test_the_fingerprint_follows_the_contents(tmp_path: Path) -> None:
    paths = [lora(tmp_path / f"{k}.safetensors", seed=k) for k in range(2)]
    one = open_feature("theta", paths).matrix.fingerprint
    assert one == open_feature("theta", paths).matrix.fingerprint
    assert one != open_feature("theta", paths[::-1]).matrix.fingerprint
    assert one != open_feature("theta", paths, ["self"]).matrix.fingerprint


def test_a_file_that_changes_meanwhile_is_told(tmp_path: Path) -> None:
    paths = [lora(tmp_path / f"{k}.safetensors", seed=k) for k in range(2)]
    matrix = open_feature("theta", paths).matrix
    os.utime(paths[1], (1, 1))
    with pytest.raises(BasisProblem, match=r"1\.safetensors has changed"):
        matrix.gram("ff")
    paths[0].unlink()
    with pytest.raises(BasisProblem, match=r"0\.safetensors is no longer there"):
        matrix.gram("ff")
