"""Spellings of LoRA files of Flux.1, Flux.2 and HunyuanVideo against diffusers' converters.

Both sides are maps of canonical name → ΔW·x for one random x per width: equal products of random
factors mean equal ΔW. Where a converter is wrong the test names the fault and checks the rest.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import pytest
import torch
from diffusers.loaders import lora_conversion_utils as utils

from lorafind.formats.names import tables
from lorafind.formats.names.table import flatten
from tests.formats.test_models_a_checkpoints import Weights, entry, read

Factors = dict[str, tuple[torch.Tensor, torch.Tensor]]

RANK = 6
ALPHA = RANK / 2
#: First and last blocks; converters that want whole files get all.
ENDS = {"flux1": ("0", "18", "37"), "hunyuanvideo": ("0", "1", "19", "39")}
PREFIX = re.compile(r"^(transformer\.|base_model\.model\.|diffusion_model\.|lora_unet_)")


def names(owner: str, spelling: str = "native", blocks: Iterable[str] = ()) -> list[str]:
    """Names of weights in one spelling: those of no block and those of some blocks, or all."""
    found = []
    for name, written, _ in tables.tables()[owner].names:
        number = re.search(r"(?<=blocks\.)\d+", name)
        wanted = written == spelling and not entry(owner, name).parts[0].norm
        if wanted and (not number or not blocks or number[0] in blocks):
            found.append(name)
    return found


def factors(owner: str, chosen: Iterable[str]) -> Factors:
    """Random A [rank, n] and B [o, rank] for every name."""
    generator = torch.Generator().manual_seed(0)
    found: Factors = {}
    for name in chosen:
        rows, columns = entry(owner, name).shape
        found[name] = (
            torch.randn(RANK, columns, generator=generator, dtype=torch.float64),
            torch.randn(rows, RANK, generator=generator, dtype=torch.float64),
        )
    return found


def products(made: Factors, scale: float = 1.0) -> Weights:
    """ΔW·x under the same names."""
    found = {}
    for name, (a, b) in made.items():
        generator = torch.Generator().manual_seed(a.shape[1])
        x = torch.randn(a.shape[1], 1, generator=generator, dtype=torch.float64)
        found[name] = scale * (b @ (a @ x))
    return found


def written(state: Weights) -> Factors:
    """The factors of a converted file by its names without their prefix."""
    stems = {key.partition(".lora_A.weight")[0] for key in state if ".lora_A.weight" in key}
    return {
        PREFIX.sub("", stem): (state[f"{stem}.lora_A.weight"], state[f"{stem}.lora_B.weight"])
        for stem in stems
    }


def peft(made: Factors, prefix: str = "") -> Weights:
    return {
        f"{prefix}{name}.lora_{letter}.weight": factor
        for name, pair in made.items()
        for letter, factor in zip("AB", pair, strict=True)
    }


def kohya(made: Factors, prefix: str = "lora_unet_") -> Weights:
    state: Weights = {}
    for name, (a, b) in made.items():
        stem = prefix + flatten(name)
        state |= {f"{stem}.lora_down.weight": a, f"{stem}.lora_up.weight": b}
        state[f"{stem}.alpha"] = torch.tensor(ALPHA, dtype=torch.float64)
    return state


def check(owner: str, ours: Weights, theirs: Weights) -> None:
    """The same layers with the same products."""
    left, right = read(owner, ours), read(owner, theirs)
    assert left.keys() == right.keys()
    for path, product in left.items():
        torch.testing.assert_close(product, right[path], rtol=1e-11, atol=1e-11)


def swapped(factor: torch.Tensor) -> torch.Tensor:
    """The two halves of the rows the other way round."""
    return torch.cat(factor.chunk(2)[::-1])


# -- Flux.1


def block_diagonal(owner: str, made: Factors) -> Factors:
    """The same files as trainers write them that train the parts of a fused layer alone."""
    found: Factors = {}
    for name, (a, b) in made.items():
        cuts = list(entry(owner, name).cuts())
        wide = torch.zeros(b.shape[0], RANK * len(cuts), dtype=b.dtype)
        for part, (_, start, stop) in enumerate(cuts):
            wide[start:stop, RANK * part : RANK * (part + 1)] = b[start:stop]
        found[name] = (torch.cat([a * (part + 1) for part in range(len(cuts))]), wide)
    return found


@pytest.mark.parametrize("shape", ["dense", "block-diagonal"])
@pytest.mark.parametrize("prefix", ["lora_unet_", "diffusion_model."])
def test_kohya_flux1(shape: str, prefix: str) -> None:
    """Files of sd-scripts and ComfyUI; diffusers forgets the alpha of the last two layers."""
    made = factors("flux1", names("flux1", blocks=ENDS["flux1"]))
    if shape != "dense":
        made = block_diagonal("flux1", made)
    state = kohya(made)
    if prefix != "lora_unet_":
        state = {
            f"{prefix}{name}.{kind}": state[f"lora_unet_{flatten(name)}.{kind}"]
            for name in made
            for kind in ("lora_down.weight", "lora_up.weight", "alpha")
        }
    theirs = products(written(utils._convert_kohya_flux_lora_to_diffusers(state)))
    ours = {
        name: product * (1 if name.startswith("final_layer") else ALPHA / len(made[name][0]))
        for name, product in products(made).items()
    }
    check("flux1", ours, theirs)


def test_onetrainer_mixture_of_flux1() -> None:
    """Names of diffusers, flattened: diffusers reads the attention and the layers of no block."""
    canonical = [path for path, layer in tables.tables()["flux1"].layers.items() if not layer.norm]
    within = re.compile(r"transformer_blocks\.(0|18|37)\..*(attn\.)")
    chosen = [p for p in canonical if within.search(p) or "blocks." not in p]
    chosen = [p for p in chosen if not p.startswith("norm_out")] + ["norm_out.linear"]
    made = factors("flux1", chosen)
    state = utils._convert_kohya_flux_lora_to_diffusers(kohya(made, "lora_transformer_"))
    check("flux1", products(made, ALPHA / RANK), products(written(state)))


def test_onetrainer_mixture_beyond_the_attention_is_lost_in_diffusers() -> None:
    """All other layers of a block get one name, that of the block, and the last one stays."""
    made = factors("flux1", [f"single_transformer_blocks.0.proj_{x}" for x in ("mlp", "out")])
    state = utils._convert_kohya_flux_lora_to_diffusers(kohya(made, "lora_transformer_"))
    assert {key.partition(".lora")[0] for key in state} == {
        "transformer.single_transformer_blocks.0"
    }
    assert len(read("flux1", products(made))) == 2


@pytest.mark.parametrize("prefix", ["", "diffusion_model."])
def test_xlabs(prefix: str) -> None:
    """Double blocks of XLabs, single blocks of USO."""
    made = factors("flux1", names("flux1", "xlabs", ENDS["flux1"]))
    state = {
        f"{prefix}{name}.{word}.weight": factor
        for name, pair in made.items()
        for word, factor in zip(("down", "up"), pair, strict=True)
    }
    theirs = products(written(utils._convert_xlabs_flux_lora_to_diffusers(state)))
    check("flux1", products(made), theirs)


def test_control_lora_of_flux1() -> None:
    """Bare original names with biases and values of norms, all blocks.

    diffusers swaps the halves of A as well as those of B in the last modulation, which is wrong:
    A has no rows of the layer.
    """
    made = factors("flux1", names("flux1"))
    biases = {name: b[:, 0] for name, (_, b) in made.items()}
    norms = {
        name: torch.arange(128.0) + 1000 * n
        for n, (name, spelling, _) in enumerate(tables.tables()["flux1"].names)
        if spelling == "native" and name.endswith(".scale")
    }
    state = peft(made) | {f"{name}.lora_B.bias": bias for name, bias in biases.items()} | norms
    converted = utils._convert_bfl_flux_control_lora_to_diffusers(state)
    theirs = written(converted)
    a, b = theirs["norm_out.linear"]
    assert torch.equal(a, swapped(made["final_layer.adaLN_modulation.1"][0]))
    check("flux1", products(made), products(theirs | {"norm_out.linear": (swapped(a), b)}))
    for suffix, values in ((".lora_B.bias", biases), (".weight", norms)):
        found = {
            PREFIX.sub("", key.removesuffix(suffix)): value
            for key, value in converted.items()
            if key.endswith(suffix) and ".lora_" not in key.removesuffix(suffix)
        }
        check("flux1", values, found)


def test_fal_kontext() -> None:
    """Original names under base_model.model., the blocks and the last layer, all of them."""
    made = factors("flux1", [n for n in names("flux1") if "blocks." in n] + ["final_layer.linear"])
    state = utils._convert_fal_kontext_lora_to_diffusers(peft(made, "base_model.model."))
    check("flux1", products(made), products(written(state)))


# -- Flux.2


FLUX2 = ["flux2-dev", "flux2-klein-9b", "flux2-klein-4b"]


def flux2_blocks(owner: str) -> tuple[str, ...]:
    last = max(int(n) for n in re.findall(r"single_blocks\.(\d+)", " ".join(names(owner))))
    return ("0", "4", str(last))


@pytest.mark.parametrize("owner", FLUX2)
def test_flux2(owner: str) -> None:
    """diffusers does not swap the halves of the last modulation, though it does in whole models."""
    made = factors(owner, names(owner, blocks=flux2_blocks(owner)))
    state = utils._convert_non_diffusers_flux2_lora_to_diffusers(peft(made, "diffusion_model."))
    theirs = written(state)
    a, b = theirs["norm_out.linear"]
    assert torch.equal(b, made["final_layer.adaLN_modulation.1"][1])
    check(owner, products(made), products(theirs | {"norm_out.linear": (a, swapped(b))}))


@pytest.mark.parametrize("owner", FLUX2)
def test_kohya_flux2(owner: str) -> None:
    """diffusers leaves out the guidance and all modulations."""
    made = factors(owner, names(owner, blocks=flux2_blocks(owner)))
    theirs = written(utils._convert_kohya_flux2_lora_to_diffusers(kohya(made)))
    left_out = {n for n in made if "modulation" in n or n.startswith("guidance_in")}
    assert len(left_out) == (6 if owner == "flux2-dev" else 4)
    ours = {name: pair for name, pair in made.items() if name not in left_out}
    check(owner, products(ours, ALPHA / RANK), products(theirs))


def test_flux2_names_with_the_beginning_cut_off() -> None:
    """``sformer_blocks``: diffusers reads them as ``transformer_blocks``."""
    made = factors("flux2-dev", names("flux2-dev", "cut"))
    state = utils._convert_non_diffusers_flux2_lora_to_diffusers(peft(made, "diffusion_model."))
    check("flux2-dev", products(made), products(written(state)))


def test_lokr_of_flux2() -> None:
    """Fused layers stay fused under diffusers' own names of them; again no halves are swapped."""
    chosen = names("flux2-klein-4b")
    state = {
        f"diffusion_model.{name}.lokr_w1": torch.tensor(float(n)) for n, name in enumerate(chosen)
    }
    converted = utils._convert_non_diffusers_flux2_lokr_to_diffusers(state)
    numbers = {int(v): PREFIX.sub("", k.removesuffix(".lokr_w1")) for k, v in converted.items()}
    assert len(numbers) == len(chosen)
    for n, name in enumerate(chosen):
        ours, theirs = (
            entry("flux2-klein-4b", name).parts,
            entry("flux2-klein-4b", numbers[n]).parts,
        )
        assert theirs == (ours[::-1] if "adaLN" in name else ours), name


def test_lycoris_of_flux2() -> None:
    """Names of diffusers, flattened."""
    layers = tables.tables()["flux2-klein-4b"].layers
    chosen = [path for path, layer in layers.items() if "blocks." in path and not layer.norm]
    state = {f"lycoris_{flatten(path)}.lokr_w1": torch.zeros(1) for path in chosen}
    converted = utils._convert_lycoris_flux2_lokr_to_diffusers(state)
    found = [PREFIX.sub("", key.removesuffix(".lokr_w1")) for key in converted]
    assert found == chosen
    assert [entry("flux2-klein-4b", flatten(path)).path for path in chosen] == chosen


# -- HunyuanVideo


@pytest.mark.parametrize("prefix", ["", "transformer.", "diffusion_model."])
def test_hunyuanvideo(prefix: str) -> None:
    """Original names.

    diffusers is wrong in two places: it swaps the halves of A as well as those of B in the last
    modulation, and in the refiner it gives q, k and v a third of A's rows each.
    """
    made = factors("hunyuanvideo", names("hunyuanvideo", blocks=ENDS["hunyuanvideo"]))
    theirs = written(utils._convert_hunyuan_video_lora_to_diffusers(peft(made, prefix)))
    a, b = theirs["norm_out.linear"]
    assert torch.equal(a, swapped(made["final_layer.adaLN_modulation.1"][0]))
    theirs["norm_out.linear"] = (swapped(a), b)
    thirds = [n for n in theirs if "refiner_blocks" in n and n.endswith(("to_q", "to_k", "to_v"))]
    assert len(thirds) == 6
    for name in thirds:
        a, b = theirs[name]
        assert (a.shape[0], b.shape[1]) == (RANK // 3, RANK)
        block = re.search(r"refiner_blocks\.(\d)", name)
        assert block is not None
        fused = f"txt_in.individual_token_refiner.blocks.{block[1]}.self_attn_qkv"
        theirs[name] = (made[fused][0], b)
    check("hunyuanvideo", products(made), products(theirs))
