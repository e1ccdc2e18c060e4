"""The merged file against dense sums in float64."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lorafind.formats.read import open_adapter
from lorafind.index.problem import IndexProblem
from lorafind.mix.merge import merge
from lorafind.mix.total import Term
from tests.search import made_files, small


def terms(folder: Path, *made: tuple[small.Factors, float]) -> list[Term]:
    found = []
    for number, (factors, weight) in enumerate(made):
        path = small.save(folder / f"in{number}.safetensors", factors)
        found.append(Term(path.name, open_adapter(path), weight))
    return found


def dense(path: Path) -> dict[str, np.ndarray]:
    """kohya key → ΔW, from the tensors as another program reads them."""
    found = {}
    with safe_open(path, "np") as file:
        for key in file.keys():  # noqa: SIM118
            stem, _, role = key.partition(".")
            if role == "alpha":
                up = file.get_tensor(f"{stem}.lora_up.weight").astype("f8")
                down = file.get_tensor(f"{stem}.lora_down.weight").astype("f8")
                scale = float(file.get_tensor(key)) / down.shape[0]
                found[stem] = scale * up.reshape(len(up), -1) @ down.reshape(len(down), -1)
    return found


def expected(*made: tuple[small.Factors, float]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for factors, weight in made:
        for key, (up, down) in factors.items():
            found[key] = found.get(key, 0.0) + weight * up.astype("f8") @ down.astype("f8")
    return found


def made() -> tuple[tuple[small.Factors, float], ...]:
    """Three ranks, a weight below zero, and one without the last two layers."""
    fewer = {k: v for k, v in list(small.random(3, 2).items())[:-2]}
    return (small.random(1, 4), 0.7), (small.random(2, 8), -0.25), (fewer, 1.3)


def test_the_file_is_the_sum_to_float_precision(tmp_path: Path) -> None:
    done = merge(terms(tmp_path, *made()), tmp_path / "out.safetensors")
    assert (done.modules, done.ranks, done.lost) == (len(small.SHAPES), (12, 14), 0.0)
    assert done.size == (tmp_path / "out.safetensors").stat().st_size
    found, wanted = dense(tmp_path / "out.safetensors"), expected(*made())
    assert found.keys() == wanted.keys()
    for key, delta in wanted.items():
        # up alone is rounded: every number once.
        assert np.linalg.norm(found[key] - delta) <= 2.0**-24 * 10 * np.linalg.norm(delta)


def test_rank_is_the_best_approximation(tmp_path: Path) -> None:
    done = merge(terms(tmp_path, *made()), tmp_path / "out.safetensors", rank=5)
    assert done.ranks == (5, 5)
    found = dense(tmp_path / "out.safetensors")
    lost = whole = 0.0
    for key, delta in expected(*made()).items():
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        best = (u[:, :5] * s[:5]) @ vh[:5]
        assert np.linalg.norm(found[key] - best) <= 1e-6 * np.linalg.norm(best)
        lost, whole = lost + (s[5:] ** 2).sum(), whole + (s**2).sum()
    assert done.lost == pytest.approx(lost / whole, rel=1e-9)


@pytest.mark.parametrize("rank", [None, 12])
@pytest.mark.parametrize("family", ["lora", "loha", "lokr", "full"])
def test_other_families_and_convolutions(tmp_path: Path, family: str, rank: int | None) -> None:
    names = [n for n in made_files.LAYERS if "resnets" not in n or family == "lora"]
    one, first = made_files.make(family, 1, names)
    two, second = made_files.make("lora", 2, names, rank=4)
    both = []
    for tensors, weight in ((one, 0.5), (two, -0.75)):
        path = tmp_path / f"{weight}.safetensors"
        save_file(tensors, path)
        both.append(Term(path.name, open_adapter(path), weight))
    out = tmp_path / "out.safetensors"
    merge(both, out, rank)
    adapter = open_adapter(out)
    assert (adapter.plan.architecture, adapter.plan.spelling) == ("sd1", "kohya")
    assert set(adapter.modules) == set(names)
    for name in names:
        delta = 0.5 * first[name] - 0.75 * second[name]
        found = adapter.modules[name].dense()
        if rank is not None:
            u, s, vh = torch.linalg.svd(delta, full_matrices=False)
            delta = (u[:, :rank] * s[:rank]) @ vh[:rank]
        assert float((found - delta).norm() / delta.norm()) < 1e-6
    if family == "lora":
        key = "lora_unet_down_blocks_0_resnets_1_conv1"
        with safe_open(out, "pt") as file:
            assert file.get_slice(f"{key}.lora_down.weight").get_shape()[1:] == [320, 3, 3]
            assert file.get_slice(f"{key}.lora_up.weight").get_shape()[2:] == [1, 1]


def test_never_over_a_file(tmp_path: Path) -> None:
    out = tmp_path / "out.safetensors"
    out.write_text("mine")
    given = terms(tmp_path / "in", *made())
    with pytest.raises(IndexProblem, match="is there already"):
        merge(given, out)
    assert out.read_text() == "mine"
    merge(given, out, force=True)
    assert len(dense(out)) == len(small.SHAPES)
    source = tmp_path / "in/in0.safetensors"
    before = source.read_bytes()
    (tmp_path / "in/link").symlink_to(source)
    for place in (source, tmp_path / "in/link"):
        with pytest.raises(IndexProblem, match="which --force does not replace"):
            merge(given, place, force=True, keep=[str(source)])
    assert source.read_bytes() == before
    with pytest.raises(IndexProblem, match="is a folder"):
        merge(given, tmp_path / "in", force=True)
    with pytest.raises(IndexProblem, match="There is no folder"):
        merge(given, tmp_path / "no/out.safetensors")
    assert sorted(os.listdir(tmp_path)) == ["in", "out.safetensors"]


def test_a_file_that_comes_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.safetensors"
    given = terms(tmp_path / "in", *made())
    fsync = os.fsync

    def late(number: int) -> None:
        fsync(number)
        out.write_text("mine")

    monkeypatch.setattr(os, "fsync", late)
    with pytest.raises(IndexProblem, match="is there already"):
        merge(given, out)
    assert out.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["in", "out.safetensors"]


def test_interrupted_leaves_nothing(tmp_path: Path) -> None:
    class Stop:
        def stage(self, title: str, files: int, size: int) -> None: ...

        def note(self, sentence: str) -> None: ...

        def advance(self, files: int, size: int) -> None:
            raise KeyboardInterrupt

    given = terms(tmp_path / "in", *made())
    with pytest.raises(KeyboardInterrupt):
        merge(given, tmp_path / "out.safetensors", progress=Stop())
    assert os.listdir(tmp_path) == ["in"]


def test_metadata_say_what_it_was_made_of(tmp_path: Path) -> None:
    merge(terms(tmp_path, *made()), tmp_path / "out.safetensors", said={"lorafind_basis": "b"})
    with safe_open(tmp_path / "out.safetensors", "np") as file:
        told = file.metadata()
    assert json.loads(told["lorafind_mix"]) == [
        {"name": f"in{i}.safetensors", "weight": w} for i, w in enumerate((0.7, -0.25, 1.3))
    ]
    assert told["lorafind_basis"] == "b" and told["ss_network_module"] == "networks.lora"
    assert str(tmp_path) not in json.dumps(told)


def test_numbers_that_do_not_fit(tmp_path: Path) -> None:
    given = terms(tmp_path / "in", (small.random(1), 1e6))
    with pytest.raises(IndexProblem, match="does not fit F16"):
        merge(given, tmp_path / "out.safetensors", dtype="F16")
    assert os.listdir(tmp_path) == ["in"]
    merge(given, tmp_path / "out.safetensors", dtype="BF16")


def test_what_no_sum_can_hold_is_refused(tmp_path: Path) -> None:
    path = small.save(tmp_path / "in.safetensors", small.random(1))
    with safe_open(path, "np") as file:
        tensors = {k: torch.from_numpy(file.get_tensor(k)) for k in file.keys()}  # noqa: SIM118
    for key in small.SHAPES:
        tensors[f"{key}.dora_scale"] = torch.ones(small.SHAPES[key][0], 1)
    save_file(tensors, tmp_path / "dora.safetensors")
    term = Term("dora.safetensors", open_adapter(tmp_path / "dora.safetensors"), 1.0)
    with pytest.raises(IndexProblem, match=r"dora\.safetensors cannot be mixed: it does more"):
        merge([term], tmp_path / "out.safetensors")
    with pytest.raises(IndexProblem, match="the sum is zero"):
        merge(terms(tmp_path / "z", (small.random(1), 0.0)), tmp_path / "out.safetensors")
