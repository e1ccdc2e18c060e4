"""Layers that a spelling fuses: cut by rows, and nothing said twice or too much."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lorafind.files.outcome import NotAnAdapter
from lorafind.formats import read as reading
from lorafind.formats.adapter import ModulePlan
from lorafind.formats.delta import Delta
from lorafind.formats.read import read
from lorafind.index.build import build
from lorafind.index.store import Store
from lorafind.relations.grades import Relation
from lorafind.relations.verify import prove
from tests.formats import made

H = 3072
BLOCK = "transformer/transformer_blocks.0.attn"
QKV = [f"{BLOCK}.to_{x}" for x in "qkv"]
SINGLE = "transformer/single_transformer_blocks.3"
G = torch.Generator().manual_seed(3)


def rand(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=G)


def split(ups: list[Tensor], downs: list[Tensor]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, up, down in zip(QKV, ups, downs, strict=True):
        found |= made.peft(name.replace("/", "."), up, down)
    return found


def proved(one: dict[str, Tensor], two: dict[str, Tensor]) -> Relation | None:
    return prove(made.adapter(one), made.adapter(two))


def grade(one: dict[str, Tensor], two: dict[str, Tensor]) -> str | None:
    relation = proved(one, two)
    return relation.grade if relation is not None else None


#: A layer that no spelling fuses, so that factors of fused ones are not those of all.
PLAIN = {"up": rand(H, 2), "down": rand(2, H)}


def out(scale: float = 1.0) -> dict[str, Tensor]:
    return made.peft(f"transformer.{BLOCK[12:]}.to_out.0", PLAIN["up"] * scale, PLAIN["down"])


class TestRows:
    def test_a_dense_layer_shares_its_input_side(self) -> None:
        """One A of rank 4 for all three: what the original code trains."""
        up, down = rand(3 * H, 4), rand(4, H)
        one = made.kohya("lora_unet_double_blocks_0_img_attn_qkv", up, down, 2.0)
        adapter = made.adapter(one)
        assert [m.name for m in adapter.plan.modules] == QKV
        assert all(m.shape == (H, H) and m.keys == tuple(one) for m in adapter.plan.modules)
        for i, name in enumerate(QKV):
            truth = 0.5 * up[i * H : (i + 1) * H].double() @ down.double()
            torch.testing.assert_close(adapter.modules[name].dense(), truth)
        assert set(adapter.plan.keys.values()) == {f"module:{' + '.join(QKV)}"}
        two = split([part / 2 for part in up.split(H)], [down] * 3)
        assert grade(one | out(), two | out()) == "weights"
        assert made.apart(adapter, made.adapter(two)) < 1e-6

    def test_rows_of_unequal_parts(self) -> None:
        """Queries, key, value and the feed-forward layer in one: 3072, 3072, 3072, 12288."""
        up, down = rand(7 * H, 2), rand(2, H)
        adapter = made.adapter(made.kohya("lora_unet_single_blocks_3_linear1", up, down, None))
        names = [f"{SINGLE}.attn.to_{x}" for x in "qkv"] + [f"{SINGLE}.proj_mlp"]
        assert [m.name for m in adapter.plan.modules] == names
        assert [m.shape for m in adapter.plan.modules] == [(H, H)] * 3 + [(4 * H, H)]
        last = adapter.modules[names[-1]].dense()
        torch.testing.assert_close(last, up[3 * H :].double() @ down.double())

    def test_swapped_halves(self) -> None:
        """The last modulation: (shift, scale) in the original code, (scale, shift) in diffusers."""
        up, down = rand(2 * H, 3), rand(3, H)
        shift, scale = up.split(H)
        one = made.kohya("lora_unet_final_layer_adaLN_modulation_1", up, down, None)
        two = made.peft("transformer.norm_out.linear", torch.cat([scale, shift]), down)
        three = made.peft("transformer.norm_out.linear", up, down)
        assert grade(one | out(), two | out()) == "weights"
        assert grade(one | out(), three | out()) not in ("weights", "tensors", "scaled")

    def test_biases_are_cut_as_their_layer_is(self) -> None:
        up, down, bias = rand(3 * H, 4), rand(4, H), rand(3 * H)
        name = "diffusion_model.double_blocks.0.img_attn.qkv"
        for tensors in (
            {f"{name}.diff_b": bias},
            {**made.peft(name, up, down), f"{name}.lora_B.bias": bias},
        ):
            adapter = made.adapter(tensors)
            for i, layer in enumerate(QKV):
                found = adapter.modules[f"{layer}.bias"].dense()[:, 0]
                torch.testing.assert_close(found, bias[i * H : (i + 1) * H].double())

    def test_a_layer_of_another_size_is_not_cut(self) -> None:
        """Nobody knows which of its rows are whose."""
        name = "lora_unet_double_blocks_0_img_attn_"
        tensors: dict[str, Tensor] = {}
        for n in range(19):
            plain = f"lora_unet_double_blocks_{n}_img_attn_proj"
            tensors |= made.kohya(plain, rand(H, 1), rand(1, H), None)
        tensors |= made.kohya(f"{name}qkv", rand(2 * H, 1), rand(1, H), None)
        names = [m.name for m in made.adapter(tensors).plan.modules]
        assert f"{BLOCK}.to_q+to_k+to_v[6144×3072]" in names and len(names) == 20


class TestBlockDiagonal:
    """sd-scripts' split_qkv, musubi's and OneTrainer's conversions: A of rank 3r, B of blocks."""

    ups, downs = [rand(H, 4) for _ in range(3)], [rand(4, H) for _ in range(3)]

    def fused(self, alpha: float) -> dict[str, Tensor]:
        up, down = made.fused(zip(self.ups, self.downs, strict=True))
        return made.kohya("lora_unet_double_blocks_0_img_attn_qkv", up, down, alpha) | out()

    def test_parts_keep_their_own_rank(self) -> None:
        adapter = made.adapter(self.fused(12.0))
        assert [adapter.modules[name].rank for name in QKV] == [4, 4, 4]
        relation = proved(self.fused(12.0), split(self.ups, self.downs) | out())
        assert relation is not None and relation.grade == "weights"
        assert relation.dominates == (True, True)
        assert "rank" not in relation.differs

    def test_an_alpha_that_did_not_grow_is_reweighted(self) -> None:
        """kohya-ss/sd-scripts issue 2204: these modules alone are applied three times too weak."""
        relation = proved(self.fused(4.0), split(self.ups, self.downs) | out())
        assert relation is not None and relation.grade == "reweighted"
        alone = {k: t for k, t in self.fused(4.0).items() if "qkv" in k}
        assert grade(alone, split(self.ups, self.downs)) == "scaled"

    def test_one_missing_part_is_a_part(self) -> None:
        tensors = split(self.ups, self.downs) | out()
        less = {k: t for k, t in tensors.items() if "to_k" not in k}
        assert grade(self.fused(12.0), less) == "part"


class TestTwice:
    up, down = rand(3 * H, 2), rand(2, H)
    one = made.kohya("lora_unet_double_blocks_0_img_attn_qkv", up, down, None)
    two = split([rand(H, 2) for _ in range(3)], [rand(2, H)] * 3)

    @pytest.mark.parametrize("turned", [False, True])
    def test_the_canonical_spelling_is_read(self, turned: bool) -> None:
        both = self.two | self.one if turned else self.one | self.two
        adapter = made.adapter(both)
        assert sorted(m.name for m in adapter.plan.modules) == sorted(QKV)
        assert all(m.keys[0] in self.two for m in adapter.plan.modules)
        assert set(adapter.plan.unread_keys) == set(self.one)
        assert all(adapter.plan.keys[k].startswith("leftover:transformer.") for k in self.one)
        assert any("written twice" in note for note in adapter.plan.notes)
        assert adapter.plan.unknown_keys == []
        assert adapter.plan.spelling == "mixed"

    def test_only_what_is_missing_comes_from_the_second(self) -> None:
        tensors = self.one | {k: t for k, t in self.two.items() if "to_k" in k}
        adapter = made.adapter(tensors)
        rows = [self.up[:H], self.two[f"{QKV[1].replace('/', '.')}.lora_B.weight"]]
        downs = [self.down, self.two[f"{QKV[1].replace('/', '.')}.lora_A.weight"]]
        for name, up, down in zip(QKV, rows, downs, strict=False):
            found = adapter.modules[name].dense()
            torch.testing.assert_close(found, up.double() @ down.double())
        fused = "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"
        assert adapter.plan.keys[fused] == f"module:{QKV[0]} + {QKV[2]}"

    def test_a_file_with_less_does_not_replace_it(self) -> None:
        """Programs may add the second writing: neither may go as a copy of the other."""
        relation = proved(self.one | self.two, self.two)
        assert relation is not None and relation.grade == "part" and relation.larger == "x"
        assert relation.dominates == (True, False)
        changed = {k: t * 2 if "lora_up" in k else t for k, t in self.one.items()}
        assert grade(self.one | self.two, changed | self.two) not in ("tensors", "weights", "part")
        assert grade(self.one | self.two, self.two | self.one) == "tensors"

    def test_z_image_files_that_hold_all_names(self) -> None:
        h = 3840
        tensors: dict[str, Tensor] = {}
        for n in range(30):
            stem = f"diffusion_model.layers.{n}.attention"
            for leaf, rows in (("qkv", 3 * h), ("out", h)):
                tensors |= made.peft(f"{stem}.{leaf}", rand(rows, 1), rand(1, h))
            for leaf in ("to_q", "to_k", "to_v", "to_out.0"):
                tensors |= made.peft(f"{stem}.{leaf}", rand(h, 1), rand(1, h))
        plan = made.adapter(tensors).plan
        assert plan.architecture == "z-image"
        assert len(plan.modules) == 30 * 4
        assert {k.rsplit(".", 3)[1] for k in plan.unread_keys} == {"qkv", "out"}


class TestMagnitudes:
    """DoRA: per output they are cut, per input they are of the whole."""

    up, down = rand(3 * H, 4), rand(4, H)
    stem = "lora_unet_double_blocks_0_img_attn_qkv"
    name = f"{BLOCK}.to_q+to_k+to_v.dora_scale.input"

    def fused(self, magnitude: Tensor) -> dict[str, Tensor]:
        found = made.kohya(self.stem, self.up, self.down, None)
        return found | {f"{self.stem}.dora_scale": magnitude}

    def split(self, magnitudes: list[Tensor]) -> dict[str, Tensor]:
        found = split(list(self.up.split(H)), [self.down] * 3)
        for name, magnitude in zip(QKV, magnitudes, strict=True):
            found[f"{name.replace('/', '.')}.lora_magnitude_vector"] = magnitude
        return found

    def test_per_output(self) -> None:
        magnitude = rand(3 * H).abs()
        one, two = self.fused(magnitude[:, None]), self.split(list(magnitude.split(H)))
        adapter = made.adapter(one)
        assert set(adapter.plan.extras) == {f"{name}.dora_scale" for name in QKV}
        assert torch.equal(adapter.extra(f"{QKV[1]}.dora_scale")[:, 0], magnitude[H : 2 * H])
        assert adapter.plan.family == "dora"
        assert grade(one, two) == "weights"
        other = self.split(list(magnitude.flip(0).split(H)))
        assert grade(one, other) not in ("weights", "tensors")

    def test_per_input(self) -> None:
        magnitude = rand(1, H).abs()
        one, two = self.fused(magnitude), self.split([magnitude] * 3)
        assert list(made.adapter(one).plan.extras) == [self.name]
        split_names = {f"{name}.dora_scale.input" for name in QKV}
        assert set(made.adapter(two).plan.extras) == split_names
        # Each is the norm of other columns: no copy, although ΔW is the same.
        assert grade(one, two) not in ("weights", "tensors", "part")
        assert grade(one, self.fused(magnitude.clone())) == "tensors"


def test_ranks_and_alphas_of_every_layer_count() -> None:
    tensors: dict[str, Tensor] = {}
    truth = {}
    for n, (rank, alpha) in enumerate([(1, 1.0), (8, 2.0), (3, -3.0), (2, 0.0), (4, None)]):
        up, down = rand(3 * H, rank), rand(rank, H)
        tensors |= made.kohya(f"lora_unet_double_blocks_{n}_txt_attn_qkv", up, down, alpha)
        scale = 1.0 if not alpha else alpha / rank
        truth[f"transformer/transformer_blocks.{n}.attn.add_v_proj"] = (
            scale * up[2 * H :].double() @ down.double()
        )
    adapter = made.adapter(tensors)
    for name, value in truth.items():
        torch.testing.assert_close(adapter.modules[name].dense(), value)


@pytest.mark.parametrize("large", [False, True])
def test_files_are_read_once_in_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, large: bool
) -> None:
    """A large file is streamed: what the parts of a layer share is kept until the last of them."""
    if large:
        monkeypatch.setattr(reading, "STREAM_ABOVE", 0)
    tensors: dict[str, Tensor] = {}
    for n in range(3):
        up, down = rand(3 * H, 2), rand(2, H)
        tensors |= made.kohya(f"lora_unet_double_blocks_{n}_img_attn_qkv", up, down, 1.0)
    tensors["lora_unet_double_blocks_0_img_attn_qkv.diff_b"] = rand(3 * H)
    save_file(tensors, tmp_path / "x.safetensors")
    seen: dict[str, Tensor] = {}

    def visit(plan: ModulePlan, delta: Delta) -> None:
        seen[plan.name] = delta.dense()

    found = read(tmp_path / "x.safetensors", visit=visit)
    assert found.outcome == "lora"
    truth = made.adapter(tensors).modules
    assert set(seen) == set(truth) and len(seen) == 12
    assert all(torch.equal(seen[name], truth[name].dense()) for name in truth)


def test_what_cannot_be_told_apart_is_compared_with_each(tmp_path: Path) -> None:
    """A file for Flux.1 or Chroma meets those of both, in the index too."""

    def flux(extra: dict[str, Tensor]) -> dict[str, Tensor]:
        g = torch.Generator().manual_seed(8)
        found: dict[str, Tensor] = {}
        for n in range(19):
            up, down = torch.randn(3 * H, 1, generator=g), torch.randn(1, H, generator=g)
            found |= made.kohya(f"lora_unet_double_blocks_{n}_img_attn_qkv", up, down, None)
        return found | extra

    def one(stem: str, o: int) -> dict[str, Tensor]:
        return made.kohya(f"lora_unet_{stem}", torch.ones(o, 1), torch.ones(1, o), None)

    files = {
        "either": flux({}),
        "flux": flux(
            made.kohya("lora_unet_double_blocks_0_img_mod_lin", rand(6 * H, 1), rand(1, H), None)
        ),
        "chroma": flux(one("distilled_guidance_layer_layers_0_in_layer", 5120)),
    }
    for name, tensors in files.items():
        save_file(tensors, tmp_path / f"{name}.safetensors")
    with Store.open(tmp_path / "x.db", "write") as store:
        build(store, [tmp_path], device="cpu")
        found = dict(store.conn.execute("SELECT architecture, id FROM loras"))
        assert set(found) == {"flux1-or-chroma", "flux1", "chroma"}
        pairs = {frozenset((r.x, r.y)) for r in store.relations(2)}
        either = found["flux1-or-chroma"]
        assert pairs == {frozenset((either, found[name])) for name in ("flux1", "chroma")}
        assert all(r.grade == "part" for r in store.relations(2))


def test_shapes_that_contradict_each_other_are_refused() -> None:
    with pytest.raises(NotAnAdapter, match="different ranks"):
        made.adapter(
            made.kohya("lora_unet_double_blocks_0_img_attn_qkv", rand(3 * H, 4), rand(2, H), None)
        )
