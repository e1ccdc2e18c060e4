"""Which rows of a fused layer are which canonical layer: what converters of diffusers make of them.

Every row of a written layer is a number of its own; after the conversion the same numbers must lie
where the table says. Where diffusers has a script and nothing to import, the rows are listed as
the script moves them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest
import torch

from lorafind.formats.names import tables
from lorafind.formats.names.table import Entry, flatten

pytest.importorskip("diffusers")
from diffusers.loaders import lora_conversion_utils, single_file_utils

Rows = dict[str, torch.Tensor]


def entries(owner: str, spelling: str) -> Iterator[tuple[str, Entry]]:
    """Names of a spelling with what they mean; canonical where the spelling has no other."""
    return ((n, e) for n, e in tables.tables()[owner].entries() if e.spelling == spelling)


def small(name: str) -> bool:
    """Layers outside of the blocks, and the first two blocks."""
    found = re.match(
        r"(?:transformer_|double_stream_|single_stream_)?(?:blocks|layers)\.(\d+)", name
    )
    return found is None or int(found[1]) < 2


def number(names: dict[str, Entry]) -> Rows:
    """A tensor [o, 1] for every name, no number in two rows."""
    found, start = {}, 0
    for name, entry in names.items():
        stop = start + entry.shape[0]
        found[name] = torch.arange(start, stop, dtype=torch.float64)[:, None]
        start = stop
    return found


def cut(values: Rows, names: dict[str, Entry]) -> Rows:
    """Canonical layer → its rows."""
    return {
        part.path: values[name][start:stop]
        for name, entry in names.items()
        for part, start, stop in entry.cuts()
    }


def equal(ours: Rows, theirs: Rows) -> None:
    assert ours.keys() == theirs.keys()
    for path, rows in ours.items():
        assert torch.equal(rows, theirs[path]), path


@pytest.mark.parametrize("owner", ["sana-0.6b", "sana-1.6b", "sana-4.8b"])
def test_sana_as_the_converter_of_checkpoints(owner: str) -> None:
    skipped = ("cfg_embedder", "q_norm", "k_norm")  # Of Sprint and 1.5, which it does not read.
    native = {
        name: entry
        for name, entry in entries(owner, "native")
        if small(name) and not any(word in name for word in skipped)
    }
    values = number(native)
    checkpoint = {f"{name}.weight": value for name, value in values.items()}
    checkpoint |= dict.fromkeys(("pos_embed", "y_embedder.y_embedding"), torch.zeros(1))
    biases = "x_embedder.proj t_embedder.mlp.0 t_embedder.mlp.2 t_block.1 final_layer.linear "
    biases += "y_embedder.y_proj.fc1 y_embedder.y_proj.fc2"
    blocks = "attn.proj cross_attn.q_linear cross_attn.proj cross_attn.kv_linear "
    blocks += "mlp.inverted_conv.conv mlp.depth_conv.conv"
    for n in range(2):
        checkpoint[f"blocks.{n}.scale_shift_table"] = torch.zeros(1)
        biases += "".join(f" blocks.{n}.{name}" for name in blocks.split())
    checkpoint["final_layer.scale_shift_table"] = torch.zeros(1)
    checkpoint |= {f"{name}.bias": torch.zeros(2) for name in biases.split()}
    made = single_file_utils.convert_sana_transformer_to_diffusers(checkpoint)
    theirs = {k.removesuffix(".weight"): v for k, v in made.items() if k.endswith(".weight")}
    equal(cut(values, native), theirs)


@pytest.mark.parametrize("owner", ["cascade", "cascade-lite"])
def test_cascade_as_the_converter_of_checkpoints(owner: str) -> None:
    """Stage C, whose attention holds one matrix for queries, keys and values."""
    every = dict(entries(owner, "native"))
    native = {n: e for n, e in every.items() if n.endswith(("in_proj_weight", "out_proj"))}
    written = {part.path for entry in native.values() for part in entry.parts}
    native |= {n: e for n, e in entries(owner, "") if n not in written}
    values = number(native)
    checkpoint = {
        name if name.endswith("in_proj_weight") else f"{name}.weight": value
        for name, value in values.items()
    }
    made = single_file_utils.convert_stable_cascade_unet_single_file_to_diffusers(checkpoint)
    equal(cut(values, native), {key.removesuffix(".weight"): value for key, value in made.items()})
    for name, entry in every.items():
        found = re.fullmatch(r"(.*\.attention)\.attn\.(to_[qkv])", name)
        if found:
            assert [part.path for part in entry.parts] == [f"{found[1]}.{found[2]}"]


def test_ideogram_as_the_converter_of_loras() -> None:
    native = {n: e for n, e in entries("ideogram4", "native") if small(n)}
    written = {part.path for entry in native.values() for part in entry.parts}
    for name, entry in entries("ideogram4", ""):
        if small(name) and name.startswith("layers") and name not in written:
            native |= {} if "norm" in name else {name: entry}
    values = number(native)
    file = {}
    for name, value in values.items():
        file[f"diffusion_model.{name}.lora_B.weight"] = value
        file[f"diffusion_model.{name}.lora_A.weight"] = torch.ones(1, 1)
    made = lora_conversion_utils._convert_non_diffusers_ideogram4_lora_to_diffusers(file)
    ending = ".lora_B.weight"
    theirs = {
        key.removeprefix("transformer.").removesuffix(ending): value
        for key, value in made.items()
        if key.endswith(ending)
    }
    equal(cut(values, native), theirs)


def test_hidream_has_one_spelling() -> None:
    names = dict(entries("hidream", ""))
    assert len(names) == len(list(tables.tables()["hidream"].entries()))
    file = {f"diffusion_model.{name}.lora_A.weight": torch.zeros(1) for name in names}
    made = lora_conversion_utils._convert_non_diffusers_hidream_lora_to_diffusers(file)
    assert set(made) == {f"transformer.{name}.lora_A.weight" for name in names}


def stack(*parts: tuple[str, int]) -> list[tuple[str, int, int]]:
    """(canonical name, first row, row after the last) of parts one below the other."""
    found, start = [], 0
    for path, rows in parts:
        found.append((path, start, start + rows))
        start += rows
    return found


def alone(path: str, rows: int) -> list[tuple[str, int, int]]:
    return stack((path, rows))


T = "transformer_blocks"
#: (architecture, written name, its rows), one of each kind of layer.
ROWS = [
    # scripts/convert_pixart_{alpha,sigma}_to_diffusers.py
    ("pixart", "x_embedder.proj", alone("pos_embed.proj", 1152)),
    ("pixart", "y_embedder.y_proj.fc1", alone("caption_projection.linear_1", 1152)),
    ("pixart", "y_embedder.y_proj.fc2", alone("caption_projection.linear_2", 1152)),
    *(
        ("pixart", f"{native}.mlp.{n}", alone(f"adaln_single.emb.{path}.linear_{n // 2 + 1}", rows))
        for n in (0, 2)
        for native, path, rows in (
            ("t_embedder", "timestep_embedder", 1152),
            ("csize_embedder", "resolution_embedder", 384),
            ("ar_embedder", "aspect_ratio_embedder", 384),
        )
    ),
    ("pixart", "t_block.1", alone("adaln_single.linear", 6912)),
    ("pixart", "final_layer.linear", alone("proj_out", 32)),
    ("pixart", "blocks.9.attn.qkv", stack(*((f"{T}.9.attn1.to_{x}", 1152) for x in "qkv"))),
    ("pixart", "blocks.9.attn.proj", alone(f"{T}.9.attn1.to_out.0", 1152)),
    ("pixart", "blocks.9.cross_attn.q_linear", alone(f"{T}.9.attn2.to_q", 1152)),
    (
        "pixart",
        "blocks.9.cross_attn.kv_linear",
        stack(*((f"{T}.9.attn2.to_{x}", 1152) for x in "kv")),
    ),
    ("pixart", "blocks.9.cross_attn.proj", alone(f"{T}.9.attn2.to_out.0", 1152)),
    ("pixart", "blocks.27.mlp.fc1", alone(f"{T}.27.ff.net.0.proj", 4608)),
    ("pixart", "blocks.27.mlp.fc2", alone(f"{T}.27.ff.net.2", 1152)),
    # scripts/convert_hunyuandit_to_diffusers.py
    ("hunyuan-dit", "x_embedder.proj", alone("pos_embed.proj", 1408)),
    ("hunyuan-dit", "mlp_t5.0", alone("text_embedder.linear_1", 8192)),
    ("hunyuan-dit", "mlp_t5.2", alone("text_embedder.linear_2", 1024)),
    ("hunyuan-dit", "t_embedder.mlp.2", alone("time_extra_emb.timestep_embedder.linear_2", 1408)),
    ("hunyuan-dit", "extra_embedder.0", alone("time_extra_emb.extra_embedder.linear_1", 5632)),
    ("hunyuan-dit", "pooler.c_proj", alone("time_extra_emb.pooler.c_proj", 1024)),
    ("hunyuan-dit", "style_embedder", alone("time_extra_emb.style_embedder", 1)),
    (
        "hunyuan-dit",
        "blocks.3.attn1.Wqkv",
        stack(*((f"blocks.3.attn1.to_{x}", 1408) for x in "qkv")),
    ),
    (
        "hunyuan-dit",
        "blocks.3.attn2.kv_proj",
        stack(*((f"blocks.3.attn2.to_{x}", 1408) for x in "kv")),
    ),
    ("hunyuan-dit", "blocks.3.attn2.q_proj", alone("blocks.3.attn2.to_q", 1408)),
    ("hunyuan-dit", "blocks.3.attn1.out_proj", alone("blocks.3.attn1.to_out.0", 1408)),
    ("hunyuan-dit", "blocks.3.attn2.out_proj", alone("blocks.3.attn2.to_out.0", 1408)),
    ("hunyuan-dit", "blocks.3.attn2.k_norm", alone("blocks.3.attn2.norm_k", 88)),
    ("hunyuan-dit", "blocks.3.norm1", alone("blocks.3.norm1.norm", 1408)),
    ("hunyuan-dit", "blocks.3.default_modulation.1", alone("blocks.3.norm1.linear", 1408)),
    ("hunyuan-dit", "blocks.3.mlp.fc1", alone("blocks.3.ff.net.0.proj", 6144)),
    ("hunyuan-dit", "blocks.39.mlp.fc2", alone("blocks.39.ff.net.2", 1408)),
    ("hunyuan-dit", "blocks.39.skip_linear", alone("blocks.39.skip_linear", 1408)),
    (
        "hunyuan-dit",
        "final_layer.adaLN_modulation.1",
        stack(("norm_out.linear.shift", 1408), ("norm_out.linear.scale", 1408)),
    ),
    (
        "hunyuan-dit",
        "norm_out.linear",
        stack(("norm_out.linear.scale", 1408), ("norm_out.linear.shift", 1408)),
    ),
    # scripts/convert_cogvideox_to_diffusers.py, whose twelfths 0–2 and 6–8 are norm1.
    *(
        row
        for owner, d in (("cogvideox-2b", 1920), ("cogvideox-5b", 3072))
        for row in (
            (
                owner,
                "layers.7.attention.query_key_value",
                stack(*((f"{T}.7.attn1.to_{x}", d) for x in "qkv")),
            ),
            (owner, "layers.7.attention.dense", alone(f"{T}.7.attn1.to_out.0", d)),
            (owner, "layers.7.mlp.dense_h_to_4h", alone(f"{T}.7.ff.net.0.proj", 4 * d)),
            (owner, "layers.7.mlp.dense_4h_to_h", alone(f"{T}.7.ff.net.2", d)),
            (owner, "layers.7.input_layernorm", alone(f"{T}.7.norm1.norm", d)),
            (owner, "layers.7.post_attention_layernorm", alone(f"{T}.7.norm2.norm", d)),
            (
                owner,
                "mixins.adaln_layer.adaLN_modulations.7.1",
                stack(
                    (f"{T}.7.norm1.linear.video", 3 * d),
                    (f"{T}.7.norm2.linear.video", 3 * d),
                    (f"{T}.7.norm1.linear.text", 3 * d),
                    (f"{T}.7.norm2.linear.text", 3 * d),
                ),
            ),
            (
                owner,
                f"{T}.7.norm2.linear",
                stack((f"{T}.7.norm2.linear.video", 3 * d), (f"{T}.7.norm2.linear.text", 3 * d)),
            ),
            (owner, "mixins.final_layer.adaLN_modulation.1", alone("norm_out.linear", 2 * d)),
            (owner, "mixins.final_layer.norm_final", alone("norm_out.norm", d)),
            (owner, "final_layernorm", alone("norm_final", d)),
            (owner, "time_embed.2", alone("time_embedding.linear_2", 512)),
        )
    ),
]


@pytest.mark.parametrize(("owner", "name", "rows"), ROWS, ids=[f"{r[0]} {r[1]}" for r in ROWS])
def test_rows_as_the_scripts_move_them(
    owner: str, name: str, rows: list[tuple[str, int, int]]
) -> None:
    entry = tables.index().get(flatten(name))[owner]
    assert [(part.path, start, stop) for part, start, stop in entry.cuts()] == rows
    assert entry.shape[0] == rows[-1][2]


@pytest.mark.parametrize(
    ("owner", "name", "parts"),
    [
        ("pixart", "blocks.0.attn.qkv", 3),
        ("pixart", "blocks.0.cross_attn.kv_linear", 2),
        ("ideogram4", "layers.33.attention.qkv", 3),
        ("cascade", "up_blocks.1.23.attention.attn.in_proj", 3),
        ("cascade-lite", "down_blocks.1.35.attention.attn.in_proj", 3),
    ],
)
def test_a_part_of_a_fused_layer_written_alone(owner: str, name: str, parts: int) -> None:
    """OneTrainer puts the number of the part behind the fused layer's name."""
    index = tables.index()
    whole = index.get(flatten(name))[owner].parts
    single = [index.get(flatten(f"{name}.{n}"))[owner].parts for n in range(parts)]
    assert [part for found in single for part in found] == list(whole)
    assert owner not in index.get(flatten(f"{name}.{parts}"))
