"""The canonical form against numpy's SVD of the dense ΔW, and against other factors of the same."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from lorafind.bases.problem import BasisProblem
from lorafind.features.canonical import canonical
from lorafind.features.opening import Opened, open_feature
from lorafind.formats.groups import GROUPS
from tests.search.made_files import LAYERS, make, write

LINEAR = [name for name in LAYERS if name.startswith("unet") and "resnets" not in name]


def rows(opened: Opened) -> np.ndarray:
    """All columns of all groups, n × d."""
    m = opened.matrix
    return np.concatenate([m.columns(g, slice(0, m.widths[g])) for g in m.groups], 1)


def expected(dense: dict[str, Tensor], ranks: dict[str, int]) -> np.ndarray:
    """From the definition: V·√Σ row by row, then U·√Σ; U's largest numbers positive."""
    blocks = []
    for name in sorted(dense, key=lambda name: (GROUPS.index(LAYERS[name][1]), name)):
        u, s, vt = np.linalg.svd(dense[name].numpy(), full_matrices=False)
        r = ranks[name]
        u, s, vt = u[:, :r].copy(), np.where(s[:r] > 1e-9 * s[0], s[:r], 0.0), vt[:r].copy()
        for j in range(r):
            if u[np.abs(u[:, j]).argmax(), j] < 0:
                u[:, j] *= -1
                vt[j] *= -1
        blocks += [(vt * np.sqrt(s)[:, None]).ravel(), (u * np.sqrt(s)).ravel()]
    return np.concatenate(blocks)


@pytest.mark.parametrize("family", ["lora", "loha"])
def test_equals_the_dense_decomposition(tmp_path: Path, family: str) -> None:
    tensors, dense = make(family, 1, LINEAR)
    opened = open_feature("canonical", [write(tmp_path / "x.safetensors", tensors)])
    rank = {"lora": 3, "loha": 9}[family]
    np.testing.assert_allclose(
        rows(opened)[0], expected(dense, dict.fromkeys(LINEAR, rank)), atol=2e-5
    )
    assert opened.frame is not None and opened.frame.rank == rank


def refactored(tensors: dict[str, Tensor], seed: int, spelling: str) -> dict[str, Tensor]:
    """The same ΔW from other factors: B·G and G⁻¹·A, alpha folded in or another one."""
    g = torch.Generator().manual_seed(seed)
    found = {}
    for name in LINEAR:
        key = LAYERS[name][0]
        up = tensors[f"{key}.lora_up.weight"].double()
        down = tensors[f"{key}.lora_down.weight"].double()
        r = len(down)
        # Well-conditioned: rotated, stretched up to four times, turned again.
        q = torch.linalg.qr(torch.randn(r, r, generator=g, dtype=torch.float64)).Q
        mix = q @ torch.diag(torch.linspace(-0.5, 2.0, r, dtype=torch.float64))
        up, down = up @ mix, torch.linalg.inv(mix) @ down
        s = float(tensors[f"{key}.alpha"]) / r
        if spelling == "kohya":
            found[f"{key}.lora_up.weight"] = (up * s / 8).float()
            found[f"{key}.lora_down.weight"] = down.float()
            found[f"{key}.alpha"] = torch.tensor(8.0 * r)
        else:
            stem = "unet." + name.removeprefix("unet/")
            found[f"{stem}.lora_B.weight"] = (up * s).float()
            found[f"{stem}.lora_A.weight"] = down.float()
    return found


def test_it_is_a_function_of_the_change_alone(tmp_path: Path) -> None:
    tensors = make("lora", 2, LINEAR)[0]
    paths = [write(tmp_path / "0.safetensors", tensors)]
    for k, spelling in enumerate(("kohya", "dotted", "dotted"), 1):
        paths.append(write(tmp_path / f"{k}.safetensors", refactored(tensors, k, spelling)))
    # One more column that adds nothing.
    wide = dict(tensors)
    for name in LINEAR:
        key = LAYERS[name][0]
        up, down = wide[f"{key}.lora_up.weight"], wide[f"{key}.lora_down.weight"]
        wide[f"{key}.lora_up.weight"] = torch.cat([up, torch.zeros(len(up), 1)], 1)
        wide[f"{key}.lora_down.weight"] = torch.cat([down, torch.ones(1, down.shape[1])])
        wide[f"{key}.alpha"] = wide[f"{key}.alpha"] * 4 / 3
    paths.append(write(tmp_path / "wide.safetensors", wide))
    found = rows(open_feature("canonical", paths))
    # θ of the same files has next to nothing in common.
    theta = rows(open_feature("theta", paths, pad=True))
    for row in found[1:]:
        np.testing.assert_allclose(row, found[0], atol=1e-4 * np.abs(found[0]).max())
    assert np.linalg.norm(theta[1] - theta[2]) > 0.5 * np.linalg.norm(theta[1])


def test_lower_ranks_and_missing_layers_are_zeros(tmp_path: Path) -> None:
    one, two = make("lora", 3, LINEAR, rank=2), make("lora", 4, LINEAR[:3], rank=4)
    paths = [write(tmp_path / f"{k}.safetensors", made[0]) for k, made in enumerate((one, two))]
    opened = open_feature("canonical", paths)
    ranks = {name: 4 if name in LINEAR[:3] else 2 for name in LINEAR}
    nothing = {name: torch.zeros_like(x) for name, x in one[1].items()}
    made = rows(opened)
    np.testing.assert_allclose(made[0], expected(one[1], ranks), atol=2e-5)
    np.testing.assert_allclose(made[1], expected(nothing | two[1], ranks), atol=2e-5)
    present = {g: opened.matrix.present[g].tolist() for g in opened.matrix.groups}
    assert present == {"self_attn": [True] * 2, "cross_attn": [True] * 2, "ff": [True, False]}
    # Columns that begin and end inside a layer.
    width = opened.matrix.widths["self_attn"]
    for start, stop in ((5, 1300), (1279, width - 3)):
        found = opened.matrix.columns("self_attn", slice(start, stop))
        np.testing.assert_array_equal(found, made[:, start:stop])


def test_an_older_frame_is_filled_by_what_it_has(tmp_path: Path) -> None:
    names = LINEAR[:2]
    first = write(tmp_path / "first.safetensors", make("lora", 5, names, rank=2)[0])
    frame = open_feature("canonical", [first]).frame
    tensors, dense = make("lora", 6, LINEAR, rank=6)
    other = write(tmp_path / "other.safetensors", tensors)
    found = rows(open_feature("canonical", [other, first], frame=frame))
    # The two strongest directions of a higher rank, without the layers that the frame lacks.
    wanted = expected({name: dense[name] for name in names}, dict.fromkeys(names, 2))
    np.testing.assert_allclose(found[0], wanted, atol=2e-5)


def test_what_has_no_low_rank_is_refused(tmp_path: Path) -> None:
    paths = [
        write(tmp_path / f"{family}.safetensors", make(family, 7, LINEAR[:2])[0])
        for family in ("lora", "full")
    ]
    opened = open_feature("canonical", paths)
    assert opened.rows == [0]
    assert [why for _, why in opened.refused] == [
        f"full.safetensors has no low-rank factors at {sorted(LINEAR[:2])[0]}: "
        "it has no canonical form"
    ]
    with pytest.raises(BasisProblem, match="None of 1 files can be used: full"):
        open_feature("canonical", paths[1:])


def test_a_rank_above_the_width_is_cut_to_it() -> None:
    g = torch.Generator().manual_seed(0)
    b, a = torch.randn(5, 7, generator=g).double(), torch.randn(7, 9, generator=g).double()
    left, right = canonical(b, a)
    assert (left.shape, right.shape) == ((5, 5), (5, 9))
    torch.testing.assert_close(left @ right, b @ a)
    strongest = left.gather(0, left.abs().argmax(0, keepdim=True))
    assert bool((strongest > 0).all())
    torch.testing.assert_close(left.norm(dim=0), right.norm(dim=1))
